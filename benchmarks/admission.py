"""Admission: what a calm user waits while another floods the server up to every cap of theirs.

    .venv/bin/python benchmarks/admission.py [--runs 300] [--rounds 3]

One user asks one run after the other, first on an idle server, then while a second user keeps 120
sockets asking: 100 runs are that user's cap, 20 of them execute, and the rest is refused. The agent
asks a scripted model, calls a tool, asks again; the model takes 200 ms. The bar: the calm user's
p99, from the command to the run's terminal event, at most doubles.
"""

from __future__ import annotations

import argparse
import contextlib
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

from asking import Plan
from cpu import read_cpu, two_cores
from creche_server.auth import Auth
from creche_server.data_directory import load_key
from flooding import Flood, Flooded
from isolation import MODEL_S, WORDS, ask
from load import raise_file_limit
from servers import HERE, Server, ServerError, open_creche

MOST = 2.0  # times the p99 on an idle server
SOCKETS = 120  # of the flood; past 100 runs its starts are refused
AGENT = "isolated"


class Options(argparse.Namespace):
    """The command line."""

    runs: int
    rounds: int
    folder: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="of the calm user, a round (300)")
    parser.add_argument("--rounds", type=int, default=3, help="of each; medians are shown (3)")
    parser.add_argument("--folder", type=Path, help="where the temporary database goes")
    return parser.parse_args(arguments, namespace=Options())


@contextlib.contextmanager
def flooded(server: Server, token: str, core: int, results: list[Flooded]) -> Iterator[None]:
    """Inside this block the other user floods."""
    plan = Flood(
        port=server.port, agent=AGENT, words=WORDS, sockets=SOCKETS, token=token, core=core
    )
    with subprocess.Popen(
        [sys.executable, str(HERE / "flooding.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as clients:
        assert clients.stdin is not None
        assert clients.stdout is not None
        clients.stdin.write(msgspec.json.encode(plan) + b"\n")
        clients.stdin.flush()
        if clients.stdout.readline() != b"ready\n":
            msg = "the flood did not begin"
            raise ServerError(msg)
        try:
            yield
        finally:
            clients.stdin.close()
        results.append(msgspec.json.decode(clients.stdout.readline(), type=Flooded))


def calm(server: Server, token: str, core: int, runs: int) -> list[float]:
    """How long each of the calm user's runs took, s, ascending."""
    plan = Plan(
        port=server.port,
        agent=AGENT,
        words=WORDS,
        rounds=runs,
        spread_s=0.0,
        limit_s=60.0,
        tokens=(token,),
        core=core,
        pause_s=0.0,
    )
    return sorted(seconds for waits in ask(server, plan) for seconds in waits.seconds)


def at(seconds: Sequence[float], share: float) -> float:
    """A quantile of what is in ascending order."""
    return seconds[min(len(seconds) - 1, int(len(seconds) * share))]


def measure(options: Options, console: Console) -> bool:
    """Take all samples and print the table; whether the bar was met."""
    core, client_core = two_cores()
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    settings = {
        "PYTHONPATH": path,
        "CRECHE_LOG_LEVEL": "error",
        "CRECHE_TOOL_CALLS_PER_MINUTE": "1000000",
    }
    samples: dict[str, list[list[float]]] = {"idle": [], "flooded": []}
    floods: list[Flooded] = []
    busy: list[float] = []  # shares of the server's core
    with TemporaryDirectory(prefix="creche-bench-", dir=options.folder) as name:
        folder = Path(name)
        opened = open_creche(folder, core, users=0, settings=settings, agents="older_design:agents")
        with opened as server:
            auth = Auth(load_key(folder / "data"))
            ours, theirs = (auth.mint_token(user, seconds=3600) for user in ("calm", "flood"))
            for _ in range(options.rounds):
                samples["idle"].append(calm(server, ours, client_core, options.runs))
                with flooded(server, theirs, client_core, floods):
                    before = read_cpu(server.pid).total_ns
                    samples["flooded"].append(calm(server, ours, client_core, options.runs))
                    spent = (read_cpu(server.pid).total_ns - before) / 1e9
                busy.append(spent / sum(samples["flooded"][-1]))
    table = Table(title="ms from a calm user's command to the run's end", box=box.SIMPLE)
    for heading in ("server", "p50", "p99", "p50 beyond the model", "p99 beyond the model"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    p99: dict[str, float] = {}
    for kind, rounds in samples.items():
        mid, p99[kind] = (median(at(one, share) for one in rounds) for share in (0.5, 0.99))
        figures = (mid, p99[kind], mid - MODEL_S, p99[kind] - MODEL_S)
        table.add_row(kind, *(f"{figure * 1e3:,.1f}" for figure in figures))
    console.print(table)
    ratio = p99["flooded"] / p99["idle"]
    beyond = (p99["flooded"] - MODEL_S) / (p99["idle"] - MODEL_S)
    ended = sum(one.ended for one in floods) / sum(one.seconds for one in floods)
    refused = sum(one.refused for one in floods) / sum(one.seconds for one in floods)
    met = ratio <= MOST
    console.print(
        f"p99 flooded/idle: {ratio:.2f} (bar {MOST:g}: {'met' if met else 'missed'}); "
        f"beyond the model: {beyond:.1f}. The flood had {ended:.0f} runs and {refused:.0f} "
        f"refusals a second, and the server's core was busy for {median(busy):.0%}.",
        highlight=False,
    )
    if core == client_core:
        console.print("[yellow]One core only: server and clients shared it.[/]")
    return met


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
