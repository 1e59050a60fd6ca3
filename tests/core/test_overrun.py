"""Cleanup that takes longer than it may: the end is told in time, and says what is still alive."""

from __future__ import annotations

import logging

import pytest
import trio
from tests.agui_rules import StockClient, check_history
from tests.small_world import (
    ADA,
    THREAD,
    TroubledStore,
    context,
    infrastructure,
    log_of,
    terminals_of,
)
from trio.testing import MockClock

from creche import (
    EmitterClosedError,
    ExecutionEngine,
    Limits,
    RunContext,
    RunOutcome,
    open_supervisor,
    tool,
)

ALLOWED = 5.0  # seconds, `Limits.cleanup_timeout`
UNWINDING = 0.1  # that tasks get on top


async def shielded(seconds: float) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(seconds)


async def slow_to_end(run: RunContext) -> None:
    await run.emit.text("half a sen")
    try:
        await trio.sleep_forever()
    finally:
        await shielded(60)


async def check_valid(store: TroubledStore) -> None:
    log = await log_of(store)
    client = StockClient()
    client.take_all(log)
    assert client.is_tidy
    check_history([item.message for item in await store.messages(ADA, THREAD)])
    assert len(terminals_of(log)) == 1


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


async def test_a_cancelled_run_that_overruns_is_told_with_the_tasks_that_are_alive(
    autojump_clock: MockClock,
    store: TroubledStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_supervisor(infrastructure(store=store, slow=slow_to_end)) as supervisor:
        run = await supervisor.start(context(), "slow", "hi")
        await trio.sleep(1)
        run.cancel()
        outcome = await run.concluded()
        assert trio.current_time() == pytest.approx(1 + ALLOWED + UNWINDING)
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "user")
        assert outcome.receipt.overran
        (alive,) = outcome.receipt.alive
        assert alive.startswith(f"{__name__}.shielded:")
        assert outcome.receipt.elapsed_ms == pytest.approx(1000 * (ALLOWED + UNWINDING))
        record = await store.run(ADA, run.run_id)
        assert record is not None
        assert record.receipt == outcome.receipt.to_dict()
        assert record.receipt["alive"] == [alive]
        await check_valid(store)
        assert any("still alive" in each.message for each in caplog.records)
        assert await run.ended() == outcome
        assert trio.current_time() == pytest.approx(61), "nothing of it is left no sooner"
        await check_valid(store)


async def test_its_thread_stays_busy_until_its_tasks_have_ended(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store, slow=slow_to_end)) as supervisor:
        slow = await supervisor.start(context(), "slow", "hi")
        following = await supervisor.start(context(), "hello", "hi")
        elsewhere = await supervisor.start(context(thread="another"), "hello", "hi")
        await trio.sleep(1)
        slow.cancel()
        await slow.concluded()
        await elsewhere.ended()
        assert supervisor.runs(ADA, THREAD) == (slow, following)
        assert following.status == "queued"
        await following.ended()
        assert trio.current_time() == pytest.approx(61)


async def test_what_is_left_of_it_can_say_nothing_more(
    autojump_clock: MockClock,
    store: TroubledStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused: list[BaseException] = []

    async def late(run: RunContext) -> None:
        try:
            await trio.sleep_forever()
        finally:
            await shielded(60)
            with pytest.raises(EmitterClosedError) as raised:
                await run.emit.text("too late")
            refused.append(raised.value)
            raise ValueError("a late fault")

    async with open_supervisor(infrastructure(store=store, late=late)) as supervisor:
        run = await supervisor.start(context(), "late", "hi")
        await trio.sleep(1)
        run.cancel()
        told = await run.concluded()
        assert await run.ended() == told
    assert len(refused) == 1
    assert any("what was left of a run" in each.message for each in caplog.records)
    await check_valid(store)


async def test_a_deadline_is_told_in_time_too(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    limits = Limits(run_timeout=10, cleanup_timeout=2)
    made = infrastructure(store=store, limits=limits, slow=slow_to_end)
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "slow", "hi")
        outcome = await run.concluded()
        assert trio.current_time() == pytest.approx(10 + 2 + UNWINDING)
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "deadline")
        assert outcome.receipt.overran


@pytest.mark.parametrize("fails", [False, True])
async def test_so_is_the_end_of_an_agent_that_leaves_a_task_behind(
    autojump_clock: MockClock,
    store: TroubledStore,
    fails: bool,
) -> None:
    """It returned, or failed, while what it had started goes on cleaning up."""

    async def lingers() -> None:
        try:
            await trio.sleep_forever()
        finally:
            await shielded(60)

    async def leaves(run: RunContext) -> str:
        assert run._life.nursery is not None
        run._life.nursery.start_soon(lingers)
        await trio.sleep(1)
        if fails:
            raise ValueError("boom")
        return "done"

    async with open_supervisor(infrastructure(store=store, leaves=leaves)) as supervisor:
        run = await supervisor.start(context(), "leaves", "hi")
        outcome = await run.concluded()
        assert trio.current_time() == pytest.approx(1 + ALLOWED + UNWINDING)
        assert outcome.receipt.overran
        assert outcome.receipt.tasks_ended == 1, "the agent's own had ended by itself"
        if fails:
            assert outcome.status == "failed"
        else:
            assert (outcome.status, outcome.result) == ("success", "done")


async def test_a_tool_that_will_not_end_has_its_result_all_the_same(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    @tool
    async def stubborn() -> str:
        """Ignore everything."""
        await shielded(60)
        return "late"

    async def calls(run: RunContext) -> None:
        await run.call_tool("stubborn", {})

    made = infrastructure(store=store, tools=[stubborn], calls=calls)
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "calls", "hi")
        await trio.sleep(1)
        run.cancel()
        outcome = await run.concluded()
        assert outcome.receipt.overran
        log = await log_of(store)
        (result,) = [event for event in log if event["type"] == "TOOL_CALL_RESULT"]
        assert "late" not in result["content"]
    await check_valid(store)


async def test_one_that_ends_within_its_allowance_says_nothing_of_an_overrun(
    autojump_clock: MockClock,
    store: TroubledStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def tidy(run: RunContext) -> None:
        try:
            await trio.sleep_forever()
        finally:
            await shielded(ALLOWED)

    async with open_supervisor(infrastructure(store=store, tidy=tidy)) as supervisor:
        run = await supervisor.start(context(), "tidy", "hi")
        await trio.sleep(1)
        run.cancel()
        outcome: RunOutcome = await run.ended()
    assert not outcome.receipt.overran
    assert "alive" not in outcome.receipt.to_dict()
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


async def test_while_the_store_is_away_it_waits_and_is_told_once(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store, slow=slow_to_end)) as supervisor:
        run = await supervisor.start(context(), "slow", "hi")
        await trio.sleep(1)
        store.hold()
        run.cancel()
        await trio.sleep(30)
        assert run.outcome is None, "what is not durable is not told"
        store.release()
        assert (await run.concluded()).receipt.overran
        assert trio.current_time() == pytest.approx(31)
        await run.ended()
    await check_valid(store)


async def test_the_store_may_come_back_after_the_last_task_has_ended(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    async with open_supervisor(infrastructure(store=store, slow=slow_to_end)) as supervisor:
        run = await supervisor.start(context(), "slow", "hi")
        await trio.sleep(1)
        store.hold()
        run.cancel()
        await trio.sleep(100)
        assert run.outcome is None
        store.release()
        assert (await run.ended()).receipt.overran
    await check_valid(store)


async def test_cancelled_from_outside_it_is_told_in_time_as_well(
    autojump_clock: MockClock,
    store: TroubledStore,
) -> None:
    """An engine without a supervisor, in a scope that its opener cancels."""
    made = infrastructure(store=store, slow=slow_to_end)

    async def look() -> None:
        await trio.sleep(1 + ALLOWED + UNWINDING + 0.1)
        log = await log_of(store)
        (terminal,) = terminals_of(log)
        receipt = terminal["metadata"]["creche"]["receipt"]
        assert (receipt["reason"], receipt["overran"]) == ("shutdown", True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with trio.move_on_after(1) as scope:
            async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
                await engine.execute_agent("slow", "hi")
        assert scope.cancelled_caught
        assert trio.current_time() == pytest.approx(61)
    await check_valid(store)
