"""The server as a whole: how it starts, how it stops, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.server import bare
from tests.server.running import (
    PATIENCE,
    CommandError,
    Server,
    asking,
    check_agui,
    open_server,
    settings_for,
    unsent,
)

from creche import AgentClassRegistry, ModelAgent, RunContext, leaves
from creche_server.application import Application
from creche_server.data_directory import AlreadyServedError, read_address
from creche_server.models import UnknownModelError
from creche_server.outbox import HIGH_WATER
from creche_server.serve import Stop, all_agents, is_open, local_url, serve


async def refuses_to_start(data: Path, **settings: Any) -> BaseException:
    """What `serve` raises, as the one thing that is in all its groups."""
    with pytest.raises(BaseException) as info, trio.fail_after(PATIENCE):  # noqa: PT011
        await serve(settings_for(data, **settings), stop=Stop())
    (only,) = leaves(info.value)
    return only


class TestShuttingDown:
    async def test_tells_every_run_and_every_reader(self, tmp_path: Path) -> None:
        async with open_server(tmp_path, shutdown_timeout=8) as server:
            async with server.chat() as ada, server.chat(user="bob") as bob:
                for chat in (ada, bob):
                    await chat.subscribe()
                    await chat.start("hang")
                    await chat.start("hang behind it")
                server.stop.now.set()
                await server.shut_down(within=5)
                for chat in (ada, bob):
                    assert await chat.end() == (1012, "the server is shutting down")
                    terminals = [e for e in chat.events if e["type"] == "RUN_FINISHED"]
                    assert [e["outcome"]["type"] for e in terminals] == ["cancelled"] * 2
                    assert {e["metadata"]["creche"]["receipt"]["reason"] for e in terminals} == {
                        "shutdown"
                    }
                    check_agui(chat.events)

    async def test_lets_runs_finish_within_the_grace(self, tmp_path: Path) -> None:
        go = trio.Event()

        async def wait(run: RunContext) -> None:
            await go.wait()
            await run.emit.text("done after all")

        async with open_server(tmp_path, {"wait": wait}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run_id = await chat.start("go", "wait")
                server.stop.soon.set()
                with pytest.raises(CommandError, match="shutting down") as info:
                    await _until_refused(chat)
                assert info.value.code == "draining"
                go.set()
                assert (await chat.finished(run_id))["outcome"] == {"type": "success"}
                assert (await chat.end())[0] == 1012
            with trio.fail_after(5):
                await server.ended.wait()

    async def test_cancels_what_the_grace_did_not_suffice_for(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {
            "shutdown_timeout": 5,
            "cleanup_timeout": 1,
        }  # which leaves a grace of 1 s
        async with open_server(tmp_path, **settings) as server, server.chat() as chat:
            await chat.subscribe()
            run_id = await chat.start("hang")
            began = trio.current_time()
            await server.shut_down()
            assert 0.9 < trio.current_time() - began < 3
            end = await chat.finished(run_id)
            assert end["metadata"]["creche"]["receipt"]["reason"] == "shutdown"

    async def test_asked_for_twice_is_at_once(self, tmp_path: Path) -> None:
        async with open_server(tmp_path, shutdown_timeout=60) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run_id = await chat.start("hang")
                server.stop.soon.set()
                with pytest.raises(CommandError, match="shutting down"):
                    await _until_refused(chat)
                assert chat.terminal(run_id) is None
                server.stop.now.set()
                with trio.fail_after(3):
                    await server.ended.wait()
                await chat.finished(run_id)

    @pytest.mark.parametrize("keeps_alive", [False, True])
    async def test_without_anything_to_do_takes_no_time(
        self,
        server: Server,
        keeps_alive: bool,
    ) -> None:
        async with server.chat() as idle, server.http() as http:
            if keeps_alive:
                assert (await http.get("/healthz")).status_code == 200
            began = trio.current_time()
            await server.shut_down()
            assert trio.current_time() - began < 1.5
            assert (await idle.end())[0] == 1012

    async def test_is_not_delayed_by_an_http_client_that_does_not_read(
        self,
        tmp_path: Path,
    ) -> None:
        async with open_server(tmp_path) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                for _ in range(8):
                    await chat.run("tokens=1 " + "x" * 900_000)
            async with await bare.deaf_connection(server.port) as deaf:
                await deaf.send_all(
                    b"GET /threads/thread-a/history HTTP/1.1\r\nHost: x\r\n"
                    b"Authorization: Bearer " + server.token().encode() + b"\r\n\r\n",
                )
                head, _ = await bare.read_head(deaf)
                assert head.startswith(b"HTTP/1.1 200 ")
                began = trio.current_time()
                await server.shut_down()
                assert trio.current_time() - began < 4

    async def test_is_not_delayed_by_a_client_that_never_answers_the_close(
        self,
        server: Server,
    ) -> None:
        async with await server.connect() as stream:
            rest = await bare.shake_hands(stream, "/threads/t/stream", server.token())
            began = trio.current_time()
            await server.shut_down()
            assert trio.current_time() - began < 3
            frames = await bare.frames_to_the_end(stream, rest)
        assert [opcode for opcode, _ in frames] == [bare.CLOSE]
        assert int.from_bytes(frames[0][1][:2], "big") == 1012

    async def test_delivers_the_last_word_of_a_run_that_says_much(self, tmp_path: Path) -> None:
        """To a client that is far behind when the server is about to go, and then reads on."""

        async def say_much(run: RunContext) -> None:
            for number in range(300):
                await run.emit.text(f"{number} " + "x" * 10_000)
            await run.emit.text("all is said")
            await trio.sleep_forever()

        subscribe = b'{"id":1,"method":"subscription.subscribe"}'
        async with open_server(tmp_path, {"much": say_much}) as server:
            async with server.chat() as chat, server.chat("idle") as witness:
                async with await server.connect() as behind:
                    path = "/threads/thread-a/stream"
                    rest = await bare.shake_hands(behind, path, server.token())
                    await behind.send_all(bare.frame(bare.TEXT, subscribe))
                    await chat.subscribe()
                    await chat.start("go", "much")
                    await chat.until(lambda: "all is said" in chat.frames[-1], "it has spoken")
                    assert unsent() > HIGH_WATER // 2, "this test needs a client that is behind"
                    server.stop.now.set()
                    server.stop.soon.set()
                    assert (await witness.end())[0] == 1012, "connections are being sent home"
                    frames = await bare.frames_to_the_end(behind, rest)
        assert frames[-1][0] == bare.CLOSE
        assert int.from_bytes(frames[-1][1][:2], "big") == 1012
        events = [json.loads(data) for opcode, data in frames[1:-1] if opcode == bare.TEXT]
        assert [event["seq"] for event in events] == [*range(1, len(events) + 1)]
        assert events[-1]["type"] == "RUN_FINISHED"

    async def test_stops_listening_at_once(self, tmp_path: Path) -> None:
        async with open_server(tmp_path) as server, server.chat() as chat:
            await chat.start("hang")
            server.stop.soon.set()
            with trio.fail_after(PATIENCE):
                with pytest.raises(OSError, match="refused|failed|all attempts"):
                    while True:
                        await (await server.connect()).aclose()
            assert read_address(server.settings.data) is None

    async def test_leaves_the_data_directory_to_the_next(self, tmp_path: Path) -> None:
        async with open_server(tmp_path) as server:
            async with server.chat() as chat:
                told = await chat.subscribe()
                await chat.run("tokens=2")
                seen = chat.raw_events
            token = server.token()
        async with open_server(tmp_path) as server:
            headers = [(b"Authorization", f"Bearer {token}".encode())]  # the key is the same
            async with server.chat(headers=headers) as chat:
                again = await chat.subscribe()
                await chat.until(lambda: len(chat.raw_events) == len(seen), "the same")
                assert chat.raw_events == seen
                assert again["epoch"] == told["epoch"]
                await chat.run("tokens=1")
                check_agui(chat.events)

    async def test_from_outside_by_cancellation_still_ends_runs_in_order(
        self,
        tmp_path: Path,
    ) -> None:
        scope = trio.CancelScope()
        with scope:
            async with open_server(tmp_path) as server, server.chat() as chat:
                await chat.subscribe()
                await chat.start("hang")
                await chat.until(lambda: chat.seen("RUN_STARTED"))
                scope.cancel()
                await trio.sleep(0)
        async with open_server(tmp_path) as server, server.http() as http:
            history = (await http.get("/threads/thread-a/history")).json()
            assert history[0]["metadata"]["status"] == "cancelled"
            assert history[0]["metadata"]["reason"] == "shutdown"


async def _until_refused(chat: Any) -> None:
    """Start runs until the server does not want any more."""
    with trio.fail_after(PATIENCE):
        while True:
            await chat.ask("run.start", **asking("tokens=1"))


class TestStarting:
    async def test_beside_another_server_is_refused(self, server: Server) -> None:
        error = await refuses_to_start(server.settings.data)
        assert isinstance(error, AlreadyServedError)
        assert server.url in str(error)
        assert str(os.getpid()) in str(error)
        async with server.http() as http:
            assert (await http.get("/healthz")).status_code == 200

    async def test_on_a_taken_port_is_refused_and_leaves_nothing_locked(
        self,
        tmp_path: Path,
    ) -> None:
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            error = await refuses_to_start(tmp_path, port=taken.getsockname()[1])
            assert isinstance(error, OSError)
        async with open_server(tmp_path) as server, server.http() as http:
            assert (await http.get("/healthz")).status_code == 200

    async def test_with_an_unknown_model_is_refused(self, tmp_path: Path) -> None:
        error = await refuses_to_start(tmp_path, model="oracle")
        assert isinstance(error, UnknownModelError)
        assert "oracle" in str(error)

    async def test_with_a_database_that_is_none_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "creche.db").write_bytes(b"this is no database, whatever it is called" * 100)
        error = await refuses_to_start(tmp_path)
        assert "not a database" in str(error)

    async def test_writes_an_address_that_only_its_owner_can_read(self, server: Server) -> None:
        path = server.settings.data / "server.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text()) == {
            "url": server.url,
            "pid": os.getpid(),
            "user": "local",
            "agents": ["assistant"],
        }
        for name in ("key", "server.json"):
            assert stat.S_IMODE((server.settings.data / name).stat().st_mode) == 0o600
        assert stat.S_IMODE(server.settings.data.stat().st_mode) == 0o700

    @pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o701])
    async def test_in_a_directory_that_others_can_look_into_says_so(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        mode: int,
    ) -> None:
        data = tmp_path / "data"
        data.mkdir()
        data.chmod(mode)
        async with open_server(data):
            pass
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert [str(data) in words for words in warnings] == [True] * (mode != 0o700)

    async def test_announces_a_link_that_works_once(self, server: Server) -> None:
        path = server.listening.page_link.removeprefix(server.url)
        async with server.http(None) as http:
            assert (await http.get(path)).status_code == 303
        async with server.http(None) as http:
            assert (await http.get(path)).status_code == 401

    async def test_serves_the_embedders_agents_first(self, tmp_path: Path) -> None:
        class Mine(ModelAgent):
            """Mine."""

        async with open_server(tmp_path, {"mine": Mine}) as server, server.http() as http:
            found = (await http.post("/agents/search")).json()
        assert [agent["name"] for agent in found] == ["mine", "assistant"]

    async def test_with_an_agent_that_wants_a_tool_that_is_not_there_is_refused(
        self,
        tmp_path: Path,
    ) -> None:
        class Mine(ModelAgent):
            tools = ("hammer",)

        registry = AgentClassRegistry({"mine": Mine})
        settings = settings_for(tmp_path / "data")
        with pytest.raises(ValueError, match="hammer"), trio.fail_after(PATIENCE):
            await serve(settings, Application(agents=registry), stop=Stop())
        assert not (tmp_path / "data").exists()

    async def test_says_how_many_runs_were_lost(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO, logger="creche")
        async with open_server(tmp_path):
            pass
        assert not any("lost" in record.getMessage() for record in caplog.records)

    async def test_says_that_an_assistant_of_the_embedders_replaces_ours(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Mine(ModelAgent):
            """Mine."""

        caplog.set_level(logging.INFO, logger="creche")
        for name, times in (("mine", 0), ("assistant", 1)):
            async with open_server(tmp_path, {name: Mine}):
                pass
            said = [record.getMessage() for record in caplog.records]
            assert said.count("the agent 'assistant' is your own, in place of creche's") == times

    def test_an_assistant_of_the_embedders_replaces_ours(self) -> None:
        class Mine(ModelAgent):
            """Mine."""

        registry = all_agents(AgentClassRegistry({"assistant": Mine}))
        assert registry.describe("assistant").agent_class is Mine
        assert registry.names() == ("assistant",)


async def test_many_connections_one_after_another_leave_no_descriptor_behind(
    server: Server,
) -> None:
    """Everything that was opened was closed."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def visit() -> None:
        async with server.chat("visited") as chat:
            await chat.subscribe()
        async with server.http() as http:
            await http.get("/healthz")

    for _ in range(3):
        await visit()
    before = descriptors()
    for _ in range(30):
        await visit()
    with trio.move_on_after(3):
        while descriptors() > before + 3:
            await trio.sleep(0.01)
    assert descriptors() <= before + 3


async def test_the_tools_of_the_assistant_work(server: Server) -> None:
    async with server.chat() as chat:
        await chat.subscribe()
        for call, found in (
            ('calculator:{"expression":"sqrt(16) + 2^3"}', "12"),
            ('calculator:{"expression":"__import__(1)"}', "cannot be calculated"),
            ('calculator:{"expression":"factorial(100000)"}', "enough"),
            ('clock:{"timezone":"Europe/Paris"}', "CE"),
            ('clock:{"timezone":"Nowhere/../../etc/passwd"}', "no time zone"),
            ('search_history:{"query":"sqrt"}', "thread-a"),
            ("nothing:{}", "no tool"),
        ):
            run = await chat.run(f"tokens=1 tool={call}")
            (result,) = [e["content"] for e in run if e["type"] == "TOOL_CALL_RESULT"]
            assert found in result, call
        check_agui(chat.events)


async def test_an_expensive_expression_does_not_stop_the_others(server: Server) -> None:
    """Tools run in threads, but a big power holds the interpreter all the same."""
    expensive = 'tokens=1 tool=calculator:{"expression":"9**9**9"}'
    async with server.chat() as chat, server.chat(user="bob") as bob:
        await chat.subscribe()
        await bob.subscribe()
        await chat.start(expensive)
        with trio.fail_after(3):
            await bob.run("tokens=5")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("localhost", "http://localhost:80"),
        ("::1", "http://[::1]:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("192.0.2.1", "http://192.0.2.1:80"),
    ],
)
def test_the_printed_link_can_be_opened_on_this_machine(host: str, url: str) -> None:
    assert local_url(host, 80) == url


@pytest.mark.parametrize(
    ("address", "open_"),
    [
        ("127.0.0.1", False),
        ("127.1.2.3", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.0.2.1", True),
        ("fe80::1%eth0", True),
    ],
)
def test_what_others_can_reach_is_open(address: str, open_: bool) -> None:
    assert is_open(address) is open_
