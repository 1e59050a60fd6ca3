"""The names of the older design, each a thin door to the new one.

For code that comes over: everything here works, warns with the exact words to write instead, and
isolates as the new names do. `open_infrastructure` is for code that cannot pass arguments; what
it opens is looked at by these names and by the two that they led to, `create_user_engine` and
`create_scoped_dispatcher_context`, when they are given nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import (
    AsyncIterator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Final, cast

import creche
from creche._admission import equal_weight
from creche._ambient import Surroundings, look_around, surroundings
from creche._connections import Connections
from creche._forwarding import Send, open_forwarding
from creche._own_log import open_own_log
from creche._quotas import ToolQuotas
from creche._tool_calls import ToolTally, allow_every_tool

__all__ = [
    "AgentInstanceFactory",
    "AgentRegistry",
    "AgentWebSocketBridge",
    "ExecutionContextManager",
    "ExecutionEngine",
    "RequestScopedExecutionEngine",
    "RequestScopedToolDispatcher",
    "ToolDispatcher",
    "ToolExecutorFactory",
    "WebSocketConnectionPool",
    "WebSocketEventEmitter",
    "WebSocketSecurityAudit",
    "open_infrastructure",
]

_ENGINE: Final = (
    "async with creche.ExecutionEngine.create_user_engine(context, infrastructure=...) as engine"
)
_DISPATCHER: Final = (
    "async with creche.ToolDispatcher.create_scoped_dispatcher_context(context, tools=...)"
    " as dispatcher"
)


@contextlib.asynccontextmanager
async def open_infrastructure(
    *,
    agents: creche.AgentClassRegistry | Mapping[str, type[creche.Agent]] | None = None,
    tools: Sequence[creche.Tool] = (),
    tool_sources: Mapping[str, creche.ToolSource] | None = None,
    models: Mapping[str, creche.Model] | None = None,
    tool_policy: creche.ToolPolicy | None = None,
    approver: creche.Approver | None = None,
    weight: creche.Weight = equal_weight,
    limits: creche.Limits | None = None,
    store: creche.Store | None = None,
    audit: creche.SecurityAudit | None = None,
    tracer: creche.Tracer | None = None,
) -> AsyncIterator[creche.Infrastructure]:
    """Agents, tools and all else of an `Infrastructure`, for calls that cannot be passed them.

    What runs in the block, and what is started in it, shares one set of journals, in which the
    runs of a thread take turns, and one count of what each user may.

    Resource handling: the journals are closed with the block; `audit` and `store` stay the
    caller's. Raises ValueError if an agent asks for a tool that is not there.
    """
    infrastructure = creche.Infrastructure(
        agents=agents or {},
        tools=tools,
        tool_sources=tool_sources or {},
        models=models or {},
        tool_policy=tool_policy or allow_every_tool,
        approver=approver,
        weight=weight,
        limits=limits or creche.Limits(),
        store=store or creche.MemoryStore(),
        audit=audit,
        tracer=tracer,
    )
    opened = creche.open_journals(infrastructure.store, infrastructure.limits, audit=audit)
    async with opened as journals:
        around = Surroundings(
            infrastructure=infrastructure,
            journals=journals,
            quotas=ToolQuotas(infrastructure.limits),
        )
        before = surroundings.set(around)
        try:
            yield infrastructure
        finally:
            surroundings.reset(before)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is of the older design: write `{new}`", DeprecationWarning, stacklevel=3)


def _around() -> creche.Infrastructure | None:
    """That of `open_infrastructure` around this call, if there is one."""
    around = surroundings.get()
    return None if around is None else cast("creche.Infrastructure", around.infrastructure)


class _Counted:
    """Counts calls for as long as it lives, where nothing around does: each call is a block."""

    def __init__(self) -> None:
        self._own = creche.ToolQuotas(creche.Limits())

    @property
    def quotas(self) -> creche.ToolQuotas | None:
        """What to pass to a block; None where those around count."""
        return self._own if surroundings.get() is None else None


class _Block:
    """What was an object and may be used as a block; what it opened ends with it."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)


# --- agents


class AgentRegistry(creche.AgentClassRegistry):
    """`creche.AgentClassRegistry`, by its older name."""

    def __init__(self, agents: Mapping[str, type[creche.Agent]] | None = None) -> None:
        _warn("AgentRegistry", "creche.AgentClassRegistry()")
        super().__init__(agents)


class AgentInstanceFactory:
    """Makes agents anew. Runs do that by themselves."""

    def __init__(self, registry: creche.AgentClassRegistry | None = None) -> None:
        _warn("AgentInstanceFactory", "registry.make(name)")
        self._registry = registry

    def create_agent_instance(
        self, name: str, context: creche.UserExecutionContext
    ) -> creche.Agent:
        """An instance for this context alone, as runs make theirs. Raises UnknownAgentError."""
        if type(context) is not creche.UserExecutionContext:
            msg = f"an agent is made for a UserExecutionContext, not {type(context).__name__}"
            raise creche.InvalidContextError(msg)
        registry: creche.AgentClassRegistry | None = self._registry
        if registry is None:
            registry = cast(
                "creche.Infrastructure", look_around("a registry").infrastructure
            ).registry
        return registry.make(name)


# --- execution


class ExecutionEngine:
    """An engine that was constructed; each `execute_agent` is a block of its own."""

    def __init__(
        self,
        context: creche.UserExecutionContext,
        infrastructure: creche.Infrastructure | None = None,
    ) -> None:
        _warn("ExecutionEngine(...)", _ENGINE)
        self._context = context
        self._infrastructure = infrastructure
        self._executed = False

    @staticmethod
    def create_user_engine(
        context: creche.UserExecutionContext,
        *,
        infrastructure: creche.Infrastructure | None = None,
        journals: creche.Journals | None = None,
        quotas: creche.ToolQuotas | None = None,
        agent: str | None = None,
    ) -> AbstractAsyncContextManager[creche.ExecutionEngine]:
        """`creche.ExecutionEngine.create_user_engine`, warning of where it is from."""
        _warn("compat.ExecutionEngine.create_user_engine", _ENGINE)
        return creche.ExecutionEngine.create_user_engine(
            context, infrastructure=infrastructure, journals=journals, quotas=quotas, agent=agent
        )

    async def execute_agent(
        self, agent_context: creche.NamesAgent, state: creche.AgentInput
    ) -> creche.RunOutcome:
        """See `creche.ExecutionEngine.execute_agent`; each execution is a run of its own."""
        if self._executed:
            run_id = creche.RunId(creche.new_id())
            self._context = dataclasses.replace(self._context, run_id=run_id)
        self._executed = True
        async with self._opened() as engine:
            return await engine.execute_agent(agent_context, state)

    def _opened(self) -> AbstractAsyncContextManager[creche.ExecutionEngine]:
        return creche.ExecutionEngine.create_user_engine(
            self._context, infrastructure=self._infrastructure
        )


class RequestScopedExecutionEngine(_Block, ExecutionEngine):
    """The same for one request; may be used as a block, too."""

    def __init__(
        self,
        context: creche.UserExecutionContext,
        infrastructure: creche.Infrastructure | None = None,
    ) -> None:
        _warn("RequestScopedExecutionEngine", _ENGINE)
        self._context = context
        self._infrastructure = infrastructure
        self._executed = False
        _Block.__init__(self)

    async def __aenter__(self) -> creche.ExecutionEngine:
        return await self._stack.enter_async_context(self._opened())


class ExecutionContextManager:
    """Opened an engine for a context, and closed it."""

    def __init__(self, infrastructure: creche.Infrastructure | None = None) -> None:
        _warn("ExecutionContextManager", _ENGINE)
        self._infrastructure = infrastructure

    def execution_context(
        self, context: creche.UserExecutionContext
    ) -> AbstractAsyncContextManager[creche.ExecutionEngine]:
        """A block that has an engine of this context's own."""
        return creche.ExecutionEngine.create_user_engine(
            context, infrastructure=self._infrastructure
        )


# --- tools


class ToolDispatcher:
    """A dispatcher that was constructed; each `dispatch` is a block of its own."""

    def __init__(
        self, context: creche.UserExecutionContext, tools: Iterable[creche.Tool] | None = None
    ) -> None:
        _warn("ToolDispatcher(...)", _DISPATCHER)
        self._context = context
        self._tools = tools if tools is None else tuple(tools)
        self._counted, self._tally = _Counted(), ToolTally()

    @staticmethod
    def create_scoped_dispatcher_context(
        context: creche.UserExecutionContext,
        *,
        tools: Iterable[creche.Tool] | None = None,
        infrastructure: creche.Infrastructure | None = None,
        limits: creche.Limits | None = None,
        quotas: creche.ToolQuotas | None = None,
    ) -> AbstractAsyncContextManager[creche.ToolDispatcher]:
        """`creche.ToolDispatcher.create_scoped_dispatcher_context`, warning of where it is from."""
        _warn("compat.ToolDispatcher.create_scoped_dispatcher_context", _DISPATCHER)
        return creche.ToolDispatcher.create_scoped_dispatcher_context(
            context, tools=tools, infrastructure=infrastructure, limits=limits, quotas=quotas
        )

    async def dispatch(self, name: str, params: Mapping[str, Any]) -> creche.ToolResult:
        """See `creche.ToolDispatcher.dispatch`."""
        async with self._opened() as dispatcher:
            return await dispatcher.dispatch(name, params)

    def _opened(self) -> AbstractAsyncContextManager[creche.ToolDispatcher]:
        return creche.ToolDispatcher.create_scoped_dispatcher_context(
            self._context, tools=self._tools, quotas=self._counted.quotas, tally=self._tally
        )


class RequestScopedToolDispatcher(_Block, ToolDispatcher):
    """The same for one request; may be used as a block, too."""

    def __init__(
        self, context: creche.UserExecutionContext, tools: Iterable[creche.Tool] | None = None
    ) -> None:
        _warn("RequestScopedToolDispatcher", _DISPATCHER)
        self._context = context
        self._tools = tools if tools is None else tuple(tools)
        self._counted, self._tally = _Counted(), ToolTally()
        _Block.__init__(self)

    async def __aenter__(self) -> creche.ToolDispatcher:
        return await self._stack.enter_async_context(self._opened())


class ToolExecutorFactory:
    """Made dispatchers for contexts."""

    def __init__(self, tools: Iterable[creche.Tool] | None = None) -> None:
        _warn("ToolExecutorFactory", _DISPATCHER)
        self._tools = tools if tools is None else tuple(tools)
        self._counted = _Counted()

    def create_tool_executor(
        self, context: creche.UserExecutionContext
    ) -> AbstractAsyncContextManager[creche.ToolDispatcher]:
        """A block that has a dispatcher of this context's own."""
        return creche.ToolDispatcher.create_scoped_dispatcher_context(
            context, tools=self._tools, quotas=self._counted.quotas
        )


# --- sockets


class WebSocketConnectionPool:
    """Which sockets a user has open. An entry is a block, so none can be left behind."""

    def __init__(
        self,
        most_per_user: int = 5,
        most: int = 1000,
        audit: creche.SecurityAudit | None = None,
    ) -> None:
        _warn(
            "WebSocketConnectionPool",
            "async with supervisor.open_events(user_id, thread_id) as entries: ...",
        )
        self._connections = Connections(most_per_user=most_per_user, most=most)
        self._audit = audit

    def connection(
        self, context: creche.UserExecutionContext, send: Send
    ) -> AbstractContextManager[creche.UserExecutionContext]:
        """A socket of that user's is open inside the block; the context gets its id.

        Error handling: raises LimitExceededError past a cap, which is audited (where none was
        passed, in the audit of `open_infrastructure` around), and InvalidContextError for a
        context that has a connection. If `send` fails, nothing more is sent to this socket, whose
        place is free again, and its block is cancelled and raises what `send` raised.
        """
        audit, made = self._audit, _around()
        if audit is None and made is not None:
            audit = made.audit
        return self._connections.held(context, send, audit)

    async def send_to_user(self, context: creche.UserExecutionContext, data: bytes) -> int:
        """Send to all sockets of the context's user at once; says how many took it.

        A socket that fails is not counted, keeps it from none of the others, and is told to
        whoever holds it: see `connection`. This waits for the slowest; put a deadline around it.
        """
        return await self._connections.send(context.user_id, data)


class WebSocketEventEmitter(_Block):
    """Said events straight to a socket. Here they pass the emitter's checks first."""

    def __init__(self, context: creche.UserExecutionContext, send: Send) -> None:
        _warn("WebSocketEventEmitter", "await run.emit.text(...)")
        self._context = context
        self._send = send
        super().__init__()

    async def __aenter__(self) -> creche.EventEmitter:
        made = _around()
        limits, audit = (made.limits, made.audit) if made else (creche.Limits(), None)
        opened = open_own_log(self._context, limits, audit=audit)
        log = await self._stack.enter_async_context(opened)
        self._sent = await self._stack.enter_async_context(open_forwarding(log.journal, self._send))
        return log.emitter

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await super().__aexit__(kind, error, traceback)
        await self._sent.up_to_the_end()  # the terminal event came with the log's own end


class WebSocketSecurityAudit:
    """Noted refused access. Here each note is a record of the chain it is given."""

    def __init__(self, audit: creche.SecurityAudit) -> None:
        _warn("WebSocketSecurityAudit", "await audit.record(kind, user=..., resource=..., ...)")
        self._audit = audit

    async def log_violation(
        self,
        context: creche.UserExecutionContext,
        kind: creche.AuditKind,
        *,
        resource: str,
        operation: str,
        claimed_owner: str | None = None,
    ) -> None:
        """See `creche.SecurityAudit.record`. Raises AuditUnavailableError."""
        await self._audit.record(
            kind,
            user=context.user_id,
            claimed_owner=claimed_owner,
            resource=resource,
            operation=operation,
            correlation_id=context.correlation_id,
        )


class AgentWebSocketBridge:
    """Ran an agent and passed its events to a socket."""

    def __init__(self, supervisor: creche.Supervisor) -> None:
        _warn(
            "AgentWebSocketBridge",
            "await supervisor.start(context, agent, input); async with supervisor.open_events(...)",
        )
        self._supervisor = supervisor

    async def run_agent(
        self,
        context: creche.UserExecutionContext,
        agent: str,
        state: creche.AgentInput,
        send: Send,
    ) -> creche.RunOutcome:
        """Run it, send its events to `send` up to its terminal event, and say how it ended."""
        journals = self._supervisor.journals
        async with journals.attached(context.user_id, context.thread_id) as journal:
            async with open_forwarding(journal, send):
                run = await self._supervisor.start(context, agent, state)
                return await run.ended()
