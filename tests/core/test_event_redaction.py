"""What each event's free fields are said as: by a table that no event is missing from."""

from __future__ import annotations

import dataclasses
import typing
from decimal import Decimal
from typing import Any, Literal

import msgspec
import pytest

from creche import MessageId, RunId, ThreadId, ToolCallId, events
from creche._event_redaction import (
    FREE_FIELDS,
    REDACTIONS,
    Cleaning,
    redact_data,
    redact_patch,
)

# What nobody can put words or data of his own into: ids, numbers, and a choice of ours.
IDS = {MessageId, RunId, ThreadId, ToolCallId}
OWN_IDS = {"subagent_run_id", "parent_subagent_run_id"}  # the engine's, and strings
OURS = {int, type(None), events.TokenUsage, events.Succeeded, events.Cancelled}


def is_free(kind: Any) -> bool:
    if typing.get_origin(kind) is Literal or kind in IDS | OURS:
        return False
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] in OURS:
        return False
    parts = typing.get_args(kind)
    is_union = parts and typing.get_origin(kind) not in {tuple, dict}
    return any(map(is_free, parts)) if is_union else True


def fields_of(event: type[Any]) -> dict[str, Any]:
    # Not `msgspec.structs.fields`, which tells no NewType from a string.
    return {
        name: kind
        for name, kind in typing.get_type_hints(event).items()
        if name not in {"metadata", "timestamp"}
        and name not in OWN_IDS
        and not name.startswith("_")
    }


@pytest.mark.parametrize("event", typing.get_args(events.Event), ids=lambda each: each.__name__)
def test_each_free_field_of_each_event_has_its_row(event: type[Any]) -> None:
    free = {name for name, kind in fields_of(event).items() if is_free(kind)}
    assert set(FREE_FIELDS[event]) == free


def test_no_row_is_of_no_event() -> None:
    assert set(FREE_FIELDS) == set(typing.get_args(events.Event))


SECRET = {"a": [{"apiKey": "hunter2", "n": 1}]}
SHOWN = {"a": [{"apiKey": "[redacted]", "n": 1}]}
OF_CLEANING: dict[Cleaning, tuple[Any, Any]] = {
    Cleaning.NONE: ("password=hunter2", "password=hunter2"),
    Cleaning.DATA: (SECRET, SHOWN),
    Cleaning.JSON: ('{"token":"hunter2"}', '{"token":"[redacted]"}'),
    Cleaning.PIECES: ('{"token": "hunter2"', '{"token": "[redacted]"'),
    Cleaning.PATCH: (
        ({"op": "add", "path": "/a/apiKey", "value": "hunter2"},),
        ({"op": "add", "path": "/a/apiKey", "value": "[redacted]"},),
    ),
    Cleaning.ERROR: ("password=hunter2", "password=[redacted]"),
}
ROWS = [
    (event, name, cleaning) for event, row in FREE_FIELDS.items() for name, cleaning in row.items()
]


@pytest.mark.parametrize(
    ("event", "name", "cleaning"),
    ROWS,
    ids=[f"{event.__name__}.{name}" for event, name, _ in ROWS],
)
def test_a_free_field_is_said_as_its_row_has_it(
    event: type[Any], name: str, cleaning: Cleaning
) -> None:
    put, shown = OF_CLEANING[cleaning]
    required = {field.name for field in msgspec.structs.fields(event) if field.required}
    made = event(**{**dict.fromkeys(required, "x"), **_fillers(event), name: put})
    redact = REDACTIONS.get(event)
    said = made if redact is None else redact(made, {})[0]
    assert getattr(said, name) == shown


def _fillers(event: type[Any]) -> dict[str, Any]:
    return {"delta": ()} if event is events.StateDelta else {}


class Login(msgspec.Struct):
    user: str
    password: str


@dataclasses.dataclass
class Keys:
    private_key: str


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Login("ada", "hunter2"), {"user": "ada", "password": "[redacted]"}),
        ([Keys("hunter2")], [{"private_key": "[redacted]"}]),
        ({"raw": msgspec.Raw(b'{"token": "hunter2"}')}, {"raw": {"token": "[redacted]"}}),
        ({1: {"secret": {2}}}, {"1": {"secret": "[redacted]"}}),
        (({"auth": b"hunter2"},), [{"auth": "[redacted]"}]),
    ],
    ids=["struct", "dataclass", "raw JSON", "numbers for keys", "bytes"],
)
def test_what_has_json_is_looked_through_as_that(value: Any, shown: Any) -> None:
    assert redact_data(value) == shown


@pytest.mark.parametrize(
    "value",
    ["password=hunter2", 7, None, 1.5, {"n": 2**80}, [Decimal("1.50")], {"user": "ada"}],
    ids=repr,
)
def test_data_without_a_secret_is_what_it_was(value: Any) -> None:
    assert msgspec.json.encode(redact_data(value)) == msgspec.json.encode(value)


def test_what_has_no_json_is_refused_as_the_emitter_says() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="too deep"):
        redact_data(deep)
    with pytest.raises(TypeError):
        redact_data(object())


@pytest.mark.parametrize(
    ("path", "secret"),
    [
        ("/user/password", True),
        ("/token/0", True),
        ("/api~1key", True),
        ("/a/author", False),
        ("", False),
    ],
)
def test_a_patchs_value_is_under_the_keys_of_its_path(path: str, secret: bool) -> None:
    steps = ({"op": "replace", "path": path, "value": "v"}, {"op": "remove", "path": path})
    shown = "[redacted]" if secret else "v"
    assert redact_patch(steps) == ({**steps[0], "value": shown}, steps[1])
    nested = redact_patch([{"op": "add", "path": "/x", "value": {"cookie": "v"}}])
    assert nested[0]["value"] == {"cookie": "[redacted]"}
