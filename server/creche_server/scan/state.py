"""What modules and classes share: CR001, CR002, CR008, and mutable defaults, CR006 and CR010."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from creche_server.scan import known, rules
from creche_server.scan.caches import handed_function, kept_by_call
from creche_server.scan.findings import Finding
from creche_server.scan.scopes import FUNCTIONS, Scope
from creche_server.scan.spot import Spot
from creche_server.scan.values import FIELD_NAMES, Value, mentions

_CLASS_VAR = frozenset({"ClassVar"})


def shared_state(spot: Spot) -> Iterator[Finding]:
    """Objects bound at module or class level that can change."""
    if spot.in_function or spot.place.main:
        return
    for target, value, annotation in _bindings(spot.node):
        made = _made(spot, value, annotation)
        if made is None or _is_removed(target, spot.scope) or _is_excused(spot, target, annotation):
            continue
        if isinstance(target, ast.Attribute):
            yield from _of_attribute(spot, target, made)
        elif isinstance(target, ast.Name):
            yield _of_name(spot, target, made)
        elif isinstance(target, (ast.Tuple, ast.List)) and made.stateful:
            # `send, receive = open_channel()`: what is in a list that is taken apart is not known.
            for part in target.elts[:1]:
                if isinstance(part, ast.Name):
                    yield _of_name(spot, part, made)


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None, ast.expr | None]]:
    """(target, value, annotation) of all that a node binds; no value where a list is made."""
    match node:
        case ast.Assign(targets=targets, value=value):
            yield from _unpacked(targets[0], value)
            # What further targets name is the same object, unless they take it apart.
            for target in targets[1:]:
                if isinstance(target, (ast.Tuple, ast.List)):
                    yield from _unpacked(target, value)
        case ast.AnnAssign(target=target, value=value, annotation=annotation) if value is not None:
            yield target, value, annotation
        case ast.NamedExpr(target=target, value=value):
            yield target, value, None
        case ast.With(items=items) | ast.AsyncWith(items=items):
            for item in items:
                if item.optional_vars is not None:
                    yield item.optional_vars, item.context_expr, None
        case _:
            pass


def _unpacked(
    target: ast.expr,
    value: ast.expr | None,
) -> Iterator[tuple[ast.expr, ast.expr | None, ast.expr | None]]:
    if isinstance(target, ast.Starred):
        yield target.value, None, None  # Python makes a list of the rest
    elif isinstance(target, (ast.Tuple, ast.List)):
        values: list[ast.expr | None] = [None] * len(target.elts)
        is_matched = (
            isinstance(value, (ast.Tuple, ast.List))
            and len(value.elts) == len(target.elts)
            and not any(isinstance(item, ast.Starred) for item in [*value.elts, *target.elts])
        )
        if is_matched and isinstance(value, (ast.Tuple, ast.List)):
            values = list(value.elts)
        for inner, item in zip(target.elts, values, strict=True):
            if is_matched or isinstance(inner, (ast.Starred, ast.Tuple, ast.List)):
                yield from _unpacked(inner, item)
        if isinstance(value, (ast.Call, ast.Await)):
            yield target, value, None
    elif value is not None:
        yield target, value, None


def _made(spot: Spot, value: ast.expr | None, annotation: ast.expr | None) -> Value | None:
    if value is None:
        return Value("a list")
    made = spot.what_is(value) or _keeps_between_calls(spot, value)
    if made is None and annotation is not None and isinstance(value, (ast.Call, ast.Await)):
        function = value.func if isinstance(value, ast.Call) else value
        if spot.resolve(function) not in known.FREEZING | FIELD_NAMES:
            return spot.what_annotation_says(annotation)
    return made


def _keeps_between_calls(spot: Spot, value: ast.expr) -> Value | None:
    """A function that closes over what it changes; a cache on a function has a rule of its own."""
    kept = kept_by_call(spot, value) if isinstance(value, ast.Call) else None
    if kept is None or not isinstance(value, ast.Call):
        return None
    if kept.is_table and handed_function(spot, value) is not None:
        return None
    return Value(f"a function that keeps `{kept.name}` between calls", stateful=True)


def _is_removed(target: ast.expr, scope: Scope) -> bool:
    """Whether the same body deletes the name again, so that nobody else finds it."""
    return isinstance(target, ast.Name) and target.id in scope.deleted


def _is_excused(spot: Spot, target: ast.expr, annotation: ast.expr | None) -> bool:
    name = target.id if isinstance(target, ast.Name) else ""
    if name in known.ASKED_FOR:
        return True
    if spot.scope.kind != "class":
        return False
    if name in known.SINGLETON_NAMES:
        return True  # reported as such
    owner, project = spot.scope.name, spot.project
    if project.is_enum(owner):
        return True
    return project.copies_defaults(owner) and not mentions(annotation, _CLASS_VAR)


def _of_name(spot: Spot, target: ast.Name, made: Value) -> Finding:
    symbol = f"{spot.scope.name}.{target.id}"
    if spot.scope.kind == "module":
        rule = rules.SHARED_INSTANCE if made.stateful else rules.MODULE_STATE
        message = f"module-level `{target.id}` is {made.what}"
    elif spot.project.is_named_tuple(spot.scope.name):
        rule = rules.MUTABLE_DEFAULT
        message = f"the default of field `{target.id}` is {made.what}"
    else:
        rule = rules.SHARED_INSTANCE if made.stateful else rules.CLASS_STATE
        message = (
            f"class attribute `{spot.scope.name.rpartition('.')[2]}.{target.id}` is {made.what}"
        )
    return spot.finding(rule, message, target, symbol=symbol)


def _of_attribute(spot: Spot, target: ast.Attribute, made: Value) -> Iterator[Finding]:
    """`function.calls = []` and `Class.items = []`, behind their definition."""
    owner = spot.resolve(target.value)
    if owner in spot.project.classes or owner in spot.project.functions:
        short = ast.unparse(target)
        rule = rules.CLASS_STATE if owner in spot.project.classes else rules.MODULE_STATE
        yield spot.finding(
            rule, f"`{short}` is {made.what}", target, symbol=f"{owner}.{target.attr}"
        )


def mutable_defaults(spot: Spot) -> Iterator[Finding]:
    """Default arguments that are made once and can change."""
    node = spot.node
    if not isinstance(node, FUNCTIONS):
        return
    positional = [*node.args.posonlyargs, *node.args.args]
    given = [
        *zip(
            positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True
        ),
        *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
    ]
    for parameter, default in given:
        made = None if default is None else spot.what_is(default)
        if default is not None and made is not None:
            message = f"the default of `{parameter.arg}` is {made.what}"
            yield spot.finding(rules.MUTABLE_DEFAULT, message, default)


def context_defaults(spot: Spot) -> Iterator[Finding]:
    """ContextVars whose default can change."""
    if spot.called() != "contextvars.ContextVar" or not isinstance(spot.node, ast.Call):
        return
    for keyword in spot.node.keywords:
        made = spot.what_is(keyword.value) if keyword.arg == "default" else None
        if made is not None:
            message = f"the default of this ContextVar is {made.what}"
            yield spot.finding(rules.CONTEXT_DEFAULT, message, keyword.value)
