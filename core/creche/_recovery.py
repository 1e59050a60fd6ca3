"""Ends the runs that a dead process left behind: the one way to be `lost`."""

from __future__ import annotations

import dataclasses
import logging
from datetime import datetime
from typing import Final

import msgspec

from creche import _events as events
from creche._context import RunId, ThreadId, UserId, new_id
from creche._emitter import timestamp
from creche._errors import GrammarError
from creche._grammar import Grammar, Phase
from creche._messages import Message
from creche._store import (
    Chunk,
    Commit,
    RunRecord,
    Store,
    StoredMessage,
    ThreadRecord,
    new_epoch,
    now,
)
from creche._transcript import Transcript

_CHUNKS_PER_READ: Final = 64
_LOST: Final = events.RunError(
    message="The server stopped while this run was under way.",
    code="lost",
    metadata={"creche": {"receipt": {"reason": "lost"}}},
)

_log: Final = logging.getLogger("creche.recovery")


async def end_lost_runs(store: Store) -> int:
    """Give every unfinished run its terminal event, and its thread a new epoch.

    To be called when nothing else writes to the store: before the first run is started. What a
    client saw of a lost run may be more than was committed, which the new epoch tells it.
    Returns how many runs were ended.
    """
    by_thread: dict[tuple[UserId, ThreadId], list[RunRecord]] = {}
    for run in await store.unfinished_runs():
        by_thread.setdefault((run.user_id, run.thread_id), []).append(run)
    ended = 0
    for (user_id, thread_id), runs in by_thread.items():
        thread = await store.thread(user_id, thread_id)
        if thread is None:
            continue
        try:
            await store.commit([await _ending(store, thread, runs)])
        # Boundary: one thread. The others must get their end all the same.
        except Exception:  # noqa: BLE001
            _log.exception("a lost run could not be ended", extra={"thread_id": thread_id})
        else:
            ended += len(runs)
    return ended


async def _ending(store: Store, thread: ThreadRecord, runs: list[RunRecord]) -> Commit:
    seq = thread.last_seq
    lines: list[bytes] = []
    records: list[RunRecord] = []
    messages: list[StoredMessage] = []
    moment = now()
    # The one that ran comes first: those behind it had not said anything.
    for run in sorted(runs, key=lambda run: (run.first_seq is None, run.created_at)):
        try:
            said = await _said(store, run)
            endings, transcript = _closed(run, said)
        except (msgspec.MsgspecError, GrammarError):
            # Its log is no log of ours; what can be said is that the run is over.
            _log.exception("the log of a lost run cannot be read", extra={"run_id": run.run_id})
            said, endings, transcript = [], [_last_word(run)], []
        first_seq = run.first_seq if said else seq + 1
        for event in endings:
            seq += 1
            lines.append(events.encode_event(event, seq))
        records.append(
            dataclasses.replace(
                run if _is_decided(run) else _lost(run, moment),
                first_seq=first_seq,
                last_seq=seq,
            ),
        )
        messages.extend(
            StoredMessage(run_id=run.run_id, message=message, created_at=moment)
            for message in transcript
        )
    return Commit(
        user_id=thread.user_id,
        thread_id=thread.thread_id,
        epoch=new_epoch(),
        runs=tuple(records),
        messages=tuple(messages),
        chunk=Chunk(first_seq=thread.last_seq + 1, last_seq=seq, data=b"\n".join(lines)),
    )


def _is_decided(run: RunRecord) -> bool:
    """Whether it was cancelled in the queue, and somebody was perhaps told so."""
    return run.status == "cancelled"


def _lost(run: RunRecord, moment: datetime) -> RunRecord:
    return dataclasses.replace(run, status="lost", reason="lost", ended_at=moment)


def _last_word(run: RunRecord) -> events.Event:
    """The terminal event of a run that did not come to say its own."""
    if not _is_decided(run):
        return _LOST
    return events.RunFinished(
        thread_id=run.thread_id,
        run_id=run.run_id,
        outcome=events.Cancelled(),
        metadata={"creche": {"receipt": run.receipt}},
        timestamp=timestamp(),
    )


async def _said(store: Store, run: RunRecord) -> list[events.Event]:
    """The committed events of an unfinished run."""
    if run.first_seq is None:
        return []
    said: list[events.Event] = []
    after = run.first_seq - 1
    while chunks := await store.chunks(
        run.user_id,
        run.thread_id,
        after=after,
        limit=_CHUNKS_PER_READ,
    ):
        for chunk in chunks:
            numbered = enumerate(chunk.lines(), chunk.first_seq)
            said.extend(events.decode_event(line) for seq, line in numbered if seq > after)
        after = chunks[-1].last_seq
    return said


def _closed(
    run: RunRecord,
    said: list[events.Event],
) -> tuple[list[events.Event], list[Message]]:
    """What has to be said to end a run that said this, and the messages it comes to."""
    grammar, transcript = Grammar(), Transcript()
    for event in said:
        grammar.accept(event)
        transcript.add(event)
    endings: list[events.Event] = []
    if grammar.phase is not Phase.RUNNING:
        # One that was parked goes on, for a moment, so that whatever was suspended has its end.
        # Its question stays open: the answer will start another run.
        parked = grammar.phase is Phase.PARKED
        endings.append(
            events.RunStarted(
                thread_id=run.thread_id,
                run_id=RunId(new_id()) if parked else run.run_id,
                parent_run_id=run.run_id if parked else None,
                timestamp=timestamp(),
            ),
        )
        endings.extend(grammar.suspended())
        for event in endings:
            grammar.accept(event)
    endings.extend(grammar.closers())
    endings.append(_last_word(run))
    for event in endings:
        transcript.add(event)
    return endings, transcript.messages()
