"""Spans: what a run does, told as blocks within blocks by names, ids, codes and counts alone.

There is one for each run, model call, tool call and sub-agent; nothing is told of an event or a
token, and of what is said no word: neither arguments nor results nor the texts of errors. Each
span is handed the one around it, so no task, thread or context variable decides whose it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, Protocol, Self

import msgspec

from creche._barrier import leaves, split
from creche._context import RequestId, RunId, ThreadId, ToolCallId, UserExecutionContext, UserId
from creche._errors import RunError

_log: Final = logging.getLogger("creche.tracing")

SpanKind = Literal["run", "model", "tool", "subagent"]
SpanStatus = Literal["success", "cancelled", "failed"]

# Told instead of a name or a code that is not creche's or its embedder's: a model makes up names
# of tools, and anything may stand in them.
OTHER: Final = "_OTHER"
_CODE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class SpanStart(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a span when it begins."""

    kind: SpanKind
    name: str  # the agent's, the model's or the tool's
    user_id: UserId
    thread_id: ThreadId
    run_id: RunId
    request_id: RequestId  # a sub-agent and what it does have one of their own
    tool_call_id: ToolCallId | None = None


class SpanEnd(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of it in the end."""

    status: SpanStatus
    code: str | None = None  # why it was cancelled, where that is known; what failed, in a word
    input_tokens: int | None = None  # as far as the model told
    output_tokens: int | None = None
    queue_ms: int | None = None  # for which a run waited for its turn, before its span


class Span(Protocol):
    """A span that has begun."""

    def end(self, ended: SpanEnd) -> None:
        """It is over. Called once for each span that has begun, whatever ended it."""
        ...


class Tracer(Protocol):
    """Who is told of spans: infrastructure, shared by all runs.

    Called in Trio's thread by the task that does the work, so it must neither block nor wait.
    The spans of a run, a tool call and a sub-agent begin and end in one task, one within the
    other; a model call's ends where the agent leaves its block, which may be elsewhere.

    Error handling: whatever it raises is logged, once for each run, and the run goes on. A span
    that could not begin is left out, and those in it are within the one around it.
    """

    def begin(self, started: SpanStart, parent: Span | None) -> Span:
        """A span begins; `parent` is the one around it, None for a run's."""
        ...


def as_code(text: str) -> str:
    """The text if it can be a code or a type's name, else `OTHER`."""
    return text if _CODE.fullmatch(text) else OTHER


def code_of(error: BaseException) -> str:
    """What to call a failure: the code of the first RunError in it, else its type's name."""
    found = [*leaves(error)]
    for leaf in found:
        if isinstance(leaf, RunError):
            return as_code(str(getattr(leaf, "code", "")))
    return as_code(type(found[0] if found else error).__name__)


class _Telling:
    """The way of one run's spans to the tracer, which may be faulty."""

    __slots__ = ("_has_failed", "_tracer", "why")

    def __init__(self, tracer: Tracer, why: Callable[[], str | None]) -> None:
        self._tracer = tracer
        self._has_failed = False
        self.why = why

    def begin(self, started: SpanStart, parent: Span | None) -> Span | None:
        try:
            return self._tracer.begin(started, parent)
        # Boundary: one call of the embedder's tracer. No run may end for not being told of.
        except BaseException as error:  # noqa: BLE001
            self._stop(error, started)
            return None

    def end(self, span: Span, started: SpanStart, ended: SpanEnd) -> None:
        try:
            span.end(ended)
        except BaseException as error:  # noqa: BLE001  boundary: as above
            self._stop(error, started)

    def _stop(self, error: BaseException, started: SpanStart) -> None:
        """Log what a barrier stops; raise what passes one."""
        passing, failure = split(error)
        if failure is not None and not self._has_failed:
            self._has_failed = True
            ids = {"user_id": started.user_id, "run_id": started.run_id}
            _log.warning("the tracer failed; a run goes on without it", exc_info=failure, extra=ids)
        if passing is not None:
            raise passing


class Spans:
    """Where one agent's spans belong: to its identity, and within the span around them.

    Made for a run or for a sub-agent, and gone with it.
    """

    __slots__ = ("_above", "_context", "_telling")

    def __init__(
        self, telling: _Telling | None, context: UserExecutionContext, above: Span | None = None
    ) -> None:
        self._telling = telling
        self._context = context
        self._above = above

    @classmethod
    def of_run(
        cls,
        tracer: Tracer | None,
        context: UserExecutionContext,
        why: Callable[[], str | None] = lambda: None,
    ) -> Spans:
        """Those that are within no other. `why` tells the reason if the run is cancelled."""
        return cls(None if tracer is None else _Telling(tracer, why), context)

    def block(
        self,
        kind: SpanKind,
        name: str,
        *,
        context: UserExecutionContext | None = None,
        tool_call_id: ToolCallId | None = None,
    ) -> SpanBlock:
        """A span, to be entered once; `context` is a sub-agent's own."""
        started: SpanStart | None = None
        if self._telling is not None:
            context = context or self._context
            started = SpanStart(
                kind=kind,
                name=name,
                user_id=context.user_id,
                thread_id=context.thread_id,
                run_id=context.run_id,
                request_id=context.request_id,
                tool_call_id=tool_call_id,
            )
        return SpanBlock(self._telling, self._above, started)


class SpanBlock:
    """One span, for as long as its block. Without a tracer it is nothing."""

    __slots__ = ("_above", "_ended", "_span", "_started", "_telling", "_tokens")

    def __init__(
        self, telling: _Telling | None, above: Span | None, started: SpanStart | None
    ) -> None:
        self._telling = telling
        self._above = above
        self._started = started
        self._span: Span | None = None
        self._ended: SpanEnd | None = None
        self._tokens: tuple[int, int] | None = None

    def inside(self, context: UserExecutionContext) -> Spans:
        """Where the spans belong that are within this one."""
        return Spans(self._telling, context, self._span or self._above)

    def ends(self, ended: SpanEnd) -> None:
        """How it will have ended; the last word counts.

        Without any it has succeeded if its block is left by nothing that was raised.
        """
        self._ended = ended

    def spent(self, model: str, input_tokens: object, output_tokens: object) -> bool:
        """Note what an answer cost. False if this is no call of that model, or it has a cost."""
        if self._started is None or self._started.name != model or self._tokens is not None:
            return False
        # Providers leave counts out, whatever the types say.
        self._tokens = (_count(input_tokens), _count(output_tokens))
        return True

    def __enter__(self) -> Self:
        if self._telling is not None and self._started is not None:
            self._span = self._telling.begin(self._started, self._above)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._telling is None or self._started is None or self._span is None:
            return
        ended = self._ended or _end_by(error, self._telling.why)
        if self._tokens is not None:
            inputs, outputs = self._tokens
            ended = msgspec.structs.replace(ended, input_tokens=inputs, output_tokens=outputs)
        self._telling.end(self._span, self._started, ended)


def _end_by(error: BaseException | None, why: Callable[[], str | None]) -> SpanEnd:
    """How a block has ended that was left so."""
    if error is None:
        return SpanEnd(status="success")
    passing, failure = split(error)
    if passing is not None or failure is None:
        return SpanEnd(status="cancelled", code=why())
    return SpanEnd(status="failed", code=code_of(failure))


def _count(tokens: object) -> int:
    return tokens if type(tokens) is int and tokens > 0 else 0
