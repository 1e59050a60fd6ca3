"""Isolation: what a user waits because others are there, on creche and on the older design.

    .venv/bin/python benchmarks/isolation.py [--users 10,100,1000] [--rounds 5]

N users, each on a WebSocket and a thread of its own, ask: first at random moments of one second,
and then all in the same instant, which is the worst that N users can do. The agent asks a scripted
model, calls a tool, asks again; the model takes 200 ms. The figure is the time from a user's
command to the run's terminal event, beyond those 200 ms. The older design is the same server and
the same agent behind one semaphore for everybody. The bars are for users who are spread. Waits say
something about a machine that has nothing else to do; CPU per run does so on any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from asking import Plan, Waits
from cpu import read_cpu, two_cores
from creche_server.auth import Auth
from creche_server.data_directory import load_key
from load import raise_file_limit
from servers import HERE, Server, ServerError, open_creche

MODEL_S = 0.2
WORDS = r"tool=calculator:{\"expression\":\"6*7\"} tokens=4 delay_ms=50"
# {users: (p50, p99)} beyond the model's own time, s; None where there is no bar
BARS: dict[int, tuple[float | None, float | None]] = {
    10: (0.050, 0.100),
    100: (0.050, 0.100),
    1000: (None, 1.0),
}
NO_BAR = (None, None)
SAMPLES = (("isolated", 1.0), ("isolated", 0.0), ("one-at-a-time", 1.0))
MOST_SERIAL = 60.0  # s that a round of the older design may take before it is left out


class Options(argparse.Namespace):
    """The command line."""

    users: list[int]
    rounds: int
    folder: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    counts = parser.add_argument("--users", default="10,100,1000", help="how many at once")
    counts.type = lambda text: [int(part) for part in text.split(",")]
    parser.add_argument("--rounds", type=int, default=5, help="of each; medians are shown (5)")
    parser.add_argument("--folder", type=Path, help="where the temporary database goes")
    return parser.parse_args(arguments, namespace=Options())


def ask(server: Server, plan: Plan) -> Iterator[Waits]:
    """Let the clients of a plan ask, in a process of their own."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "asking.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as clients:
        assert clients.stdin is not None
        assert clients.stdout is not None
        clients.stdin.write(msgspec.json.encode(plan) + b"\n")
        clients.stdin.close()
        for line in clients.stdout:
            waits = msgspec.json.decode(line, type=Waits)
            if waits.fault is not None:
                msg = f"{server.name}: {waits.fault}"
                raise ServerError(msg)
            yield waits


def beyond(waits: Waits, share: float) -> float:
    """The quantile of what users waited beyond the model's own time, s."""
    seconds = sorted(waits.seconds)
    return seconds[min(len(seconds) - 1, int(len(seconds) * share))] - MODEL_S


def measure(options: Options, console: Console) -> bool:
    """Take all samples and print the table; whether every bar was met."""
    core, client_core = two_cores()
    table = Table(title="ms beyond the model's own 200", box=box.SIMPLE)
    for heading in ("design", "users", "p50", "p99", "bar", "CPU/run", "rounds", ""):
        table.add_column(heading, justify="left" if heading in {"design", ""} else "right")
    all_met = True
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "CRECHE_LOG_LEVEL": "warning"}
    with TemporaryDirectory(prefix="creche-bench-", dir=options.folder) as name:
        folder = Path(name)
        opened = open_creche(folder, core, users=0, settings=settings, agents="older_design:agents")
        with opened as server:
            auth = Auth(load_key(folder / "data"))
            for users in options.users:
                tokens = tuple(
                    auth.mint_token(f"user-{number}", seconds=3600) for number in range(users)
                )
                for agent, spread in SAMPLES:
                    serial = agent == "one-at-a-time"
                    if serial and users * MODEL_S > MOST_SERIAL:
                        about = f"not run: the last waits {users * MODEL_S:,.0f} s"
                        table.add_row(agent, f"{users:,}", "", "", "", "", "", about)
                        continue
                    plan = Plan(
                        port=server.port,
                        agent=agent,
                        words=WORDS,
                        rounds=1 if serial else options.rounds,
                        spread_s=spread,
                        limit_s=MOST_SERIAL * 2,
                        tokens=tokens,
                        core=client_core,
                    )
                    before = read_cpu(server.pid).total_ns
                    rounds = list(ask(server, plan))
                    spent = (read_cpu(server.pid).total_ns - before) / len(rounds) / users
                    p50, p99 = (median(beyond(one, q) for one in rounds) for q in (0.5, 0.99))
                    bar = BARS.get(users, NO_BAR) if spread and not serial else NO_BAR
                    met = all(b is None or got <= b for got, b in zip((p50, p99), bar, strict=True))
                    all_met = all_met and met
                    when = f"over {spread:g} s" if spread else "in one instant"
                    table.add_row(
                        f"{agent}, {when}",
                        f"{users:,}",
                        f"{p50 * 1e3:,.0f}",
                        f"{p99 * 1e3:,.0f}",
                        "/".join("-" if b is None else f"{b * 1e3:,.0f}" for b in bar),
                        f"{spent / 1e6:.2f}",
                        str(len(rounds)),
                        "" if bar is NO_BAR else "met" if met else "[red]missed",
                    )
                    if not console.is_terminal:
                        said = f"{agent} {when}, {users} users: {p50 * 1e3:.0f}/{p99 * 1e3:.0f} ms"
                        console.print(said, highlight=False)
    console.print(table)
    if core == client_core:
        console.print("[yellow]One core only: server and clients shared it.[/]")
    return all_met


def main() -> int:
    """Measure, print, and judge."""
    options = parse()
    raise_file_limit()
    try:
        return not measure(options, Console())
    except ServerError as failure:
        Console(stderr=True).print(str(failure), style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
