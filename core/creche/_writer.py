"""The one task that commits: everybody's new entries, grouped into few transactions.

It knows neither threads nor events, only sources that have something to commit. Drafts gather
for `commit_interval`, and then everybody's go together; urgent sources (somebody waits for a
barrier) are committed at once. If a group fails, its members are tried singly, so that one
bad row harms only its owner; what failed is tried again, ever more slowly, until it is taken.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from typing import Final, Protocol

import trio

from creche._limits import Limits
from creche._store import Commit, Store

_log: Final = logging.getLogger("creche.writer")

_FIRST_RETRY: Final = 0.1  # seconds
_LAST_RETRY: Final = 5.0


class Source(Protocol):
    """Something with entries to commit, asked by the writer only, one commit at a time."""

    def take(self) -> Commit | None:
        """What is to be committed next, or None. Changes nothing that matters if it is lost."""
        ...

    def settle(self, commit: Commit) -> None:
        """That commit is durable."""
        ...

    def refuse(self, commit: Commit, error: Exception) -> bool:
        """That commit failed and has changed nothing. Whether anything remains to be taken."""
        ...


@dataclasses.dataclass(slots=True)
class _Ailing:
    """A source whose last commit failed."""

    due: float  # trio time of the next try
    delay: float  # seconds, doubled at each failure


class Writer:
    """Owned by `open_journals`, which runs `serve` for as long as anybody can append."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._dirty: dict[Source, float] = {}  # {source: trio time at which it is due}
        self._ailing: dict[Source, _Ailing] = {}
        self._wakes_at = math.inf  # trio time until which `serve` sleeps
        self._sooner = trio.Event()  # something is due before that
        self._one_at_a_time = trio.Lock()

    def mark(self, source: Source, *, urgent: bool) -> None:
        """Note that `source` has something to commit: now, or within the interval."""
        if source in self._ailing:
            return
        due = -math.inf if urgent else trio.current_time() + self._limits.commit_interval
        if due < self._dirty.get(source, math.inf):
            self._dirty[source] = due
            if due < self._wakes_at:
                self._sooner.set()

    async def serve(self) -> None:
        """Commit what is marked, until cancelled."""
        while True:
            await self._wait_for_work()
            await self._commit_round()

    async def flush(self) -> None:
        """Commit all that is marked now. The caller bounds the time; failures are retried in it."""
        async with self._one_at_a_time:
            pass  # what `serve` has under way is not to be cut off
        while self._dirty or self._ailing:
            self._dirty = dict.fromkeys(self._dirty, -math.inf)
            await self._wait_for_work()
            await self._commit_round()

    async def _wait_for_work(self) -> None:
        while True:
            retries = (ailing.due for ailing in self._ailing.values())
            self._sooner = trio.Event()
            self._wakes_at = min(itertools.chain(self._dirty.values(), retries), default=math.inf)
            if self._wakes_at <= trio.current_time():
                break
            with trio.move_on_at(self._wakes_at):
                await self._sooner.wait()
        moment = trio.current_time()
        for source in [source for source, ailing in self._ailing.items() if ailing.due <= moment]:
            self._dirty[source] = -math.inf

    async def _commit_round(self) -> None:
        async with self._one_at_a_time:
            moment = trio.current_time()
            # When somebody's drafts are due, everybody's go; when somebody only waits for a
            # barrier, they stay: each commit of a thread is one row more of its log.
            drafts = any(-math.inf < due <= moment for due in self._dirty.values())
            due = (source for source, due in self._dirty.items() if drafts or due <= moment)
            sources = list(itertools.islice(due, self._limits.commit_threads))
            for source in sources:
                del self._dirty[source]
            taken = [(source, commit) for source in sources if (commit := source.take())]
            if not taken:
                self._forget_well(sources)
                await trio.lowlevel.checkpoint()
                return
            together = True
            try:
                await self._store.commit([commit for _, commit in taken])
            except trio.Cancelled:
                # Nothing is lost: what was taken is still the sources' and is taken again.
                self._dirty.update(dict.fromkeys(sources, -math.inf))
                raise
            except Exception as error:  # noqa: BLE001  boundary: one group of commits
                if len(taken) == 1:
                    self._refuse(*taken[0], error)
                    return
                together = False
            if together:
                for source, commit in taken:
                    self._settle(source, commit)
            else:
                # Not while the group's error is handled: it may speak of anybody's rows, and
                # would be the context of each error that a member is told of.
                await self._commit_singly(taken)

    async def _commit_singly(self, taken: list[tuple[Source, Commit]]) -> None:
        for position, (source, commit) in enumerate(taken):
            try:
                await self._store.commit([commit])
            except trio.Cancelled:
                again = (source for source, _ in taken[position:])
                self._dirty.update(dict.fromkeys(again, -math.inf))
                raise
            except Exception as error:  # noqa: BLE001  boundary: one commit
                self._refuse(source, commit, error)
            else:
                self._settle(source, commit)

    def _settle(self, source: Source, commit: Commit) -> None:
        self._ailing.pop(source, None)
        source.settle(commit)  # marks itself again if more has come

    def _refuse(self, source: Source, commit: Commit, error: Exception) -> None:
        ailing = self._ailing.get(source)
        delay = min(ailing.delay * 2, _LAST_RETRY) if ailing else _FIRST_RETRY
        _log.warning(
            "a commit failed and is tried again in %.1f s",
            delay,
            extra={"thread_id": commit.thread_id, "user_id": commit.user_id, "error": repr(error)},
        )
        # Before it is asked: what it marks meanwhile must wait for the retry, too.
        self._ailing[source] = _Ailing(trio.current_time() + delay, delay)
        if not source.refuse(commit, error):
            del self._ailing[source]

    def _forget_well(self, sources: list[Source]) -> None:
        for source in sources:
            self._ailing.pop(source, None)
