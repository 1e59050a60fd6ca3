"""A seed decides everything: the same gives the same story to the last byte, another another."""

from __future__ import annotations

import uuid

import trio
from tests.isolation.checks import order_of, whole_log
from tests.isolation.scheduler import run_each, run_seeded
from tests.isolation.story import planned, play

from creche import new_id


async def steps() -> list[tuple[int, int]]:
    taken: list[tuple[int, int]] = []

    async def walk(name: int) -> None:
        for number in range(5):
            taken.append((name, number))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for name in range(4):
            nursery.start_soon(walk, name)
    return taken


def test_the_same_seed_takes_the_same_steps():
    assert run_seeded(7, steps) == run_seeded(7, steps)


def test_different_seeds_take_different_steps():
    orders = [tuple(run_seeded(seed, steps)) for seed in range(50)]
    assert len(set(orders)) == 50


def test_what_was_run_before_makes_no_difference():
    alone = run_seeded(9, steps)
    assert run_each([1, 2, 9], lambda _: steps())[-1] == alone


def test_time_jumps_only_when_nobody_can_act():
    async def sleeper() -> tuple[float, float]:
        before = trio.current_time()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        still = trio.current_time()
        await trio.sleep(3600)
        return still - before, trio.current_time() - before

    assert run_seeded(0, sleeper) == (0.0, 3600.0)


def test_ids_come_from_the_seed_and_are_random_again_afterwards():
    async def two() -> list[str]:
        return [new_id(), new_id()]

    fresh = uuid.uuid4
    assert run_seeded(3, two) == run_seeded(3, two)
    assert run_seeded(3, two) != run_seeded(4, two)
    assert uuid.uuid4 is fresh
    assert len({new_id() for _ in range(3)}) == 3


def test_after_a_run_trio_schedules_as_before():
    state = trio._core._run._r.getstate()
    allowed = trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING
    run_seeded(5, steps)
    assert trio._core._run._r.getstate() == state
    assert trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING is allowed


def test_a_whole_story_is_the_same_twice():
    """Frames, rows, logs, errors, what agents saw: all but the clock's own readings."""
    seeds = range(40)

    async def log(seed: int) -> str:
        return whole_log(await play(seed))

    together = run_each(seeds, log)
    assert run_each(seeds, log) == together
    alone = [run_each([seed], log)[0] for seed in seeds[-3:]]
    assert alone == together[-3:]
    assert len(set(together)) == len(together)


def test_one_plan_has_many_orders():
    """The scheduler's seed alone, with what users do held fast, makes different stories."""
    plan = max(map(planned, range(100)), key=lambda plan: sum(map(len, plan.acts.values())))
    orders = set()
    for schedule in range(100):

        async def same_acts() -> bytes:
            return order_of(await play(plan.seed, plan))

        orders.add(run_seeded(schedule, same_acts))
    assert len(orders) == 100
