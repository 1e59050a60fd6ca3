"""`creche top`, as a real process on a pipe and on a terminal, and the picture that it draws."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from rich.console import Console
from tests.server.processes import COMMAND, environment, open_creche, run_creche
from tests.server.running import PATIENCE, Server, open_server
from tests.server.test_runs import AGENTS, CANARIES, search, two_at_work

from creche_server.cli.top import age, picture

MARK = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with open_server(
        tmp_path / "data", AGENTS, tools=(search,), operators=("olga",)
    ) as running:
        yield running


async def top(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await run_creche("top", "--data", "data", *arguments, cwd=folder)


async def test_on_a_pipe_it_is_printed_once_with_whole_ids(server: Server, tmp_path: Path) -> None:
    async with two_at_work(server) as ids:
        everybodys = await top(tmp_path, "--user", "olga")
        adas = await top(tmp_path, "--user", "ada", "--once")
    assert (everybodys.returncode, everybodys.stderr) == (0, b"")
    title, head, first, second = everybodys.stdout.decode().splitlines()
    assert title == "2 runs are live (everybody's)"
    assert head.split() == ["USER", "THREAD", "RUN", "AGENT", "STATUS", "AGE", "TASKS", "DOING"]
    seconds = r"\d+s"
    doing = f"tool search {seconds} in searching"
    assert re.fullmatch(
        rf"ada +rome +{ids['ada']} +boss +running +{seconds} +1 +{doing}",
        first,
    )
    assert re.fullmatch(
        rf"bob +taxes +{ids['bob']} +searching +running +{seconds} +1 +tool search {seconds}",
        second,
    )
    assert adas.stdout.decode().splitlines()[0] == "1 run is live (your own)"
    assert ids["bob"].encode() not in adas.stdout
    for canary in CANARIES.values():
        assert canary.encode() not in everybodys.stdout + adas.stdout


async def test_as_json_it_is_what_the_server_says(server: Server, tmp_path: Path) -> None:
    async with two_at_work(server) as ids:
        told = await top(tmp_path, "--user", "olga", "--json")
    seen = json.loads(told.stdout)
    assert [run["run_id"] for run in seen["runs"]] == [ids["ada"], ids["bob"]]
    assert b"canary" not in told.stdout


async def test_of_nothing_it_says_so(server: Server, tmp_path: Path) -> None:
    told = await top(tmp_path)
    assert (told.returncode, told.stdout) == (0, b"no run is live (your own)\n")


@contextlib.asynccontextmanager
async def on_a_terminal(folder: Path, *arguments: str) -> AsyncIterator[tuple[trio.Process, int]]:
    """It on a terminal of 24 by 100; the process, and the other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    try:
        process = await trio.lowlevel.open_process(
            [*COMMAND, "top", "--data", "data", *arguments],
            cwd=folder,
            env=environment(TERM="xterm-256color"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        try:
            yield process, ours
        finally:
            if process.poll() is None:
                process.kill()
                await process.wait()
    finally:
        os.close(ours)


async def until(ours: int, words: bytes, said: bytearray) -> None:
    """Read the terminal until it has said that; all is kept in `said`."""
    with trio.fail_after(PATIENCE):
        while words not in MARK.sub(b"", said):
            await trio.lowlevel.wait_readable(ours)
            said += os.read(ours, 65536)


async def test_on_a_terminal_it_is_refreshed_until_it_is_told_to_stop(
    server: Server, tmp_path: Path
) -> None:
    said = bytearray()
    async with on_a_terminal(tmp_path, "--user", "ada", "--every", "0.2") as (process, ours):
        await until(ours, b"no run is live", said)
        async with two_at_work(server) as ids:
            await until(ours, b"1 run is live (your own)", said)
            await until(ours, ids["ada"][:8].encode(), said)
            process.send_signal(signal.SIGINT)
            with trio.fail_after(PATIENCE):
                assert await process.wait() == 0
            with contextlib.suppress(OSError):  # which is how a terminal ends
                while data := os.read(ours, 65536):
                    said += data
    assert b"Traceback" not in said
    assert said.startswith(b"\x1b[?1049h")  # a screen of its own
    assert said.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")  # which it gives back, with its cursor
    assert b"canary" not in said


async def test_a_server_that_goes_is_told_of(tmp_path: Path) -> None:
    said = bytearray()
    async with open_creche(tmp_path / "data") as served:
        async with on_a_terminal(tmp_path, "--every", "0.2") as (process, ours):
            await until(ours, b"no run is live", said)
            served.send(signal.SIGTERM)
            await served.ended()
            await until(ours, b"does not answer", said)
            with trio.fail_after(PATIENCE):
                assert await process.wait() == 1
    assert b"Traceback" not in said


def drawn(seen: dict[str, Any], width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(picture(seen))
    return [line.rstrip() for line in captured.get().splitlines()]


def a_run(**more: Any) -> dict[str, Any]:
    return {
        "run_id": "0123456789abcdef",
        "thread_id": "a-very-long-thread-id-that-somebody-chose",
        "user_id": "ada",
        "agent": "shop",
        "status": "running",
        "at": "2026-01-01T00:01:00.000+00:00",
        "created_at": "2026-01-01T00:00:00.000+00:00",
        "doing": [],
        "task_count": 0,
        **more,
    }


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_run_takes_one_line_however_much_it_does(width: int) -> None:
    tool = {"kind": "tool", "name": "search", "since": "2026-01-01T00:00:30.000+00:00"}
    runs = [a_run(doing=[tool] * 9), a_run(status="queued")]
    lines = drawn({"everybodys": True, "total": 2, "runs": runs}, width)
    assert len(lines) == 4
    assert max(map(len, lines)) <= width
    assert "tool search" in lines[2]
    assert "01234567" in lines[2]
    assert "1m00s" in lines[2]


def test_what_others_wrote_is_never_obeyed() -> None:
    rude = a_run(thread_id="\x1b[2J[red]x", user_id="[bold]u", agent="\x07a")
    lines = drawn({"everybodys": True, "total": 1, "runs": [rude]}, 120)
    assert "[2J[red]x" in lines[2]
    assert "[bold]u" in lines[2]
    assert "\x1b" not in "".join(lines)


def test_one_that_ends_says_why_and_more_runs_than_are_shown_are_counted() -> None:
    lines = drawn({"everybodys": False, "total": 5, "runs": [a_run(reason="user")]}, 120)
    assert lines[0] == "5 runs are live, the oldest 1 of them are shown (your own)"
    assert "ending (user)" in lines[2]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m00s"), (3599, "59m59s"), (7620, "2h07m")],
)
def test_an_age_is_short(seconds: float, words: str) -> None:
    assert age(seconds) == words
