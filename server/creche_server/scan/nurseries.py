"""Nurseries that are kept where others reach them: CR014."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

from creche_server.scan import known, rules
from creche_server.scan.findings import Finding
from creche_server.scan.scopes import FUNCTIONS, Scope, own_nodes, parameters
from creche_server.scan.spot import Spot
from creche_server.scan.values import mentions

_SETTERS: Final = frozenset({"builtins.setattr", "builtins.object.__setattr__"})


def kept_nurseries(spot: Spot) -> Iterator[Finding]:
    """Nurseries that are put where others, or later calls, reach them."""
    match spot.node:
        case ast.Assign(targets=targets, value=value):
            kept = [target for target in targets if _is_lasting(spot, target)]
            if kept and _holds_nursery(spot, value):
                name = ast.unparse(kept[0])
                yield spot.finding(rules.KEPT_NURSERY, f"`{name}` keeps a nursery", kept[0])
        case ast.AnnAssign(target=target, annotation=annotation, value=value):
            is_field = isinstance(target, ast.Name) and not spot.in_function
            typed = mentions(annotation, known.NURSERY_TYPES)
            if (is_field and typed and spot.scope.kind == "class") or (
                _is_lasting(spot, target) and value is not None and _holds_nursery(spot, value)
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


def handed_nurseries(spot: Spot) -> Iterator[Finding]:
    """Nurseries that are put into a container or an object, or given to one that keeps them."""
    call = spot.node
    if not isinstance(call, ast.Call):
        return
    called = spot.called()
    match call.func:
        case ast.Attribute(value=container, attr="add" | "append" | "insert" | "setdefault"):
            if _is_lasting(spot, container) and _given_nurseries(spot, call):
                message = f"`{ast.unparse(container)}` keeps a nursery"
                yield spot.finding(rules.KEPT_NURSERY, message, call)
        case _ if called in _SETTERS and _given_nurseries(spot, call):
            message = f"`{ast.unparse(call.args[0])}` keeps a nursery"
            yield spot.finding(rules.KEPT_NURSERY, message, call)
        case _ if called in spot.project.classes:
            parameter = _unnamed_keeper(spot, called, call, _given_nurseries(spot, call))
            if parameter is not None:
                message = f"`{called}` keeps a nursery, as its `{parameter}`"
                yield spot.finding(rules.KEPT_NURSERY, message, call)
        case _:
            pass


def _given_nurseries(spot: Spot, call: ast.Call) -> list[ast.expr]:
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [argument for argument in given if _holds_nursery(spot, argument)]


def _unnamed_keeper(
    spot: Spot,
    name: str,
    call: ast.Call,
    nurseries: list[ast.expr],
) -> str | None:
    """The parameter by which a class of ours gets and keeps a nursery without saying so.

    Where it is called or annotated as what it is, the class itself is reported.
    """
    build = spot.project.functions.get(f"{name}.__init__")
    if build is None:
        return None
    names = [*build.node.args.posonlyargs, *build.node.args.args][1:]
    pairs = [*zip(names, call.args, strict=False)]
    by_name = {parameter.arg: parameter for parameter in parameters(build.node)}
    pairs += [
        (by_name[keyword.arg], keyword.value) for keyword in call.keywords if keyword.arg in by_name
    ]
    for parameter, value in pairs:
        told = is_nursery_name(parameter.arg) or mentions(parameter.annotation, known.NURSERY_TYPES)
        if value in nurseries and not told and _keeps(build.node, parameter.arg):
            return parameter.arg
    return None


def _keeps(build: ast.AST, parameter: str) -> bool:
    return any(
        isinstance(node, (ast.Assign, ast.AnnAssign))
        and isinstance(node.value, ast.Name)
        and node.value.id == parameter
        and any(
            isinstance(target, ast.Attribute)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        )
        for node in own_nodes(build)
    )


def _is_lasting(spot: Spot, target: ast.expr) -> bool:
    """An attribute, an item of one, or a module's variable."""
    if isinstance(target, ast.Subscript):
        return _is_lasting(spot, target.value)
    return isinstance(target, ast.Attribute) or (
        isinstance(target, ast.Name) and spot.resolve(target) is not None
    )


def _holds_nursery(spot: Spot, value: ast.expr) -> bool:
    """A nursery, its method, or a container that is written with one in it."""
    match value:
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            return any(_holds_nursery(spot, part) for part in parts)
        case ast.Dict(values=parts):
            return any(_holds_nursery(spot, part) for part in parts)
        case ast.Attribute(value=base, attr="start" | "start_soon" | "create_task"):
            return _holds_nursery(spot, base)
        case ast.Call(func=function, args=[first, *_]):
            is_bound = spot.resolve(function) == "functools.partial"
            return is_bound and _holds_nursery(spot, first)
        case _:
            return is_nursery(spot, value, spot.scope.function)


def is_nursery(spot: Spot, value: ast.expr, function: Scope | None) -> bool:
    """Whether an expression in a function is a nursery, by its name, its type or its block."""
    if isinstance(value, ast.Attribute):
        return is_nursery_name(value.attr)
    if not isinstance(value, ast.Name):
        return False
    if is_nursery_name(value.id):
        return True
    if function is None or not isinstance(function.node, FUNCTIONS):
        return False
    entered = function.entered.get(value.id)
    return (entered is not None and _opens(spot, entered)) or any(
        parameter.arg == value.id and mentions(parameter.annotation, known.NURSERY_TYPES)
        for parameter in parameters(function.node)
    )


def _opens(spot: Spot, node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and spot.resolve(node.func) in {
        "anyio.create_task_group",
        "asyncio.TaskGroup",
        "trio.open_nursery",
    }


def is_nursery_name(name: str) -> bool:
    """Whether something is called as nurseries and task groups are."""
    plain = name.lower().strip("_")
    return plain in known.NURSERY_NAMES or plain.endswith(("_nursery", "_task_group"))
