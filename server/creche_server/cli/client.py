"""A chat client's half of the wire: commands out, replies matched, events in order."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec
import trio
from trio_websocket import (
    ConnectionClosed,
    HandshakeError,
    WebSocketConnection,
    connect_websocket,
)

from creche_server.cli.api import ClientError, no_answer
from creche_server.wire import codes
from creche_server.wire.commands import MAX_COMMAND_BYTES

_CONNECT_TIMEOUT: Final = 5.0  # seconds
_EVENTS_AHEAD: Final = 10_000  # read from the socket and not yet looked at
_MIB: Final = 1024 * 1024


class TooLongError(ClientError):
    """A command is longer than the server takes; nothing was sent."""


class RefusedCommandError(ClientError):
    """The server took no such command; the connection is as it was."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(_refusal(reply))
        self.code: str = reply["error"]


class Client:
    """One socket on one thread. Opened by `open_client`."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._replies: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._events: deque[dict[str, Any]] = deque()  # read, and not yet looked at
        self._ended: str | None = None  # why no more comes
        self._moved = trio.lowlevel.ParkingLot()  # woken by whatever changes of these three

    async def ask(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send a command and wait for its reply's result. Raises ClientError."""
        command_id = next(self._ids)
        command = msgspec.json.encode({"id": command_id, "method": method, "params": params})
        if len(command) > MAX_COMMAND_BYTES:
            size = math.ceil(10 * len(command) / _MIB) / 10
            msg = f"the question is too long ({size} MiB; at most {MAX_COMMAND_BYTES // _MIB} MiB)"
            raise TooLongError(msg)
        sending, receiving = trio.open_memory_channel[dict[str, Any]](1)
        self._replies[command_id] = sending
        self._moved.unpark_all()
        try:
            if self._ended is not None:
                raise ClientError(self._ended)
            await self._socket.send_message(command.decode())
            reply = await receiving.receive()
        except (ConnectionClosed, trio.EndOfChannel) as error:
            raise ClientError(self._ended or _goodbye(self._socket)) from error
        finally:
            del self._replies[command_id]
        if reply["type"] == "error":
            raise RefusedCommandError(reply)
        result: dict[str, Any] = reply["result"]
        return result

    async def next_event(self) -> dict[str, Any]:
        """The next AG-UI event. Raises ClientError when none will come any more."""
        while not self._events:
            if self._ended is not None:
                raise ClientError(self._ended)
            await self._moved.park()
        event = self._events.popleft()
        self._moved.unpark_all()
        return event

    async def coming(self) -> None:
        """Wait until there is an event to look at, or none will come any more."""
        while not self._events and self._ended is None:
            await self._moved.park()

    async def serve(self) -> None:
        """Sort what comes in, until the connection ends.

        Whoever does not look at events is not read for, unless somebody waits for a reply,
        which stands behind them.
        """
        while self._ended is None:
            while len(self._events) >= _EVENTS_AHEAD and not self._replies:
                await self._moved.park()
            try:
                self._take(msgspec.json.decode(await self._socket.get_message()))
            except ConnectionClosed:
                self._ended = _goodbye(self._socket)
        for waiting in self._replies.values():
            waiting.close()
        self._moved.unpark_all()

    def _take(self, message: dict[str, Any]) -> None:
        if message.get("type") not in {"success", "error"}:
            self._events.append(message)
            self._moved.unpark_all()
        elif message["id"] is None:  # of the subscription: its thread is gone
            self._ended = message["message"]
        elif (waiting := self._replies.get(message["id"])) is not None:
            waiting.send_nowait(message)


@contextlib.asynccontextmanager
async def open_client(url: str, thread_id: str, token: str) -> AsyncIterator[Client]:
    """A connection to a server's thread. Raises ClientError if there is none to be had."""
    parts = urlsplit(url)
    async with trio.open_nursery() as nursery:
        try:
            with trio.fail_after(_CONNECT_TIMEOUT):
                socket = await connect_websocket(
                    nursery,
                    parts.hostname or "127.0.0.1",
                    parts.port or 80,
                    f"/threads/{quote(thread_id, safe='')}/stream/events",
                    use_ssl=False,
                    subprotocols=[codes.SUBPROTOCOL],
                    extra_headers=[(b"Authorization", f"Bearer {token}".encode())],
                    max_message_size=64 * 1024 * 1024,
                )
        except (OSError, trio.TooSlowError, HandshakeError) as error:
            raise ClientError(no_answer(url)) from error
        client = Client(socket)
        nursery.start_soon(client.serve)
        try:
            yield client
        finally:
            with trio.move_on_after(1, shield=True):
                await socket.aclose()
            nursery.cancel_scope.cancel()


def _goodbye(socket: WebSocketConnection) -> str:
    closed = socket.closed
    reason = f" ({closed.code}: {closed.reason})" if closed is not None and closed.reason else ""
    return f"the server closed the connection{reason}"


def _refusal(reply: Mapping[str, Any]) -> str:
    """Why a command was refused, and when it would not be."""
    retry_after = reply.get("retry_after")
    later = f" (try again in {retry_after:g} s)" if retry_after else ""
    return f"{reply['message']}{later}"
