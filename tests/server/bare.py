"""WebSocket and HTTP by hand, for clients that no library would be: rude, broken or deaf."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Sequence
from typing import Final

import trio

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA

PATIENCE: Final = 10.0  # seconds for the server to say something
_SHORT: Final = 126
_LONG: Final = 0x10000


def upgrade_request(
    path: str,
    token: str | None = None,
    *,
    headers: Sequence[bytes] = (),
    subprotocol: bytes = b"ag-ui.v1",
) -> bytes:
    """A WebSocket handshake's request; `headers` are whole lines, added at the end."""
    lines = [
        f"GET {path} HTTP/1.1".encode(),
        b"Host: 127.0.0.1",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: " + base64.b64encode(os.urandom(16)),
        b"Sec-WebSocket-Protocol: " + subprotocol,
    ]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}".encode())
    return b"\r\n".join([*lines, *headers, b"", b""])


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    reserved: int = 0,
    masked: bool = True,
) -> bytes:
    """A client's frame, right or wrong."""
    head = bytes([(0x80 if fin else 0) | reserved << 4 | opcode])
    mask_bit = 0x80 if masked else 0
    if len(payload) < _SHORT:
        head += bytes([mask_bit | len(payload)])
    elif len(payload) < _LONG:
        head += bytes([mask_bit | 126]) + len(payload).to_bytes(2, "big")
    else:
        head += bytes([mask_bit | 127]) + len(payload).to_bytes(8, "big")
    # A mask of zeros is a mask: the payload stays as it is.
    return head + (b"\0\0\0\0" if masked else b"") + payload


async def deaf_connection(port: int) -> trio.SocketStream:
    """A connection whose kernel takes in little, so that not reading is soon felt."""
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", port))
    return trio.SocketStream(sock)


async def read_head(
    stream: trio.abc.ReceiveStream,
    received: bytes = b"",
) -> tuple[bytes, bytes]:
    """A response's head, and what came behind it. The head is short if the peer closed."""
    data = received
    while b"\r\n\r\n" not in data:
        more = await _some(stream)
        if not more:
            return data, b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


async def read_answer(
    stream: trio.abc.ReceiveStream,
    received: bytes = b"",
) -> tuple[bytes, bytes, bytes]:
    """A response's head and its body, by Content-Length, and what came behind it."""
    head, rest = await read_head(stream, received)
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    while len(rest) < length:
        more = await _some(stream)
        if not more:
            break
        rest += more
    return head, rest[:length], rest[length:]


async def read_all(stream: trio.abc.ReceiveStream, *, patience: float = PATIENCE) -> bytes:
    """Everything, to the end of the connection, however that comes."""
    data = bytearray()
    try:
        while more := await _some(stream, patience):
            data += more
    except trio.BrokenResourceError:
        pass  # a reset is an end, too
    return bytes(data)


async def next_frame(
    stream: trio.abc.ReceiveStream,
    received: bytearray,
    *,
    patience: float = PATIENCE,
) -> tuple[int, bytes] | None:
    """(opcode, payload) of the server's next frame, None once the connection has ended.

    `received` is what was read and not yet looked at; it is kept up to date.
    """
    while (parsed := _parse(received)) is None:
        try:
            more = await _some(stream, patience)
        except trio.BrokenResourceError:
            return None
        if not more:
            assert not received, f"the connection ended in a frame: {bytes(received[:80])!r}"
            return None
        received += more
    opcode, payload, size = parsed
    del received[:size]
    return opcode, payload


async def frames_to_the_end(
    stream: trio.abc.ReceiveStream,
    received: bytes = b"",
) -> list[tuple[int, bytes]]:
    """(opcode, payload) of each frame that the server sends, until the connection ends."""
    data, frames = bytearray(received), list[tuple[int, bytes]]()
    while (found := await next_frame(stream, data)) is not None:
        frames.append(found)
    return frames


async def _some(
    stream: trio.abc.ReceiveStream,
    patience: float = PATIENCE,
) -> bytes | bytearray:
    with trio.fail_after(patience):
        return await stream.receive_some()


def _parse(data: bytearray) -> tuple[int, bytes, int] | None:
    if len(data) < 2:
        return None
    assert not data[0] & 0x70, "a reserved bit is set"
    assert data[0] & 0x80, "the server never fragments"
    assert not data[1] & 0x80, "a server's frame is not masked"
    length, start = data[1] & 0x7F, 2
    if length == 126:
        length, start = int.from_bytes(data[2:4], "big"), 4
    elif length == 127:
        length, start = int.from_bytes(data[2:10], "big"), 10
    if len(data) < start + length:
        return None
    return data[0] & 0x0F, bytes(data[start : start + length]), start + length


async def shake_hands(stream: trio.SocketStream, path: str, token: str) -> bytes:
    """Log in by hand; returns what came behind the response."""
    await stream.send_all(upgrade_request(path, token))
    head, rest = await read_head(stream)
    assert head.startswith(b"HTTP/1.1 101 "), head
    return rest
