"""Caches that outlive a run: CR007.

A cache on a function of plain values is none: whoever asks has said all that the answer depends
on. It is one when the function takes an identity, when it is a method (its instance, and all that
this holds, is then a key), and when what it keeps for everybody can change.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from creche_server.scan import known, rules
from creche_server.scan.findings import Finding
from creche_server.scan.project import Project
from creche_server.scan.scopes import Scope, own_nodes, parameters
from creche_server.scan.spot import Spot
from creche_server.scan.values import Value, what_annotation_says, what_is

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def caches(spot: Spot) -> Iterator[Finding]:
    """Cache decorators, and `cache(function)`, where they keep what belongs to a run."""
    node, inner = spot.node, spot.place.inner
    if spot.in_function:
        return  # it ends with the function around it
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and inner is not None:
        for decorator in node.decorator_list:
            name = _cache_name(spot, decorator)
            why = name and _why_not(spot, node, inner)
            if name is not None and why:
                symbol = inner.name
                message = f"`{name}` on `{node.name}`, which {why}"
                yield spot.finding(rules.CACHE, message, decorator, symbol=symbol)
    elif isinstance(node, ast.Call) and len(node.args) == 1 and not _is_decorator(spot, node):
        name = _cache_name(spot, node.func)
        function = spot.project.functions.get(spot.resolve(node.args[0]) or "")
        if name is not None and function is not None:
            why = _why_not(spot, function.node, function.scope)
            if why:
                message = f"`{name}` on `{function.node.name}`, which {why}"
                yield spot.finding(rules.CACHE, message, node, symbol=function.scope.name)


def _is_decorator(spot: Spot, node: ast.Call) -> bool:
    decorators = getattr(spot.place.statement, "decorator_list", [])
    return any(node is decorator for decorator in decorators)


def _cache_name(spot: Spot, decorator: ast.expr) -> str | None:
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    name = spot.resolve(call)
    if name == "functools.cached_property":
        return name if spot.project.is_metaclass(spot.scope.name) else None
    if name in known.CACHES:
        return name
    if name is not None and name in spot.project.functions:
        return None  # of ours: its own body shows what it keeps
    last = call.attr if isinstance(call, ast.Attribute) else (name or "").rpartition(".")[2]
    return (name or ast.unparse(call)) if last in known.CACHE_NAMES else None


def _why_not(spot: Spot, node: _FunctionNode, inner: Scope) -> str:
    """Why that function must have no cache; empty if it may."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if inner.method_of is not None and not decorators & {"classmethod", "staticmethod"}:
        return "is a method: the cache keeps every instance it was called on"
    for parameter in parameters(node):
        if spot.carries_identity(parameter):
            return f"takes `{parameter.arg}`: it keeps, and may mix up, what belongs to users"
    made = _what_it_returns(node, inner, spot.project)
    return f"returns {made.what}: all callers get the same one" if made is not None else ""


def _what_it_returns(node: _FunctionNode, inner: Scope, project: Project) -> Value | None:
    annotated = what_annotation_says(node.returns, inner, project)
    if annotated is not None:
        return annotated
    for item in own_nodes(node):
        if isinstance(item, ast.Return) and item.value is not None:
            made = what_is(item.value, inner, project)
            if made is not None:
                return made
    return None
