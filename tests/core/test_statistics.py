"""What a run tells of itself at its end: how long it waited and worked, and what it did."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from tests.small_world import ADA, THREAD, agent_of, context, infrastructure, log_of, types_of
from trio.testing import MockClock

from creche import (
    Limits,
    MemoryStore,
    Message,
    ModelAgent,
    ModelPart,
    RunContext,
    RunStatistics,
    TextDelta,
    ToolCallRequest,
    ToolMessage,
    ToolSpec,
    Usage,
    open_supervisor,
    tool,
)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


class Scripted:
    """Calls `double` as often as it is told to, a time each; then answers."""

    name = "scripted"

    def __init__(self, calls: int = 1, *, delay: float = 0.0) -> None:
        self._calls = calls
        self._delay = delay  # seconds before each delta
        self.closed = 0

    @asynccontextmanager
    async def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        async def parts() -> AsyncIterator[ModelPart]:
            done = sum(isinstance(message, ToolMessage) for message in messages)
            if tools and done < self._calls:
                yield ToolCallRequest("double", '{"n": %d}' % done)  # noqa: UP031
            else:
                for word in ("a", "b"):
                    await trio.sleep(self._delay)
                    yield TextDelta(word)
            yield Usage(10, 1)

        try:
            yield parts()
        finally:
            self.closed += 1


@tool
async def double(n: int) -> int:
    """Fails at the first number."""
    await trio.sleep(1)
    return n // n * 2


class Doubles(ModelAgent):
    """Has a tool."""

    tools = (double,)


class TestStatistics:
    async def test_a_run_counts_its_model_calls_tokens_tools_and_sub_agents(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        @tool
        async def ok() -> None: ...

        async def made(run: RunContext) -> None:
            for name in ("ok", "no such tool"):
                await run.call_tool(name, {})
            await run.spawn("doubles", "x")
            await run.spawn("doubles", "y")
            await run.spawn("hello", "z")

        made_of = infrastructure(
            store=store,
            models={"default": Scripted(3)},
            made=agent_of(made, (ok,)),
            doubles=Doubles,
        )
        async with open_supervisor(made_of) as supervisor:
            run = await supervisor.start(context(), "made", "hi")
            outcome = await run.ended()
        assert outcome.statistics == RunStatistics(
            queue_ms=0,
            run_ms=6000,
            model_calls=8,
            input_tokens=80,
            output_tokens=8,
            tool_calls=8,
            tool_failures=3,
            subagents=3,
        )
        told = (await log_of(store))[-1]["metadata"]["creche"]["statistics"]
        assert told == outcome.statistics.to_dict()

    async def test_a_failed_run_and_a_cancelled_one_tell_theirs_too(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        @tool
        async def dawdle() -> None:
            await trio.sleep_forever()

        async def fails(run: RunContext) -> None:
            await run.call_tool("none", {})
            raise ValueError

        async def hangs(run: RunContext) -> None:
            await run.call_tool("dawdle", {})

        made = infrastructure(
            store=store,
            limits=Limits(run_timeout=7),
            fails=fails,
            hangs=agent_of(hangs, (dawdle,)),
        )
        found: list[RunStatistics] = []
        async with open_supervisor(made) as supervisor:
            for agent in ("fails", "hangs"):
                run = await supervisor.start(context(), agent, "hi")
                found.append((await run.ended()).statistics)
        ends = [e for e in await log_of(store) if e["type"] in {"RUN_ERROR", "RUN_FINISHED"}]
        assert [end["metadata"]["creche"]["statistics"] for end in ends] == [
            statistics.to_dict() for statistics in found
        ]
        assert found == [
            RunStatistics(tool_calls=1, tool_failures=1),
            RunStatistics(run_ms=7000, tool_calls=1),  # it was stopped, which is no failure
        ]

    @pytest.mark.parametrize(
        ("agent", "seconds", "told", "logged"),
        [
            ("doubles", 600, (3, 0, 3), {"tokens": 3}),
            ("doubles", 5, (3, 1, 2), {"tokens": 2, "untold_calls": 1}),
            ("chats", 5, (1, 1, 0), {"untold_calls": 1}),
            ("hang", 5, (0, 0, 0), {"tokens": 0}),
        ],
        ids=["whole", "stopped in the third call", "stopped in the first", "without a model"],
    )
    async def test_of_a_call_that_was_stopped_no_cost_is_made_up(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
        caplog: pytest.LogCaptureFixture,
        agent: str,
        seconds: float,
        told: tuple[int, int, int],
        logged: dict[str, int],
    ) -> None:
        """A model tells at the end of its answer what that cost: a stopped one cannot."""

        @tool(name="double")
        async def quick(n: int) -> int:
            return n

        made = infrastructure(
            store=store,
            limits=Limits(run_timeout=seconds),
            models={"default": Scripted(2, delay=3)},
            doubles=type("Doubles", (ModelAgent,), {"tools": (quick,)}),
            chats=ModelAgent,
        )
        caplog.set_level(logging.INFO, logger="creche.engine")
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), agent, "hi")
            spent = (await run.ended()).statistics
        assert (spent.model_calls, spent.untold_calls, spent.output_tokens) == told
        line = vars(caplog.records[-1])
        assert line["message"] == "a run ended"
        assert {key: line[key] for key in ("tokens", "untold_calls") if key in line} == logged


class TestQueued:
    @pytest.mark.parametrize(("seconds", "told"), [(0.9, None), (1.1, 1100), (60.0, 60_000)])
    async def test_a_run_that_waited_for_its_turn_for_over_a_second_says_so_right_away(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
        seconds: float,
        told: int | None,
    ) -> None:
        async def busy(run: RunContext) -> None:
            await trio.sleep(seconds)

        async with open_supervisor(infrastructure(store=store, busy=busy)) as supervisor:
            first = await supervisor.submit(context(), "busy", "hi")
            second = await supervisor.submit(context(), "hello", "hi")
            outcomes = [await first.ended(), await second.ended()]
        log = await log_of(store)
        begins = [at for at, event in enumerate(log) if event["type"] == "RUN_STARTED"]
        assert "CUSTOM" not in types_of(log[: begins[1]])
        following = log[begins[1] + 1]
        if told is None:
            assert "CUSTOM" not in types_of(log)
        else:
            assert (following["type"], following["name"]) == ("CUSTOM", "creche.queued")
            # The turn comes with the commit of the end before it, a little later.
            assert following["value"] == {
                "waited_ms": pytest.approx(told, abs=50),
                "position": 1,
            }
            assert types_of(log).count("CUSTOM") == 1
        assert outcomes[0].statistics.queue_ms == 0
        assert outcomes[1].statistics.queue_ms == pytest.approx(seconds * 1000, abs=50)

    async def test_a_run_that_was_cancelled_in_the_queue_tells_how_long_it_had_waited(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            first = await supervisor.start(context(), "hang", "hi")
            second = await supervisor.start(context(), "hello", "hi")
            await trio.sleep(5)
            second.cancel()
            outcome = await second.concluded()
            assert (outcome.statistics.queue_ms, outcome.statistics.run_ms) == (5000, 0)
            first.cancel()
            await second.ended()
        assert "CUSTOM" not in types_of(await log_of(store))


class TestTurnDeadline:
    async def test_a_model_call_past_its_deadline_fails_the_run_and_closes_the_stream(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        """It is neither a success with half an answer nor a cancel that nobody asked for."""
        model = Scripted(0, delay=70)
        made = infrastructure(store=store, models={"default": model}, chat=ModelAgent)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "chat", "hi")
            outcome = await run.ended()
        assert (outcome.status, outcome.receipt.reason) == ("failed", "turn_timeout")
        assert outcome.message == "The model's answer took longer than 120 s and was stopped."
        assert (outcome.statistics.run_ms, outcome.statistics.model_calls) == (120_000, 1)
        assert model.closed == 1
        log = await log_of(store)
        assert types_of(log)[-3:] == ["TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END", "RUN_ERROR"]
        stored = [item.message.content for item in await store.messages(ADA, THREAD)]
        assert stored == ["hi", "a"]

    async def test_each_turn_has_the_whole_time_and_tools_do_not_use_it_up(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        made = infrastructure(
            store=store,
            limits=Limits(turn_timeout=2),
            models={"default": Scripted(5, delay=0.9)},
            doubles=Doubles,
        )
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "doubles", "hi")
            outcome = await run.ended()
        assert (outcome.status, outcome.statistics.model_calls) == ("success", 6)

    async def test_a_turn_that_is_too_long_is_only_its_sub_agents_failure(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> Any:
            return await run.spawn("chat", "x")

        made_of = infrastructure(
            store=store,
            models={"default": Scripted(0, delay=70)},
            chat=ModelAgent,
            made=made,
        )
        async with open_supervisor(made_of) as supervisor:
            run = await supervisor.start(context(), "made", "hi")
            outcome = await run.ended()
        assert (outcome.status, outcome.result.code) == ("success", "turn_timeout")
        assert outcome.result.text == "a"

    async def test_a_cancel_during_a_turn_is_a_cancel(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        made = infrastructure(
            store=store,
            limits=Limits(run_timeout=120, turn_timeout=120),
            models={"default": Scripted(0, delay=1000)},
            chat=ModelAgent,
        )
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "chat", "hi")
            assert (await run.ended()).receipt.reason == "deadline"
