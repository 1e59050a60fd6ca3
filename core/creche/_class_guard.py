"""Notices that a run wrote to its agent's class, which other runs share, and puts it back.

A class can't be locked, so it is compared with what it was at registration: before an instance
is made of it, so that no later run sees what an earlier one left there, and when a run ends.
Who wrote cannot be known while several runs of the class are alive; each of them may also have
read what another wrote. So all of these fail, and none that begins later.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from types import MappingProxyType
from typing import Any, Final

from creche._errors import RunError

_log: Final = logging.getLogger("creche.isolation")

# Whom Python itself owns; `object` is among them.
_PYTHONS_MODULES: Final = frozenset({"abc", "builtins", "typing", "typing_extensions"})
# What Python itself writes to a class after its making: on the first look at its annotations,
# and when an instance is first copied.
_PYTHONS_NAMES: Final = frozenset({"__annotations__", "__annotations_cache__", "__slotnames__"})


class IsolationViolationError(RunError):
    """A run changed what other runs share: `classes`, by name."""

    def __init__(self, message: str, *, classes: Sequence[str]) -> None:
        super().__init__(message, code="isolation_violation")
        self.classes = tuple(classes)


class ClassGuard:
    """One class as it was at registration. Shared by all runs; holds nothing of any of them."""

    __slots__ = ("_attributes", "_guarded", "_names", "_values", "breaches")

    def __init__(self, guarded: type) -> None:
        self._guarded = guarded
        self._attributes: Mapping[str, Any] = MappingProxyType(dict(vars(guarded)))
        self._names = tuple(self._attributes)
        self._values = tuple(self._attributes.values())
        self.breaches = 0  # how often it was found changed, and put back

    @property
    def name(self) -> str:
        return self._guarded.__name__

    def check(self) -> None:
        """Count a breach, log it and put the class back, if it is not as it was."""
        now = vars(self._guarded)
        # All in C: this is done at the beginning and at the end of each run.
        if tuple(now) == self._names and all(map(is_, now.values(), self._values)):
            return
        written = sorted(name for name in {*now, *self._names} if self._is_changed(name))
        for name in written:
            if name in self._attributes:
                type.__setattr__(self._guarded, name, self._attributes[name])
            else:
                type.__delattr__(self._guarded, name)
        # The order may be another now, and Python may have added what is its own.
        self._names, self._values = tuple(now), tuple(now.values())
        if written:
            self.breaches += 1
            _log.error(
                "a run wrote to its agent's class, which was put back: %s.%s",
                self._guarded.__name__,
                ", ".join(written),
            )

    def _is_changed(self, name: str) -> bool:
        if name in _PYTHONS_NAMES:
            return False
        absent = self  # no class has its own guard for an attribute
        return vars(self._guarded).get(name, absent) is not self._attributes.get(name, absent)


class ClassWatch:
    """One run's eye on the classes that it makes instances of."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: dict[ClassGuard, int] = {}  # {guard: its breaches when this run first came}

    def begin(self, guards: Iterable[ClassGuard]) -> None:
        """An instance is about to be made: the class is as it was registered."""
        for guard in guards:
            guard.check()
            self._seen.setdefault(guard, guard.breaches)

    def end(self) -> IsolationViolationError | None:
        """The run's agents have ended: why it failed, if one of their classes was written to."""
        violated: list[str] = []
        for guard, breaches in self._seen.items():
            guard.check()
            if guard.breaches != breaches:
                violated.append(guard.name)
        if not violated:
            return None
        return IsolationViolationError(
            "While this run was alive, something was written to its agent's class, which all runs "
            "share. It was put back; keep what belongs to a run on `self`.",
            classes=violated,
        )


def classes_of(agent_class: type) -> tuple[type, ...]:
    """The classes that an agent is made of, without those that Python brings."""
    return tuple(
        each for each in inspect.getmro(agent_class) if each.__module__ not in _PYTHONS_MODULES
    )
