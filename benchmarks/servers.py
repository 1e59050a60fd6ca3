"""The servers side by side: each a process of its own, pinned, and ended by whoever started it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cpu import pin

HERE = Path(__file__).parent
LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
# One load machine plays everybody, so the caps that are there for strangers are out of its way.
CRECHE = {
    "CRECHE_MODEL": "scripted",
    "CRECHE_MAX_CONNECTIONS": "100000",
    "CRECHE_MAX_CONNECTIONS_PER_USER": "100000",
}


class ServerError(Exception):
    """A server did not start, or would not do as it was asked."""


@dataclass(frozen=True)
class Server:
    """A server that listens."""

    name: str
    pid: int
    port: int  # on 127.0.0.1
    tokens: tuple[str, ...] = ()


def creche_command() -> list[str] | None:
    """Return how to start creche with this interpreter, or None where it is not installed."""
    script = Path(sys.executable).with_name("creche")
    if script.exists():
        return [str(script)]
    if find_spec("creche_server") is not None:
        return [sys.executable, "-m", "creche_server"]
    return None


@contextmanager
def open_creche(
    folder: Path,
    core: int,
    *,
    users: int,
    settings: Mapping[str, str],
    agents: str | None = None,
) -> Generator[Server]:
    """Serve creche on a fresh database in `folder`, with tokens for `users` users.

    `agents` are more agents than the one it has, as MODULE:NAME.

    Raises:
        ServerError: it is not installed, or did not start.

    """
    command = creche_command()
    if command is None:
        msg = "creche is not installed beside this interpreter"
        raise ServerError(msg)
    data = folder / "data"
    env = {**os.environ, **CRECHE, **settings}
    serve = [*command, "serve", "--host", "127.0.0.1", "--port", "0", "--data", str(data)]
    serve += [agents] if agents is not None else []
    with _open_process("creche", serve, folder, core, env) as (pid, port):
        tokens: list[str] = []
        for number in range(users):
            mint = [*command, "token", "--user", f"bench-{number}", "--data", str(data)]
            done = subprocess.run(mint, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                msg = f"creche token: {done.stderr.strip() or done.stdout.strip()}"
                raise ServerError(msg)
            tokens.append(done.stdout.split()[-1])
        yield Server("creche", pid, port, tuple(tokens))


@contextmanager
def open_bare(folder: Path, core: int, *, events: int, payload: float) -> Generator[Server]:
    """Serve the bare FastAPI loop, whose events have `payload` bytes on average.

    Raises:
        ServerError: it did not start.

    """
    serve = [sys.executable, str(HERE / "bare_fastapi.py")]
    serve += ["--events", str(events), "--payload", str(payload)]
    with _open_process("fastapi", serve, folder, core, os.environ) as (pid, port):
        yield Server("fastapi", pid, port)


@contextmanager
def _open_process(
    name: str, command: Sequence[str], folder: Path, core: int, env: Mapping[str, str]
) -> Generator[tuple[int, int]]:
    """Run a server on one core until the block ends; yield its process id and its port.

    It is in a session of its own, so that a Ctrl-C reaches us alone and we end it in order. What
    it prints goes to a file, which unlike a pipe never makes it wait.
    """
    log = folder / f"{name}.log"
    mine = os.sched_getaffinity(0)
    pin(core)  # a child starts where its parent is: no moment in which it runs elsewhere
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=dict(env), cwd=folder, start_new_session=True
            )
    finally:
        os.sched_setaffinity(0, mine)
    try:
        yield process.pid, _wait_for_port(name, process, log)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_port(name: str, process: subprocess.Popen[bytes], log: Path) -> int:
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        if found := LISTENING.search(log.read_text(errors="replace")):
            return int(found[1])
        if process.poll() is not None:
            break
        time.sleep(0.05)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    msg = f"{name} does not listen (exit code {process.poll()})\n{tail}"
    raise ServerError(msg)
