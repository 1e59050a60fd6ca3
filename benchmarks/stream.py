"""Stream: what an event costs creche, beside a bare FastAPI loop doing the same.

    .venv/bin/python benchmarks/stream.py [--clients 10,100,1000] [--rounds 5] [--max-ratio 1.5]

Each client, over a WebSocket of its own, does runs of 200 events as fast as the server can. creche
does all that it does for anybody: auth, grammar, journal, commits to a real SQLite database.
The bare server does nothing but `send_text(json.dumps(event))`, with events of the same mean size.
The figure is server CPU per delivered event: wall-clock time says more about the machine's mood.
Both servers are up all the time, on one core, and sampled in turn; the load has the other core.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from cpu import pin, two_cores
from load import Plan, Ran, Report, raise_file_limit
from servers import HERE, Server, ServerError, open_bare, open_creche

EVENTS = 200  # of a run
PAYLOAD = 180.0  # bytes of a bare event where there is no creche to compare with
BUSY_CLIENT = 0.5  # of a core; above it the load may be what is measured
NAMES = ("creche", "fastapi")


class Options(argparse.Namespace):
    """The command line."""

    clients: list[int]
    rounds: int
    cpu: float
    limit: float
    users: int
    servers: list[str]
    env: list[str]
    folder: Path | None
    max_ratio: float | None
    quick: bool
    json: Path | None


class Result(msgspec.Struct):
    """What the table is made of, and all that it was made from."""

    python: str
    versions: dict[str, str]
    rounds: int
    cores: tuple[int, int]  # servers', load's
    ratios: dict[int, float]  # by clients: creche's median over fastapi's
    samples: list[Report]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--clients", type=_ints, default=[10, 100, 1000], help="client counts, 10,100,1000")
    add("--rounds", type=int, default=5, help="samples of each server at each count (5)")
    add("--cpu", type=float, default=1.0, help="server CPU-seconds of a sample, at least (1)")
    add("--limit", type=float, default=120.0, help="seconds after which a sample has failed (120)")
    add("--users", type=int, default=20, help="users that the clients share (20)")
    add("--servers", type=_names, default=list(NAMES), help="which to run: creche,fastapi")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a setting for creche")
    add("--folder", type=Path, help="where the temporary database goes (the system's choice)")
    add("--max-ratio", type=float, help="exit with 1 if creche / fastapi is above it anywhere")
    add("--quick", action="store_true", help="one short round: does it work at all?")
    add("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments, namespace=Options())
    if options.quick:
        options.rounds, options.cpu, options.users = 1, min(options.cpu, 0.2), 2
    return options


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(NAMES):
        msg = f"choose from {', '.join(NAMES)}"
        raise argparse.ArgumentTypeError(msg)
    return names


@contextmanager
def open_servers(options: Options, core: int, load_core: int) -> Generator[list[Server]]:
    """Start what is to be compared, the bare server with creche's mean event size; end it after."""
    with TemporaryDirectory(prefix="creche-bench-", dir=options.folder) as name:
        folder = Path(name)
        if "creche" not in options.servers:
            with open_bare(folder, core, events=EVENTS, payload=PAYLOAD) as bare:
                yield [bare]
            return
        settings = dict(pair.split("=", 1) for pair in options.env)
        with open_creche(folder, core, users=options.users, settings=settings) as creche:
            warm = sample(plan_for(creche, 2, options, load_core))
            if "fastapi" not in options.servers:
                yield [creche]
                return
            with open_bare(folder, core, events=EVENTS, payload=warm.payload) as bare:
                yield [creche, bare]


def plan_for(server: Server, clients: int, options: Options, core: int) -> Plan:
    """Return the plan of one sample, its load to run on `core`."""
    return Plan(
        server=server.name,
        pid=server.pid,
        port=server.port,
        clients=clients,
        cpu_s=options.cpu,
        limit_s=options.limit,
        core=core,
        events=EVENTS,
        tokens=server.tokens,
    )


def sample(plan: Plan, progress: Progress | None = None, task: TaskID | None = None) -> Report:
    """Run the load in a process of its own, and return its report.

    Raises:
        ServerError: the server did not deliver what it should, or the load broke.

    """
    load = subprocess.Popen(
        [sys.executable, str(HERE / "load.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    report: Report | None = None
    try:
        assert load.stdin is not None
        assert load.stdout is not None
        load.stdin.write(msgspec.json.encode(plan) + b"\n")
        load.stdin.close()
        done = 0.0
        for line in load.stdout:
            said = msgspec.json.decode(line, type=Ran | Report)
            if isinstance(said, Report):
                report = said
            elif progress is not None and task is not None:
                progress.advance(task, said.part - done)
                done = said.part
    finally:
        if load.poll() is None and report is None:
            load.kill()
        load.wait()
    if report is None:
        msg = f"the load process ended with {load.returncode}"
        raise ServerError(msg)
    if report.faults:
        raise ServerError("\n".join(report.faults))
    if progress is not None and task is not None:
        progress.advance(task, 1 - done)
    return report


def compare(options: Options, console: Console) -> Result:
    """Take all samples: a round is every server at every count, and the first server alternates."""
    core, load_core = two_cores()
    pin(load_core)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeRemainingColumn())
    samples: list[Report] = []
    with open_servers(options, core, load_core) as servers:
        total = len(servers) * len(options.clients) * options.rounds
        with Progress(*columns, console=console, refresh_per_second=2, transient=True) as progress:
            task = progress.add_task("", total=total)
            for number in range(options.rounds):
                for clients in options.clients:
                    for server in servers if number % 2 == 0 else reversed(servers):
                        about = f"round {number + 1}: {server.name}, {clients:,} clients"
                        progress.update(task, description=about)
                        plan = plan_for(server, clients, options, load_core)
                        samples.append(sample(plan, progress, task))
                        if not console.is_terminal:
                            console.print(f"{about}: {samples[-1].us_per_event:.2f} µs/event")
    ratios: dict[int, float] = {}
    for clients in options.clients:
        costs = [_costs(samples, name, clients) for name in NAMES]
        if all(costs):
            ratios[clients] = median(costs[0]) / median(costs[1])
    packages = ("fastapi", "uvicorn", "uvloop", "websockets", "trio", "msgspec")
    versions = {name: version(name) for name in packages}
    return Result(
        python=platform.python_version(),
        versions=versions,
        rounds=options.rounds,
        cores=(core, load_core),
        ratios=ratios,
        samples=samples,
    )


def _costs(samples: Sequence[Report], name: str, clients: int) -> list[float]:
    return [one.us_per_event for one in samples if (one.server, one.clients) == (name, clients)]


def show(result: Result, console: Console) -> None:
    """Print the table, and whatever makes it less than sound."""
    table = Table(
        title="Stream: server CPU per delivered event", box=box.SIMPLE, padding=(0, 0, 0, 1)
    )
    table.add_column("server")
    for heading in ("clients", "µs", "min-max", "ratio", "first*", "events/s", "load**"):
        table.add_column(heading, justify="right")
    for name, clients in dict.fromkeys((one.server, one.clients) for one in _sorted(result)):
        some = [one for one in result.samples if (one.server, one.clients) == (name, clients)]
        ratio = result.ratios.get(clients)
        costs = [one.us_per_event for one in some]
        first = (
            median([one.first_p50_ms for one in some]),
            median([one.first_p99_ms for one in some]),
        )
        table.add_row(
            name,
            f"{clients:,}",
            f"{median(costs):.2f}",
            f"{min(costs):.2f}-{max(costs):.2f}",
            "" if ratio is None else f"{ratio:.2f}" if name == NAMES[0] else "1",
            f"{first[0]:.0f}/{first[1]:.0f}",
            f"{median([one.events / one.wall_s for one in some]):,.0f}",
            f"{max(one.client_share for one in some):.0%}",
        )
    console.print(table)
    least = min(one.server_cpu_s for one in result.samples)
    sizes = ", ".join(
        f"{name} {median([one.payload for one in result.samples if one.server == name]):.1f}"
        for name in dict.fromkeys(one.server for one in result.samples)
    )
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    for line in (
        "* ms from a client's command to its first event, all clients at once: p50/p99",
        "** of one core, used by the load client at most",
        f"Rounds: {result.rounds}, medians. CPU-seconds a sample: {least:.1f} or more.",
        f"Mean bytes of an event: {sizes}.",
        f"Python {result.python}, {versions}.",
        "Every client had every event of every run, and seq without a gap.",
    ):
        console.print(line, highlight=False)
    if result.cores[0] == result.cores[1]:
        console.print("[yellow]One core only: servers and load shared it.[/]")
    if any(one.client_share > BUSY_CLIENT for one in result.samples):
        console.print("[yellow]The load used more than half its core in some samples.[/]")


def _sorted(result: Result) -> list[Report]:
    return sorted(result.samples, key=lambda one: (one.clients, one.server))


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # unwinds, as Ctrl-C does, and so ends the servers


def main() -> int:
    """Compare, print, and judge."""
    options = parse()
    console = Console()
    complaints = Console(stderr=True)
    signal.signal(signal.SIGTERM, _terminated)
    raise_file_limit()
    try:
        result = compare(options, console)
    except ServerError as failure:
        complaints.print(str(failure), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        complaints.print("interrupted; the servers are stopped")
        return 128 + signal.SIGINT
    show(result, console)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    over = {n: ratio for n, ratio in result.ratios.items() if ratio > (options.max_ratio or 1e9)}
    for clients, ratio in over.items():
        complaints.print(
            f"{clients:,} clients: {ratio:.2f} x fastapi, above the bar of {options.max_ratio}",
            style="red",
        )
    return 1 if over else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
