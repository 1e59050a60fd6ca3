"""What a run does right now, as a frozen picture: names of code and tools, and nothing said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import trio

from creche._activities import Activity, ActivityKind
from creche._context import RunId, ThreadId, UserId
from creche._run_life import RunLife
from creche._store import RunRecord, RunStatus, now
from creche._task_tree import count_tasks, name_of_code, tasks_of, where_it_stands

MOST_TASKS: Final = 200  # that one picture names; all are counted
MOST_DEPTH: Final = 50  # levels of tasks that one picture shows

_HOLDS_OTHERS: Final = frozenset({"tool", "subagent"})  # a model's stream has nothing inside it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ActivityNode:
    """A model stream, tool call, sub-agent or question that is under way, and what is inside it."""

    kind: ActivityKind
    name: str  # of the model, tool or agent; of a question, what kind of answer it waits for
    since: datetime
    doing: tuple[ActivityNode, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        inner = {"doing": [each.to_dict() for each in self.doing]} if self.doing else {}
        return {"kind": self.kind, "name": self.name, "since": told(self.since), **inner}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskNode:
    """A task, and those below it, as Trio nests them."""

    name: str  # `module.function` that it was started with
    at: str  # `module.function:line` where it stands
    tasks: tuple[TaskNode, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        inner = {"tasks": [each.to_dict() for each in self.tasks]} if self.tasks else {}
        return {"name": self.name, "at": self.at, **inner}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunTree:
    """One run at the moment `at`. Before its turn and after its end nothing is under way.

    It has no argument, message, result or path in it: who may see that a run is there may see
    this. `tasks` has the first 200 of `task_count`.
    """

    run_id: RunId
    thread_id: ThreadId
    user_id: UserId
    agent: str
    status: RunStatus
    at: datetime
    created_at: datetime
    started_at: datetime | None = None
    reason: str | None = None  # why it ends, or ended otherwise than by success
    queued_ms: int | None = None  # until its turn, so far; unknown of one that is over
    doing: tuple[ActivityNode, ...] = ()  # oldest first
    task_count: int = 0
    tasks: tuple[TaskNode, ...] = ()

    @classmethod
    def of_record(cls, record: RunRecord) -> RunTree:
        """That of a run that is not live (any more)."""
        return cls(
            run_id=record.run_id,
            thread_id=record.thread_id,
            user_id=record.user_id,
            agent=record.agent,
            status=record.status,
            at=now(),
            created_at=record.created_at,
            started_at=record.started_at,
            reason=None if record.status == "success" else record.reason,
        )

    def summary(self) -> dict[str, Any]:
        """As JSON has it, its tasks only counted. What is unknown is left out."""
        known = {
            "started_at": None if self.started_at is None else told(self.started_at),
            "reason": self.reason,
            "queued_ms": self.queued_ms,
        }
        return {
            "run_id": self.run_id,
            "thread_id": self.thread_id,
            "user_id": self.user_id,
            "agent": self.agent,
            "status": self.status,
            "at": told(self.at),
            "created_at": told(self.created_at),
            **{key: value for key, value in known.items() if value is not None},
            "doing": [each.to_dict() for each in self.doing],
            "task_count": self.task_count,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with its tasks."""
        return {**self.summary(), "tasks": [each.to_dict() for each in self.tasks]}


def told(moment: datetime) -> str:
    """A moment as clients are told it."""
    return moment.isoformat(timespec="milliseconds")


def tree_of(life: RunLife) -> RunTree:
    """The picture of a run. Within Trio."""
    at = now()
    outcome = life.outcome
    reason: str | None = life.reason
    if outcome is not None and outcome.status != "success":
        reason = outcome.receipt.reason
    return RunTree(
        run_id=life.context.run_id,
        thread_id=life.context.thread_id,
        user_id=life.context.user_id,
        agent=life.agent,
        status=life.status,
        at=at,
        created_at=life.created_at,
        started_at=life.started_at,
        reason=reason,
        queued_ms=round(life.queued_for * 1000),
        doing=_nested(life.activities.now(), at),
        task_count=count_tasks(life.nursery),
        tasks=() if life.nursery is None else _pictured(life.nursery.child_tasks),
    )


def _pictured(tasks: Iterable[trio.lowlevel.Task]) -> tuple[TaskNode, ...]:
    left = MOST_TASKS

    def picture(siblings: Iterable[trio.lowlevel.Task], depth: int) -> tuple[TaskNode, ...]:
        nonlocal left
        found: list[TaskNode] = []
        for task in siblings:
            if not left:
                break
            left -= 1
            below = picture(tasks_of(task), depth + 1) if depth < MOST_DEPTH else ()
            found.append(TaskNode(name=name_of_code(task), at=where_it_stands(task), tasks=below))
        # A nursery's tasks have no order. Who looks twice must not see them change places.
        return tuple(sorted(found, key=lambda node: (node.name, node.at)))

    return picture(tasks, 1)


def _nested(activities: Sequence[Activity], at: datetime) -> tuple[ActivityNode, ...]:
    """Each inside the innermost tool call or sub-agent in whose block it began."""
    moment = trio.current_time()
    inside: dict[Activity | None, list[Activity]] = {}
    holders: dict[trio.lowlevel.Task, list[Activity]] = {}  # {task: what may hold others}
    for activity in activities:
        inside.setdefault(_holder_of(activity, holders), []).append(activity)
        if activity.kind in _HOLDS_OTHERS:
            holders.setdefault(activity.task, []).append(activity)

    def nodes(holder: Activity | None) -> tuple[ActivityNode, ...]:
        return tuple(
            ActivityNode(
                kind=activity.kind,
                name=activity.name,
                since=at - timedelta(seconds=moment - activity.since),
                doing=nodes(activity),
            )
            for activity in inside.get(holder, ())
        )

    return nodes(None)


def _holder_of(
    activity: Activity,
    holders: dict[trio.lowlevel.Task, list[Activity]],
) -> Activity | None:
    """The latest one that was begun before it, in its task or in one that its task is below of."""
    task: trio.lowlevel.Task | None = activity.task
    nursery: trio.Nursery | None = None  # the one of `task` that the activity is in
    while task is not None:
        opened = len(task.child_nurseries)
        if nursery is not None:
            opened = task.child_nurseries.index(nursery)
        for holder in reversed(holders.get(task, ())):
            # A nursery that was open before the block began is not inside it.
            if holder.nurseries <= opened:
                return holder
        nursery = task.parent_nursery
        task = None if nursery is None else nursery.parent_task
    return None
