"""Runs on one thread without a supervisor: one at a time, in order; nobody else waits for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from tests.small_world import (
    ADA,
    BOB,
    THREAD,
    TroubledStore,
    context,
    infrastructure,
    log_of,
    one_at_a_time,
)
from trio.testing import MockClock, wait_all_tasks_blocked

import creche
from creche import (
    CrecheError,
    ExecutionEngine,
    Infrastructure,
    Journals,
    LimitExceededError,
    Limits,
    LogConflictError,
    RunContext,
    RunError,
    RunOutcome,
    ThreadDeletedError,
    ToolQuotas,
    open_journals,
    open_supervisor,
    tool,
)


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


async def talk(run: RunContext) -> str:
    """Say many things, each with the run's id, and let everybody else have a go in between."""
    for _ in range(10):
        await run.emit.text(f"{run.context.run_id}. ")
        await trio.sleep(0.1)
    return str(run.context.run_id)


class Small:
    """What an embedder has: infrastructure, and journals that engines share."""

    def __init__(self, made: Infrastructure, journals: Journals) -> None:
        self.made = made
        self.journals = journals

    async def execute(
        self, run: str, *, user: str = ADA, thread: str = THREAD, agent: str = "talk"
    ) -> RunOutcome:
        async with ExecutionEngine.create_user_engine(
            context(user, thread, run), infrastructure=self.made, journals=self.journals
        ) as engine:
            return await engine.execute_agent(agent, f"for {run}")


@contextlib.asynccontextmanager
async def small(store: TroubledStore, **more: Any) -> AsyncIterator[Small]:
    made = infrastructure(store=store, talk=talk, **more)
    async with open_journals(store, made.limits) as journals:
        yield Small(made, journals)


async def started_in_order(nursery: trio.Nursery, world: Small, *runs: str) -> None:
    for run in runs:
        nursery.start_soon(world.execute, run)
        await wait_all_tasks_blocked()


class TestOnOneThread:
    async def test_runs_have_their_turn_in_the_order_of_asking(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        runs = [f"run-{number}" for number in range(5)]
        async with small(store) as world, trio.open_nursery() as nursery:
            await started_in_order(nursery, world, *runs)
        log = await log_of(store)
        assert one_at_a_time(log) == runs
        speaking = None
        for event in log:
            speaking = event.get("runId", speaking)
            assert str(event.get("delta", speaking)).startswith(str(speaking))

    async def test_one_that_waits_is_told_what_those_before_it_said(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        heard: list[list[str]] = []

        async def listen(run: RunContext) -> None:
            heard.append([creche.text_of(message) for message in run.messages])
            await run.emit.text(f"answer {len(heard)}")
            await trio.sleep(1)

        async with small(store, listen=listen) as world, trio.open_nursery() as nursery:
            for run in ("run-a", "run-b"):

                async def execute(run: str = run) -> None:
                    await world.execute(run, agent="listen")

                nursery.start_soon(execute)
                await wait_all_tasks_blocked()
        assert heard == [["for run-a"], ["for run-a", "answer 1", "for run-b"]]

    async def test_a_wait_of_more_than_a_second_is_told_and_counted(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        outcomes: dict[str, RunOutcome] = {}

        async with small(store) as world, trio.open_nursery() as nursery:

            async def execute(run: str) -> None:
                outcomes[run] = await world.execute(run)

            for run in ("run-a", "run-b", "run-c"):
                nursery.start_soon(execute, run)
                await trio.sleep(0.3)
        waited = [outcomes[run].statistics.queue_ms for run in sorted(outcomes)]
        assert waited[0] == 0
        assert 600 < waited[1] < 1000 < waited[2]
        queued = [
            event["value"] for event in await log_of(store) if event.get("name") == "creche.queued"
        ]
        assert [value["position"] for value in queued] == [2], "of the third"

    async def test_one_that_is_cancelled_while_it_waits_leaves_nothing_and_is_in_nobodys_way(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with small(store) as world, trio.open_nursery() as nursery:
            given_up = trio.CancelScope()

            async def give_up() -> None:
                with given_up:
                    await world.execute("run-b")

            await started_in_order(nursery, world, "run-a")
            nursery.start_soon(give_up)
            await wait_all_tasks_blocked()
            await started_in_order(nursery, world, "run-c")
            given_up.cancel()
        assert given_up.cancelled_caught
        assert one_at_a_time(await log_of(store)) == ["run-a", "run-c"]
        assert {run.run_id for run in await store.runs(ADA, THREAD)} == {"run-a", "run-c"}

    @pytest.mark.parametrize("after", [0.0, 0.25])
    async def test_one_that_is_cancelled_at_work_hands_its_turn_on(
        self, autojump_clock: MockClock, store: TroubledStore, after: float
    ) -> None:
        async with small(store) as world, trio.open_nursery() as nursery:
            stopped = trio.CancelScope()

            async def stop() -> None:
                with stopped:
                    await world.execute("run-a")

            nursery.start_soon(stop)
            await wait_all_tasks_blocked()
            await started_in_order(nursery, world, "run-b")
            await trio.sleep(after)
            stopped.cancel()
        log = await log_of(store)
        assert one_at_a_time(log) == ["run-a", "run-b"]
        assert [event["type"] for event in log].count("RUN_FINISHED") == 2

    async def test_one_whose_start_is_refused_hands_its_turn_on(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with small(store) as world, trio.open_nursery() as nursery:
            await world.execute("run-a")

            async def again() -> None:
                with pytest.raises(CrecheError, match="'run-a' has been"):
                    await world.execute("run-a")

            nursery.start_soon(again)
            await started_in_order(nursery, world, "run-b")
        assert one_at_a_time(await log_of(store)) == ["run-a", "run-b"]

    async def test_engines_and_a_supervisor_over_the_same_journals_take_turns(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with small(store) as world:
            async with open_supervisor(world.made, world.journals, grace=60) as supervisor:
                async with trio.open_nursery() as nursery:
                    for number in range(3):
                        await started_in_order(nursery, world, f"attached-{number}")
                        await supervisor.start(
                            context(run=f"supervised-{number}"), "talk", "for all"
                        )
        order = one_at_a_time(await log_of(store))
        assert len(order) == 6
        assert [run for run in order if "super" in run] == [f"supervised-{n}" for n in range(3)]
        assert [run for run in order if "attach" in run] == [f"attached-{n}" for n in range(3)]

    async def test_one_that_waited_for_a_thread_that_was_deleted_is_told_so(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with small(store) as world, trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(ThreadDeletedError):
                    await world.execute("run-b")

            await started_in_order(nursery, world, "run-a")
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            async with world.journals.attached(ADA, THREAD) as journal:
                journal.delete()


class TestWithinARun:
    async def test_another_on_its_own_thread_is_refused_since_it_would_wait_for_itself(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        refused: list[CrecheError] = []

        async def nest(run: RunContext) -> None:
            async def deep() -> None:
                with pytest.raises(CrecheError, match=r"run\.spawn") as info:
                    await world.execute("run-b")
                refused.append(info.value)

            await deep()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deep)

        async with small(store, nest=nest) as world:
            with trio.fail_after(10):
                assert (await world.execute("run-a", agent="nest")).status == "success"
            assert (await world.execute("run-c")).status == "success"
        assert len(refused) == 2
        assert one_at_a_time(await log_of(store)) == ["run-a", "run-c"]

    async def test_another_on_another_thread_is_executed(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async def nest(run: RunContext) -> object:
            return (await world.execute("run-b", thread="thread-b")).result

        async with small(store, nest=nest) as world:
            assert (await world.execute("run-a", agent="nest")).result == "run-b"

    async def test_what_is_beside_it_in_the_same_task_tree_waits_and_is_not_refused(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with small(store) as world, trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.sleep(0.5)
                await world.execute("run-b")

            nursery.start_soon(later)  # a child of the task that executes run-a, not of run-a
            await world.execute("run-a")
        assert one_at_a_time(await log_of(store)) == ["run-a", "run-b"]


class TestElsewhere:
    @pytest.mark.parametrize(
        ("user", "thread"), [(ADA, "thread-b"), (BOB, THREAD)], ids=["thread", "user"]
    )
    async def test_nobody_waits(
        self, autojump_clock: MockClock, store: TroubledStore, user: str, thread: str
    ) -> None:
        """Two runs of a second each are over after one second, and were on at once."""
        async with small(store) as world:
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.execute, "run-a")

                async def other() -> None:
                    await world.execute("run-b", user=user, thread=thread)

                nursery.start_soon(other)
            assert trio.current_time() - began < 1.5
        assert one_at_a_time(await log_of(store)) == ["run-a"]
        there = await log_of(store, user, thread)
        assert one_at_a_time(there) == ["run-b"]
        assert all("run-a" not in str(event) for event in there)


class Alone:
    """Engines that are given no journals: each opens its own on the infrastructure's store."""

    def __init__(self, store: TroubledStore, **more: Any) -> None:
        self.made = infrastructure(store=store, talk=talk, **more)

    async def execute(
        self, run: str, *, user: str = ADA, thread: str = THREAD, agent: str = "talk"
    ) -> RunOutcome:
        async with ExecutionEngine.create_user_engine(
            context(user, thread, run), infrastructure=self.made
        ) as engine:
            return await engine.execute_agent(agent, f"for {run}")


class TestWithJournalsOfTheirOwn:
    async def test_engines_on_one_thread_have_their_block_one_after_the_other(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        world, outcomes = Alone(store), dict[str, RunOutcome]()
        runs = [f"run-{number}" for number in range(4)]

        async def execute(run: str) -> None:
            outcomes[run] = await world.execute(run)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for run in runs:
                    nursery.start_soon(execute, run)
                    await wait_all_tasks_blocked()
        assert one_at_a_time(await log_of(store)) == runs
        assert [outcomes[run].status for run in runs] == ["success"] * 4
        assert [round(outcomes[run].statistics.queue_ms, -3) for run in runs] == [
            *(0, 1000, 2000, 3000),
        ]
        assert len(world.made.turns) == 0

    async def test_one_that_is_cancelled_while_it_waits_leaves_nothing_and_is_in_nobodys_way(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        world = Alone(store)
        given_up = trio.CancelScope()

        async def give_up() -> None:
            with given_up:
                await world.execute("run-b")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.execute, "run-a")
            await wait_all_tasks_blocked()
            nursery.start_soon(give_up)
            await wait_all_tasks_blocked()
            nursery.start_soon(world.execute, "run-c")
            await wait_all_tasks_blocked()
            assert world.made.turns.wanted_by(ADA, THREAD) == 3
            given_up.cancel()
        assert given_up.cancelled_caught
        assert one_at_a_time(await log_of(store)) == ["run-a", "run-c"]
        assert {run.run_id for run in await store.runs(ADA, THREAD)} == {"run-a", "run-c"}
        assert len(world.made.turns) == 0

    @pytest.mark.parametrize(
        ("user", "thread"), [(ADA, "thread-b"), (BOB, THREAD)], ids=["thread", "user"]
    )
    async def test_nobody_waits_for_another_thread_or_user(
        self, autojump_clock: MockClock, store: TroubledStore, user: str, thread: str
    ) -> None:
        world = Alone(store)
        async with ExecutionEngine.create_user_engine(context(), infrastructure=world.made):
            with trio.fail_after(2):
                assert (await world.execute("run-b", user=user, thread=thread)).status == "success"

    async def test_in_the_same_task_and_within_the_run_it_is_refused(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        refused: list[CrecheError] = []

        async def refuse() -> None:
            with pytest.raises(CrecheError, match="within another's block") as info:
                await world.execute("run-b")
            refused.append(info.value)

        async def nest(run: RunContext) -> None:
            await refuse()

        world = Alone(store, nest=nest)
        with trio.fail_after(10):
            async with ExecutionEngine.create_user_engine(
                context(run="run-a"), infrastructure=world.made
            ) as engine:
                await refuse()
                assert (await engine.execute_agent("nest", "go")).status == "success"
            assert (await world.execute("run-c")).status == "success"
        assert len(refused) == 2
        assert one_at_a_time(await log_of(store)) == ["run-a", "run-c"]

    async def test_past_the_threads_limit_it_is_refused_and_audited(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with creche.open_audit(creche.MemorySink()) as audit:
            world = Alone(store)
            world.made = dataclasses.replace(
                world.made, limits=Limits(runs_per_thread=1), audit=audit
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.execute, "run-a")
                await wait_all_tasks_blocked()
                with pytest.raises(LimitExceededError, match="has 1 runs, of 1"):
                    await world.execute("run-b")
            (record,) = await audit.find(creche.AuditQuery(user=ADA))
            assert (record.kind, record.operation) == ("limit_hit", "execute an agent")


class TestTwoJournalsOfOneThread:
    """What nothing here can prevent: somebody else writes on the same store."""

    async def test_who_comes_second_is_told_at_once_and_does_not_hang(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        world, other = Alone(store), Alone(store)
        with trio.fail_after(10):
            async with ExecutionEngine.create_user_engine(
                context(run="run-a"), infrastructure=other.made
            ) as engine:
                await world.execute("run-b")
                with pytest.raises(LogConflictError, match="share `journals`"):
                    await engine.execute_agent("talk", "hi")
        assert one_at_a_time(await log_of(store)) == ["run-b"]
        told = [record for record in caplog.records if record.levelname == "ERROR"]
        assert [record.message.partition(";")[0] for record in told] == [
            "a thread's log was written by somebody else at the same time",
        ]

    async def test_a_supervisor_ends_its_run_and_goes_on_with_what_the_store_has(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        world = Alone(store)
        with trio.fail_after(30):
            async with open_supervisor(world.made, grace=60) as supervisor:
                async with supervisor.journals.attached(ADA, THREAD) as read:
                    await world.execute("run-a")
                    lost = await supervisor.start(context(run="run-b"), "talk", "hi")
                    with pytest.raises(RunError, match="has no end"):
                        await lost.ended()
                    with pytest.raises(LogConflictError):
                        await read.read(after=0)
                    run = await supervisor.start(context(run="run-c"), "talk", "hi")
                    assert (await run.ended()).status == "success"
        assert one_at_a_time(await log_of(store)) == ["run-a", "run-c"]

    async def test_a_store_that_is_away_is_waited_for_all_the_same(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        world = Alone(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.execute, "run-a")
            await trio.sleep(0.5)
            store.refuses = lambda _: True
            await trio.sleep(30)
            store.refuses = lambda _: False
        assert one_at_a_time(await log_of(store)) == ["run-a"]


class TestTooMany:
    async def test_past_the_threads_limit_it_is_refused_and_audited(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with creche.open_audit(creche.MemorySink()) as audit:
            made = Infrastructure(
                agents=infrastructure(talk=talk).registry,
                store=store,
                limits=Limits(runs_per_thread=2),
                audit=audit,
            )
            async with open_journals(store) as journals, trio.open_nursery() as nursery:
                world = Small(made, journals)
                await started_in_order(nursery, world, "run-a", "run-b")
                with pytest.raises(LimitExceededError, match="has 2 runs, of 2") as info:
                    await world.execute("run-c")
                assert info.value.retry_after == 1.0
            (record,) = await audit.find(creche.AuditQuery(user=ADA))
            assert (record.kind, record.operation) == ("limit_hit", "execute an agent")
        assert one_at_a_time(await log_of(store)) == ["run-a", "run-b"]


# --- quotas


@tool
async def ping() -> str:
    """Answer."""
    await trio.lowlevel.checkpoint()
    return "pong"


async def pings(run: RunContext) -> int:
    return sum([(await run.call_tool("ping", {})).ok for _ in range(5)])


class TestQuotas:
    async def test_engines_that_are_given_the_same_count_a_user_across_blocks_and_each_apart(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        limits = Limits(tool_calls_per_minute=8)
        made = infrastructure(store=store, tools=[ping], pings=pings, limits=limits)
        quotas = ToolQuotas(limits)
        granted: list[tuple[str, int]] = []
        for user in (ADA, ADA, BOB):
            async with ExecutionEngine.create_user_engine(
                context(user), infrastructure=made, quotas=quotas
            ) as engine:
                granted.append((user, (await engine.execute_agent("pings", "hi")).result))
        assert granted == [(ADA, 5), (ADA, 3), (BOB, 5)]

    async def test_a_supervisors_are_shared_with_engines_and_dispatchers_beside_it(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        limits = Limits(tool_calls_per_minute=8)
        made = infrastructure(store=store, tools=[ping], pings=pings, limits=limits)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "pings", "hi")
            assert (await run.ended()).result == 5
            async with ExecutionEngine.create_user_engine(
                context(),
                infrastructure=made,
                journals=supervisor.journals,
                quotas=supervisor.quotas,
            ) as engine:
                assert (await engine.execute_agent("pings", "hi")).result == 3
            async with creche.ToolDispatcher.create_scoped_dispatcher_context(
                context(), infrastructure=made, quotas=supervisor.quotas
            ) as dispatcher:
                assert not (await dispatcher.dispatch("ping", {})).ok


def test_the_check_of_the_order_can_fail() -> None:
    """What the tests above rest on finds two runs that speak at once."""
    started = [{"type": "RUN_STARTED", "runId": run} for run in ("a", "b")]
    ended = [{"type": "RUN_FINISHED", "runId": run} for run in ("a", "b")]
    assert one_at_a_time([started[0], ended[0], started[1], ended[1]]) == ["a", "b"]
    for wrong in ([*started, *ended], [started[0], ended[1]], started[:1], ended[:1]):
        with pytest.raises(AssertionError):
            one_at_a_time(wrong)
