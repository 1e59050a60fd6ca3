"""Folds a run's events into the messages that they amount to. No I/O.

What it yields is always a history that a model accepts: a tool call is followed by its result,
made up where the run ended before there was one.
"""

from __future__ import annotations

import dataclasses

from creche import _events as events
from creche._context import MessageId, ToolCallId, new_id
from creche._grammar import UNFINISHED_RESULT
from creche._messages import (
    AssistantMessage,
    FunctionCall,
    Message,
    ToolCall,
    ToolMessage,
)


@dataclasses.dataclass(slots=True)
class _Call:
    name: str
    arguments: list[str] = dataclasses.field(default_factory=list[str])
    result: ToolMessage | None = None


@dataclasses.dataclass(slots=True)
class _Turn:
    """One assistant message in the making."""

    text: list[str] = dataclasses.field(default_factory=list[str])
    calls: dict[ToolCallId, _Call] = dataclasses.field(default_factory=dict[ToolCallId, _Call])


class Transcript:
    """The messages of one run so far. A sub-agent's work is not its parent's conversation."""

    __slots__ = ("_calls", "_turns")

    def __init__(self) -> None:
        self._turns: dict[MessageId, _Turn] = {}  # in the order of their first event
        self._calls: dict[ToolCallId, _Call] = {}

    def add(self, event: events.Event) -> None:
        """Take the next event; those that are no part of the conversation change nothing."""
        # The commonest first: this is called for every event.
        if isinstance(event, events.TextMessageContent):
            turn = self._turns.get(event.message_id)
            if turn is not None:
                turn.text.append(event.delta)
        elif getattr(event, "subagent_run_id", None) is not None:
            return
        elif isinstance(event, events.TextMessageStart):
            if event.role in {None, "assistant"}:
                self._turns.setdefault(event.message_id, _Turn())
        elif isinstance(event, events.ToolCallStart):
            call = self._calls[event.tool_call_id] = _Call(event.tool_call_name)
            parent = event.parent_message_id or MessageId(event.tool_call_id)
            self._turns.setdefault(parent, _Turn()).calls[event.tool_call_id] = call
        elif isinstance(event, events.ToolCallArgs):
            self._calls[event.tool_call_id].arguments.append(event.delta)
        elif isinstance(event, events.ToolCallResult):
            self._calls[event.tool_call_id].result = ToolMessage(
                id=event.message_id,
                tool_call_id=event.tool_call_id,
                content=event.content,
            )

    def messages(self) -> list[Message]:
        """The conversation so far: assistant messages, each followed by its tools' results."""
        messages: list[Message] = []
        for message_id, turn in self._turns.items():
            text = "".join(turn.text)
            if not text and not turn.calls:
                continue
            messages.append(
                AssistantMessage(
                    id=message_id,
                    content=text or None,
                    tool_calls=tuple(
                        ToolCall(
                            id=call_id,
                            function=FunctionCall(call.name, "".join(call.arguments) or "{}"),
                        )
                        for call_id, call in turn.calls.items()
                    ),
                ),
            )
            messages.extend(
                call.result
                or ToolMessage(
                    id=MessageId(new_id()),
                    tool_call_id=call_id,
                    content=UNFINISHED_RESULT,
                )
                for call_id, call in turn.calls.items()
            )
        return messages
