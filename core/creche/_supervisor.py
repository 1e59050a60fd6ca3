"""The block that owns every live run of a process: start, find, drain."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Final

import trio

from creche._admission import Admission, retry_after
from creche._answer_schema import AnswerForm
from creche._asking import OVER, check_open, closed_as, read_answer
from creche._auditing import note_mix_up_of, record_limit
from creche._background import open_background
from creche._context import RunId, ThreadId, UserExecutionContext, UserId, check_id, new_id
from creche._days import check_day
from creche._double_texting import SUPERSEDING, MultitaskStrategy, check_strategy
from creche._engine import ExecutionEngine
from creche._errors import (
    BusyError,
    CrecheError,
    DrainingError,
    LimitExceededError,
    NoSuchQuestionError,
    QuestionClosedError,
    StoreUnavailableError,
)
from creche._infrastructure import Infrastructure
from creche._journal import Entry, Journal
from creche._journals import Journals, open_journals
from creche._late_answer import as_input
from creche._messages import AgentInput, Message, as_messages
from creche._outcome import CancelReason
from creche._quotas import ToolQuotas
from creche._run import Run
from creche._run_life import Asking, RunLife
from creche._run_rows import call_off, propose_run, why_refused
from creche._watchers import cancelled_when_unwatched

_log: Final = logging.getLogger("creche.supervisor")

_DRAINING: Final = "the server is shutting down and takes no new runs"
_BUSY: Final = "this thread is busy, and the run was asked for with multitask_strategy `reject`"
_AGES_LOOKED_AT: Final = 100  # runs whose ages make a guess at how long to wait


class Supervisor:
    """Starts runs, finds them for their owners, and ends them all with its block."""

    def __init__(
        self,
        infrastructure: Infrastructure,
        journals: Journals,
        nursery: trio.Nursery,
    ) -> None:
        self.infrastructure = infrastructure
        self.journals = journals
        self.quotas = ToolQuotas(infrastructure.limits, infrastructure.clock)
        self._nursery = nursery  # creche: shared it is the runs' own; open_supervisor opens it
        # {user: {run id: run}}, each in the order of asking; an entry *is* `_listed`.
        self._runs: dict[UserId, dict[RunId, RunLife]] = {}
        # {(user, thread): how many are deleting it}; an entry *is* `_deletion`.
        self._deletions: dict[tuple[UserId, ThreadId], int] = {}
        self._answers: set[tuple[UserId, str]] = set()  # an entry *is* `_answering`
        self._admission: Admission[RunLife] = Admission(
            per_user=infrastructure.limits.running_per_user,
            most=infrastructure.limits.running,
            weight=infrastructure.weight,
        )
        self._draining = False
        self._changed = trio.lowlevel.ParkingLot()

    async def start(
        self,
        context: UserExecutionContext,
        agent: str,
        state: AgentInput,
        *,
        multitask_strategy: MultitaskStrategy = "enqueue",
        disconnect_grace: float | None = None,
    ) -> Run:
        """Start a run; returns once its rows are committed.

        On a busy thread it does as `submit` says. Raises what `submit` raises, and
        StoreUnavailableError.
        """
        run = await self.submit(
            context,
            agent,
            state,
            multitask_strategy=multitask_strategy,
            disconnect_grace=disconnect_grace,
        )
        await run.accepted()
        return run

    async def submit(
        self,
        context: UserExecutionContext,
        agent: str,
        state: AgentInput,
        *,
        multitask_strategy: MultitaskStrategy = "enqueue",
        disconnect_grace: float | None = None,
    ) -> Run:
        """Take a run on: its place in its thread's order is settled when this returns.

        It may yet be refused by the store: `await run.accepted()` before telling anybody.
        Once taken on, it does not depend on the caller. With a `disconnect_grace` it is
        cancelled (`disconnect`) once nobody has watched its thread for so many seconds on end.

        On a busy thread, by `multitask_strategy`: `enqueue` waits for those before it; `reject`
        raises BusyError; `interrupt` cancels, once its own rows are committed, all that runs or
        waits there, and begins when nothing of it is left; `rollback` does so, too, and takes
        their messages out of the thread's history in the transaction of its own rows.

        Raises UnknownAgentError, DrainingError, LimitExceededError, ValueError for an empty
        input; a limit that is hit is audited, and AuditUnavailableError raised if it cannot be.
        Where there is a limit for a user's day, StoreUnavailableError if it cannot be looked up.
        """
        check_strategy(multitask_strategy)
        self.infrastructure.registry.describe(agent)
        life = RunLife(
            context, agent, strategy=multitask_strategy, disconnect_grace=disconnect_grace
        )
        return await self._take_on(life, as_messages(state))

    async def _take_on(self, life: RunLife, asked: tuple[Message, ...]) -> Run:
        context = life.context
        self._check_taking()
        await check_day(self.infrastructure, self.quotas, context)
        while (context.user_id, context.thread_id) in self._deletions:
            await self._changed.park()
        try:
            await self._nursery.start(self._serve, life, asked)
        except LimitExceededError as error:
            await record_limit(
                self.infrastructure.audit,
                context,
                resource="runs",
                operation="start a run",
                outcome=error.message,
            )
            raise
        return Run(life)

    def find(self, user_id: UserId, run_id: RunId) -> Run | None:
        """That user's live run, or None; another user's is None, too."""
        own = self._runs.get(user_id, {})
        life = own.get(run_id) or next(
            (each for each in own.values() if run_id in each.segments), None
        )
        return None if life is None else Run(life)

    async def answer(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        question_id: str,
        response: Any = None,
        *,
        declined: bool = False,
        run_id: RunId | None = None,
    ) -> Run | None:
        """Answer a question of that user's; returns once the answer is durable.

        The run that asked goes on, as `run_id` or a fresh one; it is what is returned. If it has
        ended without an answer (a shutdown, a crash), another is started, whose input is question
        and answer; `declined` then starts none, and returns None.

        Raises NoSuchQuestionError, QuestionClosedError for one that takes no answer any more,
        AnswerRefusedError for an answer that does not fit (it stays open), CrecheError for a
        `run_id` that is taken, InvalidContextError for one that can be none, what `start` raises,
        and what the store raises.
        """
        async with self.journals.attached(user_id, thread_id) as journal:
            for life in self._lives(user_id, thread_id):
                if _asks(life, question_id) is not None:
                    if run_id is not None:
                        check_id("run_id", run_id)
                        await self._check_free(user_id, run_id)
                    segment = run_id or RunId(new_id())
                    questions = _asks(life, question_id)
                    if questions is None:  # meanwhile
                        raise QuestionClosedError(OVER)
                    seq = questions.answer(response, declined=declined, run_id=segment)
                    await journal.committed(seq)
                    return Run(life)
            with self._answering(user_id, question_id):
                record = await self.journals.store.question(user_id, question_id)
                if record is None or record.thread_id != thread_id:
                    msg = "there is no such question on this thread"
                    raise NoSuchQuestionError(msg)
                check_open(record, is_live=self.find(user_id, record.run_id) is not None)
                if declined:
                    await journal.propose(questions=(closed_as(record, "declined"),))
                    return None
                answer = read_answer(AnswerForm(record.schema), response)
                context = UserExecutionContext.from_request(
                    user_id=user_id, thread_id=thread_id, run_id=run_id
                )
                life = RunLife(context, record.agent)
                life.answers = (closed_as(record, "answered"),)
                run = await self._take_on(life, as_input(record, answer))
                await run.accepted()
                return run

    async def _check_free(self, user_id: UserId, run_id: RunId) -> None:
        """Raise CrecheError if a run of that user has or had this id."""
        taken = self.find(user_id, run_id) is not None
        if taken or await self.journals.store.run(user_id, run_id) is not None:
            msg = f"run {run_id!r} has been: a run id is for one run"
            raise CrecheError(msg)

    @contextlib.contextmanager
    def _answering(self, user_id: UserId, question_id: str) -> Iterator[None]:
        """That question is being answered inside this block; a second answer is refused."""
        key = (user_id, question_id)
        if key in self._answers:
            msg = "the question is being answered already"
            raise QuestionClosedError(msg)
        self._answers.add(key)
        try:
            yield
        finally:
            self._answers.discard(key)

    def runs(self, user_id: UserId, thread_id: ThreadId | None = None) -> tuple[Run, ...]:
        """That user's live runs, oldest first; the first of a thread is its active or next one."""
        return tuple(Run(life) for life in self._lives(user_id, thread_id))

    def all_runs(self) -> tuple[Run, ...]:
        """Everybody's live runs, the oldest first: for who operates the process alone."""
        lives = (life for own in self._runs.values() for life in own.values())
        return tuple(map(Run, sorted(lives, key=lambda life: life.created_at)))

    def position(self, run: Run) -> int:
        """The place of a live run among those that wait, as far as that is known; 1 is the next.

        0 for one that has begun, or ended.
        """
        life = self._runs.get(run.user_id, {}).get(run.run_id)
        return 0 if life is None else self._admission.position(life)

    def _lives(self, user_id: UserId, thread_id: ThreadId | None = None) -> tuple[RunLife, ...]:
        return tuple(
            life
            for life in self._runs.get(user_id, {}).values()
            if thread_id is None or life.context.thread_id == thread_id
        )

    @property
    def count(self) -> int:
        """How many runs are live."""
        return sum(map(len, self._runs.values()))

    @property
    def draining(self) -> bool:
        """Whether new runs are refused because the process is going away."""
        return self._draining

    async def drain(self, *, grace: float) -> None:
        """Refuse new runs, let those that run finish within `grace` seconds, cancel the rest.

        Returns when none is left. What a run may take to clean up, `Limits.cleanup_timeout`,
        comes on top of the grace.
        """
        self._draining = True
        for life in self._all():
            if life.parked:  # a person need not answer in time; their answer will start another
                life.cancel("shutdown")
        with trio.move_on_after(grace):
            await self._empty()
        self.cancel_all("shutdown")
        await self._empty()

    def cancel_all(self, reason: CancelReason) -> None:
        """Ask every run to end."""
        for life in self._all():
            life.cancel(reason)

    def _all(self) -> list[RunLife]:
        return [life for lives in self._runs.values() for life in lives.values()]

    async def cancel_thread(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        reason: CancelReason = "user",
    ) -> None:
        """Cancel whatever runs or waits on that thread, and wait until it has ended."""
        lives = self._lives(user_id, thread_id)
        for life in lives:
            life.cancel(reason)
        for life in lives:
            await life.ended.wait()  # also of one that the store refused

    async def delete_thread(self, user_id: UserId, thread_id: ThreadId) -> bool:
        """Cancel a thread's runs, then remove it with all it owns. False if there is none."""
        with self._deletion(user_id, thread_id):
            while self._lives(user_id, thread_id):
                await self.cancel_thread(user_id, thread_id, "superseded")
            return await self.journals.delete(user_id, thread_id)

    @contextlib.contextmanager
    def _deletion(self, user_id: UserId, thread_id: ThreadId) -> Iterator[None]:
        """Runs asked for on this thread inside this block wait for its end."""
        key = (user_id, thread_id)
        self._deletions[key] = self._deletions.get(key, 0) + 1
        try:
            yield
        finally:
            self._deletions[key] -= 1
            if not self._deletions[key]:
                del self._deletions[key]
            self._changed.unpark_all()

    async def _empty(self) -> None:
        while self._runs:
            await self._changed.park()

    def _check_taking(self) -> None:
        if self._draining:
            raise DrainingError(_DRAINING)

    def _check_limits(self, context: UserExecutionContext) -> None:
        self._check_taking()
        limits = self.infrastructure.limits
        own = self._runs.get(context.user_id, {})
        if self.find(context.user_id, context.run_id) is not None:
            msg = f"run {context.run_id!r} is live already; a run id is for one run"
            raise CrecheError(msg)
        of_thread = self._lives(context.user_id, context.thread_id)
        everybodys = (life for lives in self._runs.values() for life in lives.values())
        for count, limit, what, lives in (
            (len(of_thread), limits.runs_per_thread, "thread", of_thread),
            (len(own), limits.runs_per_user, "user", own.values()),
            (self.count, limits.runs, "server", everybodys),
        ):
            if count >= limit:
                msg = f"this {what} already has {count} runs, of {limit} that it may have"
                raise LimitExceededError(msg, retry_after=retry_after(_ages(lives)))

    @contextlib.contextmanager
    def _listed(self, life: RunLife) -> Iterator[None]:
        """The run can be found, and has its place in its thread's order, inside this block."""
        user_id, thread_id = life.context.user_id, life.context.thread_id
        life.listed_at = trio.current_time()
        _begin(self._admission.enter(life, user_id, thread_id))
        life.position = self._admission.position(life)
        self._runs.setdefault(user_id, {})[life.context.run_id] = life
        try:
            yield
        finally:
            own = self._runs[user_id]
            del own[life.context.run_id]
            if not own:
                del self._runs[user_id]
            _begin(self._admission.leave(life))
            life.end()  # the last of all, so that who waited finds the thread free
            self._changed.unpark_all()

    async def _serve(
        self,
        life: RunLife,
        asked: tuple[Message, ...],
        *,
        task_status: trio.TaskStatus[RunLife],
    ) -> None:
        """A run's task, from its rows' commit to its terminal event's."""
        # All of this here, since between it and being listed nobody acts.
        self._check_limits(life.context)
        earlier = self._lives(life.context.user_id, life.context.thread_id)
        if earlier and life.strategy == "reject":
            raise BusyError(_BUSY)
        if life.strategy == "rollback":
            life.rolls_back = tuple(other.context.run_id for other in earlier)
        del earlier
        with self._listed(life):
            # Nothing is committed before this, so a caller that is cancelled here leaves nothing.
            task_status.started(life)
            async with contextlib.AsyncExitStack() as stack:
                journal = await self._accept(life, asked, stack)
                if journal is not None:
                    if life.disconnect_grace is not None:
                        await stack.enter_async_context(
                            cancelled_when_unwatched(
                                journal.watchers,
                                functools.partial(life.cancel, "disconnect"),
                                grace=life.disconnect_grace,
                            )
                        )
                    try:
                        await self._execute(life, asked, journal)
                    # Boundary: one run, whose end could not be said; the next start says it.
                    except Exception as error:  # noqa: BLE001
                        note_mix_up_of(self.infrastructure.audit, error, "run", life.context)
                        _log.exception(
                            "a run was left without its end", extra={"run_id": life.context.run_id}
                        )

    async def _accept(
        self,
        life: RunLife,
        asked: tuple[Message, ...],
        stack: contextlib.AsyncExitStack,
    ) -> Journal | None:
        """Attach the run to its journal and commit its rows; None if the store refused."""
        try:
            attached = self.journals.attached(life.context.user_id, life.context.thread_id)
            journal = await stack.enter_async_context(attached)
            # Nothing above gives way to a run that is taken on later, so that they are stored in
            # their order, and what a run rolls back is stored before it.
            await propose_run(journal, life, asked)
            if life.strategy in SUPERSEDING:
                # Not before: if the store had refused this one, the others would have gone on.
                self._supersede(life)
        except trio.Cancelled:
            # Whether it was committed is not known; if it was, the next start ends it as lost.
            life.refusal = DrainingError(_DRAINING)
            raise
        except StoreUnavailableError as error:
            life.refusal = await why_refused(self.journals.store, life, error)
            journal = None
        except Exception as error:  # noqa: BLE001  boundary: one run, before it began
            note_mix_up_of(self.infrastructure.audit, error, "start a run", life.context)
            _log.exception("a run could not be accepted", extra={"run_id": life.context.run_id})
            msg = "the store cannot be read; nothing was started, try again"
            life.refusal = StoreUnavailableError(msg)
            life.refusal.__cause__ = error
            journal = None
        finally:
            life.accepted.set()
        return journal

    def _supersede(self, life: RunLife) -> None:
        """End whatever was taken on before it on its thread."""
        lives = self._lives(life.context.user_id, life.context.thread_id)
        for other in itertools.takewhile(lambda other: other is not life, lives):
            other.cancel("superseded")
            _begin(self._admission.excuse(other))
        life.position = self._admission.position(life)

    async def _execute(self, life: RunLife, asked: tuple[Message, ...], journal: Journal) -> None:
        await life.roused.wait()
        if not life.turn.is_set():
            _begin(self._admission.excuse(life))
            await call_off(journal, life)
            await life.turn.wait()

        async def history() -> Sequence[Message]:
            limits = self.infrastructure.limits
            stored = await journal.history(limits.history_runs + limits.runs_per_thread)
            # Those of runs that wait behind this one are committed, too, but not yet said. Its own
            # may be rolled back this very moment: it is then cancelled in the next.
            live = {
                other.context.run_id
                for other in self._lives(life.context.user_id, life.context.thread_id)
            }
            return [*(item.message for item in stored if item.run_id not in live), *asked]

        engine = ExecutionEngine(life, self.infrastructure, journal, self.quotas)
        # Nobody else asks for it, unless engines without a supervisor share its journals.
        async with journal.turn.taken():
            await engine.execute(asked, history)

    @contextlib.asynccontextmanager
    async def open_events(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        after: int = 0,
    ) -> AsyncIterator[AsyncIterator[Entry]]:
        """A thread's entries as they become visible, from the one that follows `after`."""
        async with self.journals.attached(user_id, thread_id) as journal:
            with journal.watchers.watching():
                async with contextlib.aclosing(_entries(journal, after)) as entries:
                    yield entries


def _asks(life: RunLife, question_id: str) -> Asking | None:
    """The questions of that run, if this one is open."""
    questions = life.questions
    if questions is None or questions.open is None:
        return None
    return questions if questions.open.question_id == question_id else None


def _begin(lives: Iterable[RunLife]) -> None:
    for life in lives:
        life.take_turn()


def _ages(lives: Iterable[RunLife]) -> Iterator[float]:
    """For how long the first of these have been executing, s."""
    moment = trio.current_time()
    for life in itertools.islice(lives, _AGES_LOOKED_AT):
        if life.turn_at is not None:
            yield moment - life.turn_at


async def _entries(journal: Journal, after: int) -> AsyncGenerator[Entry]:
    while True:
        for entry in await journal.read(after=after):
            yield entry
            after = entry.seq


@contextlib.asynccontextmanager
async def open_supervisor(
    infrastructure: Infrastructure,
    journals: Journals | None = None,
    *,
    grace: float = 0.0,
) -> AsyncIterator[Supervisor]:
    """The block that owns every run; without `journals` it opens its own on the store.

    Resource handling: leaving the block drains, waiting `grace` seconds for runs to finish by
    themselves. When the block is left by an error or a cancellation there is no grace. Either
    way, runs end in order, with their terminal events committed; they are given
    `Limits.cleanup_timeout` for that, and are then left to Trio's own cancellation.
    """
    limits = infrastructure.limits
    async with contextlib.AsyncExitStack() as stack:
        if journals is None:
            opened = open_journals(infrastructure.store, limits, audit=infrastructure.audit)
            journals = await stack.enter_async_context(opened)
        hosting = trio.CancelScope(shield=True)
        opened_nursery: list[trio.Nursery] = []
        is_open = trio.Event()

        async def host() -> None:
            # Shielded: who cancels the block around us must not cut the runs' last words short.
            with hosting:
                async with trio.open_nursery() as nursery:
                    opened_nursery.append(nursery)
                    is_open.set()
                    await trio.sleep_forever()

        async with open_background() as nursery:
            # Not by `nursery.start`: cancelled meanwhile, that waits for the task's end, and this
            # one's end is ours to tell.
            nursery.start_soon(host)
            try:
                with trio.CancelScope(shield=True):
                    await is_open.wait()
                supervisor = Supervisor(infrastructure, journals, opened_nursery[0])
                completed = False
                try:
                    yield supervisor
                    completed = True
                finally:
                    await _end(supervisor, grace=grace if completed else 0.0)
            finally:
                hosting.cancel()


async def _end(supervisor: Supervisor, *, grace: float) -> None:
    limits = supervisor.infrastructure.limits
    bound = grace + limits.cleanup_timeout + limits.last_words_timeout
    with trio.move_on_after(bound, shield=True) as draining:
        await supervisor.drain(grace=grace)
    if draining.cancelled_caught:
        _log.warning("%d runs did not end in time", supervisor.count)
