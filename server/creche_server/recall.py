"""What was said on a thread, in replies of bounded size: the latest runs that fit, and from where.

A run is given whole or not at all, so that no tool's result is without its call. What comes
before is asked for by the id of the oldest run that was given.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from creche import RunId, RunRecord, Store, StoredMessage, ThreadId, UserId, interrupt_of
from creche_server.wire.commands import DEFAULT_RUNS, MOST_RUNS

# Of messages in a reply; past it, the latest run alone. Many WebSocket clients (trio-websocket,
# websockets, ...) close when a message is longer than 1 MiB, unless they are told otherwise.
MOST_BYTES: Final = 512 * 1024
_FIRST_LOOK: Final = 4  # runs; most replies need no second one
_GROWTH: Final = 4

_encoder: Final = msgspec.json.Encoder()


class UnknownRunError(ValueError):
    """`before` names no run of this thread."""

    def __init__(self) -> None:
        super().__init__("`before` names no run of this thread")


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """One run's messages, encoded once however often they are sent."""

    run_id: RunId
    messages: tuple[msgspec.Raw, ...]

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
        """As it is sent; `earlier` is left out when nothing is."""
        messages = [message for said in self.runs for message in said.messages]
        answer: dict[str, Any] = {"values": {"messages": messages}}
        return answer | ({"earlier": self.earlier} if self.earlier is not None else {})


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
    runs = await store.runs(user_id, thread_id)
    preceding = runs[: _position(runs, before)]
    newer = len(runs) - len(preceding)
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
    runs = await store.runs(user_id, thread_id)
    preceding = runs if before is None else runs[: _position(runs, before)]
    newer = len(runs) - len(preceding)
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
        Said(run_id, tuple(msgspec.Raw(_encoder.encode(item.message)) for item in items))
        for run_id, items in itertools.groupby(stored, lambda item: item.run_id)
    ]


def _fitting(found: Sequence[Said], most_runs: int) -> list[Said]:
    """The latest of them that fit into a reply; the very latest, whatever its size."""
    left = MOST_BYTES
    fitting: list[Said] = []
    for said in reversed(found[-most_runs:]):
        left -= said.size
        if fitting and left < 0:
            break
        fitting.append(said)
    return fitting[::-1]
