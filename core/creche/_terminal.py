"""What says how a run ended: its last event, with what the run cost, and its span's end."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

from creche import _events as events
from creche._context import RunId, UserExecutionContext
from creche._emitter import timestamp
from creche._failures import identity, json_or_none
from creche._models import Usage
from creche._outcome import RunOutcome
from creche._redaction import printable
from creche._tracing import SpanEnd, as_code

_log: Final = logging.getLogger("creche.engine")


def terminal_event(
    context: UserExecutionContext,
    outcome: RunOutcome,
    usage: tuple[events.TokenUsage, ...] | None,
    run_id: RunId,
) -> events.Event:
    """The event that says how a run ended; `run_id` is that of its last segment."""
    if outcome.status == "failed":
        return events.RunError(
            message=outcome.message or "",
            code=outcome.receipt.reason,
            usage=usage,
            metadata=_metadata(outcome, context.correlation_id),
            timestamp=timestamp(),
        )
    succeeded = outcome.status == "success"
    return events.RunFinished(
        thread_id=context.thread_id,
        run_id=run_id,
        outcome=events.Succeeded() if succeeded else events.Cancelled(),
        result=json_or_none(outcome.result) if succeeded else None,
        usage=usage,
        metadata=_metadata(outcome),
        timestamp=timestamp(),
    )


def span_end(outcome: RunOutcome) -> SpanEnd:
    """The end of the run's span."""
    spent = outcome.statistics
    succeeded, failed = outcome.status == "success", outcome.status == "failed"
    return SpanEnd(
        status="success" if succeeded else "failed" if failed else "cancelled",
        code=None if succeeded else as_code(outcome.receipt.reason),
        input_tokens=spent.input_tokens,
        output_tokens=spent.output_tokens,
        queue_ms=spent.queue_ms,
    )


def _metadata(outcome: RunOutcome, correlation_id: str | None = None) -> dict[str, Any]:
    creche: dict[str, Any] = {
        "receipt": outcome.receipt.to_dict(),
        "statistics": outcome.statistics.to_dict(),
    }
    if correlation_id is not None:
        creche["correlation_id"] = correlation_id
    return {"creche": creche}


def costs_of(
    noted: Iterable[tuple[str, Usage]], context: UserExecutionContext
) -> tuple[events.TokenUsage, ...] | None:
    """What the run's answers cost, by model. What is no cost is left out, and logged."""
    totals: dict[str, tuple[int, int]] = {}
    for note in noted:
        try:
            model, spent = note
            before = totals.get(model, (0, 0))
            # Providers leave counts out, whatever the types say.
            inputs, outputs = int(spent.input_tokens or 0), int(spent.output_tokens or 0)
            totals[printable(model)] = (before[0] + inputs, before[1] + outputs)
        # Boundary: one note of an agent's. The run's end must not depend on it.
        except Exception:  # noqa: BLE001
            _log.exception("a run noted a cost that is none", extra=dict(identity(context)))
    return (
        tuple(
            events.TokenUsage(model=model, input_tokens=inputs, output_tokens=outputs)
            for model, (inputs, outputs) in totals.items()
        )
        or None
    )
