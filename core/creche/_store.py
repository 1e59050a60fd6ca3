"""What creche asks of a store, and one that keeps everything in memory.

A store keeps threads, their messages, runs and event logs. Every question takes the owner:
another user's thread is not refused, it is absent. A write is a `Commit`: all that one thread
has new, taken whole or not at all.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any, Literal, Protocol

from creche._budget import DaySpending, Spending
from creche._context import RunId, ThreadId, ToolCallId, UserId, new_id
from creche._messages import Message, text_of

IdKind = Literal["thread", "run", "question"]
RunStatus = Literal["queued", "running", "parked", "success", "cancelled", "failed", "lost"]
# A question whose run ended for no reason of its own (a shutdown, a crash) stays open.
QuestionStatus = Literal["open", "answered", "declined", "unanswered", "withdrawn"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ThreadRecord:
    """One conversation. `epoch` changes when entries that readers saw may have been lost."""

    user_id: UserId
    thread_id: ThreadId
    title: str
    epoch: str
    last_seq: int  # of its event log, 0 when empty
    created_at: datetime
    updated_at: datetime
    runs: int = 0  # how many it has, however they stand


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run as it stands. Its events are those of its thread from first_seq to last_seq."""

    user_id: UserId
    thread_id: ThreadId
    run_id: RunId
    agent: str
    status: RunStatus
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    first_seq: int | None = None
    last_seq: int | None = None
    reason: str | None = None  # why it was cancelled, or the code of its failure
    receipt: dict[str, Any] | None = None
    rolled_back: bool = False  # its messages are no part of the thread; see `Commit.rolls_back`


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRecord:
    """What a run asked a person, and whether that still waits for an answer."""

    user_id: UserId
    thread_id: ThreadId
    run_id: RunId
    question_id: str
    agent: str  # that the run is of: an answer that comes after its end starts another
    reason: str  # in AG-UI's words: `input_required`, or `tool_call` for an approval
    prompt: str
    schema: dict[str, Any]  # of the answer, a JSON Schema
    asked_at: datetime
    expires_at: datetime
    status: QuestionStatus = "open"
    closed_at: datetime | None = None
    subagent_run_id: str | None = None
    # Of a tool's approval:
    tool_call_id: ToolCallId | None = None
    tool_name: str | None = None
    arguments: str | None = None  # canonical JSON, with its secrets redacted
    digest: str | None = None  # of the name and the arguments as they will be used


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredMessage:
    """A message and the run that it belongs to."""

    run_id: RunId
    message: Message
    created_at: datetime


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive entries of an event log, as they go over the wire: JSON, one a line."""

    first_seq: int
    last_seq: int
    data: bytes

    def lines(self) -> list[bytes]:
        return self.data.split(b"\n")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NewThread:
    """What a thread is made with when the commit is its first."""

    title: str
    epoch: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """All that one thread has new, in one transaction."""

    user_id: UserId
    thread_id: ThreadId
    opens: NewThread | None = None  # makes the thread if it is absent
    epoch: str | None = None  # replaces the thread's
    new_runs: tuple[RunRecord, ...] = ()  # a run id that is taken fails the commit
    runs: tuple[RunRecord, ...] = ()  # each replaces the record of that run id
    # Runs, new ones included, whose messages count no more, those that are yet to come neither.
    # For good: what a later record of such a run says of it is not looked at.
    rolls_back: tuple[RunId, ...] = ()
    messages: tuple[StoredMessage, ...] = ()  # appended
    questions: tuple[QuestionRecord, ...] = ()  # each replaces the record of that question id
    chunk: Chunk | None = None  # appended
    spent: tuple[DaySpending, ...] = ()  # added to what its user spent by day


class Store(Protocol):
    """Where threads live. Contract tests run over every implementation.

    Any method may raise whatever its medium raises. A `commit` that failed has changed nothing;
    one that may have been taken raises CommitInDoubtError.
    """

    async def commit(self, commits: Sequence[Commit]) -> None:
        """Take all of these, durably, in one transaction."""
        ...

    async def thread(self, user_id: UserId, thread_id: ThreadId) -> ThreadRecord | None: ...

    async def threads(
        self,
        user_id: UserId,
        *,
        limit: int = 100,
        offset: int = 0,
    ) -> list[ThreadRecord]:
        """This user's threads, the latest changed first."""
        ...

    async def messages(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        last_runs: int | None = None,
    ) -> list[StoredMessage]:
        """A thread's messages: run by run, in the order in which the runs were asked for.

        `last_runs` leaves out all but those of the latest so many runs. Runs that were rolled
        back are neither told of nor counted.
        """
        ...

    async def runs(self, user_id: UserId, thread_id: ThreadId) -> list[RunRecord]:
        """A thread's runs, oldest first."""
        ...

    async def run(self, user_id: UserId, run_id: RunId) -> RunRecord | None: ...

    async def open_questions(self, user_id: UserId, thread_id: ThreadId) -> list[QuestionRecord]:
        """A thread's questions of status `open`, oldest first; they may have expired."""
        ...

    async def question(self, user_id: UserId, question_id: str) -> QuestionRecord | None: ...

    async def chunks(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        after: int,
        limit: int,
    ) -> list[Chunk]:
        """The log from the chunk that holds `after + 1`, at most `limit` chunks."""
        ...

    async def delete_thread(self, user_id: UserId, thread_id: ThreadId) -> bool:
        """Remove a thread with all that it owns; False if there is none."""
        ...

    async def spending(self, user_id: UserId, day: date) -> Spending:
        """What this user's runs have spent on that day, UTC, those of deleted threads included."""
        ...

    async def search_messages(
        self,
        user_id: UserId,
        query: str,
        *,
        limit: int,
    ) -> list[tuple[ThreadId, StoredMessage]]:
        """This user's messages that contain every word of the query, the newest first.

        Those of runs that were rolled back are not found.
        """
        ...

    async def unfinished_runs(self) -> list[RunRecord]:
        """Every user's runs whose log has no end: `last_seq` is None. After a crash, the lost.

        One that was cancelled in the queue is among them, its end decided but not yet said.
        """
        ...

    async def is_anothers(self, kind: IdKind, id: str, user_id: UserId) -> bool:  # noqa: A002
        """Whether a thread, run or question of this id belongs to anybody but that user.

        The one question that names no owner: for the audit, after the reply. Yes or no is all
        that it ever tells.
        """
        ...


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


@dataclasses.dataclass(slots=True)
class _Thread:
    record: ThreadRecord
    messages: list[StoredMessage] = dataclasses.field(default_factory=list[StoredMessage])
    runs: dict[RunId, RunRecord] = dataclasses.field(default_factory=dict[RunId, RunRecord])
    chunks: list[Chunk] = dataclasses.field(default_factory=list[Chunk])
    questions: dict[str, QuestionRecord] = dataclasses.field(
        default_factory=dict[str, QuestionRecord]
    )

    @property
    def counted(self) -> ThreadRecord:
        """The record as readers see it."""
        return dataclasses.replace(self.record, runs=len(self.runs))


class MemoryStore:
    """A store that lasts as long as the process and grows with what it is given.

    For embedding without a database, and for tests. Nothing in it ever waits.
    """

    def __init__(self) -> None:
        # {(user, thread): what it holds}
        self._threads: dict[tuple[UserId, ThreadId], _Thread] = {}
        # {(user, day): what was spent}, which no thread takes with it
        self._spent: dict[tuple[UserId, date], Spending] = {}

    async def commit(self, commits: Sequence[Commit]) -> None:
        # No await in here: this is the transaction.
        for commit in commits:
            if (commit.user_id, commit.thread_id) not in self._threads and commit.opens is None:
                msg = f"thread {commit.thread_id!r} does not exist"
                raise LookupError(msg)
            thread = self._threads.get((commit.user_id, commit.thread_id))
            last_seq = thread.record.last_seq if thread else 0
            if commit.chunk is not None and commit.chunk.first_seq != last_seq + 1:
                msg = f"entry {commit.chunk.first_seq} does not follow {last_seq}"
                raise LookupError(msg)
            for run in commit.new_runs:
                if self._find_run(commit.user_id, run.run_id) is not None:
                    msg = f"run {run.run_id!r} exists"
                    raise LookupError(msg)
        for commit in commits:
            self._apply(commit)

    def _apply(self, commit: Commit) -> None:
        key = (commit.user_id, commit.thread_id)
        moment = now()
        thread = self._threads.get(key)
        if thread is None:
            assert commit.opens is not None
            thread = self._threads[key] = _Thread(
                ThreadRecord(
                    user_id=commit.user_id,
                    thread_id=commit.thread_id,
                    title=commit.opens.title,
                    epoch=commit.opens.epoch,
                    last_seq=0,
                    created_at=moment,
                    updated_at=moment,
                ),
            )
        title = thread.record.title or (commit.opens.title if commit.opens else "")
        thread.runs.update((run.run_id, run) for run in commit.new_runs)
        for run in commit.runs:
            before = thread.runs.get(run.run_id, run)
            thread.runs[run.run_id] = dataclasses.replace(run, rolled_back=before.rolled_back)
        for run_id in commit.rolls_back:
            if run_id in thread.runs:
                rolled_back = dataclasses.replace(thread.runs[run_id], rolled_back=True)
                thread.runs[run_id] = rolled_back
        thread.messages.extend(commit.messages)
        for day, spent in commit.spent:
            so_far = self._spent.get((commit.user_id, day), Spending())
            self._spent[commit.user_id, day] = so_far + spent
        thread.questions.update((each.question_id, each) for each in commit.questions)
        last_seq = thread.record.last_seq
        if commit.chunk is not None:
            thread.chunks.append(commit.chunk)
            last_seq = commit.chunk.last_seq
        thread.record = dataclasses.replace(
            thread.record,
            title=title,
            epoch=commit.epoch or thread.record.epoch,
            last_seq=last_seq,
            updated_at=moment,
        )

    async def thread(self, user_id: UserId, thread_id: ThreadId) -> ThreadRecord | None:
        thread = self._threads.get((user_id, thread_id))
        return thread.counted if thread else None

    async def threads(
        self,
        user_id: UserId,
        *,
        limit: int = 100,
        offset: int = 0,
    ) -> list[ThreadRecord]:
        owned = [thread.counted for (owner, _), thread in self._threads.items() if owner == user_id]
        owned.sort(key=lambda record: (record.updated_at, record.thread_id), reverse=True)
        return owned[offset : offset + limit]

    async def messages(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        last_runs: int | None = None,
    ) -> list[StoredMessage]:
        thread = self._threads.get((user_id, thread_id))
        if thread is None or last_runs == 0:
            return []
        counted = [run_id for run_id, run in thread.runs.items() if not run.rolled_back]
        runs = counted[-(last_runs or 0) :]  # and [0:] is all of them
        order = {run_id: position for position, run_id in enumerate(runs)}
        kept = [stored for stored in thread.messages if stored.run_id in order]
        return sorted(kept, key=lambda stored: order[stored.run_id])

    async def runs(self, user_id: UserId, thread_id: ThreadId) -> list[RunRecord]:
        thread = self._threads.get((user_id, thread_id))
        return list(thread.runs.values()) if thread else []

    async def run(self, user_id: UserId, run_id: RunId) -> RunRecord | None:
        return self._find_run(user_id, run_id)

    def _find_run(self, user_id: UserId, run_id: RunId) -> RunRecord | None:
        for (owner, _), thread in self._threads.items():
            if owner == user_id and run_id in thread.runs:
                return thread.runs[run_id]
        return None

    async def open_questions(self, user_id: UserId, thread_id: ThreadId) -> list[QuestionRecord]:
        thread = self._threads.get((user_id, thread_id))
        asked = thread.questions.values() if thread else ()
        return [each for each in asked if each.status == "open"]

    async def question(self, user_id: UserId, question_id: str) -> QuestionRecord | None:
        for (owner, _), thread in self._threads.items():
            if owner == user_id and question_id in thread.questions:
                return thread.questions[question_id]
        return None

    async def chunks(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        after: int,
        limit: int,
    ) -> list[Chunk]:
        thread = self._threads.get((user_id, thread_id))
        if thread is None:
            return []
        start = bisect.bisect_right(thread.chunks, after, key=lambda chunk: chunk.last_seq)
        return thread.chunks[start : start + limit]

    async def delete_thread(self, user_id: UserId, thread_id: ThreadId) -> bool:
        return self._threads.pop((user_id, thread_id), None) is not None

    async def spending(self, user_id: UserId, day: date) -> Spending:
        return self._spent.get((user_id, day), Spending())

    async def search_messages(
        self,
        user_id: UserId,
        query: str,
        *,
        limit: int,
    ) -> list[tuple[ThreadId, StoredMessage]]:
        words = query.lower().split()
        found = [
            (thread_id, stored)
            for (owner, thread_id), thread in self._threads.items()
            if owner == user_id
            for stored in thread.messages
            if not (stored.run_id in thread.runs and thread.runs[stored.run_id].rolled_back)
            if words and all(word in text_of(stored.message).lower() for word in words)
        ]
        found.sort(key=lambda pair: pair[1].created_at, reverse=True)
        return found[:limit]

    async def unfinished_runs(self) -> list[RunRecord]:
        return [
            run
            for thread in self._threads.values()
            for run in thread.runs.values()
            if run.last_seq is None
        ]

    async def is_anothers(self, kind: IdKind, id: str, user_id: UserId) -> bool:  # noqa: A002
        return any(
            id in {"thread": {thread_id}, "run": thread.runs, "question": thread.questions}[kind]
            for (owner, thread_id), thread in self._threads.items()
            if owner != user_id
        )


def new_epoch() -> str:
    """A fresh epoch: never the same twice, even for a thread that is deleted and made again."""
    return new_id()[:8]
