"""The log as the process writes it, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from creche_server.telemetry import configure_logging

CANARY = "hunter2-canary"


class Terminal(io.StringIO):
    """What a person looks at."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[io.StringIO, Terminal])
def stream(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """Where the log goes to, for the length of a test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream: io.StringIO = request.param()
    configure_logging("debug", stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(level)


def connect(password: str) -> None:
    """Raise what quotes a secret, as drivers do."""
    msg = f"cannot connect to postgresql://ada:{password}@db/x"
    raise OSError(msg)


def log_in(password: str) -> None:
    """The same, with a reason that quotes one too."""
    try:
        connect(password)
    except OSError as error:
        msg = f"login failed: password={password}, Authorization: Bearer {password}"
        raise ValueError(msg) from error


class TestTheLog:
    def test_holds_tracebacks_without_their_secrets(self, stream: io.StringIO) -> None:
        try:
            log_in(CANARY)
        except ValueError:
            logging.getLogger("mine").exception("it failed")
        logged = stream.getvalue()
        assert "it failed" in logged
        assert "Traceback" in logged
        assert logged.count("[redacted]") == 3
        assert CANARY not in logged

    def test_holds_messages_and_their_extras_without_secrets(self, stream: io.StringIO) -> None:
        logging.getLogger("mine").info("token=%s", CANARY, extra={"api_key": CANARY, "n": 7})
        logged = stream.getvalue()
        assert logged.count("[redacted]") == 2
        assert CANARY not in logged
        assert "7" in logged

    def test_is_json_where_nobody_looks_at_it(self, stream: io.StringIO) -> None:
        logging.getLogger("mine").warning("hello")
        if isinstance(stream, Terminal):
            assert not stream.getvalue().startswith("{")
        else:
            line = json.loads(stream.getvalue())
            assert (line["event"], line["level"], line["logger"]) == ("hello", "warning", "mine")
