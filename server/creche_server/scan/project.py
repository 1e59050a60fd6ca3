"""All scanned files together: where a name leads, and what its class or function is like."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeGuard

from creche_server.scan import known
from creche_server.scan.scopes import Place, Scope, module_scope, own_nodes, places
from creche_server.scan.source import Source

_MOST_STEPS: Final = 10  # re-exports, or base classes, that are followed

_COPYING: Final = frozenset(  # classes that copy their defaults for each instance
    {
        *("pydantic.BaseModel", "pydantic.RootModel", "pydantic_settings.BaseSettings"),
        *("msgspec.Struct", "sqlmodel.SQLModel"),
    },
)
_ENUMS: Final = frozenset(
    {"enum.Enum", "enum.StrEnum", "enum.IntEnum", "enum.Flag", "enum.IntFlag", "enum.ReprEnum"},
)
_METACLASSES: Final = frozenset({"builtins.type", "abc.ABCMeta", "enum.EnumMeta", "enum.EnumType"})
_NAMED_TUPLES: Final = frozenset({"typing.NamedTuple", "typing_extensions.NamedTuple"})
_DATACLASSES: Final = frozenset(
    {"dataclasses.dataclass", "attrs.define", "attr.s", "attr.define", "attrs.frozen"},
)
_LITERALS: Final = (ast.Dict, ast.DictComp, ast.List, ast.ListComp, ast.Set, ast.SetComp)
_BUILDERS: Final = frozenset({"__init__", "__new__", "__post_init__", "__attrs_post_init__"})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Class:
    """A class that one of the files defines."""

    node: ast.ClassDef
    scope: Scope  # its own
    around: Scope


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function that one of the files defines at module level, or in a class there."""

    node: ast.FunctionDef | ast.AsyncFunctionDef
    scope: Scope
    around: Scope


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class File:
    """A file with its scopes opened."""

    source: Source
    scope: Scope
    places: tuple[Place, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Project:
    """The scanned files. All names are dotted, as an import would give them."""

    files: tuple[File, ...]
    modules: Mapping[str, File | None]  # by every ending of their path; None if two have it
    classes: Mapping[str, Class]
    functions: Mapping[str, Function]
    told: frozenset[str]  # variables whose `set` is given somebody's identity somewhere
    # {(function, steps left): what it returns}, so that no function is read twice in a scan
    returned: dict[tuple[str, int], Any] = dataclasses.field(default_factory=dict[Any, Any])

    def canonical(self, name: str) -> str:
        """Where the thing is defined: `creche.Run` is `creche._run.Run`."""
        for _ in range(_MOST_STEPS):
            found = self._split(name)
            if found is None:
                return name
            file, rest = found
            first, _, others = rest.partition(".")
            target = _behind(file.scope, first)
            if target is None:
                return f"{file.scope.name}.{rest}" if rest else file.scope.name
            name = f"{target}.{others}" if others else target
        return name

    def resolve(self, scope: Scope, node: ast.expr) -> str | None:
        """The dotted name that an expression stands for, followed to its definition."""
        name = scope.resolve(node)
        return None if name is None else self.canonical(name)

    def meanings(self, node: ast.expr, scope: Scope) -> list[tuple[ast.expr, Scope]]:
        """The expression itself and, for a variable of a function, what it is assigned there."""
        found = [(node, scope)]
        for current, around in found:
            holder = around.holder(current.id) if isinstance(current, ast.Name) else None
            if holder is not None and holder.function is not None and len(found) < _MOST_STEPS:
                assigned = holder.values.get(getattr(current, "id", ""), ())
                found += [(value, holder) for value in assigned]
        return found

    def values(self, node: ast.expr, scope: Scope) -> list[tuple[ast.expr, Scope]]:
        """What a variable is assigned, wherever that is seen; empty if it may be anything else."""
        holder = scope.holder(node.id) if isinstance(node, ast.Name) else None
        if isinstance(node, ast.Name) and holder is not None and holder.function is not None:
            return [(value, holder) for value in holder.values.get(node.id, ())]
        name = self.resolve(scope, node)
        return [] if name is None else self.values_of(name)

    def values_of(self, name: str) -> list[tuple[ast.expr, Scope]]:
        """What a module's or a class's variable is assigned in its body."""
        owner, _, last = name.rpartition(".")
        file, found = self.modules.get(owner), self.classes.get(owner)
        if found is not None and self.is_enum(owner):
            return []  # its members are made from these, and cannot be written
        scope = file.scope if file is not None else found.scope if found is not None else None
        return [] if scope is None else [(value, scope) for value in scope.values.get(last, ())]

    def is_module(self, name: str) -> bool:
        """Whether that is one of the files."""
        return self.modules.get(name) is not None

    def is_variable(self, name: str) -> bool:
        """Whether that is bound at a file's module level to what is no class, function, module."""
        found = self._split(name)
        if found is None or name in self.classes or name in self.functions:
            return False
        file, rest = found
        return rest in file.scope.bound

    def bases(self, name: str) -> frozenset[str]:
        """All that a class of ours derives from, directly or not."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            known_class = self.classes.get(waiting.pop())
            if known_class is None:
                continue
            for base in known_class.node.bases:
                inner = base.value if isinstance(base, ast.Subscript) else base
                above = self.resolve(known_class.around, inner)
                if above is not None and above not in found:
                    found.add(above)
                    waiting.append(above)
        return frozenset(found)

    def copies_defaults(self, name: str) -> bool:
        return bool(self.bases(name) & _COPYING)

    def is_enum(self, name: str) -> bool:
        return bool(self.bases(name) & _ENUMS)

    def is_metaclass(self, name: str) -> bool:
        return bool(self.bases(name) & _METACLASSES)

    def is_named_tuple(self, name: str) -> bool:
        return bool(self.bases(name) & _NAMED_TUPLES)

    def keeps_state(self, name: str) -> bool:
        """Whether instances of a class of ours can change after they were made.

        They can when a method writes to `self`, when the constructor puts a mutable literal
        there, when it is a dataclass that is not frozen, and when a base class of it can.
        """
        if self.is_enum(name) or self.is_named_tuple(name):
            return False
        return self._can_change(name, frozenset()) or any(
            base in known.MUTABLE_TYPES
            or base in known.STATEFUL
            or self._can_change(base, frozenset())
            for base in self.bases(name)
        )

    def _can_change(self, name: str, holders: frozenset[str]) -> bool:
        """Whether that is so; `holders` are those that hold one, and are asked about already."""
        found = self.classes.get(name)
        if found is None or name in holders:
            return False
        for decorator in found.node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            if self.resolve(found.around, call.func if call else decorator) in _DATACLASSES:
                return not _is_frozen(call) and any(
                    isinstance(item, ast.AnnAssign) for item in found.node.body
                )
        return any(
            _is_method(item) and self._writes_to_self(item, found.around, holders | {name})
            for item in found.node.body
        )

    def _writes_to_self(
        self,
        method: ast.FunctionDef | ast.AsyncFunctionDef,
        around: Scope,
        holders: frozenset[str],
    ) -> bool:
        self_name = method.args.args[0].arg
        for node in own_nodes(method):
            match node:
                case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                    if name == self_name and method.name not in _BUILDERS:
                        return True
                case (
                    ast.Assign(targets=[ast.Attribute(value=ast.Name(id=name))], value=value)
                    | ast.AnnAssign(target=ast.Attribute(value=ast.Name(id=name)), value=value)
                ):
                    if name != self_name or value is None:
                        continue
                    if self._is_mutable(value, around, holders):
                        return True
                case _:
                    pass
        return False

    def _is_mutable(self, value: ast.expr, around: Scope, holders: frozenset[str]) -> bool:
        """Whether a constructor's value is plainly a container, a resource, or holds such."""
        if isinstance(value, ast.Call):
            name = self.resolve(around, value.func) or ""
            if name in self.classes:
                return self._can_change(name, holders)
            return name in known.MUTABLE or known.is_stateful(name)
        return isinstance(value, _LITERALS)

    def _split(self, name: str) -> tuple[File, str] | None:
        """The file that a dotted name begins with, and the rest of it."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            file = self.modules.get(".".join(parts[:length]))
            if file is not None:
                return file, ".".join(parts[length:])
        return None


def _behind(scope: Scope, name: str) -> str | None:
    """What a module's name is another name of: it is imported, or assigned once and so."""
    if name not in scope.bound:
        return scope.imports.get(name)
    values = scope.values.get(name, ())
    target = scope.resolve(values[0]) if len(values) == 1 else None
    return None if target == f"{scope.name}.{name}" else target


def _is_frozen(call: ast.Call | None) -> bool:
    return call is not None and any(
        keyword.arg == "frozen" and isinstance(keyword.value, ast.Constant) and keyword.value.value
        for keyword in call.keywords
    )


def _is_method(item: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    return isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and bool(item.args.args)


def read_project(sources: Sequence[Source]) -> Project:
    """Put files together; nothing is checked yet. May raise RecursionError for monstrous ones."""
    files = tuple(_opened(source) for source in sources)
    modules: dict[str, File | None] = {}
    for file in files:
        for ending in _endings(file):
            modules[ending] = None if ending in modules else file
        modules[file.source.module] = file
    classes: dict[str, Class] = {}
    functions: dict[str, Function] = {}
    for file in files:
        for place in file.places:
            if place.inner is None or place.scope.function is not None:
                continue
            if isinstance(place.node, ast.ClassDef):
                classes[place.inner.name] = Class(place.node, place.inner, place.scope)
            elif isinstance(place.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions[place.inner.name] = Function(place.node, place.inner, place.scope)
    project = Project(files, modules, classes, functions, frozenset())
    return dataclasses.replace(project, told=frozenset(_told(project)))


def _told(project: Project) -> Iterator[str]:
    """What is set to an identity: `slot.set(user_id)`, whatever the variable is called."""
    for file in project.files:
        for place in file.places:
            match place.node:
                case ast.Call(
                    func=ast.Attribute(value=variable, attr="set"),
                    args=[ast.Name(id=given) | ast.Attribute(attr=given)],
                ) if known.is_identity_name(given):
                    name = project.resolve(place.scope, variable)
                    if name is not None:
                        yield name
                case _:
                    pass


def _opened(source: Source) -> File:
    scope = module_scope(source)
    return File(source, scope, tuple(places(source, scope)))


def _endings(file: File) -> Iterator[str]:
    """`a/b/c.py` may be imported as a.b.c or b.c, depending on the import path.

    Nothing shorter than its package allows: our `http` package is not the standard library's.
    """
    path = file.source.path.replace("\\", "/").removesuffix(".py").removesuffix("/__init__")
    parts = [part for part in path.split("/") if part not in {"", ".", ".."}]
    shortest = file.source.module.count(".") + 1
    for start in range(len(parts) - shortest):
        yield ".".join(parts[start:])
