"""What a barrier lets through, and what it stops.

A barrier (one tool, one run, one connection) catches all that code can raise, for a SystemExit
or another library's CancelledError must not end its neighbours. Only two things pass: Trio's
own Cancelled, which belongs to whoever cancelled, and the process's KeyboardInterrupt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, cast

import trio

PASSING: Final = (trio.Cancelled, KeyboardInterrupt)


def split(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """(what passes, what is stopped); either may be None, and a group is taken apart.

    To be asked within Trio. A Cancelled passes only while somebody around us really cancels:
    one that code kept from an earlier time and raised again is a fault of that code.
    """
    cancelled = trio.current_effective_deadline() == -math.inf
    passing = PASSING if cancelled else (KeyboardInterrupt,)
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[Any]", error).split(passing)
    return (error, None) if isinstance(error, passing) else (None, error)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The leaves of an error, and what each was raised from or while handling, each once."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        for leaf in leaves(waiting.pop()):
            if id(leaf) not in seen:
                seen.add(id(leaf))
                yield leaf
                waiting.extend(
                    each for each in (leaf.__cause__, leaf.__context__) if each is not None
                )


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that a group is made of, however deep; one that is no group, itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[Any]", error).exceptions:
            yield from leaves(inner)
    else:
        yield error
