"""Classes of which there is one instance: CR013."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from creche_server.scan import known, rules
from creche_server.scan.closures import kept_by
from creche_server.scan.findings import Finding
from creche_server.scan.scopes import own_nodes
from creche_server.scan.spot import Spot


def singletons(spot: Spot) -> Iterator[Finding]:
    """The attribute that holds the one instance, and the ways of handing it out."""
    node = spot.node
    if spot.scope.kind == "class" and isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id in known.SINGLETON_NAMES:
            owner = spot.scope.name
            message = f"`{owner.rpartition('.')[2]}.{target.id}` holds the one instance"
            symbol = f"{owner}.{target.id}"
            yield spot.finding(rules.SINGLETON, message, target, symbol=symbol)
    elif isinstance(node, ast.ClassDef):
        yield from _by_others(spot, node)
    elif isinstance(node, ast.FunctionDef) and spot.scope.kind == "class":
        if node.name == "__new__" and _returns_kept(spot, node):
            yield spot.finding(rules.SINGLETON, "`__new__` returns an instance that is kept", node)
        elif (
            node.name == "__call__"
            and spot.project.is_metaclass(spot.scope.name)
            and _keeps_on_class(node)
        ):
            message = "this metaclass keeps the instances of its classes"
            yield spot.finding(rules.SINGLETON, message, node)


def _by_others(spot: Spot, node: ast.ClassDef) -> Iterator[Finding]:
    """By a metaclass or a decorator that is called so."""
    for keyword in node.keywords:
        if keyword.arg == "metaclass" and "singleton" in ast.unparse(keyword.value).lower():
            message = f"`{node.name}` has one instance, by its metaclass"
            yield spot.finding(rules.SINGLETON, message, keyword.value)
    for decorator in node.decorator_list:
        made_by = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = ast.unparse(made_by)
        if "singleton" in name.lower() or _keeps_instances(spot, made_by):
            message = f"`{node.name}` has one instance, by its decorator"
            yield spot.finding(rules.SINGLETON, message, decorator)


def _keeps_instances(spot: Spot, decorator: ast.expr) -> bool:
    """Whether it is a cache, which answers every call of the class with the first one's result."""
    name = spot.resolve(decorator) or ""
    function = spot.project.functions.get(name)
    kept = None if function is None else kept_by(function, spot.project)
    return name in known.CACHES or (kept is not None and kept.is_table)


def _returns_kept(spot: Spot, node: ast.FunctionDef) -> bool:
    """Whether it returns an attribute of the class, an item of one, or a module's variable."""
    first = node.args.args[0].arg if node.args.args else "cls"
    for item in own_nodes(node):
        value = item.value if isinstance(item, ast.Return) else None
        while isinstance(value, ast.Subscript):
            value = value.value
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            owner = value.value.id
            if owner == first or spot.resolve(value.value) in spot.project.classes:
                return True
        if isinstance(value, ast.Name) and spot.place.inner is not None:
            name = spot.project.resolve(spot.place.inner, value)
            if name is not None and spot.project.is_variable(name):
                return True
    return False


def _keeps_on_class(node: ast.FunctionDef) -> bool:
    first = node.args.args[0].arg if node.args.args else "cls"
    for item in own_nodes(node):
        place = item.value if isinstance(item, ast.Subscript) else item
        if not isinstance(getattr(item, "ctx", None), ast.Store):
            continue
        if (
            isinstance(place, ast.Attribute)
            and isinstance(place.value, ast.Name)
            and place.value.id == first
        ):
            return True
    return False
