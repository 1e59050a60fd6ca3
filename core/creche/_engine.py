"""One run's execution: its nursery, barrier, deadline, cancel and receipt."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, cast

import trio

from creche import _events as events
from creche._ambient import look_around
from creche._audit import note_mix_up
from creche._barrier import split
from creche._class_guard import ClassWatch
from creche._context import UserExecutionContext, logged_context
from creche._dispatcher import ToolDispatcher
from creche._emitter import EngineVoice, EventEmitter
from creche._errors import CrecheError, IsolationError, StoreUnavailableError
from creche._failures import identity, log_failure, public
from creche._infrastructure import Infrastructure
from creche._journal import Journal
from creche._journals import Journals, open_journals
from creche._messages import AgentInput, Message, as_messages
from creche._models import Usage
from creche._quotas import ToolQuotas
from creche._run import Receipt, Run, RunContext, RunOutcome
from creche._run_rows import propose_run, run_record, why_refused
from creche._statistics import RunStatistics, Tally
from creche._store import now
from creche._subagents import Subagents
from creche._terminal import costs_of, terminal_event
from creche._tool_calls import ToolTally

_log: Final = logging.getLogger("creche.engine")

# Seconds that a run whose process gives up on it waits for its terminal event's commit.
_LAST_COMMIT_TIMEOUT: Final = 2.0
_WORTH_TELLING: Final = 1.0  # seconds of waiting for its turn, above which a run says so


class HasAgentName(Protocol):
    """What the older design called an agent's context."""

    @property
    def agent_name(self) -> str: ...


NamesAgent = str | HasAgentName
History = Callable[[], Awaitable[Sequence[Message]]]


class ExecutionEngine:
    """Executes one run, once. Opened for a context by `create_user_engine`."""

    def __init__(
        self,
        run: Run,
        infrastructure: Infrastructure,
        journal: Journal,
        quotas: ToolQuotas | None = None,
    ) -> None:
        self._run = run
        self._infrastructure = infrastructure
        self._journal = journal
        self._limits = infrastructure.limits
        self._quotas = quotas or ToolQuotas(infrastructure.limits)
        self._emitter = EventEmitter(run.context, journal, infrastructure.limits)
        self._voice = EngineVoice(self._emitter)
        self._spent = False

    @classmethod
    @contextlib.asynccontextmanager
    async def create_user_engine(
        cls,
        context: UserExecutionContext,
        *,
        infrastructure: Infrastructure | None = None,
        journals: Journals | None = None,
        agent: str | None = None,
    ) -> AsyncIterator[ExecutionEngine]:
        """An engine without a supervisor.

        Its journal is one of `journals`, which engines at once on the same store must share;
        without them it opens its own on the infrastructure's store.

        Resource handling: leaving the block ends whatever it still executes. Raises CrecheError
        without an infrastructure.
        """
        quotas: ToolQuotas | None = None
        if infrastructure is None:
            around = look_around("infrastructure=")
            infrastructure, journals, quotas = (
                cast("Infrastructure", around.infrastructure),
                cast("Journals", around.journals),
                cast("ToolQuotas", around.quotas),
            )
        async with contextlib.AsyncExitStack() as stack:
            if journals is None:
                opened = open_journals(infrastructure.store, infrastructure.limits)
                journals = await stack.enter_async_context(opened)
            attached = journals.attached(context.user_id, context.thread_id)
            journal = await stack.enter_async_context(attached)
            try:
                engine = cls(Run(context, agent or ""), infrastructure, journal, quotas)
            except IsolationError as error:
                note_mix_up(infrastructure.audit, error, "open an engine")
                raise
            yield engine

    async def execute_agent(self, agent: NamesAgent, state: AgentInput) -> RunOutcome:
        """Commit the run, execute it to its terminal event, and say how it ended.

        `agent` is a name, or has one in its attribute `agent_name`.

        Raises UnknownAgentError, and StoreUnavailableError if it could not even be started.
        """
        name = agent if isinstance(agent, str) else agent.agent_name
        self._infrastructure.registry.describe(name)
        asked = as_messages(state)
        self._check_unspent()
        self._run.agent = name
        try:
            await propose_run(self._journal, self._run, asked)
        except StoreUnavailableError as error:
            raise await why_refused(self._infrastructure.store, self._run, error) from None

        async def history() -> Sequence[Message]:
            stored = await self._journal.history(self._limits.history_runs)
            return [item.message for item in stored]

        return await self.execute(asked, history)

    async def execute(self, asked: tuple[Message, ...], history: History) -> RunOutcome:
        """Execute a run whose rows are committed; returns once its terminal event is, too.

        `history` is awaited within the run: the thread's messages, what this run was asked
        included. Cancelled from outside, it still says and commits the terminal event, in a
        bounded shield, before it passes the cancellation on.
        """
        self._check_unspent()
        self._spent = True
        run = self._run
        if run.outcome is not None:  # it was called off
            return await self._replay_the_end(asked, run.outcome)
        run._cleanup_timeout = self._limits.cleanup_timeout  # noqa: SLF001  one idea, two modules
        started = trio.current_time()
        run.first_seq = self._journal.last_seq + 1
        run.started_at = now()
        self._voice.begin(asked, run_record(run, "running"))
        if run.queued_for > _WORTH_TELLING:
            self._voice.queued(round(run.queued_for * 1000))
        with self._quotas.share(run.user_id) as share:
            finish = _Finish(started=started)
            dispatcher = ToolDispatcher(
                run.context,
                self._infrastructure.tools_of(run.agent),
                self._emitter,
                self._limits,
                share=share,
                policy=self._infrastructure.tool_policy,
                approver=self._infrastructure.approver,
                tally=finish.tools,
            )
            logged = logged_context.set(run.context)
            try:
                await self._barrier(finish, dispatcher, history)
            finally:
                logged_context.reset(logged)
                # Also on the way out of a cancellation or a KeyboardInterrupt: the run's rows
                # are committed, so it gets its terminal event.
                usage = costs_of(finish.usage, run.context)
                outcome = self._decide(finish, self._statistics(finish, usage))
                finish.failure = None  # it holds the frames of the run, which hold it
                self._voice.close_open()
                seq = self._say_the_end(outcome, usage)
                await self._commit_the_end(seq)
                run._conclude(outcome)  # noqa: SLF001  not before: what is shown must not be lost
                self._log_end(outcome)
        return outcome

    async def _replay_the_end(
        self,
        asked: tuple[Message, ...],
        outcome: RunOutcome,
    ) -> RunOutcome:
        """Say of a run that was cancelled in the queue that it was."""
        run = self._run
        run.first_seq = self._journal.last_seq + 1
        self._voice.begin(asked, run_record(run, outcome.status, outcome=outcome))
        await self._commit_the_end(self._say_the_end(outcome))
        self._log_end(outcome)
        return outcome

    def _check_unspent(self) -> None:
        if self._spent:
            msg = "an engine executes one run, once; open another for the next"
            raise CrecheError(msg)

    async def _barrier(self, finish: _Finish, dispatcher: ToolDispatcher, history: History) -> None:
        """Run the agent; all that it can raise, but Trio's Cancelled and ^C, is a failure of it."""
        run = self._run
        try:
            run._scope.deadline = trio.current_time() + self._limits.run_timeout  # noqa: SLF001
            with run._scope:  # noqa: SLF001
                await self._within_nursery(finish, dispatcher, history)
        # Boundary: one run. Without it one tool's SystemExit would end every run.
        except BaseException as error:  # noqa: BLE001
            passing, finish.failure = split(error)
            if passing is not None:
                run.reason = run.reason or "shutdown"
                raise passing from None
        finally:
            run._nursery = None  # noqa: SLF001
            finish.nursery_closed = trio.current_time()
            # Nobody else cancels that scope without giving a reason. An agent that swallowed the
            # cancel and returned after all did so too late: that is no success.
            deadline = run._scope.deadline  # noqa: SLF001
            in_time = finish.agent_returned is not None and finish.agent_returned < deadline
            finish.deadline_passed = (
                run._scope.cancel_called  # noqa: SLF001
                and run.reason is None
                and not in_time
            )
            unexplained = run.reason is None and not finish.deadline_passed
            if unexplained and finish.agent_returned is None and finish.failure is None:
                # A nursery takes any Cancelled for its own; success it was not.
                finish.failure = CrecheError("the agent raised a Cancelled that nobody sent")

    async def _within_nursery(
        self, finish: _Finish, dispatcher: ToolDispatcher, history: History
    ) -> None:
        run = self._run
        async with trio.open_nursery() as nursery:
            run._nursery = nursery  # noqa: SLF001  # creche: shared with its own run; None again after
            await trio.lowlevel.checkpoint()  # a run that was cancelled in the queue ends here
            context = RunContext(
                run,
                context=run.context,
                messages=tuple(await history()),
                emitter=self._emitter,
                dispatcher=dispatcher,
                models=self._infrastructure.models,
                limits=self._limits,
                spawner=Subagents(self._infrastructure, finish.watch),
                tally=finish.tally,
                usage=finish.usage,
            )
            # In a task of its own: code that leaves a nursery open corrupts the task that it runs
            # in, and Trio tells that to the nursery of that task, which must be this one.
            nursery.start_soon(self._answer, context, finish, nursery)

    async def _answer(self, context: RunContext, finish: _Finish, nursery: trio.Nursery) -> None:
        registry = self._infrastructure.registry
        finish.watch.begin(registry.guards_of(self._run.agent))
        agent = registry.describe(self._run.agent).agent_class()
        finish.result = await agent.run(context)
        finish.agent_returned = trio.current_time()
        nursery.cancel_scope.cancel()

    def _decide(self, finish: _Finish, statistics: RunStatistics) -> RunOutcome:
        """How the run ended. Synchronous, as all is up to the last event: nothing interrupts."""
        run = self._run
        if finish.deadline_passed:
            run.reason = "deadline"
            timeout = self._limits.run_timeout
            _log.warning("a run took longer than %g s", timeout, extra=dict(identity(run.context)))
            run._note_cancel(run._scope.deadline)  # noqa: SLF001
        if finish.failure is not None:
            log_failure(_log, "a run", finish.failure, run.context)
            note_mix_up(self._infrastructure.audit, finish.failure, "run")
        violation = finish.watch.end()
        if violation is None and run.reason is not None:
            return RunOutcome(
                status="cancelled",
                receipt=self._receipt(finish, run.reason),
                statistics=statistics,
            )
        failure = violation or finish.failure  # whatever else: what was shared must be told
        if failure is not None:
            code, message = public(failure, run.context)
            return RunOutcome(
                status="failed",
                receipt=self._receipt(finish, code),
                message=message,
                statistics=statistics,
            )
        return RunOutcome(
            status="success",
            receipt=self._receipt(finish, "success"),
            result=finish.result,
            statistics=statistics,
        )

    def _say_the_end(
        self,
        outcome: RunOutcome,
        usage: tuple[events.TokenUsage, ...] | None = None,
    ) -> int:
        """Append the terminal event; returns its `seq`."""
        run = self._run
        last_seq = self._journal.last_seq + 1
        record = run_record(run, outcome.status, outcome=outcome, last_seq=last_seq)
        self._voice.end(terminal_event(run.context, outcome, usage), record)
        return last_seq

    async def _commit_the_end(self, seq: int) -> None:
        try:
            await self._journal.committed(seq)
        except trio.Cancelled:
            with trio.move_on_after(_LAST_COMMIT_TIMEOUT, shield=True):
                await self._journal.committed(seq)
            raise

    def _receipt(self, finish: _Finish, reason: str) -> Receipt:
        run = self._run
        closed = finish.nursery_closed
        asked = run._cancelled_at  # noqa: SLF001
        if asked is None:
            asked = finish.agent_returned or closed
        return Receipt(
            reason=reason,
            elapsed_ms=round(max(0.0, closed - asked) * 1000),
            run_ms=round((closed - finish.started) * 1000),
            tasks_ended=run._tasks_at_cancel,  # noqa: SLF001
            tools_stopped=tuple(finish.tools.stopped),
            threads_abandoned=tuple(finish.tools.abandoned),
            processes_killed=tuple(finish.tools.killed),
        )

    def _statistics(
        self,
        finish: _Finish,
        usage: tuple[events.TokenUsage, ...] | None,
    ) -> RunStatistics:
        return RunStatistics(
            queue_ms=round(self._run.queued_for * 1000),
            run_ms=round((finish.nursery_closed - finish.started) * 1000),
            model_calls=finish.tally.model_calls,
            untold_calls=max(0, finish.tally.model_calls - len(finish.usage)),
            input_tokens=sum(each.input_tokens or 0 for each in usage or ()),
            output_tokens=sum(each.output_tokens or 0 for each in usage or ()),
            tool_calls=finish.tools.calls,
            tool_failures=finish.tools.failures,
            subagents=finish.tally.subagents,
        )

    def _log_end(self, outcome: RunOutcome) -> None:
        """One line for each run, so that who watches the log sees the work."""
        status, reason = outcome.status, outcome.receipt.reason
        spent = outcome.statistics
        _log.info(
            "a run ended",
            extra={
                "agent": self._run.agent,
                "status": status if reason in {status, "user"} else f"{status} ({reason})",
                "ms": outcome.receipt.run_ms,
                **_tokens_of(spent),
                "tools": spent.tool_calls,
                **identity(self._run.context),
            },
        )


def _tokens_of(spent: RunStatistics) -> dict[str, int]:
    """What the answers cost, as the log line has it: of what is unknown nothing is said."""
    known = {"tokens": spent.output_tokens}
    if not spent.untold_calls:
        return known
    return {**(known if spent.output_tokens else {}), "untold_calls": spent.untold_calls}


class _Finish:
    """What becomes known on the way to a run's end."""

    def __init__(self, *, started: float) -> None:
        self.started = started  # trio time
        self.tools = ToolTally()
        self.result: Any = None
        self.failure: BaseException | None = None
        self.deadline_passed = False
        self.agent_returned: float | None = None
        self.nursery_closed = started
        self.usage: list[tuple[str, Usage]] = []
        self.tally = Tally()
        self.watch = ClassWatch()
