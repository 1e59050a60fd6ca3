"""Logs: for people on a terminal, JSON otherwise; without secrets either way."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from creche import logged_context, redact_text, redact_value


def configure_logging(level: str, stream: TextIO) -> None:
    """Send this process's logs to `stream`, from `level` up.

    For the process's own entry point: a library never configures logging.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        _add_run,
        _add_span,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks are text before secrets are looked for: they quote what was passed around.
    # ConsoleRenderer would make its own of `exc_info`, behind the redaction's back.
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if stream.isatty() else structlog.processors.JSONRenderer()
    )
    ending: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        _redact,
        renderer,
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
        ),
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These tell of every frame and every step; ours tell what matters of it.
    for chatty in (
        "trio-websocket",
        "hypercorn",
        "quart",
        "httpx",
        "httpx2",
        "openai",
        "alembic",
        "urllib3",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its errors quote what servers said, and ours tell of them without.
    logging.getLogger("mcp").setLevel(logging.CRITICAL)


def _add_run(
    _logger: object,
    _method: str,
    event: MutableMapping[str, Any],
) -> MutableMapping[str, Any]:
    """Say whose run a line is from, also where an agent's own code wrote it."""
    context = logged_context.get()  # creche: shared for log lines only; nothing acts on it
    if context is not None:
        for name in ("user_id", "thread_id", "run_id", "correlation_id"):
            event.setdefault(name, getattr(context, name))
    return event


def _add_span(
    _logger: object,
    _method: str,
    event: MutableMapping[str, Any],
) -> MutableMapping[str, Any]:
    """Say in which span a line was written, if anybody in this process tells of spans."""
    trace = sys.modules.get("opentelemetry.trace")  # an extra, which a line does not load
    if trace is not None:
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            event.setdefault("trace_id", trace.format_trace_id(span.trace_id))
            event.setdefault("span_id", trace.format_span_id(span.span_id))
    return event


def _redact(
    _logger: object,
    _method: str,
    event: MutableMapping[str, Any],
) -> MutableMapping[str, Any]:
    redacted: dict[str, Any] = redact_value(event)
    return {
        key: redact_text(value) if isinstance(value, str) else value
        for key, value in redacted.items()
    }
