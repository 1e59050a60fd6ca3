"""The load: many WebSocket clients in one process, made so that it is never the bottleneck.

It reads one `Plan` (JSON) on stdin and writes `Ran` lines and one `Report` on stdout. A reader that
sleeps in epoll costs the server 3-4 µs a send and makes results bimodal; so this one asks epoll
without waiting, takes what is there, and naps for half a millisecond.
"""

from __future__ import annotations

import gc
import resource
import select
import sys
import time

import msgspec

from client import Client, DeliveryError
from cpu import CpuReading, pin, read_cpu

NAP = 0.0005  # s
SETTLED = 0.05  # share of a core below which a server counts as idle


class Plan(msgspec.Struct, frozen=True):
    """One sample: which server, how many clients, for how long."""

    server: str
    pid: int  # of the server
    port: int  # on 127.0.0.1
    clients: int
    cpu_s: float  # go on until the server has used this much CPU; each client does one run at least
    limit_s: float  # but give up after this
    core: int | None = None  # where this process is to run
    events: int = 200  # of a run
    runs: int = 10  # of a thread at most, so that its history is as long in every sample
    tokens: tuple[str, ...] = ()  # bearer tokens, used in turn; none, then no auth and no subscribe


class Ran(msgspec.Struct, frozen=True, tag=True):
    """Progress: the part of the sample that is behind us, 0 to 1."""

    part: float


class Report(msgspec.Struct, frozen=True, tag=True):
    """What a sample found."""

    server: str
    clients: int
    events: int
    runs: int
    payload: float  # mean bytes of an event
    server_cpu_s: float
    server_live_s: float  # the same by schedstat of the threads alive at the end
    wall_s: float  # first command to last event
    client_share: float  # of one core, used by this process
    first_p50_ms: float  # a client's command to its first event, all clients at once
    first_p99_ms: float
    faults: tuple[str, ...] = ()

    @property
    def us_per_event(self) -> float:
        """Server CPU per delivered event, µs."""
        return self.server_cpu_s * 1e6 / max(self.events, 1)


def settle(pid: int) -> None:
    """Wait, for 3 s at most, until the server `pid` is idle."""
    for _ in range(60):
        before = read_cpu(pid).total_ns
        time.sleep(0.05)
        if read_cpu(pid).total_ns - before < SETTLED * 0.05e9:
            return


class Tally:
    """What the legs of a sample add up to."""

    def __init__(self, plan: Plan) -> None:
        """Start at nothing."""
        self.plan = plan
        self.events = self.runs = self.payload = 0
        self.server = CpuReading(0, 0)
        self.wall = self.mine = 0.0  # s; `mine` is CPU of this process
        self.waits: list[float] = []  # s, of each client in each leg, to its first event

    @property
    def part(self) -> float:
        """How much of the allotted CPU the server has used; 1 or more at the end."""
        return self.server.total_ns / (self.plan.cpu_s * 1e9)

    def report(self, faults: tuple[str, ...]) -> Report:
        """Sum up."""
        waits = sorted(self.waits) or [0.0]
        return Report(
            server=self.plan.server,
            clients=self.plan.clients,
            events=self.events,
            runs=self.runs,
            payload=self.payload / max(self.events, 1),
            server_cpu_s=self.server.total_ns / 1e9,
            server_live_s=self.server.live_ns / 1e9,
            wall_s=self.wall,
            client_share=self.mine / self.wall if self.wall else 0.0,
            first_p50_ms=waits[len(waits) // 2] * 1e3,
            first_p99_ms=waits[len(waits) * 99 // 100] * 1e3,
            faults=faults,
        )


def leg(tally: Tally) -> None:
    """Connect all clients, to fresh threads, and let each do `Plan.runs` runs.

    Only what the server uses from the first command on counts, what it does after the last event
    included. A client that has finished a run begins no other once the CPU allotted is used up.
    """
    plan = tally.plan
    clients: list[Client] = []
    try:
        for number in range(plan.clients):
            token = plan.tokens[number % len(plan.tokens)] if plan.tokens else None
            clients.append(Client(number, plan.port, token, plan.events))
        settle(plan.pid)
        before, wall, mine = read_cpu(plan.pid), time.monotonic(), time.process_time()
        flood(tally, clients)
        tally.wall += time.monotonic() - wall
        tally.mine += time.process_time() - mine
        settle(plan.pid)
        tally.server += read_cpu(plan.pid) - before
    finally:
        for client in clients:
            client.sock.close()
    tally.events += sum(client.events for client in clients)
    tally.runs += sum(client.ran for client in clients)
    tally.payload += sum(client.payload for client in clients)
    tally.waits += [client.waited for client in clients]


def flood(tally: Tally, clients: list[Client]) -> None:
    """Run the clients of one leg until none is running."""
    plan, done = tally.plan, tally.part
    by_fd = {client.sock.fileno(): client for client in clients}
    clock = time.monotonic
    begun = read_cpu(plan.pid).total_ns
    give_up = clock() + plan.limit_s
    with select.epoll() as poll:
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        for client in clients:
            client.begin(clock())
        running = len(clients)
        more = True
        look = 0.0  # when to look at the server's CPU again
        while running:
            now = clock()
            if now >= look:
                look = now + 0.05
                part = done + (read_cpu(plan.pid).total_ns - begun) / (plan.cpu_s * 1e9)
                more = part < 1
                say(Ran(min(part, 1.0)))
                if now > give_up:
                    msg = f"{running} of {len(clients)} runs not done after {plan.limit_s:.0f} s"
                    raise DeliveryError(msg)
            for fd, _ in poll.poll(0, len(clients)):
                client = by_fd[fd]
                client.read(clock())
                if not client.running:
                    if more and client.ran < plan.runs:
                        client.begin(now)
                    else:
                        running -= 1
                        poll.unregister(fd)
            time.sleep(NAP)


def measure(plan: Plan) -> Report:
    """Do as many legs as it takes for the server to use the CPU that the plan allots it."""
    tally = Tally(plan)
    try:
        while tally.part < 1:
            leg(tally)
    except (DeliveryError, OSError) as fault:
        return tally.report((f"{plan.server}: {fault}",))
    return tally.report(())


def say(line: Ran | Report) -> None:
    """Write one line of JSON."""
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def raise_file_limit() -> None:
    """Allow this process, and what it starts, as many open files as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Carry out the plan on stdin."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    pin(plan.core)
    raise_file_limit()
    gc.disable()
    say(measure(plan))


if __name__ == "__main__":
    main()
