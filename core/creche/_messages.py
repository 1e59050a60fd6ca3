"""The messages of a thread, in AG-UI's shapes: what a model is given and a store keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from creche._context import MessageId, ToolCallId, new_id


class _Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename="camel",
    tag_field="role",
):
    id: MessageId


class SystemMessage(_Message, frozen=True, kw_only=True, tag="system"):
    """Instructions from whoever wrote the agent."""

    content: str


class UserMessage(_Message, frozen=True, kw_only=True, tag="user"):
    """What the person said."""

    content: str
    name: str | None = None
    metadata: dict[str, Any] | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """Which tool, and its arguments as the JSON text that the model wrote."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call that an assistant message made."""

    id: ToolCallId
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(_Message, frozen=True, kw_only=True, tag="assistant"):
    """What the agent said, what it called, or both."""

    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class ToolMessage(_Message, frozen=True, kw_only=True, tag="tool"):
    """What a tool returned; `error` is why it failed, when it did."""

    tool_call_id: ToolCallId
    content: str
    error: str | None = None


Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage
AgentInput = str | Sequence[Message]  # what an agent is asked

_encoder: Final = msgspec.json.Encoder()
_decoder: Final[msgspec.json.Decoder[Message]] = msgspec.json.Decoder(Message)


def encode_message(message: Message) -> bytes:
    """One message as JSON."""
    return _encoder.encode(message)


def decode_message(data: bytes) -> Message:
    """The inverse of `encode_message`. Raises msgspec.ValidationError."""
    return _decoder.decode(data)


def role_of(message: Message) -> str:
    """Whose message it is: `system`, `user`, `assistant` or `tool`."""
    return str(message.__struct_config__.tag)


def text_of(message: Message) -> str:
    """The words of a message, empty where it has none."""
    return message.content or ""


def as_messages(state: AgentInput) -> tuple[Message, ...]:
    """What an agent is asked, as messages; words alone become one user message.

    Raises ValueError if there is nothing in it.
    """
    if isinstance(state, str):
        state = [UserMessage(id=MessageId(new_id()), content=state)]
    if not state:
        msg = "a run's input has at least one message"
        raise ValueError(msg)
    for message in state:
        try:
            encode_message(message)
        except (TypeError, ValueError) as error:
            msg = f"a message has no JSON: {error}"
            raise ValueError(msg) from None
    return tuple(state)
