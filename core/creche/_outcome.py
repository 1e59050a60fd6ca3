"""How a run ended, and the receipt of its cleanup."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal

from creche._statistics import RunStatistics
from creche._store import RunStatus, now

CancelReason = Literal[
    "user", "disconnect", "deadline", "budget", "superseded", "shutdown", "unanswered"
]

# How a tool was stopped: as Trio cancels; a thread that heeded its stop flag; a thread that did
# not, and goes on; a process that was killed.
StopMeans = Literal["cancelled", "stopped", "abandoned", "killed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoppedTool:
    """A tool that the run's end interrupted."""

    name: str
    how: StopMeans


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AbandonedThread:
    """A thread that would not stop, and still runs: it counts against its user until it ends.

    Or a process that the kernel did not let die in time.
    """

    name: str  # of the tool
    since: datetime  # when its stop was asked for


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a terminal event says about the cleanup. Times are milliseconds.

    With `overran`, the cleanup took longer than its allowance: all that is said here is how
    things stood then, and `alive` names the tasks that were still at work.
    """

    reason: str  # `success`, why it was cancelled, or the code of the failure
    elapsed_ms: int  # from the asking for the end, or the agent's own end, to the nursery's
    run_ms: int  # from RUN_STARTED to the nursery's end
    tasks_ended: int  # that were alive when the end was asked for
    tools_stopped: tuple[StoppedTool, ...] = ()
    threads_abandoned: tuple[AbandonedThread, ...] = ()
    processes_killed: tuple[str, ...] = ()  # tools, or programs, killed at work
    streams_closed: tuple[str, ...] = ()  # models whose streams the end cut off
    overran: bool = False
    alive: tuple[str, ...] = ()  # tasks, each with where it stands
    budget: str | None = None  # what was spent of how much, where that ended the run

    def to_dict(self) -> dict[str, Any]:
        """As it goes into `metadata.creche.receipt`."""
        return {
            "reason": self.reason,
            "elapsed_ms": self.elapsed_ms,
            "run_ms": self.run_ms,
            "tasks_ended": self.tasks_ended,
            **tools_to_dict(self.tools_stopped, self.threads_abandoned, self.processes_killed),
            "streams_closed": list(self.streams_closed),
            **({"overran": True, "alive": list(self.alive)} if self.overran else {}),
            **({} if self.budget is None else {"budget": self.budget}),
        }


def tools_to_dict(
    stopped: Iterable[StoppedTool],
    abandoned: Iterable[AbandonedThread],
    killed: Iterable[str],
) -> dict[str, Any]:
    """The part of a receipt that is about tools."""
    return {
        "tools_stopped": [{"name": tool.name, "how": tool.how} for tool in stopped],
        "threads_abandoned": [
            {"name": thread.name, "since": thread.since.isoformat(timespec="milliseconds")}
            for thread in abandoned
        ],
        "processes_killed": list(killed),
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a run ended."""

    status: RunStatus
    receipt: Receipt
    message: str | None = None  # of a failure, as clients are told it
    result: Any = None  # what the agent returned
    statistics: RunStatistics = dataclasses.field(default_factory=RunStatistics)
    ended_at: datetime = dataclasses.field(default_factory=now)
