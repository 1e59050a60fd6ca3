"""What a block of code left behind: tasks, threads, processes, and runs that still go on."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import trio

from creche._descendants import descendants
from creche._run import Run
from creche._run_tree import ActivityNode
from creche._supervisor import Supervisor
from creche._task_tree import name_of_code, tasks_below, where_it_stands

# What a thread of Trio's is called while it has nothing to do; it is kept for a few seconds.
_IDLE: Final = re.compile(r"Trio thread \d+")
_BETWEEN_LOOKS: Final = 0.01  # seconds
_NOT_ITS_OWN: Final = ("threading", "trio.", "outcome.")


@contextlib.asynccontextmanager
async def assert_no_orphans(
    nursery: trio.Nursery | None = None,
    *,
    supervisor: Supervisor | None = None,
    within: float = 0.0,
) -> AsyncIterator[None]:
    """Raise AssertionError for what this block began and did not end, each with where it stands.

    It looks at all tasks of the process, system tasks included, or at those below `nursery`
    alone; at all threads but the idle ones that Trio keeps; where there is a /proc, at
    processes below this one; and, given a `supervisor`, at its runs and what they do. What was
    there before is not minded.
    What may take its time to be gone has `within` seconds for it, on Trio's clock.

    A block that raises is not looked at: its own error is the better one.
    """
    before = _all(nursery, supervisor)
    yield
    deadline = trio.current_time() + within
    while True:
        left = {key: words for key, words in _all(nursery, supervisor).items() if key not in before}
        if not left or trio.current_time() >= deadline:
            break
        await trio.sleep(_BETWEEN_LOOKS)
    if left:
        msg = "left behind:\n" + "\n".join(f"- {words}" for words in left.values())
        raise AssertionError(msg)


def _all(nursery: trio.Nursery | None, supervisor: Supervisor | None) -> dict[object, str]:
    """What there is, and what it is called."""
    return {
        **dict(_tasks(nursery)),
        **dict(_threads()),
        **dict(_processes()),
        **({} if supervisor is None else dict(_runs(supervisor))),
    }


def _tasks(nursery: trio.Nursery | None) -> Iterator[tuple[object, str]]:
    if nursery is not None:
        tasks = tasks_below(nursery)
    else:
        root = trio.lowlevel.current_root_task()
        assert root is not None
        tasks = (task for inner in root.child_nurseries for task in tasks_below(inner))
    for task in tasks:
        yield task, f"task {name_of_code(task)} at {where_it_stands(task)}"


def _threads() -> Iterator[tuple[object, str]]:
    frames = sys._current_frames()  # noqa: SLF001  the one way to see another thread's
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not _IDLE.fullmatch(thread.name):
            frame = frames.get(thread.ident or 0)
            yield thread, f"thread {thread.name!r}{_standing(frame)}"


def _standing(frame: FrameType | None) -> str:
    """Where a thread is in code of its own, as `where_it_stands` says it of a task."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "?")
        if not module.startswith(_NOT_ITS_OWN):
            return f" at {module}.{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _processes() -> Iterator[tuple[object, str]]:
    for pid, since in descendants(os.getpid()):
        name = "?"
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        yield ("process", pid, since), f"process {pid} ({name})"


def _runs(supervisor: Supervisor) -> Iterator[tuple[object, str]]:
    for run in supervisor.all_runs():
        yield ("run", run.user_id, run.run_id), f"{run!r}{_doing(run)}"


def _doing(run: Run) -> str:
    def names(nodes: tuple[ActivityNode, ...]) -> Iterator[str]:
        for node in nodes:
            yield f"{node.kind} {node.name}"
            yield from names(node.doing)

    found = ", ".join(names(run.tree().doing))
    return f", at work on {found}" if found else ""
