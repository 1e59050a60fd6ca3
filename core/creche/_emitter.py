"""The only way for a run to say anything: grammar, redaction, journal, in that order.

An emitter is bound to one context and cannot be pointed elsewhere. `emit` is awaited, so that
a flood of events yields to others, stays cancellable and feels the store's back-pressure.
"""

# ruff: noqa: SLF001  an emitter and those of its sub-agents are one idea

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import msgspec
import trio

from creche import _events as events
from creche._auditing import note_refusal
from creche._budget import DaySpending
from creche._context import MessageId, RunId, ToolCallId, UserExecutionContext, new_id
from creche._errors import (
    EmitterClosedError,
    GrammarError,
    LimitExceededError,
    MixUp,
)
from creche._event_redaction import REDACTIONS, redact_data
from creche._grammar import Bracket, Grammar, Phase
from creche._journal import Entry, Journal
from creche._limits import Limits
from creche._messages import Message
from creche._store import QuestionRecord, RunRecord, StoredMessage
from creche._streamed_redaction import Scan
from creche._transcript import Transcript

_EVENTS_PER_YIELD: Final = 32  # a checkpoint costs as much as two or three events
_FEWEST_PER_YIELD: Final = 8  # however many flood: below that, giving way is what costs
_ROUND: Final = 0.001  # seconds that others should wait for their turn
_OF_THE_RUN: Final = (events.RunStarted, *events.TERMINAL)
_BYTES_PER_YIELD: Final = 64 * 1024
_MOST_KEPT: Final = 10_000  # steps that may begin while a run is parked
_log: Final = logging.getLogger("creche.emitter")

# Names of CUSTOM events: of a run that had to wait; of one that undid others.
QUEUED: Final = "creche.queued"
ROLLED_BACK: Final = "creche.rolled_back"


def timestamp() -> int:
    """This moment, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


class Pause:
    """Whether a run is parked, so that nothing may be said; shared by a run's emitters."""

    def __init__(self) -> None:
        self.lasts = False
        self.suspended: list[events.Event] = []  # what opened whatever will be opened again
        self.steps: set[tuple[str, str | None]] = set()  # that are open but for the pause
        self._kept: list[Callable[[], object]] = []  # what is to be said after it, in order
        self._waiting = trio.lowlevel.ParkingLot()

    def begin(self, suspended: list[events.Event]) -> None:
        self.lasts = True
        self.suspended = suspended
        self.steps = {
            (event.step_name, event.subagent_run_id)
            for event in suspended
            if isinstance(event, events.StepStarted)
        }

    def end(self) -> None:
        """Say what was kept, and wake those that wait to speak."""
        self.lasts = False
        kept, self._kept, self.suspended = self._kept, [], []
        self.steps.clear()
        for say in kept:
            try:
                say()
            except GrammarError:  # who said it has gone on, and cannot be told any more
                _log.warning("what a run said while it was parked may not follow", exc_info=True)
        self._waiting.unpark_all()

    def check_room(self) -> None:
        """Raise LimitExceededError if too much is kept already."""
        if len(self._kept) >= _MOST_KEPT:
            msg = f"a parked run may have at most {_MOST_KEPT:,} things to say"
            raise LimitExceededError(msg)

    def keep(self, say: Callable[[], object]) -> None:
        self._kept.append(say)

    def after(self, say: Callable[[], object]) -> None:
        """Say it now, or once the pause is over."""
        if self.lasts:
            self.keep(say)
        else:
            say()

    async def over(self) -> None:
        """Wait until the run may speak."""
        while self.lasts:
            await self._waiting.park()


def next_part(part: int, others: float) -> int:
    """How many events until a run gives way again, where after `part` the others took so long.

    One that floods alone says many at once. The more that do, the sooner each gives way, so that
    whoever has but a few steps to take, such as a run that is cancelled, takes them soon.
    """
    if others <= 0:
        return _EVENTS_PER_YIELD
    fair = int(part * _ROUND / others)
    return min(max(fair, _FEWEST_PER_YIELD), _EVENTS_PER_YIELD)


class EventEmitter:
    """Speaks for one run, on its own thread's journal, until the run's terminal event."""

    def __init__(self, context: UserExecutionContext, journal: Journal, limits: Limits) -> None:
        if (journal.user_id, journal.thread_id) != (context.user_id, context.thread_id):
            msg = "an emitter speaks on the journal of its own context's thread only"
            raise journal.injection(msg, "make an emitter", context)
        self._context = context
        self._journal = journal
        self._limits = limits
        self._grammar = Grammar()
        self._transcript = Transcript()
        self._scans: dict[ToolCallId, Scan] = {}  # of the arguments said so far
        self._subagent: str | None = None  # whom it speaks for, if not for the run's own agent
        self._text: MessageId | None = None  # the message that `text` is writing
        self._pause = Pause()
        self._said_bytes = 0
        self._part = self._until_yield = _EVENTS_PER_YIELD
        self._yield_at = _BYTES_PER_YIELD

    @property
    def subagent_run_id(self) -> str | None:
        """The sub-agent that it speaks for; None for the run's own agent."""
        return self._subagent

    async def free(self) -> None:
        """Wait until the run may speak: it may not while it is parked."""
        await self._pause.over()

    async def emit(self, event: events.Event) -> None:
        """Say one event. It is visible at once, unless it is a barrier.

        Raises GrammarError if it may not follow what was said or is not an agent's to say,
        TypeError or ValueError if it has no JSON, EmitterClosedError after the run's end,
        LimitExceededError once the run has said more than `Limits.run_bytes`.
        """
        if _is_the_engines(event) and self._grammar.phase is not Phase.ENDED:
            msg = f"{type(event).__name__} is the engine's to say, not an agent's"
            raise GrammarError(msg)
        if event.metadata is not None:
            event = msgspec.structs.replace(event, metadata=redact_data(event.metadata))
        if self._pause.lasts:
            if isinstance(event, events.ToolCallResult):  # nothing may take it away any more
                self._pause.keep(functools.partial(self._say, event, barrier=True))
                await self._pause.over()
                return
            await self._pause.over()
        if self._say_within_limits(event):
            await self._give_way()

    async def text(self, delta: str) -> None:
        """Add words to the answer, beginning a message if none is open."""
        if self._text is None:
            await self.begin_text()
        assert self._text is not None
        if self._pause.lasts:
            await self._pause.over()
        # As `emit` does it, without one more coroutine: nearly all events come this way.
        if self._say_within_limits(
            events.TextMessageContent(message_id=self._text, delta=delta),
        ):
            await self._give_way()

    async def begin_text(self) -> MessageId:
        """Begin a new assistant message, ending the one that was open."""
        await self.end_text()
        message_id = MessageId(new_id())
        await self.emit(
            events.TextMessageStart(
                message_id=message_id,
                role="assistant",
                timestamp=timestamp(),
            ),
        )
        self._text = message_id
        return message_id

    async def end_text(self) -> None:
        """End the open message, if there is one."""
        if self._text is not None:
            message_id, self._text = self._text, None
            await self.emit(events.TextMessageEnd(message_id=message_id))

    async def call(
        self,
        call_id: ToolCallId,
        name: str,
        arguments: str,
        parent: MessageId | None = None,
    ) -> None:
        """Say a whole tool call, but for its result: nothing comes in between."""
        if self._pause.lasts:
            await self._pause.over()
        start = events.ToolCallStart(
            tool_call_id=call_id,
            tool_call_name=name,
            parent_message_id=parent,
            timestamp=timestamp(),
        )
        said = (
            start,
            events.ToolCallArgs(tool_call_id=call_id, delta=arguments),
            events.ToolCallEnd(tool_call_id=call_id),
        )
        due = False
        for event in said:
            due |= self._say_within_limits(event)
        if due:
            await self._give_way()

    async def custom(self, name: str, value: Any) -> None:
        """Say something that has no event of its own."""
        await self.emit(events.Custom(name=name, value=value, timestamp=timestamp()))

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[str]:
        """A block that is told as a step; yields its name, which is made unique among open ones.

        Raises LimitExceededError as `emit` does. Its end is said whatever ends the block.
        """
        unique = next(
            each
            for each in itertools.chain([name], (f"{name} ({n})" for n in itertools.count(2)))
            if not self._grammar.is_open(Bracket.STEP, each, self._subagent)
            and (each, self._subagent) not in self._pause.steps
        )
        start = events.StepStarted(step_name=unique, timestamp=timestamp())
        if self._pause.lasts:
            self._pause.check_room()
            self._pause.steps.add((unique, self._subagent))
            self._pause.keep(functools.partial(self._say, start, barrier=False))
        else:
            self._say_within_limits(start)
        try:
            yield unique
        finally:
            self._pause.after(functools.partial(self._end_step, unique))

    def _end_step(self, name: str) -> None:
        if self._grammar.is_open(Bracket.STEP, name, self._subagent):
            self._say(events.StepFinished(step_name=name, timestamp=timestamp()), barrier=False)

    def check_speaks_for(self, context: UserExecutionContext, operation: str) -> None:
        """Raise IsolationError, which is audited, unless its run is the one of that context."""
        own = self._context
        kind: MixUp
        if context.user_id != own.user_id:
            kind = "user_mismatch"
        elif context.thread_id != own.thread_id:
            kind = "thread_mismatch"
        elif context.run_id != own.run_id:
            kind = "run_mismatch"
        else:
            return
        msg = "what belongs to a run is made for its own context only"
        raise self._journal.mix_up(msg, kind, operation, context)

    # --- the engine's part: sub-agents, the beginning and the end of the run

    def subagent(self, context: UserExecutionContext, name: str, about: str) -> SubagentEmitter:
        """Say SUBAGENT_STARTED; returns what that sub-agent speaks with, until its `end`.

        It is known by the id of its own request.
        """
        emitter = SubagentEmitter(self, context)
        self._say_within_limits(
            events.SubagentStarted(
                subagent_run_id=context.request_id,
                name=name,
                description=about or None,
                timestamp=timestamp(),
            ),
        )
        return emitter

    def _say_within_limits(self, event: events.Event) -> bool:
        """Say one of the agent's events; whether it is time to give way to others."""
        barrier = type(event) is events.ToolCallResult
        self._say(event, barrier=barrier, most=self._limits.run_bytes)
        self._until_yield -= 1
        return self._until_yield <= 0 or self._said_bytes >= self._yield_at

    async def _give_way(self) -> None:
        self._yield_at = self._said_bytes + _BYTES_PER_YIELD
        before = trio.current_time()
        await trio.lowlevel.checkpoint()
        self._part = self._until_yield = next_part(self._part, trio.current_time() - before)
        await self._journal.relieved(self._limits.uncommitted_bytes)

    def _say(
        self,
        event: events.Event,
        *,
        barrier: bool,
        most: float = math.inf,
        runs: tuple[RunRecord, ...] = (),
        messages: tuple[StoredMessage, ...] = (),
        spent: tuple[DaySpending, ...] = (),
        questions: tuple[QuestionRecord, ...] = (),
    ) -> Entry:
        scan = None
        redact = REDACTIONS.get(type(event))
        if redact is not None:
            event, scan = redact(event, self._scans)
        # First what can fail: an event that is not said must leave nothing behind.
        encoded = events.encode_unnumbered(event)
        if self._said_bytes + len(encoded) > most:
            msg = f"a run may say at most {most:,.0f} bytes"
            note_refusal(
                self._journal.audit,
                "limit_hit",
                self._context,
                resource="bytes of a run",
                operation="speak",
                outcome=msg,
            )
            raise LimitExceededError(msg)
        if runs:
            self._journal.check_owned(runs, self._context)
        try:
            self._grammar.accept(event)
        except GrammarError:
            if self._grammar.phase is Phase.ENDED:
                msg = "the run has ended, so it says nothing more"
                raise EmitterClosedError(msg) from None
            raise
        if scan is not None:
            self._scans.update(scan)
        self._transcript.add(event)
        entry = self._journal.append_encoded(
            encoded,
            speaker=self._context,
            barrier=barrier,
            runs=runs,
            messages=messages,
            spent=spent,
            questions=questions,
        )
        self._said_bytes += len(entry.data)
        return entry


class EngineVoice:
    """The engine's part of an emitter: the beginning and the end of a run.

    Kept apart from the emitter that an agent is handed: how a run ended is not for it to say.
    """

    def __init__(self, emitter: EventEmitter) -> None:
        self._emitter = emitter

    def queued(self, waited_ms: int, position: int) -> None:
        """Say how long the run waited for its turn, and its place then; directly after `begin`."""
        self._custom(QUEUED, {"waited_ms": waited_ms, "position": position})

    def rolled_back(self, run_ids: Iterable[RunId]) -> None:
        """Say whose messages are no part of the thread any more; before the agent says anything."""
        self._custom(ROLLED_BACK, {"run_ids": list(run_ids)})

    def _custom(self, name: str, value: dict[str, Any]) -> None:
        event = events.Custom(name=name, value=value, timestamp=timestamp())
        self._emitter._say(event, barrier=False)

    def begin(self, message: tuple[Message, ...], record: RunRecord) -> Entry:
        """Say RUN_STARTED, a barrier committed together with the run's record."""
        context = self._emitter._context
        event = events.RunStarted(
            thread_id=context.thread_id,
            run_id=context.run_id,
            timestamp=timestamp(),
            input=events.RunInput(
                thread_id=context.thread_id,
                run_id=context.run_id,
                messages=message,
            ),
        )
        return self._emitter._say(event, barrier=True, runs=(record,))

    def close_open(self) -> None:
        """Close whatever the run left open, so that its history is valid."""
        for closer in self._emitter._grammar.closers():
            self._emitter._say(closer, barrier=type(closer) is events.ToolCallResult)

    def end(
        self,
        terminal: events.Event,
        record: RunRecord,
        spent: tuple[DaySpending, ...] = (),
    ) -> Entry:
        """Say the terminal event, a barrier committed with the run's record and its messages.

        And with what it spent, by day.
        """
        stored = tuple(
            StoredMessage(
                run_id=self._emitter._context.run_id,
                message=message,
                created_at=record.ended_at or record.created_at,
            )
            for message in self._emitter._transcript.messages()
        )
        return self._emitter._say(
            terminal, barrier=True, runs=(record,), messages=stored, spent=spent
        )

    def park(
        self,
        interrupt: events.Interrupt,
        run_id: RunId,
        record: RunRecord,
        question: QuestionRecord,
    ) -> Entry:
        """Say that the run waits for an answer; until `go_on` nothing more is said.

        A barrier, committed together with the run's record and the question. Raises
        LimitExceededError, with nothing said, where a run may not say that much.
        """
        emitter = self._emitter
        event = events.RunFinished(
            thread_id=emitter._context.thread_id,
            run_id=run_id,
            outcome=events.Interrupted(interrupts=(interrupt,)),
            timestamp=timestamp(),
        )
        if emitter._said_bytes + len(events.encode_unnumbered(event)) > emitter._limits.run_bytes:
            msg = f"a run may say at most {emitter._limits.run_bytes:,} bytes"
            raise LimitExceededError(msg)
        suspended = emitter._grammar.openers()
        for closer in emitter._grammar.suspenders((interrupt.id,)):
            emitter._say(closer, barrier=False)
        entry = emitter._say(event, barrier=True, runs=(record,), questions=(question,))
        emitter._pause.begin(suspended)
        return entry

    def go_on(
        self,
        run_id: RunId,
        resumption: events.Resumption | None,
        record: RunRecord,
        questions: tuple[QuestionRecord, ...],
    ) -> Entry:
        """Say that the run goes on, as `run_id`; then whatever was open is open again."""
        emitter = self._emitter
        context = emitter._context
        given = events.RunInput(
            thread_id=context.thread_id,
            run_id=run_id,
            messages=(),
            resume=() if resumption is None else (resumption,),
        )
        event = events.RunStarted(
            thread_id=context.thread_id,
            run_id=run_id,
            parent_run_id=context.run_id,
            timestamp=timestamp(),
            input=None if resumption is None else given,
        )
        entry = emitter._say(event, barrier=True, runs=(record,), questions=questions)
        for opener in emitter._pause.suspended:
            again = msgspec.structs.replace(opener, timestamp=timestamp())
            emitter._say(again, barrier=False)
        emitter._pause.end()
        return entry


class SubagentEmitter(EventEmitter):
    """Speaks for one sub-agent, through its parent: the same grammar, journal and limits.

    Each event carries the sub-agent's id, whether it was given one or not, and none may carry
    another's.
    """

    def __init__(self, parent: EventEmitter, context: UserExecutionContext) -> None:
        if context.run_id != parent._context.run_id:
            msg = "a sub-agent speaks in the run of its parent only"
            raise parent._journal.injection(msg, "make a sub-agent's emitter", context)
        super().__init__(context, parent._journal, parent._limits)
        self._parent = parent
        self._grammar = parent._grammar
        self._pause = parent._pause
        self._subagent = self._id = context.request_id
        self._words: dict[MessageId, list[str]] = {}  # what it said, by message
        self._ended = False

    @property
    def last_words(self) -> str:
        """The latest message of the sub-agent that is not empty."""
        said = ("".join(words) for words in reversed(self._words.values()))
        return next((words for words in said if words), "")

    def finish(self, outcome: events.SubagentFinished | events.SubagentError) -> None:
        """Close whatever the sub-agent left open, and say how it ended. It then says no more."""
        self._ended = True
        self._pause.after(functools.partial(self._say_end, outcome))

    def _say_end(self, outcome: events.SubagentFinished | events.SubagentError) -> None:
        if not self._grammar.is_open(Bracket.SUBAGENT, self._id):
            return  # its parent's agent said that it has ended
        closers = self._grammar.closers(self._id)
        for event in [*closers, outcome]:
            self._parent._say(event, barrier=type(event) is events.ToolCallResult)

    def _say_within_limits(self, event: events.Event) -> bool:
        if self._ended:
            msg = "the sub-agent has ended, so it says nothing more"
            raise EmitterClosedError(msg)
        event = self._attributed(event)
        due = self._parent._say_within_limits(event)
        own = getattr(event, "subagent_run_id", None) == self._id  # or of one below
        if own and isinstance(event, events.TextMessageContent):
            self._words.setdefault(event.message_id, []).append(event.delta)
        return due

    async def _give_way(self) -> None:
        await self._parent._give_way()

    def _say(
        self,
        event: events.Event,
        *,
        barrier: bool,
        most: float = math.inf,
        runs: tuple[RunRecord, ...] = (),
        messages: tuple[StoredMessage, ...] = (),
        spent: tuple[DaySpending, ...] = (),
        questions: tuple[QuestionRecord, ...] = (),
    ) -> Entry:
        event = self._attributed(event)
        return self._parent._say(
            event,
            barrier=barrier,
            most=most,
            runs=runs,
            messages=messages,
            spent=spent,
            questions=questions,
        )

    def _attributed(self, event: events.Event) -> events.Event:
        """The event as this sub-agent's, or as one below it. Raises GrammarError for another's."""
        is_start = isinstance(event, events.SubagentStarted)
        field = "parent_subagent_run_id" if is_start else "subagent_run_id"
        speaker = getattr(event, field, None)
        if speaker is None and not isinstance(event, _OF_THE_RUN):
            return msgspec.structs.replace(event, **{field: self._id})
        below = self._grammar.subagents_below(self._id)
        ends = isinstance(event, (events.SubagentFinished, events.SubagentError))
        if speaker in below and not (ends and speaker == self._id):
            return event
        msg = f"{type(event).__name__} is not this sub-agent's to say"
        raise GrammarError(msg)


def _is_the_engines(event: events.Event) -> bool:
    """Whether it is none that an agent may say: how the run stands, and who is suspended."""
    return isinstance(event, _OF_THE_RUN) or (
        isinstance(event, events.SubagentFinished) and event.outcome is not None
    )


def new_tool_call_id() -> ToolCallId:
    """A fresh id for a call that the model gave none."""
    return ToolCallId(f"call_{new_id()[:16]}")
