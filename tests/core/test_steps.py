"""Sub-agents in sequence and side by side: order, conditions, what a failure does to the rest."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from tests.agui_rules import StockClient
from tests.small_world import context, infrastructure, log_of, types_of
from trio.testing import MockClock

from creche import (
    LimitExceededError,
    Limits,
    MemoryStore,
    RunContext,
    RunError,
    RunOutcome,
    Step,
    SubagentFailedError,
    SubagentResult,
    UnknownAgentError,
    open_supervisor,
    text_of,
)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def executed(store: MemoryStore, made: Any, **more: Any) -> RunOutcome:
    """Execute an agent that has three others: `upper`, `fail` and `slow`."""
    agents = {"upper": upper, "fail": fail, "slow": slow, "made": made}
    async with open_supervisor(infrastructure(store=store, **agents, **more)) as supervisor:
        with trio.fail_after(1000):
            run = await supervisor.start(context(), "made", "hi")
            outcome = await run.ended()
    client = StockClient()
    client.take_all(await log_of(store))
    assert client.is_tidy
    return outcome


async def upper(run: RunContext) -> str:
    """Says what it was asked in capitals, at once."""
    words = text_of(run.messages[0]).upper()
    await run.emit.text(words)
    return words


async def fail(run: RunContext) -> None:
    await trio.sleep(5)
    raise RunError("no", code="nope")


async def slow(run: RunContext) -> str:
    """Waits as many seconds as it was asked to."""
    await trio.sleep(float(text_of(run.messages[0])))
    return "done"


def statuses(results: tuple[SubagentResult, ...]) -> list[str]:
    return [result.status for result in results]


def brackets(log: list[dict[str, Any]]) -> list[str]:
    """Steps and sub-agents as they begin and end."""
    names = {e["subagentRunId"]: e["name"] for e in log if e["type"] == "SUBAGENT_STARTED"}
    return [
        f"{event['type'].lower()} {event.get('stepName') or names[event['subagentRunId']]}"
        for event in log
        if event["type"].startswith(("STEP_", "SUBAGENT_"))
    ]


class TestSequence:
    async def test_each_step_may_go_on_from_what_the_earlier_ones_said(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> list[str]:
            results = await run.sequence(
                [
                    Step(agent="upper", input="a", name="first"),
                    Step(agent="upper", input=lambda done: f"{done[-1].text} and b"),
                    Step(agent="upper", input=lambda done: "+".join(r.text for r in done)),
                ]
            )
            return [result.text for result in results]

        assert (await executed(store, made)).result == ["A", "A AND B", "A+A AND B"]
        assert brackets(await log_of(store)) == [
            "step_started first",
            "subagent_started upper",
            "subagent_finished upper",
            "step_finished first",
            "step_started upper",
            "subagent_started upper",
            "subagent_finished upper",
            "step_finished upper",
            "step_started upper",
            "subagent_started upper",
            "subagent_finished upper",
            "step_finished upper",
        ]

    async def test_after_a_failure_the_rest_is_skipped(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        steps = [Step(agent=agent, input="x") for agent in ("upper", "fail", "upper")]

        async def made(run: RunContext) -> Any:
            with pytest.raises(SubagentFailedError, match="no"):
                await run.sequence(steps, raises=True)
            return await run.sequence(steps)

        results = (await executed(store, made)).result
        assert statuses(results) == ["success", "failed", "skipped"]
        assert results[1].code == "nope"

    async def test_a_failure_that_may_be_passed_over_stops_nothing(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> Any:
            return await run.sequence(
                [
                    Step(agent="fail", input="x", continue_on_error=True),
                    Step(agent="upper", input=lambda done: done[0].error or ""),
                ],
                raises=True,
            )

        results = (await executed(store, made)).result
        assert (statuses(results), results[1].text) == (["failed", "success"], "NO")

    async def test_a_step_whose_condition_says_no_is_skipped_without_a_word(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> Any:
            return await run.sequence(
                [
                    Step(agent="fail", input="x", when=bool),
                    Step(agent="upper", input="y", when=lambda done: done[0].status == "skipped"),
                ]
            )

        results = (await executed(store, made)).result
        assert statuses(results) == ["skipped", "success"]
        assert len(brackets(await log_of(store))) == 4

    async def test_a_condition_that_fails_is_its_own_agents_failure(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> None:
            await run.sequence([Step(agent="upper", input="x", when=lambda done: done[7].ok)])

        assert (await executed(store, made)).status == "failed"

    async def test_no_steps_are_no_results(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> Any:
            return (await run.sequence([]), await run.parallel([]))

        assert (await executed(store, made)).result == ((), ())


class TestParallel:
    async def test_steps_work_at_once_and_their_results_keep_the_order_of_the_steps(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> Any:
            begun = trio.current_time()
            results = await run.parallel(
                [Step(agent="slow", input=str(seconds)) for seconds in (30, 10, 20)]
                + [Step(agent="upper", input="x")]
            )
            assert trio.current_time() - begun == pytest.approx(30)
            return results

        results = (await executed(store, made)).result
        assert [(r.agent, r.result) for r in results] == [("slow", "done")] * 3 + [("upper", "X")]

    async def test_steps_of_one_name_that_are_open_at_once_are_told_apart(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> None:
            await run.parallel([Step(agent="slow", input="1") for _ in range(3)])
            await run.parallel([Step(agent="slow", input="1")])

        assert (await executed(store, made)).status == "success"
        steps = [e["stepName"] for e in await log_of(store) if e["type"] == "STEP_STARTED"]
        assert sorted(steps[:3]) == ["slow", "slow (2)", "slow (3)"]
        assert steps[3:] == ["slow"]

    async def test_a_failure_cancels_those_that_still_run(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        steps = [
            Step(agent="slow", input="1000"),
            Step(agent="fail", input="x"),
            Step(agent="slow", input="2"),
        ]

        async def made(run: RunContext) -> Any:
            results = await run.parallel(steps)
            assert trio.current_time() < 10
            with pytest.raises(SubagentFailedError):
                await run.parallel(steps, raises=True)
            return results

        results = (await executed(store, made)).result
        assert statuses(results) == ["cancelled", "failed", "success"]
        types = types_of(await log_of(store))
        assert (types.count("STEP_STARTED"), types.count("STEP_FINISHED")) == (6, 6)

    async def test_a_failure_that_may_be_passed_over_cancels_nobody(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> Any:
            return await run.parallel(
                [
                    Step(agent="slow", input="100"),
                    Step(agent="fail", input="x", continue_on_error=True),
                    Step(agent="upper", input="x", when=bool),
                ],
                raises=True,
            )

        assert statuses((await executed(store, made)).result) == ["success", "failed", "skipped"]

    @pytest.mark.parametrize(
        ("step", "error"),
        [
            (Step(agent="nobody", input="x"), UnknownAgentError),
            (Step(agent="upper", input=[]), ValueError),
            (Step(agent="upper", input=lambda done: done[0].text), IndexError),
            (Step(agent="slow", input="5"), LimitExceededError),
        ],
        ids=["unknown agent", "empty input", "an input that fails", "too many"],
    )
    async def test_what_cannot_be_begun_is_raised_as_it_is_and_ends_the_others(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
        step: Step,
        error: type[Exception],
    ) -> None:
        async def made(run: RunContext) -> None:
            with pytest.raises(error):
                await run.parallel([Step(agent="slow", input="1000")] * 2 + [step])
            assert trio.current_time() < 10

        outcome = await executed(store, made, limits=Limits(subagents_at_once=2))
        assert outcome.status == "success"

    async def test_a_cancel_of_the_run_closes_every_step(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> None:
            await run.parallel([Step(agent="slow", input="1000")] * 3)

        outcome = await executed(store, made, limits=Limits(run_timeout=10))
        assert outcome.receipt.reason == "deadline"

    async def test_steps_may_be_nested(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        """Two sequences beside each other, by plain Trio."""
        found: dict[str, tuple[SubagentResult, ...]] = {}

        async def made(run: RunContext) -> None:
            async def chain(name: str) -> None:
                found[name] = await run.sequence(
                    [
                        Step(agent="slow", input="3"),
                        Step(agent="upper", input=name),
                    ]
                )

            async with trio.open_nursery() as nursery:
                nursery.start_soon(chain, "a")
                nursery.start_soon(chain, "b")

        assert (await executed(store, made)).status == "success"
        assert {name: results[-1].text for name, results in found.items()} == {"a": "A", "b": "B"}
