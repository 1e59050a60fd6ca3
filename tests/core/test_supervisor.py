"""Many runs of many users: none harms another, and each gets exactly one terminal event."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from tests.agui_rules import StockClient, check_history
from tests.small_world import (
    ADA,
    BOB,
    THREAD,
    LosingStore,
    TroubledStore,
    context,
    infrastructure,
    log_of,
    terminals_of,
    types_of,
    watch,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    Commit,
    CrecheError,
    DrainingError,
    LimitExceededError,
    Limits,
    MemoryStore,
    Run,
    RunContext,
    RunError,
    RunOutcome,
    StoreUnavailableError,
    Supervisor,
    ThreadDeletedError,
    ThreadId,
    ToolContext,
    UnknownAgentError,
    UserExecutionContext,
    UserId,
    events,
    open_supervisor,
    tool,
)
from creche.testing import ScriptedModel, open_pacer


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


async def check_everything(store: MemoryStore) -> None:
    """No run is left without its one terminal event, in a log and a history that others take."""
    assert await store.unfinished_runs() == []
    for user, thread in list(store._threads):
        log = await log_of(store, user, thread)
        runs: dict[str, list[dict[str, Any]]] = {}
        current = ""
        for event in log:
            current = event["runId"] if event["type"] == "RUN_STARTED" else current
            runs.setdefault(current, []).append(event)
        records = {run.run_id: run for run in await store.runs(user, thread)}
        assert set(runs) == set(records)
        for run_id, own in runs.items():
            client = StockClient()
            client.take_all(own)
            assert client.is_tidy
            (terminal,) = terminals_of(own)
            assert terminal is own[-1]
            assert (own[0]["seq"], terminal["seq"]) == (
                records[run_id].first_seq,  # type: ignore[index]
                records[run_id].last_seq,  # type: ignore[index]
            )
        check_history([item.message for item in await store.messages(user, thread)])


async def ended(*runs: Run) -> list[RunOutcome]:
    with trio.fail_after(1000):
        return [await run.ended() for run in runs]


async def lossy_for(store: LosingStore, seconds: float) -> None:
    store.cannot_be_read = seconds > 0
    await trio.sleep(seconds)
    store.cannot_be_read = False


class TestStarting:
    async def test_a_started_run_is_committed_listed_and_found_by_its_owner_only(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            run = await supervisor.start(context(run="run-a"), "hang", "hi")
            (record,) = await store.runs(ADA, THREAD)
            assert record.run_id == "run-a"
            assert supervisor.find(ADA, run.run_id) == run
            assert supervisor.find(BOB, run.run_id) is None
            assert supervisor.runs(ADA) == supervisor.runs(ADA, THREAD) == (run,)
            assert supervisor.runs(ADA, ThreadId("other")) == supervisor.runs(BOB) == ()
            assert supervisor.count == 1
            run.cancel()
            await ended(run)
            assert supervisor.find(ADA, run.run_id) is None
            assert supervisor.count == 0
        await check_everything(store)

    async def test_it_is_not_accepted_before_its_rows_are_committed(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        store.hold()
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            with trio.move_on_after(10) as waiting:
                await supervisor.start(context(), "hello", "hi")
            assert waiting.cancelled_caught
            store.release()
            with trio.fail_after(1):
                await supervisor.start(context(), "hello", "hi")
        await check_everything(store)

    @pytest.mark.parametrize(
        ("agent", "asked", "error"),
        [("nobody", "hi", UnknownAgentError), ("hello", [], ValueError)],
        ids=["unknown agent", "no message"],
    )
    async def test_what_cannot_be_started_is_refused_before_anything_is_written(
        self,
        store: TroubledStore,
        agent: str,
        asked: Any,
        error: type[Exception],
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            with pytest.raises(error):
                await supervisor.start(context(), agent, asked)
            assert supervisor.count == 0
        assert store.attempts == []

    @pytest.mark.parametrize("readable", [True, False], ids=["readable", "away for a while"])
    @pytest.mark.parametrize("at", ["its rows", "its events"])
    async def test_a_commit_whose_answer_is_lost_is_found_to_be_there(
        self,
        autojump_clock: MockClock,
        at: str,
        *,
        readable: bool,
    ) -> None:
        """Trying it again would say that it is there already, as if it were another's."""
        lossy = LosingStore()
        async with open_supervisor(infrastructure(store=lossy)) as supervisor:
            # Live before, so that only the writer asks the store.
            async with supervisor.journals.attached(ADA, THREAD):
                lossy.loses = lambda commit: bool(
                    commit.new_runs if at == "its rows" else commit.runs
                )
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lossy_for, lossy, 0 if readable else 3)
                    run = await supervisor.start(context(), "hello", "hi")
                    with trio.fail_after(10):
                        assert (await run.ended()).status == "success"
                assert lossy.lost == 1
                following = await supervisor.start(context(), "hello", "hi")
                assert (await following.ended()).status == "success"
        log = await log_of(lossy)
        assert len(terminals_of(log)) == 2

    async def test_one_after_the_block_is_refused_like_one_during_its_end(
        self,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            pass
        with pytest.raises(DrainingError):
            await supervisor.start(context(), "hello", "hi")

    async def test_a_start_that_the_store_refuses_leaves_nothing_and_the_next_one_works(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        store.refuses = lambda _: True
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            run = await supervisor.submit(context(), "hello", "hi")
            with pytest.raises(StoreUnavailableError):
                await run.accepted()
            with pytest.raises(RunError):
                await run.ended()
            assert supervisor.count == 0
            assert len(supervisor.journals) == 0
            store.refuses = lambda _: False
            assert await store.thread(ADA, THREAD) is None
            run = await supervisor.start(context(), "hello", "hi")
            assert (await ended(run))[0].status == "success"
        assert len(await store.runs(ADA, THREAD)) == 1
        await check_everything(store)

    async def test_a_store_that_cannot_be_read_refuses_the_start(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        store.cannot_be_read = True
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            with pytest.raises(StoreUnavailableError):
                await supervisor.start(context(), "hello", "hi")
            store.cannot_be_read = False
            await supervisor.start(context(), "hello", "hi")

    @pytest.mark.parametrize("held_for", [0.0, 5.0])
    async def test_a_start_that_is_cancelled_leaves_no_row_without_a_terminal_event(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        held_for: float,
    ) -> None:
        """Cancelled at each of its first steps in turn: the run goes on or was never there."""
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            for steps in range(12):
                store.hold()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        supervisor.start,
                        context(thread=f"thread-{steps}"),
                        "hello",
                        "hi",
                    )
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
                await trio.sleep(held_for)
                store.release()
            with trio.fail_after(60):
                await supervisor._empty()
        await check_everything(store)
        assert len(await store.threads(ADA)) >= 6, "those cancelled late go on"

    async def test_a_message_that_has_no_json_harms_nobody_else(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            other = await supervisor.start(context(BOB), "hang", "hi")
            try:
                run = await supervisor.start(context(), "hello", "half an emoji: \ud83d")
                assert (await ended(run))[0].status == "failed"
            except (CrecheError, ValueError):
                pass
            await trio.sleep(1)
            assert supervisor.runs(BOB) == (other,)
        await check_everything(store)

    async def test_a_run_id_that_is_live_is_refused(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            await supervisor.start(context(run="run-a"), "hang", "hi")
            with pytest.raises(CrecheError, match="run-a"):
                await supervisor.start(context(run="run-a"), "hang", "hi")
            with pytest.raises(CrecheError, match="run-a"):
                await supervisor.start(context(thread="other", run="run-a"), "hang", "hi")
            assert supervisor.count == 1
            await supervisor.start(context(BOB, run="run-a"), "hang", "another user's")
        await check_everything(store)

    async def test_a_run_id_twice_in_one_moment_is_refused_once(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        """A client that sends its request twice must not end the process."""
        refused: list[Exception] = []

        async def start() -> None:
            try:
                await supervisor.start(context(run="run-a"), "hello", "hi")
            except CrecheError as error:
                refused.append(error)

        async with open_supervisor(infrastructure(store=store)) as supervisor:
            other = await supervisor.start(context(BOB), "hang", "hi")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(start)
                nursery.start_soon(start)
            await trio.sleep(10)
            assert supervisor.runs(BOB) == (other,)
        assert len(refused) == 1
        await check_everything(store)

    async def test_a_run_id_that_was_used_is_refused_and_its_record_kept(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        """A run id is for one run: the record of the first is what somebody may still ask for."""
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            await ended(await supervisor.start(context(run="run-a"), "hello", "hi"))
            before = await store.runs(ADA, THREAD)
            with pytest.raises(CrecheError):
                await supervisor.start(context(run="run-a"), "hello", "again")
            assert await store.runs(ADA, THREAD) == before


class TestOrder:
    async def test_a_second_run_on_a_busy_thread_waits_for_its_turn(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        go_on = trio.Event()

        async def first(run: RunContext) -> None:
            await go_on.wait()
            await run.emit.text("answer one")

        async def second(run: RunContext) -> list[str | None]:
            return [message.content for message in run.messages]

        made = infrastructure(store=store, first=first, second=second)
        async with open_supervisor(made) as supervisor:
            one = await supervisor.start(context(), "first", "question one")
            two = await supervisor.start(context(), "second", "question two")
            three = await supervisor.start(context(), "hello", "question three")
            await wait_all_tasks_blocked()
            assert [run.status for run in (one, two, three)] == ["running", "queued", "queued"]
            records = await store.runs(ADA, THREAD)
            assert [record.status for record in records] == ["running", "queued", "queued"]
            go_on.set()
            outcomes = await ended(one, two, three)
        assert outcomes[1].result == ["question one", "answer one", "question two"]
        starts = [e["runId"] for e in await log_of(store) if e["type"] == "RUN_STARTED"]
        assert starts == [one.run_id, two.run_id, three.run_id]
        await check_everything(store)

    async def test_twenty_starts_keep_their_order(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            runs = [
                await supervisor.submit(context(), "hello", f"question {number}")
                for number in range(20)
            ]
            for run in runs:
                await run.accepted()
            await ended(*runs)
        asked = [run.run_id for run in runs]
        assert [e["runId"] for e in await log_of(store) if e["type"] == "RUN_STARTED"] == asked
        assert [record.run_id for record in await store.runs(ADA, THREAD)] == asked
        contents = [item.message.content for item in await store.messages(ADA, THREAD)]
        assert contents == [
            text for number in range(20) for text in (f"question {number}", "hello")
        ]
        await check_everything(store)

    async def test_other_threads_and_other_users_do_not_wait(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            await supervisor.start(context(), "hang", "hi")
            others = [
                await supervisor.start(context(thread="other"), "hello", "hi"),
                await supervisor.start(context(BOB), "hello", "hi"),
            ]
            begun = trio.current_time()
            assert [outcome.status for outcome in await ended(*others)] == ["success"] * 2
            assert trio.current_time() == begun
        await check_everything(store)

    async def test_the_same_thread_id_of_two_users_shares_nothing(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            ours = await supervisor.start(context(ADA), "hello", "the first canary")
            theirs = await supervisor.start(context(BOB), "hello", "the second canary")
            seen = str(await watch(supervisor, ours)), str(await watch(supervisor, theirs))
            await ended(ours, theirs)
        for user, shown, own, other in (
            (ADA, seen[0], "first", "second"),
            (BOB, seen[1], "second", "first"),
        ):
            for data in (shown, await log_of(store, user), await store.messages(user, THREAD)):
                assert f"the {own} canary" in str(data)
                assert f"the {other} canary" not in str(data)

    async def test_when_the_store_refuses_one_in_the_queue_the_next_has_its_turn(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            first = await supervisor.start(context(), "hang", "hi")
            store.refuses = lambda commit: any(run.run_id == "bad-run" for run in commit.new_runs)
            with pytest.raises(StoreUnavailableError):
                await supervisor.start(context(run="bad-run"), "hello", "hi")
            last = await supervisor.start(context(), "hello", "hi")
            first.cancel()
            assert (await ended(last))[0].status == "success"
        await check_everything(store)


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "made", "word"),
        [
            (Limits(runs_per_thread=2), lambda number: context(), "thread"),
            (Limits(runs_per_user=2), lambda number: context(thread=f"t-{number}"), "user"),
            (Limits(runs=2), lambda number: context(f"user-{number}"), "server"),
        ],
        ids=["thread", "user", "process"],
    )
    @pytest.mark.parametrize("together", [False, True], ids=["in turn", "in one moment"])
    async def test_past_a_limit_a_start_is_refused_until_one_has_ended(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        limits: Limits,
        made: Callable[[int], UserExecutionContext],
        word: str,
        together: bool,
    ) -> None:
        runs: list[Run] = []
        errors: list[LimitExceededError] = []

        async def start(number: int) -> None:
            try:
                runs.append(await supervisor.start(made(number), "hang", "hi"))
            except LimitExceededError as error:
                errors.append(error)

        async with open_supervisor(infrastructure(store=store, limits=limits)) as supervisor:
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    if together:
                        nursery.start_soon(start, number)
                    else:
                        await start(number)
            assert (len(runs), len(errors)) == (2, 1)
            assert word in errors[0].message
            assert errors[0].retry_after is not None
            for run in runs:
                run.cancel()
            await ended(*runs)
            await supervisor.start(made(0), "hello", "hi")
        await check_everything(store)

    async def test_a_run_that_says_too_much_fails_alone(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def flood(run: RunContext) -> None:
            while True:
                await run.emit.text("x" * 100)

        made = infrastructure(store=store, limits=Limits(run_bytes=50_000), flood=flood)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "flood", "hi")
            (outcome,) = await ended(run)
        assert (outcome.status, outcome.receipt.reason) == ("failed", "limit_exceeded")
        await check_everything(store)


HOSTILE: list[BaseException] = [
    ValueError("boom"),
    SystemExit(3),
    GeneratorExit(),
    asyncio.CancelledError(),
    StopAsyncIteration(),
    BaseExceptionGroup("many", [ValueError("boom"), SystemExit(1)]),
    RunError(OSError("not a string")),  # type: ignore[arg-type]
]


class TestIsolation:
    @pytest.mark.parametrize("error", HOSTILE, ids=lambda error: type(error).__name__)
    async def test_whatever_a_run_raises_the_others_go_on(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        error: BaseException,
    ) -> None:
        go_on = trio.Event()

        async def bad(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:

                async def raises() -> None:
                    await go_on.wait()
                    raise error

                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(raises)

        async def good(run: RunContext) -> None:
            await run.emit.text("before")
            await go_on.wait()
            await trio.sleep(5)
            await run.emit.text("after")

        made = infrastructure(store=store, bad=bad, good=good)
        async with open_supervisor(made) as supervisor:
            bystander = await supervisor.start(context(BOB), "good", "hi")
            run = await supervisor.start(context(), "bad", "hi")
            behind = await supervisor.start(context(), "hello", "hi")
            go_on.set()
            outcomes = await ended(run, behind, bystander)
        assert [outcome.status for outcome in outcomes] == ["failed", "success", "success"]
        await check_everything(store)

    async def test_a_keyboard_interrupt_from_a_tools_thread_harms_nobody_else(
        self,
        store: TroubledStore,
    ) -> None:
        """On the real clock, because of the thread."""

        @tool
        def bad() -> None:
            raise KeyboardInterrupt

        async def calls(run: RunContext) -> bool:
            return (await run.call_tool("bad", {})).ok

        made = infrastructure(store=store, tools=[bad], calls=calls)
        async with open_supervisor(made) as supervisor:
            other = await supervisor.start(context(BOB), "hang", "hi")
            run = await supervisor.start(context(), "calls", "hi")
            with trio.fail_after(5):
                assert (await run.ended()).result is False
            assert supervisor.runs(BOB) == (other,)
        await check_everything(store)

    @pytest.mark.parametrize(
        "said",
        [
            events.RunFinished(thread_id=THREAD, run_id=context().run_id),
            events.RunError(message="I say so"),
        ],
        ids=["RUN_FINISHED", "RUN_ERROR"],
    )
    async def test_an_agent_that_says_the_end_itself_harms_nobody_else(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        said: events.Event,
    ) -> None:
        async def bad(run: RunContext) -> None:
            await run.emit.emit(said)

        async with open_supervisor(infrastructure(store=store, bad=bad)) as supervisor:
            other = await supervisor.start(context(BOB), "hang", "hi")
            run = await supervisor.start(context(), "bad", "hi")
            assert (await ended(run))[0].status == "failed"
            assert supervisor.runs(BOB) == (other,)
        await check_everything(store)

    async def test_a_flooding_agent_lets_others_run_and_can_be_cancelled(
        self,
        store: TroubledStore,
    ) -> None:
        """On the real clock: a flood never lets the fake one move."""

        async def flood(run: RunContext) -> None:
            while True:
                await run.emit.custom("x", 1)

        made = infrastructure(store=store, limits=Limits(run_bytes=10**12), flood=flood)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "flood", "hi")
            with trio.fail_after(10):
                other = await supervisor.start(context(BOB), "hello", "hi")
                assert (await other.ended()).status == "success"
                assert run.status == "running"
                run.cancel()
                outcome = await run.ended()
        assert outcome.receipt.reason == "user"
        assert outcome.receipt.elapsed_ms < 1000
        await check_everything(store)

    async def test_one_threads_bad_row_harms_only_that_thread(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            bad = await supervisor.start(context(thread="bad"), "hello", "hi")
            store.refuses = lambda commit: commit.thread_id == "bad"
            others = [await supervisor.start(context(f"user-{n}"), "hello", "hi") for n in range(5)]
            outcomes = await ended(*others)
            assert [outcome.status for outcome in outcomes] == ["success"] * 5
            assert supervisor.find(ADA, bad.run_id) == bad
            store.refuses = lambda _: False
            assert (await ended(bad))[0].status == "success"
        await check_everything(store)


class TestCancelling:
    async def check_cancelled(
        self,
        store: TroubledStore,
        run: Run,
        reason: str = "user",
    ) -> dict[str, Any]:
        (outcome,) = await ended(run)
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", reason)
        record = await store.run(run.user_id, run.run_id)
        assert record is not None
        assert (record.status, record.reason) == ("cancelled", reason)
        await check_everything(store)
        terminal = terminals_of(await log_of(store, run.user_id, run.thread_id))[-1]
        assert terminal["outcome"] == {"type": "cancelled"}
        return dict(terminal["metadata"]["creche"]["receipt"])

    async def test_one_that_waits_in_the_queue_never_runs(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        ran = False

        async def runs(run: RunContext) -> None:
            nonlocal ran
            ran = True

        async with open_supervisor(infrastructure(store=store, runs=runs)) as supervisor:
            active = await supervisor.start(context(), "hang", "hi")
            queued = await supervisor.start(context(), "runs", "hi")
            queued.cancel("user")
            active.cancel("user")
            receipt = await self.check_cancelled(store, queued)
        assert not ran
        assert receipt["tasks_ended"] == 0

    async def test_one_in_the_queue_is_stored_at_once_and_said_in_its_turn(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            active = await supervisor.start(context(), "hang", "hi")
            queued = await supervisor.start(context(), "hello", "hi")
            queued.cancel("user")
            told = (await queued.concluded()).receipt
            record = await store.run(ADA, queued.run_id)
            assert record is not None
            assert (record.status, record.receipt) == ("cancelled", told.to_dict())
            said = {event.get("runId", active.run_id) for event in await log_of(store)}
            assert said == {active.run_id}, "nothing comes between another run's events"
            assert active.status == "running"
            active.cancel("user")
            assert (await queued.ended()).receipt == told
        ended = await store.run(ADA, queued.run_id)
        assert ended is not None
        assert ended.ended_at == record.ended_at
        terminal = terminals_of(await log_of(store))[-1]
        assert terminal["metadata"]["creche"]["receipt"] == {
            **told.to_dict(),
            "tools_stopped": [],
            "threads_abandoned": [],
            "processes_killed": [],
        }

    async def test_one_during_the_models_answer_keeps_what_was_said(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        from creche import ModelAgent  # noqa: PLC0415

        async with open_pacer() as pacer:
            made = infrastructure(
                store=store,
                models={"default": ScriptedModel(pacer)},
                chat=ModelAgent,
            )
            async with open_supervisor(made) as supervisor:
                run = await supervisor.start(context(), "chat", "tokens=10 delay_ms=100")
                await trio.sleep(0.35)
                run.cancel()
                await self.check_cancelled(store, run)
        said = (await store.messages(ADA, THREAD))[-1].message.content
        assert said == "tok0 tok1 tok2 "
        assert types_of(await log_of(store))[-2:] == ["TEXT_MESSAGE_END", "RUN_FINISHED"]

    async def test_one_during_a_tool_has_its_call_answered(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        cleaned_up = trio.Event()

        @tool
        async def slow() -> None:
            try:
                await trio.sleep_forever()
            finally:
                cleaned_up.set()

        async def calls(run: RunContext) -> None:
            await run.call_tool("slow", {})

        made = infrastructure(store=store, tools=[slow], calls=calls)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "calls", "hi")
            await trio.sleep(1)
            run.cancel()
            receipt = await self.check_cancelled(store, run)
        assert cleaned_up.is_set()
        assert receipt["tools_stopped"] == [{"name": "slow", "how": "cancelled"}]
        assert types_of(await log_of(store))[-2:] == ["TOOL_CALL_RESULT", "RUN_FINISHED"]

    async def test_a_thread_that_would_not_stop_is_named_in_the_receipt(
        self,
        store: TroubledStore,
    ) -> None:
        """On the real clock, because of the threads: one heeds its flag, the other does not."""
        let_go = threading.Event()
        both_begun = threading.Barrier(3)

        @tool
        def polite(ctx: ToolContext) -> None:
            both_begun.wait(10)
            ctx.stop.wait(30)

        @tool
        def stubborn() -> None:
            both_begun.wait(10)
            let_go.wait(30)

        async def calls(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.call_tool, "polite", {})
                nursery.start_soon(run.call_tool, "stubborn", {})

        limits = Limits(stop_timeout=0.1)
        made = infrastructure(store=store, tools=[polite, stubborn], calls=calls, limits=limits)
        try:
            async with open_supervisor(made) as supervisor:
                run = await supervisor.start(context(), "calls", "hi")
                await trio.to_thread.run_sync(both_begun.wait, 10)
                run.cancel()
                with trio.fail_after(5):
                    receipt = await self.check_cancelled(store, run)
        finally:
            let_go.set()
        assert sorted(receipt["tools_stopped"], key=lambda each: each["name"]) == [
            {"name": "polite", "how": "stopped"},
            {"name": "stubborn", "how": "abandoned"},
        ]
        (thread,) = receipt["threads_abandoned"]
        assert thread["name"] == "stubborn"
        since = datetime.fromisoformat(thread["since"])
        assert run.created_at <= since <= datetime.now(UTC)
        assert 100 <= receipt["elapsed_ms"] < 5000

    async def test_cleanup_is_not_interrupted_within_its_allowance(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        cleaned_up: list[float] = []

        async def tidy(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    await trio.sleep(3)
                    cleaned_up.append(trio.current_time())
                    await trio.sleep_forever()

        limits = Limits(cleanup_timeout=5)
        made = infrastructure(store=store, tidy=tidy, limits=limits)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "tidy", "hi")
            await trio.sleep(1)
            run.cancel()
            run.cancel()
            asked = trio.current_time()
            receipt = await self.check_cancelled(store, run)
        assert cleaned_up == [pytest.approx(asked + 3)]
        assert receipt["elapsed_ms"] == 5000

    async def test_its_end_is_seen_only_after_its_nursery_has_closed(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        over = 0.0

        async def slow_to_end(run: RunContext) -> None:
            nonlocal over
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(4)
                    await run.emit.text("last words")
                over = trio.current_time()

        async with open_supervisor(infrastructure(store=store, slow=slow_to_end)) as supervisor:
            run = await supervisor.start(context(), "slow", "hi")
            await trio.sleep(1)
            run.cancel()
            seen = await watch(supervisor, run)
            assert trio.current_time() == over == pytest.approx(5)
            assert isinstance(seen[-1], events.RunFinished)
            await self.check_cancelled(store, run)

    async def test_an_agent_that_swallows_its_cancellation_was_cancelled_all_the_same(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def stubborn(run: RunContext) -> str:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                return "fine"
            return "never"

        async with open_supervisor(infrastructure(store=store, stubborn=stubborn)) as supervisor:
            run = await supervisor.start(context(), "stubborn", "hi")
            await trio.sleep(1)
            run.cancel("disconnect")
            await self.check_cancelled(store, run, "disconnect")

    async def test_all_of_a_thread_can_be_cancelled_at_once(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            runs = [await supervisor.start(context(), "hang", "hi") for _ in range(5)]
            other = await supervisor.start(context(thread="other"), "hang", "hi")
            with trio.fail_after(10):
                await supervisor.cancel_thread(ADA, THREAD, "superseded")
            assert supervisor.runs(ADA) == (other,)
            for run in runs:
                assert run.outcome is not None
                assert run.outcome.receipt.reason == "superseded"
        await check_everything(store)

    async def test_cancelling_a_thread_whose_start_is_refused_is_no_error(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        store.hold()
        store.refuses = lambda _: True
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            await supervisor.submit(context(), "hang", "hi")
            await wait_all_tasks_blocked()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.cancel_thread, ADA, THREAD)
                await wait_all_tasks_blocked()
                store.release()

    async def test_a_cancel_after_the_end_changes_nothing(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            run = await supervisor.start(context(), "hello", "hi")
            await ended(run)
            run.cancel()
            assert run.status == "success"
            assert run.reason is None


class TestStoreOutage:
    async def test_a_run_is_not_said_to_be_over_before_its_end_is_committed(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        """By its handle neither: what is shown must never be lost."""

        async def answers(run: RunContext) -> None:
            await trio.sleep(1)
            store.refuses = lambda _: True

        async with open_supervisor(infrastructure(store=store, answers=answers)) as supervisor:
            run = await supervisor.start(context(), "answers", "hi")
            await trio.sleep(60)
            shown = [run.status]
            store.refuses = lambda _: False
            await ended(run)
            shown.append(run.status)
        assert shown == ["running", "success"]

    async def test_a_terminal_event_waits_for_the_store_and_the_thread_stays_busy(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def answers(run: RunContext) -> None:
            await run.emit.text("hello")
            store.refuses = lambda _: True

        async with open_supervisor(infrastructure(store=store, answers=answers)) as supervisor:
            run = await supervisor.start(context(), "answers", "hi")
            seen: list[events.Event] = []

            async def reads() -> None:
                seen.extend(await watch(supervisor, run))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reads)
                await trio.sleep(60)
                assert seen == []
                assert supervisor.runs(ADA, THREAD) == (run,)
                assert terminals_of(await log_of(store)) == []
                with pytest.raises(StoreUnavailableError):
                    await supervisor.start(context(), "hello", "hi")
                store.refuses = lambda _: False
                with trio.fail_after(6):
                    await run.ended()
            assert isinstance(seen[-1], events.RunFinished)
            assert supervisor.runs(ADA) == ()
        await check_everything(store)

    async def test_a_tool_result_is_not_shown_before_it_is_committed(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        @tool
        async def add() -> int:
            store.refuses = lambda _: True
            return 3

        async def calls(run: RunContext) -> None:
            await run.emit.text("first")
            await trio.sleep(1)
            await run.call_tool("add", {})
            await run.emit.text("then")

        made = infrastructure(store=store, tools=[add], calls=calls)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "calls", "hi")
            await trio.sleep(30)
            async with supervisor.journals.attached(ADA, THREAD) as journal:
                with trio.fail_after(1):
                    shown = [entry.event for entry in await journal.read(after=0)]
            assert isinstance(shown[-1], events.ToolCallEnd)
            store.refuses = lambda _: False
            await ended(run)
        await check_everything(store)

    async def test_a_run_that_is_far_ahead_of_the_store_waits_and_can_be_cancelled(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        said = 0

        async def talks(run: RunContext) -> None:
            nonlocal said
            while True:
                await run.emit.text("x" * 100)
                said += 1

        limits = Limits(uncommitted_bytes=10_000, run_bytes=10**9)
        made = infrastructure(store=store, talks=talks, limits=limits)
        async with open_supervisor(made) as supervisor:
            store.refuses = lambda commit: commit.chunk is not None and commit.chunk.last_seq > 9
            run = await supervisor.start(context(), "talks", "hi")
            await trio.sleep(30)
            stopped_at = said
            await trio.sleep(30)
            assert said == stopped_at < 110
            run.cancel()
            store.refuses = lambda _: False
            assert (await ended(run))[0].status == "cancelled"
        await check_everything(store)


class TestEnding:
    async def test_draining_refuses_new_runs_and_lets_the_others_finish(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def quick(run: RunContext) -> None:
            await trio.sleep(5)

        async with open_supervisor(infrastructure(store=store, quick=quick)) as supervisor:
            finishes = await supervisor.start(context(), "quick", "hi")
            hangs = await supervisor.start(context(BOB), "hang", "hi")
            async with trio.open_nursery() as nursery:
                begun = trio.current_time()

                async def drain() -> None:
                    await supervisor.drain(grace=8)

                nursery.start_soon(drain)
                await trio.sleep(1)
                assert supervisor.draining
                with pytest.raises(DrainingError):
                    await supervisor.start(context(), "hello", "hi")
            assert trio.current_time() - begun == pytest.approx(8, abs=0.1)
            outcomes = await ended(finishes, hangs)
        assert [outcome.status for outcome in outcomes] == ["success", "cancelled"]
        assert outcomes[1].receipt.reason == "shutdown"
        await check_everything(store)

    async def test_a_drain_ends_as_soon_as_nothing_runs(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def quick(run: RunContext) -> None:
            await trio.sleep(5)

        begun = trio.current_time()
        made = infrastructure(store=store, quick=quick)
        async with open_supervisor(made, grace=600) as supervisor:
            run = await supervisor.start(context(), "quick", "hi")
        assert trio.current_time() - begun == pytest.approx(5, abs=0.1)
        assert run.status == "success"

    async def test_a_cancelled_queue_ends_to_the_last_run(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            runs = [await supervisor.start(context(), "hang", "hi") for _ in range(5)]
        assert [run.status for run in runs] == ["cancelled"] * 5
        await check_everything(store)

    @pytest.mark.parametrize("how", ["left", "an error", "cancelled"])
    async def test_however_the_block_is_left_every_run_gets_its_end(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        how: str,
    ) -> None:
        runs: list[Run] = []

        async def tidy(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    await trio.sleep(3)
                    await run.emit.text("tidied up")

        async def body() -> None:
            made = infrastructure(store=store, tidy=tidy)
            async with open_supervisor(made, grace=30 if how != "left" else 0) as supervisor:
                runs.append(await supervisor.start(context(), "tidy", "hi"))
                runs.append(await supervisor.start(context(), "hello", "queued"))
                runs.append(await supervisor.start(context(BOB), "hang", "hi"))
                await trio.sleep(1)
                if how == "an error":
                    raise OSError("the server is broken")
                if how == "cancelled":
                    await trio.sleep_forever()

        begun = trio.current_time()
        if how == "an error":
            with pytest.raises(OSError, match="the server is broken"):
                await body()
        else:
            with trio.move_on_after(1 if how == "cancelled" else math.inf):
                await body()
        assert trio.current_time() - begun == pytest.approx(4, abs=0.2)
        assert [run.outcome.receipt.reason for run in runs if run.outcome] == ["shutdown"] * 3
        messages = [item.message.content for item in await store.messages(ADA, THREAD)]
        assert messages == ["hi", "tidied up", "queued"]
        await check_everything(store)

    async def test_leaving_is_bounded_though_a_run_will_not_end(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def overruns(run: RunContext) -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(60)

        made = infrastructure(store=store, overruns=overruns)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "overruns", "hi")
            await trio.sleep(1)
            with trio.fail_after(61):
                await supervisor.drain(grace=0)
        assert run.status == "cancelled"
        await check_everything(store)

    async def test_leaving_is_bounded_though_the_store_is_away(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            await supervisor.start(context(), "hang", "hi")
            await trio.sleep(1)
            store.refuses = lambda _: True
            begun = trio.current_time()
        assert trio.current_time() - begun <= 5 + 2 + 2 + 2 + 0.1

    async def test_a_start_in_the_moment_of_leaving_is_refused_or_has_its_end(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        """To say yes to a run that never was would be the worst of answers."""
        for delay in range(8):
            accepted: list[Run] = []

            async def start(supervisor: Supervisor, thread: str, into: list[Run]) -> None:
                with contextlib.suppress(CrecheError, RuntimeError):
                    into.append(await supervisor.start(context(thread=thread), "hello", "hi"))

            async with trio.open_nursery() as nursery:
                async with open_supervisor(infrastructure(store=store)) as supervisor:
                    nursery.start_soon(start, supervisor, f"thread-{delay}", accepted)
                    for _ in range(delay):
                        await trio.lowlevel.checkpoint()
            for run in accepted:
                assert await store.run(ADA, run.run_id) is not None
        await check_everything(store)

    async def test_accepted_is_no_yes_when_the_process_gave_up_before_the_commit(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        store.hold()
        answers: list[str] = []

        async def start(supervisor: Supervisor) -> None:
            try:
                await supervisor.start(context(), "hello", "hi")
                answers.append("yes")
            except CrecheError:
                answers.append("no")

        async with trio.open_nursery() as nursery:
            async with open_supervisor(infrastructure(store=store)) as supervisor:
                nursery.start_soon(start, supervisor)
                await wait_all_tasks_blocked()
        assert answers == ["no"]
        store.release()
        assert await store.unfinished_runs() == []


class TestReading:
    @pytest.mark.parametrize("journal_bytes", [100, 2000, 256 * 1024])
    async def test_a_reader_gets_exactly_what_follows_at_every_number(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        journal_bytes: int,
    ) -> None:
        """Three runs, one after another; readers come before, meanwhile and after the end."""

        @tool
        async def add() -> int:
            await trio.sleep(0.01)
            return 3

        async def talks(run: RunContext) -> None:
            for _ in range(4):
                await run.emit.text("word ")
                await trio.sleep(0.013)
            await run.call_tool("add", {})

        limits = Limits(journal_bytes=journal_bytes, read_entries=5)
        made = infrastructure(store=store, tools=[add], talks=talks, limits=limits)
        total = 3 * (1 + 1 + 4 + 4 + 1 + 1)
        seen: dict[tuple[str, int], list[int]] = {}

        async def follow(supervisor: Supervisor, name: str, after: int) -> None:
            own = seen[name, after] = []
            async with supervisor.journals.attached(ADA, THREAD) as journal:
                while after < total:
                    for entry in await journal.read(after=after):
                        own.append(entry.seq)
                        after = entry.seq

        with trio.fail_after(100):
            async with open_supervisor(made) as supervisor:
                async with trio.open_nursery() as nursery:
                    for after in range(total):
                        nursery.start_soon(follow, supervisor, "before", after)
                    for _ in range(3):
                        await supervisor.start(context(), "talks", "hi")
                    for after in range(total):
                        await trio.sleep(0.005)
                        nursery.start_soon(follow, supervisor, "meanwhile", after)
                assert supervisor.count == 0
                async with trio.open_nursery() as nursery:
                    for after in range(total):
                        nursery.start_soon(follow, supervisor, "after", after)
        for (name, after), seqs in seen.items():
            assert seqs == [*range(after + 1, total + 1)], (name, after)
        assert len(await log_of(store)) == total
        await check_everything(store)

    async def test_events_come_as_they_become_visible(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            got: list[str] = []

            async def reads() -> None:
                async with supervisor.open_events(ADA, THREAD) as entries:
                    async for entry in entries:
                        got.append(type(entry.event).__name__)
                        if isinstance(entry.event, events.TERMINAL):
                            break

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reads)
                await wait_all_tasks_blocked()
                await supervisor.start(context(), "hello", "hi")
        assert got == [
            "RunStarted",
            "TextMessageStart",
            "TextMessageContent",
            "TextMessageEnd",
            "RunFinished",
        ]

    async def test_a_watcher_of_an_idle_thread_is_woken_by_its_next_run(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            await ended(await supervisor.start(context(), "hello", "one"))
            end = len(await log_of(store))
            async with supervisor.journals.attached(ADA, THREAD) as journal:
                async with trio.open_nursery() as nursery:
                    woken: list[int] = []

                    async def reads() -> None:
                        woken.extend([e.seq for e in await journal.read(after=end)])

                    nursery.start_soon(reads)
                    await trio.sleep(60)
                    assert woken == []
                    await supervisor.start(context(), "hello", "two")
            assert woken[0] == end + 1


class TestDeleting:
    async def test_a_thread_goes_with_its_runs_and_its_readers_are_told(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            runs = [await supervisor.start(context(), "hang", "hi") for _ in range(3)]
            told = trio.Event()

            async def read_on() -> None:
                after = 0
                async with supervisor.journals.attached(ADA, THREAD) as journal:
                    while True:
                        after = (await journal.read(after=after))[-1].seq

            async def reads() -> None:
                with pytest.raises(ThreadDeletedError):
                    await read_on()
                told.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reads)
                await trio.sleep(1)
                with trio.fail_after(10):
                    assert await supervisor.delete_thread(ADA, THREAD) is True
                    await told.wait()
            assert [run.status for run in runs] == ["cancelled"] * 3
            assert supervisor.count == len(supervisor.journals) == 0
            assert await store.thread(ADA, THREAD) is None
            assert await supervisor.delete_thread(ADA, THREAD) is False
            again = await supervisor.start(context(), "hello", "anew")
            await ended(again)
            assert again.first_seq == 1
        await check_everything(store)

    async def test_anothers_thread_of_that_id_stays(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            theirs = await supervisor.start(context(BOB), "hang", "hi")
            assert await supervisor.delete_thread(ADA, THREAD) is False
            await ended(await supervisor.start(context(), "hello", "hi"))
            assert await supervisor.delete_thread(ADA, THREAD) is True
            assert supervisor.find(BOB, theirs.run_id) == theirs
            assert await store.thread(BOB, THREAD) is not None

    async def test_starts_that_keep_coming_do_not_resurrect_half_a_thread(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(_start_quietly, supervisor, number)
                    if number == 10:
                        nursery.start_soon(supervisor.delete_thread, ADA, THREAD)
                    await trio.lowlevel.checkpoint()
            with trio.fail_after(100):
                await supervisor._empty()
        await check_everything(store)


async def _start_quietly(supervisor: Supervisor, number: int) -> None:
    await supervisor.start(context(), "hello", f"question {number}")


@pytest.mark.parametrize("seed", range(25))
async def test_any_mix_of_runs_cancels_and_outages_ends_in_order(
    autojump_clock: MockClock,
    seed: int,
) -> None:
    """Seeded: two users, three threads, agents that talk, call, fail and hang, cancels, outages."""
    import random  # noqa: PLC0415

    chance = random.Random(seed)
    store = TroubledStore()

    @tool
    async def add(a: int) -> int:
        await trio.sleep(a / 100)
        return a

    async def talks(run: RunContext) -> None:
        for _ in range(chance.randrange(8)):
            await run.emit.text("x" * chance.randrange(30))
            if chance.random() < 0.3:
                await run.call_tool(chance.choice(["add", "none"]), {"a": chance.randrange(9)})
            await trio.sleep(chance.random() / 50)
        if chance.random() < 0.3:
            raise chance.choice([ValueError("boom"), SystemExit(1), asyncio.CancelledError()])

    limits = Limits(journal_bytes=300, commit_bytes=500, uncommitted_bytes=400)
    made = infrastructure(store=store, tools=[add], talks=talks, limits=limits)
    runs: list[Run] = []
    async with open_supervisor(made, grace=chance.choice([0, 1])) as supervisor:
        for _ in range(30):
            user, thread = chance.choice([(ADA, "t-5"), (ADA, "t-6"), (BOB, "t-5")])
            action = chance.random()
            if action < 0.6:
                try:
                    agent = chance.choice(["talks", "talks", "hello", "hang"])
                    with trio.move_on_after(chance.choice([math.inf, 0.001])):
                        runs.append(await supervisor.start(context(user, thread), agent, "hi"))
                except StoreUnavailableError:
                    pass
            elif action < 0.8 and runs:
                chance.choice(runs).cancel(chance.choice(["user", "disconnect"]))
            elif action < 0.9:
                bad = chance.choice(["t-5", "t-6"])

                def refuses(commit: Commit, bad: str = bad) -> bool:
                    return commit.thread_id == bad

                store.refuses = refuses
            else:
                store.refuses = lambda _: False
            await trio.sleep(chance.random() / 20)
        store.refuses = lambda _: False
    for run in runs:
        assert run.outcome is not None
        assert run.status in {"success", "cancelled", "failed"}
    await check_everything(store)
    assert {UserId(user) for user, _ in store._threads} <= {ADA, BOB}
