"""Threads, tickets, health and the page over HTTP, as any client sees them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

import httpx2
import pytest
import trio
from tests.server.running import MISLEADING, CommandError, Server, open_server

import creche_server.services
from creche import RunContext


async def make_history(server: Server, user: str = "ada", thread: str = "thread-a") -> None:
    """Three runs: one that succeeds with a tool, one that fails, one that is cancelled."""
    async with server.chat(thread, user) as chat:
        await chat.subscribe()
        await chat.run('tokens=2 tool=calculator:{"expression":"1+1"}')
        await chat.run("tokens=2 fail=on purpose")
        run_id = await chat.start("hang")
        await chat.ask("run.cancel", run_id=run_id, wait=True)


def next_of(answer: httpx2.Response) -> dict[str, str]:
    """The query for what was cut off an answer."""
    address, _, relation = answer.headers["link"].partition(">; ")
    assert relation == 'rel="next"'
    return dict(parse_qsl(urlsplit(address.removeprefix("<")).query))


class TestThreads:
    async def test_are_made_and_found_again(self, server: Server) -> None:
        async with server.http() as http:
            made = await http.post("/threads", json={"thread_id": "mine", "title": "Trip"})
            assert made.status_code == 201
            thread = made.json()
            assert (thread["thread_id"], thread["title"]) == ("mine", "Trip")
            assert (thread["status"], thread["last_seq"]) == ("idle", 0)
            again = await http.post("/threads", json={"thread_id": "mine", "title": "Other"})
            assert again.status_code == 200
            assert again.json()["title"] == "Trip"
            found = (await http.get("/threads/mine")).json()
            assert found["epoch"] == thread["epoch"]
            unnamed = await http.post("/threads")
            assert unnamed.status_code == 201
            assert len(unnamed.json()["thread_id"]) == 32

    async def test_that_are_made_again_do_not_change(self, server: Server) -> None:
        async with server.http() as http:
            first = (await http.post("/threads", json={"thread_id": "mine"})).json()
            for body in ({"thread_id": "mine"}, {"thread_id": "mine", "title": ""}):
                assert (await http.post("/threads", json=body)).json() == first
            titled = {"thread_id": "mine", "title": "Trip"}
            second = (await http.post("/threads", json=titled)).json()
            assert second["title"] == "Trip"
            assert second["updated_at"] > first["updated_at"]
            for title in ("Trip", "Other"):
                again = await http.post("/threads", json=titled | {"title": title})
                assert again.json() == second

    async def test_are_listed_latest_first_and_in_pages(self, server: Server) -> None:
        async with server.http() as http:
            for number in range(5):
                await http.post("/threads", json={"thread_id": f"t{number}"})
            listed = [thread["thread_id"] for thread in (await http.get("/threads")).json()]
            assert listed == ["t4", "t3", "t2", "t1", "t0"]
            page = (await http.get("/threads?limit=2&offset=1")).json()
            assert [thread["thread_id"] for thread in page] == ["t3", "t2"]
            assert (await http.get("/threads?offset=99")).json() == []

    async def test_are_not_listed_by_a_query_that_makes_no_sense(self, server: Server) -> None:
        async with server.http() as http:
            for query in (
                *("limit=0", "limit=1001", "limit=x", "limit=-1", "limit="),
                *("offset=-1", "page=2", f"offset={10**10}", f"offset={10**20}"),
                *(f"offset={'9' * 5000}",),
            ):
                answer = await http.get(f"/threads?{query}")
                assert answer.status_code == 422, query
                assert answer.json()["message"] == "the request's query does not fit; see `details`"
                assert answer.json()["details"][0]["field"] == query.partition("=")[0]

    async def test_are_busy_while_something_runs_on_them(self, server: Server) -> None:
        async with server.chat() as chat, server.http() as http:
            first = await chat.start("hang")
            second = await chat.start("tokens=1")
            assert (await http.get("/threads/thread-a")).json()["status"] == "busy"
            state = (await http.get("/threads/thread-a/state")).json()
            assert (state["active_run"], state["queued_runs"]) == (first, [second])

    async def test_get_their_title_from_the_first_words(self, server: Server) -> None:
        async with server.chat() as chat, server.http() as http:
            await chat.start("  tokens=1 what is " + "long " * 50)
            title = (await http.get("/threads/thread-a")).json()["title"]
        assert title.startswith("tokens=1 what is")
        assert len(title) <= 80

    async def test_tell_their_state_and_history(self, server: Server) -> None:
        await make_history(server)
        async with server.http() as http:
            state = (await http.get("/threads/thread-a/state")).json()
            history = (await http.get("/threads/thread-a/history")).json()
            first = await http.get("/threads/thread-a/history?limit=1")
            page = (
                await http.get("/threads/thread-a/history?limit=1", params=next_of(first))
            ).json()
        roles = [message["role"] for message in state["values"]["messages"]]
        assert roles[:6] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
        assert state["active_run"] is None
        statuses = [entry["metadata"]["status"] for entry in history]
        assert statuses == ["cancelled", "failed", "success"]
        assert history[0]["metadata"]["receipt"]["reason"] == "user"
        assert history[1]["metadata"]["reason"] == "model_failed"
        assert history[0]["values"]["messages"] == state["values"]["messages"]
        assert len(history[2]["values"]["messages"]) == 4
        assert page == [history[1]]
        for newer, older in itertools.pairwise(history):
            assert older["metadata"]["last_seq"] + 1 == newer["metadata"]["first_seq"]

    async def test_that_are_long_are_told_in_parts(self, server: Server) -> None:
        """Seven questions of 240 KB: the whole history would be 6.7 MB, and the state 1.7 MB."""
        async with server.chat() as chat:
            await chat.subscribe()
            for number in range(7):
                await chat.run(f"tokens=1 {number} " + "x" * 240_000)
            told = await chat.ask("state.get")
            asked = await chat.ask("state.get", limit=1, before=told["earlier"])
        async with server.http() as http:
            state = await http.get("/threads/thread-a/state")
            earlier = await http.get(
                "/threads/thread-a/state", params={"before": told["earlier"], "limit": 1}
            )
            pages = [await http.get("/threads/thread-a/history")]
            while "link" in pages[-1].headers:
                pages.append(await http.get(pages[-1].headers["link"].split("<")[1].split(">")[0]))
        for answer in (state, *pages):
            assert len(answer.content) < 512 * 1024 + 10_000
        assert state.json()["values"] == told["values"]
        assert [m["content"][:10] for m in told["values"]["messages"][::2]] == [
            "tokens=1 5",
            "tokens=1 6",
        ]
        assert earlier.json()["values"] == asked["values"]
        assert asked["values"]["messages"][0]["content"].startswith("tokens=1 4")
        states = [one for page in pages for one in page.json()]
        assert len(states) == 7
        assert "earlier" not in states[-1]

    async def test_have_no_runs_before_one_that_is_not_theirs(self, server: Server) -> None:
        await make_history(server)
        async with server.chat("other") as chat, server.http() as http:
            run_id = await chat.start("tokens=1")
            for path in ("state", "history"):
                answer = await http.get(f"/threads/thread-a/{path}?before={run_id}")
                assert answer.status_code == 404
                assert answer.json()["error"] == "no_such_run"
                for query in ("limit=0", "limit=1001", "limit=x", "offset=1"):
                    answer = await http.get(f"/threads/thread-a/{path}?{query}")
                    assert answer.status_code == 422
            with pytest.raises(CommandError, match="no_such_run"):
                await chat.ask("state.get", before="none-such")

    async def test_are_deleted_with_all_they_have(self, server: Server) -> None:
        await make_history(server)
        async with server.http() as http:
            assert (await http.delete("/threads/thread-a")).status_code == 204
            for path in ("", "/state", "/history"):
                assert (await http.get(f"/threads/thread-a{path}")).status_code == 404
            assert (await http.delete("/threads/thread-a")).status_code == 404
            assert (await http.get("/threads")).json() == []
        async with server.chat() as chat:
            assert (await chat.subscribe())["replayed_events"] == 0
            await chat.run("tokens=1")
            assert chat.events[0]["seq"] == 1

    async def test_are_deleted_while_something_runs_on_them(self, server: Server) -> None:
        """The runs are cancelled first, and whoever watches is told of both."""
        async with server.chat() as chat, server.http() as http:
            await chat.subscribe()
            running = await chat.start("hang")
            queued = await chat.start("hang")
            await chat.until(lambda: chat.seen("RUN_STARTED"))
            with trio.fail_after(5):
                assert (await http.delete("/threads/thread-a")).status_code == 204
            assert (await chat.reply(None))["error"] == "no_such_thread"
            for run_id in (running, queued):
                with pytest.raises(CommandError) as info:
                    await chat.ask("run.cancel", run_id=run_id)
                assert info.value.code == "no_such_run"
            assert (await http.get("/threads/thread-a")).status_code == 404

    async def test_that_are_anothers_are_as_absent_ones(self, server: Server) -> None:
        await make_history(server, "ada", "hers")
        async with server.http("bob") as http:
            for method, path in (
                ("GET", "/threads/{}"),
                ("GET", "/threads/{}/state"),
                ("GET", "/threads/{}/history"),
                ("GET", "/threads/{}/history?limit=x"),
                ("DELETE", "/threads/{}"),
            ):
                answers = [
                    await http.request(method, path.format(name)) for name in ("hers", "none-such")
                ]
                assert [answer.status_code for answer in answers] == [404, 404]
                assert answers[0].content == answers[1].content
                assert _without_date(answers[0]) == _without_date(answers[1])
            made = await http.post("/threads", json={"thread_id": "hers"})
            assert made.status_code == 201, "to him the name is free"
            assert made.json()["last_seq"] == 0
        async with server.http() as http:
            assert (await http.get("/threads/hers")).json()["last_seq"] > 0

    async def test_have_names_that_can_stand_in_an_address(
        self,
        server: Server,
        complaints: list[str],
    ) -> None:
        """What one door let in and another did not find would be there and lost."""
        async with server.http() as http:
            for name in ("a/b", "/", ".", ".."):
                refused = await http.post("/threads", json={"thread_id": name})
                assert refused.status_code == 422, name
                (detail,) = refused.json()["details"]
                assert detail["field"] == "thread_id"
                assert "address" in detail["problem"]
                async with server.chat(path=f"/threads/{quote(name, safe='')}/stream") as chat:
                    code, reason = await chat.end()
                assert code == 4400
                assert "address" in str(reason)
            for path in ("a%2Fb", "a%2fb", "a%2Fb/state", "%2f"):
                answer = await http.get(f"/threads/{path}")
                assert answer.status_code == 400, path
                assert "slash" in answer.json()["message"]
            assert (await http.get("/threads")).json() == []

    async def test_have_names_that_could_be_one(self, server: Server) -> None:
        async with server.http() as http:
            for name in ("none", "undefined", "%20", "x" * 257, "a%00b", *map(quote, MISLEADING)):
                for method in ("GET", "DELETE"):
                    answer = await http.request(method, f"/threads/{name}")
                    assert answer.status_code == 400, (method, name)
                    assert answer.json()["error"] == "invalid_argument"

    async def test_have_names_that_mislead_nobody(self, server: Server) -> None:
        """In a log line or on a page they could pass for others."""
        async with server.http() as http:
            for name in MISLEADING:
                refused = await http.post("/threads", json={"thread_id": name})
                assert refused.status_code == 422, ascii(name)
                async with server.chat(name) as chat:
                    code, reason = await chat.end()
                assert (code, str(reason).isascii()) == (4400, True), ascii(name)
            assert (await http.get("/threads")).json() == []

    async def test_may_have_odd_names(self, server: Server) -> None:
        names = ["a b", "ünï", "a\\b", "...", "'; DROP TABLE threads; --", "%", "%2F", "a?b#c"]
        async with server.http() as http:
            for name in names:
                async with server.chat(name) as chat:
                    await chat.subscribe()
                    await chat.run("tokens=1")
                assert (await http.post("/threads", json={"thread_id": name})).status_code == 200
                for path in ("", "/state", "/history"):
                    answer = await http.get(f"/threads/{quote(name, safe='')}{path}")
                    assert answer.status_code == 200, name
            found = {thread["thread_id"] for thread in (await http.get("/threads")).json()}
        assert found == set(names)


def _without_date(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name != "date"}


class TestABody:
    async def test_that_does_not_fit_is_told_where(
        self,
        server: Server,
        complaints: list[str],
    ) -> None:
        async with server.http() as http:
            for body, field in (
                (b"{", ""),
                (b"[]", ""),
                (b"null", ""),
                (b'"x"', ""),
                (b"\xff\xfe", ""),
                (b'{"thread_id": 5}', "thread_id"),
                (b'{"title": "' + b"x" * 201 + b'"}', "title"),
                (b'{"user_id": "bob"}', "user_id"),
                (b"[" * 100_000, ""),
            ):
                answer = await http.post("/threads", content=body)
                assert answer.status_code == 422, body[:20]
                told = answer.json()
                assert told["error"] == "invalid_argument"
                assert told["message"] == "the request's body does not fit; see `details`"
                assert [detail["field"] for detail in told["details"]] == [field]
                assert all(detail["problem"] for detail in told["details"])

    @pytest.mark.parametrize("path", ["/threads", "/auth/tickets", "/agents/search"])
    async def test_that_is_too_large_is_refused(
        self,
        server: Server,
        complaints: list[str],
        path: str,
    ) -> None:
        async with server.http() as http:
            answer = await http.post(path, content=b"x" * (1024 * 1024 + 1))
        # The last of these does not look at its body.
        assert answer.status_code == (200 if path == "/agents/search" else 413)

    @pytest.mark.parametrize("path", ["/threads", "/agents/search"])
    async def test_that_nobody_reads_does_not_spoil_the_next_request(
        self,
        server: Server,
        path: str,
    ) -> None:
        """The connection goes on or is closed; it is not left there, deaf."""
        async with server.http() as http:
            await http.post(path, content=b"x" * (4 * 1024 * 1024))
            with trio.fail_after(3):
                assert (await http.get("/healthz")).status_code == 200

    async def test_that_never_ends_is_refused(self, server: Server) -> None:
        async def endless() -> Any:
            while True:
                yield b"x" * 65536

        async with server.http() as http:
            try:
                with trio.fail_after(8):
                    answer = await http.post("/threads", content=endless())
            except httpx2.TransportError:
                return  # cut off in the middle of sending is refused, too
        assert answer.status_code == 413


class TestAnAnswer:
    async def test_that_is_an_error_is_json(self, server: Server, complaints: list[str]) -> None:
        async with server.http() as http:
            for method, path, status in (
                ("GET", "/nowhere", 404),
                ("GET", "/threads/", 404),
                ("GET", "/ui/nothing.js", 404),
                ("GET", "/ui/..%2fapp.py", 400),
                ("GET", "/threads/%ff", 400),
                ("GET", "/threads/a%c3", 400),
                ("PUT", "/threads", 405),
                ("POST", "/healthz", 405),
                ("GET", "/agents/nobody", 404),
            ):
                answer = await http.request(method, path)
                assert answer.status_code == status, path
                assert answer.headers["content-type"] == "application/json"
                assert set(answer.json()) == {"error", "message"}

    async def test_at_a_chats_address_asks_for_a_websocket(self, server: Server) -> None:
        async with server.http() as http:
            for path in ("/threads/t/stream", "/threads/t/stream/events"):
                answer = await http.get(path)
                assert answer.status_code == 426
                assert answer.headers["upgrade"] == "websocket"
                assert answer.json()["message"] == "connect with a WebSocket"

    async def test_where_nothing_is_says_so_in_our_own_words(self, server: Server) -> None:
        async with server.http() as http:
            told = (await http.get("/nowhere")).json()
        assert told == {"error": "not_found", "message": "there is nothing at this address"}

    async def test_to_a_method_that_is_not_allowed_says_which_are(self, server: Server) -> None:
        """RFC 9110, section 15.5.6: a 405 must carry Allow."""
        async with server.http() as http:
            answer = await http.put("/threads")
        assert {"GET", "POST"} <= set(answer.headers.get("allow", "").replace(" ", "").split(","))

    async def test_has_the_headers_that_keep_a_page_safe(self, server: Server) -> None:
        async with server.http() as http:
            for path in ("/", "/healthz", "/threads", "/nowhere", "/ui/app.js"):
                answer = await http.get(path)
                policy = answer.headers["content-security-policy"]
                assert "default-src 'none'" in policy
                assert "frame-ancestors 'none'" in policy
                assert "unsafe" not in policy
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["referrer-policy"] == "no-referrer"
                assert "cache-control" in answer.headers
                assert "server" not in answer.headers
            assert (await http.get("/threads")).headers["cache-control"] == "no-store"

    @pytest.mark.parametrize("path", ["/threads", "/threads/x/state", "/threads/x/history"])
    async def test_of_a_failing_database_tells_nothing_of_the_inside(
        self,
        server: Server,
        path: str,
    ) -> None:
        async with server.http() as http:
            await http.post("/threads", json={"thread_id": "x"})
            break_database(server)
            answer = await http.get(path)
        assert answer.status_code == 500
        told = answer.json()
        assert told["error"] == "unknown_error"
        for word in ("Traceback", "sqlite", "SELECT", "no such table", "creche_server"):
            assert word.lower() not in answer.text.lower()

    async def test_of_a_failing_database_can_be_found_in_the_log(
        self,
        server: Server,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async with server.http() as http:
            break_database(server)
            answer = await http.get("/threads/secret-thread-name")
        reference = answer.json()["message"].rpartition(" ")[2]
        (record,) = [r for r in caplog.records if getattr(r, "correlation_id", "") == reference]
        assert record.exc_info is not None

    async def test_of_a_failing_database_over_the_websocket_tells_nothing_either(
        self,
        server: Server,
    ) -> None:
        async with server.chat() as chat:
            break_database(server)
            for method in ("state.get", "subscription.subscribe"):
                with pytest.raises(CommandError) as info:
                    await chat.ask(method)
                assert "no such table" not in json.dumps(info.value.reply)


def break_database(server: Server) -> None:
    """Take the tables away, as nobody should."""
    with contextlib.closing(sqlite3.connect(server.settings.data / "creche.db")) as other:
        for table in ("chunks", "messages", "runs", "threads"):
            other.execute(f"DROP TABLE {table}")


async def test_a_304_does_not_spoil_the_next_request(server: Server) -> None:
    """A server that closes behind an answer says so, or the client's next request is lost."""
    async with server.http() as http:
        first = await http.get("/ui/app.js")
        tag = {"If-None-Match": first.headers["etag"]}
        for _ in range(3):
            assert (await http.get("/ui/app.js", headers=tag)).status_code == 304


class TestHealth:
    async def test_is_for_everybody(self, server: Server) -> None:
        async with server.http(None) as http:
            assert (await http.get("/healthz")).json() == {"status": "ok"}
            assert (await http.get("/readyz")).json() == {"status": "ready"}


class TestMetrics:
    async def test_are_for_everybody_in_prometheuss_format(self, server: Server) -> None:
        async with server.http(None) as http:
            answer = await http.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.text.endswith("\n")
        lines = answer.text.splitlines()
        for name in ("creche_process_global_state", "creche_runs_live"):
            assert any(line.startswith(f"# HELP {name} ") for line in lines)
            assert f"# TYPE {name} gauge" in lines
        told = gauges(answer.text)
        assert set(told) == {
            'creche_process_global_state{package="creche"}',
            SERVERS_STATE,
            "creche_runs_live",
        }
        assert all(re.fullmatch(r"\d+", value) for value in told.values())
        assert len(lines) == 7, "whatever is new here is to be documented, and of no user"

    async def test_count_the_runs_that_are_live(self, server: Server) -> None:
        async with server.chat() as chat, server.http(None) as http:
            await chat.start("hang")
            await chat.start("tokens=1")
            assert gauges((await http.get("/metrics")).text)["creche_runs_live"] == "2"

    async def test_count_what_a_leak_adds_to_the_modules(
        self,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async with server.http(None) as http:
            before = int(gauges((await http.get("/metrics")).text)[SERVERS_STATE])
            monkeypatch.setattr(creche_server.services, "_CACHE", {}, raising=False)
            monkeypatch.setattr(creche_server.services.Services, "seen", [], raising=False)
            after = int(gauges((await http.get("/metrics")).text)[SERVERS_STATE])
        assert after == before + 2

    async def test_grow_by_nothing_with_runs(self, server: Server) -> None:
        async with server.chat() as chat, server.http(None) as http:
            await chat.subscribe()
            await chat.run('tokens=2 tool=calculator:{"expression":"1+1"}')
            before = gauges((await http.get("/metrics")).text)
            for _ in range(3):
                await chat.run("tokens=2")
            assert gauges((await http.get("/metrics")).text) == before


SERVERS_STATE: Final = 'creche_process_global_state{package="creche_server"}'


def gauges(text: str) -> dict[str, str]:
    """{name: value} of what Prometheus would read."""
    told = [line.split(" ") for line in text.splitlines() if not line.startswith("#")]
    return dict(told)


class TestAgents:
    async def test_are_listed_and_described(self, server: Server) -> None:
        async with server.http() as http:
            (agent,) = (await http.post("/agents/search")).json()
            assert (await http.get("/agents/assistant")).json() == agent
            assert agent["agent_id"] == "assistant"
            assert agent["description"]

    async def test_are_not_for_strangers(self, server: Server) -> None:
        async with server.http(None) as http:
            assert (await http.post("/agents/search")).status_code == 401
            assert (await http.get("/agents/assistant")).status_code == 401


async def test_a_thread_that_is_deleted_again_and_again_while_it_is_used_is_never_half_there(
    tmp_path: Path,
) -> None:
    """Starts, reads and deletions of one thread at once; at the end all is in order."""

    async def talk(run: RunContext) -> None:
        for number in range(5):
            await run.emit.text(f"{number} ")
            await trio.lowlevel.checkpoint()

    async with open_server(tmp_path, {"talk": talk}) as server, server.http() as http:
        going = True

        async def start_again_and_again() -> None:
            async with server.chat("torn") as chat:
                while going:
                    await chat.start("go", "talk")

        async def look_again_and_again() -> None:
            while going:
                answer = await http.get("/threads/torn/history")
                assert answer.status_code in {200, 404}, answer.text

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start_again_and_again)
            nursery.start_soon(look_again_and_again)
            for _ in range(15):
                with trio.move_on_after(5) as patience:
                    assert (await http.delete("/threads/torn")).status_code in {204, 404}
                assert not patience.cancelled_caught, "whoever deletes never gets his turn"
            going = False
        async with server.chat("torn") as chat:
            await chat.subscribe()
            run = await chat.run("go", "talk")
            assert run[-1]["type"] == "RUN_FINISHED"
            seqs = [event["seq"] for event in chat.events]
            assert seqs == [*range(1, len(seqs) + 1)]
