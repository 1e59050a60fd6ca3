"""A nursery for what works behind a block, unseen by whoever is in the block."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from creche._errors import CrecheError


@contextlib.asynccontextmanager
async def open_background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose block raises what its body raised, not a group around that.

    That there is a nursery is our business: who writes `except ValueError` around one of our
    blocks must catch the ValueError of its body. What fails in the background comes as a group.

    Raises CrecheError where Trio does not run: each block of ours that lives comes by here.

    Resource handling: the body ends what it started before it ends itself, as with any nursery.
    """
    check_on_trio()
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except Exception as error:  # noqa: BLE001  raised again, below
                failure = error
    except BaseExceptionGroup as group:
        if failure is None:
            raise
        raise group.derive([failure, *group.exceptions]) from None
    if failure is not None:
        raise failure


def check_on_trio() -> None:
    """Raise CrecheError under asyncio, where Trio's own words would be of its insides."""
    if not trio.lowlevel.in_trio_task():
        msg = "creche needs Trio: run it by trio.run(main), not asyncio.run(main())"
        raise CrecheError(msg)
