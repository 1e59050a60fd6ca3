"""What an expression makes: something mutable, something stateful, or neither."""

from __future__ import annotations

import ast
import dataclasses
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from creche_server.scan import known
from creche_server.scan.project import Function, Project
from creche_server.scan.scopes import Scope, own_nodes

_LITERALS: Final[Mapping[type[ast.expr], str]] = MappingProxyType(
    {
        ast.Dict: "a dict",
        ast.DictComp: "a dict",
        ast.List: "a list",
        ast.ListComp: "a list",
        ast.Set: "a set",
        ast.SetComp: "a set",
        ast.GeneratorExp: "a generator",
    },
)
_LIST_METHODS: Final = frozenset(
    {"findall", "readlines", "rsplit", "split", "splitlines", "tolist"},
)
_MOST_STEPS: Final = 4  # names and functions that are followed to what they stand for
FIELD_NAMES: Final = frozenset(
    {"dataclasses.field", "attrs.field", "attr.ib", "attr.field", "msgspec.field"},
)
# Calls that return their argument or a copy, and which one that is.
_NAMESPACES: Final = frozenset({"a types.SimpleNamespace"})  # whose attributes are no methods
_TRANSPARENT: Final = frozenset({"builtins.classmethod", "builtins.staticmethod"})
_PASSING_ON: Final = MappingProxyType({"copy.copy": 0, "copy.deepcopy": 0, "typing.cast": -1})
_WRAPPERS: Final = frozenset({"Annotated", "ClassVar", "Final", "Optional", "Required"})


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """What is made: `what` fits behind "is"."""

    what: str
    stateful: bool = False  # holds a resource, or state behind methods; not just a container


def what_is(
    node: ast.expr,
    scope: Scope,
    project: Project,
    steps: int = _MOST_STEPS,
) -> Value | None:
    """What a module or a class would share by having this; None if it cannot change.

    Names are followed to what they are assigned, and functions of ours to what they return, so
    many steps far. What cannot be known, such as the result of an unknown call, counts as None.
    """
    if type(node) in _LITERALS:
        return Value(_LITERALS[type(node)])
    if isinstance(node, ast.Call):
        return _what_call_makes(node, scope, project, steps)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _what_name_holds(node, scope, project, steps)
    for part in _parts(node):
        found = what_is(part, scope, project, steps)
        if found is not None:
            is_tuple = isinstance(node, ast.Tuple)
            return Value(f"a tuple that holds {found.what}", found.stateful) if is_tuple else found
    return None


def _what_name_holds(
    node: ast.Name | ast.Attribute,
    scope: Scope,
    project: Project,
    steps: int,
) -> Value | None:
    """What a variable is; one that is mutable only at times, as after `a = tuple(a)`, is not."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, (*_LITERALS, ast.Call)):
        made = what_is(node.value, scope, project, steps)  # `itertools.count().__next__`
        is_method = made is not None and not made.stateful and made.what not in _NAMESPACES
        return Value(f"a method of {made.what}") if made is not None and is_method else None
    if not steps:
        return None
    values = [
        (value, around)
        for value, around in project.values(node, scope)
        if not isinstance(value, ast.Constant)
    ]
    made_all = [what_is(value, around, project, steps - 1) for value, around in values]
    return made_all[0] if made_all and None not in made_all else None


def _parts(node: ast.expr) -> list[ast.expr]:
    """The expressions that one may be the value of, or that a tuple holds."""
    match node:
        case ast.Tuple(elts=found) | ast.BoolOp(values=found):
            return found
        case ast.IfExp(body=body, orelse=orelse):
            return [body, orelse]
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Set()):
            return [left]  # a frozenset on the left gives a frozenset
        case ast.BinOp(left=left, right=right, op=ast.Add() | ast.Mult() | ast.BitOr()):
            return [left, right]
        case ast.NamedExpr(value=value) | ast.Await(value=value) | ast.Starred(value=value):
            return [value]
        case _:
            return []


def _what_call_makes(
    node: ast.Call,
    scope: Scope,
    project: Project,
    steps: int,
) -> Value | None:
    name = project.resolve(scope, node.func)
    if name is None:
        return _what_method_makes(node, scope, project, steps)
    if name in known.FREEZING or name == "functools.partial":
        return _what_frozen_holds(node, scope, project, name)
    if name in _PASSING_ON or name in FIELD_NAMES:
        passed = _passed_on(node, name)
        return None if passed is None else what_is(passed, scope, project, steps)
    if name in project.classes or name in project.functions:
        return _what_ours_makes(name, project, steps)
    if name in known.MUTABLE or known.is_stateful(name):
        return Value(_a(name), stateful=name not in known.MUTABLE)
    return _what_method_makes(node, scope, project, steps)


def _passed_on(node: ast.Call, name: str) -> ast.expr | None:
    """The argument that such a call returns, or a copy of."""
    if name in FIELD_NAMES:
        return next((item.value for item in node.keywords if item.arg == "default"), None)
    return node.args[_PASSING_ON[name]] if node.args else None


def _what_ours_makes(name: str, project: Project, steps: int) -> Value | None:
    """The instance of a class, or the result of a function, that one of the files defines."""
    if name in project.functions:
        return what_function_makes(project.functions[name], project, steps)
    changes = project.keeps_state(name)
    return Value(f"{_a(name)}, whose instances change", stateful=True) if changes else None


def what_function_makes(
    function: Function,
    project: Project,
    steps: int = _MOST_STEPS,
) -> Value | None:
    """The result of a function that one of the files defines, by its annotation or its text."""
    node = function.node
    decorators = {project.resolve(function.around, item) for item in node.decorator_list}
    if decorators - _TRANSPARENT or isinstance(node, ast.AsyncFunctionDef):
        return None  # the decorator decides what it returns; a coroutine runs once
    return what_body_returns(function, project, steps)


def what_body_returns(
    function: Function,
    project: Project,
    steps: int = _MOST_STEPS,
) -> Value | None:
    """The same, whatever its decorators make of it."""
    key = function.scope.name, steps
    if key not in project.returned:
        project.returned[key] = None  # for those that call themselves
        project.returned[key] = _what_is_returned(function, project, steps)
    found: Value | None = project.returned[key]
    return found


def _what_is_returned(function: Function, project: Project, steps: int) -> Value | None:
    annotated = what_annotation_says(function.node.returns, function.around, project)
    if annotated is not None or not steps:
        return annotated
    for item in own_nodes(function.node):
        if isinstance(item, (ast.Yield, ast.YieldFrom)):
            return Value("a generator")
        if isinstance(item, ast.Return) and item.value is not None:
            made = what_is(item.value, function.scope, project, steps - 1)
            if made is not None:
                return made
    return None


def _what_method_makes(
    node: ast.Call,
    scope: Scope,
    project: Project,
    steps: int,
) -> Value | None:
    """The result of a method, or a lambda, that has no name of its own."""
    if isinstance(node.func, ast.Lambda):
        return what_is(node.func.body, scope, project, steps)
    if not isinstance(node.func, ast.Attribute):
        return None
    method, receiver = node.func.attr, node.func.value
    if method in _LIST_METHODS:
        return Value("a list")
    if method == "copy":
        return what_is(receiver, scope, project, steps)
    if method == "open" and isinstance(receiver, ast.Call):
        opened = project.resolve(scope, receiver.func) == "pathlib.Path"
        return Value("an open file", stateful=True) if opened else None
    return None


def _what_frozen_holds(
    node: ast.Call,
    scope: Scope,
    project: Project,
    name: str,
) -> Value | None:
    """A frozen container may still hold what is not frozen, if that can be seen."""
    elements: list[ast.expr] = []
    if name == "functools.partial":
        elements = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
    for argument in () if elements else node.args:
        match argument:
            case ast.Dict(keys=keys, values=values):
                elements += [item for key, item in zip(keys, values, strict=True) if key]
            case ast.DictComp(value=element):
                elements.append(element)
            case ast.List(elts=inner) | ast.Tuple(elts=inner):
                elements += inner
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                elements.append(element)
            case _:
                pass
    for element in elements:
        found = what_is(element, scope, project)
        if found is not None:
            return Value(f"{_a(name)} that holds {found.what}", found.stateful)
    return None


def what_annotation_says(
    annotation: ast.expr | None,
    scope: Scope,
    project: Project,
) -> Value | None:
    """What something annotated so is, for what its value does not tell."""
    node = unquoted(annotation)
    if isinstance(node, ast.BinOp):  # `X | None`
        return what_annotation_says(node.left, scope, project) or what_annotation_says(
            node.right,
            scope,
            project,
        )
    if isinstance(node, ast.Subscript):
        outer = project.resolve(scope, node.value) or ""
        if outer.rpartition(".")[2] in _WRAPPERS:
            inner = node.slice
            return what_annotation_says(
                inner.elts[0] if isinstance(inner, ast.Tuple) and inner.elts else inner,
                scope,
                project,
            )
        node = node.value
    name = None if node is None else project.resolve(scope, node)
    if name is None:
        return None
    if name in known.MUTABLE_TYPES:
        return Value(_a(name))
    if name in known.STATEFUL or (name in project.classes and project.keeps_state(name)):
        return Value(_a(name), stateful=True)
    return None


def unquoted(annotation: ast.expr | None) -> ast.expr | None:
    """The annotation itself where it is written as a string."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(annotation.value.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError):
            return None
    return annotation


def mentions(annotation: ast.expr | None, names: frozenset[str]) -> bool:
    """Whether one of these names, without what it is imported from, stands in an annotation."""
    node = unquoted(annotation)
    if node is None:
        return False
    return any(
        (isinstance(part, ast.Name) and part.id in names)
        or (isinstance(part, ast.Attribute) and part.attr in names)
        or (isinstance(part, ast.Constant) and part.value in names)
        for part in ast.walk(node)
    )


def _a(name: str) -> str:
    short = name.removeprefix("builtins.").removeprefix("typing.")
    short = "dict" if short in {"dict.fromkeys", "str.maketrans"} else short
    if short == "open":
        return "an open file"
    return f"{'an' if short[0] in 'aeiouAEIOU' else 'a'} {short}"
