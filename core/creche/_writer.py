"""The one task that commits: everybody's new entries, grouped into few transactions.

It knows neither threads nor events, only sources that have something to commit. Drafts gather
for `commit_interval`, and then everybody's go together; urgent sources (somebody waits for a
barrier) are committed at once. If a group fails, its members are tried singly, so that one
bad row harms only its owner; what failed is tried again, ever more slowly, until it is taken.
Where a failure may hide that it was taken, since its answer was lost, the store is asked; and
where a log went on in the store without us, what is to follow our own entries is given up.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from typing import Final, Protocol

import trio

from creche._errors import CommitInDoubtError, LogConflictError, StoreUnavailableError
from creche._limits import Limits
from creche._store import Commit, Store

_log: Final = logging.getLogger("creche.writer")

_FIRST_RETRY: Final = 0.1  # seconds
_LAST_RETRY: Final = 5.0
# So many commits that fail one after the other, or so many seconds, are the store's own failure.
_TRIES: Final = 3
_PATIENCE: Final = 1.0


class Source(Protocol):
    """Something with entries to commit, asked by the writer only, one commit at a time."""

    def take(self) -> Commit | None:
        """What is to be committed next, or None. Changes nothing that matters if it is lost."""
        ...

    def settle(self, commit: Commit) -> None:
        """That commit is durable."""
        ...

    def refuse(self, commit: Commit, error: Exception) -> bool:
        """That commit is not in the store. Whether anything remains to be taken.

        With a LogConflictError it never can be, nor anything after it.
        """
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
        self._doubtful: dict[Source, Commit] = {}  # the commit that may have been taken
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
            try:
                clear = await self._out_of_doubt(sources)
                taken = [(source, commit) for source in clear if (commit := source.take())]
                if not taken:
                    self._forget_well(clear)
                    await trio.lowlevel.checkpoint()
                    return
                # What failed before must not drag the others into trying one by one again.
                ailing = [pair for pair in taken if pair[0] in self._ailing]
                healthy = [pair for pair in taken if pair[0] not in self._ailing]
                for group in filter(None, (healthy, ailing)):
                    await self._commit_group(group)
            except trio.Cancelled:
                # Nothing is lost: what was taken is still the sources' and is taken again.
                self._dirty.update(dict.fromkeys(sources, -math.inf))
                raise

    async def _commit_group(self, group: list[tuple[Source, Commit]]) -> None:
        begun = trio.current_time()
        try:
            await self._store.commit([commit for _, commit in group])
        except CommitInDoubtError as error:
            for source, commit in group:
                self._doubtful[source] = commit
                self._postpone(source, commit, error)
            return
        except Exception as error:  # noqa: BLE001  boundary: one group of commits
            if len(group) == 1:
                await self._refuse(*group[0], error)
                return
        else:
            for source, commit in group:
                self._settle(source, commit)
            return
        # Not while the group's error is handled: it may speak of anybody's rows, and would be the
        # context of each error that a member is told of.
        await self._commit_singly(group, begun)

    async def _commit_singly(self, group: list[tuple[Source, Commit]], begun: float) -> None:
        """Find out whose commit it was that failed; or that it is the store which fails."""
        some_went = False
        for position, (source, commit) in enumerate(group, 1):
            try:
                await self._store.commit([commit])
            except CommitInDoubtError as error:
                self._doubtful[source] = commit
                self._postpone(source, commit, error)
            except Exception as error:  # noqa: BLE001  boundary: one commit
                await self._refuse(source, commit, error)
            else:
                some_went = True
                self._settle(source, commit)
            seconds = trio.current_time() - begun
            if not some_went and (position >= _TRIES or seconds > _PATIENCE):
                for spared, its_commit in group[position:]:
                    # An error of their own: what the others failed of is the others' matter.
                    untried = StoreUnavailableError("the store takes nothing just now")
                    self._give_back(spared, its_commit, untried)
                return

    async def _out_of_doubt(self, sources: list[Source]) -> list[Source]:
        """Those whose last commit's fate is known; the store is asked where it was not."""
        clear: list[Source] = []
        away = False
        for source in sources:
            commit = self._doubtful.get(source)
            if commit is not None:
                taken = None if away else await self._was_taken(commit)
                if taken is None:
                    away = True
                    self._postpone(source, commit, "the store does not answer")
                    continue
                del self._doubtful[source]
                if taken:
                    self._settle(source, commit)
            clear.append(source)
        return clear

    async def _was_taken(self, commit: Commit) -> bool | None:
        """Whether the store has it. None if the store cannot be asked just now.

        What has neither entries nor new runs counts as not taken: it may be committed twice.
        """
        try:
            if commit.chunk is not None:
                thread = await self._store.thread(commit.user_id, commit.thread_id)
                return thread is not None and thread.last_seq >= commit.chunk.last_seq
            for run in commit.new_runs:
                found = await self._store.run(commit.user_id, run.run_id)
                # Another run may have had that id before.
                return found is not None and found.created_at == run.created_at
        except Exception:  # noqa: BLE001  boundary: one question to a store that may be away
            return None
        return False

    def _settle(self, source: Source, commit: Commit) -> None:
        self._ailing.pop(source, None)
        self._doubtful.pop(source, None)
        source.settle(commit)  # marks itself again if more has come

    async def _refuse(self, source: Source, commit: Commit, error: Exception) -> None:
        """Have it tried again, unless that has been done and it turns out to be of no use."""
        if source in self._ailing and await self._is_overtaken(commit):
            _log.error(
                "a thread's log was written by somebody else at the same time; what was said here "
                "cannot follow it and is given up",
                extra={"thread_id": commit.thread_id, "user_id": commit.user_id},
            )
            msg = (
                f"thread {commit.thread_id!r} was written by somebody else at the same time, so "
                "what was said here cannot be stored: share `journals` with whoever else writes "
                "on this store"
            )
            self._give_back(source, commit, LogConflictError(msg))
        else:
            self._give_back(source, commit, error)

    async def _is_overtaken(self, commit: Commit) -> bool:
        """Whether its entries do not follow what the store has; False if it cannot be asked."""
        if commit.chunk is None:
            return False
        try:
            thread = await self._store.thread(commit.user_id, commit.thread_id)
        except Exception:  # noqa: BLE001  boundary: one question to a store that may be away
            return False
        if thread is None:
            return commit.opens is None or commit.chunk.first_seq != 1
        return thread.last_seq != commit.chunk.first_seq - 1

    def _give_back(self, source: Source, commit: Commit, error: Exception) -> None:
        if isinstance(error, LogConflictError):
            source.refuse(commit, error)
            self._forget(source)
            return
        # First: what it marks while it is asked must wait for the retry, too.
        delay = self._put_off(source)
        if source.refuse(commit, error):
            _log_failure(commit, error, delay)
            return
        del self._ailing[source]
        # It need not be the store's fault: a run's id may have been used before. Whoever asked
        # for it knows.
        _log.info("a commit was not taken, and who asked for it was told", extra=_of(commit, error))

    def _postpone(self, source: Source, commit: Commit, why: object) -> None:
        """Try that source again, later each time, and say so."""
        _log_failure(commit, why, self._put_off(source))

    def _put_off(self, source: Source) -> float:
        """The seconds until that source is tried again: more at each failure."""
        ailing = self._ailing.get(source)
        delay = min(ailing.delay * 2, _LAST_RETRY) if ailing else _FIRST_RETRY
        self._ailing[source] = _Ailing(trio.current_time() + delay, delay)
        return delay

    def _forget(self, source: Source) -> None:
        self._ailing.pop(source, None)
        self._dirty.pop(source, None)

    def _forget_well(self, sources: list[Source]) -> None:
        for source in sources:
            self._ailing.pop(source, None)


def _log_failure(commit: Commit, why: object, delay: float) -> None:
    _log.warning("a commit failed and is tried again in %.1f s", delay, extra=_of(commit, why))


def _of(commit: Commit, why: object) -> dict[str, str]:
    return {"thread_id": commit.thread_id, "user_id": commit.user_id, "error": repr(why)}
