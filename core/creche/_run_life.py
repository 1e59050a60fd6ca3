"""A run from within: what those who execute it set and wait for. `Run` is its outside.

Owned by the run's own task: the supervisor's, or that of who opened an engine.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Protocol

import trio

from creche._activities import Activities
from creche._context import RunId, UserExecutionContext
from creche._double_texting import MultitaskStrategy
from creche._errors import RunError
from creche._outcome import CancelReason, RunOutcome
from creche._run_clock import RunClock
from creche._silence import Silences
from creche._spending import Budgets
from creche._store import QuestionRecord, RunStatus, now
from creche._task_tree import count_tasks


class Asking(Protocol):
    """What a run asks a person: its outside."""

    @property
    def open(self) -> QuestionRecord | None:
        """What waits for an answer right now."""
        ...

    def answer(self, response: Any, *, declined: bool, run_id: RunId) -> int:
        """Answer what is open. Returns the `seq` that makes it durable."""
        ...


class RunLife:
    """One run, from being taken on to its end. Trio times are seconds on Trio's clock."""

    def __init__(
        self,
        context: UserExecutionContext,
        agent: str,
        *,
        strategy: MultitaskStrategy = "enqueue",
        disconnect_grace: float | None = None,
    ) -> None:
        self.context = context
        self.agent = agent
        self.strategy: MultitaskStrategy = strategy
        self.rolls_back: tuple[RunId, ...] = ()  # runs of its thread that it undoes
        self.disconnect_grace = disconnect_grace  # seconds unwatched; None: it goes on
        self.created_at: datetime = now()
        self.started_at: datetime | None = None
        self.first_seq: int | None = None  # of RUN_STARTED, once it has started
        self.reason: CancelReason | None = None  # why it was told to end
        self.outcome: RunOutcome | None = None
        self.refusal: Exception | None = None  # why its rows were not committed
        self.activities = Activities()
        self.silences = Silences()
        self.budgets = Budgets(functools.partial(self.cancel, "budget"))
        self.clock = RunClock()
        # Its id, and, once it has been parked, those of its segments; the last is how it goes on.
        self.segments: list[RunId] = [context.run_id]
        self.questions: Asking | None = None  # while it can ask
        self.answers: tuple[QuestionRecord, ...] = ()  # that it was started by, of an ended run

        self.listed_at: float | None = None  # trio time at which a supervisor took it on
        self.position = 0  # when it was taken on: see `Admission.position`
        self.turn_at: float | None = None  # trio time
        self.ending_at: float | None = None  # trio time at which its end was asked for, or came
        self.tasks_at_end = 0  # that were alive then
        self.streams_at_end: tuple[str, ...] = ()  # models that were speaking then

        self.accepted = trio.Event()  # its rows are committed, or refused
        self.turn = trio.Event()  # it is the thread's active run
        self.roused = trio.Event()  # it need not wait in the queue: see `turn`, `reason`
        self.ending = trio.Event()  # see `ending_at`
        self.concluded = trio.Event()  # how it ended is stored
        self.ended = trio.Event()  # and nothing of it is left

        self.scope = trio.CancelScope()  # around all that the agent does
        self.nursery: trio.Nursery | None = None  # that of the agent, while it is open
        self.cleanup_timeout = math.inf  # seconds
        self._cleanups: set[trio.CancelScope] = set()  # an entry *is* `cleanup`

    @property
    def status(self) -> RunStatus:
        if self.outcome is not None:
            return self.outcome.status
        if self.first_seq is None:
            return "queued"
        return "parked" if self.parked else "running"

    @property
    def parked(self) -> bool:
        """Whether it waits for a person."""
        return self.questions is not None and self.questions.open is not None

    @property
    def queued_for(self) -> float:
        """Seconds for which it waited for its turn, so far; 0.0 without a supervisor."""
        if self.listed_at is None:
            return 0.0
        until = trio.current_time() if self.turn_at is None else self.turn_at
        return until - self.listed_at

    @property
    def ends_by(self) -> float:
        """When what is left of it must have cleaned up; trio time."""
        asked = self.scope.deadline if self.ending_at is None else self.ending_at
        return asked + self.cleanup_timeout

    def cancel(self, reason: CancelReason) -> None:
        """Ask the run to end; the first reason stays."""
        if self.ended.is_set() or self.reason is not None:
            return
        self.reason = reason
        self.note_ending(trio.current_time())
        self.scope.cancel()
        self.roused.set()

    def why_cancelled(self) -> str | None:
        """The reason for whatever is cancelled in it, while it ends."""
        if self.reason is None and self.scope.cancel_called:
            return "deadline"  # which nobody says before the run has ended
        return self.reason

    def note_ending(self, moment: float, *, tasks: int = 0) -> None:
        """From this moment on there is only cleanup, which has its allowance. Once counts.

        `tasks` is added to the number of those that are alive: -1 where the caller is one that
        ends by itself.
        """
        if self.ending_at is None:
            self.ending_at = moment
            self.tasks_at_end = max(0, count_tasks(self.nursery) + tasks)
            self.streams_at_end = tuple(each.name for each in self.activities.now("model"))
            for scope in self._cleanups:
                scope.deadline = min(scope.deadline, self.ends_by)
            self.ending.set()

    def take_turn(self) -> None:
        """It is the thread's active run from now on."""
        self.turn_at = trio.current_time()
        self.turn.set()
        self.roused.set()

    def conclude(self, outcome: RunOutcome) -> None:
        """How it ended is stored, so it may be told."""
        self.outcome = outcome
        self.concluded.set()

    def end(self) -> None:
        """Nothing of it is left."""
        self.ended.set()
        self.concluded.set()

    def told(self) -> RunOutcome:
        """How it ended. Raises RunError for a run whose end the store did not take."""
        if self.outcome is None:
            msg = "the run has no end: the store did not take it"
            raise RunError(msg, code="lost")
        return self.outcome

    @contextlib.contextmanager
    def cleanup(self) -> Iterator[trio.CancelScope]:
        """See `RunContext.cleanup`."""
        if trio.current_effective_deadline() == -math.inf:
            self.note_ending(trio.current_time())  # cancelled from outside, without a word
        with trio.CancelScope(shield=True, deadline=self.ends_by) as scope:
            self._cleanups.add(scope)
            try:
                yield scope
            finally:
                self._cleanups.discard(scope)
