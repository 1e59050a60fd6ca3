"""What a command is answered."""

from __future__ import annotations

import json
import typing

import pytest

from creche import (
    CrecheError,
    DrainingError,
    GrammarError,
    InvalidContextError,
    LimitExceededError,
    ModelError,
    RunError,
    StoreUnavailableError,
    UnknownAgentError,
)
from creche_server.wire import codes
from creche_server.wire.replies import ErrorCode, code_of, error, success


def test_a_success_has_its_commands_id_and_a_result() -> None:
    assert json.loads(success(7, {"a": None})) == {
        "type": "success",
        "id": 7,
        "result": {"a": None},
    }


@pytest.mark.parametrize("number", [None, 0, -1, 2**70])
def test_an_error_has_its_commands_id_where_there_is_one(number: int | None) -> None:
    told = json.loads(error(number, "draining", "Später."))
    assert told == {"type": "error", "id": number, "error": "draining", "message": "Später."}


def test_an_error_says_when_to_come_back_only_where_that_helps() -> None:
    assert json.loads(error(1, "limit_exceeded", "x", retry_after=1.5))["retry_after"] == 1.5
    assert json.loads(error(1, "limit_exceeded", "x", retry_after=0))["retry_after"] == 0
    assert "retry_after" not in json.loads(error(1, "limit_exceeded", "x"))


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (UnknownAgentError("x"), "invalid_argument"),
        (InvalidContextError("x"), "invalid_argument"),
        (ValueError("x"), "invalid_argument"),
        (DrainingError("x"), "draining"),
        (LimitExceededError("x"), "limit_exceeded"),
        (StoreUnavailableError("x"), "unavailable"),
        (ModelError("x"), "unknown_error"),
        (RunError("x"), "unknown_error"),
        (GrammarError("x"), "unknown_error"),
        (CrecheError("x"), "unknown_error"),
        (RuntimeError("x"), None),
        (KeyError("x"), None),
        (OSError("x"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_only_errors_that_may_be_told_have_a_code(problem: Exception, code: str | None) -> None:
    assert code_of(problem) == code


@pytest.mark.parametrize("kind", [UnicodeDecodeError, json.JSONDecodeError])
def test_a_value_error_of_some_librarys_is_not_told(kind: type[ValueError]) -> None:
    """Its words are about our inside: only what we raise ourselves may be passed on."""
    problem = (
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "inside")
        if kind is UnicodeDecodeError
        else json.JSONDecodeError("inside", "doc", 0)
    )
    assert code_of(problem) is None


def test_codes_are_said_as_the_protocol_spells_them() -> None:
    spelled = typing.get_args(ErrorCode)
    assert len(set(spelled)) == len(spelled)
    assert all(code == code.lower() and code.isascii() for code in spelled)


def test_final_refusals_are_4400_and_an_http_status() -> None:
    assert (codes.BAD_REQUEST, codes.UNAUTHORIZED, codes.FORBIDDEN) == (4400, 4401, 4403)
    assert codes.TOO_MANY == 4429
    assert (codes.OUR_FAULT, codes.DRAINING) == (1011, 1012)
