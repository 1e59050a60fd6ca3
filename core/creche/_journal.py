"""A thread's ordered events: runs append, readers pull by `seq` up to what is visible.

Readers pull, so a first look is a resume from 0, a slow reader delays nobody but itself, and
there is no fan-out, no queue and no drop policy. Memory lets go of committed entries only, so
memory and store together never have a gap.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
import trio

from creche._audit import SecurityAudit
from creche._auditing import note_mix_up
from creche._budget import DaySpending
from creche._context import RunId, ThreadId, UserExecutionContext, UserId
from creche._conversation import Conversation
from creche._errors import (
    IsolationError,
    LogConflictError,
    MixUp,
    StoreUnavailableError,
    ThreadDeletedError,
)
from creche._events import Event, decode_event, encode_unnumbered, numbered
from creche._limits import Limits
from creche._proposals import Proposal, Proposals
from creche._store import (
    Chunk,
    Commit,
    NewThread,
    QuestionRecord,
    RunRecord,
    Store,
    StoredMessage,
    ThreadRecord,
    new_epoch,
)
from creche._thread_turn import ThreadTurn
from creche._watchers import Watchers
from creche._writer import Writer

_CHUNKS_PER_READ: Final = 8  # each `Limits.commit_bytes` at most


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One event in its place. `data` is its JSON, `seq` included, as every reader gets it."""

    seq: int
    data: bytes

    @property
    def event(self) -> Event:
        """The event, decoded afresh at each call."""
        return decode_event(self.data)


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """Records that become durable in the same transaction as the entry `seq`."""

    seq: int
    runs: tuple[RunRecord, ...]
    messages: tuple[StoredMessage, ...]
    spent: tuple[DaySpending, ...]
    questions: tuple[QuestionRecord, ...]


class Journal:
    """The live end of one thread's event log; shared by its run and its readers.

    Resource handling: got from `Journals.attached`, and valid within that block only.
    """

    def __init__(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        record: ThreadRecord | None,
        store: Store,
        writer: Writer,
        limits: Limits,
        audit: SecurityAudit | None = None,
    ) -> None:
        last_seq = record.last_seq if record else 0
        self.user_id = user_id
        self.thread_id = thread_id
        self.epoch = record.epoch if record else new_epoch()
        self.turn = ThreadTurn()  # of whoever executes a run here
        self.watchers = Watchers()
        self.audit = audit  # told of whoever would speak or write here as another
        self._store = store
        self._writer = writer
        self._limits = limits
        self._entries: list[Entry] = []  # consecutive, up to last_seq
        self._last_seq = last_seq
        self._committed = last_seq
        self._visible = last_seq
        self._kept_bytes = 0  # of entries that are committed and still in memory
        self._uncommitted_bytes = 0
        self._barriers: deque[int] = deque()  # uncommitted, ascending
        self._changes: deque[_Change] = deque()
        self._proposals = Proposals()
        # What the thread's runs were told and said; None: not known here, so read when needed.
        self._conversation = None if record else self._new_conversation()
        self._settled_meanwhile: list[StoredMessage] | None = None  # while it is being read
        self._rollbacks = 0  # how many commits rolled runs back
        self._rolled_back: set[RunId] = set()  # runs that are, and may have words on the way
        self._marked = False
        self._deleted = False
        self._conflict = ""  # why nothing of it can be stored any more
        self._readers = trio.lowlevel.ParkingLot()
        self._awaited = False  # whether anybody is parked there; asked at every event
        self._settled = trio.lowlevel.ParkingLot()

    @property
    def last_seq(self) -> int:
        """The `seq` of the newest entry, visible or not; 0 when there is none."""
        return self._last_seq

    @property
    def visible(self) -> int:
        """Readers see entries up to this `seq`: it stops before the first uncommitted barrier."""
        return self._visible

    @property
    def uncommitted_bytes(self) -> int:
        return self._uncommitted_bytes

    @property
    def is_overtaken(self) -> bool:
        """Whether somebody else has written the log meanwhile, so that no more can be stored."""
        return bool(self._conflict)

    # --- appending

    def append(
        self,
        event: Event,
        *,
        barrier: bool = False,
        runs: tuple[RunRecord, ...] = (),
        messages: tuple[StoredMessage, ...] = (),
    ) -> Entry:
        """Add an event, and commit `runs` and `messages` in the same transaction as it.

        Synchronous: the order of calls is the order of the log. A barrier is visible, with
        whatever follows it, only once it is committed. Raises TypeError or ValueError, and adds
        nothing, for what has no JSON, and IsolationError for records of another's.
        """
        encoded = encode_unnumbered(event)
        return self.append_encoded(
            encoded,
            speaker=None,
            barrier=barrier,
            runs=runs,
            messages=messages,
        )

    def append_encoded(
        self,
        encoded: bytes,
        *,
        speaker: UserExecutionContext | None,
        barrier: bool = False,
        runs: tuple[RunRecord, ...] = (),
        messages: tuple[StoredMessage, ...] = (),
        spent: tuple[DaySpending, ...] = (),
        questions: tuple[QuestionRecord, ...] = (),
    ) -> Entry:
        """The same for an event that is encoded already, said by the run of `speaker`.

        Raises IsolationError, and adds nothing, if its user is not the thread's owner.
        """
        if speaker is not None and speaker.user_id != self.user_id:
            msg = "a run may speak on its own user's threads only"
            raise self.injection(msg, "speak", speaker)
        if runs or messages or spent:
            self.check_owned(runs, speaker)
            change = _Change(self._last_seq + 1, runs, messages, spent, questions)
            self._changes.append(change)
        seq = self._last_seq = self._last_seq + 1
        entry = Entry(seq, numbered(encoded, seq))
        self._entries.append(entry)
        self._uncommitted_bytes += len(entry.data)
        if barrier:
            self._barriers.append(seq)
        elif not self._barriers:
            self._visible = seq
            if self._awaited:
                self._wake_readers()
        if barrier or not self._marked:
            self._marked = True
            self._writer.mark(self, urgent=barrier)
        return entry

    async def propose(
        self,
        opens: NewThread | None = None,
        *,
        new_runs: tuple[RunRecord, ...] = (),
        runs: tuple[RunRecord, ...] = (),
        messages: tuple[StoredMessage, ...] = (),
        questions: tuple[QuestionRecord, ...] = (),
        rolls_back: tuple[RunId, ...] = (),
        speaker: UserExecutionContext | None = None,
    ) -> None:
        """Commit records that belong to no event; `opens` makes the thread if it is absent.

        The messages of the runs in `rolls_back` are no part of its history from then on.

        Returns once they are durable. Raises StoreUnavailableError if the store refused them;
        then nothing was written and they are not tried again. IsolationError for records of
        another's.
        """
        self._check_not_overtaken()
        self.check_owned((*new_runs, *runs), speaker)
        proposal = Proposal(opens, new_runs, runs, messages, questions, rolls_back)
        self._proposals.add(proposal)
        self._writer.mark(self, urgent=True)
        await self._proposals.wait(proposal)

    def check_owned(
        self, runs: tuple[RunRecord, ...], speaker: UserExecutionContext | None = None
    ) -> None:
        """Raise IsolationError if any of these, of `speaker`, is not a run on this thread."""
        for run in runs:
            if (run.user_id, run.thread_id) == (self.user_id, self.thread_id):
                continue
            msg = "a journal takes records of its own thread only"
            acting = run.user_id if speaker is None else speaker.user_id
            error = IsolationError(
                msg,
                kind="thread_mismatch" if run.user_id == self.user_id else "user_mismatch",
                user=acting,
                owner=run.user_id if acting == self.user_id else self.user_id,
                resource=f"thread {self.thread_id}",
            )
            self._note(error, "write a run's row", speaker)
            raise error

    def injection(
        self, message: str, operation: str, speaker: UserExecutionContext
    ) -> IsolationError:
        """What to raise when `speaker` would say something here as another; it is noted."""
        return self.mix_up(message, "event_injection", operation, speaker)

    def mix_up(
        self, message: str, kind: MixUp, operation: str, speaker: UserExecutionContext
    ) -> IsolationError:
        """What to raise when `speaker` would do something with what is another's; it is noted."""
        error = IsolationError(
            message,
            kind=kind,
            user=speaker.user_id,
            owner=self.user_id,
            resource=f"thread {self.thread_id}",
        )
        self._note(error, operation, speaker)
        return error

    def _note(
        self, error: IsolationError, operation: str, speaker: UserExecutionContext | None
    ) -> None:
        """Have it audited here, where it is raised: who called may swallow it."""
        correlation_id = "" if speaker is None else speaker.correlation_id
        note_mix_up(self.audit, error, operation, correlation_id=correlation_id)

    async def committed(self, seq: int) -> None:
        """Wait until the entry `seq` is durable, for as long as the store needs.

        Raises LogConflictError if it never can be.
        """
        while self._committed < seq:
            self._check_not_overtaken()
            await self._settled.park()

    async def relieved(self, limit: int) -> None:
        """Wait until fewer than `limit` bytes are uncommitted. Raises as `committed` does."""
        self._check_not_overtaken()
        while self._uncommitted_bytes >= limit:
            self._writer.mark(self, urgent=True)
            await self._settled.park()
            self._check_not_overtaken()

    def _check_not_overtaken(self) -> None:
        if self._conflict:
            raise LogConflictError(self._conflict)

    # --- reading

    async def read(self, *, after: int) -> Sequence[Entry]:
        """The visible entries that follow `after`, at least one; waits until there is one.

        Returns at most a bounded number; ask again with the last one's `seq`. Raises
        ThreadDeletedError if the thread goes away, and LogConflictError if somebody else writes it.
        """
        while not (self._deleted or self._conflict) and self._visible <= after:
            self._awaited = True
            await self._readers.park()
        self.check_there()
        first_kept = self._last_seq - len(self._entries) + 1
        if after + 1 < first_kept:
            return await self._read_stored(after)
        start = after + 1 - first_kept
        stop = min(self._visible - first_kept + 1, start + self._limits.read_entries)
        return self._entries[start:stop]

    def check_there(self) -> None:
        """Raise ThreadDeletedError if the thread was deleted since the journal was attached.

        LogConflictError if somebody else has written it.
        """
        self._check_not_overtaken()
        if self._deleted:
            msg = f"thread {self.thread_id!r} was deleted"
            raise ThreadDeletedError(msg)

    async def _read_stored(self, after: int) -> Sequence[Entry]:
        chunks = await self._store.chunks(
            self.user_id,
            self.thread_id,
            after=after,
            limit=_CHUNKS_PER_READ,
        )
        self.check_there()
        entries: list[Entry] = []
        size = 0
        for chunk in chunks:
            numbered_lines = zip(
                range(chunk.first_seq, chunk.last_seq + 1), chunk.lines(), strict=True
            )
            for seq, line in numbered_lines:
                if seq > after and (size < self._limits.read_bytes or not entries):
                    entries.append(Entry(seq, line))
                    size += len(line)
        if not entries or entries[0].seq != after + 1:
            msg = f"the store has no entry {after + 1} of thread {self.thread_id!r}"
            raise StoreUnavailableError(msg)
        return entries

    async def history(self, last_runs: int) -> list[StoredMessage]:
        """The messages of the thread's latest runs, all of them committed.

        Read from the store once, and then kept for as long as the thread is live and its
        messages are few enough.
        """
        if self._conversation is not None:
            return self._conversation.latest(last_runs)
        while True:
            rollbacks = self._rollbacks
            self._settled_meanwhile = []
            try:
                stored = await self._store.messages(
                    self.user_id,
                    self.thread_id,
                    last_runs=last_runs,
                )
                conversation = self._new_conversation()
                conversation.add(stored)
                conversation.add(self._settled_meanwhile)
            finally:
                self._settled_meanwhile = None
            if rollbacks == self._rollbacks:  # or what was read may be of runs rolled back since
                self._keep(conversation)
                return conversation.latest(last_runs)

    def _new_conversation(self) -> Conversation:
        # Runs that wait for their turn have their messages committed already.
        most_runs = self._limits.history_runs + self._limits.runs_per_thread
        return Conversation(most_runs=most_runs)

    def _keep(self, conversation: Conversation) -> None:
        fits = conversation.size <= self._limits.conversation_bytes
        self._conversation = conversation if fits else None

    # --- what the writer asks

    def take(self) -> Commit | None:
        self._marked = False
        if self._conflict:
            return None
        proposals = self._proposals.take()
        first = self._committed + 1
        entries = self._entries[len(self._entries) - (self._last_seq - self._committed) :]
        entries = self._bounded(entries)
        if not entries and not proposals:
            return None
        last = entries[-1].seq if entries else self._committed
        changes = [change for change in self._changes if change.seq <= last]
        records: list[_Change | Proposal] = [*proposals, *changes]
        return Commit(
            user_id=self.user_id,
            thread_id=self.thread_id,
            opens=next((proposal.opens for proposal in proposals if proposal.opens), None),
            new_runs=tuple(run for proposal in proposals for run in proposal.new_runs),
            runs=tuple(run for record in records for run in record.runs),
            messages=tuple(message for record in records for message in record.messages),
            questions=tuple(asked for record in records for asked in record.questions),
            rolls_back=tuple(run for proposal in proposals for run in proposal.rolls_back),
            spent=tuple(spent for change in changes for spent in change.spent),
            chunk=Chunk(
                first_seq=first,
                last_seq=last,
                data=b"\n".join([entry.data for entry in entries]),
            )
            if entries
            else None,
        )

    def _bounded(self, entries: list[Entry]) -> list[Entry]:
        """As many of the oldest as one transaction takes; at least one, where there is one."""
        if self._uncommitted_bytes <= self._limits.commit_bytes:
            return entries
        size = 0
        for position, entry in enumerate(entries):
            size += len(entry.data)
            if size > self._limits.commit_bytes:
                return entries[: max(position, 1)]
        return entries

    def settle(self, commit: Commit) -> None:
        self._proposals.finish(None)
        if commit.rolls_back:
            self._rollbacks += 1
            self._conversation = None  # the store knows what is left of it
        silent = self._rolled_back | set(commit.rolls_back)
        said = [one for one in commit.messages if one.run_id not in silent]
        if any(run.status == "running" for run in commit.runs):
            silent = set(commit.rolls_back)  # those of before have ended, or it had not begun
        self._rolled_back = silent
        if self._conversation is not None:
            self._conversation.add(said)
            self._keep(self._conversation)
        elif self._settled_meanwhile is not None:
            self._settled_meanwhile.extend(said)
        if commit.chunk is not None:
            self._committed = commit.chunk.last_seq
            size = len(commit.chunk.data) - (commit.chunk.last_seq - commit.chunk.first_seq)
            self._uncommitted_bytes -= size
            self._kept_bytes += size
            while self._changes and self._changes[0].seq <= self._committed:
                self._changes.popleft()
            self._reveal()
            self._let_go()
        if self._proposals or self._committed < self._last_seq:
            self._marked = True
            self._writer.mark(self, urgent=bool(self._proposals or self._barriers))
        self._settled.unpark_all()

    def refuse(self, commit: Commit, error: Exception) -> bool:  # noqa: ARG002  Source's signature
        if isinstance(error, LogConflictError):
            self._conflict = str(error)
            self._proposals.give_up(error)
            self._settled.unpark_all()
            self._wake_readers()
            return False
        # Only what somebody waits for, and can be told about, is given up; events are not.
        self._proposals.finish(error)
        return bool(self._proposals) or self._committed < self._last_seq

    def _wake_readers(self) -> None:
        self._awaited = False
        self._readers.unpark_all()

    def _reveal(self) -> None:
        while self._barriers and self._barriers[0] <= self._committed:
            self._barriers.popleft()
        visible = self._barriers[0] - 1 if self._barriers else self._last_seq
        if visible > self._visible:
            self._visible = visible
            self._wake_readers()

    def _let_go(self) -> None:
        """Forget old committed entries, half of what may be kept at a time."""
        if self._kept_bytes <= self._limits.journal_bytes:
            return
        kept = len(self._entries) - (self._last_seq - self._committed)
        position = 0
        while position < kept and self._kept_bytes > self._limits.journal_bytes // 2:
            self._kept_bytes -= len(self._entries[position].data)
            position += 1
        del self._entries[:position]

    def delete(self) -> None:
        """The thread is gone: whoever reads is told so."""
        self._deleted = True
        self._wake_readers()
