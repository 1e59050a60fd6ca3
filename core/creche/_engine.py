"""One run's execution: its nursery, barrier, deadline, cancel and receipt."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol, cast

import trio

from creche import _events as events
from creche._ambient import Surroundings, around_of, look_around
from creche._asking import Questions
from creche._auditing import note_mix_up_of, note_refusal, record_limit
from creche._background import check_on_trio
from creche._context import UserExecutionContext, logged_as
from creche._days import check_day, learn_day
from creche._dispatcher import ToolDispatcher
from creche._emitter import EngineVoice, EventEmitter
from creche._ending import Ending
from creche._errors import (
    CrecheError,
    IsolationError,
    LimitExceededError,
    StoreUnavailableError,
)
from creche._failures import identity, log_failure
from creche._infrastructure import Infrastructure
from creche._journal import Journal
from creche._journals import Journals, open_journals
from creche._messages import AgentInput, Message, as_messages
from creche._outcome import RunOutcome
from creche._quotas import ToolQuotas, ToolShare
from creche._run_context import RunContext
from creche._run_life import RunLife
from creche._run_rows import propose_run, run_record, why_refused
from creche._statistics import RunStatistics
from creche._store import now
from creche._subagents import Subagents
from creche._terminal import costs_of, span_end, terminal_event
from creche._tool_sources import ToolSource, open_tool_sources
from creche._tools import Tool
from creche._tracing import SpanBlock, SpanEnd, Spans

_log: Final = logging.getLogger("creche.engine")

# Seconds that a run whose process gives up on it waits for its terminal event's commit.
_LAST_COMMIT_TIMEOUT: Final = 2.0
# Seconds in which tasks whose allowance to clean up is over unwind.
_UNWINDING: Final = 0.1
_RETRY_AFTER: Final = 1.0  # seconds, told to who meets a thread's limit of runs
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
        life: RunLife,
        infrastructure: Infrastructure,
        journal: Journal,
        quotas: ToolQuotas | None = None,
    ) -> None:
        self._life = life
        self._infrastructure = infrastructure
        self._journal = journal
        self._limits = infrastructure.limits
        self._quotas = quotas or ToolQuotas(infrastructure.limits, infrastructure.clock)
        self._emitter = EventEmitter(life.context, journal, infrastructure.limits)
        self._voice = EngineVoice(self._emitter)
        self._questions = Questions(life, self._voice, infrastructure.limits)
        self._spans = Spans.of_run(infrastructure.tracer, life.context, life.why_cancelled)
        self._spent = False
        self._waited = 0.0  # seconds for the thread, before it was opened

    @classmethod
    @contextlib.asynccontextmanager
    async def create_user_engine(
        cls,
        context: UserExecutionContext,
        *,
        infrastructure: Infrastructure | None = None,
        journals: Journals | None = None,
        quotas: ToolQuotas | None = None,
        agent: str | None = None,
    ) -> AsyncIterator[ExecutionEngine]:
        """An engine without a supervisor.

        Its journal is one of `journals`: engines that share them take turns on a thread, a run at
        a time. Without them it opens its own on the infrastructure's store, and has the thread
        for its whole block: another engine of the same infrastructure on this thread waits for
        the block's end, and leaves nothing if it is cancelled meanwhile. Whatever else writes on
        the same store at once must share `journals` with it.
        A user's rate of tool calls and threads are counted in `quotas`, which all engines of a
        process should share; without them they are counted for this engine alone. Beside a
        supervisor, pass its `journals` and its `quotas`. Those of `compat.open_infrastructure`
        around are taken with its infrastructure, be it passed or not.

        Resource handling: leaving the block ends whatever it still executes; `journals` and
        `quotas` stay the caller's.

        Raises CrecheError without an infrastructure, and within the block of another engine that
        has the thread, which it would wait for; LimitExceededError where more than
        `Limits.runs_per_thread` wait (audited, or AuditUnavailableError is raised).
        """
        check_on_trio()
        around: Surroundings | None
        if infrastructure is None:
            around = look_around("infrastructure=")
            infrastructure = cast("Infrastructure", around.infrastructure)
        else:
            around = around_of(infrastructure)
        if around is not None:
            journals = cast("Journals", around.journals) if journals is None else journals
            quotas = quotas or cast("ToolQuotas", around.quotas)
        waited = 0.0
        async with contextlib.AsyncExitStack() as stack:
            if journals is None:
                # First: a journal that was opened before its turn would be behind the store.
                whose, since = (context.user_id, context.thread_id), trio.current_time()
                wanted_by = infrastructure.turns.wanted_by(*whose)
                await _check_room(wanted_by, infrastructure, context)
                await stack.enter_async_context(infrastructure.turns.taken(*whose))
                waited = trio.current_time() - since
                opened = open_journals(
                    infrastructure.store, infrastructure.limits, audit=infrastructure.audit
                )
                journals = await stack.enter_async_context(opened)
            attached = journals.attached(context.user_id, context.thread_id)
            journal = await stack.enter_async_context(attached)
            try:
                engine = cls(RunLife(context, agent or ""), infrastructure, journal, quotas)
            except IsolationError as error:
                note_mix_up_of(infrastructure.audit, error, "open an engine", context)
                raise
            engine._waited = waited
            yield engine

    async def execute_agent(self, agent: NamesAgent, state: AgentInput) -> RunOutcome:
        """Commit the run, execute it to its terminal event, and say how it ended.

        `agent` is a name, or has one in its attribute `agent_name`. While another run has the
        thread, this one waits its turn; cancelled meanwhile, it leaves nothing.

        Raises UnknownAgentError, ValueError for an empty input, StoreUnavailableError if it could
        not even be started, ThreadDeletedError, LimitExceededError past `Limits.runs_per_thread`
        or what its user may spend in a day (audited, or AuditUnavailableError is raised),
        LogConflictError if somebody else wrote on the thread without sharing `journals`, and
        CrecheError within a run on that very thread, which would wait for itself.
        """
        name = agent if isinstance(agent, str) else agent.agent_name
        self._infrastructure.registry.describe(name)
        asked = as_messages(state)
        self._check_unspent()
        self._life.agent = name
        await check_day(self._infrastructure, self._quotas, self._life.context)
        async with self._turn():
            try:
                await propose_run(self._journal, self._life, asked)
            except StoreUnavailableError as error:
                raise await why_refused(self._infrastructure.store, self._life, error) from None

            async def history() -> Sequence[Message]:
                stored = await self._journal.history(self._limits.history_runs)
                return [item.message for item in stored]

            return await self.execute(asked, history)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The thread is this run's inside the block. Without a supervisor nobody else sees to it.

        Nothing of the run is stored before, so that nothing is left if it never comes to it.
        """
        turn, life = self._journal.turn, self._life
        await _check_room(turn.wanted_by, self._infrastructure, life.context)
        life.listed_at = trio.current_time() - self._waited
        life.position = turn.wanted_by
        async with turn.taken():
            self._journal.check_there()
            life.take_turn()
            yield

    async def execute(self, asked: tuple[Message, ...], history: History) -> RunOutcome:
        """Execute a run whose rows are committed; returns once its terminal event is, too.

        The caller has the thread's turn: see `Journal.turn`. `history` is awaited within the
        run: the thread's messages, what this run was asked included. Cancelled from outside, it
        still says and commits the terminal event, in a bounded shield, before it passes the
        cancellation on.

        A run whose cleanup overruns its allowance gets its terminal event then, but this returns
        no sooner than its nursery has closed.

        Raises LogConflictError where its end can never be stored, since somebody else writes on
        the thread without sharing its journals.
        """
        self._check_unspent()
        self._journal.check_there()
        self._spent = True
        with self._spans.block("run", self._life.agent) as span:
            span.ends(SpanEnd(status="failed", code="lost"))  # unless its end is committed
            if self._life.outcome is not None:  # it was called off
                outcome = await self._replay_the_end(asked, self._life.outcome)
                span.ends(span_end(outcome))
                return outcome
            return await self._execute(asked, history, span)

    async def _execute(
        self, asked: tuple[Message, ...], history: History, span: SpanBlock
    ) -> RunOutcome:
        life = self._life
        life.cleanup_timeout = self._limits.cleanup_timeout
        life.questions = self._questions
        ending = Ending(life, span)
        life.first_seq = self._journal.last_seq + 1
        life.started_at = now()
        self._voice.begin(asked, run_record(life, "running"))
        if life.queued_for > _WORTH_TELLING:
            self._voice.queued(round(life.queued_for * 1000), life.position)
        if life.rolls_back:
            self._voice.rolled_back(life.rolls_back)
        with self._quotas.share(life.context.user_id) as share:
            life.budgets.begin(self._limits.of_a_run, self._infrastructure.prices, share.day)
            try:
                with logged_as(life.context):
                    await self._watched(ending, share, history)
            finally:
                # Also on the way out of a cancellation or a KeyboardInterrupt: the run's rows
                # are committed, so it gets its terminal event.
                outcome = self._end(ending)
                life.questions = None
                await self._conclude(ending, outcome)
            if ending.passing is not None:
                raise ending.passing
        return outcome

    async def _replay_the_end(
        self,
        asked: tuple[Message, ...],
        outcome: RunOutcome,
    ) -> RunOutcome:
        """Say of a run that was cancelled in the queue that it was."""
        life = self._life
        life.first_seq = self._journal.last_seq + 1
        self._voice.begin(asked, run_record(life, outcome.status, outcome=outcome))
        if life.rolls_back:
            self._voice.rolled_back(life.rolls_back)
        seq = self._say_the_end(outcome)
        await self._commit_the_end(seq, functools.partial(self._log_end, outcome))
        return outcome

    def _check_unspent(self) -> None:
        if self._spent:
            msg = "an engine executes one run, once; open another for the next"
            raise CrecheError(msg)

    async def _watched(self, ending: Ending, share: ToolShare, history: History) -> None:
        """Run the agent, with somebody beside it who sees to it that its end is told in time."""
        # Who cancels us from outside must not stop the watching: cleanup is what it is for.
        watching = trio.CancelScope(shield=True)
        with self._life.clock.keeping(self._life.scope, self._limits.run_timeout):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, watching, ending)
                await self._barrier(ending, share, history)
                watching.cancel()

    async def _watch(self, watching: trio.CancelScope, ending: Ending) -> None:
        """End models that are silent for too long, and tell the end of a run that overruns."""
        life = self._life
        try:
            with life.clock.move_on_after(self._limits.run_timeout):
                await life.silences.watch(life.ending, until=math.inf)
            life.note_ending(life.scope.deadline)
        except trio.Cancelled:  # from outside, without a word
            life.reason = life.reason or "shutdown"
            life.note_ending(trio.current_time())
            raise
        finally:
            with watching:
                await trio.sleep_until(life.ends_by + _UNWINDING)
                outcome = self._end(ending)
                _log.warning(
                    "a run's cleanup takes longer than %g s; still alive: %s",
                    life.cleanup_timeout,
                    ", ".join(outcome.receipt.alive),
                    extra=dict(identity(life.context)),
                )
                await self._conclude(ending, outcome)

    async def _barrier(self, ending: Ending, share: ToolShare, history: History) -> None:
        """Run the agent; all that it can raise, but Trio's Cancelled and ^C, is a failure of it."""
        life = self._life
        try:
            with life.scope:
                await self._within_nursery(ending, share, history)
        # Boundary: one run. Without it one tool's SystemExit would end every run.
        except BaseException as error:  # noqa: BLE001
            ending.raised(error)
            if ending.passing is not None:
                life.reason = life.reason or "shutdown"
        finally:
            life.nursery = None
            ending.nursery_closed = trio.current_time()
            life.note_ending(ending.nursery_closed)

    async def _within_nursery(self, ending: Ending, share: ToolShare, history: History) -> None:
        life = self._life
        sources = self._infrastructure.sources_of(life.agent)
        tools = self._infrastructure.tools_of(life.agent)
        async with trio.open_nursery() as nursery:
            life.nursery = nursery  # creche: shared with its own run; None again after it
            await trio.lowlevel.checkpoint()  # a run that was cancelled in the queue ends here
            await learn_day(self._infrastructure.store, share.day, life.context.user_id)
            if sources:
                nursery.start_soon(self._answer_amid, sources, tools, ending, share, history)
            else:
                context = self._handed(tools, ending, share, tuple(await history()))
                # In a task of its own: code that leaves a nursery open corrupts the task that it
                # runs in, and Trio tells that to the nursery of that task, which must be this one.
                nursery.start_soon(self._answer, context, ending, nursery)

    async def _answer_amid(
        self,
        sources: Mapping[str, ToolSource],
        tools: tuple[Tool, ...],
        ending: Ending,
        share: ToolShare,
        history: History,
    ) -> None:
        """Answer, with tool sources open around the agent; they close when its task has ended."""
        life = self._life
        async with open_tool_sources(
            sources,
            tools,
            life.context,
            self._limits,
            killed=ending.tools.killed.append,
            outlived=ending.tools.abandon,
            told_to_end=lambda: life.ending_at,
        ) as all_tools:
            context = self._handed(all_tools, ending, share, tuple(await history()))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer, context, ending, nursery)

    def _handed(
        self,
        tools: tuple[Tool, ...],
        ending: Ending,
        share: ToolShare,
        messages: tuple[Message, ...],
    ) -> RunContext:
        """What the agent is handed."""
        life, infrastructure = self._life, self._infrastructure
        spans = ending.span.inside(life.context)
        dispatcher = ToolDispatcher(
            life.context,
            tools,
            self._emitter,
            self._limits,
            share=share,
            policy=infrastructure.tool_policy,
            approver=infrastructure.approver,
            person=self._questions,
            audit=infrastructure.audit,
            tally=ending.tools,
            activities=life.activities,
            budgets=life.budgets,
            spans=spans,
        )
        return RunContext(
            life,
            context=life.context,
            messages=messages,
            emitter=self._emitter,
            dispatcher=dispatcher,
            models=infrastructure.models,
            limits=self._limits,
            spawner=Subagents(infrastructure, life, ending),
            tally=ending.tally,
            usage=ending.usage,
            spans=spans,
            questions=self._questions,
        )

    async def _answer(self, context: RunContext, ending: Ending, nursery: trio.Nursery) -> None:
        agent = self._infrastructure.registry.make(self._life.agent, ending.watch)
        try:
            ending.result = await agent.run(context)
            ending.agent_returned = trio.current_time()
        except BaseException as error:
            ending.agent_raised(error)  # told, even if what it leaves behind takes too long
            raise
        finally:
            # Whatever is left in the nursery now has its allowance to clean up, and no more.
            self._life.note_ending(trio.current_time(), tasks=-1)
        nursery.cancel_scope.cancel()

    def _end(self, ending: Ending) -> RunOutcome:
        """Say how the run ended, once. Synchronous, so that nothing comes in between."""
        life = self._life
        if ending.told is not None:
            if ending.failure is not None:
                log_failure(_log, "what was left of a run", ending.failure, life.context)
                ending.failure = None
            return ending.told
        self._questions.close()
        ending.explain()
        if life.reason == "deadline":
            timeout = self._limits.run_timeout
            _log.warning("a run took longer than %g s", timeout, extra=dict(identity(life.context)))
        if life.reason == "budget":
            _log.warning("a run %s", life.budgets.over, extra=dict(identity(life.context)))
        if ending.failure is not None:
            log_failure(_log, "a run", ending.failure, life.context)
            note_mix_up_of(self._infrastructure.audit, ending.failure, "run", life.context)
        violation = ending.watch.end()
        if violation is not None:
            # Who writes where all runs read has more power than a run has.
            note_refusal(
                self._infrastructure.audit,
                "privilege_escalation",
                life.context,
                resource=f"class {', '.join(violation.classes)}",
                operation="write to what runs share",
                outcome="put back; the run failed",
            )
        usage = costs_of(ending.usage, life.context)
        outcome = ending.outcome(usage, violation)
        ending.failure = None  # it holds the frames of the run, which hold it
        self._voice.close_open()
        ending.seq = self._say_the_end(outcome, usage)
        ending.told = outcome
        return outcome

    async def _conclude(self, ending: Ending, outcome: RunOutcome) -> None:
        """Once the end that was said is durable, tell it. What is shown must not be lost."""
        if self._life.outcome is None:
            assert ending.seq is not None

            def tell() -> None:
                self._life.conclude(outcome)
                ending.span.ends(span_end(outcome))
                self._log_end(outcome)

            await self._commit_the_end(ending.seq, tell)

    def _say_the_end(
        self,
        outcome: RunOutcome,
        usage: tuple[events.TokenUsage, ...] | None = None,
    ) -> int:
        """Append the terminal event; returns its `seq`."""
        life = self._life
        last_seq = self._journal.last_seq + 1
        record = run_record(life, outcome.status, outcome=outcome, last_seq=last_seq)
        spent = tuple(life.budgets.by_day.items())
        terminal = terminal_event(life.context, outcome, usage, life.segments[-1])
        self._voice.end(terminal, record, spent)
        return last_seq

    async def _commit_the_end(self, seq: int, tell: Callable[[], None]) -> None:
        """Wait until the end that was said is durable, then `tell`; cancelled meanwhile, too."""
        try:
            await self._journal.committed(seq)
        except trio.Cancelled:
            with trio.move_on_after(_LAST_COMMIT_TIMEOUT, shield=True):
                await self._journal.committed(seq)
                tell()
            raise
        tell()

    def _log_end(self, outcome: RunOutcome) -> None:
        """One line for each run, so that who watches the log sees the work."""
        status, reason = outcome.status, outcome.receipt.reason
        spent = outcome.statistics
        _log.info(
            "a run ended",
            extra={
                "agent": self._life.agent,
                "status": status if reason in {status, "user"} else f"{status} ({reason})",
                "ms": outcome.receipt.run_ms,
                **_tokens_of(spent),
                "tools": spent.tool_calls,
                **identity(self._life.context),
            },
        )


async def _check_room(
    wanted_by: int, infrastructure: Infrastructure, context: UserExecutionContext
) -> None:
    """Raise LimitExceededError, which is audited, if that many have a thread or wait for it."""
    most = infrastructure.limits.runs_per_thread
    if wanted_by < most:
        return
    msg = f"this thread already has {wanted_by} runs, of {most} that it may have"
    refusal = LimitExceededError(msg, retry_after=_RETRY_AFTER)
    await record_limit(
        infrastructure.audit,
        context,
        resource="runs",
        operation="execute an agent",
        outcome=refusal.message,
    )
    raise refusal


def _tokens_of(spent: RunStatistics) -> dict[str, int]:
    """What the answers cost, as the log line has it: of what is unknown nothing is said."""
    known = {"tokens": spent.output_tokens}
    if not spent.untold_calls:
        return known
    return {**(known if spent.output_tokens else {}), "untold_calls": spent.untold_calls}
