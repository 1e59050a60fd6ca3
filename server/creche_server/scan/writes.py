"""Writes that reach beyond the run: CR003, CR004, CR005 and CR009."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

from creche_server.scan import known, rules
from creche_server.scan.findings import Finding
from creche_server.scan.scopes import Scope
from creche_server.scan.spot import Spot

# Where a class is still being made, which happens once.
_MAKING: Final = frozenset({"__init_subclass__", "__set_name__", "__class_getitem__"})
_MAKING_OF_METACLASS: Final = frozenset({"__init__", "__new__", "__prepare__"})


def global_writes(spot: Spot) -> Iterator[Finding]:
    """`global`, and writes to what `globals()` returns."""
    node = spot.node
    if isinstance(node, ast.Global) and spot.in_function:
        names = ", ".join(f"`{name}`" for name in node.names)
        yield spot.finding(rules.GLOBAL_WRITE, f"this function rebinds the module's {names}", node)
    for target in _written(node):
        if isinstance(target, ast.Subscript) and _is_namespace(spot, target.value):
            yield spot.finding(rules.GLOBAL_WRITE, "the module's variables are written", target)
    match node:
        case ast.Call(func=ast.Attribute(value=receiver, attr="update" | "setdefault" | "pop")):
            if _is_namespace(spot, receiver):
                yield spot.finding(rules.GLOBAL_WRITE, "the module's variables are written", node)
        case _:
            pass


def _is_namespace(spot: Spot, node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and spot.resolve(node.func) in {"builtins.globals", "builtins.vars"}
        and not any(spot.resolve(argument) is None for argument in node.args)
    )


def class_and_module_writes(spot: Spot) -> Iterator[Finding]:
    """Attributes of modules, classes and functions that are set, deleted, or set by name."""
    for target in _written(spot.node):
        place = target.value if isinstance(target, ast.Subscript) else target
        if isinstance(place, ast.Attribute) and not _is_of_process(spot, target):
            yield from _write(spot, place.value, place.attr, target, target is not place)
    match spot.node:
        case ast.Call(args=[owner, name, *_]):
            if spot.called() in {"builtins.setattr", "builtins.delattr"}:
                attribute = name.value if isinstance(name, ast.Constant) else "…"
                yield from _write(spot, owner, str(attribute), spot.node, is_item=False)
        case _:
            pass


def _written(node: ast.AST) -> Iterator[ast.Attribute | ast.Subscript]:
    """The attributes and items that a statement writes or deletes."""
    waiting: list[ast.expr] = []
    match node:
        case ast.Assign(targets=targets) | ast.Delete(targets=targets):
            waiting = [*targets]
        case ast.AugAssign(target=target) | ast.For(target=target) | ast.AsyncFor(target=target):
            waiting = [target]
        case ast.AnnAssign(target=target, value=value) if value is not None:
            waiting = [target]
        case ast.With(items=items) | ast.AsyncWith(items=items):
            waiting = [item.optional_vars for item in items if item.optional_vars is not None]
        case _:
            pass
    while waiting:
        target = waiting.pop(0)
        if isinstance(target, (ast.Attribute, ast.Subscript)):
            yield target
        elif isinstance(target, (ast.Tuple, ast.List)):
            waiting += target.elts
        elif isinstance(target, ast.Starred):
            waiting.append(target.value)


def _write(
    spot: Spot,
    owner: ast.expr,
    attribute: str,
    at: ast.expr,
    is_item: bool,  # noqa: FBT001
) -> Iterator[Finding]:
    short = f"{ast.unparse(owner)}.{attribute}"
    if _is_own_class(spot, owner):
        if _is_making_class(spot.scope):
            return
        message = f"`{short}` belongs to the class, so to all its instances"
        yield spot.finding(rules.CLASS_WRITE, message, at)
        return
    name = spot.resolve(owner)
    if name is None or name in known.PROCESS_OBJECTS:
        return
    if _is_ours(spot, name):
        # Behind its definition a class or function may still be completed; once, on import.
        if spot.in_function:
            kind = "class" if name in spot.project.classes else "function"
            message = f"`{short}` belongs to the {kind}, so to everybody who uses it"
            yield spot.finding(rules.CLASS_WRITE, message, at)
    elif name == "builtins.super" or not _is_foreign(spot, owner, name):
        return
    elif not is_item or spot.in_function:
        yield spot.finding(rules.PATCH, f"`{short}` belongs to {_owner_of(spot, name)}", at)


def _is_own_class(spot: Spot, owner: ast.expr) -> bool:
    """`cls`, `type(self)` or `self.__class__`, in a method."""
    function = spot.scope.function
    if function is None or function.owner is None:
        return False
    match owner:
        case ast.Name(id=name):
            return _first_is_class(function, name)
        case ast.Call(func=function_node, args=[ast.Name()]):
            return spot.resolve(function_node) == "builtins.type"
        case ast.Attribute(attr="__class__", value=ast.Name()):
            return True
        case _:
            return False


def _first_is_class(function: Scope, name: str) -> bool:
    """Whether that is the first parameter of the method around, and is a class."""
    scope: Scope | None = function
    while scope is not None and scope.method_of is None:
        scope = scope.parent.function if scope.parent is not None else None
    if scope is None or isinstance(scope.node, (ast.Module, ast.ClassDef, ast.Lambda)):
        return False
    given = [*scope.node.args.posonlyargs, *scope.node.args.args]
    if not given or given[0].arg != name:
        return False
    decorators = {ast.unparse(decorator) for decorator in scope.node.decorator_list}
    return name in {"cls", "klass", "mcs", "mcls"} or "classmethod" in decorators


def _is_making_class(scope: Scope) -> bool:
    function = scope.function
    method = getattr(function.node, "name", "") if function is not None else ""
    owner = function.method_of if function is not None else None
    if method in _MAKING:
        return True
    if owner is None or not isinstance(owner.node, ast.ClassDef):
        return False
    bases = {ast.unparse(base).rpartition(".")[2] for base in owner.node.bases}
    return method in _MAKING_OF_METACLASS and bool(
        bases & {"type", "ABCMeta", "EnumMeta", "EnumType"}
    )


def _is_ours(spot: Spot, name: str) -> bool:
    """Whether that is a class or function of the same file."""
    return (name in spot.project.classes or name in spot.project.functions) and name.startswith(
        f"{spot.file.scope.name}.",
    )


def _is_foreign(spot: Spot, owner: ast.expr, name: str) -> bool:
    """Whether a name leads out of this file: to a module, or to a class of another."""
    root = owner
    while isinstance(root, ast.Attribute):
        root = root.value
    if not isinstance(root, ast.Name):
        return False
    importing = _importing(spot.scope, root.id)
    if importing is None:
        return name.startswith("builtins.") and name.count(".") == 1 and _is_class_name(name)
    project = spot.project
    is_module = root.id not in importing.from_imports  # else it may be anything
    if is_module or name in project.classes or name in project.functions:
        return True
    return project.is_module(name) or _is_class_name(name)


def _importing(scope: Scope, name: str) -> Scope | None:
    """The scope that imports what a bare name stands for here."""
    current: Scope | None = scope
    while current is not None:
        if current is scope or current.kind != "class":
            if name in current.imports:
                return current
            if name in current.bound:
                return None
        current = current.parent
    return None


def _is_class_name(name: str) -> bool:
    last = name.rpartition(".")[2].lstrip("_")
    return last[:1].isupper() and not (last.isupper() and len(last) > 1)


def _owner_of(spot: Spot, name: str) -> str:
    if name in spot.project.classes or _is_class_name(name):
        return f"the class {name}"
    return f"the module {name}" if "." not in name or spot.project.is_module(name) else f"{name}"


# --- the process itself


def process_settings(spot: Spot) -> Iterator[Finding]:
    """The environment, the working directory, the import path, signals, the locale."""
    for target in _written(spot.node):
        if _is_of_process(spot, target):
            short = ast.unparse(target.value if isinstance(target, ast.Subscript) else target)
            yield spot.finding(rules.PROCESS_SETTING, f"`{short}` is written", target)
    match spot.node:
        case ast.AugAssign(target=ast.Name() as bare):
            if spot.resolve(bare) in known.PROCESS_OBJECTS:
                yield spot.finding(rules.PROCESS_SETTING, f"`{bare.id}` is written", bare)
        case ast.Call():
            name = spot.called()
            if name in known.PROCESS_CALLS or (
                name in known.SIGNAL_CALLS and not _is_entry_point(spot)
            ):
                message = f"`{name}` changes the whole process"
                yield spot.finding(rules.PROCESS_SETTING, message, spot.node)
        case _:
            pass


def _is_of_process(spot: Spot, target: ast.Attribute | ast.Subscript) -> bool:
    owner = target.value if isinstance(target, ast.Subscript) else target
    return spot.resolve(owner) in known.PROCESS_OBJECTS


def _is_entry_point(spot: Spot) -> bool:
    """Where a process may choose how it takes signals: its `main`, or under the guard."""
    function = spot.scope.function
    return spot.place.main or getattr(function and function.node, "name", "") in {"main", "_main"}
