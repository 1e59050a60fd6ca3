"""A nursery for what works behind a block, unseen by whoever is in the block."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio


@contextlib.asynccontextmanager
async def open_background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose block raises what its body raised, not a group around that.

    That there is a nursery is our business: who writes `except ValueError` around one of our
    blocks must catch the ValueError of its body. What fails in the background comes as a group.

    Resource handling: the body ends what it started before it ends itself, as with any nursery.
    """
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
