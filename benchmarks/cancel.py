"""Cancel: how long after `run.cancel` a run has ended, alone and beside runs that flood.

    .venv/bin/python benchmarks/cancel.py [--cancels 100] [--rounds 3] [--floods 20] [--random 1000]

A user starts a run whose model never answers, cancels it, and waits for its terminal event, which
comes once nothing of the run is left and its end is committed. The figure is the time between the
two at the client: first while nobody else is there, then while 20 runs of another user say as
much as they can on the same core, and again while all that these say is read by clients. Server
and clients have a core each. Then 1,000 runs are cancelled at random moments of their lives; none
may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import socket
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from client import PING, TEXT, Client, DeliveryError, mask, walk
from cpu import pin, read_cpu, two_cores
from creche_server.auth import Auth
from creche_server.data_directory import load_key
from load import raise_file_limit
from servers import HERE, Server, ServerError, open_creche

BAR_S = 0.020  # p99 beside floods
LIMIT_S = 30.0  # of one cancel
TOOL = 'tool=calculator:{"expression":"6*7"} tokens=20 delay_ms=1'
MANY = 20  # random cancels at once


class Said(msgspec.Struct, frozen=True, rename="camel"):
    """What matters of a frame."""

    type: str = ""
    id: int | None = None
    result: dict[str, object] = {}


decode = msgspec.json.Decoder(Said).decode


class Options(argparse.Namespace):
    """The command line."""

    cancels: int
    rounds: int
    floods: int
    random: int
    folder: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cancels", type=int, default=100, help="in a round (100)")
    parser.add_argument("--rounds", type=int, default=3, help="of each; medians are shown (3)")
    parser.add_argument("--floods", type=int, default=20, help="runs that flood (20)")
    parser.add_argument("--random", type=int, default=1000, help="cancels at random moments")
    parser.add_argument("--folder", type=Path, help="where the temporary database goes")
    return parser.parse_args(arguments, namespace=Options())


class Chat(Client):
    """One user's socket, whose frames are decoded one by one."""

    def __init__(self, number: int, port: int, token: str) -> None:
        """Connect, and subscribe to a thread of its own."""
        self.subscription = ""  # its id
        self.last_id = 1  # of a command
        self.unread: deque[Said] = deque()
        super().__init__(number, port, token, 0)

    def _take_one(self, payload: bytes) -> None:
        if b'"subscription_id"' in payload:
            self.subscription = str(decode(payload).result["subscription_id"])
        super()._take_one(payload)

    def said(self) -> Iterator[Said]:
        """What has come; nothing if the socket has nothing."""
        with contextlib.suppress(BlockingIOError):
            data = self.rest + self._recv()
            frames, stop = walk(data)
            self.rest = data[stop:]
            for first, start, end in frames:
                if first == TEXT:
                    said = decode(memoryview(data)[start:end])
                    if said.type == "error":
                        raise DeliveryError(data[start:end].decode(errors="replace"))
                    yield said
                elif first == PING:
                    self._take_control(first, data[start:end])

    def command(self, method: str, **params: object) -> int:
        """Send it; returns its id."""
        self.last_id += 1
        body = {"id": self.last_id, "method": method, "params": params}
        self.sock.send(mask(msgspec.json.encode(body)))
        return self.last_id

    def start(self, agent: str, words: str) -> int:
        """Ask for a run; returns the command's id."""
        message = {"role": "user", "content": words}
        return self.command("run.start", assistant_id=agent, input={"messages": [message]})


class Crowd:
    """Whoever else is there: sockets whose frames are thrown away as they come."""

    def __init__(self) -> None:
        """With nobody."""
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}

    def add(self, sock: socket.socket) -> None:
        """Read from that one, too."""
        self._sockets[sock.fileno()] = sock
        self._poll.register(sock, select.EPOLLIN)

    def wait(self, chat: Chat, seconds: float) -> bool:
        """Read what comes to the crowd for so long, or until something comes for `chat`."""
        until = time.monotonic() + seconds
        self._poll.register(chat.sock, select.EPOLLIN)
        try:
            while (left := until - time.monotonic()) > 0:
                for fd, _ in self._poll.poll(left):
                    if fd == chat.sock.fileno():
                        return True
                    with contextlib.suppress(BlockingIOError):
                        self._sockets[fd].recv(1 << 18)
            return False
        finally:
            self._poll.unregister(chat.sock)


def until(chat: Chat, crowd: Crowd, *kinds: str, reply_to: int | None = None) -> Said:
    """Wait for the next frame of one of these kinds, or for a reply."""
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        chat.unread.extend(chat.said())
        while chat.unread:
            said = chat.unread.popleft()
            if said.type in kinds or (said.type == "success" and said.id == reply_to):
                return said
        crowd.wait(chat, ends - time.monotonic())
    msg = f"no {' or '.join(kinds)} after {LIMIT_S:g} s"
    raise DeliveryError(msg)


def cancel_once(chat: Chat, crowd: Crowd, chance: random.Random, pid: int) -> tuple[float, float]:
    """Seconds from a cancel to its run's terminal event, and CPU seconds of the server's."""
    started = until(chat, crowd, reply_to=chat.start("assistant", "hang"))
    until(chat, crowd, "RUN_STARTED")
    ready = time.monotonic() + chance.uniform(0.002, 0.05)
    while (left := ready - time.monotonic()) > 0:
        crowd.wait(chat, left)
    before, begun = read_cpu(pid).total_ns, time.monotonic()
    chat.command("run.cancel", run_id=started.result["run_id"])
    until(chat, crowd, "RUN_FINISHED", "RUN_ERROR")
    return time.monotonic() - begun, (read_cpu(pid).total_ns - before) / 1e9


def quantile(waits: Sequence[tuple[float, float]], share: float, *, cpu: bool = False) -> float:
    """Of a round's waits, s; `cpu` is what the server has worked meanwhile, for all."""
    seconds = sorted(each[cpu] for each in waits)
    return seconds[min(len(seconds) - 1, int(len(seconds) * share))]


def flood(port: int, token: str, crowd: Crowd, count: int, *, watched: bool) -> list[Chat]:
    """Start so many runs that flood; the sockets must be kept, and end with the server."""
    chats = [Chat(number, port, token) for number in range(count)]
    for chat in chats:
        if not watched:
            number = chat.command("subscription.unsubscribe", subscription_id=chat.subscription)
            until(chat, crowd, reply_to=number)
        until(chat, crowd, reply_to=chat.start("flood", "go"))
    for chat in chats:
        crowd.add(chat.sock)
    return chats


@contextlib.contextmanager
def served(options: Options, users: int) -> Iterator[tuple[Path, Server, list[str]]]:
    """Its database, a server, and a token for each user."""
    core, client_core = two_cores()
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "CRECHE_LOG_LEVEL": "error"}
    with TemporaryDirectory(prefix="creche-bench-", dir=options.folder) as name:
        folder = Path(name)
        opened = open_creche(folder, core, users=0, settings=settings, agents="floods:agents")
        with opened as server:
            mine = os.sched_getaffinity(0)
            pin(client_core)
            try:
                auth = Auth(load_key(folder / "data"))
                tokens = [auth.mint_token(f"user-{n}", seconds=3600) for n in range(users)]
                yield folder / "data" / "creche.db", server, tokens
            finally:
                os.sched_setaffinity(0, mine)


def sample(options: Options, floods: int, *, watched: bool) -> list[tuple[float, float]]:
    """The waits of one round, on a fresh server."""
    chance, crowd = random.Random(1), Crowd()
    with served(options, 2) as (_, server, (calm, wild)):
        flooding = flood(server.port, wild, crowd, floods, watched=watched)
        chat = Chat(-1, server.port, calm)
        waits = [cancel_once(chat, crowd, chance, server.pid) for _ in range(options.cancels)]
        for each in (*flooding, chat):
            each.sock.close()
    return waits


def left_over(options: Options) -> tuple[int, int]:
    """Runs cancelled at random moments, and how many of them have no end."""
    chance, crowd = random.Random(2), Crowd()
    with served(options, 1) as (database, server, (token,)):
        chats = [Chat(number, server.port, token) for number in range(MANY)]
        for number in range(options.random):
            chat = chats[number % MANY]
            words = chance.choice(["hang", "tokens=50 delay_ms=1", TOOL])
            started = until(chat, crowd, reply_to=chat.start("assistant", words))
            time.sleep(chance.uniform(0, 0.02))
            chat.command("run.cancel", run_id=started.result["run_id"])
        ends = time.monotonic() + LIMIT_S
        left = options.random
        while left and time.monotonic() < ends:
            time.sleep(0.2)
            with contextlib.closing(sqlite3.connect(database)) as read:
                query = "SELECT count(*), sum(ended_at IS NULL) FROM runs"
                count, left = read.execute(query).fetchone()
        for chat in chats:
            chat.sock.close()
    return count, left


def measure(options: Options, console: Console) -> bool:
    """Take all samples and print the table; whether the bar was met."""
    table = Table(title="from a cancel to the terminal event, ms", box=box.SIMPLE)
    for heading in ("beside", "p50", "p99", "worst", "bar", "p99 in CPU", "p99 of each round", ""):
        table.add_column(heading, justify="left" if heading in {"beside", ""} else "right")
    all_met = True
    legs = (
        ("nobody", 0, False),
        (f"{options.floods} floods", options.floods, False),
        (f"{options.floods} floods that are read", options.floods, True),
    )
    for name, floods, watched in legs:
        rounds = [sample(options, floods, watched=watched) for _ in range(options.rounds)]
        p50, p99, worst = (median(quantile(one, q) for one in rounds) for q in (0.5, 0.99, 1))
        met = not floods or p99 <= BAR_S
        all_met = all_met and met
        cpu = median(quantile(one, 0.99, cpu=True) for one in rounds)
        each = " ".join(f"{quantile(one, 0.99) * 1e3:.1f}" for one in rounds)
        bar = f"{BAR_S * 1e3:.0f}" if floods else "-"
        verdict = "" if not floods else "met" if met else "[red]missed"
        cells = (f"{each * 1e3:.1f}" for each in (p50, p99, worst))
        table.add_row(name, *cells, bar, f"{cpu * 1e3:.1f}", each, verdict)
        if not console.is_terminal:
            console.print(f"{name}: {p50 * 1e3:.1f}/{p99 * 1e3:.1f} ms", highlight=False)
    console.print(table)
    count, left = left_over(options)
    console.print(f"{count} runs cancelled at random moments: {left} left", highlight=False)
    if len(set(two_cores())) == 1:
        console.print("[yellow]One core only: server and clients shared it.[/]")
    return all_met and not left


def main() -> int:
    """Measure, print, and judge."""
    options = parse()
    raise_file_limit()
    try:
        return not measure(options, Console())
    except (ServerError, DeliveryError) as failure:
        Console(stderr=True).print(str(failure), style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
