"""What is done with each free field of each event before it is said: one table. No I/O.

A field is free if whoever says the event may put any words or data into it. `metadata`, which
every event has, is cleaned as data.

The rule: data is cleaned by its keys, wherever it is; sentences that tell of errors by their look;
an agent's and a user's own words, and names, are theirs and stay as they are.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from creche import _events as events
from creche._context import ToolCallId
from creche._redaction import REDACTED, is_secret_key, redact_json, redact_text, redact_value
from creche._streamed_redaction import BEGINNING, Scan, redact_piece


class Cleaning(enum.Enum):
    """What is done with a field."""

    NONE = "words or a name: as they are"
    DATA = "the values under secret-looking keys go"
    JSON = "likewise, in JSON text"
    PIECES = "likewise, in JSON text that comes in pieces"
    PATCH = "likewise, in an RFC 6902 patch, whose paths have keys in them, too"
    ERROR = "credentials and home paths go"


def _row(**fields: Cleaning) -> Mapping[str, Cleaning]:
    return MappingProxyType(fields)


# {event: {field: what is done with it}}
FREE_FIELDS: Final[Mapping[type[events.Event], Mapping[str, Cleaning]]] = MappingProxyType(
    {
        events.RunStarted: _row(input=Cleaning.NONE, protocol_version=Cleaning.NONE),
        # Of a question, what was redacted when it was asked: its schema has names of keys as keys.
        events.RunFinished: _row(result=Cleaning.DATA, outcome=Cleaning.NONE),
        events.RunError: _row(message=Cleaning.ERROR, code=Cleaning.NONE),
        events.StepStarted: _row(step_name=Cleaning.NONE),
        events.StepFinished: _row(step_name=Cleaning.NONE),
        events.TextMessageStart: _row(name=Cleaning.NONE),
        events.TextMessageContent: _row(delta=Cleaning.NONE),
        events.TextMessageEnd: _row(),
        events.ToolCallStart: _row(tool_call_name=Cleaning.NONE),
        events.ToolCallArgs: _row(delta=Cleaning.PIECES),
        events.ToolCallEnd: _row(),
        events.ToolCallResult: _row(content=Cleaning.JSON),
        events.ReasoningStart: _row(),
        events.ReasoningMessageStart: _row(),
        events.ReasoningMessageContent: _row(delta=Cleaning.NONE),
        events.ReasoningMessageEnd: _row(),
        events.ReasoningEnd: _row(),
        events.SubagentStarted: _row(name=Cleaning.NONE, description=Cleaning.NONE),
        events.SubagentFinished: _row(result=Cleaning.DATA, outcome=Cleaning.NONE),
        events.SubagentError: _row(message=Cleaning.ERROR, code=Cleaning.NONE),
        events.StateSnapshot: _row(snapshot=Cleaning.DATA),
        events.StateDelta: _row(delta=Cleaning.PATCH),
        events.ActivitySnapshot: _row(activity_type=Cleaning.NONE, content=Cleaning.DATA),
        events.Custom: _row(name=Cleaning.NONE, value=Cleaning.DATA),
    },
)


def redact_data(value: Any) -> Any:
    """Anything that has JSON, without the values under secret-looking keys.

    What is looked through is its JSON, so the fields of a struct are keys as well; without a
    secret in it, the value itself is returned. Raises TypeError or ValueError if it has no JSON.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    try:
        plain = msgspec.json.decode(msgspec.json.encode(value))
        redacted = redact_value(plain)
    except RecursionError:
        msg = "it is nested too deep to be said"
        raise ValueError(msg) from None
    return value if redacted == plain else redacted


def redact_patch(patch: Any) -> Any:
    """An RFC 6902 patch without secrets: those under its paths' keys, and those in its values."""
    return tuple(
        {**step, "value": REDACTED} if "value" in step and _leads_to_secret(step) else step
        for step in redact_data(patch)
    )


def _leads_to_secret(step: Mapping[str, Any]) -> bool:
    keys = str(step.get("path", "")).split("/")
    return any(is_secret_key(key.replace("~1", "/").replace("~0", "~")) for key in keys)


_CLEANERS: Final[Mapping[Cleaning, Callable[[Any], Any]]] = MappingProxyType(
    {
        Cleaning.DATA: redact_data,
        Cleaning.JSON: redact_json,
        Cleaning.PATCH: redact_patch,
        Cleaning.ERROR: redact_text,
    },
)

Scans = Mapping[ToolCallId, Scan]  # how far each call's arguments have been said
# What an event is said as, and the scan that has come further by it, if it is said.
Redaction = Callable[[Any, Scans], tuple[Any, Scans | None]]


def _of_fields(fields: Mapping[str, Cleaning]) -> Redaction | None:
    cleaners = {name: _CLEANERS[each] for name, each in fields.items() if each in _CLEANERS}

    def redact(event: Any, scans: Scans) -> tuple[Any, Scans | None]:  # noqa: ARG001  see below
        cleaned = {name: clean(getattr(event, name)) for name, clean in cleaners.items()}
        return msgspec.structs.replace(event, **cleaned), None

    return redact if cleaners else None


def _of_arguments(event: events.ToolCallArgs, scans: Scans) -> tuple[events.Event, Scans]:
    call_id = event.tool_call_id
    reached, delta = redact_piece(scans.get(call_id, BEGINNING), event.delta)
    return msgspec.structs.replace(event, delta=delta), {call_id: reached}


# {event: what cleans its free fields}, only of those that have something to clean
REDACTIONS: Final[Mapping[type[Any], Redaction]] = MappingProxyType(
    {
        event: redact
        for event, fields in FREE_FIELDS.items()
        if (redact := _of_fields(fields)) is not None
    }
    | {events.ToolCallArgs: _of_arguments},
)
