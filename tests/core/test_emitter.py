"""The only way for a run to say anything: in order, on its own thread, without secrets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tests.small_world import ADA, BOB, THREAD, TroubledStore, context, log_of, types_of
from trio.testing import MockClock

from creche import (
    CrecheError,
    EmitterClosedError,
    EventEmitter,
    GrammarError,
    IsolationError,
    Journal,
    LimitExceededError,
    Limits,
    MemoryStore,
    MessageId,
    NewThread,
    RunId,
    RunRecord,
    ToolCallId,
    UserExecutionContext,
    events,
    open_journals,
)
from creche._emitter import EngineVoice, next_part
from creche._redaction import redact_json
from creche._store import now

C = ToolCallId("c-1")


def record(ctx: UserExecutionContext) -> RunRecord:
    return RunRecord(
        user_id=ctx.user_id,
        thread_id=ctx.thread_id,
        run_id=ctx.run_id,
        agent="hello",
        status="running",
        created_at=now(),
    )


@asynccontextmanager
async def speaking(
    store: MemoryStore | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[tuple[EventEmitter, Journal]]:
    """The emitter of a run that has begun, and its journal."""
    limits = limits or Limits()
    ctx = context()
    async with open_journals(store or MemoryStore(), limits) as journals:
        async with journals.attached(ADA, THREAD) as journal:
            await journal.propose(NewThread(title="", epoch="e"))
            emitter = EventEmitter(ctx, journal, limits)
            EngineVoice(emitter).begin((), record(ctx))
            await journal.committed(1)
            yield emitter, journal


def end(emitter: EventEmitter) -> None:
    EngineVoice(emitter).close_open()
    EngineVoice(emitter).end(events.RunError(message="no"), record(context()))


async def entries(journal: Journal) -> list[events.Event]:
    await journal.committed(journal.last_seq)
    return [entry.event for entry in await journal.read(after=0)]


class TestBinding:
    @pytest.mark.parametrize(
        "other", [context(BOB), context(thread="another")], ids=["user", "thread"]
    )
    async def test_it_cannot_speak_on_anothers_journal(self, other: UserExecutionContext) -> None:
        async with open_journals(MemoryStore()) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                with pytest.raises(CrecheError):
                    EventEmitter(other, journal, Limits())
                assert journal.last_seq == 0

    async def test_after_its_runs_end_it_says_nothing(self) -> None:
        async with speaking() as (emitter, journal):
            end(emitter)
            said = journal.last_seq
            for event in (
                events.Custom(name="x", value=1),
                events.TextMessageStart(message_id=MessageId("m")),
                events.RunError(message="again"),
            ):
                with pytest.raises(EmitterClosedError):
                    await emitter.emit(event)
            with pytest.raises(EmitterClosedError):
                await emitter.text("words")
            assert journal.last_seq == said

    async def test_what_is_out_of_order_is_not_said(self) -> None:
        async with speaking() as (emitter, journal):
            with pytest.raises(GrammarError):
                await emitter.emit(events.ToolCallEnd(tool_call_id=C))
            assert journal.last_seq == 1
            await emitter.text("still fine")
            assert journal.last_seq == 3

    @pytest.mark.parametrize(
        "event",
        [
            events.RunStarted(thread_id=THREAD, run_id=context().run_id),
            events.RunFinished(thread_id=THREAD, run_id=context().run_id),
            events.RunError(message="no"),
        ],
        ids=["RUN_STARTED", "RUN_FINISHED", "RUN_ERROR"],
    )
    async def test_the_beginning_and_the_end_of_the_run_are_not_the_agents_to_say(
        self,
        event: Any,
    ) -> None:
        """Only the engine knows when a run has ended; an agent's word would be a false one."""
        async with speaking() as (emitter, journal):
            with pytest.raises(CrecheError):
                await emitter.emit(event)
            assert journal.last_seq == 1

    @pytest.mark.parametrize("text", ["\ud800", "\udfff and more"], ids=ascii)
    async def test_what_has_no_json_is_not_said_and_closes_nothing(self, text: str) -> None:
        async with speaking() as (emitter, journal):
            with pytest.raises(ValueError, match="surrogates"):
                await emitter.emit(
                    events.ToolCallStart(tool_call_id=C, tool_call_name=text),
                )
            assert journal.last_seq == 1
            end(emitter)
            assert types_of_events(await entries(journal)) == ["RunStarted", "RunError"]


def types_of_events(said: list[events.Event]) -> list[str]:
    return [type(event).__name__ for event in said]


class TestText:
    async def test_words_open_a_message_that_the_end_closes(self) -> None:
        async with speaking() as (emitter, journal):
            await emitter.text("a")
            await emitter.text("b")
            await emitter.end_text()
            await emitter.end_text()
            said = await entries(journal)
            assert types_of_events(said) == [
                "RunStarted",
                "TextMessageStart",
                "TextMessageContent",
                "TextMessageContent",
                "TextMessageEnd",
            ]
            assert len({getattr(event, "message_id", None) for event in said[1:]}) == 1

    async def test_a_new_message_ends_the_one_before(self) -> None:
        async with speaking() as (emitter, journal):
            first = await emitter.begin_text()
            second = await emitter.begin_text()
            await emitter.text("b")
            assert first != second
            said = await entries(journal)
            assert types_of_events(said)[2:4] == ["TextMessageEnd", "TextMessageStart"]
            content = said[-1]
            assert isinstance(content, events.TextMessageContent)
            assert content.message_id == second

    async def test_a_runs_end_closes_what_it_left_open(self) -> None:
        async with speaking() as (emitter, journal):
            await emitter.text("a")
            await emitter.emit(events.ToolCallStart(tool_call_id=C, tool_call_name="add"))
            end(emitter)
            assert types_of_events(await entries(journal))[-4:] == [
                "ToolCallEnd",
                "ToolCallResult",
                "TextMessageEnd",
                "RunError",
            ]

    async def test_what_the_run_said_is_stored_with_its_terminal_event(self) -> None:
        store = MemoryStore()
        async with speaking(store) as (emitter, journal):
            await emitter.text("a")
            await journal.committed(journal.last_seq)
            assert await store.messages(ADA, THREAD) == []
            end(emitter)
            await journal.committed(journal.last_seq)
        messages = store._threads[ADA, THREAD].messages
        assert [item.message.content for item in messages] == ["a"]


class TestShowing:
    async def test_a_draft_is_visible_at_once_and_a_tool_result_once_committed(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        async with speaking(store) as (emitter, journal):
            store.hold()
            await emitter.text("a")
            assert journal.visible == journal.last_seq == 3
            await emitter.emit(events.ToolCallStart(tool_call_id=C, tool_call_name="add"))
            await emitter.emit(events.ToolCallEnd(tool_call_id=C))
            await emitter.emit(
                events.ToolCallResult(message_id=MessageId("m"), tool_call_id=C, content="3"),
            )
            await emitter.text("b")
            assert (journal.visible, journal.last_seq) == (5, 7)
            store.release()
            await journal.committed(7)
            assert journal.visible == 7

    @pytest.mark.parametrize("closer", ["ToolCallResult", "RunError"])
    async def test_what_the_engine_says_last_is_visible_once_committed(
        self,
        autojump_clock: MockClock,
        closer: str,
    ) -> None:
        store = TroubledStore()
        async with speaking(store) as (emitter, journal):
            await emitter.emit(events.ToolCallStart(tool_call_id=C, tool_call_name="add"))
            await emitter.emit(events.ToolCallEnd(tool_call_id=C))
            store.hold()
            if closer == "RunError":
                EngineVoice(emitter).close_open()
                store.release()
                await journal.committed(4)
                store.hold()
                EngineVoice(emitter).end(events.RunError(message="no"), record(context()))
            else:
                EngineVoice(emitter).close_open()
            assert journal.visible == journal.last_seq - 1
            store.release()

    async def test_arguments_and_results_and_errors_carry_no_secret(self) -> None:
        store = MemoryStore()
        async with speaking(store) as (emitter, journal):
            await emitter.emit(events.SubagentStarted(subagent_run_id="s", name="x"))
            await emitter.emit(
                events.SubagentError(subagent_run_id="s", message="password=hunter2"),
            )
            await emitter.emit(events.ToolCallStart(tool_call_id=C, tool_call_name="add"))
            await emitter.emit(
                events.ToolCallArgs(tool_call_id=C, delta='{"apiKey": "hunter2", "n": 1}'),
            )
            await emitter.emit(events.ToolCallEnd(tool_call_id=C))
            await emitter.emit(
                events.ToolCallResult(
                    message_id=MessageId("m"),
                    tool_call_id=C,
                    content='[{"user": "ada", "token": "hunter2"}]',
                ),
            )
            EngineVoice(emitter).end(
                events.RunError(message="Bearer hunter2hunter2"), record(context())
            )
            await journal.committed(journal.last_seq)
            log = await log_of(store)
        assert "hunter2" not in json.dumps(log)
        shown = {event["type"]: event for event in log}
        assert json.loads(shown["TOOL_CALL_ARGS"]["delta"]) == {"apiKey": "[redacted]", "n": 1}
        assert json.loads(shown["TOOL_CALL_RESULT"]["content"]) == [
            {"user": "ada", "token": "[redacted]"},
        ]
        assert "hunter2" not in str(store._threads[ADA, THREAD].messages)
        assert types_of(log)[-1] == "RUN_ERROR"

    async def test_arguments_in_pieces_and_other_data_carry_no_secret(self) -> None:
        store = MemoryStore()
        async with speaking(store) as (emitter, journal):
            await emitter.emit(events.ToolCallStart(tool_call_id=C, tool_call_name="add"))
            for piece in ('{"api', 'Key": "hun', 'ter2", "n"', ": 1}"):
                await emitter.emit(events.ToolCallArgs(tool_call_id=C, delta=piece))
            await emitter.emit(events.ToolCallEnd(tool_call_id=C))
            await emitter.custom("login", {"user": "ada", "password": "hunter2"})
            await emitter.emit(events.StateSnapshot(snapshot=[{"token": "hunter2"}]))
            await emitter.emit(
                events.TextMessageStart(
                    message_id=MessageId("m"), metadata={"a": {"cookie": "hunter2"}}
                )
            )
            end(emitter)
            await journal.committed(journal.last_seq)
            log = await log_of(store)
        assert "hunter2" not in json.dumps(log)
        pieces = [each["delta"] for each in log if each["type"] == "TOOL_CALL_ARGS"]
        assert pieces == ["{", '"apiKey": "[redacted]"', ', "n"', ": 1}"]
        messages = store._threads[ADA, THREAD].messages
        assert '{"apiKey": "[redacted]", "n": 1}' in str(messages)
        said = {each["type"]: each for each in log}
        assert said["CUSTOM"]["value"] == {"user": "ada", "password": "[redacted]"}
        assert said["STATE_SNAPSHOT"]["snapshot"] == [{"token": "[redacted]"}]
        assert said["TEXT_MESSAGE_START"]["metadata"] == {"a": {"cookie": "[redacted]"}}

    async def test_a_piece_that_was_not_said_is_not_read_either(self) -> None:
        """Else the next one would be taken for what comes after it."""
        async with speaking() as (emitter, journal):
            await emitter.emit(events.ToolCallStart(tool_call_id=C, tool_call_name="add"))
            with pytest.raises(ValueError, match="surrogates"):
                await emitter.emit(events.ToolCallArgs(tool_call_id=C, delta='{"n": "\ud800'))
            await emitter.emit(events.ToolCallArgs(tool_call_id=C, delta='{"token": "hunter2"}'))
            said = (await entries(journal))[-1]
            assert isinstance(said, events.ToolCallArgs)
            assert said.delta == '{"token": "[redacted]"}'

    async def test_arguments_in_pieces_that_two_speakers_say_are_one_text(self) -> None:
        async with speaking() as (emitter, journal):
            child = emitter.subagent(emitter._context.child("x"), "x", "")
            await child.emit(events.ToolCallStart(tool_call_id=C, tool_call_name="add"))
            await child.emit(events.ToolCallArgs(tool_call_id=C, delta='{"token": '))
            await emitter.emit(
                events.ToolCallArgs(tool_call_id=C, delta='"hunter2"}', subagent_run_id=child._id)
            )
            said = (await entries(journal))[-1]
            assert isinstance(said, events.ToolCallArgs)
            assert said.delta == '"[redacted]"}'


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_any_json_is_redacted_to_json_and_without_secrets_stays_as_it_was(value: Any) -> None:
    text = json.dumps(value)
    if "[redacted]" not in redact_json(text):
        assert redact_json(text) == text
    with_secret = json.dumps({"outer": [value, {"password": "hunter2!"}]})
    assert json.loads(redact_json(with_secret))["outer"][1] == {"password": "[redacted]"}


@pytest.mark.parametrize("text", ["", "plain words", '{"a":', "3 apples"])
def test_what_is_no_json_stays_as_it_is(text: str) -> None:
    assert redact_json(text) == text


def test_json_that_breaks_off_still_carries_no_secret() -> None:
    """A model's arguments may be cut short by its token limit."""
    assert "hunter2" not in redact_json('{"password": "hunter2", "n": ')


@pytest.mark.parametrize("text", ["[" * 5000, "[" * 900 + "]" * 900, '{"a":' * 2000])
def test_json_that_is_nested_too_deep_to_be_read_is_no_failure(text: str) -> None:
    """A tool may return it, and its run must not die of that."""
    assert redact_json(text) == text


async def say_much(emitter: EventEmitter) -> None:
    for _ in range(100):
        await emitter.text("x" * 100)


async def test_an_agent_has_no_word_about_how_its_run_ends() -> None:
    """Who could say the end would make up a success, or leave a run without any."""
    async with speaking() as (emitter, _):
        for name in ("begin", "queued", "close_open", "end"):
            assert not hasattr(emitter, name)
        for terminal in (
            events.RunError(message="x"),
            events.RunStarted(thread_id=THREAD, run_id=RunId("r")),
        ):
            with pytest.raises(GrammarError):
                await emitter.emit(terminal)


async def test_records_of_anothers_run_leave_the_grammar_as_it_was() -> None:
    async with speaking() as (emitter, journal):
        voice = EngineVoice(emitter)
        with pytest.raises(IsolationError):
            voice.end(events.RunError(message="x"), record(context(BOB)))
        await emitter.text("still its own")
        end(emitter)
        assert types_of_events(await entries(journal))[-1] == "RunError"


class TestFlooding:
    @pytest.mark.parametrize(
        ("deltas", "size", "least"),
        [(1000, 1, 15), (20, 70_000, 18)],
        ids=["many events", "many bytes in few events"],
    )
    async def test_a_flood_can_be_cancelled_and_lets_others_run(
        self, autojump_clock: MockClock, deltas: int, size: int, least: int
    ) -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with speaking() as (emitter, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                for _ in range(deltas):
                    await emitter.text("x" * size)
                nursery.cancel_scope.cancel()
        assert least <= turns <= 1000

    async def test_a_run_waits_while_it_is_too_far_ahead_of_the_store(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        cap = 10_000
        async with speaking(store, Limits(uncommitted_bytes=cap)) as (emitter, journal):
            store.hold()
            with trio.move_on_after(60) as flood:
                while True:
                    await emitter.text("x" * 100)
            assert flood.cancelled_caught
            assert cap <= journal.uncommitted_bytes < cap + 16 * 250  # looked at every 16 events
            store.release()
            with trio.fail_after(1):
                for _ in range(200):
                    await emitter.text("x" * 100)

    async def test_one_event_alone_may_not_be_more_than_a_run_may_say(self) -> None:
        async with speaking(limits=Limits(run_bytes=2000)) as (emitter, journal):
            with pytest.raises(LimitExceededError, match="2,000 bytes"):
                await emitter.text("x" * 2000)
            await emitter.text("x" * 1000)
            end(emitter)
            assert max(len(entry.data) for entry in await journal.read(after=0)) < 1500

    async def test_a_run_may_say_so_much_and_then_only_end(self) -> None:
        async with speaking(limits=Limits(run_bytes=2000)) as (emitter, journal):
            with pytest.raises(LimitExceededError) as caught:
                await say_much(emitter)
            assert caught.value.code == "limit_exceeded"
            said = sum(len(entry.data) for entry in await journal.read(after=0))
            assert 1700 < said <= 2000
            end(emitter)
            assert types_of_events(await entries(journal))[-1] == "RunError"


@pytest.mark.parametrize(
    ("part", "others", "expected"),
    [
        (32, 0.0, 32),  # alone, or on a clock that stands still
        (32, 0.0001, 32),
        (32, 0.001, 32),
        (32, 0.002, 16),
        (16, 0.001, 16),
        (32, 0.1, 8),  # a crowd
        (8, 0.1, 8),
        (8, 0.0005, 16),  # it has gone
        (8, 0.00001, 32),
    ],
)
def test_the_more_runs_flood_the_sooner_each_gives_way(
    part: int, others: float, expected: int
) -> None:
    assert next_part(part, others) == expected
