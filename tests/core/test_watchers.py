"""A run that is to end with its watchers: the last one counts, and whoever comes in time."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing
from tests.small_world import (
    ADA,
    BOB,
    THREAD,
    TroubledStore,
    context,
    infrastructure,
    log_of,
    terminals_of,
)
from trio.testing import MockClock

from creche import Run, Supervisor, UserId, open_supervisor

GRACE = 10.0  # seconds


@contextlib.asynccontextmanager
async def watching(supervisor: Supervisor, user: UserId = ADA):
    async with supervisor.open_events(user, THREAD):
        yield


async def is_going_on(run: Run) -> bool:
    await trio.testing.wait_all_tasks_blocked()
    return run.status == "running"


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


async def test_it_ends_when_nobody_has_watched_for_its_grace(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        async with watching(supervisor):
            run = await supervisor.start(context(), "hang", "hi", disconnect_grace=GRACE)
            await trio.sleep(100)
            assert await is_going_on(run)
        outcome = await run.ended()
        assert trio.current_time() == pytest.approx(100 + GRACE)
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "disconnect")
    (terminal,) = terminals_of(await log_of(store))
    assert terminal["metadata"]["creche"]["receipt"]["reason"] == "disconnect"


async def test_without_a_grace_it_goes_on_unwatched(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        async with watching(supervisor):
            run = await supervisor.start(context(), "hang", "hi")
        await trio.sleep(500)
        assert await is_going_on(run)


async def test_the_last_of_several_watchers_counts(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        async with watching(supervisor):
            run = await supervisor.start(context(), "hang", "hi", disconnect_grace=GRACE)
            async with watching(supervisor):
                await trio.sleep(50)
            await trio.sleep(50)
            assert await is_going_on(run)
        await run.ended()
        assert trio.current_time() == pytest.approx(100 + GRACE)


async def test_who_comes_in_time_takes_the_place_of_who_left_and_the_grace_begins_anew(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        run = await supervisor.start(context(), "hang", "hi", disconnect_grace=GRACE)
        for _ in range(5):
            await trio.sleep(GRACE - 1)
            async with watching(supervisor):
                await trio.sleep(1)
        await trio.sleep(GRACE - 1)
        assert await is_going_on(run)
        await run.ended()
        assert trio.current_time() == pytest.approx(6 * GRACE)


async def test_one_that_nobody_ever_watches_has_the_grace(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        run = await supervisor.start(context(), "hang", "hi", disconnect_grace=GRACE)
        await run.ended()
        assert trio.current_time() == pytest.approx(GRACE)


async def test_anothers_thread_of_that_name_has_its_own_watchers(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        async with watching(supervisor, BOB):
            run = await supervisor.start(context(ADA), "hang", "hi", disconnect_grace=GRACE)
            outcome = await run.ended()
            assert outcome.receipt.reason == "disconnect"
            assert trio.current_time() == pytest.approx(GRACE)


async def test_one_that_waits_for_its_turn_ends_in_the_queue(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        await supervisor.start(context(), "hang", "hi")
        queued = await supervisor.start(context(), "hang", "hi", disconnect_grace=GRACE)
        outcome = await queued.concluded()
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "disconnect")
        assert trio.current_time() == pytest.approx(GRACE)


async def test_one_that_ends_by_itself_leaves_no_task_behind(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        before = len(trio.lowlevel.current_task().child_nurseries)
        run = await supervisor.start(context(), "hello", "hi", disconnect_grace=GRACE)
        assert (await run.ended()).status == "success"
        assert trio.current_time() < GRACE
        assert len(trio.lowlevel.current_task().child_nurseries) == before
        assert supervisor.count == 0
