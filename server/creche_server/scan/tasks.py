"""Tasks and threads that outlive their block, and nurseries that are kept: CR012 and CR014."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

from creche_server.scan import known, rules
from creche_server.scan.findings import Finding
from creche_server.scan.scopes import own_nodes, parameters
from creche_server.scan.spot import Spot
from creche_server.scan.values import mentions

_LOOPS: Final = frozenset(
    {"asyncio.get_event_loop", "asyncio.get_running_loop", "asyncio.new_event_loop"},
)


def loose_tasks(spot: Spot) -> Iterator[Finding]:
    """What is started where no block waits for its end."""
    node = spot.node
    if not isinstance(node, ast.Call):
        return
    called = spot.called()
    if called in known.LOOSE_CALLS or _is_of_loop(spot, node.func):
        message = f"`{called or ast.unparse(node.func)}` starts what no block waits for"
        yield spot.finding(rules.LOOSE_TASK, message, node)
    elif called in known.THREADS:
        if _is_daemon(node):
            message = f"a daemon `{called}` is cut off whenever the process ends"
            yield spot.finding(rules.LOOSE_TASK, message, node)
        elif not _is_joined(spot):
            message = f"this `{called}` is not joined where it is made"
            yield spot.finding(rules.LOOSE_TASK, message, node)
    elif _is_kept_nursery(spot, node.func):
        message = f"`{ast.unparse(node.func)}` starts a task in a nursery from elsewhere"
        yield spot.finding(rules.LOOSE_TASK, message, node)


def _is_of_loop(spot: Spot, function: ast.expr) -> bool:
    match function:
        case ast.Attribute(value=ast.Name(id="loop" | "event_loop"), attr="create_task"):
            return True
        case ast.Attribute(value=ast.Call(func=made), attr="create_task"):
            return spot.resolve(made) in _LOOPS
        case _:
            return False


def _is_daemon(node: ast.Call) -> bool:
    return any(
        item.arg == "daemon" and isinstance(item.value, ast.Constant) and bool(item.value.value)
        for item in node.keywords
    )


def _is_joined(spot: Spot) -> bool:
    """Whether the function around, or the module, joins a thread, and makes none a daemon."""
    function = spot.scope.function
    joined = False
    for node in own_nodes(function.node if function is not None else spot.scope.module.node):
        match node:
            case ast.Call(func=ast.Attribute(attr="join"), args=[]):
                joined = True
            case ast.Call(
                func=ast.Attribute(attr="join"), args=[ast.Constant(value=int() | float())]
            ):
                joined = True
            case ast.Assign(targets=[ast.Attribute(attr="daemon")], value=ast.Constant(value=True)):
                return False
            case _:
                pass
    return joined


def _is_kept_nursery(spot: Spot, function: ast.expr) -> bool:
    """Whether this starts something in a nursery that is an attribute or a module's variable."""
    if not isinstance(function, ast.Attribute) or function.attr not in known.SPAWNING:
        return False
    match function.value:
        case ast.Attribute(value=ast.Name(id="self"), attr=name) if _is_nursery_name(name):
            owner = spot.scope.owner
            return owner is None or not _keeps(owner.node, name)
        case ast.Attribute(attr=name):
            return _is_nursery_name(name)
        case ast.Name(id=name):
            if _is_nursery_name(name) and spot.resolve(function.value) is not None:
                return True
            return _is_alias(spot, name)
        case _:
            return False


def _is_alias(spot: Spot, local: str) -> bool:
    """Whether the function around takes a nursery from an attribute by that name."""
    function = spot.scope.function
    if function is None:
        return False
    for node in own_nodes(function.node):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=ast.Attribute(attr=kept)):
                if found == local and _is_nursery_name(kept):
                    return True
            case _:
                pass
    return False


def _keeps(owner: ast.AST, name: str) -> bool:
    """Whether the class itself puts the nursery there, which is reported where it does."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name)
        for node in ast.walk(owner)
    )


def kept_nurseries(spot: Spot) -> Iterator[Finding]:
    """Nurseries that are put where others, or later calls, reach them."""
    match spot.node:
        case ast.Assign(targets=targets, value=value):
            kept = [target for target in targets if _is_lasting(spot, target)]
            if kept and _is_nursery(spot, value):
                name = ast.unparse(kept[0])
                yield spot.finding(rules.KEPT_NURSERY, f"`{name}` keeps a nursery", kept[0])
        case ast.AnnAssign(target=target, annotation=annotation, value=value):
            is_field = isinstance(target, ast.Name) and not spot.in_function
            typed = mentions(annotation, known.NURSERY_TYPES)
            if (is_field and typed and spot.scope.kind == "class") or (
                _is_lasting(spot, target) and value is not None and _is_nursery(spot, value)
            ):
                name = ast.unparse(target)
                yield spot.finding(rules.KEPT_NURSERY, f"`{name}` keeps a nursery", target)
        case ast.AsyncWith(items=items):
            for item in items:
                bound = item.optional_vars
                if bound is None or not _opens(spot, item.context_expr):
                    continue
                if _is_lasting(spot, bound):
                    message = f"`{ast.unparse(bound)}` keeps a nursery"
                    yield spot.finding(rules.KEPT_NURSERY, message, bound)
        case ast.Call(func=ast.Attribute(attr="__aenter__", value=opened)) if _opens(spot, opened):
            message = "a nursery is entered by hand, so it has no block"
            yield spot.finding(rules.KEPT_NURSERY, message, spot.node)
        case _:
            pass


def _is_lasting(spot: Spot, target: ast.expr) -> bool:
    """An attribute, an item of one, or a module's variable."""
    if isinstance(target, ast.Subscript):
        return _is_lasting(spot, target.value)
    return isinstance(target, ast.Attribute) or (
        isinstance(target, ast.Name) and spot.resolve(target) is not None
    )


def _is_nursery(spot: Spot, value: ast.expr) -> bool:
    if not isinstance(value, ast.Name):
        return False
    if _is_nursery_name(value.id):
        return True
    function = spot.scope.function
    if function is None or isinstance(function.node, (ast.Module, ast.ClassDef)):
        return False
    if any(
        parameter.arg == value.id and mentions(parameter.annotation, known.NURSERY_TYPES)
        for parameter in parameters(function.node)
    ):
        return True
    return any(
        isinstance(node, ast.withitem)
        and isinstance(node.optional_vars, ast.Name)
        and node.optional_vars.id == value.id
        and _opens(spot, node.context_expr)
        for node in own_nodes(function.node)
    )


def _opens(spot: Spot, node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and spot.resolve(node.func) in {
        "anyio.create_task_group",
        "asyncio.TaskGroup",
        "trio.open_nursery",
    }


def _is_nursery_name(name: str) -> bool:
    plain = name.lower().strip("_")
    return plain in known.NURSERY_NAMES or plain.endswith(("_nursery", "_task_group"))
