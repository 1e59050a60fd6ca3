"""Which event may follow which, and what closes whatever is still open. No I/O.

Two rules make this file:

1. Every rule is a row of `RULES`; the code below only knows the few verbs that rows use.
2. A `Grammar` never says yes to something that a stock AG-UI client would refuse.

The theory: a run is BEFORE, RUNNING or ENDED. While it is RUNNING, brackets open and close
in it (a text message, a tool call, a step, a span of reasoning, a sub-agent), each with a key
of its own. A bracket's parts may only come while it is open and belong to the sub-agent that
opened it; a run may only finish when nothing is open and each tool call has had its result.
A failure (RUN_ERROR) may come at any time, but `closers` is always sent first, so that what is
stored is a history which the next model call accepts.

A run that waits for a person is PARKED: to a stock client that is a run that has finished, with
an interrupt, and the next RUN_STARTED is another. So nothing may be open over it but results that
are owed: `suspenders` close whatever is open, sub-agents as suspended, and `openers`, asked for
before, open it again once the run goes on.

Source: docs.ag-ui.com, "Event patterns" and "Runs and Steps"; @ag-ui/client 1.0, verifyEvents.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from creche import _events as events
from creche._context import MessageId, ToolCallId, new_id
from creche._errors import GrammarError

UNFINISHED_RESULT: Final = "The run ended before this tool call finished."


class Phase(enum.Enum):
    """Where a run stands."""

    BEFORE = "before it started"
    RUNNING = "while it runs"
    PARKED = "while it waits for an answer"
    ENDED = "after its end"


class Bracket(enum.StrEnum):
    """What can be open within a run; a StrEnum, since that hashes in C, once at each event."""

    TEXT = "text message"
    TOOL_CALL = "tool call"
    RESULT = "result of tool call"  # owed from the call's end until its result
    STEP = "step"
    REASONING = "reasoning"
    REASONING_MESSAGE = "reasoning message"
    SUBAGENT = "sub-agent"


class Verb(enum.Enum):
    """What an event does to its run or to its bracket."""

    START = enum.auto()  # the run begins, or goes on
    FINISH = enum.auto()  # the run ends well, and nothing may be open; or it is parked
    FAIL = enum.auto()  # the run ends badly
    OPEN = enum.auto()
    PART = enum.auto()
    CLOSE = enum.auto()
    FREE = enum.auto()  # allowed at any time within the run


class Rule(NamedTuple):
    """What one type of event does, to which bracket, and where it names that and its owner."""

    verb: Verb
    bracket: Bracket | None = None
    key: str = ""
    owner: str = "subagent_run_id"


RULES: Final[Mapping[type[events.Event], Rule]] = MappingProxyType(
    {
        events.RunStarted: Rule(Verb.START),
        events.RunFinished: Rule(Verb.FINISH),
        events.RunError: Rule(Verb.FAIL),
        events.StepStarted: Rule(Verb.OPEN, Bracket.STEP, "step_name"),
        events.StepFinished: Rule(Verb.CLOSE, Bracket.STEP, "step_name"),
        events.TextMessageStart: Rule(Verb.OPEN, Bracket.TEXT, "message_id"),
        events.TextMessageContent: Rule(Verb.PART, Bracket.TEXT, "message_id"),
        events.TextMessageEnd: Rule(Verb.CLOSE, Bracket.TEXT, "message_id"),
        events.ToolCallStart: Rule(Verb.OPEN, Bracket.TOOL_CALL, "tool_call_id"),
        events.ToolCallArgs: Rule(Verb.PART, Bracket.TOOL_CALL, "tool_call_id"),
        events.ToolCallEnd: Rule(Verb.CLOSE, Bracket.TOOL_CALL, "tool_call_id"),
        events.ToolCallResult: Rule(Verb.CLOSE, Bracket.RESULT, "tool_call_id"),
        events.ReasoningStart: Rule(Verb.OPEN, Bracket.REASONING, "message_id"),
        events.ReasoningMessageStart: Rule(Verb.OPEN, Bracket.REASONING_MESSAGE, "message_id"),
        events.ReasoningMessageContent: Rule(Verb.PART, Bracket.REASONING_MESSAGE, "message_id"),
        events.ReasoningMessageEnd: Rule(Verb.CLOSE, Bracket.REASONING_MESSAGE, "message_id"),
        events.ReasoningEnd: Rule(Verb.CLOSE, Bracket.REASONING, "message_id"),
        events.SubagentStarted: Rule(
            Verb.OPEN,
            Bracket.SUBAGENT,
            "subagent_run_id",
            owner="parent_subagent_run_id",
        ),
        events.SubagentFinished: Rule(Verb.CLOSE, Bracket.SUBAGENT, "subagent_run_id"),
        events.SubagentError: Rule(Verb.CLOSE, Bracket.SUBAGENT, "subagent_run_id"),
        events.StateSnapshot: Rule(Verb.FREE),
        events.StateDelta: Rule(Verb.FREE),
        events.ActivitySnapshot: Rule(Verb.FREE),
        events.Custom: Rule(Verb.FREE),
    },
)

_Place = tuple[Bracket, str, str | None]  # which, its key, and for a step its sub-agent

_RULES: Final = dict(RULES)  # creche: shared only read; a plain dict answers faster than its proxy
_NOT_OPEN: Final = object()

# Ids of these are for one use; a message may be taken up again, but only by whose it is.
# A span of reasoning and the message in it may share an id, which is then one owner's.
_SAME_IDS: Final = MappingProxyType({Bracket.REASONING_MESSAGE: Bracket.REASONING})
_SINGLE_USE: Final = frozenset({Bracket.TOOL_CALL, Bracket.SUBAGENT})
_CALLS: Final = frozenset({Bracket.TOOL_CALL, Bracket.RESULT})


class Grammar:
    """What one run has said so far: enough to judge its next event. Not shared between runs."""

    __slots__ = ("_open", "_openers", "_phase", "_segment", "_suspended", "_used")

    def __init__(self) -> None:
        self._phase = Phase.BEFORE
        self._open: dict[_Place, str | None] = {}  # {place: its sub-agent}, in order of opening
        self._used: dict[_Place, str | None] = {}  # the same of all that were ever open
        self._openers: dict[_Place, events.Event] = {}  # what opened those of `_open`
        self._segment = 0  # how often it began or went on
        # {sub-agent: (the segment in which it was suspended, what started it)}
        self._suspended: dict[str, tuple[int, events.Event]] = {}

    @property
    def phase(self) -> Phase:
        return self._phase

    def accept(self, event: events.Event) -> None:
        """Take `event` as said. Where it may not follow, raise GrammarError and change nothing."""
        verb, bracket, key_field, owner_field = _RULES[type(event)]
        if bracket is None:
            self._accept_of_run(event, verb)
            return
        if self._phase is not Phase.RUNNING:
            raise GrammarError(_refusal(event, f"does not come {self._phase.value}"))
        owner = getattr(event, owner_field, None)
        # A step is known by its name only, and a sub-agent may have one of the same name.
        place = (bracket, getattr(event, key_field), owner if bracket is Bracket.STEP else None)
        if verb is Verb.PART and self._open.get(place, _NOT_OPEN) == owner:
            return
        if verb is Verb.OPEN:
            self._open_bracket(event, place, owner)
            return
        if place not in self._open:
            raise GrammarError(_refusal(event, f"no {bracket.value} {place[1]!r} is open"))
        if bracket is not Bracket.SUBAGENT and self._open[place] != owner:
            raise GrammarError(
                _refusal(event, f"{bracket.value} {place[1]!r} belongs to another sub-agent"),
            )
        if verb is Verb.CLOSE:
            self._close_bracket(event, place)

    def is_open(self, bracket: Bracket, key: str, owner: str | None = None) -> bool:
        """Whether that is open; `owner` is the sub-agent of a step, whose name is its only id."""
        return (bracket, key, owner if bracket is Bracket.STEP else None) in self._open

    def closers(self, subagent: str | None = None) -> list[events.Event]:
        """The events that close whatever is open, innermost first; `accept` takes each in turn.

        Every tool call without a result gets one that says so. With `subagent`, they close what
        is open within that sub-agent, but not itself.
        """
        within = self.subagents_below(subagent) if subagent is not None else None
        closing: list[events.Event] = []
        for (bracket, key, _), owner in reversed(self._open.items()):
            if within is None or owner in within:
                closing.extend(_closers_of(bracket, key, owner))
        return closing

    def openers(self) -> list[events.Event]:
        """What opened whatever is open now and can be opened again, outermost first.

        A tool call cannot: its result may come after the interrupt, its arguments may not.
        """
        return [self._openers[place] for place in self._open if place[0] not in _CALLS]

    def suspenders(self, interrupt_ids: tuple[str, ...]) -> list[events.Event]:
        """The events that close whatever is open for the time of an interrupt, innermost first."""
        closing: list[events.Event] = []
        for (bracket, key, _), owner in reversed(self._open.items()):
            if bracket is Bracket.SUBAGENT:
                outcome = events.Suspended(interrupt_ids)
                closing.append(events.SubagentFinished(subagent_run_id=key, outcome=outcome))
            elif bracket is not Bracket.RESULT:
                closing.append(_closers_of(bracket, key, owner)[0])
        return closing

    def suspended(self) -> list[events.Event]:
        """What started the sub-agents that are suspended and not started again, outermost first."""
        return [event for _, event in reversed(self._suspended.values())]

    def subagents_below(self, subagent: str) -> set[str | None]:
        """That sub-agent and those below it that are open; who is below was opened later."""
        within: set[str | None] = {subagent}
        for (bracket, key, _), owner in self._open.items():
            if bracket is Bracket.SUBAGENT and owner in within:
                within.add(key)
        return within

    def _accept_of_run(self, event: events.Event, verb: Verb) -> None:
        if verb is Verb.START:
            if self._phase not in {Phase.BEFORE, Phase.PARKED}:
                raise GrammarError(_refusal(event, f"does not come {self._phase.value}"))
            self._phase = Phase.RUNNING
            self._segment += 1
            return
        if self._phase is not Phase.RUNNING and not (
            self._phase is Phase.BEFORE and verb is Verb.FAIL
        ):
            raise GrammarError(_refusal(event, f"does not come {self._phase.value}"))
        if verb is Verb.FREE:
            return
        parks = isinstance(event, events.RunFinished) and not events.ends_run(event)
        still_open = [place for place in self._open if not (parks and place[0] is Bracket.RESULT)]
        if verb is Verb.FINISH and still_open:
            still = ", ".join(f"{bracket.value} {key!r}" for bracket, key, _ in still_open)
            raise GrammarError(_refusal(event, f"{still} is still open"))
        self._phase = Phase.PARKED if parks else Phase.ENDED

    def _open_bracket(
        self,
        event: events.Event,
        place: _Place,
        owner: str | None,
    ) -> None:
        bracket, key, _ = place
        suspended_in, _ = self._suspended.get(key, (self._segment, None))
        goes_on = bracket is Bracket.SUBAGENT and suspended_in < self._segment
        spent = bracket in _SINGLE_USE and place in self._used and not goes_on
        if place in self._open or spent:
            raise GrammarError(_refusal(event, f"{bracket.value} {key!r} was opened before"))
        if owner is not None and (Bracket.SUBAGENT, owner, None) not in self._open:
            raise GrammarError(_refusal(event, f"no sub-agent {owner!r} is open"))
        known = (_SAME_IDS.get(bracket, bracket), key, place[2])
        if self._used.get(known, owner) != owner:
            raise GrammarError(_refusal(event, f"{bracket.value} {key!r} is another's"))
        if isinstance(event, events.ToolCallStart) and event.parent_message_id is not None:
            parent = (Bracket.TEXT, event.parent_message_id, None)
            if self._used.get(parent, owner) != owner:
                raise GrammarError(_refusal(event, f"message {parent[1]!r} is another's"))
        self._used[known] = owner
        self._open[place] = owner
        self._openers[place] = event
        if goes_on:
            del self._suspended[key]
            # What it still owes from before belongs within it, so that it is closed before it.
            for inner in [inner for inner, of in self._open.items() if of == key]:
                self._open[inner] = self._open.pop(inner)

    def _close_bracket(self, event: events.Event, place: _Place) -> None:
        bracket, key, _ = place
        if bracket is Bracket.SUBAGENT:
            suspends = isinstance(event, events.SubagentFinished) and event.outcome is not None
            inner = [
                inner
                for inner, owner in self._open.items()
                if owner == key and not (suspends and inner[0] is Bracket.RESULT)
            ]
            if inner:
                still = ", ".join(f"{bracket.value} {name!r}" for bracket, name, _ in inner)
                raise GrammarError(_refusal(event, f"{still} of it is still open"))
            if suspends:
                self._suspended[key] = (self._segment, self._openers[place])
        if isinstance(event, events.ToolCallResult):
            message = (Bracket.TEXT, event.message_id, None)  # that it becomes
            if self._used.get(message, self._open[place]) != self._open[place]:
                raise GrammarError(_refusal(event, f"message {message[1]!r} is another's"))
            self._used[message] = self._open[place]
        owner = self._open.pop(place)
        self._openers.pop(place, None)
        if bracket is Bracket.TOOL_CALL:
            self._open[Bracket.RESULT, key, None] = owner


def _closers_of(bracket: Bracket, key: str, owner: str | None) -> list[events.Event]:
    message_id, call_id = MessageId(key), ToolCallId(key)
    result = events.ToolCallResult(
        message_id=MessageId(new_id()),
        tool_call_id=call_id,
        content=UNFINISHED_RESULT,
        role="tool",
        subagent_run_id=owner,
    )
    closers: dict[Bracket, list[events.Event]] = {
        Bracket.TEXT: [events.TextMessageEnd(message_id=message_id, subagent_run_id=owner)],
        Bracket.TOOL_CALL: [
            events.ToolCallEnd(tool_call_id=call_id, subagent_run_id=owner),
            result,
        ],
        Bracket.RESULT: [result],
        Bracket.STEP: [events.StepFinished(step_name=key, subagent_run_id=owner)],
        Bracket.REASONING: [events.ReasoningEnd(message_id=message_id, subagent_run_id=owner)],
        Bracket.REASONING_MESSAGE: [
            events.ReasoningMessageEnd(message_id=message_id, subagent_run_id=owner),
        ],
        Bracket.SUBAGENT: [
            events.SubagentError(
                subagent_run_id=key,
                message="The run ended before this sub-agent finished.",
                code="unfinished",
            ),
        ],
    }
    return closers[bracket]


def _refusal(event: events.Event, why: str) -> str:
    return f"{type(event).__name__} is out of order: {why}"
