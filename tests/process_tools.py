"""Tools that run in processes of their own: a fresh interpreter must be able to import them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from creche import RunError, tool


class Point(msgspec.Struct):
    x: int
    y: int = 7


@tool(process=True)
def where(at: Point, extra: list[int] | None = None) -> dict[str, Any]:
    """Tell who works."""
    return {"pid": os.getpid(), "x": at.x, "y": at.y, "extra": extra}


@tool(process=True)
def echo(words: str) -> str:
    sys.stdout.write("printed\n")
    sys.stdout.flush()
    os.write(1, b"written\n")
    return words + sys.stdin.read()


@tool(process=True)
def hang(pids: str) -> None:
    """Write down who works, here and in a program, and never end."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    _write(pids, os.getpid(), program.pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


@tool(process=True)
def leave_behind(pids: str) -> str:
    """End well, leaving a program and a fork behind, which holds all that it inherited."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    fork = os.fork()
    if not fork:
        time.sleep(60)
    threading.Thread(target=time.sleep, args=(60,)).start()
    _write(pids, os.getpid(), program.pid, fork)
    return "done"


@tool(process=True)
def daemonise(pids: str, ends: bool) -> str:
    """Start programs that leave: in a session of their own, with children, and orphans."""
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    program = subprocess.Popen(sleeping, start_new_session=True)
    reading, writing = os.pipe()
    if not os.fork():
        os.setsid()
        child = subprocess.Popen(sleeping, start_new_session=True)
        if not os.fork():  # its parent ends at once
            os.setsid()
            os.write(writing, f"{os.getpid()} {child.pid}".encode())
            time.sleep(60)
        os._exit(0)
    _write(pids, os.getpid(), program.pid, *map(int, os.read(reading, 99).split()))
    if not ends:
        time.sleep(60)
    return "done"


@tool(process=True)
def end(how: str) -> Any:  # noqa: PLR0912  a table of ways
    """End in one of many ways."""
    match how:
        case "os._exit":
            os._exit(3)
        case "exit 0":
            os._exit(0)
        case "SystemExit":
            sys.exit(4)
        case "KeyboardInterrupt":
            raise KeyboardInterrupt
        case "segfault":
            ctypes.string_at(0)
        case "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises":
            raise ValueError("password=hunter2")
        case "RunError":
            raise RunError("The shop is closed.")
        case "group":
            raise ExceptionGroup("two", [ValueError("a"), OSError("b")])
        case "no JSON":
            return [Unprintable()]
        case "no Unicode":
            return "\ud83d"
        case "unprintable":
            raise Unprintable
        case "huge":
            return "x" * 3_000_000
        case "closes all":
            os.closerange(0, 100)
            time.sleep(60)
    return None


class Unprintable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError


def _by_hand(a: int) -> int:
    return a * 2


def by_hand(a: int) -> int:
    return _by_hand(a)


made_by_hand = tool(process=True, name="doubled")(by_hand)


def _write(path: str, *pids: int) -> None:
    whole = Path(path + ".part")
    whole.write_text(" ".join(map(str, pids)))
    whole.rename(path)
