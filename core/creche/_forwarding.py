"""Passes a journal's entries on to a socket, for the older names that held one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import trio

from creche._journal import Journal

Send = Callable[[bytes], Awaitable[None]]  # sends one event, as JSON, to one user's socket


class Forwarding:
    """How far a journal's entries have been sent."""

    def __init__(self, journal: Journal, send: Send) -> None:
        self._journal = journal
        self._send = send
        self._last = journal.visible
        self._progress = trio.lowlevel.ParkingLot()

    async def follow(self) -> None:
        """Send what becomes visible, until cancelled."""
        while True:
            for entry in await self._journal.read(after=self._last):
                await self._send(entry.data)
                self._last = entry.seq
            self._progress.unpark_all()

    async def caught_up(self) -> None:
        """Wait until `follow` has sent all that is visible."""
        while self._last < self._journal.visible:
            await self._progress.park()

    async def up_to_the_end(self) -> None:
        """Send what nobody follows any more."""
        while self._last < self._journal.visible:
            for entry in await self._journal.read(after=self._last):
                await self._send(entry.data)
                self._last = entry.seq


@contextlib.asynccontextmanager
async def open_forwarding(journal: Journal, send: Send) -> AsyncIterator[Forwarding]:
    """What becomes visible inside the block is sent, all of it before the block is left."""
    sent = Forwarding(journal, send)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sent.follow)
        yield sent
        await sent.caught_up()
        nursery.cancel_scope.cancel()
