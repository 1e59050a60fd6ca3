"""Canary users in thousands of orders of steps: nobody ever meets another's secret."""

from __future__ import annotations

import random

import pytest
from tests.isolation.exploring import Judged, explore

CHUNK = 1_000
FIXED = 5 * CHUNK  # the same at every run of the tests
FRESH = 5 * CHUNK  # from another place at every run: a failure prints the seed


def bad(judged: list[Judged]) -> str:
    """What went wrong in the first few that did."""
    return "\n".join(str(story) for story in judged if story.findings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first_seed" in metafunc.fixturenames:
        fixed = range(0, FIXED, CHUNK)
        base = random.SystemRandom().randrange(FIXED, 2**40)
        fresh = range(base, base + FRESH, CHUNK)
        names = [f"fixed-{seed}" for seed in fixed] + [f"fresh-{n}" for n in range(len(fresh))]
        metafunc.parametrize("first_seed", [*fixed, *fresh], ids=names)


def test_no_interleaving_lets_a_secret_out(first_seed: int, request: pytest.FixtureRequest):
    if request.config.getoption("seed") is not None:
        pytest.skip("only one seed was asked for")
    judged = explore(
        range(first_seed, first_seed + CHUNK),
        until=lambda story: bool(story.findings),
    )
    assert not bad(judged), bad(judged)
    assert sum(story.runs for story in judged) > 2 * CHUNK
    # Different seeds really are different orders of steps.
    assert len({story.order for story in judged}) > 0.99 * CHUNK


def test_the_interleaving_of_one_seed(request: pytest.FixtureRequest):
    seed = request.config.getoption("seed")
    judged = explore([0 if seed is None else seed])
    assert not bad(judged), bad(judged)
