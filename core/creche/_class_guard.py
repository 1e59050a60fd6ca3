"""Notices that a run wrote to what its agent's class owns, which other runs share; puts it back.

A class can't be locked, nor a function, so they are compared with what they were at registration:
before an instance is made, so that no later run sees what an earlier one left there, and when a
run ends. Who wrote cannot be known while several runs of the class are alive; each of them may
also have read what another wrote. So all of these fail, and none that begins later.

Compared are class attributes and annotations, those of functions (their code, names and default
values, too), what hangs on members of enums, and the variables that these close over. A variable
belongs to the function around the class, as well, which may set it later: while no run of the
class is alive, it is taken as it is.

What a run writes and puts back before it ends is not seen, though runs that were alive meanwhile
may have read it: things are compared at the beginning and at the end of a run, and not between.
`creche scan` finds such a write, `type(self).x = …`, in the source.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, starmap
from operator import attrgetter, is_, itemgetter
from types import CellType, FunctionType, MappingProxyType
from typing import Any, Final, NamedTuple, cast

from creche._errors import RunError
from creche._isolation import EMPTY, contents_of
from creche._owned import is_written_late

_log: Final = logging.getLogger("creche.isolation")

# What can be written to them, beside what is in their dicts; a function's may be replaced, too.
_OF_CLASSES: Final = ("__name__", "__qualname__", "__bases__", "__class__")
_OF_FUNCTIONS: Final = (
    *("__code__", "__defaults__", "__kwdefaults__", "__dict__", "__doc__"),
    *("__name__", "__qualname__", "__module__"),
    *(("__type_params__",) if sys.version_info >= (3, 12) else ()),
    # Later, the first look at annotations runs code, which may fail.
    *(("__annotate__",) if sys.version_info >= (3, 14) else ("__annotations__",)),
)

_IMMUTABLE: Final = 1 << 8  # CPython's flag on a class, Py_TPFLAGS_IMMUTABLETYPE

_classes_now: Final = attrgetter(*_OF_CLASSES)
_functions_now: Final = attrgetter(*_OF_FUNCTIONS)


class IsolationViolationError(RunError):
    """A run changed what other runs share: `classes`, by name."""

    def __init__(self, message: str, *, classes: Sequence[str]) -> None:
        super().__init__(message, code="isolation_violation")
        self.classes = tuple(classes)


class _Names(NamedTuple):
    """The names that something has, in a dict that runs could write to."""

    path: str
    owner: object
    now: Mapping[str, Any]  # a live view, if the owner is a class, and else the dict
    was: Mapping[str, Any]

    def changes(self) -> Iterator[_Change]:
        for name in {*self.now, *self.was}:
            was, now = self.was.get(name, EMPTY), self.now.get(name, EMPTY)
            if was is now or self._may_change(name, was, now):
                continue
            yield _Change(f"{self.path}.{name}", functools.partial(self._put, name, was))

    def _may_change(self, name: str, was: object, now: object) -> bool:
        if isinstance(self.owner, type):
            return is_written_late(self.was, name, was=was, now=now)
        # What `~` of a flag is, Python notes when it is first asked.
        return name == "_inverted_" and was is EMPTY and type(now) is type(self.owner)

    def _put(self, name: str, value: object) -> None:
        if isinstance(self.owner, type):
            # Past what the metaclass makes of it.
            if value is EMPTY:
                type.__delattr__(self.owner, name)
            else:
                type.__setattr__(self.owner, name, value)
            return
        names = cast("dict[str, Any]", self.now)
        if value is EMPTY:
            names.pop(name, None)  # two functions may have one dict
        else:
            names[name] = value


class _Change(NamedTuple):
    path: str
    undo: Callable[[], None]


class ClassGuard:
    """What classes own, as it was at registration. Shared by all runs; holds nothing of any.

    `owned` is a part of what `check_agent_class` returns.
    """

    __slots__ = (
        *("_cells", "_classes", "_contents", "_empty", "_functions", "_keys", "_lengths", "_names"),
        *("_noted", "_owned", "_values", "_was", "alive", "breaches"),
    )

    def __init__(self, owned: Iterable[tuple[str, object]]) -> None:
        self._owned = tuple(owned)
        items = [item for _, item in self._owned]
        self._classes = tuple(
            item for item in items if isinstance(item, type) and not item.__flags__ & _IMMUTABLE
        )
        self._functions = tuple(item for item in items if isinstance(item, FunctionType))
        self._cells = tuple(item for item in items if isinstance(item, CellType))
        self._contents = tuple(map(contents_of, self._cells))
        self._was = (
            tuple(map(_classes_now, self._classes)),
            tuple(map(_functions_now, self._functions)),
        )
        for each in self._classes:
            # Python adds it at the first look, and then nothing more is to be added.
            if sys.version_info < (3, 14):
                type.__dict__["__annotations__"].__get__(each)  # noqa: RUF063  a look, and past the metaclass
        self._names = tuple(chain.from_iterable(starmap(_names_of, self._owned)))
        self.alive = 0  # runs that have begun and not ended
        self.breaches = 0  # how often it was found changed, and put back
        self._note()

    @property
    def name(self) -> str:
        """Of the class whose it is."""
        return self._owned[0][0].partition(".")[0]

    def check(self) -> str:
        """Count a breach and put things back, if they are not as they were; says which."""
        # All in C: this is done at the beginning and at the end of each run.
        if (
            not any(self._empty)
            and tuple(map(len, self._values)) == self._lengths
            and all(map(is_, self._now(), self._noted))
        ):
            return ""
        written = sorted(self._changes(), key=itemgetter(0))
        for _, undo in written:
            undo()
        # The order may be another now, and Python may have added what is its own.
        self._contents = tuple(map(contents_of, self._cells))
        self._note()
        if written:
            self.breaches += 1
        return ", ".join(path for path, _ in written)

    def _note(self) -> None:
        """Write down what there is, for `check` to compare it quickly."""
        some = [names.now for names in self._names if names.now]
        self._empty = tuple(names.now for names in self._names if not names.now)
        self._keys = tuple(names.keys() for names in some)  # live views
        self._values = tuple(names.values() for names in some)
        self._lengths = tuple(map(len, self._values))
        self._noted = tuple(self._now())

    def _now(self) -> Iterator[object]:
        return chain(
            chain.from_iterable(self._keys),
            chain.from_iterable(self._values),
            chain.from_iterable(map(_classes_now, self._classes)),
            chain.from_iterable(map(_functions_now, self._functions)),
            map(contents_of, self._cells),
        )

    def _changes(self) -> Iterator[_Change]:
        paths = {id(item): path for path, item in self._owned}
        for items, names, was in (
            (self._classes, _OF_CLASSES, self._was[0]),
            (self._functions, _OF_FUNCTIONS, self._was[1]),
        ):
            for item, values in zip(items, was, strict=True):
                for name, value in zip(names, values, strict=True):
                    if getattr(item, name) is not value:
                        put = type.__setattr__ if isinstance(item, type) else setattr
                        undo = functools.partial(put, item, name, value)
                        yield _Change(f"{paths[id(item)]}.{name}", undo)
        yield from chain.from_iterable(names.changes() for names in self._names)
        for cell, held in zip(self._cells, self._contents, strict=True):
            # Until it has a value, the function around the class has yet to come to that line.
            if self.alive and held is not EMPTY and contents_of(cell) is not held:
                undo = functools.partial(setattr, cell, "cell_contents", held)
                yield _Change(paths[id(cell)], undo)


def _names_of(path: str, item: object) -> Iterator[_Names]:
    """The dicts of what a class owns."""
    found: dict[str, Any] = {"": getattr(item, "__dict__", None)}
    if isinstance(item, FunctionType):
        found[".__kwdefaults__"] = item.__kwdefaults__
    if isinstance(item, FunctionType) and sys.version_info < (3, 14):
        found[".__annotations__"] = item.__annotations__
    elif isinstance(item, type):
        found[".__annotations__"] = vars(item).get("__annotations__")
    elif isinstance(item, functools.partial):
        found[".keywords"] = item.keywords
    for step, names in found.items():
        if isinstance(names, (dict, MappingProxyType)):
            live = cast("Mapping[str, Any]", names)
            yield _Names(path + step, live if step else item, live, MappingProxyType(dict(live)))


class ClassWatch:
    """One run's eye on the classes that it makes instances of."""

    __slots__ = ("_identity", "_seen")

    def __init__(self, identity: Mapping[str, str] | None = None) -> None:
        self._identity = dict(identity or {})  # whose its log lines are
        self._seen: dict[ClassGuard, int] = {}  # {guard: its breaches when this run first came}

    def begin(self, guards: Iterable[ClassGuard]) -> None:
        """An instance is about to be made: the class is as it was registered."""
        for guard in guards:
            if written := guard.check():
                self._log("before a run began, its agent's class was put back: %s", written)
            if guard not in self._seen:
                guard.alive += 1
                self._seen[guard] = guard.breaches

    def end(self) -> IsolationViolationError | None:
        """The run's agents have ended: why it failed, if one of their classes was written to."""
        violated: list[str] = []
        for guard, breaches in self._seen.items():
            if written := guard.check():
                self._log("a run wrote to its agent's class, which was put back: %s", written)
            elif guard.breaches != breaches:
                self._log("while a run was alive, its agent's class was written to: %s", guard.name)
            if guard.breaches != breaches:
                violated.append(guard.name)
            guard.alive -= 1
        self._seen.clear()
        if not violated:
            return None
        return IsolationViolationError(
            "While this run was alive, something was written to its agent's class, which all runs "
            "share. It was put back; keep what belongs to a run on `self`.",
            classes=violated,
        )

    def _log(self, words: str, what: str) -> None:
        _log.error(words, what, extra=self._identity)
