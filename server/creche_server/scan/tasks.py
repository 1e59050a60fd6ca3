"""Tasks and threads that outlive their block: CR012."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

from creche_server.scan import known, rules
from creche_server.scan.findings import Finding
from creche_server.scan.nurseries import is_nursery, is_nursery_name
from creche_server.scan.scopes import Scope, own_nodes
from creche_server.scan.spot import Spot

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
    elif called in known.THREADS or spot.project.bases(called) & known.THREADS:
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
        case ast.Attribute(value=loop, attr=attr) if attr in known.LOOP_CALLS:
            return any(_is_loop(spot, found) for found in spot.meanings(loop))
        case _:
            return False


def _is_loop(spot: Spot, node: ast.expr) -> bool:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.lstrip("_") in {"loop", "event_loop"}
        case ast.Call(func=made):
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
    # Nothing but a nursery has this method; the others may be a thread's, a server's or a group's.
    is_certain = function.attr == "start_soon"
    kept = function.value.value if isinstance(function.value, ast.Subscript) else function.value
    match kept:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            owner = spot.scope.owner
            is_told = owner is not None and _stores(spot, owner, name)
            return (is_certain or is_nursery_name(name)) and not is_told
        case ast.Attribute(attr=name):
            return (is_certain or is_nursery_name(name)) and not _is_of_block(spot, function)
        case ast.Name(id=name) if spot.resolve(kept) is not None:
            return is_certain or is_nursery_name(name)
        case ast.Name(id=name) if kept is function.value:
            return _is_alias(spot, kept, is_certain=is_certain)
        case _:
            return False


def _is_of_block(spot: Spot, node: ast.expr) -> bool:
    """Whether it belongs to what a `with` of the function around yields, so ends with it."""
    function = spot.scope.function
    while isinstance(node, ast.Attribute):
        node = node.value
    return function is not None and isinstance(node, ast.Name) and node.id in function.entered


def _is_alias(spot: Spot, local: ast.expr, *, is_certain: bool) -> bool:
    """Whether the function around takes a nursery by that name from where it is kept."""
    for found in spot.meanings(local)[1:]:
        kept = found.value if isinstance(found, ast.Subscript) else found
        if isinstance(kept, ast.Attribute) and (is_certain or is_nursery_name(kept.attr)):
            return True
        if is_certain and isinstance(kept, ast.Name) and spot.resolve(kept) is not None:
            return True
    return False


def _stores(spot: Spot, owner: Scope, name: str) -> bool:
    """Whether the class itself puts a nursery there, which is reported where it does."""
    for item in getattr(owner.node, "body", []):
        method = spot.project.functions.get(f"{owner.name}.{getattr(item, 'name', '')}")
        if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == name:
            return True
        if method is not None and any(
            _puts(spot, node, name, method.scope) for node in own_nodes(method.node)
        ):
            return True
    return False


def _puts(spot: Spot, node: ast.AST, name: str, method: Scope) -> bool:
    match node:
        case (
            ast.Assign(targets=[ast.Attribute(attr=found), *_], value=ast.expr() as value)
            | ast.AnnAssign(target=ast.Attribute(attr=found), value=ast.expr() as value)
        ):
            return found == name and is_nursery(spot, value, method)
        case ast.withitem(optional_vars=ast.Attribute(attr=found)):
            return found == name
        case _:
            return False
