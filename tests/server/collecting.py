"""An OpenTelemetry collector on the loopback, as far as creche talks to one."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclasses.dataclass(slots=True, eq=False)
class Received:
    """A span that has arrived."""

    span: Span
    resource: dict[str, Any]
    attributes: dict[str, Any]

    @property
    def operation(self) -> str:
        return str(self.attributes["gen_ai.operation.name"])


class Collector:
    """What was sent to it, byte by byte."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200  # what it answers
        self.lets_go = threading.Event()  # it answers nothing before this
        self.lets_go.set()
        self.url = ""

    @property
    def spans(self) -> list[Received]:
        found: list[Received] = []
        for body in self.bodies:
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = _plain(group.resource.attributes)
                for scope in group.scope_spans:
                    found += [Received(s, resource, _plain(s.attributes)) for s in scope.spans]
        return found


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextlib.contextmanager
def open_collector() -> Iterator[Collector]:
    """A collector that listens, until the block is left."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.lets_go.wait(30)
            if collector.status == 200:
                collector.bodies.append(body)
            collector.paths.append(self.path)
            collector.headers.append({k.lower(): v for k, v in self.headers.items()})
            with contextlib.suppress(OSError):
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    collector.url = f"http://127.0.0.1:{listening.server_address[1]}"
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.lets_go.set()
        listening.shutdown()
        listening.server_close()
        thread.join()
