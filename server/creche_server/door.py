"""The accept loop's other side: one connection, one barrier, one set of deadlines.

The door reads a request's head itself, under a deadline, and then hands the stream, with the
head put back in front, to trio-websocket (an upgrade) or to hypercorn (everything else).
Neither meets the network bare: whatever escapes from them ends this connection only.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final

import h11
import msgspec
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework
from trio_websocket import ConnectionClosed
from wsproto.utilities import ProtocolError

from creche import leaves, split

_log: Final = logging.getLogger("creche.door")

HEAD_TIMEOUT: Final = 10.0  # seconds for a request's head to arrive
SEND_TIMEOUT: Final = 20.0  # seconds that a peer may read nothing
_SLICE_BYTES: Final = 16 * 1024  # of an answer, in that time
_MOST_HEAD_BYTES: Final = 32 * 1024
_RECEIVE_BYTES: Final = 16 * 1024

# What a peer that goes away, or never spoke our protocols, looks like: nobody's mistake here.
_GONE: Final = (
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    trio.BusyResourceError,  # hypercorn answering while it tells a peer that it erred
    ConnectionClosed,
    h11.ProtocolError,
    ProtocolError,  # wsproto's
    OSError,
)
_VERSIONS: Final = frozenset({b"1.0", b"1.1"})
_OF_THE_HOP: Final = frozenset({b"connection", b"http2-settings", b"keep-alive", b"upgrade"})

ServeChat = Callable[[trio.SocketStream, bytes, h11.Request], Awaitable[None]]


class HttpStream(trio.abc.HalfCloseableStream):
    """A socket for hypercorn, whose sends are shielded: here they carry a deadline inside."""

    def __init__(self, stream: trio.SocketStream, received: bytes) -> None:
        self._stream = stream
        self._received = received
        self._broken = False
        self.socket = stream.socket  # hypercorn asks it for the peer's address

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # In slices, so that the deadline is for no progress and not for a slow line.
        whole = memoryview(data)
        for start in range(0, len(whole), _SLICE_BYTES):
            await self._send(whole[start : start + _SLICE_BYTES])

    async def _send(self, data: memoryview) -> None:
        # Broken for good: hypercorn would try each further part of an answer for as long again.
        if not self._broken:
            with trio.move_on_after(SEND_TIMEOUT) as patience:
                await self._stream.send_all(data)
            self._broken = patience.cancelled_caught
        if self._broken:
            msg = "the peer does not read"
            raise trio.BrokenResourceError(msg)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._received:
            await trio.lowlevel.checkpoint()
            data, self._received = self._received, b""
            return data
        return await self._stream.receive_some(max_bytes)

    # hypercorn closes from within the application's task, which quart-trio cancels at that very
    # moment: unshielded, the connection would stay open. Neither of these ever waits.

    async def send_eof(self) -> None:
        with trio.CancelScope(shield=True):
            await self._stream.send_eof()

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            await self._stream.aclose()


class Door:
    """Takes connections in. Made by `serve`; handlers run in the nursery it is served with."""

    def __init__(
        self,
        app: ASGIFramework,
        serve_chat: ServeChat,
        *,
        max_connections: int,
        refused: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        config = Config()
        config.accesslog = None
        config.errorlog = None
        config.include_server_header = False
        config.h11_max_incomplete_size = _MOST_HEAD_BYTES
        self._config = config
        self._app = ASGIWrapper(app)
        self._context = WorkerContext(None)
        self._serve_chat = serve_chat
        self._max_connections = max_connections
        self._refused = refused  # told before somebody is, that there are too many
        self._open = 0

    async def leave(self) -> None:
        """Tell idle HTTP connections to go, and answers under way to be the last of theirs."""
        await self._context.terminated.set()

    async def serve_connection(self, stream: trio.SocketStream) -> None:
        """One connection, from its first byte to its last. Raises nothing but Trio's Cancelled."""
        self._open += 1
        try:
            async with stream:
                await self._serve(stream)
        # Boundary: one connection. An exception that left it would end the process.
        except BaseException as error:  # noqa: BLE001
            passing, fault = split(error)
            if fault is not None and not all(isinstance(leaf, _GONE) for leaf in leaves(fault)):
                _log.error("a connection failed", exc_info=fault)
            if passing is not None:
                raise passing from None
        finally:
            self._open -= 1

    async def _serve(self, stream: trio.SocketStream) -> None:
        if self._open > self._max_connections:
            if self._refused is not None:
                await self._refused()
            await _refuse(stream, HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
            return
        try:
            with trio.fail_after(HEAD_TIMEOUT):
                received, request, rest = await _read_head(stream)
        except trio.TooSlowError:
            await _refuse(stream, HTTPStatus.REQUEST_TIMEOUT, "the request took too long")
            return
        except h11.RemoteProtocolError as error:
            await _refuse(stream, *_what_is_wrong(error))
            return
        if request is None:
            return
        refusal = _why_not(request)
        if refusal is not None:
            await _refuse(stream, *refusal)
        elif _wants_websocket(request):
            await self._serve_chat(stream, received, request)
        else:
            http = HttpStream(stream, _head_of(request) + _body_of(request, rest))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_close_when_cancelled, stream)
                await TCPServer(self._app, self._config, self._context, {}, http)  # type: ignore[arg-type]
                nursery.cancel_scope.cancel()


async def _close_when_cancelled(stream: trio.SocketStream) -> None:
    """What hypercorn sends is shielded; a closed socket ends it all the same."""
    try:
        await trio.sleep_forever()
    finally:
        stream.socket.close()


async def _read_head(stream: trio.SocketStream) -> tuple[bytes, h11.Request | None, bytes]:
    """All bytes read, the request that they begin with, and those of them that follow its head.

    No request for a peer that closed before it said one. Raises h11.RemoteProtocolError.
    """
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD_BYTES)
    received = b""
    while True:
        data = await stream.receive_some(_RECEIVE_BYTES)
        received += data
        parser.receive_data(bytes(data))
        event = parser.next_event()
        if isinstance(event, h11.Request):
            return received, event, parser.trailing_data[0]
        if not data or event is not h11.NEED_DATA:
            return received, None, b""


def _head_of(request: h11.Request) -> bytes:
    """The request's head written anew, as the last one of its connection.

    So hypercorn never meets what it would switch to HTTP/2 or to its own WebSockets for, be it
    in this request or in a later one; ignoring an upgrade is allowed (RFC 9110 §7.8).
    """
    lines = [b"%b %b HTTP/%b" % (request.method, request.target, request.http_version)]
    lines += [
        b"%b: %b" % (name, value) for name, value in request.headers if name not in _OF_THE_HOP
    ]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])


def _body_of(request: h11.Request, rest: bytes) -> bytes:
    """What of the bytes behind the head is its body: a request that came along is not answered."""
    headers = dict(request.headers)
    if b"transfer-encoding" in headers:
        return rest
    return rest[: int(headers.get(b"content-length", b"0"))]


def _what_is_wrong(error: h11.RemoteProtocolError) -> tuple[HTTPStatus, str]:
    """The status and the words for bytes that are no request."""
    status = HTTPStatus(error.error_status_hint)
    if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        return status, f"the request's head is longer than {_MOST_HEAD_BYTES // 1024} KiB"
    return status, "this is not a request that HTTP/1.1 knows"


def _why_not(request: h11.Request) -> tuple[HTTPStatus, str] | None:
    """The status and the words for a request that neither library should meet, else None."""
    if request.http_version not in _VERSIONS or request.method == b"PRI":
        return HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.1 only, please"
    if not request.target.startswith(b"/") or request.target.startswith(b"//"):
        return HTTPStatus.BAD_REQUEST, "ask for a path: this is no proxy"
    handshake = [value for name, value in request.headers if _is_of_the_handshake(name)]
    if _wants_websocket(request) and not all(map(bytes.isascii, handshake)):
        # wsproto would raise: it takes these headers for ASCII.
        return HTTPStatus.BAD_REQUEST, "headers must be ASCII"
    return None


def _is_of_the_handshake(name: bytes) -> bool:
    return name in {b"connection", b"host", b"upgrade"} or name.startswith(b"sec-websocket-")


def _wants_websocket(request: h11.Request) -> bool:
    return any(
        name == b"upgrade" and b"websocket" in value.lower() for name, value in request.headers
    )


def error_body(status: HTTPStatus, message: str) -> bytes:
    """A refusal in the shape that all of ours have."""
    code = status.phrase.lower().replace(" ", "_").replace("-", "_")
    return msgspec.json.encode({"error": code, "message": message}) + b"\n"


async def _refuse(stream: trio.SocketStream, status: HTTPStatus, message: str) -> None:
    body = error_body(status, message)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    with trio.move_on_after(SEND_TIMEOUT):
        await stream.send_all(head.encode() + body)
