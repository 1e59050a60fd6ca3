"""The tasks below a nursery, counted, and named with where each of them stands."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

import trio

_MOST: int = 50  # tasks that are worth naming


def tasks_below(nursery: trio.Nursery) -> Iterator[trio.lowlevel.Task]:
    """Its tasks and theirs, each before those below it."""
    waiting = list(nursery.child_tasks)  # no recursion: who nests deeply must not stop the counting
    while waiting:
        task = waiting.pop()
        yield task
        waiting.extend(tasks_of(task))


def tasks_of(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    """Those directly below it, in whichever of its nurseries."""
    for inner in task.child_nurseries:
        yield from inner.child_tasks


def count_tasks(nursery: trio.Nursery | None) -> int:
    """How many there are; none where there is no nursery."""
    return 0 if nursery is None else sum(1 for _ in tasks_below(nursery))


def name_of_code(task: trio.lowlevel.Task) -> str:
    """`module.function` that it was started with.

    Not Trio's own name for it, which whoever starts a task may choose: it may be anything.
    """
    coro = task.coro
    code = getattr(coro, "cr_code", None)
    if code is None:  # of another kind than `async def` makes
        return type(coro).__name__
    frame = coro.cr_frame
    module = "?" if frame is None else frame.f_globals.get("__name__", "?")
    return f"{module}.{code.co_qualname}"


def where_it_stands(task: trio.lowlevel.Task) -> str:
    """`module.function:line` of the innermost frame that is not Trio's own, if there is one.

    Names of code only: no path, no argument, nothing that a user said.
    """
    standing: tuple[FrameType, int] | None = None
    for frame, line in task.iter_await_frames():
        if not frame.f_globals.get("__name__", "").startswith("trio."):
            standing = frame, line
    if standing is None:
        return name_of_code(task)
    frame, line = standing
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}:{line}"


def names_of_tasks(nursery: trio.Nursery | None) -> tuple[str, ...]:
    """Where each task below it stands, the first 50 of them."""
    if nursery is None:
        return ()
    names = [where_it_stands(task) for task in tasks_below(nursery)]
    more = len(names) - _MOST
    return (*names[:_MOST], f"and {more} more") if more > 0 else tuple(names)
