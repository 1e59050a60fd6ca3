"""What a run is doing right now: its model streams, tool calls, sub-agents and questions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal

import trio

ActivityKind = Literal["model", "tool", "program", "subagent", "question"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Activity:
    """One thing that is under way, by the name of what it is done with."""

    kind: ActivityKind
    name: str
    since: float  # trio time
    task: trio.lowlevel.Task = dataclasses.field(repr=False)  # whose block it is
    nurseries: int  # that this task had open when it began; those after them are inside it


class Activities:
    """Those of one run. An entry *is* a block, so what is listed is under way."""

    def __init__(self) -> None:
        self._under_way: dict[Activity, None] = {}  # in the order of their beginning

    @contextlib.contextmanager
    def during(self, kind: ActivityKind, name: str) -> Iterator[Activity]:
        """It is under way inside this block."""
        task = trio.lowlevel.current_task()
        activity = Activity(kind, name, trio.current_time(), task, len(task.child_nurseries))
        self._under_way[activity] = None
        try:
            yield activity
        finally:
            del self._under_way[activity]

    def now(self, kind: ActivityKind | None = None) -> tuple[Activity, ...]:
        """What is under way, oldest first."""
        return tuple(each for each in self._under_way if kind in {None, each.kind})
