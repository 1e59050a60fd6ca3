"""The handle of one run, for those outside it: who owns it, how it stands, how to stop it."""

from __future__ import annotations

import dataclasses
from datetime import datetime

from creche._context import RunId, ThreadId, UserExecutionContext, UserId
from creche._outcome import CancelReason, RunOutcome
from creche._run_life import RunLife
from creche._run_tree import RunTree, tree_of
from creche._store import RunStatus


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Run:
    """Handing it out gives nobody the run's insides; its task belongs to the supervisor.

    Two handles of one run are equal.
    """

    _life: RunLife

    @property
    def context(self) -> UserExecutionContext:
        return self._life.context

    @property
    def agent(self) -> str:
        return self._life.agent

    @property
    def run_id(self) -> RunId:
        return self._life.context.run_id

    @property
    def user_id(self) -> UserId:
        return self._life.context.user_id

    @property
    def thread_id(self) -> ThreadId:
        return self._life.context.thread_id

    @property
    def created_at(self) -> datetime:
        return self._life.created_at

    @property
    def started_at(self) -> datetime | None:
        return self._life.started_at

    @property
    def first_seq(self) -> int | None:
        """Of RUN_STARTED, once it has started."""
        return self._life.first_seq

    @property
    def reason(self) -> CancelReason | None:
        """Why it was told to end."""
        return self._life.reason

    @property
    def outcome(self) -> RunOutcome | None:
        """How it ended, once that is stored."""
        return self._life.outcome

    @property
    def status(self) -> RunStatus:
        """How it stands right now."""
        return self._life.status

    @property
    def queued_for(self) -> float:
        """Seconds for which it waited for its turn, so far; 0.0 without a supervisor."""
        return self._life.queued_for

    def tree(self) -> RunTree:
        """What it does right now, by names of code, tools, models and agents alone.

        Nothing is under way before its turn and once it has ended. Within Trio.
        """
        return tree_of(self._life)

    def cancel(self, reason: CancelReason = "user") -> None:
        """Ask the run to end. It has ended when `ended()` returns. The first reason stays."""
        self._life.cancel(reason)

    async def accepted(self) -> None:
        """Wait until the run's rows are committed. Raises if the store refused them."""
        await self._life.accepted.wait()
        if self._life.refusal is not None:
            raise self._life.refusal

    async def concluded(self) -> RunOutcome:
        """Wait until nothing of the run is alive and how it ended is stored.

        For a run that was cancelled in the queue that is sooner than `ended`: its events must
        wait for those of the run before it. One whose cleanup overran its allowance is concluded
        then, with a receipt that says so. Raises as `ended` does.
        """
        await self._life.concluded.wait()
        return self._life.told()

    async def ended(self) -> RunOutcome:
        """Wait until the run's nursery has closed and its terminal event is committed.

        Raises RunError for a run that the store refused, or whose end it did not take before
        the process had to go.
        """
        await self._life.ended.wait()
        return self._life.told()

    def __repr__(self) -> str:
        return f"<Run {self.run_id} of {self.agent!r}, {self.status}>"
