"""The long form of the proof, for a release: as many interleavings as you like, on all cores.

    python -m tests.isolation.prove [-n 1000000] [--jobs 8] [--from SEED]

Prints what it found, with the seed that shows it again, and then which check catches which
planted leak.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tests.isolation.exploring import explore
from tests.isolation.report import show

_CHUNK: Final = 500
_MOST_SHOWN: Final = 10


class Part(NamedTuple):
    """What became of a chunk of seeds."""

    interleavings: int
    runs: int
    orders: frozenset[bytes]  # hashes: as many as there were different orders of steps
    bad: tuple[str, ...]


def play_part(seeds: range) -> Part:
    """Judge a chunk of seeds; called in a process of its own."""
    judged = explore(seeds)
    return Part(
        len(judged),
        sum(story.runs for story in judged),
        frozenset(story.order[:8] for story in judged),
        tuple(str(story) for story in judged if story.findings),
    )


@contextlib.contextmanager
def open_workers(jobs: int) -> Iterator[multiprocessing.pool.Pool]:
    """Processes that begin afresh, and end with the block."""
    # Not forked: they would share this one's Trio, its logging and its random numbers.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield pool


def prove(console: Console, count: int, first: int, jobs: int) -> bool:
    """Play `count` interleavings from the seed `first` on; whether all went well."""
    last = first + count
    chunks = [range(at, min(at + _CHUNK, last)) for at in range(first, last, _CHUNK)]
    bad: list[str] = []
    orders: set[bytes] = set()
    runs = 0
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        open_workers(jobs) as pool,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        bar = progress.add_task("interleavings", total=count)
        for part in pool.imap_unordered(play_part, chunks):
            progress.advance(bar, part.interleavings)
            for story in itertools.islice(part.bad, max(0, _MOST_SHOWN - len(bad))):
                console.print(story, markup=False, highlight=False)
            bad += part.bad
            orders |= part.orders
            runs += part.runs
    took = time.monotonic() - began
    console.print(
        f"{count:,} interleavings of {runs:,} runs, {len(orders):,} of them different, seeds "
        f"{first} to {last - 1}, in {took:.0f} s on {jobs} processes: {count / took:,.0f}/s; "
        f"{len(bad)} with findings",
        highlight=False,
    )
    return not bad


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=100_000, help="interleavings (100,000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--from", type=int, dest="first", help="the first seed (a random one)")
    options = parser.parse_args(arguments)
    first = options.first
    if first is None:
        first = random.SystemRandom().randrange(2**40)
    console = Console()
    went_well = prove(console, options.n, first, max(1, options.jobs))
    return not (show(console) and went_well)


if __name__ == "__main__":
    sys.exit(main())
