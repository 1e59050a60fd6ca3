"""The events of a run, in AG-UI 1.0's vocabulary: one tagged union.

A struct here encodes to exactly the JSON object that AG-UI specifies (docs.ag-ui.com,
"Events"): camelCase keys, optional keys left out rather than null. `seq` belongs to the
journal, which adds it on encoding.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from creche._context import MessageId, RunId, ThreadId, ToolCallId
from creche._messages import Message


class _Event(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename="camel",
    tag_field="type",
):
    timestamp: int | None = None  # milliseconds since the epoch
    metadata: dict[str, Any] | None = None


class _Attributable(_Event, frozen=True, kw_only=True):
    subagent_run_id: str | None = None  # None: the run's own agent


# --- the run


class Resumption(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """What an interrupt was answered, as AG-UI's ResumeEntry."""

    interrupt_id: str
    status: Literal["resolved", "cancelled"]
    payload: Any = None


class RunInput(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a run was asked, as AG-UI's RunAgentInput: a watcher who did not ask can see it."""

    thread_id: ThreadId
    run_id: RunId
    messages: tuple[Message, ...]  # only what is new in this run
    resume: tuple[Resumption, ...] | msgspec.UnsetType = msgspec.UNSET  # of one that goes on


class RunStarted(_Event, frozen=True, kw_only=True, tag="RUN_STARTED"):
    thread_id: ThreadId
    run_id: RunId
    protocol_version: str | None = None
    parent_run_id: RunId | None = None
    input: RunInput | None = None


class Outcome(msgspec.Struct, frozen=True, tag_field="type", rename="camel"):
    """How a run that did not fail came to its end."""


class Succeeded(Outcome, frozen=True, tag="success"):
    pass


class Cancelled(Outcome, frozen=True, tag="cancelled"):
    pass


class Interrupt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """A question to a person, as AG-UI tells it."""

    id: str
    reason: str
    message: str | None = None
    tool_call_id: ToolCallId | None = None
    response_schema: dict[str, Any] | None = None
    expires_at: str | None = None  # ISO 8601
    subagent_run_id: str | None = None  # who asks, if not the run's own agent
    metadata: dict[str, Any] | None = None


class Interrupted(Outcome, frozen=True, tag="interrupt"):
    """The run is parked, and goes on after an answer: a segment has ended, not the run."""

    interrupts: tuple[Interrupt, ...]


class TokenUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class RunFinished(_Event, frozen=True, kw_only=True, tag="RUN_FINISHED"):
    thread_id: ThreadId
    run_id: RunId
    outcome: Succeeded | Cancelled | Interrupted | None = None
    result: Any = None
    usage: tuple[TokenUsage, ...] | None = None


class RunError(_Event, frozen=True, kw_only=True, tag="RUN_ERROR"):
    message: str
    code: str | None = None
    usage: tuple[TokenUsage, ...] | None = None


class StepStarted(_Attributable, frozen=True, kw_only=True, tag="STEP_STARTED"):
    step_name: str


class StepFinished(_Attributable, frozen=True, kw_only=True, tag="STEP_FINISHED"):
    step_name: str


# --- text


class TextMessageStart(_Attributable, frozen=True, kw_only=True, tag="TEXT_MESSAGE_START"):
    message_id: MessageId
    role: Literal["developer", "system", "assistant", "user"] | None = None
    name: str | None = None


class TextMessageContent(
    _Attributable,
    frozen=True,
    kw_only=True,
    gc=False,
    tag="TEXT_MESSAGE_CONTENT",
):
    message_id: MessageId
    delta: str


class TextMessageEnd(_Attributable, frozen=True, kw_only=True, tag="TEXT_MESSAGE_END"):
    message_id: MessageId


# --- tools


class ToolCallStart(_Attributable, frozen=True, kw_only=True, tag="TOOL_CALL_START"):
    tool_call_id: ToolCallId
    tool_call_name: str
    parent_message_id: MessageId | None = None


class ToolCallArgs(_Attributable, frozen=True, kw_only=True, tag="TOOL_CALL_ARGS"):
    tool_call_id: ToolCallId
    delta: str  # a fragment of the arguments' JSON


class ToolCallEnd(_Attributable, frozen=True, kw_only=True, tag="TOOL_CALL_END"):
    tool_call_id: ToolCallId


class ToolCallResult(_Attributable, frozen=True, kw_only=True, tag="TOOL_CALL_RESULT"):
    message_id: MessageId
    tool_call_id: ToolCallId
    content: str
    role: Literal["tool"] | None = None


# --- reasoning


class ReasoningStart(_Attributable, frozen=True, kw_only=True, tag="REASONING_START"):
    message_id: MessageId


class ReasoningMessageStart(
    _Attributable,
    frozen=True,
    kw_only=True,
    tag="REASONING_MESSAGE_START",
):
    message_id: MessageId
    role: Literal["reasoning"]


class ReasoningMessageContent(
    _Attributable,
    frozen=True,
    kw_only=True,
    gc=False,
    tag="REASONING_MESSAGE_CONTENT",
):
    message_id: MessageId
    delta: str


class ReasoningMessageEnd(_Attributable, frozen=True, kw_only=True, tag="REASONING_MESSAGE_END"):
    message_id: MessageId


class ReasoningEnd(_Attributable, frozen=True, kw_only=True, tag="REASONING_END"):
    message_id: MessageId


# --- sub-agents


class SubagentStarted(_Event, frozen=True, kw_only=True, tag="SUBAGENT_STARTED"):
    subagent_run_id: str
    name: str
    description: str | None = None
    parent_subagent_run_id: str | None = None
    parent_tool_call_id: ToolCallId | None = None


class Suspended(msgspec.Struct, frozen=True, tag_field="type", tag="suspended", rename="camel"):
    """It is not over: its run is parked, and it is started once more when that goes on."""

    interrupt_ids: tuple[str, ...]


class SubagentFinished(_Event, frozen=True, kw_only=True, tag="SUBAGENT_FINISHED"):
    subagent_run_id: str
    result: Any = None
    outcome: Suspended | None = None  # None: it is over


class SubagentError(_Event, frozen=True, kw_only=True, tag="SUBAGENT_ERROR"):
    subagent_run_id: str
    message: str
    code: str | None = None


# --- state and the rest


class StateSnapshot(_Attributable, frozen=True, kw_only=True, tag="STATE_SNAPSHOT"):
    snapshot: Any


class StateDelta(_Attributable, frozen=True, kw_only=True, tag="STATE_DELTA"):
    delta: tuple[dict[str, Any], ...]  # an RFC 6902 patch


class ActivitySnapshot(_Attributable, frozen=True, kw_only=True, tag="ACTIVITY_SNAPSHOT"):
    message_id: MessageId
    activity_type: str
    content: dict[str, Any]


class Custom(_Attributable, frozen=True, kw_only=True, tag="CUSTOM"):
    name: str
    value: Any


Event = (
    RunStarted
    | RunFinished
    | RunError
    | StepStarted
    | StepFinished
    | TextMessageStart
    | TextMessageContent
    | TextMessageEnd
    | ToolCallStart
    | ToolCallArgs
    | ToolCallEnd
    | ToolCallResult
    | ReasoningStart
    | ReasoningMessageStart
    | ReasoningMessageContent
    | ReasoningMessageEnd
    | ReasoningEnd
    | SubagentStarted
    | SubagentFinished
    | SubagentError
    | StateSnapshot
    | StateDelta
    | ActivitySnapshot
    | Custom
)

TERMINAL: Final = (RunFinished, RunError)


def ends_run(event: Event) -> bool:
    """Whether it is its run's terminal event; one that tells of an interrupt is not."""
    if isinstance(event, RunFinished):
        return not isinstance(event.outcome, Interrupted)
    return isinstance(event, RunError)


_encoder: Final = msgspec.json.Encoder()
_decoder: Final[msgspec.json.Decoder[Event]] = msgspec.json.Decoder(Event)


def encode_unnumbered(event: Event) -> bytes:
    """The event as one line of JSON. Raises TypeError or ValueError for what has none."""
    return _encoder.encode(event)


def numbered(encoded: bytes, seq: int) -> bytes:
    """An encoded event with its place in the thread as one key more, the last: `seq`."""
    return b'%b,"seq":%d}' % (encoded[:-1], seq)


def encode_event(event: Event, seq: int) -> bytes:
    """Both in one."""
    return numbered(encode_unnumbered(event), seq)


def decode_event(data: bytes) -> Event:
    """The event of a line of JSON; a `seq` in it is left to the caller, who asked for it."""
    return _decoder.decode(data)
