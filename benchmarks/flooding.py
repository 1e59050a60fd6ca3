"""The flood of `admission.py`, in a process of its own: one user who wants more than is allowed.

Reads one `Flood` (JSON) on stdin, says `ready` on stdout once it is at its cap, and goes on until
stdin is closed; then it says what it had, as `Flooded`. It is an honest client: told to come back
in so many seconds, it does.
"""

from __future__ import annotations

import gc
import select
import sys
import time

import msgspec

from asking import TEXT, User
from client import walk
from cpu import pin
from load import raise_file_limit

_READY_AFTER = 2.0  # s
decode = msgspec.json.Decoder(dict).decode


class Flood(msgspec.Struct, frozen=True):
    """What the flooding user does."""

    port: int  # on 127.0.0.1
    agent: str
    words: str  # what the scripted model is told
    sockets: int  # each on a thread of its own, and never without a run
    token: str
    core: int | None = None


class Flooded(msgspec.Struct, frozen=True):
    """What came of it."""

    ended: int  # runs
    refused: int  # starts
    seconds: float


class Flooder(User):
    """One socket of the flood."""

    retry_at: float | None = None  # monotonic, once it was refused

    def had(self, now: float) -> tuple[int, int]:
        """Take what the socket holds: how many runs ended, and how many were refused."""
        data = self.rest + self._recv()
        frames, stop = walk(data)
        self.rest = data[stop:]
        ended = refused = 0
        for first, start, end in frames:
            if first != TEXT:
                self._take_control(first, data[start:end])
            elif b'"RUN_FINISHED"' in data[start:end]:
                ended += 1
                self.running = False
            elif data.startswith(b'{"type":"error"', start):
                refused += 1
                self.running = False
                self.retry_at = now + decode(data[start:end])["retry_after"]
        return ended, refused


def flood(plan: Flood) -> Flooded:
    """Keep every socket busy until stdin is closed."""
    users = [Flooder(number, plan.port, plan.token, 0) for number in range(plan.sockets)]
    by_fd = {user.sock.fileno(): user for user in users}
    begun, number, ended, refused, ready = time.monotonic(), 2, 0, 0, False
    with select.epoll() as poll:
        poll.register(sys.stdin.fileno(), select.EPOLLIN)
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        while True:
            now = time.monotonic()
            for user in users:
                if not user.running and (user.retry_at is None or user.retry_at <= now):
                    user.retry_at = None
                    number += 1
                    user.ask(plan.agent, plan.words, number)
            if not ready and now > begun + _READY_AFTER:
                ready = True
                sys.stdout.write("ready\n")
                sys.stdout.flush()
            for fd, _ in poll.poll(0.05):
                if fd not in by_fd:
                    return Flooded(ended, refused, time.monotonic() - begun)
                more, less = by_fd[fd].had(now)
                ended += more
                refused += less


def main() -> None:
    """Carry out the plan on stdin."""
    plan = msgspec.json.decode(sys.stdin.buffer.raw.readline(), type=Flood)
    pin(plan.core)
    raise_file_limit()
    gc.disable()
    sys.stdout.write(msgspec.json.encode(flood(plan)).decode() + "\n")


if __name__ == "__main__":
    main()
