"""Ends what a process has started, and what that has started, wherever it has gone.

A process group loses whoever begins a session of its own (`setsid`, daemons). On Linux a process
can be the one to whom the orphans below it come (prctl(2), PR_SET_CHILD_SUBREAPER): then whoever
kills its children, again and again until there are none, has ended all that was below it.
Elsewhere, and without pidfd_open(2), nothing is found here, and the group must do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import trio

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_STILL: Final = "TtZX"  # states in which nothing is started: stopped, a zombie, dead

BETWEEN_LOOKS: Final = 0.002  # seconds for which a killed process may take to be gone


# As `adopt_orphans`, in the process that becomes the program: execve(2) keeps it, fork(2) does not.
_ADOPTING: Final = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
except (OSError, AttributeError):
    pass
try:
    os.execv(sys.argv[1], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error.strerror}")
"""


def adopting(path: str, command: Sequence[str]) -> list[str]:
    """What to start instead of `command`, whose program is at `path`, so that orphans come to it.

    By a fresh interpreter, some 20 ms: code of ours between fork and exec is not safe in a
    process that has threads. Elsewhere than on Linux it is the command itself.
    """
    if sys.platform != "linux":
        return [path, *command[1:]]
    return [sys.executable, "-I", "-S", "-c", _ADOPTING, path, *command]


def adopt_orphans() -> None:
    """Have this process be the one to whom orphans below it come, where there is such a thing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc may hide it
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def is_still(pid: int) -> bool:
    """Whether a process that was told to stop has done so, so that it starts nothing more."""
    return _parent_and_state(pid)[1] in _STILL


def kill_children(pid: int) -> bool:
    """Kill the children of a process; whether there was one. Another's are never touched."""
    found = False
    for child in _children(pid):
        with contextlib.suppress(OSError, AttributeError):
            handle = os.pidfd_open(child)
            try:
                # The number may have become another's by now. What the handle holds cannot.
                parent, state = _parent_and_state(child)
                if parent == pid and state not in "ZX":
                    found = True
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)
    return found


async def kill_tree(pid: int) -> None:
    """Kill a process that is not reaped yet, so its number cannot be another's, and those below.

    It leads a group. Waits until none is left; cancelled meanwhile, it kills the group at least.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)  # it starts no more, and keeps whoever comes to it
    try:
        while not is_still(pid) or kill_children(pid):  # noqa: ASYNC110  no event tells of these
            await trio.sleep(BETWEEN_LOOKS)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def is_leaderless_group(pid: int) -> bool:
    """Whether the group of a process that is reaped can be signalled by its number.

    A number is not used again while a group has it (POSIX, 4.14): if no process has it, the group
    is still the old one, or none.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


class HeldProcesses:
    """Processes as they were found at one time, to be killed later; never another's.

    Resource handling: a block, which lets go of them.
    """

    def __init__(self) -> None:
        self._handles: list[int] = []

    def hold_below(self, pid: int) -> None:
        """Take hold of all that is below a process right now."""
        parents = [pid]
        for parent in parents:  # which grows
            for child in _children(parent):
                with contextlib.suppress(OSError, AttributeError):
                    handle = os.pidfd_open(child)
                    if _parent_and_state(child)[0] == parent:
                        self._handles.append(handle)
                        parents.append(child)
                    else:
                        os.close(handle)

    def kill(self) -> None:
        """Kill those that are still alive."""
        for handle in self._handles:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """The living processes below one, each with when it began, so that no other is taken for it."""
    for child in _children(pid):
        fields = _stat(child)
        if fields and fields[0] not in "ZX":
            yield child, fields[19]  # in clock ticks: see proc_pid_stat(5)
            yield from descendants(child)


def _children(pid: int) -> Iterator[int]:
    """Those of each of its threads, as far as that is told: see proc_pid_task(5)."""
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (thread / "children").read_text().split())


def _parent_and_state(pid: int) -> tuple[int, str]:
    """Of a process that is not there, nobody and dead."""
    fields = _stat(pid)
    return (int(fields[1]), fields[0]) if fields else (0, "X")


def _stat(pid: int) -> list[str]:
    """What the system says of a process, from its state on; nothing of one that is gone."""
    try:
        # Its name comes before, in parentheses, and may have anything in it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
