"""A run's rows: as it is asked for, as it stands, as it was called off."""

from __future__ import annotations

import contextlib
import logging
from typing import Final

from creche._errors import CrecheError, StoreUnavailableError
from creche._failures import identity
from creche._journal import Journal
from creche._messages import Message, text_of
from creche._outcome import Receipt, RunOutcome
from creche._run_life import RunLife
from creche._statistics import RunStatistics
from creche._store import NewThread, RunRecord, RunStatus, Store, StoredMessage

_log: Final = logging.getLogger("creche.runs")

_TITLE_LENGTH: Final = 80  # characters


async def call_off(journal: Journal, life: RunLife) -> None:
    """Store that a run was cancelled before its turn came; its events follow in its turn.

    If the store does not take that, its turn will tell.
    """
    receipt = Receipt(reason=life.reason or "user", elapsed_ms=0, run_ms=0, tasks_ended=0)
    statistics = RunStatistics(queue_ms=round(life.queued_for * 1000))
    outcome = RunOutcome(status="cancelled", receipt=receipt, statistics=statistics)
    with contextlib.suppress(StoreUnavailableError):
        record = run_record(life, "cancelled", outcome=outcome)
        await journal.propose(runs=(record,), speaker=life.context)
        life.conclude(outcome)


async def propose_run(journal: Journal, life: RunLife, asked: tuple[Message, ...]) -> None:
    """Commit a run's rows: its thread if that is new, the run as queued, what it was asked.

    In the same transaction, the messages of those that it rolls back go.

    Raises StoreUnavailableError; then nothing was written.
    """
    title = next((text_of(message) for message in asked if text_of(message)), "")
    await journal.propose(
        NewThread(title=title.strip()[:_TITLE_LENGTH], epoch=journal.epoch),
        new_runs=(run_record(life, "queued"),),
        messages=tuple(
            StoredMessage(run_id=life.context.run_id, message=message, created_at=life.created_at)
            for message in asked
        ),
        questions=life.answers,
        rolls_back=life.rolls_back,
        speaker=life.context,
    )


def run_record(
    life: RunLife,
    status: RunStatus,
    *,
    outcome: RunOutcome | None = None,
    last_seq: int | None = None,
) -> RunRecord:
    """The row of a run as it stands."""
    return RunRecord(
        user_id=life.context.user_id,
        thread_id=life.context.thread_id,
        run_id=life.context.run_id,
        agent=life.agent,
        status=status,
        created_at=life.created_at,
        started_at=life.started_at,
        ended_at=outcome.ended_at if outcome is not None else None,
        first_seq=life.first_seq,
        last_seq=last_seq,
        reason=outcome.receipt.reason if outcome is not None else None,
        receipt=outcome.receipt.to_dict() if outcome is not None else None,
    )


async def why_refused(store: Store, life: RunLife, error: StoreUnavailableError) -> CrecheError:
    """What to say of rows that the store did not take: it may be no fault of the store's."""
    with contextlib.suppress(Exception):  # a store that is away does not know, either
        if await store.run(life.context.user_id, life.context.run_id) is not None:
            return CrecheError(f"run {life.context.run_id!r} has been: a run id is for one run")
    # The writer could not know whose fault it is, so it is told here.
    _log.warning(
        "a commit failed and its run was not started",
        extra={**identity(life.context), "error": repr(error.__cause__ or error)},
    )
    return error
