"""Writes that reach beyond the run: CR003, CR004 and CR005."""

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
_SETTERS: Final = frozenset(
    {
        *("builtins.setattr", "builtins.delattr", "builtins.type.__setattr__"),
        *("builtins.type.__delattr__", "builtins.object.__setattr__"),
        "builtins.object.__delattr__",
    },
)
_IMPORTING: Final = frozenset(
    {"builtins.__import__", "importlib.import_module", "inspect.getmodule", "sys.modules.get"},
)


def global_writes(spot: Spot) -> Iterator[Finding]:
    """`global`, writes to what `globals()` returns, and to what a module's variable holds."""
    node = spot.node
    if isinstance(node, ast.Global) and spot.in_function:
        names = ", ".join(f"`{name}`" for name in node.names)
        yield spot.finding(rules.GLOBAL_WRITE, f"this function rebinds the module's {names}", node)
    for target in written(node):
        if isinstance(target, ast.Subscript) and _is_globals(spot, target.value):
            yield spot.finding(rules.GLOBAL_WRITE, "the module's variables are written", target)
        yield from _variable(spot, target.value, target)
    match node:
        case ast.Call(func=ast.Attribute(value=receiver, attr=method)):
            if method in {"update", "setdefault", "pop"} and _is_globals(spot, receiver):
                yield spot.finding(rules.GLOBAL_WRITE, "the module's variables are written", node)
            if _is_changing(node):
                yield from _variable(spot, receiver, node)
        case _:
            pass


def _is_globals(spot: Spot, node: ast.expr) -> bool:
    return any(
        isinstance(found, ast.Call) and spot.resolve(found.func) == "builtins.globals"
        for found in spot.meanings(node)
    )


def _variable(spot: Spot, node: ast.expr, at: ast.expr) -> Iterator[Finding]:
    """A change to what a module's variable holds, if its definition does not tell that it can."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if not spot.in_function:
        return
    for found in spot.meanings(node):
        name = spot.resolve(found)
        root = found
        while isinstance(root, ast.Attribute):
            root = root.value
        importing = _importing(spot.scope, root.id) if isinstance(root, ast.Name) else None
        if importing is not None and found is not root:
            continue  # an attribute of something imported is the other rule's
        if name is not None and spot.project.is_variable(name) and spot.what_is(found) is None:
            message = f"the module's `{name}` is changed"
            yield spot.finding(rules.GLOBAL_WRITE, message, at, symbol=name)
            return


def _is_changing(node: ast.Call) -> bool:
    """Whether this calls a method by which containers are changed."""
    least = known.CHANGING.get(node.func.attr) if isinstance(node.func, ast.Attribute) else None
    return least is not None and len(node.args) >= least


def class_and_module_writes(spot: Spot) -> Iterator[Finding]:
    """Attributes of modules, classes and functions that are set, deleted, or set by name."""
    for target in written(spot.node):
        if isinstance(target, ast.Attribute):
            yield from _write(spot, target.value, target.attr, target, is_item=False)
        else:
            yield from _item(spot, target.value, target)
    match spot.node:
        case ast.Call(args=[owner, name, *_]) if spot.called() in _SETTERS:
            attribute = name.value if isinstance(name, ast.Constant) else "…"
            yield from _write(spot, owner, str(attribute), spot.node, is_item=False)
        case ast.Call(func=ast.Attribute(value=container)) as call if _is_changing(call):
            for found in spot.meanings(container):
                if isinstance(found, ast.Attribute) and _is_seen(spot, found):
                    yield from _write(spot, found.value, found.attr, call, is_item=True)
        case _:
            pass


def _item(spot: Spot, container: ast.expr, at: ast.expr) -> Iterator[Finding]:
    """`owner.attribute[...] = ...` and `vars(owner)[...] = ...`."""
    for found in spot.meanings(container):
        if isinstance(found, ast.Attribute):
            yield from _write(spot, found.value, found.attr, at, is_item=True)
        elif (
            isinstance(found, ast.Call)
            and found.args
            and spot.resolve(found.func) == "builtins.vars"
        ):
            yield from _write(spot, found.args[0], "…", at, is_item=False)


def _is_seen(spot: Spot, container: ast.Attribute) -> bool:
    """Whether it is of a class, or a variable of one of the files: a library's may be anything."""
    owner = container.value
    if any(_is_own_class(spot, found) for found in spot.meanings(owner)):
        return True
    name = spot.resolve(owner)
    if name in spot.project.classes or name in spot.project.functions:
        return True
    return spot.project.is_variable(spot.resolve(container) or "")


def written(node: ast.AST) -> Iterator[ast.Attribute | ast.Subscript]:
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
    *,
    is_item: bool,
) -> Iterator[Finding]:
    short = f"{ast.unparse(owner)}.{attribute}"
    meanings = spot.meanings(owner)
    for found in meanings:
        if _is_own_class(spot, found):
            if not _is_making_class(spot.scope):
                message = f"`{short}` belongs to the class, so to all its instances"
                yield spot.finding(rules.CLASS_WRITE, message, at)
            return
        if _is_module_object(spot, found):
            if _is_this_module(found):
                message = "the module's variables are written"
                yield spot.finding(rules.GLOBAL_WRITE, message, at)
            else:
                yield spot.finding(rules.PATCH, f"`{short}` belongs to a module", at)
            return
        name = spot.resolve(found)
        # What is assigned more than once may be something of the function's own by now.
        if name is not None and (found is owner or len(meanings) == 2):  # noqa: PLR2004
            yield from _write_by_name(spot, found, name, short, at, is_item=is_item)
            return


def _write_by_name(
    spot: Spot,
    owner: ast.expr,
    name: str,
    short: str,
    at: ast.expr,
    *,
    is_item: bool,
) -> Iterator[Finding]:
    if name in known.PROCESS_OBJECTS or f"{name}.{short.rpartition('.')[2]}" in (
        known.PROCESS_OBJECTS
    ):
        return  # a setting of the process, and reported as such
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


def _is_module_object(spot: Spot, node: ast.expr) -> bool:
    """Whether that is a module that is looked up by its name."""
    match node:
        case ast.Subscript(value=found):
            return spot.resolve(found) == "sys.modules"
        case ast.Call(func=function):
            return spot.resolve(function) in _IMPORTING
        case _:
            return False


def _is_this_module(node: ast.expr) -> bool:
    return any(isinstance(found, ast.Name) and found.id == "__name__" for found in ast.walk(node))


def _is_own_class(spot: Spot, owner: ast.expr) -> bool:
    """`cls`, `type(self)`, `self.__class__`, `self.method.__func__`, wherever code runs later."""
    function = spot.scope.function
    if function is None:
        return False
    match owner:
        case ast.Name(id="__class__"):
            return True
        case ast.Name(id=name):
            return function.owner is not None and _first_is_class(function, name)
        case ast.Call(func=function_node, args=[_], keywords=[]):
            return spot.resolve(function_node) == "builtins.type"
        case ast.Attribute(attr="__class__" | "__func__"):
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
    is_its_variable = owner is not root and project.is_variable(name)
    return is_its_variable or project.is_module(name) or _is_class_name(name)


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
