"""Makes what runs under Trio a pure function of a seed: task order, ids and time.

Trio takes its runnable tasks in batches. With `_ALLOW_DETERMINISTIC_SCHEDULING` (what it sets
under Hypothesis) it sorts each batch by age and shuffles it by its own `Random`, `_r`; seeded,
every order of steps is some seed's, and a seed has one order. What else could differ is taken
away: ids come from the seed, time stands still while anybody can act, and there are no threads
and no sockets in here.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import trio

T = TypeVar("T")

_scheduler: Final[Any] = trio._core._run

_COLLECT_EVERY: Final = 200  # interleavings, each of which leaves some 100 kB
_PATIENCE: Final = 86_400.0  # seconds of fake time; there is always a deadline to jump to


class StillClock(trio.abc.Clock):
    """Fake time: it stands while any task can run, and then jumps to the next deadline.

    As `MockClock(autojump_threshold=0)`, but without the pass of the loop and the question about
    idleness that each jump costs there, and it can be put back to 0.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def start_clock(self) -> None:
        """Nothing to start."""

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        # Trio asks this only when no task can run.
        if deadline == math.inf:
            return math.inf  # before the first task, and after the last
        self.now = max(self.now, deadline)
        return 0.0


@contextlib.contextmanager
def _determined() -> Iterator[None]:
    """Trio's scheduling is a matter of `_r` alone in this block; after it, all is as it was."""
    allowed, state, fresh = (
        _scheduler._ALLOW_DETERMINISTIC_SCHEDULING,
        _scheduler._r.getstate(),
        uuid.uuid4,
    )
    _scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    try:
        yield
    finally:
        _scheduler._ALLOW_DETERMINISTIC_SCHEDULING = allowed
        _scheduler._r.setstate(state)
        uuid.uuid4 = fresh


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Collect garbage when we say so only: a third of the time goes into that otherwise."""
    enabled = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _seed(seed: int, clock: StillClock) -> None:
    ids = random.Random(f"ids of {seed}")
    _scheduler._r.seed(seed)
    uuid.uuid4 = lambda: uuid.UUID(int=ids.getrandbits(128), version=4)
    clock.now = 0.0


def run_seeded(seed: int, function: Callable[[], Awaitable[T]]) -> T:
    """`trio.run`, but what happens depends on the seed alone."""
    (only,) = run_each([seed], lambda _: function())
    return only


def run_each(
    seeds: Sequence[int],
    function: Callable[[int], Awaitable[T]],
    *,
    until: Callable[[T], bool] = lambda _: False,
) -> list[T]:
    """`function(seed)` for one seed after the other, each as if it were alone, in one Trio run.

    To start Trio costs as much as a small interleaving. A seed is set while this is the only
    task there is, so what came before it makes no difference. Stops early where `until` says so.
    """
    clock = StillClock()
    results: list[T] = []

    async def one_after_the_other() -> None:
        for number, seed in enumerate(seeds):
            if number % _COLLECT_EVERY == 0:
                gc.collect()
            _seed(seed, clock)
            with trio.fail_after(_PATIENCE):
                results.append(await function(seed))
            if until(results[-1]):
                return

    with _determined(), _seldom_collected():
        trio.run(one_after_the_other, clock=clock)
    return results
