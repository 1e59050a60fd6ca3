"""A thread's turn: one run at a time has it, and those that want it get it in order."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from creche._errors import CrecheError


class ThreadTurn:
    """Held while a run is executed on a thread. It belongs to the thread's live journal."""

    def __init__(self) -> None:
        self._lock = trio.Lock()  # a fair one: handed on in the order of asking
        self._nurseries_before = 0  # that the holder's task had open when it took the turn

    @property
    def wanted_by(self) -> int:
        """How many have it or wait for it."""
        state = self._lock.statistics()
        return state.locked + state.tasks_waiting

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """The turn is this task's inside the block; waits for it.

        Who is cancelled while waiting is in nobody's way. Raises CrecheError within the very run
        that has it: that would wait for itself.
        """
        if self._is_held_around_us():
            msg = (
                "a run cannot execute another on its own thread, which must wait for its end: "
                "use `run.spawn` for a part of a run, or another thread"
            )
            raise CrecheError(msg)
        try:
            self._lock.acquire_nowait()  # no checkpoint where nobody is before us
        except trio.WouldBlock:
            await self._lock.acquire()
        self._nurseries_before = len(trio.lowlevel.current_task().child_nurseries)
        try:
            yield
        finally:
            self._lock.release()

    def _is_held_around_us(self) -> bool:
        holder = self._lock.statistics().owner
        task = trio.lowlevel.current_task()
        while holder is not None and task is not holder:
            if task.parent_nursery is None:
                return False
            nursery, task = task.parent_nursery, task.parent_nursery.parent_task
            if task is holder:
                # A task's nurseries nest, so the later ones were opened within the turn. What is
                # in an earlier one is beside the run, and does well to wait.
                return nursery in holder.child_nurseries[self._nurseries_before :]
        return holder is not None
