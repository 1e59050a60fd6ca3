"""How long the models of a run may be silent, seen to by the one task that watches the run.

A part of an answer costs two stores here, and no timer: the watcher sleeps until the earliest
moment at which any of them can have been silent for too long, looks, and sleeps again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from typing import Final

import trio

from creche._models import ModelPart

_SOONEST: Final = 0.001  # seconds until the next look, so that a limit of 0 keeps nobody busy


class Silence:
    """One call's: how long its model has been awaited, and may be. Times are seconds.

    It is the stream of parts, too, as the agent has it: what that does between them is no silence.
    """

    __slots__ = ("_allowed", "_idle", "_next", "_since", "parts", "scope")

    def __init__(self, first: float, idle: float) -> None:
        """`first` is until the first part, which is awaited from now on; `idle` between parts."""
        self.scope = trio.CancelScope()
        self.parts = False  # whether any came
        self._allowed = first
        self._idle = idle
        self._since = trio.current_time()  # trio time; inf while the agent has the word

    def is_too_long(self, now: float) -> bool:
        return self._since + self._allowed <= now

    def earliest(self, now: float) -> float:
        """The earliest moment (trio time) at which it can be too long, whatever comes before."""
        return min(self._since + self._allowed, now + self._allowed, now + self._idle)

    def heard(self, stream: AsyncIterator[ModelPart]) -> AsyncIterator[ModelPart]:
        """The stream is open; its parts as they come. Asking for it is part of the first's time."""
        self._allowed -= trio.current_time() - self._since
        self._since = math.inf
        self._next = aiter(stream).__anext__
        return self

    def __aiter__(self) -> AsyncIterator[ModelPart]:
        return self

    async def __anext__(self) -> ModelPart:
        self._since = trio.current_time()
        try:
            part = await self._next()
        finally:
            self._since = math.inf
        self._allowed = self._idle
        self.parts = True
        return part


class Silences:
    """Those of one run. An entry *is* `during`."""

    def __init__(self) -> None:
        self._open: dict[Silence, None] = {}
        self._asleep: trio.CancelScope | None = None  # the watcher, until its deadline

    @contextlib.contextmanager
    def during(self, silence: Silence) -> Iterator[None]:
        """A model is listened to in this block, which is ended when it is silent for too long."""
        self._open[silence] = None
        if self._asleep is not None:
            due = silence.earliest(trio.current_time())
            self._asleep.deadline = min(self._asleep.deadline, due)
        try:
            with silence.scope:
                yield
        finally:
            del self._open[silence]

    async def watch(self, over: trio.Event, until: float) -> None:
        """End what is silent for too long, until the run is over, or that moment (trio time)."""
        while not over.is_set() and (now := trio.current_time()) < until:
            due = until
            for silence in self._open:
                if silence.is_too_long(now):
                    silence.scope.cancel()
                else:
                    due = min(due, max(silence.earliest(now), now + _SOONEST))
            with trio.move_on_at(due) as self._asleep:
                await over.wait()
