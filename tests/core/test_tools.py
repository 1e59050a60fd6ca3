"""Tools: schemas from type hints, and calls that end in a result whatever the tool does."""

from __future__ import annotations

import asyncio
import collections
import enum
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import msgspec
import pytest
import trio
from tests.small_world import ADA, THREAD, context
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    EventEmitter,
    Limits,
    MemoryStore,
    NewThread,
    RunError,
    RunRecord,
    Tool,
    ToolCallId,
    ToolContext,
    ToolDefinitionError,
    ToolDispatcher,
    ToolQuotas,
    events,
    open_journals,
    tool,
)
from creche._emitter import EngineVoice
from creche._store import now


@tool
async def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    The second is 2 if it is not given.
    """
    return a + b


class Colour(enum.Enum):
    RED = "red"


class Point(msgspec.Struct):
    x: float
    y: float = 0.0


@asynccontextmanager
async def dispatching(
    *tools: Tool,
    limits: Limits | None = None,
) -> AsyncIterator[tuple[ToolDispatcher, Callable[[], list[Any]]]]:
    """A dispatcher with these tools, and a function that gives the events so far."""
    limits = limits or Limits()
    ctx = context()
    store = MemoryStore()
    async with open_journals(store, limits) as journals:
        async with journals.attached(ADA, THREAD) as journal:
            await journal.propose(NewThread(title="", epoch="e"))
            emitter = EventEmitter(ctx, journal, limits)
            record = RunRecord(
                user_id=ADA,
                thread_id=THREAD,
                run_id=ctx.run_id,
                agent="x",
                status="running",
                created_at=now(),
            )
            EngineVoice(emitter).begin((), record)
            with ToolQuotas(limits).share(ADA) as share:
                yield (
                    ToolDispatcher(ctx, tools, emitter, limits, share=share),
                    lambda: [entry.event for entry in journal._entries][1:],
                )


@pytest.mark.parametrize(
    "params", ['{"a": "\ud800"}', {"a": "\ud800"}, "\ud800"], ids=["text", "mapping", "no JSON"]
)
async def test_what_no_encoder_takes_is_a_failed_call_and_no_raise(params: Any) -> None:
    async with dispatching(add) as (dispatcher, _):
        for name in ("add", "\udfff"):
            assert not (await dispatcher.dispatch(name, params)).ok


async def test_arguments_that_hold_themselves_are_a_failed_call_and_no_raise() -> None:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    async with dispatching(add) as (dispatcher, _):
        assert "have no JSON" in (await dispatcher.dispatch("add", circle)).content


async def test_a_secret_in_a_long_result_that_is_cut_is_not_shown() -> None:
    """It is no JSON any more. The model gets what there is, as it is."""

    @tool
    def log_in() -> dict[str, str]:
        """Log in."""
        return {"cookie": "hunter2", "set-authorization": "hunter3", "page": "x" * 2000}

    async with dispatching(log_in, limits=Limits(tool_result_bytes=500)) as (dispatcher, said):
        result = await dispatcher.dispatch("log_in", {})
    assert "[cut: " in result.content
    assert "hunter2" in result.content
    assert "hunter" not in said()[-1].content
    assert "[cut: " in said()[-1].content


async def test_a_result_that_is_too_long_is_cut_and_says_so() -> None:
    """The model and the client read it; the agent has the value whole."""

    @tool
    def long() -> str:
        """Say much."""
        return "é" * 1000

    async with dispatching(long, limits=Limits(tool_result_bytes=101)) as (dispatcher, said):
        result = await dispatcher.dispatch("long", {})
    assert result.value == "é" * 1000
    assert result.content == "é" * 50 + "\n[cut: the first 101 of 2,000 bytes]"
    assert said()[-1].content == result.content


def test_nobody_can_write_into_a_schema_that_all_runs_are_told() -> None:
    @tool
    def place(at: Point) -> None:
        """Place."""

    schema: Any = place.parameters
    for mapping in (schema, schema["properties"], schema["$defs"]):
        with pytest.raises(TypeError):
            mapping["secret"] = "canary"
    place.spec.parameters["properties"]["mine"] = {}
    assert "mine" not in place.spec.parameters["properties"]


class TestSchemas:
    def test_a_function_becomes_a_tool_with_its_name_docstring_and_hints(self) -> None:
        assert add.spec.name == "add"
        assert add.spec.description == ("Add two numbers.\n\nThe second is 2 if it is not given.")
        assert add.spec.parameters == {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 2}},
            "required": ["a"],
            "additionalProperties": False,
        }

    def test_a_name_and_a_description_can_be_given(self) -> None:
        @tool(name="plus", description="Adds.")
        def function() -> None:
            """Not this."""

        assert (function.name, function.spec.description) == ("plus", "Adds.")
        assert function.spec.parameters["type"] == "object"

    def test_rich_hints_become_rich_schemas(self) -> None:
        @tool
        def draw(
            where: Point,
            how: Literal["thin", "thick"],
            colour: Colour,
            width: Annotated[int, msgspec.Meta(ge=1)],
            tags: list[str] | None = None,
        ) -> None:
            """Draw."""

        schema = draw.spec.parameters
        assert schema["required"] == ["where", "how", "colour", "width"]
        assert schema["properties"]["where"] == {"$ref": "#/$defs/Point"}
        assert schema["properties"]["how"] == {"enum": ["thick", "thin"]}
        assert schema["properties"]["width"] == {"type": "integer", "minimum": 1}
        assert set(schema["$defs"]) == {"Point", "Colour"}
        assert schema["$defs"]["Point"]["required"] == ["x"]

    def test_a_tool_may_be_called_like_a_type_that_it_takes(self) -> None:
        @tool(name="Point")
        def function(at: Point) -> None:
            """Draw."""

        schema = function.spec.parameters
        assert schema["required"] == ["at"]
        reference = schema["properties"]["at"]["$ref"].removeprefix("#/$defs/")
        assert schema["$defs"][reference]["required"] == ["x"]

    def test_a_tool_context_is_not_the_models_to_give(self) -> None:
        @tool
        def look(where: str, ctx: ToolContext) -> None:
            """Look."""

        assert set(look.spec.parameters["properties"]) == {"where"}

    def test_what_cannot_be_a_tool_says_what_to_change(self) -> None:
        def untyped(a): ...
        def starred(*a: int) -> None: ...
        def keywords(**a: int) -> None: ...
        def positional(a: int, /) -> None: ...
        def unsupported(a: Callable[[], int]) -> None: ...
        def mixed(a: list[Point] | list[int]) -> None: ...

        for function, word in (
            (untyped, "'a'"),
            (starred, r"\*args"),
            (keywords, r"\*\*kwargs"),
            (positional, "'a'"),
            (unsupported, "unsupported"),
            (mixed, "mixed"),
        ):
            with pytest.raises(ToolDefinitionError, match=word):
                tool(function)

    def test_a_spec_can_be_changed_by_its_reader_without_harm(self) -> None:
        add.spec.parameters["properties"] = {}
        assert set(add.spec.parameters["properties"]) == {"a", "b"}

    def test_not_even_deep_down_does_a_reader_change_the_tool(self) -> None:
        """A tool is shared by all runs, and models' adapters do edit schemas."""

        @tool
        def mine(a: int) -> None: ...

        mine.spec.parameters["properties"]["a"]["type"] = "string"
        assert mine.spec.parameters["properties"]["a"] == {"type": "integer"}


class TestCalls:
    async def test_a_call_is_said_in_four_events_and_returns_its_result(self) -> None:
        async with dispatching(add) as (dispatcher, said):
            result = await dispatcher.dispatch("add", {"a": 1})
            assert result.ok
            assert (result.value, result.content, result.error) == (3, "3", None)
            start, args, end, answer = said()
            assert isinstance(start, events.ToolCallStart)
            assert start.tool_call_name == "add"
            assert isinstance(args, events.ToolCallArgs)
            assert args.delta == '{"a":1}'
            assert isinstance(end, events.ToolCallEnd)
            assert isinstance(answer, events.ToolCallResult)
            assert answer.content == "3"
            assert answer.metadata is None
            assert {e.tool_call_id for e in (start, args, end, answer)} == {result.tool_call_id}

    async def test_json_text_and_an_id_of_the_models_are_taken_too(self) -> None:
        async with dispatching(add) as (dispatcher, said):
            call_id = ToolCallId("call-7")
            result = await dispatcher.dispatch("add", '{"a": 1, "b": 1}', tool_call_id=call_id)
            assert (result.value, result.tool_call_id) == (2, "call-7")
            assert said()[1].delta == '{"a": 1, "b": 1}'

    @pytest.mark.parametrize(
        ("params", "word"),
        [
            ({}, "a"),
            ({"a": "1"}, "int"),
            ({"a": 1.5}, "int"),
            ({"a": None}, "int"),
            ({"a": 1, "c": 1}, "c"),
            ("not json", "schema"),
            ("[1]", "object"),
            ("null", "object"),
            ('{"a": 1', "schema"),
            ('{"a": 1} {}', "schema"),
        ],
        ids=repr,
    )
    async def test_wrong_arguments_are_a_result_that_says_what_is_wrong(
        self,
        params: Any,
        word: str,
    ) -> None:
        async with dispatching(add) as (dispatcher, said):
            result = await dispatcher.dispatch("add", params)
            assert not result.ok
            assert result.error is not None
            assert word in result.error
            assert result.content.startswith("Error: ")
            answer = said()[-1]
            assert isinstance(answer, events.ToolCallResult)
            assert answer.metadata == {"creche": {"error": True}}

    async def test_empty_arguments_are_an_empty_object(self) -> None:
        @tool
        def ping() -> str:
            return "pong"

        async with dispatching(ping) as (dispatcher, _):
            assert (await dispatcher.dispatch("ping", "")).value == "pong"

    async def test_arguments_that_have_no_json_are_a_result_too(self) -> None:
        async with dispatching(add) as (dispatcher, _):
            assert not (await dispatcher.dispatch("add", {"a": object()})).ok

    async def test_an_unknown_tool_is_a_result_that_lists_nothing(self) -> None:
        async with dispatching(add) as (dispatcher, _):
            result = await dispatcher.dispatch("substract", {})
            assert not result.ok
            assert "add" not in result.content
            assert "substract" in result.content

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("boom"),
            SystemExit(3),
            GeneratorExit(),
            asyncio.CancelledError(),
            StopIteration(),
            StopAsyncIteration(),
            ExceptionGroup("two", [ValueError("boom"), OSError("x")]),
            BaseExceptionGroup("two", [ValueError("boom"), SystemExit(1)]),
        ],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
    async def test_whatever_a_tool_raises_is_its_result(
        self,
        error: BaseException,
        is_async: bool,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def bad_async() -> None:
            raise error

        def bad_sync() -> None:
            raise error

        made = tool(name="bad")(bad_async if is_async else bad_sync)
        async with dispatching(made, add) as (dispatcher, said):
            with trio.fail_after(5):
                result = await dispatcher.dispatch("bad", {})
            assert not result.ok
            assert isinstance(said()[-1], events.ToolCallResult)
            assert (await dispatcher.dispatch("add", {"a": 1})).value == 3
            assert (dispatcher.stopped, dispatcher.abandoned) == ([], [])
        (logged,) = caplog.records
        assert logged.levelno == logging.WARNING
        assert logged.exc_info is not None

    async def test_a_run_error_is_an_answer_and_is_logged_without_its_words(
        self,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        @tool
        async def shut() -> None:
            raise RunError("The shop is closed.")

        caplog.set_level(logging.INFO, logger="creche")
        async with dispatching(shut) as (dispatcher, _):
            await dispatcher.dispatch("shut", {})
        (logged,) = caplog.records
        assert (logged.levelno, logged.getMessage()) == (
            logging.INFO,
            "tool shut failed (agent_failed)",
        )
        assert logged.exc_info is None
        assert "closed" not in str(vars(logged))

    async def test_one_past_its_time_is_a_warning(
        self,
        autojump_clock: MockClock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        @tool
        async def slow() -> None:
            await trio.sleep_forever()

        async with dispatching(slow, limits=Limits(tool_timeout=7)) as (dispatcher, _):
            await dispatcher.dispatch("slow", {})
        (logged,) = caplog.records
        assert (logged.levelno, logged.getMessage()) == (
            logging.WARNING,
            "tool slow took longer than 7 s and was stopped",
        )

    async def test_one_past_its_time_that_would_not_stop_is_told_as_that(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        let_go = threading.Event()

        @tool(shared=(let_go,))
        def deaf() -> None:
            let_go.wait(60)

        limits = Limits(tool_timeout=0.2, stop_timeout=0.1)
        try:
            async with dispatching(deaf, limits=limits) as (dispatcher, _):
                result = await dispatcher.dispatch("deaf", {})
        finally:
            let_go.set()
        late = "took longer than 0.2 s; it would not stop and may still be at work"
        assert (result.content, result.code) == (f"Error: The tool {late}.", "tool_timeout")
        assert [record.getMessage() for record in caplog.records] == [f"tool deaf {late}"]
        assert dispatcher.abandoned == ["deaf"]

    async def test_a_keyboard_interrupt_from_a_thread_is_the_tools_own_doing(self) -> None:
        @tool
        def bad() -> None:
            raise KeyboardInterrupt

        async with dispatching(bad) as (dispatcher, _):
            with trio.fail_after(5):
                result = await dispatcher.dispatch("bad", {})
            assert result.error is not None
            assert "KeyboardInterrupt" in result.error

    async def test_an_error_carries_no_secret_and_a_run_errors_words_are_kept(self) -> None:
        @tool
        async def leaks() -> None:
            raise OSError("postgres://ada:hunter2@db /home/ada/x")

        @tool
        async def says() -> None:
            raise RunError("The shop is closed.")

        async with dispatching(leaks, says) as (dispatcher, said):
            result = await dispatcher.dispatch("leaks", {})
            assert result.error == "OSError: postgres://[redacted]@db ~/x"
            assert (await dispatcher.dispatch("says", {})).error == "The shop is closed."
            assert "hunter2" not in repr(said())

    async def test_an_error_that_cannot_be_printed_is_a_result_too(self) -> None:
        class Unprintable(Exception):  # noqa: N818
            def __str__(self) -> str:
                raise RuntimeError

        @tool
        async def bad() -> None:
            raise Unprintable

        async with dispatching(bad) as (dispatcher, _):
            result = await dispatcher.dispatch("bad", {})
            assert result.error is not None
            assert "Unprintable" in result.error

    @pytest.mark.parametrize(
        ("value", "content"),
        [
            ("words", "words"),
            ("", ""),
            (None, "null"),
            ({"a": [1, 2.5, None]}, '{"a":[1,2.5,null]}'),
            (Point(1.0), '{"x":1.0,"y":0.0}'),
            (b"\x00", '"AA=="'),
            (Colour.RED, '"red"'),
        ],
        ids=repr,
    )
    async def test_a_model_reads_words_as_they_are_and_the_rest_as_json(
        self,
        value: Any,
        content: str,
    ) -> None:
        @tool(shared=(value,))
        async def give() -> Any:
            return value

        async with dispatching(give) as (dispatcher, _):
            assert (await dispatcher.dispatch("give", {})).content == content

    async def test_a_result_that_has_no_json_is_a_failure_of_the_tool(self) -> None:
        class Unprintable:
            def __str__(self) -> str:
                raise RuntimeError

        @tool
        async def give() -> Any:
            return [Unprintable()]

        async with dispatching(give) as (dispatcher, _):
            assert not (await dispatcher.dispatch("give", {})).ok

    async def test_a_result_that_is_no_unicode_is_a_failure_of_the_tool(self) -> None:
        @tool
        async def give() -> str:
            return "half a pair: \ud83d"

        async with dispatching(give, add) as (dispatcher, _):
            assert not (await dispatcher.dispatch("give", {})).ok
            assert (await dispatcher.dispatch("add", {"a": 1})).ok

    async def test_the_model_reads_a_result_whole_and_the_log_without_secrets(self) -> None:
        @tool
        async def sign_in(password: str) -> dict[str, str]:
            return {"token": f"token of {password}", "name": "ada"}

        async with dispatching(sign_in) as (dispatcher, said):
            result = await dispatcher.dispatch("sign_in", {"password": "hunter2"})
            assert "hunter2" in result.content
            assert "hunter2" not in repr(said())
            assert "ada" in said()[-1].content

    async def test_a_tool_that_asks_gets_the_context_and_its_calls_id(self) -> None:
        seen: list[ToolContext] = []

        @tool(shared=(seen,))
        async def look(ctx: ToolContext, where: str) -> str:
            seen.append(ctx)
            return where

        async with dispatching(look) as (dispatcher, _):
            result = await dispatcher.dispatch("look", {"where": "here"})
            assert result.value == "here"
            assert seen[0].context.user_id == ADA
            assert seen[0].tool_call_id == result.tool_call_id
            assert not (await dispatcher.dispatch("look", {"where": "x", "ctx": {}})).ok


class TestTime:
    async def test_a_tool_past_its_time_is_stopped_and_the_run_goes_on(
        self,
        autojump_clock: MockClock,
    ) -> None:
        ended = trio.Event()

        @tool
        async def slow() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        async with dispatching(slow, add, limits=Limits(tool_timeout=7)) as (dispatcher, _):
            begun = trio.current_time()
            result = await dispatcher.dispatch("slow", {})
            assert trio.current_time() - begun == pytest.approx(7)
            assert ended.is_set()
            assert result.error is not None
            assert "7 s" in result.error
            assert (await dispatcher.dispatch("add", {"a": 1})).ok

    async def test_what_its_own_deadline_stopped_was_not_stopped_by_the_runs_end(
        self,
        autojump_clock: MockClock,
    ) -> None:
        """A receipt of a run that succeeded would name it."""

        @tool
        async def slow() -> None:
            await trio.sleep_forever()

        async with dispatching(slow) as (dispatcher, _):
            await dispatcher.dispatch("slow", {})
            assert dispatcher.stopped == []

    async def test_a_cancelled_call_is_named_and_passes_the_cancellation_on(
        self,
        autojump_clock: MockClock,
    ) -> None:
        @tool
        async def slow() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(trio.sleep_forever)

        async with dispatching(slow) as (dispatcher, said):
            with trio.move_on_after(1) as scope:
                await dispatcher.dispatch("slow", {})
            assert scope.cancelled_caught
            assert dispatcher.stopped == ["slow"]
            assert not any(isinstance(event, events.ToolCallResult) for event in said())

    async def test_an_error_while_it_is_cancelled_does_not_hide_the_cancellation(
        self,
        autojump_clock: MockClock,
    ) -> None:
        """Trio groups the two; a barrier that took the group whole would swallow a cancel."""

        @tool
        async def slow() -> None:
            async def fails_on_cancel() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    raise ValueError("boom")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails_on_cancel)
                nursery.start_soon(trio.sleep_forever)

        async with dispatching(slow) as (dispatcher, _):
            with trio.move_on_after(1) as scope:
                await dispatcher.dispatch("slow", {})
            assert scope.cancelled_caught
            assert dispatcher.stopped == ["slow"]


class TestThreads:
    """On the real clock: the fake one does not wait for threads."""

    async def test_a_sync_tool_runs_beside_the_loop(self) -> None:
        main = threading.get_ident()

        @tool
        def where() -> bool:
            return threading.get_ident() == main

        async with dispatching(where) as (dispatcher, _):
            assert (await dispatcher.dispatch("where", {})).value is False

    async def test_one_that_heeds_its_flag_is_stopped(self) -> None:
        begun, saw_flag = threading.Event(), threading.Event()

        @tool
        def polite(ctx: ToolContext) -> None:
            begun.set()
            if ctx.stop.wait(30):
                assert ctx.stop
                saw_flag.set()

        async with dispatching(polite) as (dispatcher, _):
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(dispatcher.dispatch, "polite", {})
                    await trio.to_thread.run_sync(begun.wait)
                    nursery.cancel_scope.cancel()
            assert saw_flag.is_set()
            assert (dispatcher.stopped, dispatcher.abandoned) == (["polite"], [])

    async def test_one_that_ignores_its_flag_is_abandoned_by_name_after_its_allowance(
        self,
    ) -> None:
        begun, let_go, over = threading.Event(), threading.Event(), threading.Event()

        @tool
        def stubborn() -> None:
            begun.set()
            let_go.wait(30)
            over.set()

        limits = Limits(stop_timeout=0.2)
        try:
            async with dispatching(stubborn, limits=limits) as (dispatcher, _):
                with trio.fail_after(10):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(dispatcher.dispatch, "stubborn", {})
                        await trio.to_thread.run_sync(begun.wait)
                        asked = trio.current_time()
                        nursery.cancel_scope.cancel()
                assert 0.15 <= trio.current_time() - asked < 5
                assert dispatcher.abandoned == ["stubborn"]
                assert not over.is_set()
        finally:
            let_go.set()
            await trio.to_thread.run_sync(over.wait, 10)

    async def test_one_past_its_time_is_asked_to_stop_too(self) -> None:
        @tool
        def polite(ctx: ToolContext) -> str:
            ctx.stop.wait(30)
            return "stopped"

        async with dispatching(polite, limits=Limits(tool_timeout=0.1)) as (dispatcher, _):
            with trio.fail_after(10):
                result = await dispatcher.dispatch("polite", {})
            assert result.error is not None
            assert "0.1 s" in result.error
            assert dispatcher.abandoned == []

    async def test_one_that_waits_for_a_thread_never_begins_once_cancelled(self) -> None:
        begun, let_go, ran = threading.Event(), threading.Event(), threading.Event()

        @tool
        def first() -> None:
            begun.set()
            let_go.wait(30)

        @tool
        def second() -> None:
            ran.set()

        async with dispatching(first, second, limits=Limits(tool_threads=1)) as (dispatcher, _):
            with trio.fail_after(10):
                async with trio.open_nursery() as outer:
                    outer.start_soon(dispatcher.dispatch, "first", {})
                    await trio.to_thread.run_sync(begun.wait)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(dispatcher.dispatch, "second", {})
                        await wait_all_tasks_blocked(0.01)
                        nursery.cancel_scope.cancel()
                    let_go.set()
            assert not ran.is_set()
            assert (dispatcher.stopped, dispatcher.abandoned) == (["second"], [])

    async def test_only_so_many_threads_of_one_run_work_at_once(self) -> None:
        lock, at_work = threading.Lock(), collections.Counter[str]()

        @tool(shared=(at_work,))
        def busy(ctx: ToolContext) -> None:
            with lock:
                at_work["now"] += 1
                at_work["most"] = max(at_work["most"], at_work["now"])
            ctx.stop.wait(0.02)
            with lock:
                at_work["now"] -= 1

        async with dispatching(busy, limits=Limits(tool_threads=2)) as (dispatcher, _):
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    for _ in range(6):
                        nursery.start_soon(dispatcher.dispatch, "busy", {})
        assert at_work["most"] == 2
