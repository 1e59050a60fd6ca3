"""What the server audits: over real sockets, before the answer or after it."""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.core.test_audit import TroubledSink
from tests.server import bare
from tests.server.running import (
    Chat,
    CommandError,
    Server,
    eventually,
    open_server,
    settings_for,
)
from tests.small_world import hang
from tests.store_contract import BOB, T1, commit, record

from creche import (
    AuditQuery,
    AuditRecord,
    AuditTamperedError,
    Journals,
    JsonlSink,
    MemorySink,
    MemoryStore,
    ThreadId,
    UserId,
    leaves,
    new_id,
    open_audit,
)
from creche_server.audit import audit_file, audit_key
from creche_server.data_directory import AlreadyServedError, locked_file
from creche_server.database import SqlStore, open_sql_sink
from creche_server.http.afterwards import AfterReplies
from creche_server.lookups import MOST_WAITING, MOST_WAITING_PER_USER, Lookups
from creche_server.serve import Stop, serve

EVERYTHING = AuditQuery()


def sink_of(server: Server) -> JsonlSink:
    """The audit of a server that runs, as anybody with the files sees it."""
    return JsonlSink(audit_file(server.settings.data))


async def audited(server: Server) -> list[AuditRecord]:
    return await sink_of(server).find(EVERYTHING)


async def kinds(server: Server) -> list[tuple[str, str | None]]:
    return [(found.kind, found.user) for found in await audited(server)]


async def settled(server: Server) -> list[AuditRecord]:
    """The audit once whatever was asked before this has been looked up: they come in order."""
    async with server.http(user="witness") as http:
        async with server.http(user="owner") as other:
            mine = f"probe-{new_id()}"
            assert (await other.post("/threads", json={"thread_id": mine})).status_code == 201
        assert (await http.get(f"/threads/{mine}")).status_code == 404
    found: list[AuditRecord] = []
    with trio.fail_after(5):
        while not any(r.user == "witness" and mine in r.resource for r in found):
            await trio.sleep(0.005)
            found = await audited(server)
    return [r for r in found if r.user != "witness"]


def bearer(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"Authorization", f"Bearer {token}".encode())]


class TestARefusedToken:
    @pytest.mark.parametrize("token", ["nonsense", "creche_nonsense.sk-abcdefghijkl"])
    async def test_over_http_is_audited(self, server: Server, token: str) -> None:
        async with server.http(user=None) as http:
            refused = await http.get("/threads", headers={"Authorization": f"Bearer {token}"})
        assert refused.status_code == 401
        [found] = await audited(server)
        assert (found.kind, found.user, found.operation) == ("token_refused", None, "GET /threads")
        assert token.encode() not in audit_file(server.settings.data).read_bytes()

    async def test_that_has_expired_is_audited_too(self, server: Server) -> None:
        async with server.http(user=None) as http:
            token = server.token(seconds=-1)
            refused = await http.get("/threads", headers={"Authorization": f"Bearer {token}"})
        assert refused.status_code == 401
        assert await kinds(server) == [("token_refused", None)]

    async def test_over_a_websocket_is_audited_before_the_close(self, server: Server) -> None:
        async with server.chat(headers=bearer("nonsense")) as chat:
            code, _ = await chat.end()
            assert code == 4401
            assert await kinds(server) == [("token_refused", None)]

    async def test_and_a_ticket_used_twice_are_audited(self, server: Server) -> None:
        async with server.http() as http:
            ticket = (await http.post("/auth/tickets")).json()["ticket"]
        path = f"/threads/x/stream?ticket={ticket}"
        async with server.chat(headers=[], path=path):
            pass
        assert await audited(server) == []
        async with server.chat(headers=[], path=path) as chat:
            assert (await chat.end())[0] == 4401
        [found] = await audited(server)
        assert found.kind == "token_refused"
        assert ticket.encode() not in audit_file(server.settings.data).read_bytes()

    async def test_of_a_page_link_and_of_a_session_are_audited(self, server: Server) -> None:
        async with server.http(user=None) as http:
            assert (await http.get("/?ticket=nonsense")).status_code == 401
            http.cookies.set(server.auth.session_cookie, "nonsense")
            assert (await http.get("/")).status_code == 401
        assert [found.resource for found in await audited(server)] == ["ticket", "session"]

    async def test_is_not_one_that_was_not_sent(self, server: Server) -> None:
        async with server.http(user=None) as http:
            assert (await http.get("/threads")).status_code == 401
            assert (await http.get("/")).status_code == 401
        async with server.chat(headers=[]) as chat:
            assert (await chat.end())[0] == 4401
        assert await audited(server) == []

    async def test_again_and_again_is_one_record_and_another_at_the_end(
        self,
        tmp_path: Path,
    ) -> None:
        async with open_server(tmp_path / "data") as server:
            async with server.http(user=None) as http:
                for _ in range(30):
                    await http.get("/threads", headers={"Authorization": "Bearer nonsense"})
            assert [found.count for found in await audited(server)] == [1]
            await server.shut_down()
            assert [found.count for found in await audited(server)] == [1, 29]
            check = await sink_of(server).check(audit_key(server.settings.data))
            assert (check.records, check.flaws) == (2, ())


class TestRefusals:
    async def test_of_a_foreign_origin_are_audited(self, server: Server) -> None:
        headers = [*bearer(server.token()), (b"Origin", b"https://evil.example")]
        async with server.chat(headers=headers) as chat:
            assert (await chat.end())[0] == 4403
        async with server.http(user=None) as http:
            http.cookies.set(server.auth.session_cookie, server.auth.mint_session(UserId("ada")))
            evil = {"Origin": "https://evil.example"}
            assert (await http.post("/threads", headers=evil)).status_code == 403
        found = await audited(server)
        assert [(r.kind, r.resource) for r in found] == [
            ("unauthorised_access", "WebSocket"),
            ("unauthorised_access", "session"),
        ]

    async def test_of_one_connection_too_many_are_audited(self, tmp_path: Path) -> None:
        async with open_server(tmp_path / "data", max_connections_per_user=1) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                async with server.chat() as another:
                    assert (await another.end())[0] == 4429
            [found] = await audited(server)
            assert (found.kind, found.user) == ("limit_hit", "ada")
            assert found.outcome == "closed with 4429"

    async def test_of_a_full_house_are_audited(self, tmp_path: Path) -> None:
        async with open_server(tmp_path / "data", max_connections=1) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                async with await server.connect() as stream:
                    answer = await bare.read_all(stream)
                    assert answer.startswith(b"HTTP/1.1 503")
            [found] = await audited(server)
            assert (found.kind, found.resource) == ("limit_hit", "connections")

    async def test_of_an_invalid_id_are_audited(self, server: Server) -> None:
        async with server.chat("none") as chat:
            assert (await chat.end())[0] == 4400
        async with server.http() as http:
            for path in ("/threads/%00", "/threads/none/state"):
                assert (await http.get(path)).status_code == 400
            assert (await http.delete("/threads/none")).status_code == 400
            made = await http.post("/threads", json={"thread_id": "undefined"})
            assert made.status_code == 422
        found = await audited(server)
        assert {(r.kind, r.user) for r in found} == {("invalid_context", "ada")}
        assert [r.resource for r in found] == [
            "thread none",
            r"thread \x00",
            "thread none",
            "thread none",
            "thread undefined",
        ]

    async def test_of_a_wrong_address_are_not(self, server: Server) -> None:
        async with server.chat(path="/elsewhere") as chat:
            assert (await chat.end())[0] == 4400
        assert await audited(server) == []

    async def test_of_one_run_too_many_are_audited(self, tmp_path: Path) -> None:
        async with open_server(tmp_path / "data", {"hang": hang}, runs_per_user=1) as server:
            async with server.chat() as chat:
                await chat.start("x", "hang")
                with pytest.raises(CommandError) as caught:
                    await chat.start("y", "hang")
                assert caught.value.code == "limit_exceeded"
            [found] = await audited(server)
            assert (found.kind, found.user, found.resource) == ("limit_hit", "ada", "runs")
            assert len(found.correlation_id) == 12

    async def test_of_a_session_that_would_mint_sessions_are_audited(self, server: Server) -> None:
        async with server.http(user=None) as http:
            http.cookies.set(server.auth.session_cookie, server.auth.mint_session(UserId("ada")))
            minted = await http.post("/auth/tickets", json={"purpose": "page"})
        assert minted.status_code == 401
        assert await kinds(server) == [("privilege_escalation", "ada")]


class TestAnothersIds:
    REQUESTS = (
        ("GET", "/threads/{}"),
        ("GET", "/threads/{}/state"),
        ("GET", "/threads/{}/history"),
        ("DELETE", "/threads/{}"),
    )

    async def test_are_answered_over_http_as_absent_ones_to_the_byte_and_audited(
        self,
        server: Server,
    ) -> None:
        async with server.http(user="bob") as bob:
            assert (await bob.post("/threads", json={"thread_id": "bobs-own"})).status_code == 201
        async with server.http() as ada:
            for method, path in self.REQUESTS:
                answers = []
                for thread in ("bobs-own", "nobodys-"):
                    reply = await ada.request(method, path.format(thread))
                    headers = {k: v for k, v in reply.headers.items() if k != "date"}
                    answers.append((reply.status_code, headers, reply.content))
                assert answers[0] == answers[1]
                assert answers[0][0] == 404
        found = await settled(server)
        assert [(r.kind, r.user, r.resource, r.operation) for r in found] == [
            ("thread_mismatch", "ada", "thread bobs-own", f"{method} {path}".format("<thread_id>"))
            for method, path in self.REQUESTS
        ]
        assert "bob" not in {r.claimed_owner for r in found}, "whose it is is nobody's business"

    async def test_of_runs_are_answered_over_the_websocket_as_absent_ones_and_audited(
        self,
        server: Server,
    ) -> None:
        async with server.chat("bobs-own", "bob") as chat:
            await chat.subscribe()
            run_id = await chat.start("tokens=1")
            await chat.finished(run_id)
        absent = new_id()
        async with server.chat("adas-own") as chat:
            replies = []
            for wanted in (run_id, absent):
                for wait in (True, False):
                    number = await chat.send("run.cancel", {"run_id": wanted, "wait": wait})
                    await chat.reply(number)
                    replies.append(chat.frames[-1].replace(f'"id":{number}', '"id":N'))
            assert len(set(replies)) == 1, replies
        found = await settled(server)
        assert {(r.kind, r.user, r.resource, r.operation) for r in found} == {
            ("run_mismatch", "ada", f"run {run_id}", "run.cancel"),
        }

    async def test_of_threads_are_empty_over_the_websocket_like_absent_ones_and_audited(
        self,
        server: Server,
    ) -> None:
        async with server.chat("bobs-own", "bob") as chat:
            await chat.subscribe()
            await chat.run("tokens=1")
        shown: list[list[str]] = []
        for thread in ("bobs-own", "nobodys-"):
            async with server.chat(thread) as chat:
                await self._look_around(chat)
                shown.append([without_random_ids(frame) for frame in chat.frames])
        assert shown[0] == shown[1]
        found = await settled(server)
        assert [(r.kind, r.user, r.resource, r.operation) for r in found] == [
            ("thread_mismatch", "ada", "thread bobs-own", "connect"),
        ]

    async def _look_around(self, chat: Chat) -> None:
        await chat.subscribe()
        await chat.ask("state.get")
        with pytest.raises(CommandError):
            await chat.ask("run.cancel", run_id="run-that-is-absent")

    async def test_that_are_also_ones_own_are_not_audited(self, server: Server) -> None:
        for user in ("bob", "ada", "ada"):
            async with server.chat("main", user) as chat:
                await chat.subscribe()
                await chat.run("tokens=1")
        found = await settled(server)
        # Ada's first time there it was bob's and not yet hers.
        assert [(r.user, r.resource, r.count) for r in found] == [("ada", "thread main", 1)]


def without_random_ids(frame: str) -> str:
    return re.sub(r'("(?:subscription_id|epoch)":)"[0-9a-f-]+"', r'\1"..."', frame)


class TestLookUps:
    async def test_that_wait_are_bounded_and_what_is_over_is_counted(self) -> None:
        sink, store = MemorySink(), MemoryStore()
        async with open_audit(sink) as audit:
            lookups = Lookups(store, audit)
            for number in range(500):
                lookups.ask("thread", f"thread {number}", UserId("eve"), "look")
            assert len(lookups._waiting) == MOST_WAITING_PER_USER
            for number in range(1000):
                lookups.ask("run", "run", UserId(f"user-{number % 50}"), "look")
            assert len(lookups._waiting) == MOST_WAITING
        counts = await sink.counts(EVERYTHING)
        assert counts == {"limit_hit": 1500 - MOST_WAITING}

    async def test_that_are_left_when_the_server_goes_are_counted(self) -> None:
        sink, store = MemorySink(), MemoryStore()
        async with open_audit(sink) as audit:
            lookups = Lookups(store, audit)
            lookups.ask("thread", "x", UserId("eve"), "look")
            with trio.CancelScope() as scope:
                scope.cancel()
                await lookups.serve()
        assert await sink.counts(EVERYTHING) == {"limit_hit": 1}

    async def test_are_made_by_one_task_in_order_and_survive_a_store_that_is_away(self) -> None:
        sink, store = MemorySink(), AwayStore()
        await store.commit([commit(BOB, runs=(record(user=BOB),))])
        async with open_audit(sink) as audit, trio.open_nursery() as nursery:
            lookups = Lookups(store, audit)
            nursery.start_soon(lookups.serve)
            store.away = True
            lookups.ask("thread", T1, UserId("ada"), "first")
            await trio.testing.wait_all_tasks_blocked()
            store.away = False
            lookups.ask("thread", T1, UserId("ada"), "second")
            lookups.ask("run", "run-a", UserId("ada"), "third")
            lookups.ask("run", "run-a", BOB, "his own")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        found = await sink.find(EVERYTHING)
        assert [(r.kind, r.operation, r.outcome) for r in found] == [
            ("limit_hit", "first", "not looked up"),
            ("thread_mismatch", "second", "absent"),
            ("run_mismatch", "third", "absent"),
        ]

    @pytest.mark.parametrize("own", ["before", "after", "never"])
    async def test_pass_over_what_was_the_askers_own_when_they_asked(self, own: str) -> None:
        sink, store = MemorySink(), MemoryStore()
        await store.commit([commit(BOB)])
        async with open_audit(sink) as audit, trio.open_nursery() as nursery:
            lookups = Lookups(store, audit)
            if own == "before":
                await store.commit([commit()])
            lookups.ask("thread", T1, UserId("ada"), "connect")
            if own == "after":
                await store.commit([commit()])
            nursery.start_soon(lookups.serve)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        expected = {} if own == "before" else {"thread_mismatch": 1}
        assert await sink.counts(EVERYTHING) == expected

    async def test_keep_no_reply_waiting(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Nor the server, when it goes."""
        asked: list[object] = []

        async def never(_: object, *question: object) -> bool:
            asked.append(question)
            await trio.sleep_forever()
            return True

        monkeypatch.setattr(SqlStore, "is_anothers", never)
        async with open_server(tmp_path / "data") as server:
            async with server.chat() as chat, server.http() as http:
                await chat.subscribe()
                with pytest.raises(CommandError):
                    await chat.ask("run.cancel", run_id="absent")
                assert (await http.get("/threads/absent")).status_code == 404
            await eventually(lambda: bool(asked), "the first look-up began")
            await server.shut_down()
            counts = await sink_of(server).counts(EVERYTHING)
            assert counts == {"limit_hit": 3}, "they are counted as not looked up"

    async def test_come_after_the_last_byte_of_the_reply(self) -> None:
        order: list[str] = []

        async def app(scope: Any, _: Any, send: Any) -> None:
            scope["creche.afterwards"].append(lambda: order.append("asked"))
            for part in ("head", "body"):
                await send(part)

        async def send(part: str) -> None:
            await trio.lowlevel.checkpoint()
            order.append(part)

        whole: Any = AfterReplies(app)
        await whole({}, None, send)
        assert order == ["head", "body", "asked"]


class AwayStore(MemoryStore):
    away = False

    async def is_anothers(self, *question: Any) -> bool:
        if self.away:
            msg = "the store is away"
            raise OSError(msg)
        return await super().is_anothers(*question)


class TestAnAuditThatCannotBeWritten:
    async def test_lets_nobody_into_a_full_house_either(self, tmp_path: Path) -> None:
        sink = TroubledSink()
        async with open_server(tmp_path / "data", audit_sink=sink, max_connections=1) as server:
            sink.full = True
            async with server.chat() as chat:
                await chat.subscribe()
                async with await server.connect() as stream:
                    assert (await bare.read_all(stream)).startswith(b"HTTP/1.1 503")

    async def test_fails_the_refusals_themselves(self, tmp_path: Path) -> None:
        sink = TroubledSink()
        async with open_server(tmp_path / "data", audit_sink=sink) as server:
            sink.full = True
            async with server.http(user=None) as http:
                wrong = {"Authorization": "Bearer nonsense"}
                refused = await http.get("/threads", headers=wrong)
                assert (refused.status_code, refused.json()["error"]) == (503, "unavailable")
                http.cookies.set(
                    server.auth.session_cookie, server.auth.mint_session(UserId("ada"))
                )
                evil = {"Origin": "https://evil.example"}
                assert (await http.post("/threads", headers=evil)).status_code == 503
                assert (await http.get("/threads/none")).status_code == 503
            async with server.chat(headers=bearer("nonsense")) as chat:
                code, reason = await chat.end()
                assert code == 1011
                assert "audit" in str(reason)
            sink.full = False
            async with server.http(user=None) as http:
                assert (await http.get("/threads", headers=wrong)).status_code == 401

    async def test_fails_what_would_have_been_done(self, tmp_path: Path) -> None:
        """A used link opened once more by who has a session, and the run that a limit refused."""
        sink = TroubledSink()
        async with open_server(
            tmp_path / "data", {"hang": hang}, audit_sink=sink, runs_per_user=1
        ) as server:
            sink.full = True
            async with server.http(user=None) as http:
                http.cookies.set(
                    server.auth.session_cookie, server.auth.mint_session(UserId("ada"))
                )
                opened = await http.get("/?ticket=used", follow_redirects=False)
                assert opened.status_code == 503
                sink.full = False
                opened = await http.get("/?ticket=used", follow_redirects=False)
                assert opened.status_code == 303
                sink.full = True
            async with server.chat() as chat:
                await chat.start("x", "hang")
                with pytest.raises(CommandError) as caught:
                    await chat.start("y", "hang")
                assert caught.value.code == "unavailable"

    async def test_leaves_whoever_may_do_what_they_do_alone(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        sink = TroubledSink()
        async with open_server(tmp_path / "data", audit_sink=sink) as server:
            sink.full = True
            async with server.chat() as chat, server.http() as http:
                await chat.subscribe()
                await chat.run("tokens=3")
                assert (await http.get("/threads/absent-one")).status_code == 404
            async with server.chat("another", headers=bearer("nonsense")) as chat:
                await chat.end()
        errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert errors[0] == "the audit cannot be written"
        assert "1 occurrences could not be written to the audit" in errors

    async def test_keeps_a_server_from_starting(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        async with open_server(data) as server:
            async with server.http(user=None) as http:
                await http.get("/threads", headers={"Authorization": "Bearer nonsense"})
        audit_file(data).write_bytes(b"")
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            async with open_server(data):
                pass
        faults = [leaf for leaf in leaves(caught.value) if not isinstance(leaf, trio.Cancelled)]
        assert any(isinstance(leaf, AuditTamperedError) for leaf in faults), faults


async def test_the_audit_may_be_kept_in_the_database(tmp_path: Path) -> None:
    async with open_server(tmp_path / "data", audit="database") as server:
        async with server.http(user=None) as http:
            await http.get("/threads", headers={"Authorization": "Bearer nonsense"})
        assert not audit_file(server.settings.data).exists()
        async with open_sql_sink(server.settings.database_url, migrates=False) as sink:
            assert await sink.counts(EVERYTHING) == {"token_refused": 1}
            assert (await sink.check(audit_key(server.settings.data))).flaws == ()


async def test_no_route_tells_anything_of_the_audit(server: Server) -> None:
    async with server.http(user=None) as http:
        await http.get("/threads", headers={"Authorization": "Bearer nonsense"})
    async with server.http() as http:
        for path in ("/audit", "/audit.jsonl", "/ui/audit.jsonl"):
            assert (await http.get(path)).status_code == 404
        assert (await http.get("/ui/..%2faudit.jsonl")).status_code == 400


async def test_a_subscription_that_was_handed_anothers_journal_shows_nothing_and_is_audited(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The leak is planted: ada is attached to bob's thread."""
    async with server.chat("bobs-own", "bob") as chat:
        await chat.subscribe()
        await chat.run("tokens=1 canary-of-bob")
    real = Journals.attached

    def leaking(journals: Journals, *_: object) -> Any:
        return real(journals, UserId("bob"), ThreadId("bobs-own"))

    monkeypatch.setattr(Journals, "attached", leaking)
    async with server.chat("adas-own") as chat:
        with pytest.raises(CommandError) as caught:
            await chat.subscribe()
        assert caught.value.code == "unknown_error"
        assert "bob" not in "".join(chat.frames)
    found: Sequence[AuditRecord] = ()

    async def is_there() -> bool:
        nonlocal found
        found = await audited(server)
        return bool(found)

    with trio.fail_after(5):
        while not await is_there():
            await trio.sleep(0.005)
    assert [(r.kind, r.user, r.claimed_owner) for r in found] == [("user_mismatch", "ada", "bob")]


@pytest.mark.parametrize("where", ["file", "database"])
async def test_a_server_that_finds_the_database_claimed_has_not_touched_it(
    where: str, tmp_path: Path
) -> None:
    """Not even for the audit's tables: an older server may be at work on it."""
    path = tmp_path / "shared.db"
    settings = settings_for(tmp_path / "two", database=f"sqlite:///{path}", audit=where)
    with locked_file(f"{path}.lock", "it is taken"):
        with pytest.RaisesGroup(AlreadyServedError, flatten_subgroups=True, allow_unwrapped=True):
            await serve(settings, stop=Stop())
        with contextlib.closing(sqlite3.connect(path)) as database:
            assert database.execute("SELECT name FROM sqlite_master").fetchall() == []
    assert not audit_file(settings.data).exists()
