"""Work ahead is done only while nobody waits for an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator

import trio


class Precedence:
    """Who asks goes first; what is being done ahead is broken off, and begun again later."""

    def __init__(self) -> None:
        self._asking = 0
        self._quiet = trio.Event()  # replaced when somebody asks
        self._quiet.set()
        self._ahead: set[trio.CancelScope] = set()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Somebody waits for an answer while the block lasts."""
        if not self._asking:
            self._quiet = trio.Event()
        self._asking += 1
        for scope in self._ahead:
            scope.cancel()
        try:
            yield
        finally:
            self._asking -= 1
            if not self._asking:
                self._quiet.set()

    async def work_ahead(self, step: Callable[[], Awaitable[object]]) -> None:
        """Have one step done, from its beginning after each time that it was broken off."""
        while True:
            while self._asking:
                await self._quiet.wait()
            with trio.CancelScope() as scope:
                self._ahead.add(scope)
                try:
                    await step()
                finally:
                    self._ahead.discard(scope)
                return
