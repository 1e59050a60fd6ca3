"""The event log of what runs without an engine: in memory, and whole from its start to its end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from creche import _events as events
from creche._audit import SecurityAudit
from creche._barrier import split
from creche._context import UserExecutionContext
from creche._emitter import EngineVoice, EventEmitter, timestamp
from creche._journal import Journal
from creche._journals import open_journals
from creche._limits import Limits
from creche._store import MemoryStore, NewThread, RunRecord, RunStatus, now


@dataclasses.dataclass(slots=True, eq=False)
class OwnLog:
    """A journal and who writes it. What is put into `receipt` goes into the terminal event."""

    journal: Journal
    emitter: EventEmitter
    receipt: dict[str, Any]


@contextlib.asynccontextmanager
async def open_own_log(
    context: UserExecutionContext,
    limits: Limits,
    *,
    audit: SecurityAudit | None = None,
) -> AsyncIterator[OwnLog]:
    """A valid AG-UI log around the block: RUN_STARTED, what the block says, and its end.

    The end tells what became of the block: RUN_FINISHED when it was left by itself or by a
    cancellation, RUN_ERROR when it raised, which says no more than a correlation id.

    Resource handling: the journal can be read after the block, too; it lives as long as
    somebody holds it.
    """
    raised: BaseException | None = None
    async with open_journals(MemoryStore(), limits, audit=audit) as journals:
        async with journals.attached(context.user_id, context.thread_id) as journal:
            record = RunRecord(
                user_id=context.user_id,
                thread_id=context.thread_id,
                run_id=context.run_id,
                agent="",
                status="running",
                created_at=now(),
                started_at=now(),
                first_seq=1,
            )
            await journal.propose(NewThread(title="", epoch=journal.epoch), new_runs=(record,))
            log = OwnLog(journal, EventEmitter(context, journal, limits), {})
            voice = EngineVoice(log.emitter)
            voice.begin((), record)
            try:
                yield log
            except BaseException as error:  # noqa: BLE001  raised again below, as it is
                raised = error
            finally:
                voice.close_open()
                ended = dataclasses.replace(
                    record,
                    status=_status(raised),
                    ended_at=now(),
                    last_seq=journal.last_seq + 1,
                    reason=_status(raised),
                    receipt=log.receipt,
                )
                voice.end(_terminal(context, log.receipt, raised), ended)
    if raised is not None:
        raise raised  # here, since the writer's nursery would make a group of it


def _status(raised: BaseException | None) -> RunStatus:
    if raised is None:
        return "success"
    passing, _ = split(raised)
    return "failed" if passing is None else "cancelled"


def _terminal(
    context: UserExecutionContext,
    receipt: dict[str, Any],
    raised: BaseException | None,
) -> events.Event:
    status = _status(raised)
    creche: dict[str, Any] = {"receipt": {"reason": status, **receipt}}
    if status == "failed":
        return events.RunError(
            message=f"The dispatcher's block failed. Reference: {context.correlation_id}",
            code="failed",
            metadata={"creche": {**creche, "correlation_id": context.correlation_id}},
            timestamp=timestamp(),
        )
    return events.RunFinished(
        thread_id=context.thread_id,
        run_id=context.run_id,
        outcome=events.Succeeded() if status == "success" else events.Cancelled(),
        metadata={"creche": creche},
        timestamp=timestamp(),
    )
