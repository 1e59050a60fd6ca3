"""What was said on a thread, in replies of bounded size: the latest runs that fit, and from where.

A run is given whole or not at all, so that no tool's result is without its call. What comes
before is asked for by the id of the oldest run that was given. Of a run that is too large for a
reply, the long texts are cut, and say so; its events have them whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from creche import (
    AssistantMessage,
    FunctionCall,
    Message,
    RunId,
    RunRecord,
    Store,
    StoredMessage,
    ThreadId,
    ToolMessage,
    UserId,
    interrupt_of,
)
from creche_server.wire.commands import DEFAULT_RUNS, MOST_RUNS

# Of messages in a reply. Many WebSocket clients (trio-websocket,
# websockets, ...) close when a message is longer than 1 MiB, unless they are told otherwise.
MOST_BYTES: Final = 512 * 1024
_FIRST_LOOK: Final = 4  # runs; most replies need no second one
_GROWTH: Final = 4
_SHORTEST: Final = 128  # characters that are left of a text that is cut

_encoder: Final = msgspec.json.Encoder()


class UnknownRunError(ValueError):
    """There is no such run among those that were asked about."""

    def __init__(self, message: str = "`before` names no run of this thread") -> None:
        super().__init__(message)


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """One run's messages, encoded once however often they are sent."""

    run_id: RunId
    messages: tuple[msgspec.Raw, ...]
    shortened: bool = False

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(len(bytes(message)) for message in self.messages)


@dataclasses.dataclass(frozen=True, slots=True)
class Recalled:
    """The latest runs that fit, the oldest of them first."""

    runs: tuple[Said, ...] = ()
    earlier: RunId | None = None  # set if runs precede these: ask for what is `before` it

    def to_dict(self) -> dict[str, Any]:
        """As it is sent; `earlier` and `shortened` are left out where nothing is."""
        messages = [message for said in self.runs for message in said.messages]
        answer: dict[str, Any] = {"values": {"messages": messages}}
        shortened = [said.run_id for said in self.runs if said.shortened]
        return (
            answer
            | ({"earlier": self.earlier} if self.earlier is not None else {})
            | ({"shortened": shortened} if shortened else {})
        )


async def recall(
    store: Store,
    user_id: UserId,
    thread_id: ThreadId,
    *,
    limit: int = DEFAULT_RUNS,
    before: RunId | None = None,
) -> Recalled:
    """The messages of at most `limit` runs, the latest ones, or those that precede `before`.

    Raises UnknownRunError, and what the store raises.
    """
    if before is None:
        return await _latest(store, user_id, thread_id, limit=limit)
    preceding, newer = _split(await store.runs(user_id, thread_id), before)
    return await _latest(store, user_id, thread_id, limit=limit, newer=newer, among=preceding)


async def open_interrupts(store: Store, user_id: UserId, thread_id: ThreadId) -> dict[str, Any]:
    """What waits for an answer, in AG-UI's words, whether or not its run still lives.

    For a reply: `interrupts`, left out when nothing waits.
    """
    moment = datetime.now(UTC)
    asked = await store.open_questions(user_id, thread_id)
    waiting = [interrupt_of(each) for each in asked if each.expires_at > moment]
    return {"interrupts": waiting} if waiting else {}


async def history(
    store: Store,
    user_id: UserId,
    thread_id: ThreadId,
    *,
    limit: int = DEFAULT_RUNS,
    before: RunId | None = None,
) -> tuple[list[dict[str, Any]], RunId | None]:
    """The thread as it was after each of its runs, the latest first; and where more precede.

    Each state holds what the one before it held, so together they are bounded as one reply is.
    Raises UnknownRunError, and what the store raises.
    """
    preceding, newer = _split(await store.runs(user_id, thread_id), before)
    recalled = await _latest(
        store, user_id, thread_id, limit=MOST_RUNS, newer=newer, among=preceding
    )
    return _states(preceding, recalled, limit)


def _states(
    runs: Sequence[RunRecord],
    recalled: Recalled,
    limit: int,
) -> tuple[list[dict[str, Any]], RunId | None]:
    """A state for each of the latest of these runs, while they fit; the last one's id if cut."""
    said = list(recalled.runs)
    states: list[dict[str, Any]] = []
    left = MOST_BYTES
    for position in range(len(runs) - 1, -1, -1):
        run = runs[position]
        left -= sum(one.size for one in said)
        if states and (len(states) == limit or left < 0 or not said):
            return states, runs[position + 1].run_id
        states.append(_state(run, Recalled(tuple(said), recalled.earlier)))
        if said and said[-1].run_id == run.run_id:
            said.pop()
    return states, None


def _state(run: RunRecord, recalled: Recalled) -> dict[str, Any]:
    return {
        **recalled.to_dict(),
        "metadata": {
            "run_id": run.run_id,
            "assistant_id": run.agent,
            "status": run.status,
            "reason": run.reason,
            "first_seq": run.first_seq,
            "last_seq": run.last_seq,
            "receipt": run.receipt,
        },
        "created_at": run.created_at.isoformat(),
        "ended_at": run.ended_at.isoformat() if run.ended_at else None,
    }


def _split(runs: Sequence[RunRecord], before: RunId | None) -> tuple[list[RunRecord], int]:
    """The runs that precede one, or all, and how many do not; those rolled back are passed over."""
    position = len(runs) if before is None else _position(runs, before)
    preceding, rest = (
        [run for run in part if not run.rolled_back] for part in (runs[:position], runs[position:])
    )
    return preceding, len(rest)


def _position(runs: Sequence[RunRecord], run_id: RunId) -> int:
    for position, run in enumerate(runs):
        if run.run_id == run_id:
            return position
    raise UnknownRunError


async def _latest(
    store: Store,
    user_id: UserId,
    thread_id: ThreadId,
    *,
    limit: int,
    newer: int = 0,
    among: Sequence[RunRecord] | None = None,
) -> Recalled:
    """The latest runs that fit; `newer` runs, which are none of those `among`, are passed over.

    Looks at a few runs first and then at more, so that what is read of a long thread is bounded
    by what is sent of it.
    """
    wanted = min(limit, _FIRST_LOOK)
    allowed = None if among is None else {run.run_id for run in among}
    while True:
        looked_at = newer + wanted + 1  # one more, to know whether there is one
        stored = await store.messages(user_id, thread_id, last_runs=looked_at)
        found = [said for said in _by_run(stored) if allowed is None or said.run_id in allowed]
        fitting = _fitting(found, wanted)
        if len(fitting) < wanted or wanted == limit or len(found) <= wanted:
            more = len(fitting) < len(found)
            return Recalled(tuple(fitting), fitting[0].run_id if more and fitting else None)
        wanted = min(limit, wanted * _GROWTH)


def _by_run(stored: Sequence[StoredMessage]) -> list[Said]:
    return [
        _of_run(run_id, [item.message for item in items])
        for run_id, items in itertools.groupby(stored, lambda item: item.run_id)
    ]


def _of_run(run_id: RunId, messages: Sequence[Message]) -> Said:
    """What a run said; if that is too much for a reply, with texts as long as there is room for."""
    said = Said(run_id, tuple(map(_encoded, messages)))
    longest = MOST_BYTES // 2
    while said.size > MOST_BYTES and longest >= _SHORTEST:
        cut = (_encoded(_shortened(message, longest)) for message in messages)
        said = Said(run_id, tuple(cut), shortened=True)
        longest //= 2
    return said if said.size <= MOST_BYTES else _latest_of(said, messages)


def _latest_of(said: Said, messages: Sequence[Message]) -> Said:
    """The latest of a run's thousands of messages; not from a result on, whose call would lack."""
    left, begin = MOST_BYTES, len(messages)
    while left > 0 and begin > 0:
        begin -= 1
        left -= len(bytes(said.messages[begin]))
    begin += left < 0
    while begin < len(messages) and isinstance(messages[begin], ToolMessage):
        begin += 1
    return Said(said.run_id, said.messages[begin:], shortened=True)


def _encoded(message: Message) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(message))


def _shortened(message: Message, longest: int) -> Message:
    """The message with no text in it longer than that, in characters."""
    texts = {
        name: _cut(text, longest)
        for name in ("content", "error")
        if (text := getattr(message, name, None)) is not None
    }
    if isinstance(message, AssistantMessage):
        calls = (
            msgspec.structs.replace(call, function=_shorter_call(call.function, longest))
            for call in message.tool_calls
        )
        return msgspec.structs.replace(message, **texts, tool_calls=tuple(calls))
    return msgspec.structs.replace(message, **texts)


def _shorter_call(call: FunctionCall, longest: int) -> FunctionCall:
    if len(call.arguments) <= longest:
        return call
    # Arguments are JSON, so they are not cut in the middle.
    told = {"[cut]": f"{len(call.arguments):,} characters"}
    return FunctionCall(call.name, _encoder.encode(told).decode())


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest]}\n[cut: the first {longest:,} of {len(text):,} characters]"


def _fitting(found: Sequence[Said], most_runs: int) -> list[Said]:
    """The latest of them that fit into a reply; the very latest always does."""
    left = MOST_BYTES
    fitting: list[Said] = []
    for said in reversed(found[-most_runs:]):
        left -= said.size
        if fitting and left < 0:
            break
        fitting.append(said)
    return fitting[::-1]
