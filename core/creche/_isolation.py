"""What two objects share that either could change for the other: found by walking, not by ids.

The walk follows everything that Python lets follow. It stops at what is shared on purpose or
cannot carry anything across: modules, classes, loggers, Trio's own objects, and whatever the
caller names as infrastructure.
"""

from __future__ import annotations

import datetime as dt
import decimal
import dis
import enum
import fractions
import functools
import gc
import inspect
import itertools
import logging
import operator
import pathlib
import re
import sys
import types
import typing
import uuid
import weakref
import zoneinfo
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any, Final, cast

from creche._errors import IsolationError

_ATOMS: Final = (
    *(int, float, complex, str, bytes, range, type(None), type(...), type(NotImplemented)),
    *(dt.date, dt.time, dt.timedelta, dt.tzinfo, zoneinfo.ZoneInfo),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID, pathlib.PurePath, re.Pattern),
    *(typing.TypeVar, typing.ParamSpec, types.UnionType, types.CodeType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType),
    *(inspect.Signature, inspect.Parameter),
    cast("type[object]", type(vars(inspect.FullArgSpec)["args"])),  # of a named tuple's fields
)
_STOPS: Final = (ModuleType, type, logging.Logger)
_FOREIGN: Final = frozenset({"trio", "outcome", "sniffio", "_abc", "typing"})  # packages
# They hold things, but cannot be changed themselves.
_FROZEN: Final = (
    *(tuple, frozenset, MappingProxyType, property, staticmethod, classmethod),
    *(FunctionType, types.MethodType, functools.partial, functools.partialmethod, CellType),
    *(types.BuiltinFunctionType, types.MethodWrapperType, weakref.ref, functools.cached_property),
    *(operator.attrgetter, operator.itemgetter, operator.methodcaller, slice, types.GenericAlias),
)
# What no promise to be frozen makes so.
_GROWING: Final = (list, dict, set, bytearray)
# What every member of an enum has.
_OF_MEMBERS: Final = frozenset({"_name_", "_sort_order_", "__objclass__"})
# What those consist of, and how it is written in a path.
_PARTS: Final[Mapping[type, tuple[tuple[str, str], ...]]] = MappingProxyType(
    {
        property: (("fget", ""), ("fset", ".fset"), ("fdel", ".fdel")),
        staticmethod: (("__func__", ""),),
        classmethod: (("__func__", ""),),
        functools.partial: (("func", ""), ("args", ".args"), ("keywords", ".keywords")),
        slice: (("start", ".start"), ("stop", ".stop"), ("step", ".step")),
    },
)
EMPTY: Final = object()  # what a variable holds that has no value yet
# Makers of methods that keep books in closures, such as of what is just being printed: of what
# their functions close over, only functions are anybody else's.
_MAKERS: Final = frozenset({"dataclasses", "reprlib", "enum", "typing", "abc", "collections"})


class Walk:
    """How far a walk goes."""

    def __init__(self, infrastructure: Iterable[object] = ()) -> None:
        modules = [module for module in [*sys.modules.values()] if type(module) is ModuleType]
        # They are held, so that none of their ids is given to another object meanwhile.
        self._ends = [*infrastructure, *map(vars, modules)]
        self._end_ids = frozenset(map(id, self._ends))
        self._seen: dict[int, object] = {}  # held for the same reason
        self._rebound: dict[int, tuple[str, CellType]] = {}

    def rebound(self) -> Iterable[tuple[str, CellType]]:
        """The variables that functions met so far close over and rebind: `nonlocal`."""
        return self._rebound.values()

    def over(self, root: object, path: str = "") -> Iterator[tuple[str, object]]:
        """Everything reachable that is no atom and was not met before, with the way there."""
        pending: list[tuple[str, object]] = [(path, root)]
        while pending:
            path, item = pending.pop()
            if id(item) in self._seen or self.stops_at(item):
                continue
            self._seen[id(item)] = item
            if _is_atom(item):
                continue
            yield path, item
            pending.extend(self.from_here(item, path))

    def stops_at(self, item: object) -> bool:
        return (
            isinstance(item, _STOPS)
            or id(item) in self._end_ids
            or type(item).__module__.partition(".")[0] in _FOREIGN
        )

    def from_here(self, item: object, path: str) -> Iterator[tuple[str, object]]:
        """What is reachable in one step, and how that is written."""
        if isinstance(item, (dict, MappingProxyType)):
            for key, value in [*cast("dict[Any, Any]", item).items()]:
                yield f"{path}[key]", key
                yield f"{path}[{key!r:.40}]", value
        elif type(item) in {tuple, list}:
            for position, value in enumerate(cast("tuple[object, ...]", item)):
                yield f"{path}[{position}]", value
        elif isinstance(item, FunctionType):
            yield from self._from_function(item, path)
        elif isinstance(item, CellType):
            if (held := contents_of(item)) is not EMPTY:
                yield path, held
        elif isinstance(item, weakref.ref):
            yield f"{path}()", cast("weakref.ref[Any]", item)()
        elif isinstance(item, types.MethodType):
            yield f"{path}.__self__", item.__self__
            yield path, item.__func__
        else:
            yield from self._from_object(item, path)

    def _from_object(self, item: object, path: str) -> Iterator[tuple[str, object]]:
        kind = type(item)
        if issubclass(kind, types.GenericAlias):
            # Asked for anything else, it would answer for the class.
            yield f"{path}.__args__", cast("types.GenericAlias", item).__args__
            return
        attributes = _attributes_of(item)
        if issubclass(kind, enum.Enum):
            for name in sorted(attributes.keys() - _OF_MEMBERS):
                yield f"{path}.{'value' if name == '_value_' else name}", attributes[name]
            return
        for name, value in [*attributes.items()]:
            # A cached property of Python 3.11 has a lock, which carries nothing.
            if name == "lock" and issubclass(type(item), functools.cached_property):
                continue
            if name != "__annotations__":
                yield f"{path}.{name}", value
        # Python's collector is not told of what a struct with `gc=False` holds.
        fields: tuple[str, ...] = getattr(kind, "__struct_fields__", ())
        for name in fields:
            yield f"{path}.{name}", getattr(item, name, None)
        names = {id(getattr(item, name, None)): f".{name}" for name in _slots(kind)}
        names |= {id(getattr(item, name)): step for name, step in _PARTS.get(kind, ())}
        names[id(kind)] = ".__class__"
        known = {id(attributes), *map(id, attributes.values())}
        for position, value in enumerate(gc.get_referents(item)):
            if id(value) not in known:
                yield path + names.get(id(value), f"[{position}]"), value

    def _from_function(self, function: FunctionType, path: str) -> Iterator[tuple[str, object]]:
        code = function.__code__
        taken = code.co_varnames[: code.co_argcount]
        defaults: tuple[object, ...] = function.__defaults__ or ()
        named = dict(zip(taken[len(taken) - len(defaults) :], defaults, strict=False))
        named |= function.__kwdefaults__ or {}
        for name, value in named.items():
            yield f"{path}'s default {name!r}", value
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        rebinds = _rebound_in(code)
        keeps_books = function.__globals__.get("__name__") in _MAKERS
        for name, cell in cells:
            if keeps_books and not isinstance(contents_of(cell), FunctionType):
                continue
            there = f"{path}'s closure {name!r}"
            if name in rebinds:
                self._rebound.setdefault(id(cell), (there, cell))
            yield there, cell
        for name, value in [*vars(function).items()]:
            yield path if name == "__wrapped__" else f"{path}.{name}", value


def mutables(
    root: object,
    *,
    infrastructure: Iterable[object] = (),
) -> Iterator[tuple[str, object]]:
    """Everything reachable from `root` that could be changed, with the way there.

    `infrastructure` is shared on purpose, so the walk ends there.
    """
    walk = Walk(infrastructure)
    for path, item in walk.over(root):
        if not is_frozen(item):
            yield path, item
    yield from walk.rebound()


def assert_isolated(items: Iterable[object], *, infrastructure: Iterable[object] = ()) -> None:
    """Raise IsolationError if any two of these (contexts, runs, ...) share anything mutable.

    `infrastructure` is what they share on purpose.
    """
    infrastructure = tuple(infrastructure)
    reachable = [
        {id(found): (path, found) for path, found in mutables(item, infrastructure=infrastructure)}
        for item in items
    ]
    for (one, first), (other, second) in itertools.combinations(enumerate(reachable), 2):
        for shared in first.keys() & second.keys():
            path, found = first[shared]
            msg = (
                f"items {one} and {other} share a {type(found).__qualname__}: "
                f"items[{one}]{path} is items[{other}]{second[shared][0]}"
            )
            raise IsolationError(msg)


def _is_atom(item: object) -> bool:
    if type(item) in _ATOMS or type(item) is object:
        return True
    # Members of enums have values; and what can have attributes may be given some.
    return (
        issubclass(type(item), _ATOMS)
        and not issubclass(type(item), enum.Enum)
        and not _takes_attributes(type(item), _ATOMS)
    )


def is_frozen(item: object) -> bool:
    """Whether it cannot be changed itself, whatever it holds.

    What can be hung on it all the same is looked at by itself.
    """
    if isinstance(item, FunctionType):
        return True
    if issubclass(type(item), _GROWING) or has_cached_property(type(item)):
        return False
    if issubclass(type(item), enum.Enum):
        return True
    if issubclass(type(item), _FROZEN):
        return type(item) in _FROZEN or not (
            _attributes_of(item) or _adds_slots(type(item), _FROZEN)
        )
    # Of the class itself: one below a frozen dataclass need not be one.
    parameters = vars(type(item)).get("__dataclass_params__")
    config = getattr(type(item), "__struct_config__", None)  # msgspec's, which is inherited
    of_attrs = vars(type(item)).get("__attrs_props__")
    return bool(
        getattr(parameters, "frozen", False)
        or getattr(config, "frozen", False)
        or getattr(of_attrs, "is_frozen", False)
    )


def has_cached_property(kind: type) -> bool:
    """Whether the first look at one of its attributes adds to an instance."""
    return any(
        isinstance(value, functools.cached_property)
        for owner in kind.__mro__
        for value in vars(owner).values()
    )


def contents_of(cell: CellType) -> object:
    """What a variable that is closed over holds, or EMPTY."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def _rebound_in(code: CodeType) -> set[str]:
    """The names of its enclosing functions' variables that it, or a function in it, rebinds."""
    found = {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in {"STORE_DEREF", "DELETE_DEREF"}
    }
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= _rebound_in(inner)
    return found.intersection(code.co_freevars)


def _attributes_of(item: object) -> Mapping[str, object]:
    """What somebody has hung on it."""
    found: Mapping[str, object] = getattr(item, "__dict__", {})
    return found


def _takes_attributes(kind: type, plain: tuple[type, ...]) -> bool:
    """Whether an instance of that subclass of one of `plain` has room that these have not."""
    return kind.__dictoffset__ != 0 or _adds_slots(kind, plain)


def _adds_slots(kind: type, plain: tuple[type, ...]) -> bool:
    return any(
        isinstance(value, types.MemberDescriptorType)
        for owner in kind.__mro__
        if owner not in plain
        for value in vars(owner).values()
    )


def _slots(cls: type) -> Iterator[str]:
    for owner in cls.__mro__:
        slots: str | Iterable[str] = vars(owner).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
