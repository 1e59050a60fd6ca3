"""The tools of one run, as its agent has them: each call is said in events and ends in a result."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec
import trio

from creche import _events as events
from creche._ambient import look_around
from creche._approval import Approver
from creche._context import MessageId, ToolCallId, UserExecutionContext, new_id
from creche._emitter import EventEmitter, new_tool_call_id, timestamp
from creche._errors import CrecheError, EmitterClosedError
from creche._journal import Journal
from creche._limits import Limits
from creche._models import ToolSpec
from creche._own_log import open_own_log
from creche._quotas import ToolQuotas, ToolShare
from creche._redaction import printable
from creche._tool_calls import ToolCalls, ToolPolicy, ToolTally, allow_every_tool
from creche._tools import Tool, ToolResult, failure


class ToolInfrastructure(Protocol):
    """What a dispatcher wants of an `Infrastructure`."""

    @property
    def tools(self) -> Sequence[Tool]: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def tool_policy(self) -> ToolPolicy: ...
    @property
    def approver(self) -> Approver | None: ...


class ToolDispatcher:
    """The tools that one run may call. Made for the run, and gone with it."""

    def __init__(
        self,
        context: UserExecutionContext,
        tools: Iterable[Tool],
        emitter: EventEmitter,
        limits: Limits,
        *,
        share: ToolShare,
        policy: ToolPolicy = allow_every_tool,
        approver: Approver | None = None,
        tally: ToolTally | None = None,
    ) -> None:
        self._tally = tally or ToolTally()
        self._calls = ToolCalls(
            context,
            tools,
            limits,
            share=share,
            policy=policy,
            approver=approver,
            tally=self._tally,
        )
        self._emitter = emitter
        self._limits = limits
        self._share = share
        self._policy = policy
        self._approver = approver
        self._live: dict[trio.CancelScope, str] = {}  # {of a call under way: its tool}
        self._closed = False
        self._over = trio.lowlevel.ParkingLot()
        self._journal: Journal | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def create_scoped_dispatcher_context(
        cls,
        context: UserExecutionContext,
        *,
        tools: Iterable[Tool] | None = None,
        infrastructure: ToolInfrastructure | None = None,
        limits: Limits | None = None,
        quotas: ToolQuotas | None = None,
    ) -> AsyncIterator[ToolDispatcher]:
        """A dispatcher without an engine or a supervisor, for as long as the block.

        `tools` are those that may be called: the infrastructure's if they are not given. Policy,
        approver and limits are the infrastructure's, too; without one all tools are allowed, and
        nobody can approve. Its rate and threads are its own unless `quotas` are shared with it.

        Its events go to `dispatcher.journal`, in memory, which is a run's whole and valid log
        once the block has ended.

        Resource handling: leaving the block cancels the calls that other tasks still make
        through it; these get a result that says so. It waits for them, at most
        `Limits.cleanup_timeout`; the tools that are then still alive are among `abandoned`.

        Raises CrecheError if there is nothing to take tools from, ValueError for two tools of one
        name.
        """
        if tools is None:
            if infrastructure is None:
                around = look_around("tools= or infrastructure=")
                infrastructure = cast("ToolInfrastructure", around.infrastructure)
                quotas = quotas or cast("ToolQuotas", around.quotas)
            tools = infrastructure.tools
        limits = limits or (infrastructure.limits if infrastructure else Limits())
        async with open_own_log(context, limits) as log:
            with (quotas or ToolQuotas(limits)).share(context.user_id) as share:
                dispatcher = cls(
                    context,
                    tools,
                    log.emitter,
                    limits,
                    share=share,
                    policy=infrastructure.tool_policy if infrastructure else allow_every_tool,
                    approver=infrastructure.approver if infrastructure else None,
                )
                dispatcher._journal = log.journal
                try:
                    yield dispatcher
                finally:
                    await dispatcher._close()
                    log.receipt.update(dispatcher.receipt)

    def for_subagent(
        self, context: UserExecutionContext, tools: Iterable[Tool], emitter: EventEmitter
    ) -> ToolDispatcher:
        """A dispatcher of a sub-agent's own tools, under this one's limits, budget and policy."""
        return ToolDispatcher(
            context,
            tools,
            emitter,
            self._limits,
            share=self._share,
            policy=self._policy,
            approver=self._approver,
            tally=self._tally,
        )

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """What a model may be told."""
        return tuple(tool.spec for tool in self._calls.tools.values())

    @property
    def journal(self) -> Journal:
        """The events of a dispatcher that has a log of its own. Raises CrecheError otherwise."""
        if self._journal is None:
            msg = "this dispatcher's events are in the journal of its run's thread"
            raise CrecheError(msg)
        return self._journal

    @property
    def stopped(self) -> list[str]:
        """Names of tools that the run's end interrupted."""
        return [*self._tally.stopped]

    @property
    def abandoned(self) -> list[str]:
        """Names of tools that would not stop."""
        return [*self._tally.abandoned]

    @property
    def killed(self) -> list[str]:
        """Names of tools whose processes were killed at work."""
        return [*self._tally.killed]

    @property
    def receipt(self) -> dict[str, tuple[str, ...]]:
        """What became of tools that did not end by themselves, by name."""
        return {
            "tools_stopped": tuple(self._tally.stopped),
            "threads_abandoned": tuple(self._tally.abandoned),
            "processes_killed": tuple(self._tally.killed),
        }

    async def dispatch(
        self,
        name: str,
        params: Mapping[str, Any] | str,
        *,
        tool_call_id: ToolCallId | None = None,
        parent_message_id: MessageId | None = None,
    ) -> ToolResult:
        """Call a tool, saying so in events: start, arguments, end, result.

        `params` is the arguments object or its JSON text. Whatever goes wrong in the call (an
        unknown tool, wrong arguments, no approval, a limit, the tool's own error, its deadline)
        is a result that says so in words that a model can act on.
        """
        if self._closed:
            msg = "the dispatcher's block has ended, so it calls nothing more"
            raise EmitterClosedError(msg)
        self._tally.calls += 1
        name = printable(name)
        call_id = tool_call_id or new_tool_call_id()
        arguments, faulty = _as_json(params)
        with self._under_way(name) as scope:
            await self._emitter.emit(
                events.ToolCallStart(
                    tool_call_id=call_id,
                    tool_call_name=name,
                    parent_message_id=parent_message_id,
                    timestamp=timestamp(),
                ),
            )
            await self._emitter.emit(events.ToolCallArgs(tool_call_id=call_id, delta=arguments))
            await self._emitter.emit(events.ToolCallEnd(tool_call_id=call_id))
            result = failure(call_id, "The tool was stopped: its dispatcher's block ended.")
            with scope:
                if faulty is None:
                    result = await self._calls.result(call_id, name, arguments)
                else:
                    result = faulty(call_id)
            self._tally.failures += not result.ok
            await self._say(result)
        return result

    async def _say(self, result: ToolResult) -> None:
        said = events.ToolCallResult(
            message_id=MessageId(new_id()),
            tool_call_id=result.tool_call_id,
            content=result.content,
            role="tool",
            timestamp=timestamp(),
            metadata=None if result.ok else {"creche": _told_of(result)},
        )
        try:
            await self._emitter.emit(said)
        except EmitterClosedError:
            if not self._closed:
                raise
            # `_close` did not wait any longer, and the log has got a result for this call.

    # --- the block of a dispatcher without an engine

    @contextlib.contextmanager
    def _under_way(self, name: str) -> Iterator[trio.CancelScope]:
        """A call is under way; the scope is for `_close` to cancel."""
        scope = trio.CancelScope()
        self._live[scope] = name
        try:
            yield scope
        finally:
            del self._live[scope]
            self._over.unpark_all()

    async def _close(self) -> None:
        """Cancel the calls under way, and wait until they are over, but not for ever."""
        self._closed = True
        for scope in self._live:
            scope.cancel()
        with trio.move_on_after(self._limits.cleanup_timeout, shield=True):
            while self._live:
                await self._over.park()
        self._tally.abandoned.extend(self._live.values())


def _told_of(result: ToolResult) -> dict[str, Any]:
    told: dict[str, Any] = {"error": True}
    if result.retry_after is not None:
        told["retry_after"] = round(result.retry_after, 3)
    return told


def _as_json(
    params: Mapping[str, Any] | str,
) -> tuple[str, Callable[[ToolCallId], ToolResult] | None]:
    """The arguments as JSON text, or what becomes of a call whose arguments have none."""
    if isinstance(params, str):
        return printable(params), None
    try:
        return msgspec.json.encode(params).decode(), None
    except (TypeError, ValueError, RecursionError) as error:
        return "{}", functools.partial(failure, message=f"The arguments have no JSON: {error}")
