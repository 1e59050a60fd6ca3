"""What becomes known on the way to a run's end, and how it ended, decided from that."""

from __future__ import annotations

from typing import Any

import trio

from creche import _events as events
from creche._barrier import split
from creche._class_guard import ClassWatch
from creche._errors import CrecheError
from creche._failures import identity, public
from creche._models import Usage
from creche._outcome import Receipt, RunOutcome
from creche._run_life import RunLife
from creche._statistics import RunStatistics, Tally
from creche._task_tree import names_of_tasks
from creche._tool_calls import ToolTally
from creche._tracing import SpanBlock


class Ending:
    """Of one run, filled by its engine."""

    def __init__(self, life: RunLife, span: SpanBlock) -> None:
        self._life = life
        self.span = span  # the run's own
        self.started = trio.current_time()
        self.tools = ToolTally()
        self.tally = Tally()
        self.usage: list[tuple[str, Usage]] = []
        self.watch = ClassWatch(identity(life.context))
        self.result: Any = None
        self.failure: BaseException | None = None
        self.passing: BaseException | None = None  # what no barrier stops
        self.agent_returned: float | None = None  # trio time
        self.nursery_closed: float | None = None  # trio time
        self.seq: int | None = None  # of the terminal event, once it is said
        self.told: RunOutcome | None = None  # in it

    def agent_raised(self, error: BaseException) -> None:
        """Note what came out of the agent itself, while others may still be in its nursery."""
        _, self.failure = split(error)

    def raised(self, error: BaseException) -> None:
        """Note what came out of the agent's nursery."""
        self.passing, self.failure = split(error)

    def explain(self) -> None:
        """Give the run its reason, or its failure, where nobody said one."""
        life = self._life
        # Nobody else cancels that scope without giving a reason. An agent that swallowed the
        # cancel and returned after all did so too late: that is no success.
        deadline = life.scope.deadline
        in_time = self.agent_returned is not None and self.agent_returned < deadline
        if life.reason is None and life.scope.cancel_called and not in_time:
            life.reason = "deadline"
            life.note_ending(deadline)
        if life.reason is None and self.agent_returned is None and self.failure is None:
            # A nursery takes any Cancelled for its own; success it was not.
            self.failure = CrecheError("the agent raised a Cancelled that nobody sent")

    def outcome(
        self,
        usage: tuple[events.TokenUsage, ...] | None,
        violation: Exception | None,
    ) -> RunOutcome:
        """How the run ended, or how it stands once its cleanup has overrun."""
        life = self._life
        statistics = self._statistics(usage)
        if violation is None and life.reason is not None:
            return RunOutcome(
                status="cancelled",
                receipt=self._receipt(life.reason),
                statistics=statistics,
            )
        failure = violation or self.failure  # whatever else: what was shared must be told
        if failure is not None:
            code, message = public(failure, life.context)
            return RunOutcome(
                status="failed",
                receipt=self._receipt(code),
                message=message,
                statistics=statistics,
            )
        return RunOutcome(
            status="success",
            receipt=self._receipt("success"),
            result=self.result,
            statistics=statistics,
        )

    def _receipt(self, reason: str) -> Receipt:
        life = self._life
        until = self._until()
        asked = until if life.ending_at is None else life.ending_at
        overran = self.nursery_closed is None
        return Receipt(
            reason=reason,
            elapsed_ms=round(max(0.0, until - asked) * 1000),
            run_ms=round((until - self.started) * 1000),
            tasks_ended=life.tasks_at_end,
            tools_stopped=tuple(self.tools.stopped),
            threads_abandoned=tuple(self.tools.abandoned),
            processes_killed=tuple(self.tools.killed),
            streams_closed=life.streams_at_end,
            overran=overran,
            alive=names_of_tasks(life.nursery),
        )

    def _statistics(self, usage: tuple[events.TokenUsage, ...] | None) -> RunStatistics:
        return RunStatistics(
            queue_ms=round(self._life.queued_for * 1000),
            run_ms=round((self._until() - self.started) * 1000),
            model_calls=self.tally.model_calls,
            untold_calls=max(0, self.tally.model_calls - len(self.usage)),
            input_tokens=sum(each.input_tokens or 0 for each in usage or ()),
            output_tokens=sum(each.output_tokens or 0 for each in usage or ()),
            tool_calls=self.tools.calls,
            tool_failures=self.tools.failures,
            subagents=self.tally.subagents,
        )

    def _until(self) -> float:
        return trio.current_time() if self.nursery_closed is None else self.nursery_closed
