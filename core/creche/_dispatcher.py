"""The tools of one run, as its agent has them: each call is said in events and ends in a result."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, cast

import msgspec
import trio

from creche import _events as events
from creche._activities import Activities
from creche._ambient import around_of, look_around, surroundings
from creche._approval import Approver
from creche._audit import SecurityAudit
from creche._context import MessageId, ToolCallId, UserExecutionContext, logged_as, new_id
from creche._emitter import EventEmitter, new_tool_call_id, timestamp
from creche._errors import CrecheError, EmitterClosedError
from creche._journal import Journal
from creche._limits import Limits
from creche._models import ToolSpec
from creche._outcome import AbandonedThread
from creche._own_log import open_own_log
from creche._programs import Programs
from creche._quotas import ToolQuotas, ToolShare
from creche._redaction import printable
from creche._spending import Budgets
from creche._store import now
from creche._tool_calls import ToolCalls, ToolPolicy, ToolTally, allow_every_tool
from creche._tool_sources import ToolSource, open_tool_sources
from creche._tools import Tool, ToolResult, failure, tools_in
from creche._tracing import OTHER, SpanEnd, Spans, Tracer

_WANTED: Final = "tools= or infrastructure="


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
    @property
    def audit(self) -> SecurityAudit | None: ...
    @property
    def tracer(self) -> Tracer | None: ...


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
        person: Approver | None = None,
        audit: SecurityAudit | None = None,
        tally: ToolTally | None = None,
        activities: Activities | None = None,
        budgets: Budgets | None = None,
        spans: Spans | None = None,
    ) -> None:
        """Raises IsolationError, which is audited, if `emitter` is not of the context's run."""
        emitter.check_speaks_for(context, "make a dispatcher")
        self._tally = tally or ToolTally()
        self._activities = activities or Activities()
        self._budgets = budgets
        self._spans = spans or Spans.of_run(None, context)
        self.programs = Programs(
            context,
            limits,
            share=share,
            activities=self._activities,
            audit=audit,
            killed=self._tally.killed.append,
            outlived=self._tally.abandon,
        )
        self._calls = ToolCalls(
            context,
            tools,
            limits,
            share=share,
            programs=self.programs,
            policy=policy,
            approver=approver,
            audit=audit,
            tally=self._tally,
        )
        self._context = context
        self._emitter = emitter
        self._limits = limits
        self._share = share
        self._policy = policy
        self._approver = approver
        self._person = person
        self._audit = audit
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
        tool_sources: Mapping[str, ToolSource] | None = None,
        limits: Limits | None = None,
        quotas: ToolQuotas | None = None,
        tally: ToolTally | None = None,
    ) -> AsyncIterator[ToolDispatcher]:
        """A dispatcher without an engine or a supervisor, for as long as the block.

        `tools` are those that may be called: the infrastructure's if they are not given. Policy,
        approver, limits and audit are the infrastructure's, too, or those of what
        `compat.open_infrastructure` has opened around; without either all tools are allowed, and
        nobody can approve. The user's rate and threads are counted for this block alone, unless
        it is given `quotas` (or there are some around): these have the limits they were made with.
        A run that has several blocks passes the same `tally` to each, to have one budget.

        `tool_sources` are opened for the block, and closed with it. An infrastructure's are not
        opened by themselves, since each may take seconds: pass those that are wanted.

        Its events go to `dispatcher.journal`, in memory, which is a run's whole and valid log
        once the block has ended. Log lines from within the block say whose they are.

        Resource handling: leaving the block cancels the calls that other tasks still make
        through it; these get a result that says so. It waits for them, at most
        `Limits.cleanup_timeout`; the tools that are then still alive are among `abandoned`.

        Raises CrecheError if there is nothing to take tools from, ToolSourceError if a source
        cannot be opened, ValueError for two tools of one name, and TypeError for what is no tool.
        """
        if infrastructure is None:
            around = surroundings.get() if tools is not None else look_around(_WANTED)
            if around is not None:
                infrastructure = cast("ToolInfrastructure", around.infrastructure)
        else:
            around = around_of(infrastructure)
        if around is not None:
            quotas = quotas or cast("ToolQuotas", around.quotas)
        if tools is None:
            tools = infrastructure.tools if infrastructure else ()
        tools = tools_in(tools, "a dispatcher")
        limits = limits or (infrastructure.limits if infrastructure else Limits())
        audit = infrastructure.audit if infrastructure else None
        async with open_own_log(context, limits, audit=audit) as log:
            with (quotas or ToolQuotas(limits)).share(context.user_id) as share:
                tally = tally or ToolTally()
                try:
                    async with open_tool_sources(
                        tool_sources or {},
                        tools,
                        context,
                        limits,
                        killed=tally.killed.append,
                        outlived=tally.abandon,
                    ) as all_tools:
                        dispatcher = cls(
                            context,
                            all_tools,
                            log.emitter,
                            limits,
                            share=share,
                            policy=infrastructure.tool_policy
                            if infrastructure
                            else allow_every_tool,
                            approver=infrastructure.approver if infrastructure else None,
                            audit=audit,
                            tally=tally,
                            spans=Spans.of_run(
                                infrastructure.tracer if infrastructure else None, context
                            ),
                        )
                        dispatcher._journal = log.journal
                        with logged_as(context):
                            try:
                                yield dispatcher
                            finally:
                                await dispatcher._close()
                finally:
                    log.receipt.update(tally.receipt)

    def _for_subagent(
        self,
        context: UserExecutionContext,
        tools: Iterable[Tool],
        emitter: EventEmitter,
        spans: Spans,
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
            person=self._person,
            audit=self._audit,
            tally=self._tally,
            activities=self._activities,
            budgets=self._budgets,
            spans=spans,
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
        return [tool.name for tool in self._tally.stopped]

    @property
    def abandoned(self) -> list[str]:
        """Names of tools that would not stop."""
        return [thread.name for thread in self._tally.abandoned]

    @property
    def killed(self) -> list[str]:
        """Names of tools whose processes were killed at work."""
        return [*self._tally.killed]

    @property
    def receipt(self) -> dict[str, Any]:
        """What became of tools that did not end by themselves, as a receipt tells it."""
        return self._tally.receipt

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
        is a result that says so in words that a model can act on. But a call under a budget (see
        `RunContext.budget`) that is used up does not begin: it ends that budget's block.
        """
        if self._closed:
            msg = "the dispatcher's block has ended, so it calls nothing more"
            raise EmitterClosedError(msg)
        if self._budgets is not None:
            await self._budgets.charge_tool_call()
        self._tally.calls += 1
        name = printable(name)
        call_id = tool_call_id or new_tool_call_id()
        arguments, faulty = _as_json(params)
        # A name that the model made up may have anything in it.
        told = name if name in self._calls.tools else OTHER
        with (
            self._spans.block("tool", told, tool_call_id=call_id) as span,
            self._under_way(told) as scope,
        ):
            await self._emitter.call(call_id, name, arguments, parent_message_id)
            result = failure(call_id, "The tool was stopped: its dispatcher's block ended.")
            with scope:
                if faulty is None:
                    # Again, since the task that calls need not be one of the block's.
                    with logged_as(self._context):
                        result = await self._calls.result(call_id, name, arguments, self._person)
                else:
                    result = faulty(call_id)
            self._tally.failures += not result.ok
            span.ends(_end_of(result, stopped=scope.cancelled_caught))
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
            with self._activities.during("tool", name):
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
        since = now()
        self._tally.abandoned.extend(
            AbandonedThread(name=name, since=since) for name in self._live.values()
        )


def _end_of(result: ToolResult, *, stopped: bool) -> SpanEnd:
    if stopped:
        return SpanEnd(status="cancelled", code="dispatcher_closed")
    return SpanEnd(status="success" if result.ok else "failed", code=result.code)


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
