"""What the server's tests have in common: a running server, and what it logs."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.server.running import Server, open_server


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a server of their own configured."""
    for name in os.environ:
        if name.startswith("CRECHE_") and name != "CRECHE_TEST_POSTGRES":
            monkeypatch.delenv(name)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with the scripted model, on a data directory of its own."""
    async with open_server(tmp_path / "data") as running:
        yield running


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Must be empty at the end of a test in which nothing was the server's fault."""
    caplog.set_level(logging.DEBUG, logger="creche")
    found: list[str] = []
    yield found
    found.extend(
        f"{record.name}: {record.getMessage()} {record.exc_text or ''}"
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR
    )
    assert not found, "\n".join(found)
