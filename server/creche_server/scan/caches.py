"""Caches that outlive a run: CR007.

A cache on a function of plain values is none: whoever asks has said all that the answer depends
on. It is one when the function takes an identity, when it is a method (its instance, and all that
this holds, is then a key), and when what it keeps for everybody can change. A decorator of ours
that keeps a table between calls is a cache by another name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from creche_server.scan import known, rules
from creche_server.scan.closures import Kept, kept_by
from creche_server.scan.findings import Finding
from creche_server.scan.project import Function, Project
from creche_server.scan.scopes import Scope, parameters
from creche_server.scan.spot import Spot
from creche_server.scan.values import Value, what_body_returns, what_function_makes, what_is

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def caches(spot: Spot) -> Iterator[Finding]:
    """Cache decorators, and `cache(function)`, where they keep what belongs to a run."""
    node, inner = spot.node, spot.place.inner
    if spot.in_function:
        return  # it ends with the function around it
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and inner is not None:
        for decorator in node.decorator_list:
            yield from _decorated(spot, decorator, node, inner)
    elif isinstance(node, ast.Call) and not _is_decorator(spot, node):
        called = _cache_name(spot, node.func) or _table_name(spot, node)
        handed = handed_function(spot, node)
        if called is None or handed is None:
            return
        function, around = handed
        if why := _why_not(spot, function, around):
            name = getattr(function, "name", "a lambda")
            message = f"`{called}` on `{name}`, which {why}"
            yield spot.finding(rules.CACHE, message, node, symbol=around.name)


def _decorated(
    spot: Spot,
    decorator: ast.expr,
    node: _FunctionNode,
    inner: Scope,
) -> Iterator[Finding]:
    name = _cache_name(spot, decorator)
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    maker = spot.resolve(called) or ""
    function = spot.project.functions.get(maker)
    kept = kept_by(function, spot.project) if name is None and function is not None else None
    short = inner.name.rpartition(".")[2]
    if kept is not None and kept.is_table:
        name = f"{ast.unparse(called)}`, which keeps `{kept.name}"
    elif kept is not None:
        message = f"`{short}` shares the `{kept.name}` of its decorator with all who call it"
        yield spot.finding(rules.SHARED_INSTANCE, message, decorator, symbol=inner.name)
    elif name is None and (made := _what_decorator_makes(spot, maker, function)) is not None:
        message = f"`{short}` is {made.what}, by its decorator"
        yield spot.finding(rules.SHARED_INSTANCE, message, decorator, symbol=inner.name)
    why = name and _why_not(spot, node, inner)
    if name is not None and why:
        message = f"`{name}` on `{short}`, which {why}"
        yield spot.finding(rules.CACHE, message, decorator, symbol=inner.name)


def _what_decorator_makes(spot: Spot, maker: str, function: Function | None) -> Value | None:
    """An object with state that takes the function's place, or keeps it."""
    is_called = any(
        f"{name}.__call__" in spot.project.functions for name in (maker, *spot.project.bases(maker))
    )
    if is_called and spot.project.keeps_state(maker):
        return Value(f"a {maker}, whose instances change", stateful=True)
    made = None if function is None else what_function_makes(function, spot.project)
    return made if made is not None and made.stateful else None


def handed_function(spot: Spot, call: ast.Call) -> tuple[_FunctionNode, Scope] | None:
    """The function that a call gets as its only argument, if it is of ours, and its scope."""
    if len(call.args) != 1:
        return None
    (given,) = call.args
    if isinstance(given, ast.Lambda):
        return given, spot.scope
    function = spot.project.functions.get(spot.resolve(given) or "")
    return None if function is None else (function.node, function.scope)


def kept_by_call(spot: Spot, call: ast.Call) -> Kept | None:
    """What a call of a function of ours leaves behind in its result."""
    called = call.func.func if isinstance(call.func, ast.Call) else call.func
    function = spot.project.functions.get(spot.resolve(called) or "")
    return None if function is None else kept_by(function, spot.project)


def _table_name(spot: Spot, call: ast.Call) -> str | None:
    kept = kept_by_call(spot, call)
    if kept is None or not kept.is_table:
        return None
    return f"{ast.unparse(call.func)}`, which keeps `{kept.name}"


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
    decorators = {ast.unparse(item) for item in getattr(node, "decorator_list", [])}
    if inner.method_of is not None and not decorators & {"classmethod", "staticmethod"}:
        return "is a method: the cache keeps every instance it was called on"
    for parameter in parameters(node):
        if spot.carries_identity(parameter):
            return f"takes `{parameter.arg}`: it keeps, and may mix up, what belongs to users"
    made = _what_it_returns(node, inner, spot.project)
    return f"returns {made.what}: all callers get the same one" if made is not None else ""


def _what_it_returns(node: _FunctionNode, inner: Scope, project: Project) -> Value | None:
    if isinstance(node, ast.Lambda):
        return what_is(node.body, inner, project)
    return what_body_returns(Function(node, inner, inner), project)
