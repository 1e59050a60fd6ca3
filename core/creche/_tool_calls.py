"""One tool call after another, for one run: counted, checked, approved, run, told in words."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, Final, cast

import trio

from creche._approval import ApprovalRequest, Approver, ask
from creche._arguments import ArgumentsError, canonical_json
from creche._audit import SecurityAudit
from creche._auditing import note_mix_up_of, note_refusal, record_limit
from creche._barrier import leaves, split
from creche._context import ToolCallId, UserExecutionContext
from creche._errors import AuditUnavailableError, RunError
from creche._failures import identity
from creche._limits import Limits
from creche._outcome import AbandonedThread, StopMeans, StoppedTool, tools_to_dict
from creche._programs import Programs
from creche._quotas import ToolShare
from creche._redaction import redact_text
from creche._store import now
from creche._tool_processes import Answer, ToolProcessError, call_in_process
from creche._tool_threads import call_in_thread
from creche._tools import (
    StopFlag,
    Tool,
    ToolContext,
    ToolResult,
    check_names,
    content_of,
    failure,
    failure_words,
)
from creche._tracing import code_of

_log: Final = logging.getLogger("creche.tools")

# Which users may call which tools: a pure function, asked once for each tool of a run.
ToolPolicy = Callable[[UserExecutionContext, Tool], bool]


def allow_every_tool(context: UserExecutionContext, tool: Tool) -> bool:  # noqa: ARG001  a policy
    """The policy that allows all."""
    return True


def shortened(content: str, most_bytes: int) -> str:
    """The text, cut if it is longer than that; then it says so, and how much there was."""
    encoded = content.encode()
    if len(encoded) <= most_bytes:
        return content
    kept = encoded[:most_bytes].decode(errors="ignore")
    return f"{kept}\n[cut: the first {most_bytes:,} of {len(encoded):,} bytes]"


@dataclasses.dataclass(slots=True, eq=False)
class ToolTally:
    """What became of one run's tool calls, those of its sub-agents included."""

    calls: int = 0
    failures: int = 0
    granted: int = 0  # of the calls, those that counted for the run's budget
    stopped: list[StoppedTool] = dataclasses.field(default_factory=list[StoppedTool])
    abandoned: list[AbandonedThread] = dataclasses.field(default_factory=list[AbandonedThread])
    killed: list[str] = dataclasses.field(default_factory=list[str])  # whose processes, at work

    @property
    def receipt(self) -> dict[str, Any]:
        """What became of tools that did not end by themselves, as a receipt tells it."""
        return tools_to_dict(self.stopped, self.abandoned, self.killed)

    def abandon(self, name: str) -> None:
        """This tool, or what it is from, would not stop."""
        self.abandoned.append(AbandonedThread(name=name, since=now()))


@dataclasses.dataclass(slots=True, eq=False)
class _Call:
    """One call of a tool, and how it would be stopped."""

    id: ToolCallId
    tool: Tool
    how: StopMeans


class ToolCalls:
    """What one run may call, what it has called, and what became of tools that were stopped."""

    def __init__(
        self,
        context: UserExecutionContext,
        tools: Iterable[Tool],
        limits: Limits,
        *,
        share: ToolShare,
        programs: Programs,
        policy: ToolPolicy,
        approver: Approver | None,
        audit: SecurityAudit | None,
        tally: ToolTally,
    ) -> None:
        offered = tuple(tools)
        check_names((tool.name for tool in offered), "a dispatcher")
        allowed = (tool for tool in offered if _is_allowed(policy, context, tool, audit))
        self.tools = MappingProxyType({tool.name: tool for tool in allowed})
        self._denied = frozenset(tool.name for tool in offered) - self.tools.keys()
        self.tally = tally
        self._audit = audit
        self._context = context
        self._limits = limits
        self._share = share
        self._programs = programs
        self._approver = approver

    async def result(
        self, call_id: ToolCallId, name: str, arguments: str, person: Approver | None
    ) -> ToolResult:
        """What becomes of a call. A tool that is denied and one that is not are answered alike.

        `person` is asked where there is no approver, and keeps a time of their own.
        """
        refusal = await self._refusal(call_id)
        if refusal is not None:
            return refusal
        called = self.tools.get(name)
        if called is None:
            if name in self._denied:
                # Not waited for: how long the answer took would tell that there is such a tool.
                note_refusal(
                    self._audit,
                    "privilege_escalation",
                    self._context,
                    resource=f"tool {name}",
                    operation="call",
                    outcome="absent",
                )
            return failure(call_id, f"There is no tool named {name!r}.", code="unknown_tool")
        try:
            keywords = called.keywords(arguments)
        except ArgumentsError as error:
            message = f"The arguments do not fit the tool's schema: {error}"
            return failure(call_id, message, code="invalid_arguments")
        # Boundary: one tool, whose types have code of their own that runs when they are made.
        except BaseException as error:  # noqa: BLE001
            return self._failed(_Call(call_id, called, "cancelled"), error)
        if called.approval:
            request = ApprovalRequest(
                context=self._context,
                tool_name=name,
                tool_call_id=call_id,
                arguments=canonical_json(arguments or "{}"),
            )
            by_a_person = self._approver is None and person is not None
            objection = await ask(
                person if by_a_person else self._approver,
                request,
                math.inf if by_a_person else self._limits.approval_timeout,
                audit=self._audit,
            )
            if objection is not None:
                return failure(call_id, objection, code="not_approved")
        return await self._called(call_id, called, keywords, arguments)

    async def _refusal(self, call_id: ToolCallId) -> ToolResult | None:
        """What a call gets that is over the run's budget or the user's rate; it is audited."""
        if self.tally.granted >= self._limits.tool_calls:
            said = (
                f"This run has made all of the {self._limits.tool_calls} tool calls that it may "
                "make. Answer with what you have; another run can make more."
            )
            return await self._limited(call_id, "tool calls of a run", said)
        wait = self._share.take()
        if wait > 0:
            said = (
                f"Too many tool calls: {self._limits.tool_calls_per_minute} a minute are allowed. "
                f"Try again in {wait:.1f} s."
            )
            return await self._limited(call_id, "tool calls a minute", said, retry_after=wait)
        self.tally.granted += 1
        return None

    async def _limited(
        self, call_id: ToolCallId, resource: str, said: str, *, retry_after: float | None = None
    ) -> ToolResult:
        try:
            await record_limit(
                self._audit,
                self._context,
                resource=resource,
                operation="call a tool",
                outcome="refused",
            )
        except AuditUnavailableError as error:
            return failure(call_id, f"The call was refused: {error}.", code="audit_unavailable")
        return failure(call_id, said, code="limit_exceeded", retry_after=retry_after)

    async def _called(
        self, call_id: ToolCallId, called: Tool, keywords: dict[str, Any], arguments: str
    ) -> ToolResult:
        """Run the tool under its deadline; all that it can raise is a failure of it."""
        call = _Call(call_id, called, _means_of(called))
        with trio.move_on_after(self._limits.tool_timeout):
            try:
                if called.process:
                    answer = await self._in_process(call, arguments)
                    content, value = answer.content, answer.value
                else:
                    value = await self._in_this_process(call, keywords)
                    content = content_of(value)
                content = self._told(content)
                return ToolResult(tool_call_id=call_id, content=content, value=value)
            # Boundary: one tool. SystemExit, GeneratorExit and another library's CancelledError
            # are BaseExceptions, and one tool may end neither its run nor the process.
            except BaseException as error:  # noqa: BLE001
                return self._failed(call, error)
        del self.tally.stopped[-1]  # by its own deadline, which is no matter of the run's end
        late = f"took longer than {self._limits.tool_timeout:g} s"
        if call.how == "abandoned":  # who asks again has it at work twice
            late += "; it would not stop and may still be at work"
        else:
            late += " and was stopped"
        _log.warning(
            "tool %s %s",
            called.name,
            late,
            extra={**identity(self._context), "tool_call_id": call_id},
        )
        return failure(call_id, f"The tool {late}.", code="tool_timeout")

    def _told(self, content: str) -> str:
        """A result as the model gets it: whole, but for what is too long. It is redacted later."""
        most = self._limits.tool_result_bytes
        if len(content) <= most // 4:  # bytes a character, at most
            return content
        return shortened(content, most)

    async def _in_this_process(self, call: _Call, keywords: dict[str, Any]) -> Any:
        called = call.tool
        stop = StopFlag()
        if called.context_parameter is not None:
            keywords[called.context_parameter] = ToolContext(
                self._context, call.id, stop, self._programs if called.is_async else None
            )

        def abandon() -> None:
            call.how = "abandoned"
            self.tally.abandon(called.name)

        if called.is_async:
            return await called.function(**keywords)
        return await call_in_thread(
            functools.partial(called.function, **keywords),
            stop,
            limiter=self._share.workers,
            stop_timeout=self._limits.stop_timeout,
            abandon=abandon,
        )

    async def _in_process(self, call: _Call, arguments: str) -> Answer:
        def outlived() -> None:
            call.how = "abandoned"
            self.tally.abandon(called.name)

        called = call.tool
        async with self._share.workers:
            return await call_in_process(
                called,
                arguments,
                most_bytes=self._limits.run_bytes,
                kill_timeout=self._limits.stop_timeout,
                killed=functools.partial(self.tally.killed.append, called.name),
                outlived=outlived,
            )

    def _failed(self, call: _Call, error: BaseException) -> ToolResult:
        call_id, name = call.id, call.tool.name
        note_mix_up_of(self._audit, error, f"tool {name}", self._context)
        passing, fault = split(error)
        if passing is not None or fault is None:
            self.tally.stopped.append(StoppedTool(name=name, how=call.how))
            if fault is not None:
                _log.warning("tool %s failed while it was stopped", name, exc_info=fault)
            raise passing or error
        # A RunError is an answer in words, which are the user's; any other needs its traceback.
        told = any(isinstance(leaf, RunError) for leaf in leaves(fault))
        _log.log(
            logging.INFO if told else logging.WARNING,
            "tool %s failed%s",
            name,
            f" ({code_of(fault)})" if told else "",
            exc_info=None if told else fault,
            extra={**identity(self._context), "tool_call_id": call_id},
        )
        # One from another process has its words from there.
        words = str(fault) if isinstance(fault, ToolProcessError) else failure_words(fault)
        return failure(call_id, redact_text(words), code=code_of(fault))


def _means_of(called: Tool) -> StopMeans:
    if called.process:
        return "killed"
    return "cancelled" if called.is_async else "stopped"


def _is_allowed(
    policy: ToolPolicy, context: UserExecutionContext, tool: Tool, audit: SecurityAudit | None
) -> bool:
    """What is not a clear yes is a no: an exception, and an `async` policy's coroutine."""
    try:
        answer = cast("object", policy(context, tool))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  boundary: one question to the embedder's policy
        note_mix_up_of(audit, error, f"tool policy on {tool.name}", context)
        _log.exception(
            "a tool policy failed on %s, so it is denied", tool.name, extra=identity(context)
        )
        return False
    if not isinstance(answer, bool):
        _log.error(
            "a tool policy gave a %s for %s, not a bool, so it is denied",
            type(answer).__name__,
            tool.name,
            extra=identity(context),
        )
        return False
    return answer
