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
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_STILL: Final = "TtZX"  # states in which nothing is started: stopped, a zombie, dead

BETWEEN_LOOKS: Final = 0.002  # seconds for which a killed process may take to be gone


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


def _children(pid: int) -> Iterator[int]:
    """Those of each of its threads, as far as that is told: see proc_pid_task(5)."""
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (thread / "children").read_text().split())


def _parent_and_state(pid: int) -> tuple[int, str]:
    """Of a process that is not there, nobody and dead."""
    try:
        # Its name comes before, in parentheses, and may have anything in it.
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0, "X"
    return int(parent), state
