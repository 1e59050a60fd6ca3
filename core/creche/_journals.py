"""The live journals of a process: each opened by the first block that wants it.

A journal is live while a run or a reader is inside `attached`; whoever holds the same thread
holds the same journal, so that a reader of an idle thread is woken by its next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Final

import trio

from creche._audit import SecurityAudit
from creche._background import open_background
from creche._context import ThreadId, UserId
from creche._journal import Journal
from creche._limits import Limits
from creche._store import Store
from creche._writer import Writer

_FLUSH_TIMEOUT: Final = 2.0  # seconds that closing may wait for the store


@dataclasses.dataclass(slots=True)
class _Slot:
    """A live journal and how many blocks hold it; `opening` serialises its first look-up."""

    holders: int = 0
    journal: Journal | None = None
    opening: trio.Lock = dataclasses.field(default_factory=trio.Lock)


class Journals:
    """The live journals of a process. An entry exists while somebody is inside `attached`."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        limits: Limits,
        audit: SecurityAudit | None = None,
    ) -> None:
        self.store = store
        self._audit = audit
        self._writer = writer
        self._limits = limits
        self._slots: dict[tuple[UserId, ThreadId], _Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @contextlib.asynccontextmanager
    async def attached(self, user_id: UserId, thread_id: ThreadId) -> AsyncIterator[Journal]:
        """The journal of that user's thread, made live by the first block that wants it.

        A thread that is not in the store is empty; nothing is written by looking.
        """
        key = (user_id, thread_id)
        slot = self._slots.setdefault(key, _Slot())
        slot.holders += 1
        try:
            async with slot.opening:
                if slot.journal is None or slot.journal.is_overtaken:
                    slot.journal = await self._opened(user_id, thread_id)
                journal = slot.journal
            yield journal
        finally:
            slot.holders -= 1
            if slot.holders == 0:
                del self._slots[key]

    async def _opened(self, user_id: UserId, thread_id: ThreadId) -> Journal:
        record = await self.store.thread(user_id, thread_id)
        return Journal(
            user_id,
            thread_id,
            record=record,
            store=self.store,
            writer=self._writer,
            limits=self._limits,
            audit=self._audit,
        )

    async def delete(self, user_id: UserId, thread_id: ThreadId) -> bool:
        """Remove a thread from the store; its readers get ThreadDeletedError. False if absent.

        The caller sees to it that no run is active on it.
        """
        key = (user_id, thread_id)
        slot = self._slots.setdefault(key, _Slot())
        slot.holders += 1
        try:
            # Whoever comes meanwhile waits here, and then finds the thread absent.
            async with slot.opening:
                deleted = await self.store.delete_thread(user_id, thread_id)
                if slot.journal is not None:
                    slot.journal.delete()
                    slot.journal = None
        finally:
            slot.holders -= 1
            if slot.holders == 0:
                del self._slots[key]
        return deleted


@contextlib.asynccontextmanager
async def open_journals(
    store: Store,
    limits: Limits | None = None,
    *,
    audit: SecurityAudit | None = None,
) -> AsyncIterator[Journals]:
    """The live journals over `store`, and the one task that commits what they are given.

    `audit` is told of whoever would speak or write on another's, be the error swallowed or not.

    Resource handling: the writer outlives the body, whatever ends it; what is uncommitted when
    the body ends is committed within 2 s or, if the store is away, left.
    """
    limits = limits or Limits()
    writer = Writer(store, limits)
    serving = trio.CancelScope(shield=True)

    async def serve() -> None:
        # Shielded: a cancelled process still commits the terminal events of its runs.
        with serving:
            await writer.serve()

    async with open_background() as nursery:
        nursery.start_soon(serve)
        try:
            yield Journals(store, writer, limits, audit)
        finally:
            with trio.move_on_after(_FLUSH_TIMEOUT, shield=True):
                await writer.flush()
            serving.cancel()
