"""What a command is answered: `success` with a result, or `error` with a code and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from creche import (
    AnswerRefusedError,
    AuditUnavailableError,
    BusyError,
    CrecheError,
    DrainingError,
    InvalidContextError,
    LimitExceededError,
    NoSuchQuestionError,
    QuestionClosedError,
    RunError,
    StoreUnavailableError,
    UnknownAgentError,
)

# The first ones are the Agent Streaming Protocol's, the last five our extensions.
ErrorCode = Literal[
    "invalid_argument",
    "unknown_command",
    "unknown_error",
    "no_such_run",
    "no_such_subscription",
    "no_such_interrupt",
    "not_supported",
    "no_such_thread",
    "busy",
    "limit_exceeded",
    "draining",
    "unavailable",
    "interrupt_closed",
]

_encoder: Final = msgspec.json.Encoder()

_CODES: Final[Mapping[type[Exception], ErrorCode]] = MappingProxyType(
    {
        UnknownAgentError: "invalid_argument",
        InvalidContextError: "invalid_argument",
        ValueError: "invalid_argument",
        BusyError: "busy",
        DrainingError: "draining",
        LimitExceededError: "limit_exceeded",
        AnswerRefusedError: "invalid_argument",
        NoSuchQuestionError: "no_such_interrupt",
        QuestionClosedError: "interrupt_closed",
        AuditUnavailableError: "unavailable",
        StoreUnavailableError: "unavailable",
        RunError: "unknown_error",
        CrecheError: "unknown_error",
    },
)


def success(id: int, result: Mapping[str, Any]) -> bytes:  # noqa: A002  the wire's own word
    """The command did what it was asked, durably where that matters."""
    return _encoder.encode({"type": "success", "id": id, "result": result})


def error(
    id: int | None,  # noqa: A002  the wire's own word
    code: ErrorCode,
    message: str,
    *,
    retry_after: float | None = None,
) -> bytes:
    """The command did nothing. `retry_after` is in seconds, where waiting helps."""
    reply: dict[str, Any] = {"type": "error", "id": id, "error": code, "message": message}
    if retry_after is not None:
        reply["retry_after"] = retry_after
    return _encoder.encode(reply)


def code_of(problem: Exception) -> ErrorCode | None:
    """The code for an error that may be told; None for one that may not."""
    if isinstance(problem, ValueError) and not isinstance(problem, CrecheError):
        # Ours are plain ones; those of libraries are kinds of it, and not meant for clients.
        return "invalid_argument" if type(problem) is ValueError else None
    for kind in type(problem).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return None
