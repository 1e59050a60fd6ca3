"""One run's execution: its nursery, barrier, deadline, cancel and receipt."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
import trio

from creche import _events as events
from creche._barrier import leaves, split
from creche._context import MessageId, UserExecutionContext, new_id
from creche._emitter import EventEmitter, timestamp
from creche._errors import CrecheError, RunError, StoreUnavailableError
from creche._infrastructure import Infrastructure
from creche._journal import Journal
from creche._journals import open_journals
from creche._messages import Message, UserMessage, encode_message, text_of
from creche._models import Usage
from creche._redaction import printable, redact_text, redact_value
from creche._run import Receipt, Run, RunContext, RunOutcome
from creche._store import NewThread, RunRecord, RunStatus, StoredMessage, now
from creche._tools import ToolDispatcher

_log: Final = logging.getLogger("creche.engine")

# Seconds that a run whose process gives up on it waits for its terminal event's commit.
_LAST_COMMIT_TIMEOUT: Final = 2.0
_TITLE_LENGTH: Final = 80

AgentInput = str | Sequence[Message]
History = Callable[[], Awaitable[Sequence[Message]]]


class ExecutionEngine:
    """Executes one run, once. Opened for a context by `create_user_engine`."""

    def __init__(self, run: Run, infrastructure: Infrastructure, journal: Journal) -> None:
        self._run = run
        self._infrastructure = infrastructure
        self._journal = journal
        self._limits = infrastructure.limits
        self._emitter = EventEmitter(run.context, journal, infrastructure.limits)
        self._spent = False

    @classmethod
    @contextlib.asynccontextmanager
    async def create_user_engine(
        cls,
        context: UserExecutionContext,
        *,
        infrastructure: Infrastructure,
        agent: str | None = None,
    ) -> AsyncIterator[ExecutionEngine]:
        """An engine without a supervisor, its journal on the infrastructure's store.

        Resource handling: leaving the block ends whatever it still executes.
        """
        async with open_journals(infrastructure.store, infrastructure.limits) as journals:
            async with journals.attached(context.user_id, context.thread_id) as journal:
                yield cls(Run(context, agent or ""), infrastructure, journal)

    async def execute_agent(self, agent: str, state: AgentInput) -> RunOutcome:
        """Commit the run, execute it to its terminal event, and say how it ended.

        Raises UnknownAgentError, and StoreUnavailableError if it could not even be started.
        """
        self._infrastructure.registry.describe(agent)
        asked = as_messages(state)
        self._check_unspent()
        self._run.agent = agent
        await propose_run(self._journal, self._run, asked)

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
        self._emitter.begin(asked, run_record(run, "running"))
        dispatcher = ToolDispatcher(
            run.context,
            self._infrastructure.tools_of(run.agent),
            self._emitter,
            self._limits,
        )
        finish = _Finish(started=started, dispatcher=dispatcher)
        try:
            await self._barrier(finish, history)
        finally:
            # Also on the way out of a cancellation or a KeyboardInterrupt: the run's rows are
            # committed, so it gets its terminal event.
            outcome = self._decide(finish)
            finish.failure = None  # it holds the frames of the run, which hold it
            self._emitter.close_open()
            seq = self._say_the_end(outcome, self._usage(finish.usage))
            await self._commit_the_end(seq)
            run._conclude(outcome)  # noqa: SLF001  not before: what is shown must not be lost
        return outcome

    async def _replay_the_end(
        self,
        asked: tuple[Message, ...],
        outcome: RunOutcome,
    ) -> RunOutcome:
        """Say of a run that was cancelled in the queue that it was."""
        run = self._run
        run.first_seq = self._journal.last_seq + 1
        self._emitter.begin(asked, run_record(run, outcome.status, outcome=outcome))
        await self._commit_the_end(self._say_the_end(outcome))
        return outcome

    def _check_unspent(self) -> None:
        if self._spent:
            msg = "an engine executes one run, once; open another for the next"
            raise CrecheError(msg)

    async def _barrier(self, finish: _Finish, history: History) -> None:
        """Run the agent; all that it can raise, but Trio's Cancelled and ^C, is a failure of it."""
        run = self._run
        try:
            run._scope.deadline = trio.current_time() + self._limits.run_timeout  # noqa: SLF001
            with run._scope:  # noqa: SLF001
                await self._within_nursery(finish, history)
        # Boundary: one run. Without it one tool's SystemExit would end every run.
        except BaseException as error:  # noqa: BLE001
            passing, finish.failure = split(error)
            if passing is not None:
                run.reason = run.reason or "shutdown"
                raise passing from None
        finally:
            run._nursery = None  # noqa: SLF001
            finish.nursery_closed = trio.current_time()
            # Nobody else cancels that scope without giving a reason. What an agent returns after
            # its deadline, having swallowed the cancel, is no success either.
            returned = finish.agent_returned
            finish.deadline_passed = (
                run._scope.cancel_called  # noqa: SLF001
                and run.reason is None
                and (returned is None or returned >= run._scope.deadline)  # noqa: SLF001
            )
            unexplained = run.reason is None and not finish.deadline_passed
            if unexplained and finish.agent_returned is None and finish.failure is None:
                # A nursery takes any Cancelled for its own; success it was not.
                finish.failure = CrecheError("the agent raised a Cancelled that nobody sent")

    async def _within_nursery(self, finish: _Finish, history: History) -> None:
        run = self._run
        async with trio.open_nursery() as nursery:
            run._nursery = nursery  # noqa: SLF001
            await trio.lowlevel.checkpoint()  # a run that was cancelled in the queue ends here
            context = RunContext(
                run,
                messages=tuple(await history()),
                emitter=self._emitter,
                dispatcher=finish.dispatcher,
                models=self._infrastructure.models,
                limits=self._limits,
            )
            finish.usage = context.usage
            agent = self._infrastructure.registry.describe(run.agent).agent_class()
            finish.result = await agent.run(context)
            finish.agent_returned = trio.current_time()
            nursery.cancel_scope.cancel()

    def _decide(self, finish: _Finish) -> RunOutcome:
        """How the run ended. Synchronous, as all is up to the last event: nothing interrupts."""
        run = self._run
        if finish.deadline_passed:
            run.reason = "deadline"
            run._note_cancel(run._scope.deadline)  # noqa: SLF001
        if finish.failure is not None:
            self._log_failure(finish.failure)
        if run.reason is not None:
            return RunOutcome(status="cancelled", receipt=self._receipt(finish, run.reason))
        if finish.failure is not None:
            code, message = _public(finish.failure, run.context)
            receipt = self._receipt(finish, code)
            return RunOutcome(status="failed", receipt=receipt, message=message)
        receipt = self._receipt(finish, "success")
        return RunOutcome(status="success", receipt=receipt, result=finish.result)

    def _say_the_end(
        self,
        outcome: RunOutcome,
        usage: tuple[events.TokenUsage, ...] | None = None,
    ) -> int:
        """Append the terminal event; returns its `seq`."""
        run = self._run
        last_seq = self._journal.last_seq + 1
        record = run_record(run, outcome.status, outcome=outcome, last_seq=last_seq)
        self._emitter.end(_terminal(run.context, outcome, usage), record)
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
            tools_stopped=tuple(map(str, finish.dispatcher.stopped)),
            threads_abandoned=tuple(map(str, finish.dispatcher.abandoned)),
        )

    def _usage(self, noted: list[tuple[str, Usage]]) -> tuple[events.TokenUsage, ...] | None:
        """What the run's answers cost, by model. What is no cost is left out, and logged."""
        totals: dict[str, tuple[int, int]] = {}
        for note in noted:
            try:
                model, spent = note
                before = totals.get(model, (0, 0))
                # Providers leave counts out, whatever the types say.
                inputs, outputs = int(spent.input_tokens or 0), int(spent.output_tokens or 0)
                totals[printable(model)] = (before[0] + inputs, before[1] + outputs)
            # Boundary: one note of an agent's. The run's end must not depend on it.
            except Exception:  # noqa: BLE001
                _log.exception("a run noted a cost that is none", extra=self._identity)
        return (
            tuple(
                events.TokenUsage(model=model, input_tokens=inputs, output_tokens=outputs)
                for model, (inputs, outputs) in totals.items()
            )
            or None
        )

    @property
    def _identity(self) -> dict[str, str]:
        """For log lines."""
        context = self._run.context
        return {
            "user_id": context.user_id,
            "thread_id": context.thread_id,
            "run_id": context.run_id,
            "correlation_id": context.correlation_id,
        }

    def _log_failure(self, failure: BaseException) -> None:
        told = _told(failure)
        _log.log(
            # A failure that was told in words is no surprise; any other needs its traceback.
            logging.ERROR if told is None else logging.WARNING,
            "a run failed" if told is None else f"a run failed: {told[1]}",
            exc_info=failure if told is None else None,
            extra=self._identity,
        )


class _Finish:
    """What becomes known on the way to a run's end."""

    def __init__(self, *, started: float, dispatcher: ToolDispatcher) -> None:
        self.started = started  # trio time
        self.dispatcher = dispatcher
        self.result: Any = None
        self.failure: BaseException | None = None
        self.deadline_passed = False
        self.agent_returned: float | None = None
        self.nursery_closed = started
        self.usage: list[tuple[str, Usage]] = []


async def call_off(journal: Journal, run: Run) -> None:
    """Store that a run was cancelled before its turn came; its events follow in its turn.

    If the store does not take that, its turn will tell.
    """
    receipt = Receipt(reason=run.reason or "user", elapsed_ms=0, run_ms=0, tasks_ended=0)
    outcome = RunOutcome(status="cancelled", receipt=receipt)
    with contextlib.suppress(StoreUnavailableError):
        await journal.propose(runs=(run_record(run, "cancelled", outcome=outcome),))
        run._conclude(outcome)  # noqa: SLF001


async def propose_run(journal: Journal, run: Run, asked: tuple[Message, ...]) -> None:
    """Commit a run's rows: its thread if that is new, the run as queued, what it was asked.

    Raises StoreUnavailableError; then nothing was written.
    """
    title = next((text_of(message) for message in asked if text_of(message)), "")
    await journal.propose(
        NewThread(title=title.strip()[:_TITLE_LENGTH], epoch=journal.epoch),
        new_runs=(run_record(run, "queued"),),
        messages=tuple(
            StoredMessage(run_id=run.run_id, message=message, created_at=run.created_at)
            for message in asked
        ),
    )


def run_record(
    run: Run,
    status: RunStatus,
    *,
    outcome: RunOutcome | None = None,
    last_seq: int | None = None,
) -> RunRecord:
    """The row of a run as it stands."""
    return RunRecord(
        user_id=run.user_id,
        thread_id=run.thread_id,
        run_id=run.run_id,
        agent=run.agent,
        status=status,
        created_at=run.created_at,
        started_at=run.started_at,
        ended_at=outcome.ended_at if outcome is not None else None,
        first_seq=run.first_seq,
        last_seq=last_seq,
        reason=outcome.receipt.reason if outcome is not None else None,
        receipt=outcome.receipt.to_dict() if outcome is not None else None,
    )


def as_messages(state: AgentInput) -> tuple[Message, ...]:
    """What a run is asked, as messages; words alone become one user message.

    Raises ValueError if there is nothing in it.
    """
    if isinstance(state, str):
        state = [UserMessage(id=MessageId(new_id()), content=state)]
    if not state:
        msg = "a run's input has at least one message"
        raise ValueError(msg)
    for message in state:
        try:
            encode_message(message)
        except (TypeError, ValueError) as error:
            msg = f"a message has no JSON: {error}"
            raise ValueError(msg) from None
    return tuple(state)


def _public(failure: BaseException, context: UserExecutionContext) -> tuple[str, str]:
    """A failure as a client may see it: a code, and a sentence without anything of the inside."""
    told = _told(failure)
    if told is not None:
        return told
    return "agent_failed", f"The agent failed. Reference: {context.correlation_id}"


def _told(failure: BaseException) -> tuple[str, str] | None:
    """The code and the words of the first RunError in it, whatever its maker put into it."""
    for leaf in leaves(failure):
        if isinstance(leaf, RunError):
            message = str(getattr(leaf, "message", "")) or "The agent failed."
            code = str(getattr(leaf, "code", "agent_failed"))
            return printable(code), redact_text(printable(message))
    return None


def _terminal(
    context: UserExecutionContext,
    outcome: RunOutcome,
    usage: tuple[events.TokenUsage, ...] | None,
) -> events.Event:
    """The event that says how a run ended."""
    if outcome.status == "failed":
        return events.RunError(
            message=outcome.message or "",
            code=outcome.receipt.reason,
            usage=usage,
            metadata=_metadata(outcome.receipt, context.correlation_id),
            timestamp=timestamp(),
        )
    succeeded = outcome.status == "success"
    return events.RunFinished(
        thread_id=context.thread_id,
        run_id=context.run_id,
        outcome=events.Succeeded() if succeeded else events.Cancelled(),
        result=_json_or_none(outcome.result) if succeeded else None,
        usage=usage,
        metadata=_metadata(outcome.receipt),
        timestamp=timestamp(),
    )


def _metadata(receipt: Receipt, correlation_id: str | None = None) -> dict[str, Any]:
    creche: dict[str, Any] = {"receipt": receipt.to_dict()}
    if correlation_id is not None:
        creche["correlation_id"] = correlation_id
    return {"creche": creche}


def _json_or_none(result: Any) -> Any:
    """The agent's result if it is plain data; anything else stays in the process."""
    try:
        return redact_value(msgspec.json.decode(msgspec.json.encode(result)))
    except (TypeError, ValueError, RecursionError):
        return None
