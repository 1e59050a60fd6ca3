"""What somebody asks for by its id, found among what is theirs; the rest is absent, and audited."""

from __future__ import annotations

import functools

from werkzeug.exceptions import NotFound

from creche import (
    IdKind,
    InvalidContextError,
    RunId,
    ThreadId,
    ThreadRecord,
    UserId,
    check_id,
)
from creche_server.addresses import check_thread_id
from creche_server.http.afterwards import after_reply, correlation_id
from creche_server.http.identity import operation
from creche_server.recall import UnknownRunError
from creche_server.services import Services


class Finder:
    """Looks ids up for whoever asks. It keeps nothing."""

    def __init__(self, services: Services) -> None:
        self._store = services.store
        self._audit = services.audit
        self._lookups = services.lookups

    async def thread(self, user_id: UserId, thread_id: str) -> ThreadRecord:
        """That user's. Raises InvalidContextError, NotFound."""
        checked = await self.thread_id(user_id, thread_id)
        thread = await self._store.thread(user_id, checked)
        if thread is None:
            raise self.no_such_thread(user_id, checked)
        return thread

    async def thread_id(self, user_id: UserId, thread_id: str) -> ThreadId:
        """What can be one. Raises InvalidContextError."""
        try:
            return check_thread_id(thread_id)
        except InvalidContextError:
            await self.note_invalid(user_id, f"thread {thread_id}")
            raise

    async def run_id(self, user_id: UserId, run_id: str) -> RunId:
        """What can be one. Raises InvalidContextError."""
        try:
            return RunId(check_id("run_id", run_id))
        except InvalidContextError:
            await self.note_invalid(user_id, f"run {run_id}")
            raise

    async def note_invalid(self, user_id: UserId, resource: str) -> None:
        """Audit an id that can be none."""
        await self._audit.record(
            "invalid_context",
            user=user_id,
            resource=resource,
            operation=operation(),
            correlation_id=correlation_id(),
        )

    def look_up(self, kind: IdKind, id: str, user_id: UserId) -> None:  # noqa: A002
        """Have it found out after the reply whether that id, which is absent, is another's."""
        ask = functools.partial(self._lookups.ask, correlation_id=correlation_id())
        after_reply(functools.partial(ask, kind, id, user_id, operation()))

    def no_such_thread(self, user_id: UserId, thread_id: ThreadId) -> NotFound:
        """The same words for what is absent and for what is another's."""
        self.look_up("thread", thread_id, user_id)
        return NotFound("there is no such thread")

    def no_such_run(self, user_id: UserId, run_id: RunId) -> UnknownRunError:
        """The same words for what is absent and for what is another's."""
        self.look_up("run", run_id, user_id)
        return UnknownRunError("there is no such run")
