"""The sub-agents of one run: each in a child context, with an instance, tools and voice of its own.

They work in the tasks of whoever spawned them, so whatever ends the run ends them, too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Final

import trio

from creche import _events as events
from creche._agents import Agent, AgentDescription
from creche._auditing import note_mix_up_of, record_limit
from creche._barrier import split
from creche._context import MAX_DEPTH, UserExecutionContext
from creche._dispatcher import ToolDispatcher
from creche._emitter import SubagentEmitter, timestamp
from creche._ending import Ending
from creche._errors import LimitExceededError
from creche._failures import json_or_none, log_failure, public
from creche._infrastructure import Infrastructure
from creche._messages import AgentInput, Message, as_messages
from creche._run_context import RunContext
from creche._run_life import RunLife
from creche._steps import SubagentResult
from creche._tool_sources import open_tool_sources
from creche._tracing import SpanEnd, Spans, as_code

_log: Final = logging.getLogger("creche.subagents")


class Subagents:
    """Runs the sub-agents of one run. See `RunContext.spawn`."""

    def __init__(
        self,
        infrastructure: Infrastructure,
        life: RunLife,
        ending: Ending,
    ) -> None:
        self._infrastructure = infrastructure
        self._limits = infrastructure.limits
        self._life = life
        self._ending = ending
        self._alive = 0

    async def spawn(self, parent: RunContext, agent: str, state: AgentInput) -> SubagentResult:
        """Run one to its end; its failure is a result."""
        described = self._infrastructure.registry.describe(agent)
        asked = as_messages(state)
        await parent.emit.free()
        if (refusal := self._refusal(parent)) is not None:
            await record_limit(
                self._infrastructure.audit,
                parent.context,
                resource="sub-agents",
                operation="spawn",
                outcome=refusal.message,
            )
            raise refusal
        with self._counted(), self._life.activities.during("subagent", agent):
            context = parent.context.child(f"agent {agent}")
            with parent.spans.block("subagent", agent, context=context) as span:
                result = await self._run(parent, described, context, asked, span.inside(context))
                span.ends(_end_of(result))
        return result

    async def _run(
        self,
        parent: RunContext,
        described: AgentDescription,
        context: UserExecutionContext,
        asked: tuple[Message, ...],
        spans: Spans,
    ) -> SubagentResult:
        agent = described.name
        voice = parent.emit.subagent(context, agent, described.description)
        try:
            result = await self._answer(parent, described, context, asked, voice, spans=spans)
        # Boundary: one sub-agent. What it raises is a result to whoever spawned it.
        except BaseException as error:  # noqa: BLE001
            note_mix_up_of(self._infrastructure.audit, error, f"agent {agent}", context)
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

    async def _answer(
        self,
        parent: RunContext,
        described: AgentDescription,
        context: UserExecutionContext,
        asked: tuple[Message, ...],
        voice: SubagentEmitter,
        *,
        spans: Spans,
    ) -> Any:
        """Make an instance and have it answer, amid tool sources of its own if it wants any."""
        tools = self._infrastructure.tools_of(described.name)
        sources = self._infrastructure.sources_of(described.name)
        if not sources:
            dispatcher = parent.tools._for_subagent(context, tools, voice, spans)  # noqa: SLF001
            child = self._handed(parent, context, asked, voice, dispatcher, spans=spans)
            return await self._made(described).run(child)
        results: list[Any] = []

        async def answer(child: RunContext) -> None:
            results.append(await self._made(described).run(child))

        async with open_tool_sources(
            sources,
            tools,
            context,
            self._limits,
            killed=self._ending.tools.killed.append,
            outlived=self._ending.tools.abandon,
            told_to_end=lambda: self._life.ending_at,
        ) as all_tools:
            dispatcher = parent.tools._for_subagent(context, all_tools, voice, spans)  # noqa: SLF001
            # In a task of its own: a nursery that it leaves open must not corrupt this one, in
            # which the sources are to be closed.
            async with trio.open_nursery() as nursery:
                child = self._handed(parent, context, asked, voice, dispatcher, spans=spans)
                nursery.start_soon(answer, child)
        return results[0]

    def _made(self, described: AgentDescription) -> Agent:
        return self._infrastructure.registry.make(described.name, self._ending.watch)

    def _handed(
        self,
        parent: RunContext,
        context: UserExecutionContext,
        asked: tuple[Message, ...],
        voice: SubagentEmitter,
        dispatcher: ToolDispatcher,
        *,
        spans: Spans,
    ) -> RunContext:
        """What the sub-agent is handed: its own, but for what it spends."""
        self._ending.tally.subagents += 1
        return RunContext(
            self._life,
            context=context,
            messages=asked,
            emitter=voice,
            dispatcher=dispatcher,
            models=self._infrastructure.models,
            limits=self._limits,
            spawner=self,
            tally=self._ending.tally,
            usage=parent.usage,
            questions=parent.questions,
            spans=spans,
        )

    def _refusal(self, parent: RunContext) -> LimitExceededError | None:
        """Why there may not be one more."""
        depth = min(self._limits.subagent_depth, MAX_DEPTH)
        if parent.context.depth >= depth:
            return LimitExceededError(f"sub-agents may be at most {depth} levels deep")
        most = self._limits.subagents_at_once
        if self._alive >= most:
            return LimitExceededError(f"a run may have at most {most} sub-agents at once")
        return None

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """One more is alive in this block."""
        self._alive += 1
        try:
            yield
        finally:
            self._alive -= 1


def _end_of(result: SubagentResult) -> SpanEnd:
    if result.ok:
        return SpanEnd(status="success")
    return SpanEnd(status="failed", code=as_code(result.code or ""))


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
