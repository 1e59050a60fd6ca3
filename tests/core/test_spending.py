"""Budgets of a run: whose spending is whose, and what ends when there is too much of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tests.small_world import Body, agent_of, context, infrastructure, log_of, types_of
from trio.testing import MockClock

from creche import (
    Allowance,
    BudgetExceededError,
    Limits,
    MemoryStore,
    Message,
    ModelAgent,
    ModelPart,
    Price,
    RunContext,
    RunError,
    RunOutcome,
    Spending,
    TextDelta,
    Tool,
    ToolCallRequest,
    ToolSpec,
    Usage,
    open_supervisor,
    tool,
)
from creche._spending import Budget, Budgets

PRICES = {"m": Price(1, 2)}  # a token read costs one micro-dollar, one written two


async def outcome_of(
    body: Body,
    *,
    limits: Limits | None = None,
    store: MemoryStore | None = None,
    tools: Sequence[Tool] = (),
    prices: dict[str, Price] | None = None,
    **more: Any,
) -> RunOutcome:
    """How a run of that body ends."""
    made = infrastructure(
        limits=limits, store=store, tools=tools, body=agent_of(body, tuple(tools)), **more
    )
    made = dataclasses.replace(made, prices=PRICES if prices is None else prices)
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "body", "hi")
        return await run.ended()


async def succeed(body: Body, **more: Any) -> RunOutcome:
    """Run a body, whose asserts must hold."""
    outcome = await outcome_of(body, **more)
    assert outcome.status == "success", outcome
    return outcome


def spend(run: RunContext, tokens: int) -> None:
    run.spent("m", Usage(tokens, 0))


class Talks:
    """A model whose answer costs so many tokens; it is counted how often it was asked."""

    name = "m"

    def __init__(self, tokens: int = 10, calls: int = 0) -> None:
        self.tokens = tokens
        self.calls = calls  # how often it asks for `note`
        self.asked = 0

    @contextlib.asynccontextmanager
    async def open_stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        self.asked += 1
        asked = self.asked

        async def parts() -> AsyncIterator[ModelPart]:
            yield TextDelta("word")
            if asked <= self.calls:
                yield ToolCallRequest("note", "{}")
            yield Usage(self.tokens, 0)

        yield parts()


# --- whose spending is whose


class TestNesting:
    async def test_blocks_one_after_another_have_each_their_own(self) -> None:
        async def body(run: RunContext) -> None:
            for _ in range(3):
                with run.budget(tokens=10) as budget:
                    spend(run, 10)
                    await trio.lowlevel.checkpoint()
                    assert (budget.spent.tokens, budget.left.tokens) == (10, 0)

        await succeed(body)

    async def test_an_inner_block_gets_what_is_left_at_most(self) -> None:
        async def body(run: RunContext) -> None:
            with run.budget(tokens=10, tool_calls=2) as outer:
                spend(run, 4)
                with run.budget(tokens=100, usd=1) as wide, run.budget(tokens=3) as narrow:
                    assert wide.limit == Allowance(tokens=6, micro_usd=1_000_000, tool_calls=2)
                    assert narrow.limit.tokens == 3
                    spend(run, 2)
                    assert [each.left.tokens for each in (outer, wide, narrow)] == [4, 4, 1]
                    assert narrow.left.tool_calls == 2
                with run.budget(tokens=5) as after:
                    assert after.left.tokens == 4

        await succeed(body)

    async def test_exactly_the_block_that_is_over_ends(self) -> None:
        said: list[str] = []

        async def body(run: RunContext) -> None:
            with run.budget(tokens=100) as outer:
                with pytest.raises(BudgetExceededError, match="spent 15 of 10 tokens") as caught:
                    with run.budget(tokens=10) as inner:
                        spend(run, 15)
                        said.append("before its next checkpoint")
                        await trio.sleep_forever()
                assert caught.value.budget is inner
                assert caught.value.code == "budget_exceeded"
                await trio.lowlevel.checkpoint()
                assert outer.left.tokens == 85
                said.append("goes on")

        await succeed(body)
        assert said == ["before its next checkpoint", "goes on"]

    async def test_of_two_that_are_over_at_once_the_outer_one_ends(self) -> None:
        async def body(run: RunContext) -> None:
            with pytest.raises(BudgetExceededError) as caught:
                with run.budget(tokens=10) as outer:
                    with run.budget(tokens=50):
                        spend(run, 15)
                    await trio.sleep_forever()
            assert caught.value.budget is outer

        await succeed(body)

    async def test_who_works_beside_one_another_has_each_their_own_and_shares_what_is_around(
        self, autojump_clock: MockClock
    ) -> None:
        ended: dict[int, float] = {}

        async def body(run: RunContext) -> None:
            async def worker(number: int, each: int) -> None:
                with contextlib.suppress(BudgetExceededError):
                    with run.budget(tokens=10) as own:
                        for _ in range(4):
                            await trio.sleep(1)
                            spend(run, each)
                        assert own.spent.tokens == 4 * each
                ended[number] = trio.current_time()

            with run.budget(tokens=100) as around:
                begun = trio.current_time()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(worker, 1, 2)
                    nursery.start_soon(worker, 2, 6)
                assert around.spent.tokens == 4 * 2 + 2 * 6
                assert {number: at - begun for number, at in ended.items()} == {1: 4, 2: 2}

        await succeed(body)

    async def test_what_tasks_of_a_block_spend_ends_it_and_all_of_them(
        self, autojump_clock: MockClock
    ) -> None:
        cancelled: list[int] = []

        async def body(run: RunContext) -> None:
            async def worker(depth: int) -> None:
                try:
                    async with trio.open_nursery() as nursery:
                        if depth:
                            nursery.start_soon(worker, depth - 1)
                        else:
                            await trio.sleep(1)
                            spend(run, 11)
                        await trio.sleep_forever()
                finally:  # which nothing but a cancel comes to
                    cancelled.append(depth)

            with pytest.raises(BudgetExceededError):
                with run.budget(tokens=10):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(worker, 3)
                        nursery.start_soon(worker, 3)

        await succeed(body)
        assert sorted(cancelled) == [0, 0, 1, 1, 2, 2, 3, 3]

    async def test_a_nursery_that_was_open_before_is_beside_the_block(
        self, autojump_clock: MockClock
    ) -> None:
        """As with a cancel scope: who is started there from within it is not in it."""
        done: list[str] = []

        async def body(run: RunContext) -> None:
            async def elsewhere() -> None:
                spend(run, 1000)
                await trio.sleep(5)
                done.append("elsewhere")

            async with trio.open_nursery() as before:
                with run.budget(tokens=10) as budget:
                    before.start_soon(elsewhere)
                    await trio.sleep(1)
                    assert budget.spent == Spending()
                    async with trio.open_nursery() as within:
                        within.start_soon(trio.sleep, 1)
                    with pytest.raises(BudgetExceededError):
                        with run.budget(tokens=1):
                            spend(run, 2)
                            await trio.sleep_forever()
                    assert budget.spent.tokens == 2

        await succeed(body)
        assert done == ["elsewhere"]

    async def test_sub_agents_share_what_is_around_them_and_fail_by_themselves_in_their_own(
        self,
    ) -> None:
        async def within(run: RunContext) -> None:
            with run.budget(tokens=5):
                spend(run, 6)
                await trio.sleep_forever()

        async def much(run: RunContext) -> None:
            spend(run, 100)
            await trio.sleep_forever()

        async def body(run: RunContext) -> None:
            with run.budget(tokens=20) as budget:
                result = await run.spawn("within", "x")
                assert (result.status, result.code) == ("failed", "budget_exceeded")
                assert budget.spent.tokens == 6
            with pytest.raises(BudgetExceededError) as caught:
                with run.budget(tokens=20) as second:
                    await run.spawn("much", "x")
                    raise AssertionError("the block ended within that call")
            assert caught.value.budget is second
            assert second.spent.tokens == 100

        await succeed(body, within=within, much=much)


# A program of blocks: each says what it does, and `owners` what lexical nesting makes of it.
@dataclasses.dataclass
class Leaf:
    """Spends one token here."""


@dataclasses.dataclass
class Start:
    """Spends one token in a task of an enclosing nursery: that many further out."""

    outward: int


@dataclasses.dataclass
class Block:
    """A budget, or a nursery, around others."""

    is_budget: bool
    body: list[Any]


PROGRAMS = st.recursive(
    st.just(Leaf()) | st.builds(Start, st.integers(0, 3)),
    lambda inner: st.builds(Block, st.booleans(), st.lists(inner, max_size=4)),
    max_leaves=25,
)


@given(PROGRAMS)
async def test_what_is_spent_of_which_budget_is_what_nesting_says(program: Any) -> None:
    budgets = Budgets(lambda: None)
    expected: dict[Budget, int] = {}

    async def play(
        step: Any,
        around: tuple[Budget, ...],
        nurseries: tuple[tuple[trio.Nursery, tuple[Budget, ...]], ...],
    ) -> None:
        if isinstance(step, Leaf):
            budgets.charge_answer("m", 1, 0)
            for budget in around:
                expected[budget] += 1
        elif isinstance(step, Start):
            if nurseries:
                nursery, of_it = nurseries[-1 - step.outward % len(nurseries)]
                nursery.start_soon(play, Leaf(), of_it, ())
        elif step.is_budget:
            with budgets.opened(Allowance()) as budget:
                expected[budget] = 0
                for inner in step.body:
                    await play(inner, (*around, budget), nurseries)
                await trio.testing.wait_all_tasks_blocked()
        else:
            async with trio.open_nursery() as nursery:
                for inner in step.body:
                    await play(inner, around, (*nurseries, (nursery, around)))

    await play(program, (), ())
    assert {budget: budget.spent.tokens for budget in expected} == expected
    assert not budgets._open


# --- how a block ends


class TestTheEnd:
    async def test_a_block_that_is_left_before_any_checkpoint_is_over_all_the_same(self) -> None:
        async def body(run: RunContext) -> None:
            with pytest.raises(BudgetExceededError):
                with run.budget(usd="0.00001"):
                    run.spent("m", Usage(5, 3))

        await succeed(body)

    async def test_a_block_that_is_left_otherwise_is(self) -> None:
        async def body(run: RunContext) -> None:
            with pytest.raises(ZeroDivisionError):
                with run.budget(tokens=1):
                    spend(run, 2)
                    1 / 0  # noqa: B018

        await succeed(body)

    async def test_exactly_all_of_it_may_be_spent(self) -> None:
        async def body(run: RunContext) -> None:
            with run.budget(tokens=10, usd="0.00001") as budget:
                spend(run, 10)
                await trio.lowlevel.checkpoint()
                assert budget.left == Allowance(tokens=0, micro_usd=0)

        await succeed(body)

    async def test_a_cancel_of_the_run_is_no_matter_of_its_budgets(self) -> None:
        async def body(run: RunContext) -> None:
            with run.budget(tokens=10):
                await trio.sleep_forever()

        async with open_supervisor(infrastructure(body=body)) as supervisor:
            run = await supervisor.start(context(), "body", "hi")
            await trio.testing.wait_all_tasks_blocked()
            run.cancel("user")
            outcome = await run.ended()
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "user")

    async def test_an_agent_that_does_not_catch_it_fails_with_that_code(self) -> None:
        async def body(run: RunContext) -> None:
            with run.budget(tokens=10):
                spend(run, 25)
                await trio.sleep_forever()

        outcome = await outcome_of(body)
        assert (outcome.status, outcome.receipt.reason) == ("failed", "budget_exceeded")
        assert outcome.message is not None
        assert "spent 25 of 10 tokens" in outcome.message

    @pytest.mark.parametrize("wrong", [{"tokens": -1}, {"usd": "x"}, {"tool_calls": 0.5}])
    async def test_what_is_no_limit_is_refused(self, wrong: dict[str, Any]) -> None:
        async def body(run: RunContext) -> None:
            with pytest.raises(ValueError, match="must be"):
                with run.budget(**wrong):
                    pass

        await succeed(body)


# --- what may not begin


@tool
async def note() -> str:
    """Say so."""
    return "noted"


class TestWhatMayNotBegin:
    async def test_a_model_is_not_asked_when_nothing_is_left(self) -> None:
        model = Talks(tokens=10)

        async def ask(run: RunContext) -> None:
            asked = run.model()
            async with asked.open_stream([], []) as stream:
                async for part in stream:
                    if isinstance(part, Usage):
                        run.spent(asked.name, part)

        async def body(run: RunContext) -> None:
            with pytest.raises(BudgetExceededError, match="spent 10 of 10 tokens"):
                with run.budget(tokens=10):
                    await ask(run)
                    await ask(run)
            with run.budget(tool_calls=0):  # which says nothing of models
                await ask(run)

        outcome = await succeed(body, models={"default": model})
        assert model.asked == 2
        assert outcome.statistics.model_calls == 2

    async def test_a_tool_is_not_called_and_nothing_is_said_of_it(
        self, autojump_clock: MockClock
    ) -> None:
        store = MemoryStore()

        async def body(run: RunContext) -> None:
            with pytest.raises(BudgetExceededError, match="spent 2 of 2 tool calls"):
                with run.budget(tool_calls=2) as budget:
                    for _ in range(3):
                        assert (await run.call_tool("note", {})).ok
            assert budget.spent.tool_calls == 2
            with run.budget(tokens=0):
                assert (await run.call_tool("note", {})).ok

        await succeed(body, store=store, tools=[note])
        assert types_of(await log_of(store)).count("TOOL_CALL_START") == 3

    async def test_of_many_at_once_no_more_begin_than_may(self, autojump_clock: MockClock) -> None:
        begun: list[int] = []

        @tool(shared=(begun,))
        async def slow(n: int) -> int:
            """Take a second."""
            begun.append(n)
            await trio.sleep(1)
            return n

        async def body(run: RunContext) -> None:
            with pytest.raises(BudgetExceededError):
                with run.budget(tool_calls=3):
                    async with trio.open_nursery() as nursery:
                        for n in range(5):
                            nursery.start_soon(run.call_tool, "slow", {"n": n})
            begun_then = len(begun)
            with run.budget(tool_calls=5):
                async with trio.open_nursery() as nursery:
                    for n in range(5):
                        nursery.start_soon(run.call_tool, "slow", {"n": n})
            assert begun_then <= 3
            assert len(begun) == begun_then + 5

        await succeed(body, tools=[slow])

    async def test_shielded_code_is_told_by_an_exception(self, autojump_clock: MockClock) -> None:
        model = Talks()

        async def body(run: RunContext) -> None:
            with pytest.raises(BudgetExceededError) as outer:
                with run.budget(tokens=1) as budget:
                    spend(run, 2)
                    try:
                        await trio.sleep_forever()
                    finally:
                        with trio.CancelScope(shield=True):
                            with pytest.raises(BudgetExceededError) as inner:
                                async with run.model().open_stream([], []):
                                    pass
            assert inner.value.budget is outer.value.budget is budget

        await succeed(body, models={"default": model})
        assert model.asked == 0


class TestMoney:
    async def test_a_model_without_a_price_is_not_asked_under_a_budget_in_money(self) -> None:
        model = Talks()

        async def body(run: RunContext) -> None:
            with run.budget(tokens=1000):
                with pytest.raises(RunError, match="no price is known of the model 'm'") as caught:
                    with run.budget(usd=1), run.budget(tokens=10):
                        async with run.model().open_stream([], []):
                            pass
                assert caught.value.code == "no_price"
                with pytest.raises(RunError, match="no price"):
                    with run.budget(usd=1):
                        run.spent("another", Usage(1, 1))
                async with run.model().open_stream([], []):
                    pass

        await succeed(body, models={"default": model}, prices={})
        assert model.asked == 1

    @pytest.mark.parametrize(
        ("prices", "spent", "usd"),
        [
            ({"m": Price("0.15", "0.6")}, [("m", 1000, 1000), ("m", 1, 0)], 0.000751),
            ({"m": Price(1, 1)}, [("m", 5, 5), ("other", 5, 5)], None),
            ({"m": Price(1, 1)}, [], 0.0),
            ({}, [("m", 5, 5)], None),
        ],
    )
    async def test_the_statistics_say_what_a_run_cost_where_that_is_known(
        self, prices: dict[str, Price], spent: list[tuple[str, int, int]], usd: float | None
    ) -> None:
        async def body(run: RunContext) -> None:
            for model, inputs, outputs in spent:
                run.spent(model, Usage(inputs, outputs))

        store = MemoryStore()
        outcome = await succeed(body, prices=prices, store=store)
        assert outcome.statistics.usd == usd
        told = (await log_of(store))[-1]["metadata"]["creche"]["statistics"]
        assert told.get("usd") == usd
        assert ("usd" in told) == (usd is not None)


# --- the run's own


class TestTheRun:
    @pytest.mark.parametrize(
        ("limits", "said"),
        [
            (Limits(run_tokens=25), "spent 30 of 25 tokens that this run may spend"),
            (Limits(run_usd="0.000025"), "spent 0.00003 of 0.000025 USD that this run may spend"),
            (Limits(run_tokens=20), "spent 20 of 20 tokens that this run may spend"),
        ],
    )
    async def test_that_spends_too_much_is_cancelled_with_that_reason(
        self, limits: Limits, said: str, autojump_clock: MockClock
    ) -> None:
        store, model = MemoryStore(), Talks(tokens=10, calls=100)

        class Notes(ModelAgent):
            """Asks on and on."""

            tools = (note,)

        made = infrastructure(
            store=store, limits=limits, tools=[note], models={"default": model}, notes=Notes
        )
        made = dataclasses.replace(made, prices=PRICES)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "notes", "hi")
            outcome = await run.ended()
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "budget")
        assert outcome.receipt.budget == said
        assert model.asked == (2 if limits.run_tokens == 20 else 3)
        end = (await log_of(store))[-1]
        assert end["metadata"]["creche"]["receipt"]["budget"] == said
        assert end["outcome"] == {"type": "cancelled"}

    async def test_is_the_outermost_budget_of_all_in_it(self) -> None:
        async def body(run: RunContext) -> None:
            with run.budget(tokens=100) as budget:
                assert (budget.limit.tokens, budget.left.tokens) == (50, 50)
                spend(run, 51)
                await trio.sleep_forever()

        outcome = await outcome_of(body, limits=Limits(run_tokens=50))
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "budget")

    async def test_counts_what_is_spent_wherever_in_it(self) -> None:
        async def spends(run: RunContext) -> None:
            spend(run, 30)

        async def body(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.spawn, "spends", "x")
                nursery.start_soon(run.spawn, "spends", "x")
            await trio.sleep_forever()

        outcome = await outcome_of(body, spends=spends, limits=Limits(run_tokens=50))
        assert outcome.receipt.budget == "spent 60 of 50 tokens that this run may spend"


# --- how long a model may be silent


class Halting:
    """A model that pauses before it is open, and before each part."""

    name = "m"

    def __init__(self, opening: float, *pauses: float) -> None:
        self.opening = opening
        self.pauses = pauses
        self.closed = False

    @contextlib.asynccontextmanager
    async def open_stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        async def parts() -> AsyncGenerator[ModelPart]:
            for pause in self.pauses:
                await trio.sleep(pause)
                yield TextDelta("word")

        try:
            await trio.sleep(self.opening)
            async with contextlib.aclosing(parts()) as stream:
                yield stream
        finally:
            self.closed = True


class TestSilence:
    @pytest.mark.parametrize(
        ("model", "code", "after"),
        [
            (Halting(3.9, 0, 0, 0), None, 3.9),
            (Halting(4.1), "first_token_timeout", 4.0),
            (Halting(2, 1.9, 0.9, 0.9), None, 5.7),
            (Halting(2, 2.1), "first_token_timeout", 4.0),
            (Halting(0, 0, 0, 1.1), "idle_timeout", 1.0),
            (Halting(0.5, 0.7, 0, 1.1), "idle_timeout", 2.2),
            (Halting(0, 3, 0.9, 1.1, 0), "idle_timeout", 4.9),
            (Halting(0, 3, *[0.9] * 9), "turn_timeout", 10.0),
        ],
    )
    async def test_that_is_too_long_ends_the_call_with_its_reason(
        self, model: Halting, code: str | None, after: float, autojump_clock: MockClock
    ) -> None:
        limits = Limits(first_token_timeout=4, idle_timeout=1, turn_timeout=10)

        async def body(run: RunContext) -> None:
            begun = trio.current_time()
            found = None
            try:
                async with run.model().open_stream([], []) as stream:
                    async for _ in stream:
                        pass
            except RunError as error:
                found = error.code
            assert (found, model.closed) == (code, True)
            assert trio.current_time() - begun == pytest.approx(after)
            await trio.sleep(20)  # nothing of its deadlines is left

        await succeed(body, limits=limits, models={"default": model})

    async def test_of_several_models_at_once_is_each_ones_own(
        self, autojump_clock: MockClock
    ) -> None:
        models = {
            "quick": Halting(0, *[0.9] * 5),
            "slow": Halting(0, 3.9, 0.9),
            "stuck": Halting(0.5, 4),
            "late": Halting(0, 0.5, 1.5),
        }
        ended: dict[str, tuple[float, str | None]] = {}

        async def body(run: RunContext) -> None:
            begun = trio.current_time()

            async def listen(name: str) -> None:
                found = None
                try:
                    async with run.model(name).open_stream([], []) as stream:
                        async for _ in stream:
                            pass
                except RunError as error:
                    found = error.code
                ended[name] = (round(trio.current_time() - begun, 3), found)

            async with trio.open_nursery() as nursery:
                for name in models:
                    nursery.start_soon(listen, name)

        await succeed(
            body, limits=Limits(first_token_timeout=4, idle_timeout=1), models=dict(models)
        )
        assert ended == {
            "quick": (4.5, None),
            "slow": (4.8, None),
            "stuck": (4.0, "first_token_timeout"),
            "late": (1.5, "idle_timeout"),
        }

    async def test_without_any_time_is_over_at_once_and_keeps_nobody_busy(
        self, autojump_clock: MockClock
    ) -> None:
        async def body(run: RunContext) -> None:
            with pytest.raises(RunError) as caught:
                async with run.model().open_stream([], []) as stream:
                    async for _ in stream:
                        pass
            assert caught.value.code == "idle_timeout"

        limits = Limits(idle_timeout=0)
        await succeed(body, limits=limits, models={"default": Halting(0, 0.5, 5)})

    async def test_what_the_agent_does_between_parts_is_not_the_models_silence(
        self, autojump_clock: MockClock
    ) -> None:
        async def body(run: RunContext) -> int:
            heard = 0
            async with run.model().open_stream([], []) as stream:
                await trio.sleep(10)
                async for _ in stream:
                    heard += 1
                    await trio.sleep(10)
            return heard

        limits = Limits(first_token_timeout=4, idle_timeout=1)
        model = Halting(0, 0.5, 0.5, 0.5)
        assert (await succeed(body, limits=limits, models={"default": model})).result == 3
