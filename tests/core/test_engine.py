"""One run: what its agent may do to it, and the one terminal event that it ends with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
import trio
from tests.agui_rules import StockClient, check_history
from tests.small_world import (
    ADA,
    BOB,
    THREAD,
    Body,
    TroubledStore,
    context,
    hang,
    infrastructure,
    log_of,
    terminals_of,
    types_of,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    Commit,
    CrecheError,
    EmitterClosedError,
    ExecutionEngine,
    Infrastructure,
    LimitExceededError,
    Limits,
    Message,
    MessageId,
    ModelError,
    NewThread,
    RunContext,
    RunError,
    RunOutcome,
    StoppedTool,
    StoreUnavailableError,
    ToolCallId,
    UnknownAgentError,
    Usage,
    UserMessage,
    events,
    open_journals,
    open_supervisor,
    tool,
)
from creche._messages import as_messages
from creche._run_life import RunLife
from creche._run_rows import propose_run


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


async def executed(store: TroubledStore, body: Body, **more: Any) -> RunOutcome:
    """Execute an agent with that body on an engine of its own."""
    made = infrastructure(store=store, made=body, **more)
    async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
        return await engine.execute_agent("made", "hi")


async def check_the_log(store: TroubledStore) -> dict[str, Any]:
    """A stock client takes the log, its history is valid, and it has one terminal event: that."""
    log = await log_of(store)
    client = StockClient()
    client.take_all(log)
    assert client.is_tidy
    check_history([item.message for item in await store.messages(ADA, THREAD)])
    (terminal,) = terminals_of(log)
    assert terminal is log[-1]
    (record,) = await store.runs(ADA, THREAD)
    assert (record.first_seq, record.last_seq) == (1, len(log))
    assert record.ended_at is not None
    receipt = terminal["metadata"]["creche"]["receipt"]
    assert json.loads(json.dumps(record.receipt)) == receipt
    assert record.reason == receipt["reason"]
    return dict(terminal)


class TestSuccess:
    async def test_a_run_says_that_it_begins_and_that_it_succeeded(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> dict[str, int]:
            assert [message.content for message in run.messages] == ["hi"]
            assert (run.context.user_id, run.context.thread_id) == (ADA, THREAD)
            await run.emit.text("hello")
            await trio.sleep(2)
            return {"n": 1}

        outcome = await executed(store, body)
        assert (outcome.status, outcome.result, outcome.message) == ("success", {"n": 1}, None)
        assert (outcome.receipt.reason, outcome.receipt.run_ms) == ("success", 2000)
        assert (outcome.receipt.tasks_ended, outcome.receipt.tools_stopped) == (0, ())
        terminal = await check_the_log(store)
        assert terminal["outcome"] == {"type": "success"}
        assert terminal["result"] == {"n": 1}
        started = (await log_of(store))[0]
        assert started["input"]["messages"][0]["content"] == "hi"
        (record,) = await store.runs(ADA, THREAD)
        assert (record.status, record.agent) == ("success", "made")
        assert record.started_at is not None

    async def test_a_result_that_is_no_data_stays_in_the_process(
        self,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> object:
            return run

        outcome = await executed(store, body)
        assert isinstance(outcome.result, RunContext)
        assert "result" not in await check_the_log(store)

    async def test_a_result_is_shown_without_its_secrets(self, store: TroubledStore) -> None:
        async def body(run: RunContext) -> dict[str, str]:
            return {"api_key": "hunter2", "name": "ada"}

        await executed(store, body)
        assert (await check_the_log(store))["result"] == {"api_key": "[redacted]", "name": "ada"}

    async def test_an_agent_that_leaves_things_open_has_them_closed(
        self,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> None:
            call = ToolCallId("c")
            await run.emit.emit(events.StepStarted(step_name="plan"))
            await run.emit.text("half a sen")
            await run.emit.emit(events.ToolCallStart(tool_call_id=call, tool_call_name="add"))
            await run.emit.emit(events.SubagentStarted(subagent_run_id="s", name="x"))

        await executed(store, body)
        assert (await check_the_log(store))["type"] == "RUN_FINISHED"

    async def test_an_agent_that_has_ended_says_nothing_more(self, store: TroubledStore) -> None:
        kept: list[RunContext] = []

        async def body(run: RunContext) -> None:
            kept.append(run)

        await executed(store, body)
        with pytest.raises(EmitterClosedError):
            await kept[0].emit.text("a last word")
        await check_the_log(store)

    async def test_what_a_model_said_of_its_cost_is_added_up_whatever_it_said(
        self,
        store: TroubledStore,
    ) -> None:
        """Providers leave counts out; that must cost the run nothing, let alone the process."""

        async def body(run: RunContext) -> None:
            run.usage.append(("m", Usage(1, 2)))
            run.usage.append(("m", Usage(None, None)))  # type: ignore[arg-type]
            run.usage.append(("m", Usage(3, 4)))

        await executed(store, body)
        usage = (await check_the_log(store))["usage"]
        assert usage == [{"model": "m", "inputTokens": 4, "outputTokens": 6}]


ANYTHING: list[BaseException] = [
    ValueError("hunter2"),
    SystemExit(3),
    GeneratorExit(),
    asyncio.CancelledError(),
    StopIteration(),
    StopAsyncIteration(),
    MemoryError(),
    RecursionError(),
    BaseExceptionGroup("many", [ValueError("hunter2"), SystemExit(1)]),
    ExceptionGroup("deep", [ExceptionGroup("er", [OSError("hunter2")])]),
]


class TestBarrier:
    @pytest.mark.parametrize("error", ANYTHING, ids=lambda error: type(error).__name__)
    async def test_whatever_an_agent_raises_is_its_runs_failure(
        self,
        store: TroubledStore,
        error: BaseException,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def body(run: RunContext) -> None:
            await run.emit.text("so far")
            raise error

        outcome = await executed(store, body)
        assert (outcome.status, outcome.receipt.reason) == ("failed", "agent_failed")
        terminal = await check_the_log(store)
        assert (terminal["type"], terminal["code"]) == ("RUN_ERROR", "agent_failed")
        assert "hunter2" not in str(terminal)
        correlation = terminal["metadata"]["creche"]["correlation_id"]
        assert correlation in terminal["message"]
        (logged,) = (record for record in caplog.records if record.levelno == logging.ERROR)
        assert getattr(logged, "correlation_id") == correlation  # noqa: B009  set by `extra`
        assert logged.exc_info is not None

    @pytest.mark.parametrize("error", ANYTHING, ids=lambda error: type(error).__name__)
    async def test_whatever_a_task_of_an_agent_raises_is_its_runs_failure(
        self,
        store: TroubledStore,
        error: BaseException,
    ) -> None:
        async def bad() -> None:
            raise error

        async def body(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(bad)

        with trio.fail_after(5):
            assert (await executed(store, body)).status == "failed"
        await check_the_log(store)

    async def test_an_agent_that_cannot_be_made_is_a_failed_run(
        self,
        store: TroubledStore,
    ) -> None:
        class Unmakeable:
            def __init__(self) -> None:
                raise SystemExit(1)

            async def run(self, run: RunContext) -> None: ...

        made = infrastructure(store=store, bad=Unmakeable)
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            assert (await engine.execute_agent("bad", "hi")).status == "failed"
        await check_the_log(store)

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (RunError("The shop is closed."), "agent_failed", "The shop is closed."),
            (RunError("Closed.", code="closed"), "closed", "Closed."),
            (ModelError("Overloaded."), "model_failed", "Overloaded."),
            (LimitExceededError("Too much."), "limit_exceeded", "Too much."),
            (ExceptionGroup("x", [OSError(), RunError("Closed.")]), "agent_failed", "Closed."),
            (RunError("password=hunter2"), "agent_failed", "password=[redacted]"),
        ],
        ids=range(6),
    )
    async def test_a_run_errors_words_are_told_to_the_client(
        self,
        store: TroubledStore,
        error: Exception,
        code: str,
        message: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def body(run: RunContext) -> None:
            raise error

        outcome = await executed(store, body)
        terminal = await check_the_log(store)
        assert (terminal["code"], terminal["message"]) == (code, message)
        assert outcome.receipt.reason == code
        assert "hunter2" not in caplog.text

    @pytest.mark.parametrize(
        "error",
        [
            RunError(OSError("not a string")),  # type: ignore[arg-type]
            RunError("\ud83d half an emoji"),
            RunError("no", code=7),  # type: ignore[arg-type]
            type("Careless", (RunError,), {"__init__": lambda self: None})(),
        ],
        ids=["message is an error", "message is no unicode", "code is a number", "no message"],
    )
    async def test_a_faulty_run_error_is_a_failed_run_all_the_same(
        self,
        store: TroubledStore,
        error: RunError,
    ) -> None:
        """The terminal event is said outside the barrier: what cannot be said must not matter."""

        async def body(run: RunContext) -> None:
            raise error

        assert (await executed(store, body)).status == "failed"
        assert (await check_the_log(store))["type"] == "RUN_ERROR"

    @pytest.mark.parametrize(
        "said",
        [
            events.RunFinished(thread_id=THREAD, run_id=context().run_id),
            events.RunError(message="I say so"),
        ],
        ids=["RUN_FINISHED", "RUN_ERROR"],
    )
    async def test_an_agent_that_says_the_end_itself_does_not_end_more_than_its_run(
        self,
        store: TroubledStore,
        said: events.Event,
    ) -> None:
        async def body(run: RunContext) -> None:
            await run.emit.emit(said)

        outcome = await executed(store, body)
        assert outcome.status == "failed"
        assert (await check_the_log(store))["type"] == "RUN_ERROR"

    async def test_an_agent_that_says_what_has_no_json_is_a_failed_run(
        self,
        store: TroubledStore,
    ) -> None:
        """On the real clock: a writer that cannot come to an end would stop the fake one."""

        async def body(run: RunContext) -> None:
            await run.emit.custom("x", object())

        with trio.fail_after(5):
            assert (await executed(store, body)).status == "failed"
        await check_the_log(store)

    async def test_a_message_that_has_no_json_is_refused_and_starts_nothing(
        self,
        store: TroubledStore,
    ) -> None:
        made = infrastructure(store=store)
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            with pytest.raises((ValueError, CrecheError)):
                await engine.execute_agent("hello", "\ud83d half an emoji")
        assert await store.unfinished_runs() == []

    async def test_a_cancelled_that_nobody_asked_for_is_a_failure(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        """Kept from a scope that is over, and raised again: no success, and nobody else's end."""

        async def body(run: RunContext) -> None:
            kept: list[BaseException] = []
            with trio.move_on_after(1):
                try:
                    await trio.sleep_forever()
                except trio.Cancelled as error:
                    kept.append(error)
                    raise
            raise kept[0]

        outcome = await executed(store, body)
        assert outcome.status == "failed"
        await check_the_log(store)

    async def test_a_history_that_cannot_be_read_is_a_failed_run(
        self,
        store: TroubledStore,
    ) -> None:
        class Forgetful(TroubledStore):
            forgets = True

            async def messages(self, *owner: Any, **more: Any) -> Any:
                if self.forgets:
                    raise OSError("hunter2")
                return await super().messages(*owner, **more)

        forgetful = Forgetful()
        # The thread is there already: of a new one there is nothing to read.
        opens = NewThread(title="", epoch="e")
        await forgetful.commit([Commit(user_id=ADA, thread_id=THREAD, opens=opens)])
        with trio.fail_after(5):
            assert (await executed(forgetful, hang)).status == "failed"
        forgetful.forgets = False
        assert "hunter2" not in str(await check_the_log(forgetful))

    @pytest.mark.parametrize(
        "noted",
        ["x", ("m", "no usage"), ("m", Usage("a", "b")), (object(), Usage(1, 1)), ("m", None)],  # type: ignore[arg-type]
        ids=range(5),
    )
    async def test_whatever_an_agent_notes_of_its_cost_it_gets_its_end(
        self,
        store: TroubledStore,
        noted: Any,
    ) -> None:
        """`run.usage` is a list that anybody may append to, and it is read outside the barrier."""

        async def body(run: RunContext) -> None:
            run.usage.append(noted)

        assert (await executed(store, body)).status in {"success", "failed"}
        await check_the_log(store)

    async def test_whatever_an_agent_does_to_its_dispatcher_it_gets_its_end(
        self,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> None:
            run.tools.stopped.append(object())  # type: ignore[arg-type]

        assert (await executed(store, body)).status in {"success", "failed"}
        await check_the_log(store)


class TestLog:
    """What somebody at the terminal sees of ordinary work."""

    async def test_each_run_that_ended_is_a_line_of_its_figures(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def body(run: RunContext) -> None:
            run.usage.append(("m", Usage(1, 2)))
            run.usage.append(("n", Usage(1, 3)))
            await run.emit.text("nobody else's business")
            await run.call_tool("nothing", {})
            await trio.sleep(2)

        caplog.set_level(logging.INFO, logger="creche")
        await executed(store, body)
        (line,) = caplog.records
        assert (line.levelno, line.getMessage()) == (logging.INFO, "a run ended")
        figures = {name: vars(line)[name] for name in ("agent", "status", "ms", "tokens", "tools")}
        assert figures == {
            "agent": "made",
            "status": "success",
            "ms": 2000,
            "tokens": 5,
            "tools": 1,
        }
        assert vars(line)["user_id"] == ADA
        assert "business" not in str(vars(line))

    async def test_a_deadline_is_a_warning(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO, logger="creche")
        await executed(store, hang, limits=Limits(run_timeout=30))
        warned, ended = caplog.records
        assert (warned.levelno, warned.getMessage()) == (
            logging.WARNING,
            "a run took longer than 30 s",
        )
        assert vars(ended)["status"] == "cancelled (deadline)"


class TestDeadline:
    async def test_a_run_past_its_deadline_is_cancelled_with_that_reason(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        outcome = await executed(store, hang, limits=Limits(run_timeout=30))
        assert trio.current_time() == pytest.approx(30, abs=0.1)
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "deadline")
        assert outcome.receipt.run_ms == 30_000
        terminal = await check_the_log(store)
        assert (terminal["type"], terminal["outcome"]) == ("RUN_FINISHED", {"type": "cancelled"})

    async def test_an_agent_that_fails_because_its_time_is_over_was_cancelled(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        """As with any other reason: what a cleanup raises is logged, and does not rename it."""

        async def body(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                raise ValueError("boom") from None

        outcome = await executed(store, body, limits=Limits(run_timeout=30))
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "deadline")

    async def test_a_run_that_ends_in_time_is_no_deadlines_business(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> None:
            await trio.sleep(29)

        outcome = await executed(store, body, limits=Limits(run_timeout=30))
        assert outcome.status == "success"

    async def test_cleanup_after_a_deadline_has_its_allowance_and_no_more(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    await trio.sleep(3)
                async with run.cleanup():
                    await trio.sleep_forever()

        limits = Limits(run_timeout=30, cleanup_timeout=5)
        outcome = await executed(store, body, limits=limits)
        assert trio.current_time() == pytest.approx(35, abs=0.1)
        assert outcome.receipt.elapsed_ms == 5000


class TestWithoutASupervisor:
    async def test_an_unknown_agent_is_refused_before_anything_is_written(
        self,
        store: TroubledStore,
    ) -> None:
        made = infrastructure(store=store)
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            with pytest.raises(UnknownAgentError):
                await engine.execute_agent("nobody", "hi")
        assert store.attempts == []

    @pytest.mark.parametrize("nothing", [[], ()], ids=repr)
    async def test_an_empty_input_is_refused(self, store: TroubledStore, nothing: Any) -> None:
        made = infrastructure(store=store)
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            with pytest.raises(ValueError, match="at least one message"):
                await engine.execute_agent("hello", nothing)
        assert store.attempts == []

    async def test_messages_are_taken_as_they_are(self, store: TroubledStore) -> None:
        made = infrastructure(store=store)
        asked = [UserMessage(id=MessageId(f"m{n}"), content=f"question {n}") for n in range(2)]
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            await engine.execute_agent("hello", asked)
        stored = [item.message for item in await store.messages(ADA, THREAD)]
        assert stored[:2] == asked
        thread = await store.thread(ADA, THREAD)
        assert thread is not None
        assert thread.title == "question 0"

    async def test_a_store_that_refuses_the_start_leaves_nothing(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        store.refuses = lambda _: True
        made = infrastructure(store=store)
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            with pytest.raises(StoreUnavailableError):
                await engine.execute_agent("hello", "hi")
        store.refuses = lambda _: False
        assert await store.thread(ADA, THREAD) is None

    async def test_an_engine_executes_once_and_a_second_time_writes_nothing(
        self,
        store: TroubledStore,
    ) -> None:
        made = infrastructure(store=store)
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            await engine.execute_agent("hello", "hi")
            with pytest.raises(CrecheError, match="once"):
                await engine.execute_agent("hello", "again")
        (record,) = await store.runs(ADA, THREAD)
        assert record.status == "success"
        await check_the_log(store)

    async def test_cancelled_from_outside_it_still_commits_its_end(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        with trio.move_on_after(10) as scope:
            await executed(store, hang)
        assert scope.cancelled_caught
        assert trio.current_time() == pytest.approx(10, abs=0.1)
        terminal = await check_the_log(store)
        assert terminal["outcome"] == {"type": "cancelled"}
        assert terminal["metadata"]["creche"]["receipt"]["reason"] == "shutdown"

    async def test_cancelled_from_outside_its_end_is_committed_when_the_cancellation_gets_out(
        self,
        autojump_clock: MockClock,
    ) -> None:
        """Not by whoever closes the journals later: the next to look must find it."""

        class Slow(TroubledStore):
            async def commit(self, commits: Sequence[Commit]) -> None:
                await trio.sleep(0.5)
                await super().commit(commits)

        slow = Slow()
        made = infrastructure(store=slow)
        async with open_journals(slow) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                life = RunLife(context(), "hang")
                asked = as_messages("hi")
                await propose_run(journal, life, asked)

                async def history() -> Sequence[Message]:
                    return asked

                with trio.move_on_after(5) as scope:
                    await ExecutionEngine(life, made, journal).execute(asked, history)
                assert scope.cancelled_caught
                await check_the_log(slow)

    async def test_cancelled_from_outside_its_cleanup_has_its_allowance_and_no_more(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    await trio.sleep_forever()

        with trio.move_on_after(10):
            await executed(store, body, limits=Limits(cleanup_timeout=5, run_timeout=600))
        assert trio.current_time() == pytest.approx(15, abs=1)

    async def test_cancelled_while_its_start_is_being_committed_no_row_stays_without_an_end(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        store.hold()

        async def release_later() -> None:
            await trio.sleep(1)
            store.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(release_later)
            with trio.move_on_after(0.5):
                await executed(store, hang)
        assert await store.unfinished_runs() == []

    async def test_an_absent_store_does_not_hold_a_cancelled_run_for_ever(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(executed, store, hang)
                await trio.sleep(1)
                store.refuses = lambda _: True
        assert trio.current_time() <= 10 + 2 + 2 + 0.1


class TestCodeThatLeavesItsScopesOpen:
    """Trio tells the nursery of the task whose scopes are corrupt, so that must be the run's."""

    @staticmethod
    async def scope() -> AsyncGenerator[int]:
        with trio.CancelScope():
            yield 1
            yield 2

    @staticmethod
    async def nursery() -> AsyncGenerator[int]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            yield 1
            yield 2

    @pytest.mark.parametrize("kind", ["scope", "nursery"])
    @pytest.mark.parametrize("where", ["agent", "tool"])
    async def test_ends_its_own_run_only(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        kind: str,
        where: str,
    ) -> None:
        kept: list[AsyncGenerator[int]] = []

        async def leave() -> None:
            generator: AsyncGenerator[int] = getattr(self, kind)()
            kept.append(generator)
            async for _ in generator:
                break

        @tool(shared=(kept,))
        async def leaves_it_open() -> None:
            await leave()

        async def body(run: RunContext) -> None:
            if where == "agent":
                await leave()
            else:
                await run.call_tool("leaves_it_open", {})
            await run.emit.text("said")

        async def waits(run: RunContext) -> None:
            await trio.sleep(1)

        made = infrastructure(store=store, tools=[leaves_it_open], body=body, waits=waits)
        async with open_supervisor(made) as supervisor:
            neighbour = await supervisor.start(context(BOB), "waits", "hi")
            faulty = await supervisor.start(context(ADA), "body", "hi")
            with trio.fail_after(5):
                assert (await faulty.ended()).status in {"failed", "success"}
                assert (await neighbour.ended()).status == "success"
        for generator in kept:  # what it closes here is gone long since
            with contextlib.suppress(BaseException):
                await generator.aclose()
        await check_the_log(store)


class TestReceipt:
    async def test_a_cancelled_run_reports_what_it_left_behind(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        @tool
        async def dawdle() -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(2)

        async def body(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(run.call_tool, "dawdle", {})
                await trio.sleep(1)
                run._life.cancel("user")

        outcome = await executed(store, body, tools=[dawdle])
        receipt = outcome.receipt
        assert (outcome.status, receipt.reason) == ("cancelled", "user")
        assert receipt.tools_stopped == (StoppedTool(name="dawdle", how="cancelled"),)
        assert receipt.threads_abandoned == ()
        assert receipt.tasks_ended == 3, "the agent's and two of its own"
        assert (receipt.elapsed_ms, receipt.run_ms) == (2000, 3000)
        terminal = await check_the_log(store)
        assert terminal["metadata"]["creche"]["receipt"]["tools_stopped"] == [
            {"name": "dawdle", "how": "cancelled"}
        ]

    async def test_an_error_during_a_cancellation_is_logged_and_does_not_rename_the_end(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def fails_on_cancel() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("boom")

        async def body(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(fails_on_cancel)
                await trio.sleep(1)
                run._life.cancel("superseded")

        outcome = await executed(store, body)
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "superseded")
        assert any("boom" in str(record.exc_info) for record in caplog.records)
        await check_the_log(store)

    async def test_the_first_reason_stays(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> None:
            run._life.cancel("user")
            run._life.cancel("shutdown")
            await trio.sleep_forever()

        assert (await executed(store, body)).receipt.reason == "user"

    async def test_cleanup_that_began_before_the_cancel_is_cut_to_the_same_allowance(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        async def body(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:

                async def cancels() -> None:
                    await trio.sleep(10)
                    run._life.cancel("user")

                nursery.start_soon(cancels)
                async with run.cleanup() as scope:
                    await trio.sleep_forever()
                assert scope.cancelled_caught

        outcome = await executed(store, body, limits=Limits(cleanup_timeout=5))
        assert (outcome.status, outcome.receipt.elapsed_ms) == ("cancelled", 5000)


class TestShowing:
    async def test_a_run_has_not_ended_before_its_end_is_committed(
        self,
        autojump_clock: MockClock,
        store: TroubledStore,
    ) -> None:
        ended: list[RunOutcome] = []

        async def body(run: RunContext) -> None:
            store.hold()

        async def execute() -> None:
            ended.append(await executed(store, body))

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(execute)
                await trio.sleep(50)
                await wait_all_tasks_blocked()
                assert ended == []
                assert terminals_of(await log_of(store)) == []
                store.release()
        assert len(ended) == 1
        assert types_of(await log_of(store)) == ["RUN_STARTED", "RUN_FINISHED"]

    async def test_infrastructure_is_frozen(self) -> None:
        made = infrastructure()
        with pytest.raises(AttributeError):
            made.store = TroubledStore()  # type: ignore[misc]
        assert isinstance(made, Infrastructure)
