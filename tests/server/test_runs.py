"""Runs over HTTP and `agent.getTree`: whose they are, what they do, how one is stopped."""

from __future__ import annotations

import contextlib
import gc
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.server.running import CommandError, Server, eventually, open_server
from tests.small_world import context, hang

from creche import AuditQuery, MemorySink, RunContext, Supervisor, tool
from creche._task_tree import tasks_below
from creche_server.http import runs

CANARIES = {"ada": "canary-of-ada", "bob": "canary-of-bob"}


@tool
async def search(words: str) -> str:
    """Search for ever."""
    del words
    await trio.sleep_forever()
    return ""


async def searching(run: RunContext) -> None:
    said = CANARIES[run.context.user_id]
    await run.emit.text(said)
    await run.call_tool("search", {"words": said})


async def boss(run: RunContext) -> None:
    await run.spawn("searching", CANARIES[run.context.user_id])


async def slow_to_go(run: RunContext) -> None:
    try:
        await trio.sleep_forever()
    finally:
        async with run.cleanup():
            await trio.sleep(0.2)


async def stubborn(run: RunContext) -> None:
    await run.emit.text("here")
    with trio.CancelScope(shield=True):
        await trio.sleep(3)


AGENTS = {
    "searching": searching,
    "boss": boss,
    "hang": hang,
    "slow_to_go": slow_to_go,
    "stubborn": stubborn,
}


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
async def server(tmp_path: Path, sink: MemorySink) -> AsyncIterator[Server]:
    """A server whose operator is called olga."""
    async with open_server(
        tmp_path / "data", AGENTS, tools=(search,), audit_sink=sink, operators=("olga",)
    ) as running:
        yield running


@contextlib.asynccontextmanager
async def two_at_work(server: Server) -> AsyncIterator[dict[str, str]]:
    """Ada's boss and Bob's searcher, both in their tool; {user: run id}."""
    async with server.chat("rome", "ada") as ada, server.chat("taxes", "bob") as bob:
        for chat in (ada, bob):
            await chat.subscribe()
        ids = {
            "ada": await ada.start(CANARIES["ada"], "boss"),
            "bob": await bob.start(CANARIES["bob"], "searching"),
        }
        for chat in (ada, bob):
            await chat.until(lambda chat=chat: chat.seen("TOOL_CALL_END"))  # type: ignore[misc]
        yield ids


def doing(tree: dict[str, Any]) -> list[Any]:
    """Kinds and names, nested."""
    return [(each["kind"], each["name"], doing(each)) for each in tree.get("doing", ())]


BOSS: list[Any] = [("subagent", "searching", [("tool", "search", [])])]


class TestATree:
    async def test_is_told_to_the_runs_owner_at_both_addresses(self, server: Server) -> None:
        async with two_at_work(server) as ids, server.http("ada") as http:
            for path in ("/runs/{}/tree", "/threads/rome/runs/{}/tree"):
                tree = (await http.get(path.format(ids["ada"]))).json()
                assert doing(tree) == BOSS
                assert (tree["status"], tree["agent"], tree["task_count"]) == ("running", "boss", 1)
                [task] = tree["tasks"]
                assert task["at"].startswith(f"{__name__}.search:")

    async def test_of_another_is_absent_in_the_same_words_and_audited(
        self, server: Server, sink: MemorySink
    ) -> None:
        async with two_at_work(server) as ids, server.http("bob") as http:
            told = [
                await http.get(path)
                for path in (
                    f"/runs/{ids['ada']}/tree",
                    "/runs/nobodys/tree",
                    f"/threads/taxes/runs/{ids['ada']}/tree",
                    f"/threads/rome/runs/{ids['ada']}/tree",
                    f"/threads/rome/runs/{ids['ada']}",
                    f"/runs/{ids['ada']}/tree?user=ada",
                    f"/runs/{ids['bob']}/tree?user=ada",
                )
            ]
            cancelled = await http.post(f"/threads/rome/runs/{ids['ada']}/cancel")
            assert {(each.status_code, each.text) for each in (*told, cancelled)} == {
                (404, told[0].text)
            }
            assert told[0].json() == {"error": "no_such_run", "message": "there is no such run"}
            listing = await http.get("/threads/rome/runs")
            assert (listing.status_code, listing.json()["error"]) == (404, "not_found")
            async with server.http("ada") as owners:
                tree = (await owners.get(f"/runs/{ids['ada']}/tree")).json()
                assert tree["status"] == "running"
        found = {(each.kind, each.user, each.resource) for each in await sink.find(AuditQuery())}
        assert ("run_mismatch", "bob", f"run {ids['ada']}") in found
        assert ("user_mismatch", "bob", "runs") in found
        assert not [each for each in found if "nobodys" in each[2]]

    async def test_of_a_run_that_is_over_is_empty(self, server: Server) -> None:
        async with server.chat("rome", "ada") as chat, server.http("ada") as http:
            run_id = await chat.start("go", "hang")
            await chat.ask("run.cancel", run_id=run_id, wait=True)
            for path in (f"/runs/{run_id}/tree", f"/threads/rome/runs/{run_id}/tree"):
                tree = (await http.get(path)).json()
                assert (tree["status"], tree["reason"]) == ("cancelled", "user")
                assert (tree["doing"], tree["tasks"], tree["task_count"]) == ([], [], 0)
            told = await chat.ask("agent.getTree", run_id=run_id)
            assert told["tree"]["status"] == "interrupted"
            assert told["tree"]["metadata"]["creche"]["tasks"] == []
            assert await chat.ask("agent.getTree") == {
                "tree": {"namespace": [], "status": "completed", "graph_name": "", "children": []}
            }

    async def test_over_the_websocket_is_the_protocols_with_ours_in_its_metadata(
        self, server: Server
    ) -> None:
        async with two_at_work(server) as ids, server.chat("rome", "ada") as chat:
            queued = await chat.start("later", "hang")
            one = (await chat.ask("agent.getTree", run_id=ids["ada"]))["tree"]
            assert (one["namespace"], one["status"], one["graph_name"]) == ([], "running", "boss")
            assert [each["namespace"] for each in one["children"]] == [["searching:1"]]
            assert doing(one["metadata"]["creche"]) == BOSS
            thread = (await chat.ask("agent.getTree"))["tree"]
            assert [each["namespace"] for each in thread["children"]] == [[ids["ada"]], [queued]]
            assert [each["status"] for each in thread["children"]] == ["running", "started"]
            assert thread["graph_name"] == "boss"
            for other in (ids["bob"], "nobodys"):
                with pytest.raises(CommandError) as refused:
                    await chat.ask("agent.getTree", run_id=other)
                assert (refused.value.code, refused.value.reply["message"]) == (
                    "no_such_run",
                    "there is no such run on this thread",
                )

    async def test_is_found_on_its_own_thread_only(self, server: Server) -> None:
        async with two_at_work(server) as ids, server.chat("paris", "ada") as chat:
            await chat.start("tokens=1")
            async with server.http("ada") as http:
                for path in ("tree", ""):
                    found = await http.get(f"/threads/paris/runs/{ids['ada']}/{path}".rstrip("/"))
                    assert (found.status_code, found.json()["error"]) == (404, "no_such_run")
                stopped = await http.post(f"/threads/paris/runs/{ids['ada']}/cancel?wait=1")
                assert stopped.status_code == 404
                assert (await http.get(f"/runs/{ids['ada']}/tree")).json()["status"] == "running"
            with pytest.raises(CommandError, match="no_such_run"):
                await chat.ask("agent.getTree", run_id=ids["ada"])

    async def test_is_not_told_to_nobody(self, server: Server) -> None:
        async with server.http(None) as http:
            for path in ("/runs", "/runs/r/tree", "/threads/t/runs/r/tree?x=1", "/threads/t/runs"):
                assert (await http.get(path)).status_code == 401


class TestAnOperator:
    async def test_sees_everybodys_runs_and_others_their_own(self, server: Server) -> None:
        async with two_at_work(server) as ids:
            for user, expected in (
                ("olga", [("ada", ids["ada"]), ("bob", ids["bob"])]),
                ("ada", [("ada", ids["ada"])]),
                ("bob", [("bob", ids["bob"])]),
                ("carol", []),
            ):
                async with server.http(user) as http:
                    seen = (await http.get("/runs")).json()
                assert [(run["user_id"], run["run_id"]) for run in seen["runs"]] == expected
                assert (seen["total"], seen["everybodys"]) == (len(expected), user == "olga")
            async with server.http("olga") as http:
                cut = (await http.get("/runs?limit=1")).json()
                assert (cut["total"], len(cut["runs"])) == (2, 1)
                bobs = (await http.get("/runs?user=bob")).json()["runs"]
                assert [run["run_id"] for run in bobs] == [ids["bob"]]
            async with server.http("carol") as http:
                assert (await http.get("/runs?user=bob")).json()["runs"] == []

    async def test_sees_any_runs_tree_and_no_more_of_it(self, server: Server) -> None:
        async with two_at_work(server) as ids, server.http("olga") as http:
            tree = (await http.get(f"/runs/{ids['ada']}/tree")).json()
            assert (tree["user_id"], doing(tree)) == ("ada", BOSS)
            assert (await http.get(f"/runs/{ids['ada']}/tree?user=bob")).status_code == 404
            for path in ("threads/rome", f"threads/rome/runs/{ids['ada']}", "threads/rome/state"):
                assert (await http.get(f"/{path}")).status_code == 404
            stopped = await http.post(f"/threads/rome/runs/{ids['ada']}/cancel")
            assert stopped.status_code == 404

    async def test_must_say_whose_run_is_meant_where_that_is_not_clear(
        self, tmp_path: Path
    ) -> None:
        async with open_server(tmp_path / "data", AGENTS, operators=("olga",)) as server:
            async with two_with_one_id(server) as run_id, server.http("olga") as http:
                unclear = await http.get(f"/runs/{run_id}/tree")
                assert unclear.status_code == 422
                assert unclear.json()["details"][0]["field"] == "user"
                for user in ("ada", "bob"):
                    tree = (await http.get(f"/runs/{run_id}/tree?user={user}")).json()
                    assert tree["user_id"] == user
                    assert tree["run_id"] == run_id

    async def test_is_looked_for_in_vain_where_none_is_named(self, tmp_path: Path) -> None:
        async with open_server(tmp_path / "data", AGENTS, tools=(search,)) as server:
            async with two_at_work(server), server.http("olga") as http:
                assert (await http.get("/runs")).json()["runs"] == []

    @pytest.mark.parametrize("query", ["user=none", "user=a%0Ab", "limit=0", "limit=x", "x=1"])
    async def test_is_told_what_a_query_may_be(self, server: Server, query: str) -> None:
        async with server.http("olga") as http:
            assert (await http.get(f"/runs?{query}")).status_code == 422


@contextlib.asynccontextmanager
async def two_with_one_id(server: Server) -> AsyncIterator[str]:
    """Two users' runs that have the same id, which nothing forbids: ids are scoped to users."""
    del server
    (supervisor,) = (
        found for found in gc.get_objects() if type(found) is Supervisor and not found.draining
    )
    for user in ("ada", "bob"):
        await supervisor.start(context(user, f"thread-of-{user}", "the-same"), "hang", "go")
    yield "the-same"


async def test_no_canary_is_in_anything_that_is_told(server: Server) -> None:
    async with two_at_work(server) as ids:
        told: list[str] = []
        for user in ("olga", "ada", "bob"):
            async with server.http(user) as http:
                told.append((await http.get("/runs")).text)
                told += [(await http.get(f"/runs/{id}/tree")).text for id in ids.values()]  # noqa: A001
        async with server.chat("rome", "ada") as chat:
            told.append(json.dumps(await chat.ask("agent.getTree")))
        async with server.http("ada") as http:
            told.append((await http.get("/threads/rome/runs")).text)
            assert CANARIES["ada"] in (await http.get("/threads/rome/state")).text
    assert sum("search" in each for each in told) >= 6
    assert not [each for each in told if "canary" in each or __file__ in each]


class TestAThreadsRuns:
    async def test_are_as_the_langgraph_sdk_has_them(self, server: Server) -> None:
        async with server.chat("rome", "ada") as chat, server.http("ada") as http:
            await chat.subscribe()
            await chat.run("tokens=1")
            await chat.run("fail=x")
            third = await chat.start("go", "hang")
            fourth = await chat.start("go", "hang")
            listed = (await http.get("/threads/rome/runs")).json()
            assert [run["status"] for run in listed] == ["pending", "running", "error", "success"]
            assert [run["run_id"] for run in listed[:2]] == [fourth, third]
            for run in listed:
                assert {"run_id", "thread_id", "assistant_id", "created_at", "updated_at"} <= set(
                    run
                )
                assert run["multitask_strategy"] == "enqueue"
                assert run["thread_id"] == "rome"
            assert listed[-1]["metadata"]["creche"]["receipt"]["reason"] == "success"
            one = (await http.get(f"/threads/rome/runs/{third}")).json()
            assert one == listed[1]
            page = (await http.get("/threads/rome/runs?limit=1&offset=1&status=running")).json()
            assert page == []
            page = (await http.get("/threads/rome/runs?limit=2&offset=1")).json()
            assert page == listed[1:3]
            found = (await http.get("/threads/rome/runs?status=error")).json()
            assert found == [listed[2]]
            assert (await http.get("/threads/rome/runs?status=lost")).status_code == 422


class TestCancelling:
    async def test_with_wait_is_answered_once_the_run_has_ended(self, server: Server) -> None:
        async with server.chat("rome", "ada") as chat, server.http("ada") as http:
            await chat.subscribe()
            run_id = await chat.start("go", "slow_to_go")
            path = f"/threads/rome/runs/{run_id}/cancel?wait=1&action=interrupt"
            answer = await http.post(path)
            assert answer.status_code == 200
            told = answer.json()
            assert (told["run_id"], told["status"]) == (run_id, "cancelled")
            assert told["receipt"]["elapsed_ms"] >= 200
            assert told["receipt"]["reason"] == "user"
            again = (await http.post(path)).json()
            assert again == told
            one = (await http.get(f"/threads/rome/runs/{run_id}")).json()
            assert (one["status"], one["cancel_reason"]) == ("interrupted", "user")
            assert one["metadata"]["creche"]["receipt"] == told["receipt"]

    @pytest.mark.parametrize("query", ["", "?wait=0", "?wait=0&action=interrupt"])
    async def test_without_wait_is_answered_at_once(self, server: Server, query: str) -> None:
        async with server.chat("rome", "ada") as chat, server.http("ada") as http:
            await chat.subscribe()
            run_id = await chat.start("go", "slow_to_go")
            answer = await http.post(f"/threads/rome/runs/{run_id}/cancel{query}")
            assert answer.status_code == 202
            assert answer.json() == {"run_id": run_id, "status": "cancelling"}
            assert (await chat.finished(run_id))["outcome"]["type"] == "cancelled"

    async def test_that_should_undo_it_is_refused_and_stops_nothing(self, server: Server) -> None:
        async with server.chat("rome", "ada") as chat, server.http("ada") as http:
            run_id = await chat.start("go", "hang")
            path = f"/threads/rome/runs/{run_id}"
            answer = await http.post(f"{path}/cancel?wait=1&action=rollback")
            assert answer.status_code == 422
            assert answer.json()["details"][0]["field"] == "action"
            assert "rollback" in answer.json()["details"][0]["problem"]
            assert (await http.get(path)).json()["status"] == "running"

    @pytest.mark.parametrize("query", ["wait=2", "wait=maybe", "action=kill", "now=1"])
    async def test_must_make_sense(self, server: Server, query: str) -> None:
        async with server.http("ada") as http:
            assert (await http.post(f"/threads/t/runs/r/cancel?{query}")).status_code == 422

    async def test_by_a_client_that_goes_holds_nothing(self, server: Server) -> None:
        async with server.chat("rome", "ada") as chat:
            run_id = await chat.start("go", "stubborn")
            head = (
                f"POST /threads/rome/runs/{run_id}/cancel?wait=1 HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: Bearer {server.token()}\r\nContent-Length: 0\r\n\r\n"
            )
            async with await server.connect() as stream:
                await stream.send_all(head.encode())
                await eventually(lambda: waiting() == 1, "somebody waits")
            await eventually(lambda: waiting() == 0, "nobody waits any more", seconds=2.0)

    async def test_is_waited_for_a_bounded_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runs, "WAIT_SLACK", 0.3)
        data = tmp_path / "data"
        async with open_server(data, AGENTS, cleanup_timeout=0.1) as server:
            async with server.chat("rome", "ada") as chat, server.http("ada") as http:
                await chat.subscribe()
                run_id = await chat.start("go", "hang")
                database = sqlite3.connect(data / "creche.db", isolation_level=None)
                with contextlib.closing(database):
                    database.execute("BEGIN IMMEDIATE")  # so the run's end cannot be stored
                    path = f"/threads/rome/runs/{run_id}/cancel?wait=1"
                    with trio.fail_after(3):
                        answer = await http.post(path)
                    assert answer.status_code == 202
                    assert answer.json() == {"run_id": run_id, "status": "cancelling"}
                    database.execute("ROLLBACK")
                assert (await http.post(path)).json()["status"] == "cancelled"


def waiting() -> int:
    """Requests that wait for a run's end."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    return sum(
        any("_Runs._ended" in name for name in names_on(task))
        for nursery in root.child_nurseries
        for task in tasks_below(nursery)
    )


def names_on(task: trio.lowlevel.Task) -> list[str]:
    return [frame.f_code.co_qualname for frame, _ in task.iter_await_frames()]
