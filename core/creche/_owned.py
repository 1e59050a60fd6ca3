"""What a class brings along that runs could change for each other: found by one walk.

A class owns its namespace and those of its bases, its metaclass and the classes within it, and
their functions, with what hangs on these: attributes, default values, decorators, and what they
close over. Functions and classes that were made inside another function are owned by whoever
refers to them.

What can be imported by its name belongs to its module: the globals that a method names, and
their classes, are `creche scan`'s to judge, and the walk does not go there.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import itertools
import sys
import types
from collections import abc
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, FunctionType, MappingProxyType, ModuleType
from typing import Any, Final, cast

import trio

from creche._isolation import EMPTY, Walk, contents_of, has_cached_property, is_frozen

# Whom Python itself owns; `object` is among them.
_PYTHONS_MODULES: Final = frozenset({"abc", "builtins", "enum", "typing", "typing_extensions"})
# Class attributes that Python, and those who make classes for us, keep their notes in.
_PYTHONS: Final = frozenset(
    {
        *("__dict__", "__weakref__", "__annotations__", "__annotate__", "__annotate_func__"),
        *("__annotations_cache__", "__orig_bases__", "__parameters__", "__abstractmethods__"),
        *("__static_attributes__", "__firstlineno__", "__match_args__", "__slots__"),
        *("__protocol_attrs__", "__non_callable_proto_members__", "__slotnames__"),
        *("__subclasshook__", "__class_getitem__"),
    }
)
_OF_LIBRARIES: Final = ("__dataclass_", "__struct_", "__pydantic_", "__attrs_", "__msgspec_")
_PYDANTICS: Final = frozenset(
    {"model_config", "__class_vars__", "__private_attributes__", "__signature__", "__fields__"}
)
# What Python adds to a class on the first look at its annotations, and when an instance is copied.
_WRITTEN_LATE: Final = frozenset({"__annotations__", "__annotations_cache__", "__slotnames__"})
# What pydantic writes when a model is first used that refers to one which was not there yet.
_WRITTEN_ON_COMPLETION: Final = frozenset(
    {
        *("__pydantic_complete__", "__pydantic_computed_fields__", "__pydantic_core_schema__"),
        *("__pydantic_decorators__", "__pydantic_extra_info__", "__pydantic_fields__"),
        *("__pydantic_serializer__", "__pydantic_validator__", "__signature__"),
    }
)
# Packages that make classes, and what reads and writes them: their objects carry nothing.
_MAKERS_OF_CLASSES: Final = frozenset(
    {"attr", "attrs", "dataclasses", "msgspec", "pydantic", "pydantic_core"}
)
# Their objects are Trio's own, and stand for what runs: one that a class has, all runs set, wait
# for or read.
_TRIOS: Final = frozenset({"trio", "outcome"})
# They carry what one puts in to whoever takes it out.
_CHANNELS: Final = (trio.MemorySendChannel, trio.MemoryReceiveChannel, trio.lowlevel.RunVar)
# These carry nothing; the second is a usual default value.
_ATOMS_OF_TRIO: Final = frozenset({trio.Path, type(trio.TASK_STATUS_IGNORED)})
_Cached: Final = type(functools.cache(len))
# What is there to hold things, and nothing else.
_CONTAINERS: Final = (
    *(abc.MutableMapping, abc.MutableSequence, abc.MutableSet, abc.Generator),
    *(_Cached, itertools.count, itertools.cycle, *_CHANNELS),
)
# What functions are made and put together of.
_STRUCTURE: Final = (
    *(FunctionType, CellType, types.MethodType, types.BuiltinMethodType, types.MethodWrapperType),
    *(functools.partial, functools.partialmethod, functools.cached_property),
    *(property, staticmethod, classmethod, tuple, frozenset, MappingProxyType),
)


def classes_of(agent_class: type) -> tuple[type, ...]:
    """The classes that an agent is made of, without those that Python brings; their types, too."""
    mro = inspect.getmro(agent_class)
    metaclasses = dict.fromkeys(meta for each in mro for meta in inspect.getmro(type(each)))
    return tuple(each for each in (*mro, *metaclasses) if each.__module__ not in _PYTHONS_MODULES)


def is_notes(owner: type, name: str) -> bool:
    """Whether Python or a library keeps its notes on the class in that attribute."""
    return (
        name in _PYTHONS
        or name.startswith(_OF_LIBRARIES)
        or (name in _PYDANTICS and _is_pydantics(owner))
        or (name == "_field_defaults" and issubclass(owner, tuple))
        or (isinstance(owner, enum.EnumType) and name.startswith("_") and name.endswith("_"))
    )


def is_written_late(names: Mapping[str, object], name: str, *, was: object, now: object) -> bool:
    """Whether a class that had those names may get or change this one without anybody's fault."""
    if name in _WRITTEN_ON_COMPLETION:
        return names.get("__pydantic_complete__") is False
    if was is not EMPTY:
        return False
    return name in _WRITTEN_LATE or (name == "__msgspec_cache__" and _package_of(now) == "msgspec")


def _is_pydantics(owner: type) -> bool:
    return "__pydantic_validator__" in vars(owner)


class OwnedWalk(Walk):
    """Goes into the classes that belong to the one that it begins at. See the module.

    It ends at `shared`, by identity, and at instances of `stops`. With `services` it ends at all
    objects but containers and what functions are made of.
    """

    def __init__(
        self,
        roots: Iterable[type] = (),
        *,
        shared: Iterable[object] = (),
        stops: tuple[type, ...] = (),
        services: bool = False,
    ) -> None:
        super().__init__(shared)
        self._roots = tuple(roots)
        self._stops = stops
        self._services = services

    def stops_at(self, item: object) -> bool:
        if id(item) in self._end_ids:
            return True
        if isinstance(item, CellType):
            # Whoever shares a client may also put a new one in its place.
            return id(contents_of(item)) in self._end_ids
        if isinstance(item, type):
            return not self._owns(item)
        if issubclass(type(item), _CONTAINERS):
            return False
        if self._services and not issubclass(type(item), _STRUCTURE):
            return True
        return isinstance(item, self._stops) or (
            not is_carrier(item)
            and (_package_of(item) in _MAKERS_OF_CLASSES or super().stops_at(item))
        )

    def _owns(self, item: type) -> bool:
        if item in self._roots:
            return True
        if item.__module__ in _PYTHONS_MODULES:
            return False
        within = any(
            item.__module__ == root.__module__
            and item.__qualname__.startswith(f"{root.__qualname__}.")
            for root in self._roots
        )
        return within or not _can_be_imported(item)

    def from_here(self, item: object, path: str) -> Iterator[tuple[str, object]]:
        if isinstance(item, type):
            yield f"{path}.__class__", type(item)
            for base in item.__bases__:
                yield base.__name__, base
            for name, value in [*vars(item).items()]:
                if not is_notes(item, name):
                    yield f"{path}.{name}", value
            if isinstance(item, enum.EnumType):
                # Not all of them are attributes: one may be named as a property of a base.
                members: Mapping[str, object] = item.__members__
                for name, member in members.items():
                    yield f"{path}.{name}", member
        elif is_carrier(item):
            return  # what it holds is its own business: it is refused itself
        elif isinstance(item, (functools.partial, functools.partialmethod)):
            # Its dicts belong to it, as a function's attributes do to the function.
            parts = cast("functools.partial[Any]", item)
            yield path, parts.func
            yield f"{path}.args", parts.args
            yield f"{path}.keywords", MappingProxyType(parts.keywords)
        else:
            yield from super().from_here(item, path)


def is_carrier(item: object) -> bool:
    """Whether something can be left in it, though it is of a kind that most walks stop at."""
    kind: type = type(item)
    if issubclass(kind, ModuleType):
        # One that was made by hand is an object like any other.
        return not any(item is module for module in [*sys.modules.values()])
    return issubclass(kind, dataclasses.Field) or (
        _package_of(item) in _TRIOS and kind not in _ATOMS_OF_TRIO
    )


def _package_of(item: object) -> str:
    return type(item).__module__.partition(".")[0]


def faults(walk: OwnedWalk, found: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """What of that runs could change for each other, with its path."""
    for path, item in found:
        if not isinstance(item, type) and (is_carrier(item) or not is_frozen(item)):
            yield path, item
    yield from walk.rebound()


def advice(path: str, item: object, *, place: str) -> str:
    """What it is that runs would share, and what to do instead; `place` is where it may be."""
    kind = type(item).__name__
    if isinstance(item, CellType):
        return f"{path} is a variable that is rebound for all runs; keep it {place}"
    if has_cached_property(type(item)):
        return (
            f"{path} is a {kind} with a cached property, which the first run to look at it works "
            f"out for all; let it be a property, or keep the {kind} {place}"
        )
    if isinstance(item, _Cached):
        kind, instead = "cache", f"keep what it found {place}"
    elif path.rpartition("'s ")[2].startswith("default"):
        instead = "let the default be None, and make it in the body"
    elif "'s closure " in path or is_carrier(item):
        instead = f"keep it {place}"
    else:
        instead = f"make it a tuple, a frozenset or a MappingProxyType, or keep it {place}"
    return f"{path} is a {kind} that all runs would share; {instead}"


def _can_be_imported(item: type) -> bool:
    found: Any = sys.modules.get(item.__module__)
    for name in item.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is item
