"""The deadlines of one run, which stand still while it waits for a person."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import trio


class RunClock:
    """Holds cancel scopes whose time is the run's own. An entry *is* a block."""

    def __init__(self) -> None:
        # {scope: seconds left to it, once the clock has stopped}
        self._scopes: dict[trio.CancelScope, float] = {}
        self._stopped = False

    @contextlib.contextmanager
    def move_on_after(self, seconds: float) -> Iterator[trio.CancelScope]:
        """As Trio's, in the run's time."""
        with trio.CancelScope() as scope, self.keeping(scope, seconds):
            yield scope

    @contextlib.contextmanager
    def keeping(self, scope: trio.CancelScope, seconds: float) -> Iterator[None]:
        """That scope's deadline is so many seconds of the run's time from now, in this block."""
        self._scopes[scope] = seconds
        scope.deadline = math.inf if self._stopped else trio.current_time() + seconds
        try:
            yield
        finally:
            del self._scopes[scope]

    def stop(self) -> None:
        """From now on no time passes."""
        self._stopped = True
        moment = trio.current_time()
        for scope in self._scopes:
            self._scopes[scope] = scope.deadline - moment
            scope.deadline = math.inf

    def go_on(self) -> None:
        """Time passes again."""
        self._stopped = False
        moment = trio.current_time()
        for scope, left in self._scopes.items():
            scope.deadline = moment + left
