"""What is still alive of runs that have ended."""

from __future__ import annotations

import collections
import gc
from typing import Final

from tests.isolation.canaries import Finding
from tests.isolation.cast import Actor, Asker

from creche import (
    EventEmitter,
    ExecutionEngine,
    Grammar,
    Journal,
    Run,
    RunContext,
    ToolContext,
    ToolDispatcher,
    UserExecutionContext,
)
from creche._emitter import SubagentEmitter
from creche._subagents import Subagents
from creche._tool_calls import ToolCalls
from creche._tracing import SpanBlock, Spans

OF_A_RUN: Final[tuple[type[object], ...]] = (
    Actor,
    Asker,
    EventEmitter,
    ExecutionEngine,
    Grammar,
    Journal,
    Run,
    RunContext,
    SpanBlock,
    Spans,
    SubagentEmitter,
    Subagents,
    ToolCalls,
    ToolContext,
    ToolDispatcher,
    UserExecutionContext,
)


def alive(*, collect: bool = True) -> dict[str, int]:
    """{class: how many of its instances are alive}, of what belongs to one run."""
    if collect:
        gc.collect()
    found = (type(thing).__name__ for thing in gc.get_objects() if type(thing) in OF_A_RUN)
    return dict(collections.Counter(found))


def nothing_is_reachable(before: dict[str, int]) -> list[Finding]:
    """Findings for what is alive now and was not `before`, once all runs have ended."""
    return [
        Finding("reachability", f"{count - before.get(name, 0)} {name} are still alive")
        for name, count in alive().items()
        if count > before.get(name, 0)
    ]
