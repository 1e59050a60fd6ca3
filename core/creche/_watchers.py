"""Who watches a thread, and the end of a run that nobody watches any more."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import trio

from creche._background import open_background


class Watchers:
    """How many watch one thread. It belongs to the thread's live journal."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def count(self) -> int:
        return self._count

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """One more watches inside this block. To be used within Trio."""
        self._count += 1
        self._changed.unpark_all()
        try:
            yield
        finally:
            self._count -= 1
            self._changed.unpark_all()

    async def gone(self) -> None:
        """Wait until nobody watches."""
        while self._count:
            await self._changed.park()

    async def come(self) -> None:
        """Wait until somebody watches."""
        while not self._count:
            await self._changed.park()


@contextlib.asynccontextmanager
async def cancelled_when_unwatched(
    watchers: Watchers,
    cancel: Callable[[], None],
    *,
    grace: float,
) -> AsyncIterator[None]:
    """Call `cancel` once nobody has watched for `grace` seconds on end, inside this block.

    Who comes in time, be it somebody else, takes the place of who left. A block that begins
    unwatched has the grace, too.
    """
    async with open_background() as nursery:
        nursery.start_soon(_cancel_when_unwatched, watchers, cancel, grace)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


async def _cancel_when_unwatched(
    watchers: Watchers, cancel: Callable[[], None], grace: float
) -> None:
    while True:
        await watchers.gone()
        with trio.move_on_after(grace) as waiting:
            await watchers.come()
        if waiting.cancelled_caught:
            cancel()
            return
