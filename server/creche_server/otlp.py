"""Spans as OpenTelemetry has them, sent to a collector by OTLP over HTTP.

Names are those of OpenTelemetry's semantic conventions for generative AI (in development, so
they may change) where there are any, and `creche.…` for the rest. Needs the extra `otel`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextvars import Token
from importlib.metadata import version
from types import MappingProxyType
from typing import Final, cast

from opentelemetry import context as ambient
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span as SdkSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as SdkTracer

from creche import Span, SpanEnd, SpanStart, redact_text

_log: Final = logging.getLogger("creche.tracing")

_EXPORT_TIMEOUT: Final = 5.0  # seconds for one batch, with its retries
_INTERVAL: Final = 1000.0  # milliseconds for which a span waits for others, at most
_QUEUE: Final = 8192  # spans that wait to be sent; more are dropped
_BATCH: Final = 1024  # spans
_LONGEST_REASON: Final = 400  # characters
# Who complains of each single batch that could not be sent, at length.
_COMPLAINERS: Final = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)

# {kind of span: (operation, the attribute that its name is in)}
_KINDS: Final = MappingProxyType(
    {
        "run": ("invoke_agent", "gen_ai.agent.name"),
        "subagent": ("invoke_agent", "gen_ai.agent.name"),
        "model": ("chat", "gen_ai.request.model"),
        "tool": ("execute_tool", "gen_ai.tool.name"),
    }
)

Attributes = dict[str, str | int]


def attributes_of_start(started: SpanStart) -> Attributes:
    """What a span has from its beginning."""
    operation, named = _KINDS[started.kind]
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        named: started.name,
        "gen_ai.conversation.id": started.thread_id,
        "creche.user_id": started.user_id,
        "creche.run_id": started.run_id,
        "creche.request_id": started.request_id,
    }
    if started.tool_call_id is not None:
        attributes["gen_ai.tool.call.id"] = started.tool_call_id
    return attributes


def attributes_of_end(ended: SpanEnd) -> Attributes:
    """What it has in the end. A status is for errors, which a cancellation is not."""
    attributes: Attributes = {"creche.outcome": ended.status}
    if ended.status == "failed":
        attributes["error.type"] = ended.code or "_OTHER"
    elif ended.code is not None:
        attributes["creche.cancel_reason"] = ended.code
    for name, value in (
        ("gen_ai.usage.input_tokens", ended.input_tokens),
        ("gen_ai.usage.output_tokens", ended.output_tokens),
        ("creche.queue_ms", ended.queue_ms),
    ):
        if value is not None:
            attributes[name] = value
    return attributes


class OtlpSpan:
    """One span. See `creche.Span`."""

    __slots__ = ("_token", "span")

    def __init__(self, span: SdkSpan, token: Token[ambient.Context] | None) -> None:
        self.span = span
        self._token = token

    def end(self, ended: SpanEnd) -> None:
        self.span.set_attributes(attributes_of_end(ended))
        if ended.status == "failed":
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end()
        if self._token is not None:
            ambient.detach(self._token)


class OtlpTracer:
    """Tells OpenTelemetry of spans. See `creche.Tracer`.

    While a run, a tool call or a sub-agent works, its span is OpenTelemetry's current one, for
    log lines and for libraries that tell of their own. A model call's is not: its block may be
    left in another task than it was entered in. Nothing here asks which one is current.
    """

    def __init__(self, tracer: SdkTracer) -> None:
        self._tracer = tracer

    def begin(self, started: SpanStart, parent: Span | None) -> OtlpSpan:
        operation, _ = _KINDS[started.kind]
        within = ambient.Context()
        if parent is not None:
            within = set_span_in_context(cast("OtlpSpan", parent).span, within)
        is_call_out = started.kind == "model"
        span = self._tracer.start_span(
            f"{operation} {started.name}",
            context=within,
            kind=SpanKind.CLIENT if is_call_out else SpanKind.INTERNAL,
            attributes=attributes_of_start(started),
        )
        token = None if is_call_out else ambient.attach(set_span_in_context(span))
        return OtlpSpan(span, token)


class Collector(SpanExporter):
    """The collector, as the sending thread has it: says once that it is away, and when it is back.

    `complain` is for whoever hears what the library says of a batch that was not taken.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._exporter = OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT)
        self._is_over = False
        self._is_slow = False
        self.answers = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._is_over:
            return SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001  boundary: one batch of spans
            result = SpanExportResult.FAILURE
            self.complain(type(error).__name__)
        if result is not SpanExportResult.SUCCESS:
            self.complain("no reason given")
        elif not self.answers:
            self.answers = True
            _log.info("the collector at %s takes spans again", self._url)
        return result

    def complain(self, reason: str) -> None:
        """It did not take a batch, or not at once."""
        if self.answers and not self._is_over:
            self.answers = False
            _log.warning(
                "the collector at %s does not take spans; they are dropped until it does: %s",
                self._url,
                redact_text(reason)[:_LONGEST_REASON],
            )

    def complain_of_speed(self) -> None:
        """More spans come than it takes."""
        if self.answers and not self._is_slow:
            self._is_slow = True
            _log.warning("the collector at %s is too slow; some spans are dropped", self._url)

    def shutdown(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        del timeout_millis
        return True


class _Complaints(logging.Filter):
    """Keeps out of the log what the libraries say of each single batch; the collector says it."""

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self._collector = collector

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg.startswith("Queue full"):
            self._collector.complain_of_speed()
        elif record.levelno >= logging.WARNING:
            self._collector.complain(record.getMessage())
        return False


class OtlpExporting:
    """A tracer, and the thread that sends its spans. `close` ends it, once."""

    def __init__(self, endpoint: str) -> None:
        """Start the thread. `endpoint` is the collector's base URL."""
        self._collector = Collector(f"{endpoint.rstrip('/')}/v1/traces")
        self._complaints = _Complaints(self._collector)
        self._provider = TracerProvider(
            resource=Resource.create(
                {"service.name": "creche", "service.version": version("creche")}
            ),
            shutdown_on_exit=False,
            meter_provider=NoOpMeterProvider(),
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._collector,
                max_queue_size=_QUEUE,
                schedule_delay_millis=_INTERVAL,
                max_export_batch_size=_BATCH,
                export_timeout_millis=_EXPORT_TIMEOUT * 1000,
                meter_provider=NoOpMeterProvider(),
            )
        )
        for name in _COMPLAINERS:
            logging.getLogger(name).addFilter(self._complaints)
        self.tracer = OtlpTracer(self._provider.get_tracer("creche", version("creche")))

    def close(self) -> None:
        """Send what is left, and end the thread. Blocks, for a while if the collector is away."""
        try:
            self._provider.shutdown()
        finally:
            for name in _COMPLAINERS:
                logging.getLogger(name).removeFilter(self._complaints)

    def give_up(self) -> None:
        """Let `close`, in another thread, come to its end; what it has not sent is lost."""
        if self._collector.answers:
            _log.warning("the collector did not take the last spans in time; they are lost")
        self._collector.shutdown()
