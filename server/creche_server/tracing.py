"""Opens what spans go to: an OpenTelemetry collector, if the settings name one.

The libraries for it are an extra; without the setting they are not even imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final, Protocol

import trio

from creche import Tracer

FLUSH_TIMEOUT: Final = 1.0  # seconds for the last spans, when the process goes


class Exporting(Protocol):
    """A tracer, and a thread that sends its spans."""

    @property
    def tracer(self) -> Tracer: ...

    def close(self) -> None:
        """Send what is left; blocks, perhaps for long."""
        ...

    def give_up(self) -> None:
        """Let `close` come to its end, whatever is left."""
        ...


class TracingUnavailableError(Exception):
    """Spans are wanted, and what sends them is not installed."""


@contextlib.asynccontextmanager
async def open_tracing(endpoint: str | None) -> AsyncIterator[Tracer | None]:
    """A tracer whose spans go to the collector at `endpoint`; None if there is none.

    Resource handling: spans are sent by a thread of their own, which Trio never waits for but
    here, at the end of the block, for `FLUSH_TIMEOUT` at most. What is not sent by then is lost.

    Error handling: raises TracingUnavailableError. A collector that is away is no error: it is
    logged, once, and its spans are dropped.
    """
    if endpoint is None:
        yield None
        return
    try:
        # The libraries take a while to load, and look into files.
        exporting = await trio.to_thread.run_sync(_start, endpoint)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        msg = 'otlp_endpoint is set, and OpenTelemetry is missing: pip install "creche[otel]"'
        raise TracingUnavailableError(msg) from error
    try:
        yield exporting.tracer
    finally:
        with trio.move_on_after(FLUSH_TIMEOUT, shield=True) as flushing:
            await trio.to_thread.run_sync(
                exporting.close,
                abandon_on_cancel=True,
                limiter=trio.CapacityLimiter(1),  # not behind threads of tools that do not stop
            )
        if flushing.cancelled_caught:
            exporting.give_up()


def _start(endpoint: str) -> Exporting:
    from creche_server.otlp import OtlpExporting  # noqa: PLC0415  an extra

    return OtlpExporting(endpoint)
