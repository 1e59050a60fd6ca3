"""Sub-agents one after another, or at once: what became of each, in the order of the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import trio

from creche._emitter import EventEmitter
from creche._errors import CrecheError, SubagentFailedError
from creche._messages import AgentInput

SubagentStatus = Literal["success", "failed", "cancelled", "skipped"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SubagentResult:
    """What became of a sub-agent. Its failure is a result, too, not a raise."""

    agent: str
    status: SubagentStatus
    result: Any = None  # what it returned
    text: str = ""  # the last message that it said
    error: str | None = None  # why it failed, in words that may be told
    code: str | None = None  # the same for programs

    @property
    def ok(self) -> bool:
        return self.status == "success"

    def or_raise(self) -> SubagentResult:
        """Itself, if it did not fail. Raises SubagentFailedError."""
        if self.status == "failed":
            raise SubagentFailedError(self.error or "", code=self.code or "agent_failed")
        return self


Results = Sequence[SubagentResult]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One sub-agent's part in a sequence, or beside others.

    `input` and `when` may be functions of the results of the steps before; beside others there
    are none, so they are given an empty sequence. A step whose `when` says no is skipped.
    """

    agent: str
    input: AgentInput | Callable[[Results], AgentInput]
    name: str | None = None  # as it is told; the agent's if it has none
    when: Callable[[Results], bool] | None = None
    continue_on_error: bool = False  # its failure is no reason to stop the others


class Spawn(Protocol):
    """Runs one sub-agent; see `RunContext.spawn`."""

    async def __call__(self, agent: str, state: AgentInput, /) -> SubagentResult: ...


async def in_sequence(
    steps: Sequence[Step],
    spawn: Spawn,
    emitter: EventEmitter,
) -> tuple[SubagentResult, ...]:
    """One after another. After a failure, unless it may be passed over, the rest is skipped."""
    results: list[SubagentResult] = []
    failed = False
    for step in steps:
        if failed or not _is_due(step, results):
            results.append(SubagentResult(agent=step.agent, status="skipped"))
            continue
        asked = _input_of(step, results)
        with emitter.step(step.name or step.agent):
            result = await spawn(step.agent, asked)
        results.append(result)
        failed = result.status == "failed" and not step.continue_on_error
    return tuple(results)


async def in_parallel(
    steps: Sequence[Step],
    spawn: Spawn,
    emitter: EventEmitter,
) -> tuple[SubagentResult, ...]:
    """All at once. A failure, unless it may be passed over, cancels those that still run."""
    due = [_is_due(step, ()) for step in steps]
    asked = [_input_of(step, ()) if is_due else "" for step, is_due in zip(steps, due, strict=True)]
    results = [
        SubagentResult(agent=step.agent, status="cancelled" if is_due else "skipped")
        for step, is_due in zip(steps, due, strict=True)
    ]
    refusals: list[Exception] = []

    async def take(place: int) -> None:
        step = steps[place]
        try:
            with emitter.step(step.name or step.agent):
                results[place] = await spawn(step.agent, asked[place])
        except (CrecheError, ValueError) as refusal:  # raised below, without a group around it
            refusals.append(refusal)
        if refusals or (results[place].status == "failed" and not step.continue_on_error):
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for place, is_due in enumerate(due):
            if is_due:
                nursery.start_soon(take, place)
    if refusals:
        raise refusals[0]
    return tuple(results)


def _is_due(step: Step, results: Results) -> bool:
    return step.when is None or step.when(tuple(results))


def _input_of(step: Step, results: Results) -> AgentInput:
    return step.input(tuple(results)) if callable(step.input) else step.input
