"""The command `creche` as a real process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Final

import trio
from tests.server.running import Server, settings_for

from creche_server.serve import Listening, Stop

START_TIMEOUT: Final = 30.0  # seconds; a busy machine takes a while to import it all
COMMAND: Final = (sys.executable, "-m", "creche_server")


def environment(**more: str) -> dict[str, str]:
    """What a process gets: our import path, and no settings from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CRECHE_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), **more}


async def run_creche(
    *arguments: str,
    cwd: Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; whatever it prints is in what is returned."""
    with trio.fail_after(START_TIMEOUT):
        return await trio.run_process(
            [*COMMAND, *arguments],
            cwd=cwd,
            stdin=stdin,
            env=environment(**(env or {})),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


class ServerProcess:
    """A `creche serve` that listens."""

    def __init__(self, process: trio.Process, server: Server, stderr: Path) -> None:
        self.process = process
        self.server = server  # as its clients see it
        self._stderr = stderr

    def errors(self) -> str:
        """What it has printed to stderr so far."""
        return self._stderr.read_text()

    async def rest(self) -> bytes:
        """What it prints to stdout from now to its end."""
        assert self.process.stdout is not None
        return b"".join([data async for data in self.process.stdout])

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, *, within: float = 15.0) -> int:
        """Wait until it is gone; its exit code."""
        with trio.fail_after(within):
            return await self.process.wait()


def _serving(data: Path, *arguments: str) -> list[str]:
    options = ["--model", "scripted", "--port", "0", "--data", str(data)]
    return [*COMMAND, "serve", *arguments, *options]


def _reached(data: Path, said: str) -> Server:
    """The server that has printed this, as its clients see it."""
    first, second = said.splitlines()
    url = first.removeprefix("creche: listening on ")
    link = second.removeprefix("creche: open ")
    assert url.startswith("http://127.0.0.1:"), first
    return Server(settings_for(data), Stop(), Listening(url, link), trio.Event())


@contextlib.asynccontextmanager
async def open_creche(
    data: Path,
    *arguments: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[ServerProcess]:
    """`creche serve` on a free port. Leaving the block kills it, if it still runs."""
    cwd = cwd or data.parent
    stderr = cwd / f"stderr-{os.urandom(4).hex()}"
    with stderr.open("wb") as errors:
        process = await trio.lowlevel.open_process(
            _serving(data, *arguments),
            cwd=cwd,
            env=environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    try:
        said = b""
        with trio.fail_after(START_TIMEOUT):
            while said.count(b"\n") < 2:
                more = await process.stdout.receive_some()
                assert more, f"it ended: {stderr.read_text()}"
                said += more
        yield ServerProcess(process, _reached(data, said.decode()), stderr)
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.kill()
            await process.wait()
            await process.stdout.aclose()


@contextlib.contextmanager
def started_creche(data: Path, *arguments: str) -> Iterator[Server]:
    """The same for a fixture that several tests share, which no Trio run outlives."""
    with subprocess.Popen(
        _serving(data, *arguments),
        cwd=data.parent,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline() + process.stdout.readline()
            yield _reached(data, said)
        finally:
            process.kill()
