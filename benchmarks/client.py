"""One WebSocket client of the load: counts frames by their headers, and misses nothing.

It costs under a microsecond a frame, so that a client in Python can flood a server in Python: only
frames that say something (a run's start and end, a reply) are decoded, and the last of each read.
"""

from __future__ import annotations

import socket
import struct
from uuid import uuid4

import msgspec

RECV = 65_536  # bytes
SHORT, LONG = 126, 127  # lengths that say: 16, 64 bits of length follow (RFC 6455, 5.2)
TEXT, PING, PONG = 0x81, 0x89, 0x8A  # first bytes of frames, FIN set (RFC 6455, 5.2)
TERMINAL = ("RUN_FINISHED", "RUN_ERROR")
RUN_START = (
    b'{"id":%d,"method":"run.start","params":{"assistant_id":"assistant",'
    b'"input":{"messages":[{"role":"user","content":"tokens=%d"}]}}}'
)
SUBSCRIBE = (
    b'{"id":1,"method":"subscription.subscribe",'
    b'"params":{"channels":["messages","tools","lifecycle"],"since":0}}'
)


class Head(msgspec.Struct, frozen=True):
    """The keys of a frame's JSON object that matter here."""

    type: str = ""
    seq: int = -1


class DeliveryError(Exception):
    """The server did not do what it should."""


decode = msgspec.json.Decoder(Head).decode


def mask(payload: bytes, first: int = TEXT) -> bytes:
    """Frame `payload` as a client must: masked. A key of zeros leaves the bytes as they are."""
    if len(payload) < SHORT:
        return struct.pack("!BBI", first, 0x80 | len(payload), 0) + payload
    return struct.pack("!BBHI", first, 0x80 | SHORT, len(payload), 0) + payload


def walk(data: bytes) -> tuple[list[tuple[int, int, int]], int]:
    """Return (first byte, start, end) of each whole frame in `data`, and where they stop."""
    frames: list[tuple[int, int, int]] = []
    pos, size = 0, len(data)
    while pos + 1 < size:
        length = data[pos + 1]
        start = pos + 2
        if length == SHORT:
            start = pos + 4
            if start > size:
                break
            length = data[pos + 2] << 8 | data[pos + 3]
        elif length == LONG:
            start = pos + 10
            if start > size:
                break
            length = int.from_bytes(data[pos + 2 : start], "big")
        end = start + length
        if end > size:
            break
        frames.append((data[pos], start, end))
        pos = end
    return frames, pos


class Client:
    """One connection: what it is owed, and what it has had."""

    def __init__(self, number: int, port: int, token: str | None, size: int) -> None:
        """Connect to a port of 127.0.0.1, for runs of `size` events; this blocks.

        With a token the server is creche: the client subscribes, and expects replies. Without one
        it is the bare server, which knows neither.
        """
        self.name = f"client {number}"
        self.rest = b""  # the beginning of a frame whose end has not come
        self.seq = -1  # of the last event; -1 before the first
        self.due = 0  # events still to come in this run
        self.unanswered = 0  # commands without a reply
        self.ran = 0
        self.running = False
        self.payload = 0  # bytes of all events so far
        self.events = 0
        self.asked = 0.0  # s, when the first run was asked for
        self.waited = -1.0  # s, until its first event
        self._answers = token is not None
        self._size = size
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = [
            f"GET /threads/{uuid4()}/stream/events HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        if token is not None:
            lines.append("Sec-WebSocket-Protocol: ag-ui.v1")
            lines.append(f"Authorization: Bearer {token}")
        self.sock.sendall("\r\n".join([*lines, "\r\n"]).encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._recv()
        head, _, behind = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            msg = f"{self.name}: no upgrade: {head.splitlines()[0].decode(errors='replace')}"
            raise DeliveryError(msg)
        if token is not None:
            self.unanswered = 1
            self.sock.sendall(mask(SUBSCRIBE))
            self.take(behind)
            while self.unanswered:
                self.take(self._recv())
        self.sock.settimeout(0)

    def _recv(self) -> bytes:
        data = self.sock.recv(RECV)
        if not data:
            msg = f"{self.name}: the server hung up"
            raise DeliveryError(msg)
        return data

    def begin(self, now: float) -> None:
        """Ask for a run."""
        self.ran += 1
        self.running = True
        self.due = self._size
        self.unanswered += self._answers
        if self.ran == 1:
            self.asked = now
        self.sock.send(mask(RUN_START % (self.ran + 1, self._size - 4)))

    def read(self, now: float) -> None:
        """Take what the socket holds."""
        before = self.events
        self.take(self._recv())
        if self.waited < 0 and self.events > before:
            self.waited = now - self.asked

    def take(self, data: bytes) -> None:
        """Count the frames in `data`, and check that nothing is missing, doubled or amiss.

        Where no frame says more than "another delta", only the last is decoded: its `seq` must
        have advanced by as many as there are frames.
        """
        if self.rest:
            data = self.rest + data
        frames, stop = walk(data)
        self.rest = data[stop:]
        if not frames:
            return
        special = b'"RUN_' in data or b'"success"' in data or b'"error"' in data
        first, start, end = frames[-1]
        if special or any(frame[0] != TEXT for frame in frames):
            for first, start, end in frames:
                if first == TEXT:
                    self._take_one(data[start:end])
                else:
                    self._take_control(first, data[start:end])
            return
        seq = decode(memoryview(data)[start:end]).seq
        if self.seq >= 0 and seq != self.seq + len(frames):
            msg = f"{self.name}: seq {seq} follows {self.seq} after {len(frames)} events"
            raise DeliveryError(msg)
        self.seq = seq
        self.payload += sum([end - start for _, start, end in frames])
        self._count(len(frames))

    def _take_one(self, payload: bytes) -> None:
        head = decode(payload)
        if head.type == "success":
            self.unanswered -= 1
            return
        if head.type in ("error", "RUN_ERROR"):
            msg = f"{self.name}: {payload.decode(errors='replace')}"
            raise DeliveryError(msg)
        if head.seq != self.seq + 1 and self.seq >= 0:
            msg = f"{self.name}: seq {head.seq} follows {self.seq}"
            raise DeliveryError(msg)
        self.seq = head.seq
        self.payload += len(payload)
        self._count(1)
        if head.type in TERMINAL:
            self.running = False
            if self.due:
                msg = f"{self.name}: a run ended {self.due} events early"
                raise DeliveryError(msg)

    def _take_control(self, first: int, payload: bytes) -> None:
        if first == PING:
            self.sock.send(mask(payload, PONG))
        elif first != PONG:
            msg = f"{self.name}: frame {first:#x} {payload!r}"
            raise DeliveryError(msg)

    def _count(self, events: int) -> None:
        self.events += events
        self.due -= events
        if self.due < 0:
            msg = f"{self.name}: more events than a run has"
            raise DeliveryError(msg)
