"""Each kind of thing that is audited: what a client does, and the one record that it makes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import trio
from ag_ui.core import EventType
from tests.core.test_audit import TroubledSink
from tests.server.running import (
    PATIENCE,
    Chat,
    CommandError,
    Server,
    asking,
    open_server,
)
from tests.small_world import BOB, Body, context, hang
from tests.store_contract import record as run_record

from creche import (
    Agent,
    AuditHead,
    AuditKind,
    AuditQuery,
    AuditRecord,
    ConnectionId,
    EventEmitter,
    IsolationError,
    MemorySink,
    RunContext,
    Tool,
    UserExecutionContext,
    UserId,
    new_connection_id,
    new_id,
    text_of,
    tool,
)

EVERYTHING = AuditQuery()
Action = Callable[[Server], Awaitable[Mapping[str, str] | None]]


class Kept(MemorySink):
    """A sink that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._came = trio.Event()

    async def append(self, records: Sequence[AuditRecord], head: AuditHead) -> None:
        await super().append(records, head)
        self._came.set()
        self._came = trio.Event()

    async def found(self) -> list[AuditRecord]:
        """All of it, once there is something."""
        with trio.fail_after(PATIENCE):
            while not (found := await self.find(EVERYTHING)):
                await self._came.wait()
        return found


# --- agents that a client may start


@tool
async def look() -> str:
    """Look."""
    return "seen"


async def writes_bobs_run(run: RunContext) -> None:
    run.emit._journal.check_owned((run_record(user=BOB),), run.context)


async def speaks_as_bob_and_hides_it(run: RunContext) -> None:
    try:
        EventEmitter(context(BOB), run.emit._journal, run.limits)
    except IsolationError:
        await run.emit.text("as if nothing had been")


async def takes_a_connection(run: RunContext) -> None:
    run.context.with_connection(ConnectionId(text_of(run.messages[-1])))


async def looks_twice(run: RunContext) -> None:
    for _ in range(2):
        await run.call_tool("look", {})


def makes_a_writer() -> type[Agent]:
    class Writer:
        kept: Any = None

        async def run(self, run: RunContext) -> None:
            type(self).kept = text_of(run.messages[-1])

    return Writer


def all_but_bob(context: UserExecutionContext, tool: Tool) -> bool:
    return context.user_id == BOB


# --- what clients do


def bearer(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"Authorization", f"Bearer {token}".encode())]


def starts(agent: str, words: str = "go") -> Action:
    async def action(server: Server) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            await chat.run(words, agent)

    return action


async def bobs_run(server: Server) -> str:
    async with server.chat("bobs-own", "bob") as chat:
        await chat.subscribe()
        run_id = await chat.start("tokens=1")
        await chat.finished(run_id)
    return run_id


def asks(method: str, code: str, **params: Any) -> Action:
    async def action(server: Server) -> None:
        async with server.chat() as chat:
            await refused(chat, code, method, **params)

    return action


async def refused(chat: Chat, code: str, method: str, **params: Any) -> None:
    with pytest.raises(CommandError) as caught:
        await chat.ask(method, **params)
    assert caught.value.code == code


async def connects_to_bobs_thread(server: Server) -> None:
    await bobs_run(server)
    async with server.chat("bobs-own"):
        pass


async def looks_at_bobs_thread(server: Server) -> None:
    await bobs_run(server)
    async with server.http() as http:
        assert (await http.get("/threads/bobs-own")).status_code == 404


async def cancels_bobs_run(server: Server) -> Mapping[str, str]:
    run_id = await bobs_run(server)
    async with server.chat() as chat:
        await refused(chat, "no_such_run", "run.cancel", run_id=run_id)
    return {"run": run_id}


async def asks_what_bobs_run_does(server: Server) -> Mapping[str, str]:
    run_id = await bobs_run(server)
    async with server.chat() as chat:
        await refused(chat, "no_such_run", "agent.getTree", run_id=run_id)
    return {"run": run_id}


async def asks_over_http_what_bobs_run_does(server: Server) -> Mapping[str, str]:
    run_id = await bobs_run(server)
    async with server.http() as http:
        assert (await http.get(f"/runs/{run_id}/tree")).status_code == 404
    return {"run": run_id}


async def asks_for_bobs_runs(server: Server) -> None:
    async with server.http() as http:
        assert (await http.get("/runs?user=bob")).json()["runs"] == []


async def asks_for_what_was_before_bobs_run(server: Server) -> Mapping[str, str]:
    run_id = await bobs_run(server)
    async with server.chat() as chat:
        await refused(chat, "no_such_run", "state.get", before=run_id)
    return {"run": run_id}


def asks_over_http_for_what_was_before_bobs_run(part: str) -> Action:
    async def action(server: Server) -> Mapping[str, str]:
        run_id = await bobs_run(server)
        async with server.http() as http:
            await http.post("/threads", json={"thread_id": "adas-own"})
            found = await http.get(f"/threads/adas-own/{part}?before={run_id}")
        assert (found.status_code, found.json()["error"]) == (404, "no_such_run")
        return {"run": run_id}

    return action


async def asks_over_http_for_what_was_before_none(server: Server) -> None:
    async with server.http() as http:
        await http.post("/threads", json={"thread_id": "adas-own"})
        found = await http.get("/threads/adas-own/state?before=none")
    assert found.status_code == 422
    assert found.json()["details"][0]["field"] == "before"


async def ends_bobs_subscription(server: Server) -> None:
    async with server.chat("bobs-own", "bob") as bob, server.chat() as ada:
        subscription = (await bob.subscribe())["subscription_id"]
        await refused(
            ada,
            "no_such_subscription",
            "subscription.unsubscribe",
            subscription_id=subscription,
        )
        await bob.run("tokens=1")  # it goes on


async def comes_from_a_foreign_page(server: Server) -> None:
    headers = [*bearer(server.token()), (b"Origin", b"https://evil.example")]
    async with server.chat(headers=headers) as chat:
        assert (await chat.end())[0] == 4403


async def acts_from_a_foreign_page(server: Server) -> None:
    async with server.http(user=None) as http:
        http.cookies.set(server.auth.session_cookie, server.auth.mint_session(UserId("ada")))
        evil = {"Origin": "https://evil.example"}
        assert (await http.post("/threads", headers=evil)).status_code == 403


async def connects_to_no_thread(server: Server) -> None:
    async with server.chat("none") as chat:
        assert (await chat.end())[0] == 4400


async def says_who_it_is(server: Server) -> None:
    async with server.chat() as chat:
        asked = {**asking("go"), "metadata": {"user_id": "bob"}}
        await refused(chat, "invalid_argument", "run.start", **asked)
        async with server.http() as http:
            assert (await http.get("/threads")).json() == [], "nothing was started"


async def makes_no_thread(server: Server) -> None:
    async with server.http() as http:
        made = await http.post("/threads", json={"thread_id": "undefined"})
    assert made.status_code == 422


def sends(frame: Mapping[str, Any]) -> Action:
    async def action(server: Server) -> None:
        async with server.chat() as ada, server.chat() as watcher:
            await watcher.subscribe()
            await ada.socket.send_message(json.dumps(frame))
            reply = await ada.reply(frame.get("id"))
            assert (reply["type"], reply["error"]) == ("error", "invalid_argument")
            await watcher.run("tokens=1")
            assert watcher.events[0]["type"] == "RUN_STARTED", "nothing of it was said"

    return action


async def would_mint_a_page_link(server: Server) -> None:
    async with server.http(user=None) as http:
        http.cookies.set(server.auth.session_cookie, server.auth.mint_session(UserId("ada")))
        minted = await http.post("/auth/tickets", json={"purpose": "page"})
    assert minted.status_code == 401


async def opens_one_socket_too_many(server: Server) -> None:
    async with server.chat() as chat:
        await chat.subscribe()
        async with server.chat() as another:
            assert (await another.end())[0] == 4429


async def starts_one_run_too_many(server: Server) -> None:
    async with server.chat() as chat:
        await chat.start("x", "hang")
        await refused(chat, "limit_exceeded", "run.start", **asking("y", "hang"))


async def shows_a_bad_token(server: Server) -> None:
    async with server.chat(headers=bearer("nonsense")) as chat:
        assert (await chat.end())[0] == 4401


async def shows_a_bad_token_over_http(server: Server) -> None:
    async with server.http(user=None) as http:
        wrong = {"Authorization": "Bearer nonsense"}
        assert (await http.get("/threads", headers=wrong)).status_code == 401


@dataclasses.dataclass(frozen=True)
class Case:
    """What a client does, and the record that is expected of it."""

    kind: AuditKind
    action: Action
    resource: str
    operation: str
    outcome: str
    user: str | None = "ada"
    owner: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


EVENT = {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "forged", "seq": 1}
NO_EVENT = "events are for runs to say; a client sends commands"
WROTE = ("write to what runs share", "put back; the run failed")
STATE, HISTORY = ("GET /threads/<thread_id>/state", "GET /threads/<thread_id>/history")

CASES: tuple[Case, ...] = (
    Case(
        "user_mismatch",
        starts("writes_bobs_run"),
        "thread thread-a",
        "write a run's row",
        "stopped",
        owner="bob",
    ),
    Case("thread_mismatch", connects_to_bobs_thread, "thread bobs-own", "connect", "absent"),
    Case(
        "thread_mismatch",
        looks_at_bobs_thread,
        "thread bobs-own",
        "GET /threads/<thread_id>",
        "absent",
    ),
    Case("run_mismatch", cancels_bobs_run, "run {run}", "run.cancel", "absent"),
    Case("run_mismatch", asks_what_bobs_run_does, "run {run}", "agent.getTree", "absent"),
    Case(
        "run_mismatch",
        asks_over_http_what_bobs_run_does,
        "run {run}",
        "GET /runs/<run_id>/tree",
        "absent",
    ),
    Case(
        "user_mismatch",
        asks_for_bobs_runs,
        "runs",
        "GET /runs",
        "absent",
        owner="bob",
    ),
    Case("run_mismatch", asks_for_what_was_before_bobs_run, "run {run}", "state.get", "absent"),
    Case(
        "run_mismatch",
        asks_over_http_for_what_was_before_bobs_run("state"),
        "run {run}",
        STATE,
        "absent",
    ),
    Case(
        "run_mismatch",
        asks_over_http_for_what_was_before_bobs_run("history"),
        "run {run}",
        HISTORY,
        "absent",
    ),
    Case(
        "connection_mismatch",
        ends_bobs_subscription,
        "subscription",
        "subscription.unsubscribe",
        "absent",
    ),
    Case(
        "connection_mismatch",
        starts("takes_a_connection", new_connection_id(BOB)),
        "connection",
        "run",
        "stopped",
    ),
    Case(
        "unauthorised_access",
        comes_from_a_foreign_page,
        "WebSocket",
        "connect",
        "closed with 4403",
        user=None,
    ),
    Case(
        "unauthorised_access",
        acts_from_a_foreign_page,
        "session",
        "POST /threads",
        "answered 403",
        user=None,
    ),
    Case("invalid_context", connects_to_no_thread, "thread none", "connect", "closed with 4400"),
    Case(
        "invalid_context",
        says_who_it_is,
        "run",
        "run.start",
        "metadata must not carry the reserved keys user_id",
    ),
    Case(
        "invalid_context",
        asks("run.cancel", "invalid_argument", run_id="none"),
        "run",
        "run.cancel",
        "run_id must be a real id, and this is a placeholder",
    ),
    Case(
        "invalid_context",
        asks("state.get", "invalid_argument", before="a\nb"),
        "run",
        "state.get",
        "before must not contain control characters (U+000A)",
    ),
    Case("invalid_context", asks_over_http_for_what_was_before_none, "run none", STATE, "refused"),
    Case("invalid_context", makes_no_thread, "thread undefined", "POST /threads", "refused"),
    Case("event_injection", sends(EVENT), "event TEXT_MESSAGE_CONTENT", "send", NO_EVENT),
    Case(
        "event_injection",
        sends({"type": "event", "method": "messages", "params": {}}),
        "event event",
        "send",
        NO_EVENT,
    ),
    Case(
        "event_injection",
        sends({"id": 7, "method": "RUN_FINISHED", "params": {}}),
        "event RUN_FINISHED",
        "send",
        NO_EVENT,
    ),
    Case(
        "event_injection",
        sends({"id": 7, "method": "state.get", "type": "RUN_ERROR"}),
        "event RUN_ERROR",
        "send",
        NO_EVENT,
    ),
    Case(
        "event_injection",
        starts("speaks_as_bob_and_hides_it"),
        "thread thread-a",
        "make an emitter",
        "stopped",
        user="bob",
        owner="ada",
    ),
    Case(
        "privilege_escalation",
        would_mint_a_page_link,
        "page ticket",
        "POST /auth/tickets",
        "refused",
    ),
    Case("privilege_escalation", starts("writer"), "class Writer", *WROTE),
    Case(
        "limit_hit",
        starts("looks_twice"),
        "tool calls of a run",
        "call a tool",
        "refused",
        settings={"tool_calls": 1},
    ),
    Case(
        "limit_hit",
        starts("looks_twice"),
        "tool calls a minute",
        "call a tool",
        "refused",
        settings={"tool_calls_per_minute": 1},
    ),
    Case(
        "limit_hit",
        opens_one_socket_too_many,
        "WebSocket",
        "connect",
        "closed with 4429",
        settings={"max_connections_per_user": 1},
    ),
    Case(
        "limit_hit",
        starts_one_run_too_many,
        "runs",
        "start a run",
        "this thread already has 1 runs, of 1 that it may have",
        settings={"runs_per_thread": 1},
    ),
    Case("token_refused", shows_a_bad_token, "WebSocket", "connect", "closed with 4401", user=None),
    Case(
        "token_refused",
        shows_a_bad_token_over_http,
        "HTTP",
        "GET /threads",
        "answered 401",
        user=None,
    ),
)
DENIED = Case(
    "privilege_escalation",
    starts("looks_twice"),
    "tool look",
    "call",
    "absent",
)


def agents() -> dict[str, Body | type[Agent]]:
    bodies = (writes_bobs_run, speaks_as_bob_and_hides_it, takes_a_connection, looks_twice, hang)
    return {**{body.__name__: body for body in bodies}, "writer": makes_a_writer()}


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.kind}: {case.operation}, {case.resource}"
)
async def test_what_a_client_does_makes_one_record(case: Case, tmp_path: Path) -> None:
    sink = Kept()
    async with open_server(
        tmp_path / "data", agents(), (look,), audit_sink=sink, **case.settings
    ) as server:
        names = await case.action(server) or {}
        await sink.found()
    # All that was counted is written when the server has gone.
    [record] = await sink.find(EVERYTHING)
    check(record, case, names)
    assert record.count == 1


def check(record: AuditRecord, case: Case, names: Mapping[str, str]) -> None:
    assert (record.kind, record.user, record.claimed_owner) == (case.kind, case.user, case.owner)
    assert (record.resource, record.operation) == (case.resource.format(**names), case.operation)
    assert record.outcome == case.outcome
    assert len(record.correlation_id) == 12


async def test_a_tool_that_the_policy_denies_makes_records_that_fold(tmp_path: Path) -> None:
    sink = Kept()
    async with open_server(
        tmp_path / "data", agents(), (look,), audit_sink=sink, tool_policy=all_but_bob
    ) as server:
        await starts("looks_twice")(server)
        async with server.chat("bobs-own", "bob") as chat:
            await chat.subscribe()
            events = await chat.run("go", "looks_twice")
            said = [event["content"] for event in events if event["type"] == "TOOL_CALL_RESULT"]
            assert said == ["seen", "seen"]
    records = await sink.find(EVERYTHING)
    for record in records:
        check(record, DENIED, {})
    assert sum(record.count for record in records) == 2


def test_every_kind_is_in_the_table() -> None:
    assert {case.kind for case in CASES} == set(get_args(AuditKind))


async def test_a_flood_of_forged_events_is_two_records_and_harms_nobody(tmp_path: Path) -> None:
    sink = Kept()
    async with open_server(tmp_path / "data", audit_sink=sink) as server:
        async with server.chat() as chat, server.chat("bobs-own", "bob") as bob:
            for number in range(300):
                await chat.socket.send_message(json.dumps({**EVENT, "id": number}))
            await bob.subscribe()
            await bob.run("tokens=1")
            await chat.reply(299)
    records = await sink.find(EVERYTHING)
    assert len(records) <= 2
    assert sum(record.count for record in records) == 300
    assert {record.user for record in records} == {"ada"}


async def test_no_event_of_ag_ui_can_be_sent_by_a_client(tmp_path: Path) -> None:
    sink = Kept()
    async with open_server(tmp_path / "data", audit_sink=sink) as server:
        async with server.chat() as chat:
            for number, kind in enumerate(EventType):
                await chat.socket.send_message(json.dumps({"id": number, "type": kind.value}))
                assert (await chat.reply(number))["message"] == NO_EVENT
    counts = await sink.counts(EVERYTHING)
    assert counts == {"event_injection": len(EventType)}


@pytest.mark.parametrize(
    "frame",
    [
        {"id": 1, "method": "input.inject", "params": {}},
        {"id": 1, "method": "run.start", "params": {"input": {"messages": []}}},
        {"id": 1, "method": "run.start", "params": {"metadata": "x"}},
        {"id": 1, "method": "subscription.unsubscribe", "params": {"subscription_id": "x"}},
        {"id": 1, "type": 7},
        {"id": 1, "type": "command"},
    ],
    ids=json.dumps,
)
async def test_a_mistake_is_not_audited(frame: Mapping[str, Any], tmp_path: Path) -> None:
    sink = Kept()
    async with open_server(tmp_path / "data", audit_sink=sink) as server:
        async with server.chat() as chat:
            await chat.socket.send_message(json.dumps(frame))
            assert (await chat.reply(1))["type"] == "error"
    assert await sink.find(EVERYTHING) == []


async def test_the_33rd_command_that_waits_is_refused_and_audited(tmp_path: Path) -> None:
    release = trio.Event()

    async def lingers(run: RunContext) -> None:
        try:
            await run.emit.text("here")
            await trio.sleep_forever()
        finally:
            async with run.cleanup():
                await release.wait()

    sink = Kept()
    async with open_server(tmp_path / "data", {"lingers": lingers}, audit_sink=sink) as server:
        async with server.chat() as chat:
            await chat.subscribe()
            run_id = await chat.start("go", "lingers")
            await chat.until(lambda: chat.seen("TEXT_MESSAGE_CONTENT"))
            wanted = {"run_id": run_id, "wait": True}
            numbers = [await chat.send("run.cancel", wanted) for _ in range(33)]
            with pytest.raises(CommandError) as caught:
                await chat.result(numbers[-1])
            assert caught.value.reply["retry_after"] > 0
            release.set()
            for number in numbers[:-1]:
                await chat.result(number)
    [record] = await sink.find(EVERYTHING)
    assert (record.kind, record.user, record.resource, record.operation) == (
        "limit_hit",
        "ada",
        "commands",
        "run.cancel",
    )


class TestAnothersIdsAreAnsweredAsAbsentOnes:
    """To the byte, but for the number of the command."""

    @pytest.mark.parametrize("method", ["state.get", "run.cancel"])
    async def test_of_runs(self, server: Server, method: str) -> None:
        field = {"state.get": "before", "run.cancel": "run_id"}[method]
        ids = (await bobs_run(server), new_id())
        async with server.chat() as chat:
            shown = [await self._shown(chat, method, {field: each}) for each in ids]
        assert len(set(shown)) == 1

    async def test_of_subscriptions(self, server: Server) -> None:
        ids = (new_connection_id(BOB), new_connection_id(UserId("ada")), "x")
        async with server.chat() as chat:
            shown = [
                await self._shown(chat, "subscription.unsubscribe", {"subscription_id": each})
                for each in ids
            ]
        assert len(set(shown)) == 1

    @staticmethod
    async def _shown(chat: Chat, method: str, params: Mapping[str, Any]) -> str:
        number = await chat.send(method, params)
        await chat.reply(number)
        return chat.frames[-1].replace(f'"id":{number}', '"id":N')


@pytest.mark.parametrize(
    "frame",
    [
        {"id": 1, "method": "run.cancel", "params": {"run_id": "none"}},
        {"id": 1, "method": "run.start", "params": {**asking("x"), "metadata": {"run_id": "x"}}},
        {"id": 1, **EVENT},
    ],
    ids=["run.cancel", "run.start", "event"],
)
async def test_what_cannot_be_audited_is_answered_as_unavailable(
    frame: Mapping[str, Any], tmp_path: Path
) -> None:
    sink = TroubledSink()
    async with open_server(tmp_path / "data", audit_sink=sink) as server:
        async with server.chat() as chat:
            sink.full = True
            await chat.socket.send_message(json.dumps(frame))
            reply = await chat.reply(1)
            assert (reply["error"], "audit" in reply["message"]) == ("unavailable", True)
            sink.full = False
            await chat.socket.send_message(json.dumps({**frame, "id": 2}))
            assert (await chat.reply(2))["error"] == "invalid_argument"


async def test_a_record_of_a_socket_leads_to_its_log_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="creche")
    sink = Kept()
    async with open_server(tmp_path / "data", audit_sink=sink) as server:
        await shows_a_bad_token(server)
        await shows_a_bad_token_over_http(server)
    records = await sink.find(EVERYTHING)
    logged = [getattr(line, "correlation_id", None) for line in caplog.records]
    assert len(records) == 2
    assert {record.correlation_id for record in records} <= set(logged)
