"""Which check catches which planted leak, after how many interleavings.

python -m tests.isolation.report
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.table import Table
from tests.isolation.canaries import Finding
from tests.isolation.exploring import explore
from tests.isolation.mutants import MUTANTS
from tests.isolation.reachability import alive, nothing_is_reachable

MOST_SEEDS: Final = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Caught:
    """What became of one mutant."""

    name: str
    what: str
    after: int  # interleavings
    findings: tuple[Finding, ...]

    @property
    def checks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(finding.check for finding in self.findings))


def hunt(name: str, seeds: int = MOST_SEEDS) -> Caught:
    """Play stories with this leak planted until a check finds it; then look what lives on."""
    planting = MUTANTS[name]
    before = alive()
    with planting():
        judged = explore(range(seeds), until=lambda story: bool(story.findings))
        # A story is over, and so is all that belonged to it.
        findings = (*judged[-1].findings, *nothing_is_reachable(before))
    return Caught(name, (planting.__doc__ or "").strip(), len(judged), findings)


def hunt_all() -> Iterator[Caught]:
    for name in MUTANTS:
        yield hunt(name)


def show(console: Console) -> bool:
    """Print the table; whether every mutant was caught."""
    table = Table(title="planted leaks", title_justify="left")
    for heading in ("leak", "what is wrong", "caught by", "after"):
        table.add_column(heading, justify="right" if heading == "after" else "left")
    caught = 0
    began = time.monotonic()
    for mutant in hunt_all():
        caught += bool(mutant.findings)
        checks = ", ".join(mutant.checks) or "[bold red]NOBODY"
        table.add_row(mutant.name, mutant.what, checks, str(mutant.after))
    console.print(table)
    console.print(f"{caught} of {len(MUTANTS)} caught, in {time.monotonic() - began:.1f} s")
    return caught == len(MUTANTS)


if __name__ == "__main__":
    sys.exit(not show(Console(width=160 if not sys.stdout.isatty() else None)))
