"""Functions that return a function which keeps something from call to call in what it closes over.

A decorator with a table of its own is a cache, whatever it is called; a counter is state.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from typing import Final, TypeGuard

from creche_server.scan import known
from creche_server.scan.project import Function, Project
from creche_server.scan.scopes import FUNCTIONS, FunctionNode, own_nodes, parameters
from creche_server.scan.values import what_is

_DEEPEST: Final = 3  # functions that return functions
# Methods by which a table is filled or emptied; of what else is written it is no cache.
_OF_TABLES: Final = frozenset({"clear", "move_to_end", "pop", "popitem", "setdefault", "update"})
_Names = frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """What stays alive, and changes, between calls of the function that is returned."""

    name: str
    is_table: bool  # something is looked up in it, and nothing else is done


def kept_by(function: Function, project: Project) -> Kept | None:
    """What a call of this function leaves behind in its result; None if that is nothing."""
    return _kept(function.node, function, project, _DEEPEST)


def _kept(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    function: Function,
    project: Project,
    steps: int,
) -> Kept | None:
    inner = {
        item.name: item
        for item in own_nodes(node)
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    returned = list(_returned(node))
    for value in returned:
        name = project.resolve(function.scope, _called(value)) if _is_call(value) else None
        if name in known.CACHES:
            return Kept(name or "", is_table=True)
    given = _from(node, returned) & inner.keys()
    if not given and not any(isinstance(item, ast.Lambda) for item in returned):
        return None
    if changed := _changed_below(node, _assigned(node) | inner.keys()):
        return changed
    if stateful := _used_resource(node, function, project):
        return Kept(stateful, is_table=False)
    for name in sorted(given if steps else ()):
        found = _kept(inner[name], function, project, steps - 1)
        if found is not None:
            return found
    return None


def _changed_below(node: FunctionNode, own: _Names) -> Kept | None:
    """What the functions inside change of its names; what is no table comes first."""
    uses: dict[str, bool] = {}  # {name: whether as a table only}
    for item in own_nodes(node):
        if isinstance(item, FUNCTIONS):
            for name, as_table in _written_from(item, own):
                uses[name] = as_table and uses.get(name, True)
    states = [name for name, as_table in uses.items() if not as_table]
    return Kept(min(states or uses), is_table=not states) if uses else None


def _is_call(node: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call)


def _called(node: ast.Call) -> ast.expr:
    """What is called, be it by way of arguments: `memo` of `memo(3)(function)`."""
    function = node.func
    while isinstance(function, ast.Call):
        function = function.func
    return function


def _returned(node: FunctionNode) -> Iterator[ast.expr]:
    for item in own_nodes(node):
        if isinstance(item, ast.Return) and item.value is not None:
            yield item.value


def _from(node: FunctionNode, returned: list[ast.expr]) -> _Names:
    """The names that a result is made from, through one assignment: `made = wraps(f)(inner)`."""
    names = {found.id for value in returned for found in ast.walk(value) if _is_read(found)}
    for item in own_nodes(node):
        match item:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target in names:
                names |= {found.id for found in ast.walk(value) if _is_read(found)}
            case _:
                pass
    return frozenset(names)


def _is_read(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def _assigned(node: FunctionNode) -> _Names:
    """What a function makes itself: its parameters are whose they are."""
    found: set[str] = set()
    for item in own_nodes(node):
        match item:
            case ast.Assign(targets=targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                found.add(name)
            case _:
                pass
    return frozenset(found)


def _written_from(function: FunctionNode, around: _Names) -> Iterator[tuple[str, bool]]:
    """(name, whether as a table) of the outer names that a function, or one in it, changes."""
    mine: set[str] = {parameter.arg for parameter in parameters(function)}
    outer: set[str] = set()
    for node in own_nodes(function):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name):
                mine.add(name)
            case ast.Nonlocal(names=names):
                outer.update(names)
            case _:
                pass
    seen = around - (mine - outer)
    for node in own_nodes(function):
        if isinstance(node, FUNCTIONS):
            yield from _written_from(node, seen)
        for name, as_table in _writes(node, frozenset(outer)):
            if name in seen:
                yield name, as_table


def _writes(node: ast.AST, outer: _Names) -> Iterator[tuple[str, bool]]:
    match node:
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            yield name, True
        case ast.Subscript(
            value=ast.Attribute(value=ast.Name(id=name)),
            ctx=ast.Store() | ast.Del(),
        ):
            yield name, True  # `inner.seen[key] = ...`
        case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            yield name, False
        case ast.Name(id=name, ctx=ast.Store()) if name in outer:
            yield name, False
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)):
            if method in _OF_TABLES:
                yield name, True
            elif method in known.CHANGING or method == "add":
                yield name, False
        case _:
            pass


def _used_resource(node: FunctionNode, function: Function, project: Project) -> str:
    """A lock, a client or the like that is made once and used by what is returned."""
    used = {
        found.id
        for item in own_nodes(node)
        if isinstance(item, FUNCTIONS)
        for found in ast.walk(item)
        if isinstance(found, ast.Name)
    }
    for item in own_nodes(node):
        match item:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in used:
                made = what_is(value, function.scope, project)
                if made is not None and made.stateful:
                    return name
            case _:
                pass
    return ""
