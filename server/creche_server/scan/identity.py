"""Identity that is looked up instead of passed: CR011, and what the coverage is counted from."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Final

from creche_server.scan import known, rules
from creche_server.scan.findings import Finding
from creche_server.scan.project import Project
from creche_server.scan.scopes import Scope, parameters
from creche_server.scan.spot import Spot
from creche_server.scan.values import mentions

_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def ambient_identity(spot: Spot) -> Iterator[Finding]:
    """Reads of a ContextVar, thread-local, proxy or module variable that says who it is about."""
    if not spot.in_function:
        return
    match spot.node:
        case ast.Attribute(value=variable, attr="get") if _is_asked(spot, variable):
            yield from _context_variable(spot, variable, spot.node)
        case ast.Subscript(slice=variable, ctx=ast.Load()) if _is_asked(spot, variable):
            yield from _context_variable(spot, variable, spot.node)
        case ast.Call(func=ast.Attribute(attr="get"), args=[variable, *_]) if _is_asked(
            spot, variable
        ):
            yield from _context_variable(spot, variable, spot.node)
        case ast.Attribute(value=base, attr=attribute, ctx=ast.Load()):
            yield from _attribute(spot, base, attribute, spot.node)
        case ast.Name(id=local, ctx=ast.Load()) if known.is_identity_name(local):
            name = spot.resolve(spot.node)
            if name is not None and spot.project.is_variable(name):
                yield from _variable(spot, name, spot.node)
        case _:
            pass


def _is_asked(spot: Spot, variable: ast.expr) -> bool:
    """Whether that is a ContextVar that tells an identity: `copy_context()[it]` does, too."""
    name = spot.resolve(variable)
    return name is not None and _is_identity_variable(spot.project, name)


def _context_variable(spot: Spot, variable: ast.expr, at: ast.expr) -> Iterator[Finding]:
    name = spot.resolve(variable) or ""
    message = f"the ContextVar `{name}` says for whom this is done"
    yield spot.finding(rules.AMBIENT_IDENTITY, message, at, symbol=name)


def _attribute(spot: Spot, base: ast.expr, attribute: str, at: ast.expr) -> Iterator[Finding]:
    name = spot.resolve(base)
    if name is None:
        return
    parts = known.PROXIES.get(name)
    if parts is not None and (not parts or attribute in parts):
        message = f"`{name}` stands for whichever request is current"
        yield spot.finding(rules.AMBIENT_IDENTITY, message, at, symbol=name)
    elif known.is_identity_name(attribute):
        if _made_by(spot.project, name) == "threading.local":
            message = f"the thread-local `{name}` says for whom this is done"
            yield spot.finding(rules.AMBIENT_IDENTITY, message, at, symbol=name)
        elif spot.project.is_variable(f"{name}.{attribute}"):
            yield from _variable(spot, f"{name}.{attribute}", at)


def _variable(spot: Spot, name: str, at: ast.expr) -> Iterator[Finding]:
    if _made_by(spot.project, name) is None:
        message = f"the module variable `{name}` says for whom this is done"
        yield spot.finding(rules.AMBIENT_IDENTITY, message, at, symbol=name)


def _bound_to(project: Project, name: str) -> tuple[Scope, ast.expr | None, ast.Call] | None:
    """(scope, annotation, call) where a module's or a class's variable is bound to a call."""
    module, _, last = name.rpartition(".")
    file = project.modules.get(module)
    owner = project.classes.get(module)
    scope = file.scope if file is not None else owner.scope if owner is not None else None
    if scope is None:
        return None
    for statement in getattr(scope.node, "body", []):
        match statement:
            case ast.Assign(targets=[ast.Name(id=found)], value=ast.Call() as call):
                if found == last:
                    return scope, None, call
            case ast.AnnAssign(target=ast.Name(id=found), value=ast.Call() as call):
                if found == last:
                    return scope, statement.annotation, call
            case _:
                pass
    return None


def _made_by(project: Project, name: str) -> str | None:
    """The dotted name of what a variable is made by calling."""
    found = _bound_to(project, name)
    if found is None:
        return None
    function = found[2].func
    if isinstance(function, ast.Subscript):  # ContextVar[UserId]("user")
        function = function.value
    return project.resolve(found[0], function)


def _is_identity_variable(project: Project, name: str) -> bool:
    found = _bound_to(project, name)
    if found is None or _made_by(project, name) != "contextvars.ContextVar":
        return False
    if name in project.told:
        return True
    _, annotation, call = found
    subscript = call.func if isinstance(call.func, ast.Subscript) else None
    if mentions(annotation, known.IDENTITY_TYPES) or mentions(subscript, known.IDENTITY_TYPES):
        return True
    told = call.args[0] if call.args else None
    label = str(told.value) if isinstance(told, ast.Constant) else ""
    words = _WORD.findall(f"{name.rpartition('.')[2]} {label}")
    return any(word.lower() in known.IDENTITY_WORDS for word in words)


# --- who acts for a user


def acts_for_user(spot: Spot) -> Iterator[str]:
    """The function around this node, if the node shows that it acts for a user."""
    inner = spot.place.inner
    if (
        isinstance(spot.node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and inner is not None
        and any(spot.carries_identity(item, known.IDENTITY) for item in parameters(spot.node))
    ):
        yield inner.name
    function = spot.scope.function
    if function is None:
        return
    match spot.node:
        case ast.Name(id=name) | ast.Attribute(attr=name) if known.is_identity_name(name):
            yield _named(function)
        case _:
            pass


def calls(spot: Spot) -> Iterator[tuple[str, str]]:
    """(caller, called) where one function of the project calls another by its name."""
    function = spot.scope.function
    if function is None or not isinstance(spot.node, ast.Call):
        return
    called = spot.called()
    if isinstance(spot.node.func, ast.Attribute) and spot.scope.owner is not None:
        base = spot.node.func.value
        if isinstance(base, ast.Name) and base.id in {"self", "cls"}:
            called = f"{spot.scope.owner.name}.{spot.node.func.attr}"
    if called in spot.project.functions:
        yield _named(function), called


def enclosing_function(spot: Spot) -> str | None:
    """The function that a finding at this node is charged to."""
    function = spot.scope.function
    return None if function is None else _named(function)


def _named(function: Scope) -> str:
    """The function itself, or, for a lambda, the one around it."""
    scope = function
    while isinstance(scope.node, ast.Lambda):
        around = scope.parent.function if scope.parent is not None else None
        if around is None:
            break
        scope = around
    return scope.name
