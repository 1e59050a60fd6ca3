"""What the loaded modules of a process share, counted while it runs.

The rules look at source and have to guess; this looks at the objects. A module's globals and its
classes' attributes count when they are mutable containers, objects with state of their own, caches
with something in them, or functions with a mutable default. What cannot change is no state:
numbers, strings, tuples of such, mapping proxies over such, types, modules, plain functions.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections import Counter
from collections.abc import (
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
)
from collections.abc import Set as AbstractSet
from typing import Any, Final, cast

from creche_server.scan import known

Found = tuple[str, str]  # (`package.module.attribute`, its type's name)

_CONTAINERS: Final = (MutableMapping, MutableSequence, MutableSet, bytearray)
_DEEPEST: Final = 6  # levels of frozen containers that are looked into
# Attributes that enum, typing and pydantic put on the classes that they make.
_OF_LIBRARIES: Final = frozenset(
    {
        *("_abc_impl", "_field_defaults", "_fields", "_parameters", "model_computed_fields"),
        *("model_config", "model_fields"),
    },
)


# Classes tell where they are defined, and not where they are imported from.
_STATEFUL: Final = known.STATEFUL | {
    *("_io.TextIOWrapper", "_io.BufferedReader", "_io.BufferedWriter", "_io.FileIO"),
    *("_io.BytesIO", "_io.StringIO", "_queue.SimpleQueue", "_thread.RLock", "_thread.lock"),
    *("_thread._local", "_contextvars.Context", "_random.Random", "itertools.count"),
    *("itertools.cycle", "cyclopts.core.App", "sqlalchemy.sql.schema.MetaData"),
    *("sqlalchemy.engine.base.Engine", "sqlalchemy.orm.session.Session", "trio._sync.Event"),
    *("trio._sync.CapacityLimiter", "trio._sync.Semaphore", "trio._sync.Lock"),
    *("trio._core._parking_lot.ParkingLot", "httpx2._client.Client", "httpx2._client.AsyncClient"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessState:
    """What was found. Each object counts once, under the first of its names."""

    names: tuple[str, ...]  # `package.module.attribute`, sorted
    by_type: Mapping[str, int]  # {type's name: how many}
    by_package: Mapping[str, int]  # {package: how many}, of all that were asked for

    @property
    def count(self) -> int:
        return len(self.names)


def count_global_state(
    modules: Mapping[str, types.ModuleType],
    packages: Sequence[str] = ("creche", "creche_server"),
) -> ProcessState:
    """Count in those of `modules` ({dotted name: module}, such as `sys.modules`) that are ours.

    Pure but for what it looks at; it calls nothing of the modules. A large package takes tens of
    milliseconds: where others wait meanwhile, take `find_global_state` instead.
    """
    steps = find_global_state(modules, packages)
    return summed([found for step in steps for found in step], packages)


def find_global_state(
    modules: Mapping[str, types.ModuleType],
    packages: Sequence[str],
) -> Iterator[list[Found]]:
    """The same in steps: what each module adds, in well under a millisecond a module."""
    seen: set[int] = set()
    kinds: dict[type[Any], bool] = {}  # {type: whether its objects hold state}
    for name in sorted(name for name in modules if name.partition(".")[0] in packages):
        found: list[Found] = []
        module = cast("object", modules[name])  # or None, or what a module put in its place
        known_module = module if isinstance(module, types.ModuleType) else types.ModuleType(name)
        for path, value in _attributes(name, known_module):
            if id(value) not in seen and _is_state(value, packages, kinds):
                seen.add(id(value))
                found.append((path, type(value).__name__))
        yield found


def summed(found: Sequence[Found], packages: Sequence[str]) -> ProcessState:
    """All of it together; a package with nothing in it is told as well."""
    by_package = Counter(name.partition(".")[0] for name, _ in found)
    return ProcessState(
        names=tuple(sorted(name for name, _ in found)),
        by_type=types.MappingProxyType(dict(Counter(kind for _, kind in found))),
        by_package=types.MappingProxyType({name: by_package[name] for name in packages}),
    )


def _attributes(name: str, module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """A module's own names, and those of the classes that it defines."""
    waiting: list[tuple[str, Mapping[str, object]]] = [(name, vars(module))]
    while waiting:
        path, namespace = waiting.pop()
        for attribute, value in list(namespace.items()):
            if _is_dunder(attribute) or attribute in _OF_LIBRARIES:
                continue
            here = f"{path}.{attribute}"
            if not issubclass(type(value), type):  # a proxy's `__class__` may be anybody's
                yield here, value
            elif _is_own_class(cast("type[Any]", value), here):
                waiting.append((here, vars(cast("type[Any]", value))))


def _is_own_class(kind: type[Any], path: str) -> bool:
    """Whether a class is defined where it was found; an enum holds its members only."""
    return f"{kind.__module__}.{kind.__qualname__}" == path and not issubclass(kind, enum.Enum)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_state(  # noqa: PLR0911  one return a kind
    value: object,
    packages: Sequence[str],
    kinds: dict[type[Any], bool],
    depth: int = 0,
) -> bool:
    # By its type, not by its `__class__`, for which a proxy may ask whom it stands for just now.
    kind: Any = type(value)
    if issubclass(kind, (str, bytes, int, float, complex, type(None), types.ModuleType, type)):
        return False
    if issubclass(kind, _CONTAINERS):
        return True
    if issubclass(kind, (tuple, frozenset, types.MappingProxyType)):
        inner = cast("AbstractSet[Any] | tuple[Any, ...]", value)
        if issubclass(kind, types.MappingProxyType):
            inner = tuple(cast("Mapping[Any, Any]", value).values())
        if depth < _DEEPEST and any(_is_state(item, packages, kinds, depth + 1) for item in inner):
            return True
    if issubclass(kind, (staticmethod, classmethod)):
        return _is_state(cast("staticmethod[..., Any]", value).__func__, packages, kinds, depth)
    if issubclass(kind, functools._lru_cache_wrapper):  # noqa: SLF001  it has no other name
        # A library's own is no state of ours: `urlsplit` has one, for all who import it.
        module = str(getattr(value, "__module__", ""))
        return module.partition(".")[0] in packages and bool(
            cast("Any", value).cache_info().currsize
        )
    if issubclass(kind, types.FunctionType):
        function = cast("types.FunctionType", value)
        by_name: Mapping[str, Any] = function.__kwdefaults__ or {}
        defaults = (*(function.__defaults__ or ()), *by_name.values())
        return any(_is_state(item, packages, kinds, depth + 1) for item in defaults)
    kind = cast("type[Any]", type(value))
    if kind not in kinds:
        kinds[kind] = _has_state(kind, packages)
    return kinds[kind]


def _has_state(kind: type[Any], packages: Sequence[str]) -> bool:
    """Whether objects of this type hold state, by the scanner's table or because they are ours."""
    if any(f"{base.__module__}.{base.__qualname__}" in _STATEFUL for base in kind.__mro__):
        return True
    if kind.__module__.partition(".")[0] not in packages or issubclass(kind, (enum.Enum, tuple)):
        return False
    frozen = getattr(kind, "__dataclass_params__", None) or getattr(kind, "__struct_config__", None)
    return not getattr(frozen, "frozen", False) and _has_fields(kind)


def _has_fields(kind: type[Any]) -> bool:
    """Whether instances have anything that could be assigned."""
    return any(
        "__dict__" in vars(base) or bool(vars(base).get("__slots__")) for base in kind.__mro__[:-1]
    )
