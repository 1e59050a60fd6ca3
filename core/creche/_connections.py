"""Which sockets each user has open, for the older name that knew them; an entry is a block."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import trio

from creche._audit import SecurityAudit
from creche._context import ConnectionId, UserExecutionContext, UserId, new_connection_id
from creche._errors import LimitExceededError
from creche._forwarding import Send


@dataclasses.dataclass(slots=True, eq=False)
class _Socket:
    send: Send
    block: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)
    failure: Exception | None = None  # of a send; nothing more is sent then


class Connections:
    """The open sockets of a process, each user's apart."""

    def __init__(self, *, most_per_user: int, most: int) -> None:
        self._most_per_user = most_per_user
        self._most = most
        self._open: dict[UserId, dict[ConnectionId, _Socket]] = {}  # an entry *is* `held`

    @property
    def count(self) -> int:
        """How many are open."""
        return sum(map(len, self._open.values()))

    @contextlib.contextmanager
    def held(
        self, context: UserExecutionContext, send: Send, audit: SecurityAudit | None
    ) -> Iterator[UserExecutionContext]:
        """See `compat.WebSocketConnectionPool.connection`."""
        attached = context.with_connection(new_connection_id(context.user_id))
        connection_id = attached.connection_id
        assert connection_id is not None
        self._check_room(context, audit)
        socket = _Socket(send)
        self._open.setdefault(context.user_id, {})[connection_id] = socket
        try:
            with socket.block:
                yield attached
        finally:
            self._drop(context.user_id, connection_id)
        if socket.failure is not None:
            raise socket.failure

    async def send(self, user_id: UserId, data: bytes) -> int:
        """See `compat.WebSocketConnectionPool.send_to_user`."""
        sockets = {**self._open.get(user_id, {})}
        took = 0

        async def send(connection_id: ConnectionId, socket: _Socket) -> None:
            nonlocal took
            try:
                await socket.send(data)
            except Exception as error:  # noqa: BLE001  boundary: one connection
                socket.failure = error
                self._drop(user_id, connection_id)
            else:
                took += 1

        try:
            async with trio.open_nursery() as nursery:
                for connection_id, socket in sockets.items():
                    nursery.start_soon(send, connection_id, socket)
        finally:
            # Not sooner: who sends may be within the block of a socket that failed, and what is
            # under way to the others must not end with it.
            for socket in sockets.values():
                if socket.failure is not None:
                    socket.block.cancel()
        return took

    def _check_room(self, context: UserExecutionContext, audit: SecurityAudit | None) -> None:
        own = len(self._open.get(context.user_id, {}))
        for count, most, whose in (
            (own, self._most_per_user, "a user"),
            (self.count, self._most, "all users together"),
        ):
            if count < most:
                continue
            msg = f"{whose} may have {most} connections open"
            if audit is not None:
                audit.record_nowait(
                    "limit_hit",
                    user=context.user_id,
                    resource="connections",
                    operation="connect",
                    outcome=msg,
                    correlation_id=context.correlation_id,
                )
            raise LimitExceededError(msg)

    def _drop(self, user_id: UserId, connection_id: ConnectionId) -> None:
        own = self._open.get(user_id, {})
        own.pop(connection_id, None)
        if not own:
            self._open.pop(user_id, None)
