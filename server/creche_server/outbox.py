"""The one writer of a socket, and the one task that writes for all the busy ones.

An event frame costs no task, lock or timer of its own. On a connection that was quiet it is
written at once; on a busy one it is queued, and the process-wide flusher joins what each
connection has and sends it in one go every 2 ms. Control frames (pong, close) go through the
same queue, so that frames never mix; a send that was begun is always finished.
"""

from __future__ import annotations

import os
import time
from typing import Final

import trio

FLUSH_INTERVAL: Final = 0.002  # seconds
HIGH_WATER: Final = 256 * 1024  # unsent bytes from which on a sender waits


class Flusher:
    """Writes what busy connections have gathered. One task, for the life of the process."""

    def __init__(self) -> None:
        self._dirty: list[Outbox] = []
        self._work = trio.Event()

    def mark(self, outbox: Outbox) -> None:
        """Write this one's frames at the next tick."""
        self._dirty.append(outbox)
        self._work.set()

    async def serve(self) -> None:
        """Flush what is marked, until cancelled."""
        while True:
            await self._work.wait()
            await trio.sleep(FLUSH_INTERVAL)
            self._work = trio.Event()
            dirty, self._dirty = self._dirty, []
            for outbox in dirty:
                outbox.flush()


class Outbox(trio.abc.Stream):
    """A socket's stream in which everything outgoing shares one queue.

    Resource handling: owns the stream that it is given; `aclose` closes it. `serve` must run
    beside it, in the same nursery.

    Error handling: raises trio.BrokenResourceError once the peer is gone or too slow, and
    trio.ClosedResourceError after `aclose`.
    """

    def __init__(
        self,
        stream: trio.SocketStream,
        received: bytes,
        flusher: Flusher,
        *,
        stall_timeout: float,
    ) -> None:
        self._stream = stream
        self._received = received  # read before this was made, to be given out first
        self._flusher = flusher
        self._stall_timeout = stall_timeout
        self._queue: list[bytes] = []
        self._sent = 0  # bytes of the queue's head that are written already
        self._queued_bytes = 0
        self._marked = False
        self._stall = trio.Event()  # set: the peer does not take all that we have
        self._written_at = 0.0
        self._broken = False
        self._closed = False
        self._waiting = trio.lowlevel.ParkingLot()
        self.too_slow = False  # whether it broke because the peer would not read

    @property
    def socket(self) -> trio.socket.SocketType:
        return self._stream.socket

    def post(self, data: bytes) -> None:
        """Queue whole frames, written now if the connection was quiet. Never waits."""
        self._check()
        self._queue.append(data)
        self._queued_bytes += len(data)
        if self._marked or self._stall.is_set():
            return
        if time.monotonic() - self._written_at >= FLUSH_INTERVAL:
            self.flush()
        else:
            self._marked = True
            self._flusher.mark(self)

    def flush(self) -> None:
        """Write as much of the queue as the socket takes. Never waits, never raises."""
        self._marked = False
        while self._queue and not (self._broken or self._closed):
            if not self._write_head():
                break
        if self._waiting and self._queued_bytes < HIGH_WATER:
            self._waiting.unpark_all()

    def _write_head(self) -> bool:
        """Write what is at the head of the queue; whether the socket took all of it."""
        if len(self._queue) > 1 and not self._sent:
            self._queue[:] = [b"".join(self._queue)]
        head = self._queue[0]
        # The rest of what was begun is written from where it lies: copied, it would be copied
        # again at each of the socket's small bites.
        rest = memoryview(head)[self._sent :] if self._sent else head
        try:
            # Asked for each time: once the socket is closed it is -1, while a number that was
            # remembered may by now be another user's connection.
            taken = os.write(self._stream.socket.fileno(), rest)
        except BlockingIOError:
            taken = 0
        except OSError:
            self._break()
            return False
        self._written_at = time.monotonic()
        self._queued_bytes -= taken
        if taken < len(rest):
            self._sent += taken
            self._stall.set()
            return False
        del self._queue[0]
        self._sent = 0
        return True

    async def relieved(self) -> None:
        """Wait until little enough is unsent for more to be queued."""
        while self._queued_bytes >= HIGH_WATER:
            self._check()
            await self._waiting.park()
        self._check()

    async def flushed(self) -> None:
        """Wait until all is handed to the operating system."""
        if not self._stall.is_set():
            self.flush()
        while self._queue:
            self._check()
            await self._waiting.park()
        self._check()

    async def serve(self) -> None:
        """Finish what the socket did not take at once; break off if it takes nothing for long."""
        while True:
            await self._stall.wait()
            while self._queue and not self._broken:
                with trio.move_on_after(self._stall_timeout) as waiting:
                    await self._writable()
                if waiting.cancelled_caught:
                    self.too_slow = True
                    self._break()
                else:
                    self.flush()
            self._stall = trio.Event()
            self._waiting.unpark_all()
            if self._broken:
                return

    async def _writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._stream.socket)
        except (OSError, ValueError, trio.ClosedResourceError):  # closed meanwhile
            self._break()

    # --- trio.abc.Stream, for trio-websocket's own frames

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.post(bytes(data))
        await self.flushed()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def wait_send_all_might_not_block(self) -> None:
        await self.relieved()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._received:
            await trio.lowlevel.checkpoint()
            size = max_bytes or len(self._received)
            data, self._received = self._received[:size], self._received[size:]
            return data
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        self._closed = True
        self._waiting.unpark_all()
        await self._stream.aclose()

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self._broken:
            msg = "the peer is gone"
            raise trio.BrokenResourceError(msg)

    def _break(self) -> None:
        self._broken = True
        self._queue.clear()
        self._sent = 0
        self._queued_bytes = 0
        self._stall.set()
        self._waiting.unpark_all()
