"""Which event may follow which: as tables, and against rules written a second time."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.agui_rules import StockClient, check_history

from creche import Grammar, GrammarError, Message, MessageId, RunId, ThreadId, ToolCallId, events
from creche._grammar import RULES, UNFINISHED_RESULT, Bracket, Phase
from creche._transcript import Transcript

M, M2 = MessageId("m-1"), MessageId("m-2")
C = ToolCallId("c-1")

START = events.RunStarted(thread_id=ThreadId("t"), run_id=RunId("r"))
FINISH = events.RunFinished(thread_id=ThreadId("t"), run_id=RunId("r"))
ERROR = events.RunError(message="no")
TEXT = events.TextMessageStart(message_id=M)
WORDS = events.TextMessageContent(message_id=M, delta="a")
TEXT_END = events.TextMessageEnd(message_id=M)
CALL = events.ToolCallStart(tool_call_id=C, tool_call_name="add")
ARGS = events.ToolCallArgs(tool_call_id=C, delta="{}")
CALL_END = events.ToolCallEnd(tool_call_id=C)
RESULT = events.ToolCallResult(message_id=M2, tool_call_id=C, content="3")
STEP = events.StepStarted(step_name="plan")
STEP_END = events.StepFinished(step_name="plan")
THINK = events.ReasoningStart(message_id=M)
THOUGHT = events.ReasoningMessageStart(message_id=M, role="reasoning")
THOUGHT_WORDS = events.ReasoningMessageContent(message_id=M, delta="a")
THOUGHT_END = events.ReasoningMessageEnd(message_id=M)
THINK_END = events.ReasoningEnd(message_id=M)
SUB = events.SubagentStarted(subagent_run_id="s-1", name="x")
SUB_END = events.SubagentFinished(subagent_run_id="s-1")
SUB_ERROR = events.SubagentError(subagent_run_id="s-1", message="no")
NESTED = events.SubagentStarted(subagent_run_id="s-2", name="y", parent_subagent_run_id="s-1")
CUSTOM = events.Custom(name="x", value=1)
SUSPENDED = events.SubagentFinished(subagent_run_id="s-1", outcome=events.Suspended(("q-1",)))
PARKED = events.RunFinished(
    thread_id=ThreadId("t"),
    run_id=RunId("r"),
    outcome=events.Interrupted(interrupts=(events.Interrupt(id="q-1", reason="x"),)),
)


def of(event: events.Event, subagent: str) -> events.Event:
    return msgspec.structs.replace(event, subagent_run_id=subagent)


def as_json(story: Sequence[events.Event]) -> list[dict[str, Any]]:
    """As a stock client parses them (that no null is sent is test_events' matter)."""
    whole = map(msgspec.to_builtins, story)
    return [{key: value for key, value in event.items() if value is not None} for event in whole]


def said(*before: events.Event) -> Grammar:
    grammar = Grammar()
    for event in before:
        grammar.accept(event)
    return grammar


def test_every_event_has_a_rule() -> None:
    assert set(RULES) == set(typing.get_args(events.Event))


TAKEN: dict[str, Sequence[events.Event]] = {
    "an empty run": [START, FINISH],
    "a run that fails": [START, ERROR],
    "a run that cannot even start": [ERROR],
    "a message": [START, TEXT, WORDS, WORDS, TEXT_END, FINISH],
    "a message without words": [START, TEXT, TEXT_END, FINISH],
    "a tool call": [START, CALL, ARGS, CALL_END, RESULT, FINISH],
    "a tool call within a message": [START, TEXT, CALL, CALL_END, RESULT, WORDS, TEXT_END, FINISH],
    "a step, twice": [START, STEP, STEP_END, STEP, STEP_END, FINISH],
    "reasoning": [START, THINK, THOUGHT, THOUGHT_WORDS, THOUGHT_END, THINK_END, FINISH],
    "what has no place of its own": [START, CUSTOM, TEXT, CUSTOM, TEXT_END, FINISH],
    "a sub-agent": [START, SUB, of(TEXT, "s-1"), of(TEXT_END, "s-1"), SUB_END, FINISH],
    "a sub-agent that fails": [START, SUB, SUB_ERROR, FINISH],
    "a sub-agent of a sub-agent": [
        START,
        SUB,
        NESTED,
        events.SubagentFinished(subagent_run_id="s-2"),
        SUB_END,
        FINISH,
    ],
    "a question": [START, PARKED, START, FINISH],
    "a question after a question": [START, PARKED, START, TEXT, TEXT_END, PARKED, START, FINISH],
    "a question over a call that is owed its result": [
        START,
        CALL,
        CALL_END,
        PARKED,
        START,
        RESULT,
        FINISH,
    ],
    "a message that goes on after a question": [
        START,
        TEXT,
        WORDS,
        TEXT_END,
        PARKED,
        START,
        TEXT,
        WORDS,
        TEXT_END,
        FINISH,
    ],
    "a sub-agent that goes on after a question": [
        START,
        SUB,
        SUSPENDED,
        PARKED,
        START,
        SUB,
        SUB_END,
        FINISH,
    ],
    "a sub-agent that is suspended in its call": [
        START,
        SUB,
        of(CALL, "s-1"),
        of(CALL_END, "s-1"),
        SUSPENDED,
        PARKED,
        START,
        SUB,
        of(RESULT, "s-1"),
        SUB_END,
        FINISH,
    ],
    "a failure with everything open": [START, TEXT, CALL, STEP, SUB, ERROR],
    "a step of the same name in a sub-agent": [
        START,
        STEP,
        SUB,
        of(STEP, "s-1"),
        of(STEP_END, "s-1"),
        SUB_END,
        STEP_END,
        FINISH,
    ],
}


@pytest.mark.parametrize("story", TAKEN.values(), ids=TAKEN)
def test_this_is_taken(story: Sequence[events.Event]) -> None:
    StockClient().take_all(as_json(story))
    grammar = said(*story)
    assert grammar.phase is Phase.ENDED


REFUSED: dict[str, tuple[Sequence[events.Event], events.Event]] = {
    "text before the run": ([], TEXT),
    "a custom event before the run": ([], CUSTOM),
    "an end before the beginning": ([], FINISH),
    "a second beginning": ([START], START),
    "a second end": ([START, FINISH], FINISH),
    "an error after the end": ([START, FINISH], ERROR),
    "an end after an error": ([START, ERROR], FINISH),
    "a second error": ([START, ERROR], ERROR),
    "text after the end": ([START, FINISH], TEXT),
    "a custom event after the end": ([START, FINISH], CUSTOM),
    "a beginning after the end": ([START, FINISH], START),
    "words without a message": ([START], WORDS),
    "words of another message": ([START, TEXT], events.TextMessageContent(message_id=M2, delta="")),
    "words after their message": ([START, TEXT, TEXT_END], WORDS),
    "a message that is open": ([START, TEXT], TEXT),
    "the end of no message": ([START], TEXT_END),
    "arguments without a call": ([START], ARGS),
    "arguments after their call": ([START, CALL, CALL_END], ARGS),
    "a call that is open": ([START, CALL], CALL),
    "a call's id a second time": ([START, CALL, CALL_END, RESULT], CALL),
    "a result without a call": ([START], RESULT),
    "a result before the call's end": ([START, CALL], RESULT),
    "a second result": ([START, CALL, CALL_END, RESULT], RESULT),
    "a step that is open": ([START, STEP], STEP),
    "the end of no step": ([START], STEP_END),
    "a thought's words outside it": ([START, THINK], THOUGHT_WORDS),
    "the end of no reasoning": ([START, THOUGHT], THINK_END),
    "a sub-agent a second time": ([START, SUB, SUB_END], SUB),
    "the end of no sub-agent": ([START], SUB_END),
    "a sub-agent's second end": ([START, SUB, SUB_END], SUB_ERROR),
    "a child of no sub-agent": ([START], NESTED),
    "a sub-agent that is its own parent": (
        [START],
        events.SubagentStarted(subagent_run_id="s", name="x", parent_subagent_run_id="s"),
    ),
    "text of no sub-agent": ([START], of(TEXT, "s-1")),
    "words of another sub-agent": ([START, SUB, TEXT], of(WORDS, "s-1")),
    "words of the run in a sub-agent's message": ([START, SUB, of(TEXT, "s-1")], WORDS),
    "a sub-agent's end while its text is open": ([START, SUB, of(TEXT, "s-1")], SUB_END),
    "a sub-agent's end while its child runs": ([START, SUB, NESTED], SUB_END),
    "a result of another sub-agent": ([START, SUB, CALL, CALL_END], of(RESULT, "s-1")),
    "the end while text is open": ([START, TEXT], FINISH),
    "the end while a call is open": ([START, CALL], FINISH),
    "the end while a result is owed": ([START, CALL, CALL_END], FINISH),
    "the end while a step is open": ([START, STEP], FINISH),
    "the end while reasoning is open": ([START, THINK], FINISH),
    "the end while a thought is open": ([START, THOUGHT], FINISH),
    "the end while a sub-agent runs": ([START, SUB], FINISH),
    "a question while text is open": ([START, TEXT], PARKED),
    "a question while a call is open": ([START, CALL], PARKED),
    "a question while a step is open": ([START, STEP], PARKED),
    "a question while a sub-agent runs": ([START, SUB], PARKED),
    "a question before the beginning": ([], PARKED),
    "a question after the end": ([START, FINISH], PARKED),
    "a second question at once": ([START, PARKED], PARKED),
    "text while it is parked": ([START, PARKED], TEXT),
    "a custom event while it is parked": ([START, PARKED], CUSTOM),
    "a result while it is parked": ([START, CALL, CALL_END, PARKED], RESULT),
    "an end while it is parked": ([START, PARKED], FINISH),
    "an error while it is parked": ([START, PARKED], ERROR),
    "the end while a result is owed from before a question": (
        [START, CALL, CALL_END, PARKED, START],
        FINISH,
    ),
    "a sub-agent that was suspended, before the question": ([START, SUB, SUSPENDED], SUB),
    "a sub-agent that had ended, after a question": ([START, SUB, SUB_END, PARKED, START], SUB),
    "a sub-agent's suspension while its text is open": ([START, SUB, of(TEXT, "s-1")], SUSPENDED),
    "a sub-agent's words before it is started again": (
        [START, SUB, SUSPENDED, PARKED, START],
        of(TEXT, "s-1"),
    ),
    "a message's id again, by another": ([START, SUB, TEXT, TEXT_END], of(TEXT, "s-1")),
    "a thought's id again, by another": (
        [START, SUB, THOUGHT, THOUGHT_END],
        of(THOUGHT, "s-1"),
    ),
    "a thought in another's reasoning of the same id": ([START, SUB, THINK], of(THOUGHT, "s-1")),
    "a message with the id of another's result": (
        [START, SUB, CALL, CALL_END, RESULT],
        events.TextMessageStart(message_id=M2, subagent_run_id="s-1"),
    ),
    "a call in another's message": (
        [START, SUB, TEXT],
        events.ToolCallStart(
            tool_call_id=C,
            tool_call_name="add",
            parent_message_id=M,
            subagent_run_id="s-1",
        ),
    ),
}


@pytest.mark.parametrize(("before", "event"), REFUSED.values(), ids=REFUSED)
def test_this_is_refused_and_changes_nothing(
    before: Sequence[events.Event],
    event: events.Event,
) -> None:
    grammar = said(*before)
    closers, phase = types(grammar.closers()), grammar.phase
    with pytest.raises(GrammarError, match=type(event).__name__):
        grammar.accept(event)
    assert (types(grammar.closers()), grammar.phase) == (closers, phase)


def types(said: Sequence[events.Event]) -> list[str]:
    return [type(event).__name__ for event in said]


@pytest.mark.parametrize(
    ("open_events", "closers"),
    [
        ([], []),
        ([TEXT], ["TextMessageEnd"]),
        ([CALL], ["ToolCallEnd", "ToolCallResult"]),
        ([CALL, ARGS, CALL_END], ["ToolCallResult"]),
        ([STEP, TEXT], ["TextMessageEnd", "StepFinished"]),
        ([THINK, THOUGHT], ["ReasoningMessageEnd", "ReasoningEnd"]),
        ([SUB, NESTED], ["SubagentError", "SubagentError"]),
        ([SUB, of(CALL, "s-1")], ["ToolCallEnd", "ToolCallResult", "SubagentError"]),
    ],
    ids=range(8),
)
def test_closers_are_of_whatever_is_open_innermost_first(
    open_events: Sequence[events.Event],
    closers: list[str],
) -> None:
    grammar = said(START, *open_events)
    found = grammar.closers()
    assert types(found) == closers
    for event in [*found, FINISH]:
        grammar.accept(event)
    for event in found:
        if isinstance(event, events.ToolCallResult):
            assert event.content == UNFINISHED_RESULT


def test_closers_of_a_sub_agent_leave_others_and_itself_open() -> None:
    other = events.SubagentStarted(subagent_run_id="s-3", name="z")
    story: list[events.Event] = [TEXT, SUB, NESTED, other]
    story += [of(STEP, "s-1"), of(CALL, "s-2"), of(THINK, "s-3")]
    grammar = said(START, *story)
    found = grammar.closers("s-1")
    assert types(found) == ["ToolCallEnd", "ToolCallResult", "StepFinished", "SubagentError"]
    for event in [*found, SUB_END]:
        grammar.accept(event)
    assert types(grammar.closers()) == ["ReasoningEnd", "SubagentError", "TextMessageEnd"]


def test_what_is_open_can_be_asked() -> None:
    grammar = said(START, TEXT, SUB, of(STEP, "s-1"))
    assert grammar.is_open(Bracket.TEXT, M)
    assert not grammar.is_open(Bracket.TEXT, M2)
    assert grammar.is_open(Bracket.SUBAGENT, "s-1")
    assert grammar.is_open(Bracket.STEP, "plan", "s-1")
    assert not grammar.is_open(Bracket.STEP, "plan")


# --- any stream

owners = st.sampled_from([None, None, "s-1", "s-2"])
message_ids = st.sampled_from([MessageId("m-1"), MessageId("m-2")])
call_ids = st.sampled_from([ToolCallId("c-1"), ToolCallId("c-2"), ToolCallId("c-3")])
deltas = st.sampled_from(["", "a", "{"])
subagents = st.sampled_from(["s-1", "s-2"])
any_event: st.SearchStrategy[events.Event] = st.one_of(
    st.builds(events.TextMessageStart, message_id=message_ids, subagent_run_id=owners),
    st.builds(
        events.TextMessageContent,
        message_id=message_ids,
        delta=deltas,
        subagent_run_id=owners,
    ),
    st.builds(events.TextMessageEnd, message_id=message_ids, subagent_run_id=owners),
    st.builds(
        events.ToolCallStart,
        tool_call_id=call_ids,
        tool_call_name=st.just("add"),
        parent_message_id=st.none() | message_ids,
        subagent_run_id=owners,
    ),
    st.builds(events.ToolCallArgs, tool_call_id=call_ids, delta=deltas, subagent_run_id=owners),
    st.builds(events.ToolCallEnd, tool_call_id=call_ids, subagent_run_id=owners),
    st.builds(
        events.ToolCallResult,
        message_id=message_ids,
        tool_call_id=call_ids,
        content=deltas,
        subagent_run_id=owners,
    ),
    st.builds(events.StepStarted, step_name=st.just("plan"), subagent_run_id=owners),
    st.builds(events.StepFinished, step_name=st.just("plan"), subagent_run_id=owners),
    st.builds(events.ReasoningStart, message_id=message_ids, subagent_run_id=owners),
    st.builds(
        events.ReasoningMessageStart,
        message_id=message_ids,
        role=st.just("reasoning"),
        subagent_run_id=owners,
    ),
    st.builds(events.ReasoningMessageEnd, message_id=message_ids, subagent_run_id=owners),
    st.builds(events.ReasoningEnd, message_id=message_ids, subagent_run_id=owners),
    st.builds(
        events.SubagentStarted,
        subagent_run_id=subagents,
        name=st.just("x"),
        parent_subagent_run_id=st.none() | subagents,
    ),
    st.builds(
        events.SubagentFinished,
        subagent_run_id=subagents,
        outcome=st.none() | st.just(events.Suspended(("q-1",))),
    ),
    st.sampled_from([CUSTOM, CUSTOM, FINISH, ERROR, START, PARKED]),
)


# Half of the streams begin with both sub-agents, so that it comes to questions of ownership.
any_stream = st.builds(
    lambda begun, rest: [*begun, *rest],
    st.sampled_from([(), (SUB, events.SubagentStarted(subagent_run_id="s-2", name="y"))]),
    st.lists(any_event, max_size=40),
)


def accepted_of(stream: Sequence[events.Event]) -> tuple[Grammar, list[events.Event]]:
    grammar = said(START)
    accepted: list[events.Event] = [START]
    for event in stream:
        try:
            grammar.accept(event)
        except GrammarError:
            continue
        accepted.append(event)
    return grammar, accepted


@settings(max_examples=600)
@given(any_stream)
def test_whatever_is_accepted_a_stock_client_takes(stream: list[events.Event]) -> None:
    _, accepted = accepted_of(stream)
    StockClient().take_all(as_json(accepted))


@settings(max_examples=200)
@given(any_stream)
def test_after_the_closers_any_run_can_finish_complete(stream: list[events.Event]) -> None:
    """Closed and finished, a stock client takes it, and each tool call has one result."""
    grammar, accepted = accepted_of(
        [event for event in stream if not isinstance(event, events.TERMINAL)],
    )
    for event in [*grammar.closers(), FINISH]:
        grammar.accept(event)
        accepted.append(event)
    assert grammar.closers() == []
    whole = as_json(accepted)
    StockClient().take_all(whole)
    calls = [event["toolCallId"] for event in whole if event["type"] == "TOOL_CALL_START"]
    results = [event["toolCallId"] for event in whole if event["type"] == "TOOL_CALL_RESULT"]
    assert sorted(calls) == sorted(results)


@settings(max_examples=300)
@given(any_stream)
def test_any_run_can_be_parked_and_goes_on_as_it_was(stream: list[events.Event]) -> None:
    """What was open is open again, but for half-written calls, which are written no further."""
    grammar, accepted = accepted_of(
        [event for event in stream if not isinstance(event, events.TERMINAL)],
    )

    def opened() -> set[Any]:
        half_written = Bracket.TOOL_CALL
        return {
            ((Bracket.RESULT if bracket is half_written else bracket), key, of_step, owner)
            for (bracket, key, of_step), owner in grammar._open.items()
        }

    before, openers = opened(), grammar.openers()
    for event in [*grammar.suspenders(("q-1",)), PARKED]:
        grammar.accept(event)
        accepted.append(event)
    assert grammar.phase is Phase.PARKED
    assert all(bracket is Bracket.RESULT for bracket, _, _ in grammar._open)
    for event in [START, *openers]:
        grammar.accept(event)
        accepted.append(event)
    assert opened() == before
    for event in [*grammar.closers(), FINISH]:
        grammar.accept(event)
        accepted.append(event)
    client = StockClient()
    client.take_all(as_json(accepted))
    assert client.state == "finished"


@settings(max_examples=200)
@given(any_stream)
def test_a_parked_run_whose_process_died_can_be_ended(stream: list[events.Event]) -> None:
    grammar, accepted = accepted_of(
        [event for event in stream if not isinstance(event, events.TERMINAL)],
    )
    for event in [*grammar.suspenders(("q-1",)), PARKED]:
        grammar.accept(event)
        accepted.append(event)
    again = said(*accepted)  # as recovery makes it of the log
    endings: list[events.Event] = [START, *again.suspended()]
    for event in endings:
        again.accept(event)
    for event in (closers := again.closers()):
        again.accept(event)
    again.accept(ERROR)
    client = StockClient()
    client.take_all(as_json([*accepted, *endings, *closers]))
    assert not client.open
    assert not any(client.subagents.values())


def test_a_result_may_not_take_the_message_that_another_speaks_in() -> None:
    """A stock client would give the message to who came last, and refuse its rest."""
    message, call = MessageId("m-1"), ToolCallId("c-1")
    grammar, _ = accepted_of(
        [
            events.SubagentStarted(subagent_run_id="s-1", name="x"),
            events.TextMessageStart(message_id=message, subagent_run_id="s-1"),
            events.ToolCallStart(tool_call_id=call, tool_call_name="t"),
            events.ToolCallEnd(tool_call_id=call),
        ],
    )
    with pytest.raises(GrammarError, match="'m-1' is another's"):
        grammar.accept(events.ToolCallResult(message_id=message, tool_call_id=call, content=""))
    grammar.accept(
        events.ToolCallResult(message_id=MessageId("m-2"), tool_call_id=call, content=""),
    )
    grammar.accept(events.TextMessageContent(message_id=message, delta="x", subagent_run_id="s-1"))


@settings(max_examples=200)
@given(any_stream, subagents)
def test_after_its_closers_any_sub_agent_can_finish(
    stream: list[events.Event],
    subagent: str,
) -> None:
    begun = events.SubagentStarted(subagent_run_id=subagent, name="x")
    running = [event for event in stream if not isinstance(event, events.TERMINAL)]
    ends = (events.SubagentFinished, events.SubagentError)
    grammar, accepted = accepted_of(
        [begun, *(event for event in running if not isinstance(event, ends))],
    )
    for event in [*grammar.closers(subagent), events.SubagentFinished(subagent_run_id=subagent)]:
        grammar.accept(event)
        accepted.append(event)
    for event in [*grammar.closers(), FINISH]:
        grammar.accept(event)
        accepted.append(event)
    StockClient().take_all(as_json(accepted))


@settings(max_examples=200)
@given(any_stream, st.booleans())
def test_whatever_is_accepted_amounts_to_a_history_that_a_model_takes(
    stream: list[events.Event],
    is_closed: bool,
) -> None:
    grammar, accepted = accepted_of(stream)
    transcript = Transcript()
    for event in [*accepted, *(grammar.closers() if is_closed else [])]:
        transcript.add(event)
    messages: list[Message] = transcript.messages()
    check_history(messages)
