"""How a run ended is said by its own task, of itself alone, and once.

Each test is named after what went wrong in the older design, and is prevented here.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
from tests.small_world import (
    ADA,
    BOB,
    agent_of,
    context,
    hang,
    infrastructure,
    log_of,
    terminals_of,
    types_of,
)
from trio.testing import MockClock

from creche import (
    EmitterClosedError,
    Limits,
    MemoryStore,
    RunContext,
    RunError,
    open_supervisor,
    tool,
)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def test_an_agent_cannot_die_silently_while_a_heartbeat_says_processing(
    autojump_clock: MockClock,
    store: MemoryStore,
) -> None:
    """The heartbeat is a task of the run, so it dies with the agent; nothing follows the end."""

    async def beat(run: RunContext) -> None:
        while True:
            await run.emit.custom("status", "processing")
            await trio.sleep(1)

    async def dies(run: RunContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat, run)
            await trio.sleep(9.5)
            raise OSError

    async with open_supervisor(infrastructure(store=store, dies=dies)) as supervisor:
        run = await supervisor.start(context(), "dies", "hi")
        outcome = await run.ended()
        await trio.sleep(100)
    assert (outcome.status, outcome.statistics.run_ms) == ("failed", 9500)
    log = await log_of(store)
    assert types_of(log).count("CUSTOM") == 10
    assert log[-1]["type"] == "RUN_ERROR"


async def test_a_heartbeat_outside_the_run_has_nothing_to_say_after_its_end(
    autojump_clock: MockClock,
    store: MemoryStore,
) -> None:
    beats: list[int] = []
    handed: list[RunContext] = []

    async def dies(run: RunContext) -> None:
        handed.append(run)
        await trio.sleep(9.5)
        raise OSError

    async with open_supervisor(infrastructure(store=store, dies=dies)) as supervisor:
        run = await supervisor.start(context(), "dies", "hi")
        for _ in range(20):
            await trio.sleep(1)
            try:
                await handed[0].emit.custom("status", "processing")
            except EmitterClosedError:
                break
            beats.append(len(beats))
        assert (await run.ended()).status == "failed"
    assert len(beats) == 9
    log = await log_of(store)
    assert terminals_of(log) == [log[-1]]


async def test_a_time_out_is_not_made_up_into_a_success(
    autojump_clock: MockClock,
    store: MemoryStore,
) -> None:
    async def late(run: RunContext) -> str:
        await run.emit.text("nearly ")
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return "all is well"
        return "never"

    made = infrastructure(store=store, late=late, limits=Limits(run_timeout=30))
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "late", "hi")
        outcome = await run.ended()
    assert (outcome.status, outcome.receipt.reason) == ("cancelled", "deadline")
    assert outcome.result is None
    assert "result" not in (await log_of(store))[-1]


async def test_one_runs_failure_does_not_end_or_mark_another(
    autojump_clock: MockClock,
    store: MemoryStore,
) -> None:
    async def dies(run: RunContext) -> None:
        await trio.sleep(1)
        raise SystemExit(3)

    async def works(run: RunContext) -> str:
        await trio.sleep(2)
        return "done"

    made = infrastructure(store=store, dies=dies, works=works)
    async with open_supervisor(made) as supervisor:
        runs = [
            await supervisor.start(context(user, f"{user}-{agent}"), agent, "hi")
            for user in (ADA, BOB)
            for agent in ("dies", "works")
        ]
        outcomes = [await run.ended() for run in runs]
    assert [outcome.status for outcome in outcomes] == ["failed", "success"] * 2
    for user in (ADA, BOB):
        log = await log_of(store, user, f"{user}-works")
        assert (log[-1]["type"], log[-1]["result"]) == ("RUN_FINISHED", "done")


async def test_a_stop_that_answers_has_stopped_something(
    autojump_clock: MockClock,
    store: MemoryStore,
) -> None:
    """What the run started is over when its outcome is known, and not only marked so."""
    alive: list[str] = []

    @tool(shared=(alive,))
    async def work() -> None:
        alive.append("tool")
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            alive.remove("tool")

    async def busy(run: RunContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.call_tool, "work", {})
            nursery.start_soon(run.spawn, "below", "x")

    async def below(run: RunContext) -> None:
        await run.call_tool("work", {})

    made = infrastructure(store=store, busy=agent_of(busy, (work,)), below=agent_of(below, (work,)))
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "busy", "hi")
        await trio.sleep(5)
        assert alive == ["tool", "tool"]
        run.cancel()
        outcome = await run.ended()
        assert alive == []
    assert (outcome.status, outcome.receipt.elapsed_ms) == ("cancelled", 1000)


async def test_two_ends_cannot_be_told_of_one_run(
    autojump_clock: MockClock,
    store: MemoryStore,
) -> None:
    """A failure, a cancel and a deadline in the same instant are one end."""

    async def dies(run: RunContext) -> None:
        await trio.sleep(10)
        raise RunError("no", code="first")

    made = infrastructure(store=store, dies=dies, limits=Limits(run_timeout=10))
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "dies", "hi")
        while run.status == "queued":
            await trio.lowlevel.checkpoint()
        await trio.sleep_until(run._life.scope.deadline)
        run.cancel()
        outcome = await run.ended()
        assert outcome is await run.concluded()
    (terminal,) = terminals_of(await log_of(store))
    assert terminal["metadata"]["creche"]["receipt"]["reason"] == outcome.receipt.reason


async def test_an_outcome_is_not_taken_back_by_a_later_cancel(
    autojump_clock: MockClock,
    store: MemoryStore,
) -> None:
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        run = await supervisor.start(context(), "hello", "hi")
        outcome = await run.ended()
        run.cancel()
        run.cancel("shutdown")
        assert (await run.ended()) is outcome
        assert (outcome.status, run.reason, run.status) == ("success", None, "success")


async def test_a_watcher_that_fails_is_not_the_runs_failure(
    autojump_clock: MockClock,
    store: MemoryStore,
) -> None:
    async def works(run: RunContext) -> Any:
        await run.emit.text("a")
        await trio.sleep(10)
        return "done"

    async with open_supervisor(infrastructure(store=store, works=works, hang=hang)) as supervisor:
        run = await supervisor.start(context(), "works", "hi")
        with pytest.raises(ZeroDivisionError):
            async with supervisor.open_events(run.user_id, run.thread_id) as entries:
                async for _ in entries:
                    raise ZeroDivisionError
        assert (await run.ended()).status == "success"
