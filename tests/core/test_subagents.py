"""Sub-agents: a part of their parent's run, in its task tree, on its bill, in its words."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ag_ui.core.events
import pydantic
import pytest
import trio
from tests.agui_rules import StockClient, check_history
from tests.small_world import (
    ADA,
    THREAD,
    agent_of,
    context,
    infrastructure,
    log_of,
    terminals_of,
    types_of,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    EmitterClosedError,
    GrammarError,
    LimitExceededError,
    Limits,
    MemoryStore,
    RunContext,
    RunError,
    RunOutcome,
    Step,
    StopFlag,
    StoppedTool,
    SubagentFailedError,
    SubagentResult,
    ToolCallId,
    ToolContext,
    UnknownAgentError,
    Usage,
    UserMessage,
    events,
    open_supervisor,
    text_of,
    tool,
)

# The protocol's own package: whether each event has the shape that it prescribes.
PACKAGE: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ag_ui.core.events.Event)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def executed(
    store: MemoryStore, cancel_after: float | None = None, **more: Any
) -> RunOutcome:
    """Execute the agent `made`, beside which there are the others; check what a client sees."""
    made = infrastructure(store=store, **more)
    async with open_supervisor(made) as supervisor:
        with trio.fail_after(1000):
            run = await supervisor.start(context(), "made", "hi")
            if cancel_after is not None:
                await trio.sleep(cancel_after)
                run.cancel()
            outcome = await run.ended()
    log = await log_of(store)
    client = StockClient()
    client.take_all(log)
    assert client.is_tidy
    for event in log:
        PACKAGE.validate_python({key: event[key] for key in event if key != "seq"})
    assert terminals_of(log) == [log[-1]]
    check_history([item.message for item in await store.messages(ADA, THREAD)])
    return outcome


def of(log: Sequence[dict[str, Any]], subagent: str | None) -> list[dict[str, Any]]:
    """What was said in that sub-agent's name, its own beginning and end included."""
    return [event for event in log if event.get("subagentRunId") == subagent]


async def echo(run: RunContext) -> dict[str, str]:
    """Says what it was asked, in two messages, of which the second counts."""
    await run.emit.text("well... ")
    await run.emit.begin_text()
    await run.emit.text("you said ")
    await run.emit.text(text_of(run.messages[-1]))
    return {"heard": text_of(run.messages[-1]), "api_key": "hunter2"}


async def fail(run: RunContext) -> None:
    await run.emit.text("so far")
    raise RunError("The shop is closed.", code="closed")


async def doze(run: RunContext) -> None:
    await run.emit.text("zzz")
    await trio.sleep_forever()


class TestOne:
    async def test_it_answers_in_its_own_voice_within_its_parents_run(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> SubagentResult:
            await run.emit.text("I ask.")
            result = await run.spawn("echo", "hello")
            await run.emit.text(" It answered.")
            return result

        outcome = await executed(store, made=made, echo=echo)
        result = outcome.result
        assert isinstance(result, SubagentResult)
        assert (result.ok, result.status, result.agent) == (True, "success", "echo")
        assert (result.text, result.result["heard"]) == ("you said hello", "hello")
        assert (result.error, result.code) == (None, None)
        log = await log_of(store)
        started = next(event for event in log if event["type"] == "SUBAGENT_STARTED")
        assert (started["name"], started["description"]) == ("echo", "Made by a test.")
        assert "parentSubagentRunId" not in started
        said = of(log, started["subagentRunId"])
        assert types_of(said) == [
            "SUBAGENT_STARTED",
            "TEXT_MESSAGE_START",
            "TEXT_MESSAGE_CONTENT",
            "TEXT_MESSAGE_END",
            "TEXT_MESSAGE_START",
            "TEXT_MESSAGE_CONTENT",
            "TEXT_MESSAGE_CONTENT",
            "TEXT_MESSAGE_END",
            "SUBAGENT_FINISHED",
        ]
        assert said[-1]["result"] == {"heard": "hello", "api_key": "[redacted]"}

    async def test_it_has_a_context_messages_and_tools_of_its_own(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        seen: list[RunContext] = []
        called_by: list[Any] = []

        @tool(shared=(called_by,))
        async def shared(who: ToolContext) -> str:
            called_by.append(who.context)
            return "ok"

        async def look(run: RunContext) -> None:
            seen.append(run)
            assert (await run.call_tool("shared", {})).ok
            assert not (await run.call_tool("none of its own", {})).ok

        async def made(run: RunContext) -> None:
            seen.append(run)
            asked = [UserMessage(id=run.messages[0].id, content="only this")]
            assert (await run.spawn("look", asked)).ok
            assert not (await run.call_tool("shared", {})).ok

        outcome = await executed(
            store,
            made=agent_of(made),
            look=agent_of(look, (shared,)),
        )
        assert outcome.status == "success"
        parent, child = seen
        assert child.context.parent is parent.context
        assert child.context.request_id != parent.context.request_id
        assert child.context.run_id == parent.context.run_id
        assert (child.context.depth, child.context.operation) == (1, "agent look")
        assert [message.content for message in child.messages] == ["only this"]
        assert child.emit is not parent.emit
        assert child.tools is not parent.tools
        assert called_by == [child.context]
        (call, unknown) = (
            e
            for e in await log_of(store)
            if e["type"] == "TOOL_CALL_RESULT" and "subagentRunId" in e
        )
        assert call["subagentRunId"] == unknown["subagentRunId"] == child.context.request_id

    async def test_each_gets_an_instance_of_its_own(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        instances: list[object] = []

        class Counts:
            shared = (instances,)

            def __init__(self) -> None:
                self.count = 0

            async def run(self, run: RunContext) -> int:
                instances.append(self)
                self.count += 1
                return self.count

        async def made(run: RunContext) -> list[int]:
            return [(await run.spawn("counts", "x")).result for _ in range(3)]

        assert (await executed(store, made=made, counts=Counts)).result == [1, 1, 1]
        assert len(set(map(id, instances))) == 3

    async def test_its_words_are_no_part_of_the_threads_conversation(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        """The next model call would otherwise read one assistant in many voices."""

        @tool
        async def add(a: int) -> int:
            return a

        async def calls(run: RunContext) -> None:
            await run.emit.text("inner")
            await run.call_tool("add", {"a": 1})

        async def made(run: RunContext) -> None:
            await run.emit.text("outer ")
            await run.spawn("calls", "x")
            await run.emit.text("still outer")

        outcome = await executed(store, made=made, calls=agent_of(calls, (add,)))
        assert outcome.statistics.tool_calls == 1
        stored = [text_of(item.message) for item in await store.messages(ADA, THREAD)]
        assert stored == ["hi", "outer still outer"]

    async def test_one_below_another_names_it_as_its_parent(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def middle(run: RunContext) -> str:
            await run.emit.text("middle")
            inner = await run.spawn("echo", "deep")
            return inner.text

        async def made(run: RunContext) -> SubagentResult:
            return await run.spawn("middle", "x")

        result = (await executed(store, made=made, middle=middle, echo=echo)).result
        assert (result.result, result.text) == ("you said deep", "middle")
        outer, inner = (e for e in await log_of(store) if e["type"] == "SUBAGENT_STARTED")
        assert inner["parentSubagentRunId"] == outer["subagentRunId"]
        assert "parentSubagentRunId" not in outer

    async def test_what_it_leaves_open_is_closed_before_it_ends(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def untidy(run: RunContext) -> None:
            call = ToolCallId("c")
            await run.emit.emit(events.StepStarted(step_name="plan"))
            await run.emit.emit(events.SubagentStarted(subagent_run_id="by-hand", name="x"))
            await run.emit.text("half a sen")
            await run.emit.emit(events.ToolCallStart(tool_call_id=call, tool_call_name="add"))

        async def made(run: RunContext) -> None:
            await run.emit.emit(events.StepStarted(step_name="plan"))
            await run.emit.text("mine")
            assert (await run.spawn("untidy", "x")).ok
            await run.emit.text(" is still open")

        assert (await executed(store, made=made, untidy=untidy)).status == "success"
        log = await log_of(store)
        ended = types_of(log).index("SUBAGENT_FINISHED")
        assert types_of(log)[ended - 5 : ended] == [
            "TOOL_CALL_END",
            "TOOL_CALL_RESULT",
            "TEXT_MESSAGE_END",
            "SUBAGENT_ERROR",
            "STEP_FINISHED",
        ]
        assert all(event.get("subagentRunId") for event in log[ended - 5 : ended])


ANYTHING: list[BaseException] = [
    ValueError("hunter2"),
    SystemExit(3),
    GeneratorExit(),
    asyncio.CancelledError(),
    StopIteration(),
    BaseExceptionGroup("many", [ValueError("hunter2"), SystemExit(1)]),
]


class TestFailure:
    async def test_a_failure_is_a_result_with_words_and_its_parent_goes_on(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> SubagentResult:
            result = await run.spawn("fail", "x")
            await run.emit.text(f"It could not: {result.error}")
            return result

        outcome = await executed(store, made=made, fail=fail)
        assert outcome.status == "success"
        result = outcome.result
        assert (result.ok, result.status, result.text) == (False, "failed", "so far")
        assert (result.error, result.code) == ("The shop is closed.", "closed")
        (error,) = (e for e in await log_of(store) if e["type"] == "SUBAGENT_ERROR")
        assert (error["message"], error["code"]) == ("The shop is closed.", "closed")

    @pytest.mark.parametrize("error", ANYTHING, ids=lambda error: type(error).__name__)
    async def test_whatever_it_raises_is_its_own_failure_and_nothing_of_it_is_told(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
        error: BaseException,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        children: list[RunContext] = []

        async def bad(run: RunContext) -> None:
            children.append(run)
            raise error

        async def made(run: RunContext) -> SubagentResult:
            return await run.spawn("bad", "x")

        outcome = await executed(store, made=made, bad=bad)
        assert (outcome.status, outcome.result.code) == ("success", "agent_failed")
        assert "hunter2" not in str(await log_of(store))
        correlation = children[0].context.correlation_id
        assert correlation in outcome.result.error
        assert correlation in [getattr(record, "correlation_id", "") for record in caplog.records]

    async def test_one_that_cannot_even_be_made_has_failed(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        class Unmakeable:
            def __init__(self) -> None:
                raise SystemExit(1)

            async def run(self, run: RunContext) -> None: ...

        async def made(run: RunContext) -> SubagentResult:
            return await run.spawn("bad", "x")

        assert (await executed(store, made=made, bad=Unmakeable)).result.status == "failed"

    async def test_a_parent_may_ask_for_a_failure_to_be_raised(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> None:
            with pytest.raises(SubagentFailedError, match="closed"):
                await run.spawn("fail", "x", raises=True)
            assert (await run.spawn("hello", "x", raises=True)).ok
            await run.spawn("fail", "x", raises=True)

        outcome = await executed(store, made=made, fail=fail)
        assert (outcome.status, outcome.receipt.reason) == ("failed", "closed")
        assert outcome.message == "The shop is closed."

    async def test_an_unknown_agent_or_an_empty_input_is_refused_and_nothing_is_said(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> None:
            with pytest.raises(UnknownAgentError):
                await run.spawn("nobody", "x")
            with pytest.raises(ValueError, match="at least one message"):
                await run.spawn("hello", [])

        outcome = await executed(store, made=made)
        assert outcome.status == "success"
        assert types_of(await log_of(store)) == ["RUN_STARTED", "RUN_FINISHED"]
        assert outcome.statistics.subagents == 0


class TestVoice:
    async def test_one_that_has_ended_says_nothing_more(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        kept: list[RunContext] = []

        async def keeps(run: RunContext) -> None:
            kept.append(run)

        async def made(run: RunContext) -> None:
            await run.spawn("keeps", "x")
            for event in (events.Custom(name="x", value=1), events.StepStarted(step_name="x")):
                with pytest.raises(EmitterClosedError):
                    await kept[0].emit.emit(event)
            with pytest.raises(EmitterClosedError):
                await kept[0].emit.text("a last word")

        assert (await executed(store, made=made, keeps=keeps)).status == "success"
        assert "CUSTOM" not in types_of(await log_of(store))

    async def test_it_cannot_speak_for_its_parent_nor_for_another_nor_end_itself(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        ids: list[str] = []
        both = trio.Event()

        async def speaks(run: RunContext) -> None:
            ids.append(run.context.request_id)
            if len(ids) == 2:
                both.set()
            await both.wait()
            (other,) = set(ids) - {run.context.request_id}
            own = run.context.request_id
            for refused in (
                events.Custom(name="x", value=1, subagent_run_id=other),
                events.SubagentStarted(subagent_run_id="s", name="x", parent_subagent_run_id=other),
                events.SubagentFinished(subagent_run_id=other),
                events.SubagentFinished(subagent_run_id=own),
                events.SubagentError(subagent_run_id=own, message="no"),
                events.RunError(message="no"),
            ):
                with pytest.raises(GrammarError):
                    await run.emit.emit(refused)
            await run.emit.custom("mine", 1)

        async def made(run: RunContext) -> None:
            results = await run.parallel([Step(agent="speaks", input="x")] * 2)
            assert [result.status for result in results] == ["success"] * 2

        assert (await executed(store, made=made, speaks=speaks)).status == "success"
        custom = [event for event in await log_of(store) if event["type"] == "CUSTOM"]
        assert sorted(event["subagentRunId"] for event in custom) == sorted(ids)

    async def test_many_may_speak_at_once_and_each_keeps_its_words(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def counts(run: RunContext) -> None:
            for number in range(5):
                await run.emit.text(f"{text_of(run.messages[0])}{number} ")
                await trio.sleep(1)

        async def made(run: RunContext) -> list[str]:
            texts: dict[str, str] = {}

            async def ask(name: str) -> None:
                texts[name] = (await run.spawn("counts", name)).text

            async with trio.open_nursery() as nursery:
                for name in "abc":
                    nursery.start_soon(ask, name)
                await run.emit.text("and I speak, too")
            return [texts[name] for name in "abc"]

        texts = (await executed(store, made=made, counts=counts)).result
        assert texts == [" ".join(f"{name}{n}" for n in range(5)) + " " for name in "abc"]
        stored = [text_of(item.message) for item in await store.messages(ADA, THREAD)]
        assert stored == ["hi", "and I speak, too"]


class TestCancel:
    async def test_a_cancel_of_the_run_ends_its_sub_agents_and_their_tools(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        ended: list[str] = []

        @tool
        async def dawdle() -> None:
            await trio.sleep_forever()

        async def busy(run: RunContext) -> None:
            try:
                await run.call_tool("dawdle", {})
            finally:
                ended.append(text_of(run.messages[0]))

        async def made(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.spawn, "busy", "a")
                nursery.start_soon(run.spawn, "busy", "b")

        outcome = await executed(store, cancel_after=3, made=made, busy=agent_of(busy, (dawdle,)))
        assert (outcome.status, outcome.receipt.reason) == ("cancelled", "user")
        assert sorted(ended) == ["a", "b"]
        assert outcome.receipt.tools_stopped == (
            StoppedTool(name="dawdle", how="cancelled"),
            StoppedTool(name="dawdle", how="cancelled"),
        )
        assert outcome.receipt.tasks_ended == 3
        errors = [e for e in await log_of(store) if e["type"] == "SUBAGENT_ERROR"]
        assert [error["code"] for error in errors] == ["cancelled", "cancelled"]

    async def test_one_that_is_cancelled_alone_is_told_as_stopped_and_its_parent_goes_on(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> None:
            with trio.move_on_after(2) as scope:
                await run.spawn("doze", "x")
            assert scope.cancelled_caught
            assert (await run.spawn("hello", "x")).ok

        assert (await executed(store, made=made, doze=doze)).status == "success"
        types = types_of(await log_of(store))
        assert (types.count("SUBAGENT_ERROR"), types.count("SUBAGENT_FINISHED")) == (1, 1)

    async def test_its_cleanup_has_the_runs_allowance(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def cleans(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    await trio.sleep_forever()

        async def made(run: RunContext) -> None:
            await run.spawn("cleans", "x")

        outcome = await executed(
            store, cancel_after=1, made=made, cleans=cleans, limits=Limits(cleanup_timeout=4)
        )
        assert outcome.receipt.elapsed_ms == 4000

    async def test_a_threads_stop_flag_is_set_for_a_sub_agents_tool(
        self,
        store: MemoryStore,
    ) -> None:
        """On the real clock: the fake one does not wait for threads."""
        flags: list[StopFlag] = []
        begun = trio.Event()

        @tool(shared=(flags,))
        def stubborn(who: ToolContext) -> None:
            flags.append(who.stop)
            trio.from_thread.run_sync(begun.set)
            who.stop.wait(10)

        async def busy(run: RunContext) -> None:
            await run.call_tool("stubborn", {})

        async def made(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.spawn, "busy", "x")
                await begun.wait()
                run._life.cancel("user")

        outcome = await executed(store, made=made, busy=agent_of(busy, (stubborn,)))
        assert outcome.status == "cancelled"
        assert bool(flags[0])
        assert outcome.receipt.tools_stopped == (StoppedTool(name="stubborn", how="stopped"),)


class TestLimits:
    async def test_sub_agents_go_ten_levels_deep_and_the_eleventh_is_refused(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        depths: list[int] = []

        async def made(run: RunContext) -> SubagentResult:
            depths.append(run.context.depth)
            return await run.spawn("made", "deeper", raises=True)

        outcome = await executed(store, made=made, limits=Limits(subagent_depth=99))
        assert depths == [*range(11)]
        assert (outcome.status, outcome.receipt.reason) == ("failed", "limit_exceeded")
        assert outcome.message == "sub-agents may be at most 10 levels deep"

    async def test_the_limit_on_depth_can_be_lower(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def below(run: RunContext) -> None:
            await run.spawn("hello", "x")

        async def made(run: RunContext) -> SubagentResult:
            assert (await run.spawn("hello", "x")).ok
            return await run.spawn("below", "x")

        outcome = await executed(store, made=made, below=below, limits=Limits(subagent_depth=1))
        assert (outcome.result.code, outcome.result.error) == (
            "limit_exceeded",
            "sub-agents may be at most 1 levels deep",
        )

    async def test_too_many_at_once_are_refused_and_room_is_made_by_those_that_end(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def made(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.spawn, "doze", "x")
                nursery.start_soon(run.spawn, "doze", "x")
                await wait_all_tasks_blocked()
                with pytest.raises(LimitExceededError, match="at most 2 sub-agents at once"):
                    await run.spawn("hello", "x")
                nursery.cancel_scope.cancel()
            for _ in range(5):
                assert (await run.spawn("hello", "x")).ok

        limits = Limits(subagents_at_once=2)
        assert (await executed(store, made=made, doze=doze, limits=limits)).status == "success"

    async def test_what_they_say_counts_for_what_the_run_may_say(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def floods(run: RunContext) -> None:
            for _ in range(100):
                await run.emit.text("x" * 1000)

        async def made(run: RunContext) -> SubagentResult:
            result = await run.spawn("floods", "x")
            with pytest.raises(LimitExceededError):
                await run.emit.text("x" * 1000)
            return result

        limits = Limits(run_bytes=50_000)
        outcome = await executed(store, made=made, floods=floods, limits=limits)
        assert outcome.result.code == "limit_exceeded"

    async def test_what_they_spend_counts_for_the_run(
        self,
        autojump_clock: MockClock,
        store: MemoryStore,
    ) -> None:
        async def spends(run: RunContext) -> None:
            run.spent("m", Usage(1, 2))
            if text_of(run.messages[0]) == "deeper":
                await run.spawn("spends", "x")

        async def made(run: RunContext) -> None:
            run.spent("m", Usage(10, 20))
            await run.spawn("spends", "deeper")

        outcome = await executed(store, made=made, spends=spends)
        usage = (await log_of(store))[-1]["usage"]
        assert usage == [{"model": "m", "inputTokens": 12, "outputTokens": 24}]
        assert (outcome.statistics.input_tokens, outcome.statistics.output_tokens) == (12, 24)
        assert outcome.statistics.subagents == 2
