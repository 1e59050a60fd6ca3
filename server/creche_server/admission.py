"""Who may connect a WebSocket, to which thread, and how many at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

import h11

from creche import (
    AuditKind,
    AuditUnavailableError,
    InvalidContextError,
    SecurityAudit,
    ThreadId,
    UserId,
)
from creche_server.addresses import check_thread_id, why_not
from creche_server.auth import NotAuthenticatedError
from creche_server.services import Services
from creche_server.wire import codes


class RefusedError(Exception):
    """The connection is not let in; `code` is the close code that says why.

    `kind` is what the audit calls it, None for what is no more than a mistake.
    """

    def __init__(
        self,
        code: int,
        message: str,
        kind: AuditKind | None = None,
        *,
        user: UserId | None = None,
        resource: str = "WebSocket",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.kind: Final = kind
        self.user = user
        self.resource = resource


async def audited(refusal: RefusedError, audit: SecurityAudit, correlation_id: str) -> RefusedError:
    """Record a refusal; what is to be told then: it or, if it cannot be recorded, that."""
    if refusal.kind is not None:
        try:
            await audit.record(
                refusal.kind,
                user=refusal.user,
                resource=refusal.resource,
                operation="connect",
                outcome=f"closed with {refusal.code}",
                correlation_id=correlation_id,
            )
        except AuditUnavailableError as error:
            return RefusedError(codes.OUR_FAULT, str(error))
    return refusal


class Sockets:
    """Counts each user's open sockets, for the cap on them; an entry *is* a block."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[UserId, int] = {}

    @contextlib.contextmanager
    def held(self, user_id: UserId) -> Iterator[None]:
        """One more socket of that user. Raises RefusedError past the cap."""
        if self._open.get(user_id, 0) >= self._most:
            message = f"a user may have {self._most} connections open (max_connections_per_user)"
            raise RefusedError(codes.TOO_MANY, message, "limit_hit", user=user_id)
        self._open[user_id] = self._open.get(user_id, 0) + 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]


def admit(request: h11.Request, services: Services) -> tuple[UserId, ThreadId]:
    """Who connects, to which of their threads. Raises RefusedError."""
    headers = {name: value.decode("latin-1") for name, value in request.headers}
    target = urlsplit(request.target.decode("ascii", "replace"))
    if not services.auth.allows_origin(headers.get(b"origin"), headers.get(b"host")):
        message = "pages from this origin may not connect"
        raise RefusedError(codes.FORBIDDEN, message, "unauthorised_access")
    try:
        if b"authorization" in headers:
            user_id = services.auth.check_authorization(headers[b"authorization"])
        elif tickets := parse_qs(target.query).get("ticket"):
            user_id = services.auth.use_ticket(tickets[0], "websocket")
        else:
            raise RefusedError(codes.UNAUTHORIZED, "a bearer token or a ticket is needed")
    except NotAuthenticatedError as error:
        raise RefusedError(codes.UNAUTHORIZED, str(error), "token_refused") from None
    if refusal := why_not(target.path.encode()):
        raise RefusedError(codes.BAD_REQUEST, refusal, "invalid_context", user=user_id)
    match target.path.split("/"):
        case ["", "threads", thread_id, "stream"] | ["", "threads", thread_id, "stream", "events"]:
            try:
                return user_id, check_thread_id(unquote(thread_id))
            except InvalidContextError as error:
                raise RefusedError(
                    codes.BAD_REQUEST,
                    str(error),
                    "invalid_context",
                    user=user_id,
                    resource=f"thread {unquote(thread_id)}",
                ) from None
        case _:
            raise RefusedError(codes.BAD_REQUEST, "connect to /threads/{thread_id}/stream/events")
