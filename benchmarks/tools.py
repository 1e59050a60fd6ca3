"""Tools: what a user's calls cost while another user's threads are stuck.

    .venv/bin/python benchmarks/tools.py [--calls 500] [--rounds 7] [--stuck 40]

A calm user's run calls an async and a sync tool, one after the other: with nobody else there, and
while 40 threads of another user's cancelled runs go on, which nobody can stop. Rounds of both kinds
alternate. The figure is how much longer the median call takes; the bar is 10 %.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

import trio
from rich import box
from rich.console import Console
from rich.table import Table

from cpu import pin, two_cores
from creche import (
    Infrastructure,
    Limits,
    RunContext,
    Supervisor,
    UserExecutionContext,
    open_supervisor,
    tool,
)

BAR = 1.10
KINDS = ("quick_async", "quick_sync")


class Options(argparse.Namespace):
    """The command line."""

    calls: int
    rounds: int
    stuck: int


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=500, help="of each kind in a round (500)")
    parser.add_argument("--rounds", type=int, default=7, help="of each; medians are shown (7)")
    parser.add_argument("--stuck", type=int, default=40, help="threads of the other user (40)")
    return parser.parse_args(arguments, namespace=Options())


def made(options: Options, let_go: threading.Event, begun: threading.Semaphore) -> Infrastructure:
    """The two agents, and their tools."""

    @tool
    async def quick_async() -> str:
        return "done"

    @tool
    def quick_sync() -> str:
        return "done"

    @tool(shared=(let_go, begun))
    def stuck() -> None:
        begun.release()
        let_go.wait()

    class Calm:
        tools = (quick_async, quick_sync)

        async def run(self, run: RunContext) -> dict[str, float]:
            return {kind: await _median_of(run, kind) for kind in KINDS}

    class Wild:
        tools = (stuck,)

        async def run(self, run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(run.call_tool, "stuck", {})

    limits = Limits(
        tool_threads=options.stuck,
        tool_calls=3 * options.calls,
        tool_calls_per_minute=10**6,
        stop_timeout=0.01,
    )
    return Infrastructure(agents={"calm": Calm, "wild": Wild}, limits=limits)


async def _median_of(run: RunContext, kind: str) -> float:
    """Of as many calls as the run was asked for."""
    took: list[float] = []
    for _ in range(int(str(run.messages[-1].content))):
        begun = time.perf_counter()
        await run.call_tool(kind, {})
        took.append(time.perf_counter() - begun)
    return median(took)


def context(user: str) -> UserExecutionContext:
    """One user's next run, on a thread of its own."""
    return UserExecutionContext.from_request(user_id=user, thread_id=f"{user}-{time.time_ns()}")


@asynccontextmanager
async def crowded(
    supervisor: Supervisor, stuck: int, let_go: threading.Event, begun: threading.Semaphore
) -> AsyncIterator[None]:
    """So many threads of another user's runs are stuck in this block, and the runs are over."""
    runs = [await supervisor.start(context("wild"), "wild", "go") for _ in range(stuck // 4)]
    for _ in range(stuck):
        await trio.to_thread.run_sync(begun.acquire)
    for run in runs:
        run.cancel()
    abandoned = [len((await run.ended()).receipt.threads_abandoned) for run in runs]
    assert sum(abandoned) == stuck, abandoned
    try:
        yield
    finally:
        let_go.set()
        await trio.sleep(0.2)
        let_go.clear()


async def measure(options: Options, console: Console) -> bool:
    """Take all samples and print the table; whether the bar was met."""
    let_go, begun = threading.Event(), threading.Semaphore(0)
    rounds: dict[str, list[dict[str, Any]]] = {"idle": [], "crowded": []}
    async with open_supervisor(made(options, let_go, begun)) as supervisor:

        async def sample(name: str) -> None:
            run = await supervisor.start(context("calm"), "calm", str(options.calls))
            rounds[name].append((await run.ended()).result)

        await sample("idle")
        rounds["idle"].clear()  # the first warms up
        for _ in range(options.rounds):
            await sample("idle")
            async with crowded(supervisor, options.stuck, let_go, begun):
                await sample("crowded")
    table = Table(title="median call, µs", box=box.SIMPLE)
    for heading in ("tool", "alone", f"beside {options.stuck} stuck threads", "ratio", "bar"):
        table.add_column(heading, justify="left" if heading == "tool" else "right")
    met = True
    for kind in KINDS:
        alone, beside = (median(each[kind] for each in rounds[name]) for name in rounds)
        ratio = median(
            b[kind] / a[kind] for a, b in zip(rounds["idle"], rounds["crowded"], strict=True)
        )
        met = met and ratio <= BAR
        cells = f"{alone * 1e6:.0f}", f"{beside * 1e6:.0f}", f"{ratio:.2f}", f"{BAR:.2f}"
        table.add_row(kind, *cells)
    console.print(table)
    return met


def main() -> int:
    """Measure, print, and judge."""
    pin(two_cores()[0])
    return not trio.run(measure, parse(), Console())


if __name__ == "__main__":
    sys.exit(main())
