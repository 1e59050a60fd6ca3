"""Which name means what, where: scopes, their imports, and one walk over a file's nodes."""

from __future__ import annotations

import ast
import builtins
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Final, Literal

from creche_server.scan.source import Source

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Definition = FunctionNode | ast.ClassDef

FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_SCOPES: Final = (*FUNCTIONS, ast.ClassDef)
_COMPREHENSIONS: Final = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LEAVES: Final = (ast.expr_context, ast.operator, ast.Constant)  # which no check looks at
_TYPE_CHECKING: Final = frozenset({"typing.TYPE_CHECKING", "typing_extensions.TYPE_CHECKING"})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """A module's, a class's or a function's names."""

    kind: Literal["module", "class", "function"]
    node: ast.Module | Definition
    parent: Scope | None
    name: str  # dotted, from the module on
    imports: dict[str, str]  # {local name: what it stands for, dotted}
    bound: frozenset[str]  # all other names that are assigned here
    globals: frozenset[str]
    from_imports: frozenset[str]  # of `imports`: taken out of a module, so may be anything
    deleted: frozenset[str]
    values: dict[str, tuple[ast.expr, ...]]  # {name: all it is}, of those that are only assigned
    entered: dict[str, ast.expr]  # {name: what was entered}, by the body's `with`

    @property
    def module(self) -> Scope:
        scope = self
        while scope.parent is not None:
            scope = scope.parent
        return scope

    @property
    def function(self) -> Scope | None:
        """The innermost function that this is in, or is."""
        scope: Scope | None = self
        while scope is not None and scope.kind != "function":
            scope = scope.parent
        return scope

    @property
    def method_of(self) -> Scope | None:
        """The class of which this function is a method."""
        parent = self.parent
        return parent if self.kind == "function" and parent and parent.kind == "class" else None

    @property
    def owner(self) -> Scope | None:
        """The innermost class around this, with functions between them or without."""
        scope: Scope | None = self
        while scope is not None and scope.kind != "class":
            scope = scope.parent
        return scope

    def resolve(self, node: ast.expr) -> str | None:
        """The dotted name that an expression stands for; None for whatever is made at run time."""
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return self.resolve_name(node.id) if isinstance(node, ast.Name) else None

    def resolve_name(self, name: str) -> str | None:
        """What a bare name stands for, seen from here."""
        holder = self.holder(name)
        if holder is None:
            return f"builtins.{name}" if hasattr(builtins, name) else None
        if name in holder.imports:
            return holder.imports[name]
        return None if holder.function is not None else f"{holder.name}.{name}"

    def holder(self, name: str) -> Scope | None:
        """The scope that gives a bare name its meaning here."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.globals:
                scope = self.module
            # A method does not see its class's names.
            is_visible = scope is self or scope.kind != "class"
            if is_visible and (name in scope.imports or name in scope.bound):
                return scope
            scope = scope.parent
        return None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A node, where it stands."""

    node: ast.AST
    statement: ast.stmt  # the innermost that it is part of, or is
    scope: Scope  # the one that it is evaluated in
    inner: Scope | None  # the one that it opens
    main: bool  # under `if __name__ == "__main__"`


def module_scope(source: Source) -> Scope:
    """The outermost scope of a file."""
    return _opened(source.tree, None, source.module, source)


def places(source: Source, outermost: Scope) -> Iterator[Place]:
    """The nodes of a file in the order of the text, without recursion; type-only code left out."""
    stack: list[Place] = [
        Place(statement, statement, outermost, None, main=False)
        for statement in reversed(source.tree.body)
    ]
    while stack:
        place = stack.pop()
        node = place.node
        if isinstance(node, _SCOPES):
            name = getattr(node, "name", "<lambda>")
            inner = _opened(node, place.scope, f"{place.scope.name}.{name}", source)
            place = dataclasses.replace(place, inner=inner)
        yield place
        stack.extend(reversed(list(_below(place))))


def _below(place: Place) -> Iterator[Place]:
    node = place.node
    body: set[int] = set()
    if isinstance(node, ast.Lambda):
        body = {id(node.body)}
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        body = set(map(id, node.body))
    skipped: set[int] = set()
    main = place.main
    if isinstance(node, ast.If):
        if place.scope.resolve(node.test) in _TYPE_CHECKING:
            skipped = set(map(id, node.body))
        main = main or _is_main_guard(node.test)
    for child in ast.iter_child_nodes(node):
        if id(child) in skipped or isinstance(child, _LEAVES):
            continue
        scope = place.inner if id(child) in body and place.inner is not None else place.scope
        yield Place(
            child,
            child if isinstance(child, ast.stmt) else place.statement,
            scope,
            None,
            main=main,
        )


def _is_main_guard(test: ast.expr) -> bool:
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id == "__name__"
    )


def parameters(node: FunctionNode) -> list[ast.arg]:
    """All of a function's parameters, in order."""
    found = node.args
    every = [*found.posonlyargs, *found.args, found.vararg, *found.kwonlyargs, found.kwarg]
    return [parameter for parameter in every if parameter is not None]


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module's, a class's or a function's own body, in no particular order."""
    body: list[ast.AST] | ast.AST = getattr(node, "body", [])
    stack: list[ast.AST] = [body] if isinstance(body, ast.AST) else [*body]
    while stack:
        current = stack.pop()
        yield current
        if isinstance(current, _SCOPES):
            stack.extend(getattr(current, "decorator_list", []))
        else:
            stack.extend(ast.iter_child_nodes(current))


def _opened(
    node: ast.Module | Definition,
    parent: Scope | None,
    name: str,
    source: Source,
) -> Scope:
    imports: dict[str, str] = {}
    declared: set[str] = set()
    bound: set[str] = set()
    taken: set[str] = set()
    deleted: set[str] = set()
    hidden: set[int] = set()  # names of comprehensions, which the module around does not have
    given: list[str] = []
    if isinstance(node, FUNCTIONS):
        given = [parameter.arg for parameter in parameters(node)]
        bound.update(given)
    nodes = list(own_nodes(node))
    for inner in nodes:
        if isinstance(inner, _COMPREHENSIONS) and not isinstance(node, FUNCTIONS):
            for generator in inner.generators:
                hidden.update(map(id, ast.walk(generator.target)))
        if isinstance(inner, (ast.Import, ast.ImportFrom)):
            found_imports = _imported(inner, source)
            imports.update(found_imports)
            taken.update(found_imports if isinstance(inner, ast.ImportFrom) else ())
        elif isinstance(inner, ast.Global):
            declared.update(inner.names)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Del):
            deleted.add(inner.id)
        elif id(inner) not in hidden and (found := _bound_by(inner)) is not None:
            bound.add(found)
    kind: Literal["module", "class", "function"] = "function"
    if not isinstance(node, FUNCTIONS):
        kind = "class" if isinstance(node, ast.ClassDef) else "module"
    return Scope(
        kind=kind,
        node=node,
        parent=parent,
        name=name,
        imports=imports,
        bound=frozenset(bound - declared),
        globals=frozenset(declared),
        from_imports=frozenset(taken),
        deleted=frozenset(deleted),
        values=_values(nodes, [*imports, *given]),
        entered={
            item.optional_vars.id: item.context_expr
            for item in nodes
            if isinstance(item, ast.withitem) and isinstance(item.optional_vars, ast.Name)
        },
    )


def _values(nodes: list[ast.AST], otherwise: list[str]) -> dict[str, tuple[ast.expr, ...]]:
    """{name: values} of the names that nothing but assignments binds."""
    values: dict[str, list[ast.expr]] = {}
    times = Counter(otherwise)  # {name: how often something else binds it}
    for node in nodes:
        if (found := _bound_by(node)) is not None:
            times[found] += 1
        for target, value in _assigned(node):
            times[target] -= 1
            if value is not None:
                values.setdefault(target, []).append(value)
    return {name: tuple(found) for name, found in values.items() if not times[name]}


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """(name, value) of what an assignment binds; no value where it adds to one."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, value
        case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
            yield name, value
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
            yield name, None
        case ast.NamedExpr(target=ast.Name(id=name), value=value):
            yield name, value
        case _:
            pass


def _bound_by(node: ast.AST) -> str | None:
    """The name that a node gives something."""
    match node:
        case ast.Name(id=found, ctx=ast.Store()):
            return found
        case ast.FunctionDef(name=found) | ast.AsyncFunctionDef(name=found):
            return found
        case ast.ClassDef(name=found) | ast.ExceptHandler(name=str(found)):
            return found
        case ast.MatchAs(name=str(found)) | ast.MatchStar(name=str(found)):
            return found
        case ast.MatchMapping(rest=str(found)):
            return found
        case _:
            return None


def _imported(node: ast.Import | ast.ImportFrom, source: Source) -> dict[str, str]:
    if isinstance(node, ast.Import):
        return {
            alias.asname or alias.name.partition(".")[0]: (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )
            for alias in node.names
        }
    base = node.module or ""
    if node.level:
        package = source.module.split(".")
        if not source.is_package:
            package.pop()
        kept = package[: len(package) - node.level + 1]
        base = ".".join([*kept, base] if base else kept)
    prefix = f"{base}." if base else ""
    return {alias.asname or alias.name: f"{prefix}{alias.name}" for alias in node.names}
