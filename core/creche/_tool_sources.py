"""Tools that live in a run: a source is opened within it and closed with it, whatever happens.

A source (an MCP server, say) has something of its own that lives: a process, a connection, a
session. So each agent that asks for one gets its own, opened before the agent is made and closed
after it has ended. Until then a cancel of the run does not reach the source: what the agent does
in its cleanup can still use it, and it is closed in order, within the run's cleanup allowance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol, runtime_checkable

import trio

from creche._background import open_background
from creche._barrier import split
from creche._context import UserExecutionContext
from creche._errors import RunError
from creche._failures import identity, told
from creche._limits import Limits
from creche._tools import Tool

_log: Final = logging.getLogger("creche.tools")


class ToolSourceError(RunError):
    """A tool source could not be opened, or has ended; the message may be told as it stands."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="tool_source_unavailable")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ToolSourceContext:
    """What a tool source is handed: for whom it is opened, and how it tells of its end."""

    context: UserExecutionContext
    killed: Callable[[], None]  # a process of its had to be killed; the receipt then names it
    outlived: Callable[[], None]  # something of its could not be ended; likewise


@runtime_checkable
class ToolSource(Protocol):
    """Where tools come from that live in a run. Itself infrastructure: it holds no run's state."""

    def open_tools(
        self, opening: ToolSourceContext, /
    ) -> AbstractAsyncContextManager[Sequence[Tool]]:
        """The tools, for as long as the block; a block for each agent that asks for the source.

        What it raises while it opens ends the run (a RunError in its own words). An error later
        ends the source, and its tools then say so. Leaving the block ends all that it opened;
        past the run's cleanup allowance it is cancelled, and must then end at once.
        """
        ...


@contextlib.asynccontextmanager
async def open_tool_sources(
    sources: Mapping[str, ToolSource],
    own: Sequence[Tool],
    context: UserExecutionContext,
    limits: Limits,
    *,
    killed: Callable[[str], None],
    outlived: Callable[[str], None],
    told_to_end: Callable[[], float | None] = lambda: None,
) -> AsyncIterator[tuple[Tool, ...]]:
    """All of these sources, opened at once, for as long as the block; their tools, after `own`.

    They are closed once the block has ended. `told_to_end` is the trio time from which
    `Limits.cleanup_timeout` then counts, if that was before.

    Raises ToolSourceError if one cannot be opened, if they take longer than
    `Limits.tool_source_timeout`, and if two tools have one name.
    """
    over = trio.Event()
    async with open_background() as nursery:
        opened = [
            _Opened(
                name,
                source,
                ToolSourceContext(
                    context=context,
                    killed=functools.partial(killed, name),
                    outlived=functools.partial(outlived, name),
                ),
            )
            for name, source in sources.items()
        ]
        try:
            changed = trio.lowlevel.ParkingLot()
            for each in opened:
                nursery.start_soon(each.serve, over, changed)
            await _until_open(opened, changed, limits)
            yield _together(own, opened)
        finally:
            over.set()
            told_at, now = told_to_end(), trio.current_time()
            since = now if told_at is None else min(now, told_at)
            for each in opened:
                each.end_by(since + limits.cleanup_timeout)


async def _until_open(
    opened: Sequence[_Opened], changed: trio.lowlevel.ParkingLot, limits: Limits
) -> None:
    """Wait until all are open. Raises ToolSourceError for the first that cannot be."""
    with trio.move_on_after(limits.tool_source_timeout) as waiting:
        while any(not each.settled for each in opened):
            await changed.park()
            for each in opened:
                if each.failure is not None:
                    raise each.failure
    if waiting.cancelled_caught:
        late = ", ".join(repr(each.name) for each in opened if not each.settled)
        msg = f"The tool source {late} did not open within {limits.tool_source_timeout:g} s."
        raise ToolSourceError(msg)


def _together(own: Sequence[Tool], opened: Sequence[_Opened]) -> tuple[Tool, ...]:
    """Raises ToolSourceError for a name that is there twice: one would hide the other."""
    together = list(own)
    names = {each.name for each in own}
    for source in opened:
        for each in source.tools:
            if each.name in names:
                msg = f"The tool source {source.name!r} has a second tool named {each.name!r}."
                raise ToolSourceError(msg)
            names.add(each.name)
            together.append(each)
    return tuple(together)


class _Opened:
    """One source of one agent, from before it is opened until after it is closed."""

    def __init__(self, name: str, source: ToolSource, opening: ToolSourceContext) -> None:
        self.name = name
        self.tools: tuple[Tool, ...] = ()
        self.settled = False  # it is open, or cannot be opened
        self.failure: ToolSourceError | None = None  # why it could not be opened
        self._source = source
        self._opening = opening
        self._scope = trio.CancelScope()
        self._gone = False
        self._calls: set[trio.CancelScope] = set()  # of those under way

    def end_by(self, deadline: float) -> None:
        """Its agent is over: what is open may close until then, what is not yet is given up."""
        if self.settled:
            self._scope.deadline = deadline
        else:
            self._scope.cancel()

    async def serve(self, over: trio.Event, changed: trio.lowlevel.ParkingLot) -> None:
        """Open it, keep it open until the agent is over, and close it."""
        with self._scope:
            try:
                async with self._source.open_tools(self._opening) as tools:
                    self.tools = tuple(self._guarded(each) for each in tools)
                    self._scope.shield = True  # from here on it ends by `over` and `end_by`
                    self.settled = True
                    changed.unpark_all()
                    try:
                        await over.wait()
                    finally:
                        self._end()
            # Boundary: one tool source. If it ends too soon its tools fail, and not the run.
            except BaseException as error:  # noqa: BLE001
                passing, fault = split(error)
                if fault is not None:
                    self._note(fault, is_over=over.is_set())
                if passing is not None:
                    raise passing from None
            finally:
                self.settled = True
                changed.unpark_all()
        if self._scope.cancelled_caught and self._gone:
            _log.warning(
                "the tool source %s did not close in time and was cancelled",
                self.name,
                extra=self._identity,
            )

    def _note(self, fault: BaseException, *, is_over: bool) -> None:
        words = told(fault)
        if self.settled:
            what = "failed as it closed" if is_over else "ended before its run"
        else:
            what = "could not be opened"
            why = "." if words is None else f": {words[1]}"
            self.failure = ToolSourceError(
                f"The tool source {self.name!r} could not be opened{why}"
            )
        _log.warning(
            "the tool source %s %s%s",
            self.name,
            what,
            "" if words is None else f": {words[1]}",
            exc_info=fault if words is None else None,
            extra=self._identity,
        )

    @property
    def _identity(self) -> dict[str, str]:
        return dict(identity(self._opening.context))

    def _end(self) -> None:
        """Its tools can be called no more, and calls that are under way end."""
        self._gone = True
        for scope in self._calls:
            scope.cancel()

    def _check(self) -> None:
        if self._gone:
            msg = f"The tool source {self.name!r} has ended, and its tools with it."
            raise ToolSourceError(msg)

    def _guarded(self, tool: Tool) -> Tool:
        """The tool, which says so once its source has ended."""
        if tool.process:
            return tool  # has nothing of the source's
        function = self._ended_with_it if tool.is_async else self._refused_after_it
        return dataclasses.replace(tool, function=functools.partial(function, tool.function))

    async def _ended_with_it(
        self, function: Callable[..., Awaitable[Any]], /, **keywords: Any
    ) -> Any:
        self._check()
        with trio.CancelScope() as scope:
            self._calls.add(scope)
            try:
                return await function(**keywords)
            finally:
                self._calls.discard(scope)
        self._check()
        return None  # not reached: only `_end` cancels that scope

    def _refused_after_it(self, function: Callable[..., Any], /, **keywords: Any) -> Any:
        self._check()
        return function(**keywords)
