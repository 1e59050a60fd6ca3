"""Spans of a real server, as a collector gets them, and a server whose collector is away."""

from __future__ import annotations

import collections
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.server.collecting import Collector, Received, open_collector
from tests.server.processes import run_creche
from tests.server.running import Server, open_server, settings_for

from creche import ModelAgent, RunContext, RunError, SpanEnd, SpanStart, Step, ToolContext, tool
from creche_server.otlp import Collector as Sending
from creche_server.otlp import attributes_of_end, attributes_of_start
from creche_server.serve import _grace
from creche_server.telemetry import configure_logging
from creche_server.tracing import FLUSH_TIMEOUT

USERS = 20
NOBODY = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with open_collector() as listening:
        yield listening


@tool
async def look_up(secret: str, call: ToolContext) -> str:
    """Look something up."""
    logging.getLogger("mine").warning("looking up")
    await trio.sleep(0.001)
    return f"found {secret} of {call.context.user_id}"


@tool
def compute(secret: str) -> str:
    """Compute in a thread."""
    return f"{secret}!"


@tool
async def breaks(secret: str) -> str:
    """Fail."""
    raise ValueError(f"cannot {secret}")


TOOLS = (look_up, compute, breaks)


class Helper(ModelAgent):
    """An ordinary agent."""

    tools = (look_up,)


async def works(run: RunContext) -> str:
    """Does a bit of everything, with its user's secret in its hands."""
    secret = f"canary-{run.context.user_id}"
    await run.emit.text(secret)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.call_tool, "look_up", {"secret": secret})
        nursery.start_soon(run.call_tool, "compute", {"secret": secret})
    await run.call_tool("breaks", {"secret": secret})
    await run.call_tool(f"tool_{secret}", {"secret": secret})
    logging.getLogger("mine.agent").warning("half way")
    call = json.dumps({"secret": secret})
    await run.parallel(
        [
            Step(agent="helper", input=f"{secret} tool=look_up:{call}", continue_on_error=True),
            Step(agent="helper", input=f"{secret} fail={secret}", continue_on_error=True),
        ]
    )
    return secret


async def fails(run: RunContext) -> None:
    secret = f"canary-{run.context.user_id}"
    raise RunError(secret, code="out_of_stock")


async def hangs(run: RunContext) -> None:
    await run.emit.text("waiting")
    await trio.sleep_forever()


AGENTS: dict[str, Any] = {"works": works, "fails": fails, "hangs": hangs, "helper": Helper}


async def live(server: Server, user: str) -> None:
    """Three runs of one user: one that succeeds, one that fails, one that is cancelled."""
    async with server.chat("everybody's", user) as chat:
        await chat.subscribe()
        for agent in ("works", "fails"):
            await chat.run(f"canary-{user}", agent)
        run_id = await chat.start(f"canary-{user}", "hangs")
        await chat.until(lambda: "waiting" in chat.frames[-1], "the run hangs")
        await chat.ask("run.cancel", run_id=run_id, wait=True)


def spans_of(found: list[Received], user: str) -> dict[bytes, Received]:
    """{span id: span} of one user."""
    return {s.span.span_id: s for s in found if s.attributes["creche.user_id"] == user}


def tree_of(spans: dict[bytes, Received]) -> collections.Counter[tuple[str, ...]]:
    """How often there is a span of each name below which others."""

    def path(received: Received) -> tuple[str, ...]:
        above = received.span.parent_span_id
        return (*(path(spans[above]) if above else ()), received.span.name)

    return collections.Counter(path(received) for received in spans.values())


WORKS = "invoke_agent works"
HELPER = "invoke_agent helper"
EXPECTED = {
    (WORKS,): 1,
    (WORKS, "execute_tool look_up"): 1,
    (WORKS, "execute_tool compute"): 1,
    (WORKS, "execute_tool breaks"): 1,
    (WORKS, "execute_tool _OTHER"): 1,
    (WORKS, HELPER): 2,
    (WORKS, HELPER, "chat scripted"): 3,
    (WORKS, HELPER, "execute_tool look_up"): 1,
    ("invoke_agent fails",): 1,
    ("invoke_agent hangs",): 1,
}


class TestWithACollector:
    async def test_twenty_users_at_once_have_their_own_spans_and_no_secret_is_in_any(
        self, collector: Collector, tmp_path: Path
    ):
        opened = open_server(tmp_path / "data", AGENTS, TOOLS, otlp_endpoint=collector.url)
        async with opened as server:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for number in range(USERS):
                        nursery.start_soon(live, server, f"user-{number}")
            await server.shut_down()
        assert b"canary" not in b"".join(collector.bodies)
        assert set(collector.paths) == {"/v1/traces"}
        found = collector.spans
        traces: dict[bytes, str] = {}
        for number in range(USERS):
            user = f"user-{number}"
            own = spans_of(found, user)
            assert tree_of(own) == EXPECTED
            runs = collections.Counter(s.attributes["creche.run_id"] for s in own.values())
            assert len(runs) == 3
            for received in own.values():
                # A trace is one run, of one user.
                run_id = received.attributes["creche.run_id"]
                assert traces.setdefault(received.span.trace_id, run_id) == run_id
                above = own.get(received.span.parent_span_id)
                assert above is None or above.span.trace_id == received.span.trace_id
        assert len(traces) == 3 * USERS
        assert len(found) == USERS * sum(EXPECTED.values())

    async def test_a_span_says_what_it_is_of_and_how_it_ended(
        self, collector: Collector, tmp_path: Path
    ):
        opened = open_server(tmp_path / "data", AGENTS, TOOLS, otlp_endpoint=collector.url)
        async with opened as server:
            await live(server, "ada")
            await server.shut_down()
        found = collector.spans
        assert found[0].resource["service.name"] == "creche"
        assert found[0].resource["service.version"]
        by_name = {received.span.name: received for received in found}
        for received in found:
            assert received.attributes["gen_ai.conversation.id"] == "everybody's"
            assert not received.span.events
            assert not received.span.status.message
            assert received.span.end_time_unix_nano >= received.span.start_time_unix_nano
        run = by_name[WORKS]
        assert run.operation == "invoke_agent"
        assert run.attributes["gen_ai.agent.name"] == "works"
        assert run.attributes["creche.outcome"] == "success"
        assert run.attributes["gen_ai.usage.output_tokens"] > 0
        assert run.span.status.code == 0  # unset
        failed = by_name["invoke_agent fails"]
        assert failed.attributes["creche.outcome"] == "failed"
        assert failed.attributes["error.type"] == "out_of_stock"
        assert failed.span.status.code == 2  # error
        cancelled = by_name["invoke_agent hangs"]
        assert cancelled.attributes["creche.outcome"] == "cancelled"
        assert cancelled.attributes["creche.cancel_reason"] == "user"
        assert cancelled.span.status.code == 0
        broken = by_name["execute_tool breaks"]
        assert broken.operation == "execute_tool"
        assert broken.attributes["gen_ai.tool.name"] == "breaks"
        assert broken.attributes["gen_ai.tool.call.id"]
        assert broken.attributes["error.type"] == "ValueError"
        assert by_name["execute_tool _OTHER"].attributes["error.type"] == "unknown_tool"
        answers = [r.attributes for r in found if r.operation == "chat"]
        assert {a["gen_ai.request.model"] for a in answers} == {"scripted"}
        assert [a for a in answers if "gen_ai.usage.input_tokens" in a]

    async def test_a_clients_traceparent_puts_it_into_nobodys_trace(
        self, collector: Collector, tmp_path: Path
    ):
        """Who could choose the trace of a run could write into another user's."""
        opened = open_server(tmp_path / "data", AGENTS, TOOLS, otlp_endpoint=collector.url)
        chosen = "4bf92f3577b34da6a3ce929d0e0e4736"
        async with opened as server:
            for odd in (f"00-{chosen}-00f067aa0ba902b7-01", "00-x", "\xff" * 5000):
                headers = [
                    (b"Authorization", f"Bearer {server.token()}".encode()),
                    (b"traceparent", odd.encode("latin-1")),
                ]
                async with server.chat(headers=headers) as chat:
                    await chat.subscribe()
                    await chat.run("x", "fails")
            await server.shut_down()
        runs = collector.spans
        assert len(runs) == 3
        assert chosen not in {received.span.trace_id.hex() for received in runs}
        assert {received.span.parent_span_id for received in runs} == {b""}

    async def test_a_line_of_the_log_says_in_which_span_it_was_written(
        self, collector: Collector, tmp_path: Path
    ):
        root = logging.getLogger()
        before, level = root.handlers[:], root.level
        written = io.StringIO()
        configure_logging("info", written)
        try:
            opened = open_server(tmp_path / "data", AGENTS, TOOLS, otlp_endpoint=collector.url)
            async with opened as server:
                async with server.chat() as chat:
                    await chat.subscribe()
                    await chat.run("x", "works")
                await server.shut_down()
        finally:
            root.handlers[:] = before
            root.setLevel(level)
        lines = [json.loads(line) for line in written.getvalue().splitlines()]
        for logger, name in (("mine", "execute_tool look_up"), ("mine.agent", WORKS)):
            told = {(ln["trace_id"], ln["span_id"]) for ln in lines if ln["logger"] == logger}
            spans = [r.span for r in collector.spans if r.span.name == name]
            assert told == {(span.trace_id.hex(), span.span_id.hex()) for span in spans}
        assert [line for line in lines if "listening" in line["event"] and "span_id" in line] == []

    async def test_headers_for_the_collector_come_from_the_environment(
        self, collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=abc")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOBODY)  # the setting's counts
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        opened = open_server(tmp_path / "data", AGENTS, TOOLS, otlp_endpoint=collector.url)
        async with opened as server:
            async with server.chat() as chat:
                await chat.subscribe()
                await chat.run("x", "fails")
            await server.shut_down()
        assert {headers.get("x-key") for headers in collector.headers} == {"abc"}
        assert collector.spans[0].resource["deployment.environment.name"] == "test"


async def used_and_stopped(data: Path, endpoint: str) -> float:
    """Have two runs on a server, stop it; returns the seconds that its end took."""
    async with open_server(data, AGENTS, TOOLS, otlp_endpoint=endpoint) as server:
        async with server.chat() as chat:
            await chat.subscribe()
            assert (await chat.run("x", "works"))[-1]["type"] == "RUN_FINISHED"
            await trio.sleep(1.2)  # a batch is under way
            assert (await chat.run("x", "works"))[-1]["type"] == "RUN_FINISHED"
        began = time.monotonic()
        await server.shut_down()
        return time.monotonic() - began


def complaints(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What anybody logged about spans."""
    ours = ("creche.tracing", "opentelemetry", "urllib3", "requests")
    return [r for r in caplog.records if r.name.startswith(ours) and r.levelno >= logging.INFO]


class TestWithACollectorThatIsAway:
    async def test_runs_go_on_and_the_end_is_in_time_and_one_line_tells_of_it(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        took = await used_and_stopped(tmp_path / "data", NOBODY)
        assert took < FLUSH_TIMEOUT + 1
        (told,) = complaints(caplog)
        assert f"the collector at {NOBODY}/v1/traces does not take spans" in told.getMessage()
        assert "refused" in told.getMessage()
        assert told.levelno == logging.WARNING
        assert told.exc_info is None

    async def test_one_that_never_answers_delays_nothing(
        self, collector: Collector, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        collector.lets_go.clear()
        took = await used_and_stopped(tmp_path / "data", collector.url)
        assert took < FLUSH_TIMEOUT + 1
        (told,) = complaints(caplog)
        assert "did not take the last spans in time" in told.getMessage()

    def test_the_grace_of_runs_leaves_time_for_the_last_spans(self, tmp_path: Path):
        without = _grace(settings_for(tmp_path))
        assert _grace(settings_for(tmp_path, otlp_endpoint=NOBODY)) == without - FLUSH_TIMEOUT

    def test_it_is_told_once_that_it_is_away_and_once_that_it_is_back(
        self, collector: Collector, caplog: pytest.LogCaptureFixture
    ):
        caplog.set_level(logging.INFO, logger="creche")
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        sending = Sending(f"{collector.url}/v1/traces")
        for status in (400, 401, 200, 200, 500, 500):
            collector.status = status
            sending.export([])
        sending.shutdown()
        logging.getLogger("opentelemetry").setLevel(logging.NOTSET)
        told = [r.getMessage().split(" ", 4)[4] for r in caplog.records if "creche" in r.name]
        assert [words.partition(";")[0] for words in told] == [
            "does not take spans",
            "takes spans again",
            "does not take spans",
        ]


class TestWithoutTheExtra:
    async def test_the_server_starts_and_with_the_setting_it_says_what_to_install(
        self, tmp_path: Path
    ):
        # As if it were not installed: nothing of that name can be imported.
        (tmp_path / "opentelemetry").mkdir()
        (tmp_path / "opentelemetry/__init__.py").write_text(
            "raise ModuleNotFoundError(name='opentelemetry')"
        )
        path = os.pathsep.join([str(tmp_path), *sys.path])
        env = {"PYTHONPATH": path, "CRECHE_MODEL": "scripted", "CRECHE_OTLP_ENDPOINT": NOBODY}
        done = await run_creche("serve", "--port", "0", cwd=tmp_path, env=env)
        assert done.returncode == 1
        assert done.stderr.decode() == (
            "creche: otlp_endpoint is set, and OpenTelemetry is missing: "
            'pip install "creche[otel]"\n'
        )

    async def test_nothing_of_opentelemetry_is_loaded_without_the_setting(self, tmp_path: Path):
        program = (
            "import sys, trio, functools, pathlib\n"
            "from creche_server.serve import Stop, serve\n"
            "from creche_server.settings import Settings\n"
            "stop = Stop(); stop.soon.set()\n"
            "settings = Settings(model='scripted', port=0, data=pathlib.Path('data'))\n"
            "trio.run(functools.partial(serve, settings, stop=stop))\n"
            "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
        )
        done = await trio.run_process(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_stdout=True,
        )
        assert done.stdout == b"[]\n"


def test_names_are_those_of_the_conventions_where_there_are_any():
    started: dict[str, Any] = {
        "user_id": "ada",
        "thread_id": "t",
        "run_id": "r",
        "request_id": "q",
    }
    common = {
        "gen_ai.conversation.id": "t",
        "creche.user_id": "ada",
        "creche.run_id": "r",
        "creche.request_id": "q",
    }
    for kind, operation, attribute in (
        ("run", "invoke_agent", "gen_ai.agent.name"),
        ("subagent", "invoke_agent", "gen_ai.agent.name"),
        ("model", "chat", "gen_ai.request.model"),
        ("tool", "execute_tool", "gen_ai.tool.name"),
    ):
        span = SpanStart(kind=kind, name="x", **started)  # type: ignore[arg-type]
        assert attributes_of_start(span) == {
            **common,
            "gen_ai.operation.name": operation,
            attribute: "x",
        }


@pytest.mark.parametrize(
    ("ended", "attributes"),
    [
        (SpanEnd(status="success"), {"creche.outcome": "success"}),
        (
            SpanEnd(status="failed", code="busy"),
            {"creche.outcome": "failed", "error.type": "busy"},
        ),
        (SpanEnd(status="failed"), {"creche.outcome": "failed", "error.type": "_OTHER"}),
        (
            SpanEnd(status="cancelled", code="user"),
            {"creche.outcome": "cancelled", "creche.cancel_reason": "user"},
        ),
        (SpanEnd(status="cancelled"), {"creche.outcome": "cancelled"}),
        (
            SpanEnd(status="success", input_tokens=3, output_tokens=0, queue_ms=0),
            {
                "creche.outcome": "success",
                "gen_ai.usage.input_tokens": 3,
                "gen_ai.usage.output_tokens": 0,
                "creche.queue_ms": 0,
            },
        ),
    ],
)
def test_an_end_in_attributes(ended: SpanEnd, attributes: dict[str, Any]):
    assert attributes_of_end(ended) == attributes
