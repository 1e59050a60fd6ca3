"""A chat client's half of the wire: commands out, replies matched, events in order."""

from __future__ import annotations

import contextlib
import itertools
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

from creche import CrecheError
from creche_server.wire import codes

_CONNECT_TIMEOUT: Final = 5.0  # seconds
_EVENTS_AHEAD: Final = 10_000  # read from the socket and not yet looked at


class ClientError(CrecheError):
    """The server cannot be reached, refused, or went away; the message says which."""


class Client:
    """One socket on one thread. Opened by `open_client`."""

    def __init__(
        self,
        socket: WebSocketConnection,
        events: trio.MemoryReceiveChannel[dict[str, Any]],
    ) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._replies: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self.events = events  # AG-UI events as they come; ends with the connection

    async def ask(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send a command and wait for its reply's result. Raises ClientError."""
        command_id = next(self._ids)
        sending, receiving = trio.open_memory_channel[dict[str, Any]](1)
        self._replies[command_id] = sending
        try:
            command = {"id": command_id, "method": method, "params": params}
            await self._socket.send_message(msgspec.json.encode(command).decode())
            reply = await receiving.receive()
        except (ConnectionClosed, trio.EndOfChannel) as error:
            msg = f"the server closed the connection{_reason(self._socket)}"
            raise ClientError(msg) from error
        finally:
            del self._replies[command_id]
        if reply["type"] == "error":
            raise ClientError(reply["message"])
        result: dict[str, Any] = reply["result"]
        return result

    async def serve(self, events: trio.MemorySendChannel[dict[str, Any]]) -> None:
        """Sort what comes in, until the connection ends."""
        async with events:
            while True:
                try:
                    message = msgspec.json.decode(await self._socket.get_message())
                except ConnectionClosed:
                    break
                if message.get("type") in {"success", "error"}:
                    waiting = self._replies.get(message["id"])
                    if waiting is not None:
                        waiting.send_nowait(message)
                else:
                    await events.send(message)
        for waiting in self._replies.values():
            waiting.close()


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
            msg = f"the server at {url} does not answer"
            raise ClientError(msg) from error
        sending, receiving = trio.open_memory_channel[dict[str, Any]](_EVENTS_AHEAD)
        client = Client(socket, receiving)
        nursery.start_soon(client.serve, sending)
        try:
            yield client
        finally:
            with trio.move_on_after(1, shield=True):
                await socket.aclose()
            nursery.cancel_scope.cancel()


def _reason(socket: WebSocketConnection) -> str:
    closed = socket.closed
    return f" ({closed.code}: {closed.reason})" if closed is not None and closed.reason else ""
