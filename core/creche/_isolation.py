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
import itertools
import logging
import pathlib
import re
import sys
import types
import typing
import uuid
import weakref
import zoneinfo
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any, Final, cast

from creche._errors import IsolationError

_ATOMS: Final = (
    *(int, float, complex, str, bytes, range, slice, type(None), type(...), type(NotImplemented)),
    *(dt.date, dt.time, dt.timedelta, dt.tzinfo, zoneinfo.ZoneInfo),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID, pathlib.PurePath, re.Pattern, enum.Enum),
    *(typing.TypeVar, typing.ParamSpec, types.GenericAlias, types.UnionType, types.CodeType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType, functools.cached_property),
)
_STOPS: Final = (ModuleType, type, logging.Logger)
_FOREIGN: Final = frozenset({"trio", "outcome", "sniffio", "_abc", "typing"})  # packages
# They hold things, but cannot be changed themselves.
_FROZEN: Final = (
    *(tuple, frozenset, MappingProxyType, property, staticmethod, classmethod),
    *(FunctionType, types.MethodType, functools.partial, functools.partialmethod, types.CellType),
    *(types.BuiltinFunctionType, types.MethodWrapperType, weakref.ref),
)


class _Walk:
    """How far a walk goes."""

    def __init__(self, infrastructure: Iterable[object], *, closures: bool) -> None:
        modules = [module for module in [*sys.modules.values()] if type(module) is ModuleType]
        # They are held, so that none of their ids is given to another object meanwhile.
        self._ends = [*infrastructure, *map(vars, modules)]
        self._end_ids = frozenset(map(id, self._ends))
        self._closures = closures
        self._rebound: dict[int, tuple[str, object]] = {}

    def rebound(self) -> Iterable[tuple[str, object]]:
        """The variables that functions met so far close over and rebind: `nonlocal`."""
        return self._rebound.values()

    def stops_at(self, item: object) -> bool:
        return (
            isinstance(item, _STOPS)
            or id(item) in self._end_ids
            or type(item).__module__.partition(".")[0] in _FOREIGN
        )

    def from_here(self, item: object) -> Iterator[tuple[str, object]]:
        """What is reachable in one step, and how that is written."""
        if isinstance(item, (dict, MappingProxyType)):
            for key, value in [*cast("dict[Any, Any]", item).items()]:
                yield "[key]", key
                yield f"[{key!r:.40}]", value
        elif isinstance(item, FunctionType):
            yield from self._from_function(item)
        elif isinstance(item, weakref.ref):
            yield "()", cast("weakref.ref[Any]", item)()
        elif isinstance(item, types.MethodType):
            yield ".__self__", item.__self__
            yield "", item.__func__
        else:
            attributes = _attributes_of(item)
            for name, value in [*attributes.items()]:
                if name != "__annotations__":
                    yield f".{name}", value
            names = {id(getattr(item, name, None)): f".{name}" for name in _slots(type(item))}
            known = {id(attributes), *map(id, attributes.values())}
            for position, value in enumerate(gc.get_referents(item)):
                if id(value) not in known:
                    yield names.get(id(value), f"[{position}]"), value

    def _from_function(self, function: FunctionType) -> Iterator[tuple[str, object]]:
        yield ".__defaults__", function.__defaults__
        yield ".__kwdefaults__", MappingProxyType(function.__kwdefaults__ or {})
        if self._closures:
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            rebinds = {
                step.argval
                for step in dis.get_instructions(function)
                if step.opname in {"STORE_DEREF", "DELETE_DEREF"}
            }
            for name, cell in cells:
                if name in rebinds:
                    self._rebound[id(cell)] = (name, cell)
                yield f".{name}", cell
        for name, value in [*vars(function).items()]:
            yield f".{name}", value


def mutables(
    root: object,
    *,
    infrastructure: Iterable[object] = (),
    closures: bool = True,
) -> Iterator[tuple[str, object]]:
    """Everything reachable from `root` that could be changed, with the way there.

    `infrastructure` is shared on purpose, so the walk ends there. With `closures` false it does
    not look into what functions close over.
    """
    walk = _Walk(infrastructure, closures=closures)
    seen: dict[int, object] = {}  # holds what it has seen, so that no id is used twice
    pending: list[tuple[str, object]] = [("", root)]
    while pending:
        path, item = pending.pop()
        if id(item) in seen or walk.stops_at(item):
            continue
        seen[id(item)] = item
        if _is_atom(item):
            continue
        if not _is_frozen(item):
            yield path, item
        pending.extend((path + step, found) for step, found in walk.from_here(item))
    for name, cell in walk.rebound():
        yield f".{name}", cell


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
    if type(item) in _ATOMS or isinstance(item, enum.Enum):
        return True
    # One of a subclass may have been given attributes.
    return issubclass(type(item), _ATOMS) and not _attributes_of(item)


def _is_frozen(item: object) -> bool:
    if isinstance(item, FunctionType):
        return True  # what hangs on it is looked at by itself
    if issubclass(type(item), _FROZEN):
        return type(item) in _FROZEN or not _attributes_of(item)
    # Of the class itself: one below a frozen dataclass need not be one.
    parameters = vars(type(item)).get("__dataclass_params__")
    config = getattr(type(item), "__struct_config__", None)  # msgspec's, which is inherited
    return bool(getattr(parameters, "frozen", False) or getattr(config, "frozen", False))


def _attributes_of(item: object) -> Mapping[str, object]:
    """What somebody has hung on it."""
    found: Mapping[str, object] = getattr(item, "__dict__", {})
    return found


def _slots(cls: type) -> Iterator[str]:
    for owner in cls.__mro__:
        slots: str | Iterable[str] = vars(owner).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
