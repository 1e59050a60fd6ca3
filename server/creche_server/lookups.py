"""Asks, after the reply, whether an id that was absent is somebody else's, and audits it if so.

The asker is answered before, in the same words and time as for an id that nobody has. One task
asks for everybody, one question at a time, so a flood of them takes one of the store's readers
at most; what it has no room for is counted into the audit, unasked.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final

import trio

from creche import AuditKind, IdKind, RunId, SecurityAudit, Store, ThreadId, UserId

_log: Final = logging.getLogger("creche.audit")

MOST_WAITING: Final = 256
MOST_WAITING_PER_USER: Final = 32

_KINDS: Final[Mapping[IdKind, AuditKind]] = MappingProxyType(
    {"thread": "thread_mismatch", "run": "run_mismatch", "question": "run_mismatch"}
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Question:
    kind: IdKind
    id: str
    user_id: UserId
    operation: str
    asked_at: datetime
    correlation_id: str


class Lookups:
    """The questions that wait. `serve` runs in the background of all connections."""

    def __init__(self, store: Store, audit: SecurityAudit) -> None:
        self._store = store
        self._audit = audit
        self._waiting: deque[_Question] = deque()
        self._work = trio.Event()

    def ask(
        self,
        kind: IdKind,
        id: str,  # noqa: A002  the store's own word
        user_id: UserId,
        operation: str,
        *,
        correlation_id: str = "",
    ) -> None:
        """Have it found out, some time after this, whether that id is another's. Never waits."""
        question = _Question(kind, id, user_id, operation, datetime.now(UTC), correlation_id)
        own = sum(other.user_id == user_id for other in self._waiting)
        if len(self._waiting) >= MOST_WAITING or own >= MOST_WAITING_PER_USER:
            self._leave(question)
            return
        self._waiting.append(question)
        self._work.set()

    async def serve(self) -> None:
        """Ask until cancelled; what is left then is counted as unasked."""
        try:
            while True:
                await self._work.wait()
                self._work = trio.Event()
                while self._waiting:
                    await self._answer(self._waiting[0])
                    self._waiting.popleft()
        finally:
            for question in self._waiting:
                self._leave(question)

    async def _answer(self, question: _Question) -> None:
        try:
            foreign = await self._is_foreign(question)
        except Exception as error:  # noqa: BLE001  boundary: one question, of a store that is away
            _log.warning("whose an id is could not be asked", extra={"error": repr(error)})
            self._leave(question)
            return
        if foreign:
            self._audit.record_nowait(
                _KINDS[question.kind],
                user=question.user_id,
                resource=f"{question.kind} {question.id}",
                operation=question.operation,
                outcome="absent",
                correlation_id=question.correlation_id,
            )

    async def _is_foreign(self, question: _Question) -> bool:
        """Whether it is somebody else's, and was not the asker's own, too, when they asked."""
        user_id = question.user_id
        if not await self._store.is_anothers(question.kind, question.id, user_id):
            return False
        own_since = await self._own_since(question)
        return own_since is None or own_since > question.asked_at

    async def _own_since(self, question: _Question) -> datetime | None:
        """When the asker's own of that id was made; None if there is none."""
        user_id = question.user_id
        if question.kind == "question":
            asked = await self._store.question(user_id, question.id)
            return None if asked is None else asked.asked_at
        own = (
            await self._store.thread(user_id, ThreadId(question.id))
            if question.kind == "thread"
            else await self._store.run(user_id, RunId(question.id))
        )
        return None if own is None else own.created_at

    def _leave(self, question: _Question) -> None:
        self._audit.record_nowait(
            "limit_hit",
            user=question.user_id,
            resource=f"look-ups of {question.kind}s",
            operation=question.operation,
            outcome="not looked up",
            correlation_id=question.correlation_id,
        )
