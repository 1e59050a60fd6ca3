"""Plays and judges many stories, and says which went wrong, and how to play those again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tests.isolation.canaries import Finding
from tests.isolation.checks import findings, order_of
from tests.isolation.scheduler import run_each
from tests.isolation.story import play


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """One story, judged."""

    seed: int
    order: bytes  # a hash of who did what when
    runs: int
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        found = "\n".join(f"  {finding}" for finding in self.findings[:10])
        replay = f"pytest tests/isolation/test_interleavings.py --seed {self.seed}"
        return f"seed {self.seed}:\n{found}\n  once more: {replay}"


async def judge(seed: int) -> Judged:
    """Play the story of a seed and judge it."""
    evidence = await play(seed)
    return Judged(seed, order_of(evidence), len(evidence.runs), tuple(findings(evidence)))


def explore(
    seeds: Sequence[int],
    *,
    until: Callable[[Judged], bool] = lambda _: False,
) -> list[Judged]:
    """Judge the stories of these seeds, one after the other; stops early where `until` says so."""
    return run_each(seeds, judge, until=until)
