"""An answer to a question whose run is over: what a new run is asked, so that it can go on."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from creche._context import MessageId, new_id
from creche._messages import AssistantMessage, Message, UserMessage
from creche._store import QuestionRecord


def as_input(record: QuestionRecord, answer: Any) -> tuple[Message, ...]:
    """The question and the answer as messages that a model understands."""
    question, reply = record.prompt, answer
    if record.digest is not None:
        question = f"{record.prompt} Its arguments would be {record.arguments}"
        reply = _approval(record, cast("dict[str, Any]", answer))
    elif not isinstance(answer, str):
        reply = msgspec.json.encode(answer).decode()
    return (
        AssistantMessage(id=MessageId(new_id()), content=question),
        UserMessage(id=MessageId(new_id()), content=reply),
    )


def _approval(record: QuestionRecord, answer: dict[str, Any]) -> str:
    if answer["approved"]:
        return f"Yes, call {record.tool_name} with exactly these arguments."
    reason = str(answer.get("reason", "")).strip()
    return f"No, do not call {record.tool_name}." + (f" {reason}" if reason else "")
