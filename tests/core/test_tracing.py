"""Spans: how they nest, how they end, and what is never in them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from tests.small_world import context, hang, infrastructure
from tests.tracing import RecordingTracer, Told

from creche import (
    Infrastructure,
    Limits,
    MemoryStore,
    Message,
    ModelAgent,
    ModelError,
    ModelPart,
    RunContext,
    RunError,
    RunOutcome,
    SpanEnd,
    SpanStart,
    StoreUnavailableError,
    TextDelta,
    ToolCallRequest,
    ToolDispatcher,
    ToolMessage,
    ToolSpec,
    Usage,
    open_supervisor,
    tool,
)
from creche._tracing import OTHER, Spans, as_code, code_of

SECRET = "canary-secret"


@tool
async def echo(text: str) -> str:
    """Say it again."""
    return f"{text} {SECRET}"


@tool
async def breaks(text: str) -> str:
    """Fail."""
    raise ValueError(f"{text} {SECRET}")


@tool
async def sleeps() -> None:
    """Never end."""
    await trio.sleep_forever()


class CallingModel:
    """Asks for `echo` once, and then says something."""

    name = "model-x"

    @contextlib.asynccontextmanager
    async def open_stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        async def parts() -> AsyncIterator[ModelPart]:
            await trio.lowlevel.checkpoint()
            if not any(isinstance(message, ToolMessage) for message in messages):
                yield ToolCallRequest("echo", msgspec.json.encode({"text": SECRET}).decode())
                yield Usage(10, 2)
            else:
                yield TextDelta(SECRET)
                yield Usage(20, 3)

        yield parts()


class Asks(ModelAgent):
    """An ordinary agent."""

    tools = (echo,)


def traced(tracer: RecordingTracer, made: Infrastructure) -> Infrastructure:
    return Infrastructure(
        agents=made.registry,
        tools=made.tools,
        models=made.models,
        limits=made.limits,
        store=made.store,
        tracer=tracer,
    )


async def run_of(
    tracer: RecordingTracer, made: Infrastructure, agent: str, *, reason: str | None = None
) -> RunOutcome:
    """Run an agent to its end; with a reason, it is cancelled once everything waits."""
    async with open_supervisor(traced(tracer, made)) as supervisor:
        run = await supervisor.start(context(), agent, f"hello {SECRET}")
        if reason is not None:
            await trio.testing.wait_all_tasks_blocked()
            run.cancel(reason)  # type: ignore[arg-type]
        return await run.ended()


class TestNesting:
    async def test_a_runs_model_and_tool_calls_are_within_it(self, autojump_clock: Any):
        tracer = RecordingTracer()
        made = infrastructure(models={"default": CallingModel()}, asks=Asks)
        await run_of(tracer, made, "asks")
        assert tracer.tree() == ["run asks", "  model model-x", "  tool echo", "  model model-x"]

    async def test_what_a_sub_agent_does_is_within_it(self, autojump_clock: Any):
        async def calls(run: RunContext) -> None:
            await run.call_tool("echo", {"text": "x"})
            if run.context.depth < 2:
                await run.spawn("calls", "x")

        tracer = RecordingTracer()
        await run_of(tracer, infrastructure(tools=[echo], calls=calls), "calls")
        assert tracer.tree() == [
            "run calls",
            "  tool echo",
            "  subagent calls",
            "    tool echo",
            "    subagent calls",
            "      tool echo",
        ]
        requests = [told.started.request_id for told in tracer.spans]
        assert requests[0] == requests[1]  # the run's own
        assert requests[2] == requests[3] != requests[0]
        assert requests[4] == requests[5] != requests[2]

    async def test_those_side_by_side_are_not_within_each_other(self, autojump_clock: Any):
        async def calls(run: RunContext) -> None:
            await run.call_tool("sleeps", {})

        async def splits(run: RunContext) -> None:
            with trio.move_on_after(1):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run.spawn, "calls", "x")
                    nursery.start_soon(run.spawn, "calls", "y")
                    nursery.start_soon(run.call_tool, "sleeps", {})

        tracer = RecordingTracer()
        await run_of(tracer, infrastructure(tools=[sleeps], calls=calls, splits=splits), "splits")
        depths = sorted((told.started.kind, told.depth) for told in tracer.spans)
        assert depths == [
            ("run", 0),
            ("subagent", 1),
            ("subagent", 1),
            ("tool", 1),
            ("tool", 2),
            ("tool", 2),
        ]
        parents = {id(told.parent) for told in tracer.spans if told.depth == 2}
        assert len(parents) == 2

    async def test_a_dispatcher_without_a_run_tells_of_its_calls(self):
        tracer = RecordingTracer()
        made = traced(tracer, infrastructure(tools=[echo]))
        opened = ToolDispatcher.create_scoped_dispatcher_context(context(), infrastructure=made)
        async with opened as dispatcher:
            await dispatcher.dispatch("echo", {"text": "x"})
        assert tracer.tree() == ["tool echo"]

    async def test_every_span_says_whose_it_is(self, autojump_clock: Any):
        tracer = RecordingTracer()
        made = infrastructure(models={"default": CallingModel()}, asks=Asks)
        async with open_supervisor(traced(tracer, made)) as supervisor:
            asked = context()
            await (await supervisor.start(asked, "asks", "x")).ended()
        ids = (asked.user_id, asked.thread_id, asked.run_id, asked.request_id)
        assert {
            (s.user_id, s.thread_id, s.run_id, s.request_id)
            for s in (told.started for told in tracer.spans)
        } == {ids}


class TestEnds:
    async def test_success_with_what_it_cost(self, autojump_clock: Any):
        tracer = RecordingTracer()
        made = infrastructure(models={"default": CallingModel()}, asks=Asks)
        await run_of(tracer, made, "asks")
        assert tracer.end_of("run") == SpanEnd(
            status="success", input_tokens=30, output_tokens=5, queue_ms=0
        )
        assert [told.ended for told in tracer.spans if told.started.kind == "model"] == [
            SpanEnd(status="success", input_tokens=10, output_tokens=2),
            SpanEnd(status="success", input_tokens=20, output_tokens=3),
        ]
        assert tracer.end_of("tool") == SpanEnd(status="success")

    async def test_a_failed_run_has_the_code_that_its_client_is_told(self):
        async def fails(run: RunContext) -> None:
            raise RunError(SECRET, code="out_of_stock")

        async def breaks_(run: RunContext) -> None:
            raise ValueError(SECRET)

        for body, code in ((fails, "out_of_stock"), (breaks_, "agent_failed")):
            tracer = RecordingTracer()
            await run_of(tracer, infrastructure(body=body), "body")
            ended = tracer.end_of("run")
            assert (ended.status, ended.code) == ("failed", code)

    @pytest.mark.parametrize("reason", ["user", "disconnect", "superseded", "shutdown"])
    async def test_a_cancelled_run_and_all_in_it_have_the_reason(
        self, reason: str, autojump_clock: Any
    ):
        async def inner(run: RunContext) -> None:
            await run.call_tool("sleeps", {})

        async def outer(run: RunContext) -> None:
            await run.spawn("inner", "x")

        tracer = RecordingTracer()
        made = infrastructure(tools=[sleeps], inner=inner, outer=outer)
        await run_of(tracer, made, "outer", reason=reason)
        assert tracer.tree() == ["run outer", "  subagent inner", "    tool sleeps"]
        for told in tracer.spans:
            assert told.ended is not None
            assert (told.ended.status, told.ended.code) == ("cancelled", reason)

    async def test_the_deadline_is_a_reason(self, autojump_clock: Any):
        async def calls(run: RunContext) -> None:
            await run.call_tool("sleeps", {})

        tracer = RecordingTracer()
        limits = Limits(run_timeout=5, tool_timeout=60)
        await run_of(tracer, infrastructure(tools=[sleeps], limits=limits, calls=calls), "calls")
        ends = [(told.ended.status, told.ended.code) for told in tracer.spans if told.ended]
        assert ends == [("cancelled", "deadline")] * 2

    async def test_a_run_that_was_called_off_in_the_queue_has_a_span(self, autojump_clock: Any):
        tracer = RecordingTracer()
        async with open_supervisor(traced(tracer, infrastructure())) as supervisor:
            first = await supervisor.start(context(), "hang", "x")
            second = await supervisor.start(context(), "hello", "x")
            second.cancel("user")
            first.cancel("user")
            await first.ended()
            await second.ended()
        assert tracer.tree() == ["run hang", "run hello"]
        ends = [(told.ended.status, told.ended.code) for told in tracer.spans if told.ended]
        assert ends == [("cancelled", "user")] * 2

    async def test_a_run_tells_how_long_it_waited_for_its_turn(self, autojump_clock: Any):
        async def slow(run: RunContext) -> None:
            await trio.sleep(3)

        tracer = RecordingTracer()
        async with open_supervisor(traced(tracer, infrastructure(slow=slow))) as supervisor:
            runs = [await supervisor.start(context(), "slow", "x") for _ in range(2)]
            await runs[-1].ended()
        waits = [told.ended.queue_ms or 0 for told in tracer.spans if told.ended]
        assert waits[0] == 0
        assert 2_900 <= waits[1] <= 3_500

    async def test_a_run_whose_end_the_store_does_not_take_is_lost(self, autojump_clock: Any):
        class Away(MemoryStore):
            commits = 0

            async def commit(self, commits: Any) -> None:
                self.commits += 1
                if self.commits > 1:
                    raise StoreUnavailableError("gone")
                await super().commit(commits)

        tracer = RecordingTracer()
        with trio.move_on_after(30):
            async with open_supervisor(traced(tracer, infrastructure(store=Away()))) as supervisor:
                await (await supervisor.start(context(), "hello", "x")).ended()
        assert tracer.end_of("run") == SpanEnd(status="failed", code="lost")

    async def test_a_tool_call_that_comes_to_nothing_says_why_in_a_word(self, autojump_clock: Any):
        codes = {
            ("echo", '{"text": "x"}'): None,
            ("echo", '{"wrong": 1}'): "invalid_arguments",
            ("breaks", '{"text": "x"}'): "ValueError",
            ("sleeps", "{}"): "tool_timeout",
        }
        tracer = RecordingTracer()
        made = traced(tracer, infrastructure(tools=[echo, breaks, sleeps]))
        opened = ToolDispatcher.create_scoped_dispatcher_context(context(), infrastructure=made)
        async with opened as dispatcher:
            for (name, arguments), code in codes.items():
                result = await dispatcher.dispatch(name, arguments)
                assert result.code == code
        for told, code in zip(tracer.spans, codes.values(), strict=True):
            assert told.ended == SpanEnd(status="failed" if code else "success", code=code)

    async def test_a_call_over_the_limit_says_so(self):
        tracer = RecordingTracer()
        made = traced(tracer, infrastructure(tools=[echo], limits=Limits(tool_calls=0)))
        opened = ToolDispatcher.create_scoped_dispatcher_context(context(), infrastructure=made)
        async with opened as dispatcher:
            await dispatcher.dispatch("echo", {"text": "x"})
        assert tracer.end_of("tool").code == "limit_exceeded"

    async def test_calls_that_outlive_their_dispatchers_block_are_cancelled(self):
        tracer = RecordingTracer()
        made = traced(tracer, infrastructure(tools=[sleeps]))
        async with trio.open_nursery() as nursery:
            opened = ToolDispatcher.create_scoped_dispatcher_context(context(), infrastructure=made)
            async with opened as dispatcher:
                nursery.start_soon(dispatcher.dispatch, "sleeps", {})
                await trio.testing.wait_all_tasks_blocked()
        assert tracer.end_of("tool") == SpanEnd(status="cancelled", code="dispatcher_closed")

    async def test_a_sub_agents_failure_is_its_own(self, autojump_clock: Any):
        async def fails(run: RunContext) -> None:
            raise RunError(SECRET, code="no_luck")

        async def outer(run: RunContext) -> None:
            await run.spawn("fails", "x")

        tracer = RecordingTracer()
        await run_of(tracer, infrastructure(fails=fails, outer=outer), "outer")
        assert tracer.end_of("subagent") == SpanEnd(status="failed", code="no_luck")
        assert tracer.end_of("run").status == "success"

    async def test_a_model_that_fails_or_takes_too_long(self, autojump_clock: Any):
        class Fails(CallingModel):
            @contextlib.asynccontextmanager
            async def open_stream(self, *_: Any) -> AsyncIterator[Any]:
                raise ModelError(SECRET, code="overloaded")
                yield

        class Hangs(CallingModel):
            @contextlib.asynccontextmanager
            async def open_stream(self, *_: Any) -> AsyncIterator[Any]:
                await trio.sleep_forever()
                yield

        for model, code in ((Fails(), "overloaded"), (Hangs(), "turn_timeout")):
            tracer = RecordingTracer()
            made = infrastructure(models={"default": model}, asks=Asks)
            await run_of(tracer, made, "asks")
            assert tracer.end_of("model") == SpanEnd(status="failed", code=code)

    async def test_of_calls_at_once_each_has_its_own_cost(self, autojump_clock: Any):
        class Counts(CallingModel):
            @contextlib.asynccontextmanager
            async def open_stream(self, messages: Any, tools: Any) -> AsyncIterator[Any]:
                async def parts() -> AsyncIterator[ModelPart]:
                    await trio.sleep(len(messages))
                    yield Usage(len(messages), 0)

                yield parts()

        async def asks(run: RunContext) -> None:
            async def one(cost: int) -> None:
                model = run.model()
                async with model.open_stream(list(run.messages) * cost, []) as stream:
                    async for part in stream:
                        assert isinstance(part, Usage)
                        run.spent(model.name, part)

            async with trio.open_nursery() as nursery:
                for cost in range(1, 4):
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.start_soon(one, cost)

        tracer = RecordingTracer()
        made = infrastructure(models={"default": Counts()}, asks=asks)
        await run_of(tracer, made, "asks")
        costs = [
            t.ended.input_tokens for t in tracer.spans if t.ended and t.started.kind == "model"
        ]
        assert costs == [1, 2, 3]

    @pytest.mark.parametrize(
        ("told", "kept"), [(None, 0), (7, 7), (-1, 0), (True, 0), (1.5, 0), ("7", 0)]
    )
    async def test_a_count_that_is_none_is_zero(self, told: Any, kept: int, autojump_clock: Any):
        class Odd(CallingModel):
            @contextlib.asynccontextmanager
            async def open_stream(self, *_: Any) -> AsyncIterator[Any]:
                async def parts() -> AsyncIterator[ModelPart]:
                    await trio.lowlevel.checkpoint()
                    yield Usage(told, 1)

                yield parts()

        tracer = RecordingTracer()
        made = infrastructure(models={"default": Odd()}, asks=Asks)
        await run_of(tracer, made, "asks")
        assert tracer.end_of("model").input_tokens == kept


class TestWhatIsNeverTold:
    async def test_nothing_that_is_said_is_in_a_span(self, autojump_clock: Any):
        async def calls(run: RunContext) -> str:
            await run.emit.text(SECRET)
            for name in ("echo", "breaks", f"{SECRET}_tool"):
                await run.call_tool(name, {"text": SECRET})
            await run.spawn("asks", SECRET)
            await run.spawn("fails", SECRET)
            return SECRET

        async def fails(run: RunContext) -> None:
            raise RunError(SECRET, code=f"no {SECRET}")

        tracer = RecordingTracer()
        made = infrastructure(
            models={"default": CallingModel()},
            tools=[echo, breaks],
            calls=calls,
            asks=Asks,
            fails=fails,
        )
        await run_of(tracer, made, "calls")
        assert len(tracer.spans) == 9
        assert SECRET not in repr([(told.started, told.ended) for told in tracer.spans])

    async def test_a_tool_that_is_not_there_is_not_named(self):
        """Its name is a model's words, in which anything may stand."""
        tracer = RecordingTracer()
        made = traced(tracer, infrastructure(tools=[echo]))
        opened = ToolDispatcher.create_scoped_dispatcher_context(context(), infrastructure=made)
        async with opened as dispatcher:
            await dispatcher.dispatch("my password is hunter2", {})
        assert tracer.tree() == [f"tool {OTHER}"]
        assert tracer.end_of("tool").code == "unknown_tool"

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ValueError("x"), "ValueError"),
            (RunError("x", code="busy"), "busy"),
            (RunError("x", code="the card 4111 1111"), OTHER),
            (RunError("x", code="a" * 65), OTHER),
            (RunError("x", code=""), OTHER),
            (ExceptionGroup("x", [OSError("y"), RunError("x", code="busy")]), "busy"),
            (ExceptionGroup("x", [ExceptionGroup("y", [OSError("y")])]), "OSError"),
            (type("a name with spaces", (Exception,), {})(), OTHER),
        ],
    )
    def test_a_failure_is_called_by_its_code_or_its_type(self, error: Exception, code: str):
        assert code_of(error) == code

    def test_a_code_is_a_word(self):
        assert [as_code(text) for text in ("agent_failed", "a b", "ä", "1", "x\n")] == [
            "agent_failed",
            *[OTHER] * 4,
        ]


class BrokenTracer(RecordingTracer):
    """Raises where it is told to."""

    def __init__(
        self,
        *,
        begins: frozenset[str],
        ends: frozenset[str],
        error: Callable[[], BaseException] = OSError,
    ) -> None:
        super().__init__()
        self.error = error
        self.breaks_at = begins
        self.breaks_at_end = ends

    def begin(self, started: SpanStart, parent: Any) -> Told:
        if started.kind in self.breaks_at:
            raise self.error()
        told = super().begin(started, parent)
        told.breaks = self.error if started.kind in self.breaks_at_end else None
        return told


class TestATracerThatRaises:
    @pytest.mark.parametrize(
        "error",
        [
            *(OSError, SystemExit, GeneratorExit, asyncio.CancelledError),
            lambda: BaseExceptionGroup("several", [SystemExit(), OSError()]),
        ],
        ids=lambda error: error.__name__,
    )
    @pytest.mark.parametrize(
        ("begins", "ends"),
        [
            (frozenset({"run", "model", "tool", "subagent"}), frozenset[str]()),
            (frozenset[str](), frozenset({"run", "model", "tool", "subagent"})),
        ],
    )
    async def test_ends_no_run_and_is_logged_once_for_each(
        self,
        begins: frozenset[str],
        ends: frozenset[str],
        error: Callable[[], BaseException],
        caplog: pytest.LogCaptureFixture,
        autojump_clock: Any,
    ):
        async def outer(run: RunContext) -> str:
            return (await run.spawn("asks", "x")).status

        tracer = BrokenTracer(begins=begins, ends=ends, error=error)
        made = infrastructure(models={"default": CallingModel()}, asks=Asks, outer=outer)
        outcome = await run_of(tracer, made, "outer")
        assert (outcome.status, outcome.result) == ("success", "success")
        complaints = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert [record.name for record in complaints] == ["creche.tracing"]

    @pytest.mark.parametrize("at_end", [False, True])
    async def test_passes_on_the_processs_keyboard_interrupt(self, at_end: bool):
        where = frozenset({"tool"})
        tracer = BrokenTracer(
            begins=frozenset() if at_end else where,
            ends=where if at_end else frozenset(),
            error=KeyboardInterrupt,
        )
        block = Spans.of_run(tracer, context()).block("tool", "echo")
        with pytest.raises(KeyboardInterrupt), block:
            pass

    async def test_leaves_a_gap_and_nothing_else(self, autojump_clock: Any):
        async def outer(run: RunContext) -> None:
            await run.spawn("asks", "x")

        tracer = BrokenTracer(begins=frozenset({"subagent"}), ends=frozenset())
        made = infrastructure(models={"default": CallingModel()}, asks=Asks, outer=outer)
        await run_of(tracer, made, "outer")
        assert tracer.tree() == [
            "run outer",
            "  model model-x",
            "  tool echo",
            "  model model-x",
        ]


async def test_without_a_tracer_nothing_is_told(autojump_clock: Any):
    async with open_supervisor(infrastructure(hang_=hang)) as supervisor:
        run = await supervisor.start(context(), "hello", "x")
        assert (await run.ended()).status == "success"
