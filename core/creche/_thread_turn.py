"""A thread's turn: one at a time has it, and those that want it get it in order."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from creche._context import ThreadId, UserId
from creche._errors import CrecheError


class ThreadTurn:
    """Held while a run is executed on a thread. A live journal has one: see `ThreadTurns`, too."""

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

        Who is cancelled while waiting is in nobody's way. Raises CrecheError within the very run,
        or block, that has it: that would wait for itself.
        """
        if self._is_held_around_us():
            msg = (
                "a run cannot execute another on its own thread, which must wait for its end, and "
                "an engine cannot be opened within another's block on one thread: use `run.spawn` "
                "for a part of a run, leave the first block before, or take another thread"
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


class ThreadTurns:
    """The turns that an infrastructure lends to engines that open a thread's journal by themselves.

    Two journals of one thread at once would go on from the same entry, so that the store could
    take but one of them.
    """

    def __init__(self) -> None:
        # {whose thread: its turn}; an entry *is* `taken`.
        self._turns: dict[tuple[UserId, ThreadId], ThreadTurn] = {}

    def __len__(self) -> int:
        return len(self._turns)

    def wanted_by(self, user_id: UserId, thread_id: ThreadId) -> int:
        """How many have that thread's turn or wait for it."""
        turn = self._turns.get((user_id, thread_id))
        return 0 if turn is None else turn.wanted_by

    @contextlib.asynccontextmanager
    async def taken(self, user_id: UserId, thread_id: ThreadId) -> AsyncIterator[None]:
        """That user's thread is this task's inside the block. See `ThreadTurn.taken`."""
        key = (user_id, thread_id)
        turn = self._turns.setdefault(key, ThreadTurn())
        try:
            async with turn.taken():
                yield
        finally:
            if not turn.wanted_by:
                del self._turns[key]
