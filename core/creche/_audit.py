"""`SecurityAudit`: who tried what was not theirs, in a chain of records that shows any change.

`record` returns once the record is durable. Repeats are folded: the first of a kind is written
before its action is answered; what repeats it within the window is counted in memory and
written as one record, with count, first and last time, when the window ends or the audit is
closed. While the audit cannot be written nothing is folded: every `record` tries, and raises.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final

import trio

from creche._audit_chain import (
    NOTHING,
    AuditHead,
    AuditKind,
    AuditRecord,
    Verification,
    anchored,
    chain,
    verify,
)
from creche._audit_folding import Draft, Key, Window, key_of, shown
from creche._audit_sinks import AuditQuery, AuditSink
from creche._background import check_on_trio
from creche._errors import AuditTamperedError, AuditUnavailableError

_log: Final = logging.getLogger("creche.audit")

WINDOW: Final = 60.0  # seconds in which repeats become one record
MOST_WINDOWS: Final = 512  # open at once; past it, what is new is folded by kind alone
MOST_WINDOWS_PER_USER: Final = 32  # past it, a user's new ones are folded by kind
VARIOUS: Final = "(various)"  # stands for what was folded together although it differs
_CLOSE_TIMEOUT: Final = 2.0  # seconds that closing may wait for the sink


class SecurityAudit:
    """Records refused access. Opened by `open_audit`; shared by all, it belongs to no user."""

    def __init__(
        self,
        sink: AuditSink,
        head: AuditHead,
        *,
        key: bytes | None,
        window: float,
    ) -> None:
        self._sink = sink
        self._head = head
        self._key = key
        self._window = window
        self._windows: dict[Key, Window] = {}  # at most MOST_WINDOWS and one for each kind
        self._failing = False  # whether the last write failed
        self._work = trio.Event()
        self._one_at_a_time = trio.Lock()

    @property
    def head(self) -> AuditHead:
        """How far the chain goes. Noted elsewhere, it shows even a chain that was rolled back."""
        return self._head

    async def record(
        self,
        kind: AuditKind,
        *,
        resource: str,
        operation: str,
        user: str | None = None,
        claimed_owner: str | None = None,
        outcome: str = "refused",
        correlation_id: str = "",
    ) -> None:
        """Record something; returns once it is durable, or folded into what is.

        `user` is who was authenticated, as checked by `check_id`; all other texts may be what
        somebody claimed: they are redacted, made printable and cut to 256 characters. Raises
        AuditUnavailableError if it cannot be written: what was to be audited must then fail.
        Cancelled, it may be written all the same.
        """
        key = key_of(kind, user, claimed_owner, resource, operation)
        draft = self._added(key, outcome, correlation_id)
        if not draft.urgent:
            await trio.lowlevel.checkpoint()
            return
        await draft.done.wait()
        if draft.error is not None:
            msg = "the audit cannot be written, so this cannot be done"
            raise AuditUnavailableError(msg) from draft.error

    def record_nowait(
        self,
        kind: AuditKind,
        *,
        resource: str,
        operation: str,
        user: str | None = None,
        claimed_owner: str | None = None,
        outcome: str = "refused",
        correlation_id: str = "",
    ) -> None:
        """The same without waiting, for where nobody may wait: nothing is promised but to try."""
        key = key_of(kind, user, claimed_owner, resource, operation)
        self._added(key, outcome, correlation_id)

    async def find(self, query: AuditQuery) -> list[AuditRecord]:
        """The written records that a query means, oldest first."""
        return await self._sink.find(query)

    async def counts(self, query: AuditQuery) -> dict[AuditKind, int]:
        """How often each kind of thing happened, as far as it is written."""
        return await self._sink.counts(query)

    async def check(self) -> Verification:
        """Verify the whole chain."""
        return await self._sink.check(self._key)

    # --- folding

    def _added(self, key: Key, outcome: str, correlation_id: str) -> Draft:
        key = self._placed(key)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = Window(trio.current_time() + self._window)
            self._work.set()  # there may be an earlier end to wait for
        if window.draft is None:
            window.draft = Draft()
        window.draft.add(datetime.now(UTC), shown(outcome), shown(correlation_id))
        if not window.written or self._failing:
            window.draft.urgent = True
            self._work.set()
        return window.draft

    def _placed(self, key: Key) -> Key:
        """The key itself or, where there are too many already, a coarser one."""
        if key in self._windows:
            return key
        room = len(self._windows) < MOST_WINDOWS
        own = sum(other.user == key.user for other in self._windows)
        if room and own < MOST_WINDOWS_PER_USER:
            return key
        of_the_user = Key(key.kind, key.user, None, VARIOUS, VARIOUS)
        if room or of_the_user in self._windows:
            return of_the_user
        return Key(key.kind, None, VARIOUS, VARIOUS, VARIOUS)

    # --- writing

    async def serve(self) -> None:
        """Write what is urgent or due, until cancelled. Run by `open_audit`."""
        while True:
            self._work = trio.Event()
            if not any(window.draft and window.draft.urgent for window in self._windows.values()):
                ends = min((window.ends for window in self._windows.values()), default=math.inf)
                with trio.move_on_at(ends):
                    await self._work.wait()
            await self._write_round()

    async def flush(self) -> None:
        """Write what is pending, whether it is due or not. The caller bounds the time."""
        for window in self._windows.values():
            window.ends = -math.inf
        await self._write_round()
        unwritten = sum(window.draft.count for window in self._windows.values() if window.draft)
        if unwritten:
            _log.error("%d occurrences could not be written to the audit", unwritten)

    async def _write_round(self) -> None:
        async with self._one_at_a_time:
            if taken := self._taken():
                await self._write(taken)

    async def _write(self, taken: dict[Key, Draft]) -> None:
        try:
            if self._failing:  # what the sink holds is not known any more
                self._head = await _resumed(self._sink, self._key)
            entries = [draft.entry(key) for key, draft in taken.items()]
            records = chain(self._head, entries, time=datetime.now(UTC), key=self._key)
            head = anchored(records[-1].seq, records[-1].hash, self._key)
            await self._sink.append(records, head)
        except trio.Cancelled:
            self._put_back(taken, AuditUnavailableError("the audit is being closed"))
            raise
        except Exception as error:  # noqa: BLE001  boundary: one group of records
            if not self._failing:
                _log.exception("the audit cannot be written")
            self._failing = True
            self._put_back(taken, error)
        else:
            self._head = head
            self._failing = False
            for key, draft in taken.items():
                self._windows[key].written = True
                draft.done.set()

    def _taken(self) -> dict[Key, Draft]:
        """What is to be written now; windows in which nothing happened are closed."""
        moment = trio.current_time()
        taken: dict[Key, Draft] = {}
        for key, window in [*self._windows.items()]:
            over = window.ends <= moment
            if window.draft is not None and (over or window.draft.urgent):
                taken[key], window.draft = window.draft, None
                window.ends = moment + self._window if over else window.ends
            elif over:
                del self._windows[key]
        return taken

    def _put_back(self, taken: dict[Key, Draft], error: Exception) -> None:
        """Who waits is told; what happened stays counted, to be written when that works again."""
        for key, draft in taken.items():
            window = self._windows[key]
            window.draft = window.draft or Draft()
            window.draft.absorb(draft)
            draft.error = error
            draft.done.set()


@contextlib.asynccontextmanager
async def open_audit(
    sink: AuditSink,
    *,
    key: bytes | None = None,
    window: float = WINDOW,
) -> AsyncIterator[SecurityAudit]:
    """The audit that is kept in `sink`, and the one task that writes to it.

    `key` makes its hashes keyed ones; it must be the same each time. `window` is in seconds.
    Resource handling: what is folded when the body ends is written, within 2 s or, if the sink
    is away, said to be lost in the log. Raises AuditTamperedError if the end of what is kept is
    not as it was left, AuditUnavailableError if the sink cannot be read or written.
    """
    check_on_trio()
    try:
        head = await _resumed(sink, key)
    except OSError as error:
        msg = f"the audit cannot be opened: {error}"
        raise AuditUnavailableError(msg) from error
    audit = SecurityAudit(sink, head, key=key, window=window)
    serving = trio.CancelScope(shield=True)

    async def serve() -> None:
        # Shielded: a cancelled process still writes what it has counted.
        with serving:
            await audit.serve()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        try:
            yield audit
        finally:
            with trio.move_on_after(_CLOSE_TIMEOUT, shield=True):
                await audit.flush()
            serving.cancel()


async def _resumed(sink: AuditSink, key: bytes | None) -> AuditHead:
    """The head to go on from: what is kept must lead to it, and what follows it is anchored."""
    kept = await sink.load()
    head = kept.head or NOTHING
    tail = [*kept.tail]
    since = NOTHING
    if head.seq:
        # The record that the head names comes first; what it follows is not looked at again.
        first = tail[0] if tail else None
        since = AuditHead(seq=head.seq - 1, hash=first.previous if first is not None else "")
    flaws = verify(tail, kept.head, key=key, since=since).flaws
    if flaws:
        msg = f"the audit is not as it was left ({flaws[0].message}): see `creche audit verify`"
        raise AuditTamperedError(msg)
    last = tail[-1] if tail else None
    if last is not None and last.seq > head.seq:
        count = last.seq - head.seq
        _log.warning("%d records of the audit were written, but not anchored; they are now", count)
        head = anchored(last.seq, last.hash, key)
        await sink.append((), head)
    elif kept.head is None:
        head = anchored(head.seq, head.hash, key)
        await sink.append((), head)
    return head
