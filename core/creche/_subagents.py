"""The sub-agents of one run: each in a child context, with an instance, tools and voice of its own.

They work in the tasks of whoever spawned them, so whatever ends the run ends them, too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

from creche import _events as events
from creche._barrier import split
from creche._class_guard import ClassWatch
from creche._context import MAX_DEPTH, UserExecutionContext
from creche._dispatcher import ToolDispatcher
from creche._emitter import SubagentEmitter, timestamp
from creche._errors import LimitExceededError
from creche._failures import json_or_none, log_failure, public
from creche._infrastructure import Infrastructure
from creche._messages import AgentInput, Message, as_messages
from creche._run_context import RunContext
from creche._run_life import RunLife
from creche._statistics import Tally
from creche._steps import SubagentResult

_log: Final = logging.getLogger("creche.subagents")


class Subagents:
    """Runs the sub-agents of one run. See `RunContext.spawn`."""

    def __init__(
        self,
        infrastructure: Infrastructure,
        life: RunLife,
        tally: Tally,
        watch: ClassWatch,
    ) -> None:
        self._infrastructure = infrastructure
        self._limits = infrastructure.limits
        self._life = life
        self._tally = tally
        self._watch = watch
        self._alive = 0

    async def spawn(self, parent: RunContext, agent: str, state: AgentInput) -> SubagentResult:
        """Run one to its end; its failure is a result."""
        registry = self._infrastructure.registry
        described = registry.describe(agent)
        asked = as_messages(state)
        await parent.emit.free()
        with self._counted(parent), self._life.activities.during("subagent", agent):
            context = parent.context.child(f"agent {agent}")
            voice = parent.emit.subagent(context, agent, described.description)
            tools = self._infrastructure.tools_of(agent)
            dispatcher = parent.tools.for_subagent(context, tools, voice)
            try:
                self._watch.begin(registry.guards_of(agent))
                child = self._handed(parent, context, asked, voice, dispatcher)
                result = await described.agent_class().run(child)
            # Boundary: one sub-agent. What it raises is a result to whoever spawned it.
            except BaseException as error:  # noqa: BLE001
                return _failed(agent, context, voice, error)
            voice.finish(
                events.SubagentFinished(
                    subagent_run_id=context.request_id,
                    result=json_or_none(result),
                    timestamp=timestamp(),
                ),
            )
            return SubagentResult(
                agent=agent,
                status="success",
                result=result,
                text=voice.last_words,
            )

    def _handed(
        self,
        parent: RunContext,
        context: UserExecutionContext,
        asked: tuple[Message, ...],
        voice: SubagentEmitter,
        dispatcher: ToolDispatcher,
    ) -> RunContext:
        """What the sub-agent is handed: its own, but for what it spends."""
        self._tally.subagents += 1
        return RunContext(
            self._life,
            context=context,
            messages=asked,
            emitter=voice,
            dispatcher=dispatcher,
            models=self._infrastructure.models,
            limits=self._limits,
            spawner=self,
            tally=self._tally,
            usage=parent.usage,
            questions=parent.questions,
        )

    @contextlib.contextmanager
    def _counted(self, parent: RunContext) -> Iterator[None]:
        """One more is alive in this block. Raises LimitExceededError where none more may be."""
        depth = min(self._limits.subagent_depth, MAX_DEPTH)
        if parent.context.depth >= depth:
            msg = f"sub-agents may be at most {depth} levels deep"
            raise LimitExceededError(msg)
        if self._alive >= self._limits.subagents_at_once:
            msg = f"a run may have at most {self._limits.subagents_at_once} sub-agents at once"
            raise LimitExceededError(msg)
        self._alive += 1
        try:
            yield
        finally:
            self._alive -= 1


def _failed(
    agent: str,
    context: UserExecutionContext,
    voice: SubagentEmitter,
    error: BaseException,
) -> SubagentResult:
    """Say that it failed, or was stopped; then what passes a barrier goes on its way."""
    passing, failure = split(error)
    if failure is not None:
        log_failure(_log, f"the sub-agent {agent!r} of a run", failure, context)
    if passing is not None or failure is None:
        _say_error(voice, context, "cancelled", "The sub-agent was stopped before its end.")
        raise passing or error
    code, message = public(failure, context)
    _say_error(voice, context, code, message)
    return SubagentResult(
        agent=agent,
        status="failed",
        text=voice.last_words,
        error=message,
        code=code,
    )


def _say_error(
    voice: SubagentEmitter,
    context: UserExecutionContext,
    code: str,
    message: str,
) -> None:
    error = events.SubagentError(
        subagent_run_id=context.request_id,
        message=message,
        code=code,
        timestamp=timestamp(),
    )
    voice.finish(error)
