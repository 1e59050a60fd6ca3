"""The clients of `isolation.py`, in a process of their own: N users who ask, each for themselves.

Reads one `Plan` (JSON) on stdin and writes a `Waits` line for each round on stdout.
"""

from __future__ import annotations

import gc
import heapq
import random
import select
import sys
import time

import msgspec

from client import Client, DeliveryError, Head, mask, walk
from cpu import pin
from load import raise_file_limit

TEXT = 0x81
_ASK = (
    b'{"id":%d,"method":"run.start","params":{"assistant_id":"%s",'
    b'"input":{"messages":[{"role":"user","content":"%s"}]}}}'
)
decode = msgspec.json.Decoder(Head).decode


class Plan(msgspec.Struct, frozen=True):
    """Who asks what, how often."""

    port: int  # on 127.0.0.1
    agent: str
    words: str  # what the scripted model is told
    rounds: int
    spread_s: float  # users begin at random moments of so long a time; 0 is all in one instant
    limit_s: float  # of a round
    tokens: tuple[str, ...]  # a bearer token for each user
    core: int | None = None
    pause_s: float = 0.2  # between rounds, so that each begins with an idle server


class Waits(msgspec.Struct, frozen=True, tag=True):
    """One round: seconds from each user's command to its run's terminal event, and the fault."""

    seconds: tuple[float, ...]
    fault: str | None = None


class User(Client):
    """One user's socket, subscribed to a thread of its own; waits for ends, not for counts."""

    def ask(self, agent: str, words: str, number: int) -> None:
        """Start a run."""
        self.running = True
        self.due = sys.maxsize  # however many events it has
        self.unanswered += 1
        self.asked = time.monotonic()
        self.sock.send(mask(_ASK % (number, agent.encode(), words.encode())))

    def ended(self, now: float) -> bool:
        """Take what the socket holds; whether the run's terminal event was in it."""
        data = self.rest + self._recv()
        frames, stop = walk(data)
        self.rest = data[stop:]
        for first, start, end in frames:
            if first != TEXT:
                self._take_control(first, data[start:end])
                continue
            head = decode(memoryview(data)[start:end])
            if head.type in {"error", "RUN_ERROR"}:
                raise DeliveryError(data[start:end].decode(errors="replace"))
            if head.type == "RUN_FINISHED":
                self.waited = now - self.asked
                self.running = False
        return not self.running


def ask_all(users: list[User], plan: Plan, number: int) -> Waits:
    """All users ask, each at a moment of its own; returns when all have their answer."""
    by_fd = {user.sock.fileno(): user for user in users}
    begun = time.monotonic()
    chance = random.Random(number)
    due = [(begun + chance.uniform(0, plan.spread_s), fd) for fd in by_fd]
    heapq.heapify(due)
    running = len(users)
    with select.epoll() as poll:
        while running:
            now = time.monotonic()
            while due and due[0][0] <= now:
                _, fd = heapq.heappop(due)
                poll.register(fd, select.EPOLLIN)
                by_fd[fd].ask(plan.agent, plan.words, number)
            for fd, _ in poll.poll(max(0.0, due[0][0] - now) if due else 1.0, len(users)):
                user = by_fd[fd]
                if user.running and user.ended(time.monotonic()):
                    running -= 1
                elif not user.running:
                    poll.unregister(fd)
            if time.monotonic() > begun + plan.limit_s:
                msg = f"{running} of {len(users)} not answered after {plan.limit_s:g} s"
                raise DeliveryError(msg)
    return Waits(tuple(user.waited for user in users))


def main() -> None:
    """Carry out the plan on stdin."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    pin(plan.core)
    raise_file_limit()
    gc.disable()
    users: list[User] = []
    try:
        users.extend(User(n, plan.port, token, 0) for n, token in enumerate(plan.tokens))
        for number in range(plan.rounds):
            time.sleep(plan.pause_s)
            waits = ask_all(users, plan, number + 2)
            sys.stdout.buffer.write(msgspec.json.encode(waits) + b"\n")
            sys.stdout.buffer.flush()
    except (DeliveryError, OSError) as fault:
        sys.stdout.buffer.write(msgspec.json.encode(Waits((), str(fault))) + b"\n")


if __name__ == "__main__":
    main()
