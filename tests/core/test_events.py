"""Every event is exactly what AG-UI's own package takes: no more keys, no nulls."""

from __future__ import annotations

import typing
from typing import Any

import ag_ui.core.events
import msgspec
import pydantic
import pytest

from creche import (
    AssistantMessage,
    FunctionCall,
    MessageId,
    RunId,
    SystemMessage,
    ThreadId,
    ToolCall,
    ToolCallId,
    ToolMessage,
    UserMessage,
    events,
)
from creche._events import decode_event, encode_event

ALL = typing.get_args(events.Event)
M, C, S = MessageId("m-1"), ToolCallId("c-1"), "s-1"
T, R = ThreadId("t-1"), RunId("r-1")

package: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ag_ui.core.events.Event)

MESSAGES = (
    SystemMessage(id=MessageId("m-0"), content="Be brief."),
    UserMessage(id=MessageId("m-1"), content="zoë", name="Zoë", metadata={"a": [1]}),
    UserMessage(id=MessageId("m-2"), content=""),
    AssistantMessage(
        id=MessageId("m-3"),
        content="I add.",
        tool_calls=(ToolCall(id=C, function=FunctionCall(name="add", arguments="{}")),),
    ),
    ToolMessage(id=MessageId("m-4"), tool_call_id=C, content="3", error="no"),
)
INPUT = events.RunInput(thread_id=T, run_id=R, messages=MESSAGES)
USAGE = (
    events.TokenUsage(model="m", input_tokens=0, output_tokens=1),
    events.TokenUsage(),
)

# {type: (the fields that must be there, all the others)}; timestamp and metadata are every one's
SAMPLES: dict[type[Any], tuple[dict[str, Any], dict[str, Any]]] = {
    events.RunStarted: (
        {"thread_id": T, "run_id": R},
        {"protocol_version": "1.0", "parent_run_id": RunId("r-0"), "input": INPUT},
    ),
    events.RunFinished: (
        {"thread_id": T, "run_id": R},
        {"outcome": events.Succeeded(), "result": {"a": [1]}, "usage": USAGE},
    ),
    events.RunError: ({"message": "no"}, {"code": "agent_failed", "usage": USAGE}),
    events.StepStarted: ({"step_name": "plan"}, {"subagent_run_id": S}),
    events.StepFinished: ({"step_name": "plan"}, {"subagent_run_id": S}),
    events.TextMessageStart: (
        {"message_id": M},
        {"role": "assistant", "name": "Zoë", "subagent_run_id": S},
    ),
    events.TextMessageContent: ({"message_id": M, "delta": "a\nb"}, {"subagent_run_id": S}),
    events.TextMessageEnd: ({"message_id": M}, {"subagent_run_id": S}),
    events.ToolCallStart: (
        {"tool_call_id": C, "tool_call_name": "add"},
        {"parent_message_id": M, "subagent_run_id": S},
    ),
    events.ToolCallArgs: ({"tool_call_id": C, "delta": "{}"}, {"subagent_run_id": S}),
    events.ToolCallEnd: ({"tool_call_id": C}, {"subagent_run_id": S}),
    events.ToolCallResult: (
        {"message_id": M, "tool_call_id": C, "content": "3"},
        {"role": "tool", "subagent_run_id": S},
    ),
    events.ReasoningStart: ({"message_id": M}, {"subagent_run_id": S}),
    events.ReasoningMessageStart: (
        {"message_id": M, "role": "reasoning"},
        {"subagent_run_id": S},
    ),
    events.ReasoningMessageContent: ({"message_id": M, "delta": ""}, {"subagent_run_id": S}),
    events.ReasoningMessageEnd: ({"message_id": M}, {"subagent_run_id": S}),
    events.ReasoningEnd: ({"message_id": M}, {"subagent_run_id": S}),
    events.SubagentStarted: (
        {"subagent_run_id": S, "name": "searcher"},
        {"description": "looks", "parent_subagent_run_id": "s-0", "parent_tool_call_id": C},
    ),
    events.SubagentFinished: (
        {"subagent_run_id": S},
        {"result": [1], "outcome": events.Suspended(("q-1",))},
    ),
    events.SubagentError: ({"subagent_run_id": S, "message": "no"}, {"code": "x"}),
    events.StateSnapshot: ({"snapshot": {"a": 1}}, {"subagent_run_id": S}),
    events.StateDelta: (
        {"delta": ({"op": "add", "path": "/a", "value": 1}, {"op": "remove", "path": "/b"})},
        {"subagent_run_id": S},
    ),
    events.ActivitySnapshot: (
        {"message_id": M, "activity_type": "PLAN", "content": {"a": 1}},
        {"subagent_run_id": S},
    ),
    events.Custom: ({"name": "x", "value": 1}, {"subagent_run_id": S}),
}
CASES = [
    pytest.param(event_type(**required, **more), id=f"{event_type.__name__}-{name}")
    for event_type, (required, optional) in SAMPLES.items()
    for name, more in (
        ("bare", {}),
        ("full", {**optional, "timestamp": 1_700_000_000_000, "metadata": {"a": {"b": None}}}),
        *((field, {field: value}) for field, value in optional.items()),
    )
] + [
    pytest.param(
        events.RunFinished(thread_id=T, run_id=R, outcome=events.Cancelled()),
        id="RunFinished-cancelled",
    ),
    *(
        pytest.param(
            events.RunFinished(
                thread_id=T,
                run_id=R,
                outcome=events.Interrupted(interrupts=(interrupt,)),
            ),
            id=f"RunFinished-interrupt-{name}",
        )
        for name, interrupt in {
            "bare": events.Interrupt(id="q-1", reason="input_required"),
            "full": events.Interrupt(
                id="q-1",
                reason="tool_call",
                message="May I?",
                tool_call_id=C,
                response_schema={"type": "object", "properties": {"a": {"const": 1}}},
                expires_at="2026-01-02T03:04:05.678+00:00",
                subagent_run_id=S,
                metadata={"creche": {"digest": "d"}},
            ),
        }.items()
    ),
    *(
        pytest.param(
            events.RunStarted(
                thread_id=T,
                run_id=R,
                parent_run_id=RunId("r-0"),
                input=events.RunInput(thread_id=T, run_id=R, messages=(), resume=(resumption,)),
            ),
            id=f"RunStarted-{resumption.status}",
        )
        for resumption in (
            events.Resumption(interrupt_id="q-1", status="resolved", payload={"a": 1}),
            events.Resumption(interrupt_id="q-1", status="cancelled"),
        )
    ),
]


def test_the_samples_are_of_all_events_and_all_their_fields() -> None:
    assert set(SAMPLES) == set(ALL)
    for event_type, (required, optional) in SAMPLES.items():
        fields = msgspec.structs.fields(event_type)
        assert {field.name for field in fields if field.required} == set(required), event_type
        assert {field.name for field in fields if not field.required} == {
            *optional,
            "timestamp",
            "metadata",
        }, event_type


def unknown_keys(model: Any) -> list[str]:
    """Keys that the package's models, which take any, do not know; at every depth."""
    if isinstance(model, pydantic.BaseModel):
        own = [f"{type(model).__name__}.{key}" for key in model.model_extra or {}]
        inner = [getattr(model, field) for field in type(model).model_fields]
        return own + [key for item in inner for key in unknown_keys(item)]
    return [key for item in model for key in unknown_keys(item)] if isinstance(model, list) else []


def nulls(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key != "metadata"]
        return [found for key, item in items for found in nulls(item, f"{path}/{key}")]
    if isinstance(value, list):
        return [found for item in value for found in nulls(item, f"{path}/[]")]
    return [path] if value is None else []


@pytest.mark.parametrize("event", CASES)
def test_the_package_takes_it_and_knows_every_key(event: Any) -> None:
    data = msgspec.json.decode(encode_event(event, 7))
    assert data.pop("seq") == 7
    model = package.validate_python(data)
    assert model.type.value == data["type"]
    assert unknown_keys(model) == []
    # It takes snake_case, too, which no other client does.
    assert package.dump_python(model, by_alias=True, mode="json") == data


@pytest.mark.parametrize("event", CASES)
def test_an_absent_field_is_left_out_rather_than_null(event: Any) -> None:
    """A stock client refuses some of the nulls, such as that of `subagentRunId`."""
    assert nulls(msgspec.json.decode(encode_event(event, 7))) == []


@pytest.mark.parametrize("event", CASES)
def test_it_is_one_line_that_comes_back_the_same(event: Any) -> None:
    line = encode_event(event, 12)
    assert b"\n" not in line
    assert line.endswith(b',"seq":12}')
    assert decode_event(line) == event


def test_a_null_that_must_be_there_stays() -> None:
    custom = msgspec.json.decode(encode_event(events.Custom(name="x", value=None), 1))
    assert custom["value"] is None
    state = msgspec.json.decode(encode_event(events.StateSnapshot(snapshot=None), 1))
    assert state["snapshot"] is None


def test_the_key_check_finds_a_key_that_the_package_does_not_know() -> None:
    """Without this, a change in the package could blind the test above."""
    model = package.validate_python(
        {
            "type": "RUN_FINISHED",
            "threadId": "t",
            "runId": "r",
            "usage": [{"model": "m", "cost": 1}],
        },
    )
    assert unknown_keys(model) == ["TokenUsage.cost"]


def test_only_a_runs_end_is_terminal() -> None:
    assert set(events.TERMINAL) == {events.RunFinished, events.RunError}
    parked = events.Interrupted(interrupts=(events.Interrupt(id="q-1", reason="x"),))
    for event, ends in (
        (events.RunError(message="no"), True),
        (events.RunFinished(thread_id=T, run_id=R), True),
        (events.RunFinished(thread_id=T, run_id=R, outcome=events.Cancelled()), True),
        (events.RunFinished(thread_id=T, run_id=R, outcome=parked), False),
        (events.RunStarted(thread_id=T, run_id=R), False),
    ):
        assert events.ends_run(event) is ends, event
