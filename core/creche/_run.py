"""A run seen from outside, `Run`, and what its agent is handed, `RunContext`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

import trio

from creche._context import RunId, ThreadId, UserExecutionContext, UserId
from creche._dispatcher import ToolDispatcher
from creche._emitter import EventEmitter
from creche._errors import RunError
from creche._limits import Limits
from creche._messages import AgentInput, Message
from creche._models import Model, Usage
from creche._statistics import RunStatistics, Tally
from creche._steps import Step, SubagentResult, in_parallel, in_sequence
from creche._store import RunStatus, now
from creche._tools import ToolResult
from creche._turns import Asking, TurnModel, note_cost

CancelReason = Literal["user", "disconnect", "deadline", "budget", "superseded", "shutdown"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a terminal event says about the cleanup. Times are milliseconds."""

    reason: str  # `success`, why it was cancelled, or the code of the failure
    elapsed_ms: int  # from the asking for the end, or the agent's own end, to the nursery's
    run_ms: int  # from RUN_STARTED to the nursery's end
    tasks_ended: int  # that were alive when the end was asked for
    tools_stopped: tuple[str, ...] = ()
    threads_abandoned: tuple[str, ...] = ()  # tools whose threads would not stop
    processes_killed: tuple[str, ...] = ()  # tools whose processes were killed at work

    def to_dict(self) -> dict[str, Any]:
        """As it goes into `metadata.creche.receipt`."""
        # `asdict` copies deeply what cannot change.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a run ended."""

    status: RunStatus
    receipt: Receipt
    message: str | None = None  # of a failure, as clients are told it
    result: Any = None  # what the agent returned
    statistics: RunStatistics = dataclasses.field(default_factory=RunStatistics)
    ended_at: datetime = dataclasses.field(default_factory=now)


class Run:
    """The handle of one run: who owns it, how it stands, and the way to stop it.

    Handing it out gives nobody the run's insides; its task belongs to the supervisor.
    """

    def __init__(self, context: UserExecutionContext, agent: str) -> None:
        self.context = context
        self.agent = agent
        self.created_at: datetime = now()
        self.started_at: datetime | None = None
        self.reason: CancelReason | None = None  # why it was told to end
        self.first_seq: int | None = None  # of RUN_STARTED, once it has started
        self.outcome: RunOutcome | None = None
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._cleanups: set[trio.CancelScope] = set()
        self._cleanup_timeout = math.inf
        self._cancelled_at: float | None = None  # trio time
        self._tasks_at_cancel = 0
        self._listed_at: float | None = None  # trio time at which a supervisor took it on
        self._turn_at: float | None = None  # trio time
        self._turn = trio.Event()
        self._roused = trio.Event()  # it need not wait in the queue any more: see `_turn`, `reason`
        self._concluded = trio.Event()
        self._accepted = trio.Event()
        self._refusal: Exception | None = None
        self._ended = trio.Event()

    @property
    def run_id(self) -> RunId:
        return self.context.run_id

    @property
    def user_id(self) -> UserId:
        return self.context.user_id

    @property
    def thread_id(self) -> ThreadId:
        return self.context.thread_id

    @property
    def status(self) -> RunStatus:
        """How it stands right now."""
        if self.outcome is not None:
            return self.outcome.status
        return "queued" if self.first_seq is None else "running"

    @property
    def queued_for(self) -> float:
        """Seconds for which it waited for its turn, so far; 0.0 without a supervisor."""
        if self._listed_at is None:
            return 0.0
        until = trio.current_time() if self._turn_at is None else self._turn_at
        return until - self._listed_at

    def cancel(self, reason: CancelReason = "user") -> None:
        """Ask the run to end. It has ended when `ended()` returns. The first reason stays."""
        if self._ended.is_set() or self.reason is not None:
            return
        self.reason = reason
        self._note_cancel(trio.current_time())
        self._scope.cancel()
        self._roused.set()

    def _why_cancelled(self) -> str | None:
        """The reason for whatever is cancelled in it, while it ends."""
        if self.reason is None and self._scope.cancel_called:
            return "deadline"  # which nobody says before the run has ended
        return self.reason

    def _take_turn(self) -> None:
        """It is the thread's active run from now on."""
        self._turn_at = trio.current_time()
        self._turn.set()
        self._roused.set()

    def _conclude(self, outcome: RunOutcome) -> None:
        """How it ended is stored, so it may be told."""
        self.outcome = outcome
        self._concluded.set()

    def _note_cancel(self, moment: float) -> None:
        if self._cancelled_at is None:
            self._cancelled_at = moment
            self._tasks_at_cancel = _count_tasks(self._nursery)
            for scope in self._cleanups:
                scope.deadline = min(scope.deadline, moment + self._cleanup_timeout)

    async def accepted(self) -> None:
        """Wait until the run's rows are committed. Raises if the store refused them."""
        await self._accepted.wait()
        if self._refusal is not None:
            raise self._refusal

    async def concluded(self) -> RunOutcome:
        """Wait until nothing of the run is alive and how it ended is stored.

        For a run that was cancelled in the queue that is sooner than `ended`: its events must
        wait for those of the run before it. Raises as `ended` does.
        """
        await self._concluded.wait()
        return self._told()

    async def ended(self) -> RunOutcome:
        """Wait until the run's nursery has closed and its terminal event is committed.

        Raises RunError for a run that the store refused, or whose end it did not take before
        the process had to go.
        """
        await self._ended.wait()
        return self._told()

    def _told(self) -> RunOutcome:
        if self.outcome is None:
            msg = "the run has no end: the store did not take it"
            raise RunError(msg, code="lost")
        return self.outcome

    def __repr__(self) -> str:
        return f"<Run {self.run_id} of {self.agent!r}, {self.status}>"


class Spawner(Protocol):
    """Who can run a sub-agent for an agent: the engine's part of `RunContext.spawn`."""

    async def spawn(self, parent: RunContext, agent: str, state: AgentInput) -> SubagentResult:
        """See `RunContext.spawn`; a failure is always a result here."""
        ...


class RunContext:
    """What an agent is handed: who it works for, and the only ways to act.

    A sub-agent is handed one of its own, with its own context, messages, tools and voice. What
    it spends, and its deadlines, are the run's.
    """

    def __init__(
        self,
        run: Run,
        *,
        context: UserExecutionContext,
        messages: tuple[Message, ...],
        emitter: EventEmitter,
        dispatcher: ToolDispatcher,
        models: Mapping[str, Model],
        limits: Limits,
        spawner: Spawner,
        tally: Tally,
        usage: list[tuple[str, Usage]],
    ) -> None:
        self._run = run
        self._spans = dispatcher._spans  # noqa: SLF001  those of one agent belong together
        self._asking: Asking = []
        self._models = models
        self._spawner = spawner
        self._tally = tally
        self.context = context
        # The thread's history and then what this run was asked; what a sub-agent was asked.
        self.messages = messages
        self.emit = emitter
        self.tools = dispatcher
        self.limits = limits
        self.usage = usage  # (model, what one answer cost), of the whole run

    def spent(self, model: str, usage: Usage) -> None:
        """Note what an answer of a model cost, for the run's terminal event.

        Noted in the block of the model's stream, by the task that opened it, it is in the span of
        that call, too. Raises TypeError for what is no Usage.
        """
        if type(usage) is not Usage:
            msg = f"a model's stream has text, tool calls and usage, not {type(usage).__name__}"
            raise TypeError(msg)
        self.usage.append((model, usage))
        note_cost(self._asking, model, usage)

    async def call_tool(self, name: str, params: Mapping[str, Any]) -> ToolResult:
        """Call one of this run's tools by name; see `ToolDispatcher.dispatch`."""
        return await self.tools.dispatch(name, params)

    def model(self, name: str = "default") -> Model:
        """One of the models that this process offers. Raises RunError if there is none so named.

        Each of its calls counts for the run's statistics, and has `Limits.turn_timeout`.
        """
        try:
            model = self._models[name]
        except KeyError:
            known = ", ".join(sorted(self._models)) or "none"
            msg = f"no model is named {name!r} here (there is {known})"
            raise RunError(msg, code="no_such_model") from None
        return TurnModel(model, self._tally, self.limits, self._spans, self._asking)

    async def spawn(
        self,
        agent: str,
        state: AgentInput,
        *,
        raises: bool = False,
    ) -> SubagentResult:
        """Have another agent do a part of this run; returns what became of it.

        An instance of its own is made, which works in this task, is told what `state` says and
        nothing of the thread, has its own tools, and speaks as a sub-agent. A cancel of the run
        ends it; cancelled alone (by a scope around this call) it is told as an error.

        Whatever it raises is a result with an `error`, or, with `raises`, a SubagentFailedError.
        Raises UnknownAgentError, ValueError for an empty input, and LimitExceededError past
        `Limits.subagent_depth` or `Limits.subagents_at_once`.
        """
        result = await self._spawner.spawn(self, agent, state)
        return result.or_raise() if raises else result

    async def sequence(
        self,
        steps: Sequence[Step],
        *,
        raises: bool = False,
    ) -> tuple[SubagentResult, ...]:
        """Have sub-agents work one after another; the results are in the order of the steps.

        After a step that failed, the rest is skipped, unless it has `continue_on_error`. With
        `raises`, the first such failure is raised in the end. Raises what `spawn` raises.
        """
        results = await in_sequence(steps, self.spawn, self.emit)
        return _checked(steps, results) if raises else results

    async def parallel(
        self,
        steps: Sequence[Step],
        *,
        raises: bool = False,
    ) -> tuple[SubagentResult, ...]:
        """Have sub-agents work at once; the results are in the order of the steps.

        A step that fails cancels those that still run, unless it has `continue_on_error`; see
        `sequence`.
        """
        results = await in_parallel(steps, self.spawn, self.emit)
        return _checked(steps, results) if raises else results

    @contextlib.asynccontextmanager
    async def cleanup(self) -> AsyncIterator[trio.CancelScope]:
        """A block that a cancel does not interrupt until `Limits.cleanup_timeout` is over.

        The allowance is the run's, not the block's: it counts from the moment at which the
        run was told to end.
        """
        run = self._run
        if trio.current_effective_deadline() == -math.inf:
            run._note_cancel(trio.current_time())  # noqa: SLF001  from outside, without a word
        ends = run._scope.deadline if run._cancelled_at is None else run._cancelled_at  # noqa: SLF001
        allowance = run._cleanup_timeout  # noqa: SLF001
        with trio.CancelScope(shield=True, deadline=ends + allowance) as scope:
            run._cleanups.add(scope)  # noqa: SLF001
            try:
                yield scope
            finally:
                run._cleanups.discard(scope)  # noqa: SLF001


def _checked(
    steps: Sequence[Step],
    results: tuple[SubagentResult, ...],
) -> tuple[SubagentResult, ...]:
    """The results, unless a step failed whose failure matters. Raises SubagentFailedError."""
    for step, result in zip(steps, results, strict=True):
        if not step.continue_on_error:
            result.or_raise()
    return results


def _count_tasks(nursery: trio.Nursery | None) -> int:
    """The agent's task and all that is below it; 0 before it began."""
    return 0 if nursery is None else _count_children(nursery)


def _count_children(nursery: trio.Nursery) -> int:
    return sum(
        1 + sum(_count_children(inner) for inner in task.child_nurseries)
        for task in nursery.child_tasks
    )
