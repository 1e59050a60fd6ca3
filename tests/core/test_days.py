"""What a user may spend in a day: kept in the store, shared by their runs, theirs alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
import trio
from tests.small_world import ADA, BOB, THREAD, Body, LosingStore, context, infrastructure, log_of
from trio.testing import MockClock

from creche import (
    AuditQuery,
    ExecutionEngine,
    Infrastructure,
    LimitExceededError,
    Limits,
    MemorySink,
    MemoryStore,
    Price,
    RunContext,
    Spending,
    StoreUnavailableError,
    Usage,
    UserId,
    open_audit,
    open_supervisor,
    tool,
)

EVENING = datetime(2026, 5, 17, 23, 0, tzinfo=UTC)  # an hour before midnight
TODAY, TOMORROW = date(2026, 5, 17), date(2026, 5, 18)


@tool
async def note() -> str:
    """Say so."""
    return "noted"


def made_of(limits: Limits, *, store: MemoryStore | None = None, **more: Any) -> Infrastructure:
    """An infrastructure whose day goes by Trio's clock: it begins in the evening."""
    begun = trio.current_time()
    made = infrastructure(limits=limits, store=store, tools=[note], **more)

    def clock() -> datetime:
        return EVENING + timedelta(seconds=trio.current_time() - begun)

    return dataclasses.replace(made, prices={"m": Price(1, 2)}, clock=clock)


def spends(tokens: int) -> Body:
    async def body(run: RunContext) -> None:
        run.spent("m", Usage(tokens, 0))
        await trio.lowlevel.checkpoint()

    return body


async def after(seconds: float, tokens: int, run: RunContext) -> None:
    await trio.sleep(seconds)
    run.spent("m", Usage(tokens, 0))
    await trio.lowlevel.checkpoint()


class TestOneRunAfterAnother:
    async def test_what_a_run_spent_is_stored_with_its_end_and_counts_for_the_next(self) -> None:
        store = MemoryStore()
        made = made_of(Limits(tokens_per_user_per_day=25), store=store, ten=spends(10))
        async with open_supervisor(made) as supervisor:
            outcomes = []
            for number in (1, 2, 3):
                run = await supervisor.start(context(), "ten", "x")
                outcomes.append(await run.ended())
                stored = await store.spending(ADA, TODAY)
                assert stored == Spending(tokens=10 * number, micro_usd=10 * number)
        assert [each.receipt.reason for each in outcomes] == ["success", "success", "budget"]
        assert outcomes[-1].receipt.budget == (
            "spent 30 of 25 tokens that this user may spend in a day (UTC)"
        )

    async def test_who_is_over_is_refused_until_midnight_and_that_is_audited(
        self, autojump_clock: MockClock
    ) -> None:
        sink = MemorySink()
        async with open_audit(sink) as audit:
            made = made_of(Limits(tokens_per_user_per_day=10), ten=spends(10))
            made = dataclasses.replace(made, audit=audit)
            async with open_supervisor(made) as supervisor:
                await (await supervisor.start(context(), "ten", "x")).ended()
                await trio.sleep(600)
                with pytest.raises(LimitExceededError, match="spent 10 of 10 tokens") as caught:
                    await supervisor.start(context(), "ten", "x")
                assert caught.value.retry_after == pytest.approx(3000, abs=1)
                assert caught.value.code == "limit_exceeded"
                assert len(await made.store.runs(ADA, THREAD)) == 1
                assert caught.value.retry_after is not None
                await trio.sleep(caught.value.retry_after)
                outcome = await (await supervisor.start(context(), "ten", "x")).ended()
                assert outcome.status == "success"
            found = await sink.find(AuditQuery(kind="limit_hit"))
        assert [(each.user, each.resource) for each in found] == [(ADA, "budget of a day")]

    async def test_an_engine_without_a_supervisor_is_held_to_it_too(self) -> None:
        made = made_of(Limits(tokens_per_user_per_day=10), ten=spends(10))
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            await engine.execute_agent("ten", "x")
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            with pytest.raises(LimitExceededError):
                await engine.execute_agent("ten", "x")
        async with ExecutionEngine.create_user_engine(context(BOB), infrastructure=made) as engine:
            assert (await engine.execute_agent("ten", "x")).status == "success"

    async def test_it_survives_the_thread(self) -> None:
        made = made_of(Limits(tokens_per_user_per_day=10), ten=spends(10))
        async with open_supervisor(made) as supervisor:
            await (await supervisor.start(context(), "ten", "x")).ended()
            assert await supervisor.delete_thread(ADA, THREAD)
            with pytest.raises(LimitExceededError):
                await supervisor.start(context(), "ten", "x")

    async def test_a_users_day_does_not_touch_anothers(self) -> None:
        made = made_of(Limits(tokens_per_user_per_day=15), ten=spends(10))
        async with open_supervisor(made) as supervisor:
            ends: dict[str, list[str]] = {}
            for user in (ADA, BOB, ADA, BOB):
                run = await supervisor.start(context(user), "ten", "x")
                ends.setdefault(user, []).append((await run.ended()).receipt.reason)
        assert ends == {ADA: ["success", "budget"], BOB: ["success", "budget"]}

    async def test_is_counted_once_where_the_commits_answer_is_lost(
        self, autojump_clock: MockClock
    ) -> None:
        store = LosingStore()
        store.loses = lambda commit: bool(commit.spent)
        made = made_of(Limits(), store=store, ten=spends(10))
        async with open_supervisor(made) as supervisor:
            await (await supervisor.start(context(), "ten", "x")).ended()
        assert store.lost == 1
        assert (await store.spending(ADA, TODAY)).tokens == 10

    async def test_is_counted_once_where_the_end_takes_several_commits(self) -> None:
        async def talks(run: RunContext) -> None:
            run.spent("m", Usage(10, 0))
            for _ in range(8):
                await run.emit.text("x" * 1000)

        store = MemoryStore()
        made = made_of(Limits(commit_bytes=1500), store=store, talks=talks)
        async with open_supervisor(made) as supervisor:
            await (await supervisor.start(context(), "talks", "x")).ended()
        assert (await store.spending(ADA, TODAY)).tokens == 10

    async def test_a_store_that_cannot_say_starts_nothing(self) -> None:
        class Away(MemoryStore):
            async def spending(self, user_id: UserId, day: date) -> Spending:
                raise OSError

        made = made_of(Limits(tokens_per_user_per_day=10), store=Away())
        async with open_supervisor(made) as supervisor:
            with pytest.raises(StoreUnavailableError, match="nothing was started"):
                await supervisor.start(context(), "hello", "x")
            assert supervisor.count == 0
            assert supervisor.quotas.count == 0

    async def test_without_such_a_limit_nobody_is_asked(self) -> None:
        class Away(MemoryStore):
            async def spending(self, user_id: UserId, day: date) -> Spending:
                raise OSError

        made = made_of(Limits(), store=Away())
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "hello", "x")
            assert (await run.ended()).status == "success"


class TestRunsAtOnce:
    @pytest.mark.parametrize(
        ("limits", "said"),
        [
            (Limits(tokens_per_user_per_day=25), "spent 30 of 25 tokens"),
            (Limits(usd_per_user_per_day="0.000025"), "spent 0.00003 of 0.000025 USD"),
        ],
    )
    async def test_share_what_is_left(
        self, limits: Limits, said: str, autojump_clock: MockClock
    ) -> None:
        store = MemoryStore()
        bodies: dict[str, Callable[[RunContext], Awaitable[None]]] = {
            f"at{seconds}": lambda run, seconds=seconds: after(seconds, 10, run)  # type: ignore[misc]
            for seconds in (1, 2, 3)
        }
        made = made_of(limits, store=store, **bodies)
        async with open_supervisor(made) as supervisor:
            runs = [
                await supervisor.start(context(thread=f"thread-{name}"), name, "x")
                for name in bodies
            ]
            other = await supervisor.start(context(BOB), "at3", "x")
            outcomes = [await run.ended() for run in runs]
            assert (await other.ended()).status == "success"
        assert [each.receipt.reason for each in outcomes] == ["success", "success", "budget"]
        assert outcomes[2].receipt.budget is not None
        assert said in outcomes[2].receipt.budget
        assert (await store.spending(ADA, TODAY)).tokens == 30

    async def test_are_counted_once_though_the_store_is_asked_amid_them(
        self, autojump_clock: MockClock
    ) -> None:
        async def lasts(run: RunContext) -> None:
            await after(0, 10, run)
            await trio.sleep(10)

        made = made_of(Limits(tokens_per_user_per_day=35), lasts=lasts, ten=spends(10))
        async with open_supervisor(made) as supervisor:
            first = await supervisor.start(context(thread="thread-b"), "lasts", "x")
            for _ in range(2):
                run = await supervisor.start(context(), "ten", "x")
                assert (await run.ended()).receipt.reason == "success"
            assert (await first.ended()).receipt.reason == "success"

    async def test_make_exactly_as_many_tool_calls_as_they_may(
        self, autojump_clock: MockClock
    ) -> None:
        async def calls(run: RunContext) -> None:
            while True:
                await run.call_tool("note", {})
                await trio.sleep(0.1)

        store = MemoryStore()
        made = made_of(Limits(tool_calls_per_user_per_day=7), store=store, calls=calls)
        async with open_supervisor(made) as supervisor:
            runs = [
                await supervisor.start(context(thread=f"thread-{n}"), "calls", "x")
                for n in range(3)
            ]
            outcomes = [await run.ended() for run in runs]
        assert {each.receipt.reason for each in outcomes} == {"budget"}
        assert sum(each.statistics.tool_calls for each in outcomes) == 7
        assert await store.spending(ADA, TODAY) == Spending(tool_calls=7)

    async def test_one_that_waited_begins_with_what_is_left_then(
        self, autojump_clock: MockClock
    ) -> None:
        asked: list[str] = []

        async def asks(run: RunContext) -> None:
            await run.call_tool("note", {})
            asked.append("made")

        async def ends(run: RunContext) -> None:
            await after(1, 10, run)

        made = made_of(Limits(tokens_per_user_per_day=10), ends=ends, asks=asks)
        async with open_supervisor(made) as supervisor:
            first = await supervisor.start(context(), "ends", "x")
            second = await supervisor.start(context(), "asks", "x")
            assert (await first.ended()).status == "success"
            outcome = await second.ended()
        # A tool costs no tokens, so that one call may begin; a model would not be asked.
        assert (outcome.status, asked) == ("success", ["made"])


class TestMidnight:
    async def test_each_day_gets_what_was_spent_on_it(self, autojump_clock: MockClock) -> None:
        async def over_midnight(run: RunContext) -> None:
            with run.budget(tokens=100) as budget:
                run.spent("m", Usage(8, 0))
                await trio.sleep(3599)
                assert budget.left.tokens == 2
                run.spent("m", Usage(2, 0))
                await trio.sleep(2)
                assert budget.left.tokens == 10
                run.spent("m", Usage(9, 0))
                await trio.lowlevel.checkpoint()

        store = MemoryStore()
        limits = Limits(tokens_per_user_per_day=10, run_timeout=7200)
        made = made_of(limits, store=store, over=over_midnight)
        async with open_supervisor(made) as supervisor:
            outcome = await (await supervisor.start(context(), "over", "x")).ended()
        assert outcome.status == "success"
        assert (await store.spending(ADA, TODAY)).tokens == 10
        assert (await store.spending(ADA, TOMORROW)).tokens == 9
        assert await store.spending(BOB, TODAY) == Spending()

    async def test_a_run_that_spends_nothing_stores_nothing(self) -> None:
        store = MemoryStore()
        made = made_of(Limits(), store=store)
        async with open_supervisor(made) as supervisor:
            await (await supervisor.start(context(), "hello", "x")).ended()
        assert await store.spending(ADA, TODAY) == Spending()
        assert (await log_of(store))[-1]["type"] == "RUN_FINISHED"
