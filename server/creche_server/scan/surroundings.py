"""Settings of the whole process that are changed: CR009."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from creche_server.scan import known, rules
from creche_server.scan.findings import Finding
from creche_server.scan.scopes import own_nodes
from creche_server.scan.spot import Spot
from creche_server.scan.writes import written


def process_settings(spot: Spot) -> Iterator[Finding]:
    """The environment, the working directory, the import path, signals, the locale."""
    for target in written(spot.node):
        if _is_of_process(spot, target):
            short = ast.unparse(target.value if isinstance(target, ast.Subscript) else target)
            yield spot.finding(rules.PROCESS_SETTING, f"`{short}` is written", target)
    match spot.node:
        case ast.AugAssign(target=ast.Name() as bare):
            if spot.resolve(bare) in known.PROCESS_OBJECTS:
                yield spot.finding(rules.PROCESS_SETTING, f"`{bare.id}` is written", bare)
        case ast.Call():
            for name in _called(spot, spot.node):
                if _changes_process(spot, name):
                    message = f"`{name}` changes the whole process"
                    yield spot.finding(rules.PROCESS_SETTING, message, spot.node)
        case _:
            pass


def _is_of_process(spot: Spot, target: ast.Attribute | ast.Subscript) -> bool:
    owner = target.value if isinstance(target, ast.Subscript) else target
    if any(spot.resolve(found) in known.PROCESS_OBJECTS for found in spot.meanings(owner)):
        return True
    # Tasks inherit the very object, until one of them enters a `localcontext()`.
    return isinstance(target, ast.Attribute) and any(
        isinstance(found, ast.Call) and spot.resolve(found.func) == "decimal.getcontext"
        for found in spot.meanings(target.value)
    )


def _called(spot: Spot, node: ast.Call) -> Iterator[str]:
    """The names of what is called, with a variable of the function for what it is assigned."""
    if isinstance(node.func, ast.Attribute):
        for found in spot.meanings(node.func.value):
            name = spot.resolve(found)
            if name is not None:
                yield spot.project.canonical(f"{name}.{node.func.attr}")
    elif name := spot.called():
        yield name


def _changes_process(spot: Spot, name: str) -> bool:
    if name in known.PROCESS_CALLS:
        return True
    if name in known.ENTRY_CALLS:
        return not _is_entry_point(spot)
    return name in known.WARNING_CALLS and not (_is_entry_point(spot) or _is_put_back(spot))


def _is_entry_point(spot: Spot) -> bool:
    """Where a process may choose how it takes signals: its `main`, or under the guard."""
    function = spot.scope.function
    return spot.place.main or getattr(function and function.node, "name", "") in {"main", "_main"}


def _is_put_back(spot: Spot) -> bool:
    """Whether the filters are those of a block that nobody else can run within."""
    function = spot.scope.function
    node = spot.scope.module.node if function is None else function.node
    return not isinstance(node, ast.AsyncFunctionDef) and any(
        isinstance(found, ast.With)
        and any(
            isinstance(item.context_expr, ast.Call)
            and spot.resolve(item.context_expr.func) == "warnings.catch_warnings"
            for item in found.items
        )
        for found in own_nodes(node)
    )
