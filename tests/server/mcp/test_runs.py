"""MCP servers in runs: real processes and a real HTTP server, called over the real socket."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from tests.server.running import Chat, Server, check_agui, eventually, open_server, words_of

from creche import RunContext, ToolDispatcher, UserExecutionContext
from creche_server.mcp import McpSettings, mcp_sources

TIME: Final = str(Path(sys.executable).with_name("mcp-server-time"))
PROGRAM: Final = str(Path(__file__).with_name("program.py"))
SECRET: Final = "sesame-canary"


def program(folder: Path, mode: str = "", **more: Any) -> dict[str, Any]:
    """The settings of a server of ours."""
    folder.mkdir(exist_ok=True)
    return {"command": [sys.executable, PROGRAM, str(folder), *filter(None, [mode])], **more}


@contextlib.asynccontextmanager
async def serving(
    tmp_path: Path, servers: Mapping[str, Any], **more: Any
) -> AsyncIterator[tuple[Server, Chat]]:
    """A server with these MCP servers, and a chat that is subscribed."""
    settings = {"mcp": {"servers": servers}, **more}
    async with open_server(tmp_path / "data", **settings) as server, server.chat() as chat:
        await chat.subscribe()
        yield server, chat


@contextlib.asynccontextmanager
async def calling(servers: Mapping[str, Any]) -> AsyncIterator[ToolDispatcher]:
    """A dispatcher that can call these servers."""
    sources = mcp_sources(McpSettings(servers=dict(servers)), os.environ)
    context = UserExecutionContext.from_request(user_id="ada", thread_id="t-1")
    with trio.fail_after(30):
        async with ToolDispatcher.create_scoped_dispatcher_context(
            context, tools=[], tool_sources=sources
        ) as dispatcher:
            yield dispatcher


@contextlib.asynccontextmanager
async def http_server(folder: Path) -> AsyncIterator[str]:
    """Our program behind an address, which is the block's value."""
    command = program(folder, "http")["command"]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, check=False))
        await eventually((folder / "port").exists, "it listens", seconds=20)
        yield f"http://127.0.0.1:{(folder / 'port').read_text()}/mcp"
        process.terminate()


def receipt_of(terminal: Mapping[str, Any]) -> dict[str, Any]:
    receipt: dict[str, Any] = terminal["metadata"]["creche"]["receipt"]
    return receipt


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def pid_of(folder: Path) -> int:
    await eventually((folder / "pid").exists, "the process has begun", seconds=20)
    return int((folder / "pid").read_text())


class TestARunOverTheSocket:
    async def test_calls_a_published_server_over_stdio(
        self, tmp_path: Path, complaints: list[str]
    ) -> None:
        async with serving(tmp_path, {"time": {"command": [TIME]}}) as (_, chat):
            events = await chat.run(
                'tool=time__get_current_time:{"timezone":"Europe/Paris"} tokens=1'
            )
            check_agui(chat.events)
        (result,) = [each for each in events if each["type"] == "TOOL_CALL_RESULT"]
        assert json.loads(result["content"])["timezone"] == "Europe/Paris"
        assert events[-1]["outcome"] == {"type": "success"}
        receipt = receipt_of(events[-1])
        assert (receipt["reason"], receipt["processes_killed"]) == ("success", [])
        assert receipt["elapsed_ms"] < 2000

    async def test_calls_a_server_over_streamable_http(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaints: list[str]
    ) -> None:
        monkeypatch.setenv("DOOR", SECRET)
        async with http_server(tmp_path / "far") as url:
            far = {"url": url, "headers": {"Authorization": "Bearer ${DOOR}"}}
            async with serving(tmp_path, {"far": far}) as (_, chat):
                events = await chat.run('tool=far__order:{"item":"tea","amount":2} tokens=1')
        (result,) = [each for each in events if each["type"] == "TOOL_CALL_RESULT"]
        assert json.loads(result["content"]) == {"item": "tea", "amount": 2, "tags": None}

    async def test_has_a_process_of_its_own_and_leaves_none(self, tmp_path: Path) -> None:
        async with serving(tmp_path, {"near": program(tmp_path / "near")}) as (server, chat):
            async with server.chat(user="bob") as other:
                await other.subscribe()
                pids = []
                for each in (chat, other, chat):
                    events = await each.run("tool=near__pid:{} tokens=0")
                    (said,) = [e["content"] for e in events if e["type"] == "TOOL_CALL_RESULT"]
                    pids.append(int(said))
                    assert not is_alive(pids[-1])  # by the time that the end is told
                assert len(set(pids)) == 3

    async def test_that_is_cancelled_in_a_stuck_tool_ends_the_process(self, tmp_path: Path) -> None:
        near = tmp_path / "near"
        async with serving(tmp_path, {"near": program(near)}) as (_, chat):
            run_id = await chat.start("tool=near__stuck:{}")
            await eventually((near / "stuck").exists, "it is stuck", seconds=20)
            pid = await pid_of(near)
            await chat.ask("run.cancel", run_id=run_id, wait=True)
            assert not is_alive(pid)
            receipt = receipt_of(await chat.finished(run_id))
        assert receipt["reason"] == "user"
        assert [each["name"] for each in receipt["tools_stopped"]] == ["near__stuck"]
        assert receipt["processes_killed"] == []  # it was told to stop, and went by itself
        assert receipt["elapsed_ms"] < 2000
        assert (near / "unstuck").exists()

    async def test_that_is_cancelled_in_a_tool_that_blocks_kills_the_process_and_its_children(
        self, tmp_path: Path
    ) -> None:
        near = tmp_path / "near"
        async with serving(tmp_path, {"near": program(near)}) as (_, chat):
            run_id = await chat.start("tool=near__busy:{}")
            await eventually((near / "busy").exists, "it is busy", seconds=20)
            pids = [await pid_of(near), int((near / "busy").read_text())]
            await chat.ask("run.cancel", run_id=run_id, wait=True)
            assert not is_alive(pids[0])
            await eventually(lambda: not is_alive(pids[1]), "its child is gone")
            receipt = receipt_of(await chat.finished(run_id))
        assert [each["name"] for each in receipt["tools_stopped"]] == ["near__busy"]
        assert receipt["processes_killed"] == ["near"]
        assert receipt["elapsed_ms"] < 4000

    @pytest.mark.parametrize(("allowance", "most_ms"), [(5, 4000), (0.3, 1500)])
    async def test_that_is_cancelled_kills_a_process_that_ignores_sigterm(
        self, tmp_path: Path, allowance: float, most_ms: int
    ) -> None:
        deaf = tmp_path / "deaf"
        settings = {"deaf": program(deaf, "deaf")}
        async with serving(tmp_path, settings, cleanup_timeout=allowance) as (_, chat):
            run_id = await chat.start("tool=deaf__stuck:{}")
            await eventually((deaf / "stuck").exists, "it is stuck", seconds=20)
            pid = await pid_of(deaf)
            await chat.ask("run.cancel", run_id=run_id, wait=True)
            assert not is_alive(pid)
            receipt = receipt_of(await chat.finished(run_id))
        assert receipt["processes_killed"] == ["deaf"]
        assert receipt["elapsed_ms"] < most_ms

    async def test_that_is_cancelled_tells_a_server_behind_an_address_to_stop(
        self, tmp_path: Path
    ) -> None:
        far = tmp_path / "far"
        async with http_server(far) as url:
            settings = {"url": url, "headers": {"Authorization": f"Bearer {SECRET}"}}
            async with serving(tmp_path, {"far": settings}) as (_, chat):
                run_id = await chat.start("tool=far__stuck:{}")
                await eventually((far / "stuck").exists, "it is stuck", seconds=20)
                await chat.ask("run.cancel", run_id=run_id, wait=True)
                await eventually((far / "unstuck").exists, "it has stopped")
                receipt = receipt_of(await chat.finished(run_id))
        assert receipt["elapsed_ms"] < 2000

    async def test_goes_on_when_the_process_dies_in_a_call(
        self, tmp_path: Path, complaints: list[str]
    ) -> None:
        async with serving(tmp_path, {"near": program(tmp_path / "near")}) as (_, chat):
            events = await chat.run("tool=near__die:{} tokens=1")
        assert "The MCP server 'near' has ended." in words_of(events)
        assert events[-1]["outcome"] == {"type": "success"}
        assert receipt_of(events[-1])["processes_killed"] == []

    async def test_of_an_agent_that_asks_for_no_server_starts_none(self, tmp_path: Path) -> None:
        async def plain(run: RunContext) -> None:
            await run.emit.text("hello")

        near = tmp_path / "near"
        settings: dict[str, Any] = {"mcp": {"servers": {"near": program(near)}}}
        async with open_server(tmp_path / "data", {"plain": plain}, **settings) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                events = await chat.run("hi", "plain")
        assert events[-1]["outcome"] == {"type": "success"}
        assert not (near / "pid").exists()

    async def test_of_the_assistant_has_no_server_that_is_not_for_it(self, tmp_path: Path) -> None:
        near = tmp_path / "near"
        settings = {"near": program(near, assistant=False)}
        async with serving(tmp_path, settings) as (_, chat):
            events = await chat.run("tool=near__pid:{} tokens=1")
        assert "There is no tool named 'near__pid'." in words_of(events)
        assert not (near / "pid").exists()


class TestAServerThatCannotBeUsed:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"command": ["no-such-program"]}, "'no-such-program' cannot be run: No such file"),
            ({"command": [sys.executable, "-c", ""]}, "the MCP server ended before it answered."),
            ({"url": "http://127.0.0.1:9/mcp"}, "the MCP server cannot be reached."),
            ({"command": ["sleep", "60"]}, "The tool source 'bad' did not open within 1 s."),
        ],
    )
    async def test_fails_the_run_in_words(
        self, tmp_path: Path, settings: dict[str, Any], words: str
    ) -> None:
        async with serving(tmp_path, {"bad": settings}, tool_source_timeout=1) as (_, chat):
            events = await chat.run("hello")
        assert events[-1]["type"] == "RUN_ERROR"
        assert events[-1]["code"] == "tool_source_unavailable"
        assert "'bad'" in events[-1]["message"]
        assert words in events[-1]["message"]

    async def test_is_gone_when_it_took_too_long_to_open(self, tmp_path: Path) -> None:
        late = tmp_path / "late"
        late.mkdir()
        command = ["sh", "-c", f"echo $$ > {late}/part; mv {late}/part {late}/pid; exec sleep 60"]
        settings: dict[str, Any] = {"late": {"command": command}}
        async with serving(tmp_path, settings, tool_source_timeout=1) as (_, chat):
            events = await chat.run("hello")
            assert not is_alive(await pid_of(late))
        assert "did not open within 1 s." in events[-1]["message"]
        assert receipt_of(events[-1])["processes_killed"] == ["late"]

    async def test_tells_nobody_what_it_said_or_was_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        caplog.set_level(logging.INFO)
        async with http_server(tmp_path / "far") as url:
            servers = {
                "sulky": program(tmp_path / "sulky", "sulky"),
                "shut": {"url": url, "headers": {"Authorization": f"Bearer not-{SECRET}"}},
            }
            for name, words in (
                ("sulky", "the MCP server ended before it answered."),
                ("shut", "the MCP server answered with HTTP status 401."),
            ):
                async with serving(tmp_path / name, {name: servers[name]}) as (_, chat):
                    events = await chat.run("hello")
                assert words in events[-1]["message"]
                assert SECRET not in "".join(chat.frames)
        assert SECRET not in caplog.text
        assert SECRET not in "".join(capfd.readouterr())


class TestATool:
    async def test_is_held_strictly_to_the_servers_schema(self, tmp_path: Path) -> None:
        async with calling({"near": program(tmp_path / "near")}) as dispatcher:
            good = await dispatcher.dispatch("near__order", {"item": "tea", "amount": 1})
            assert good.ok
            assert json.loads(good.content) == {"item": "tea", "amount": 1, "tags": None}
            for arguments, words in (
                ({"item": "tea"}, "'amount' is a required property"),
                ({"item": "tea", "amount": "1"}, "'1' is not of type 'integer' - at `$.amount`"),
                ({"item": "tea", "amount": True}, "True is not of type 'integer'"),
                ({"item": "tea", "amount": 1, "free": 1}, "'free' was unexpected"),
                (
                    {"item": "tea", "amount": 1, "tags": [2]},
                    "2 is not of type 'string' - at `$.tags[0]`",
                ),
            ):
                result = await dispatcher.dispatch("near__order", arguments)
                assert result.error is not None
                assert words in result.error

    async def test_that_fails_is_a_failed_result_in_its_words(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The log is told why in a code: the words may be the user's."""
        caplog.set_level(logging.INFO, logger="creche.tools")
        async with calling({"near": program(tmp_path / "near")}) as dispatcher:
            result = await dispatcher.dispatch("near__order", {"item": "unicorn", "amount": 1})
        assert result.error is not None
        assert "There are no unicorns." in result.error
        said = [record.getMessage() for record in caplog.records]
        assert said == ["tool near__order failed (mcp_tool_error)"]

    async def test_that_draws_tells_of_its_picture(self, tmp_path: Path) -> None:
        async with calling({"near": program(tmp_path / "near", "noisy")}) as dispatcher:
            result = await dispatcher.dispatch("near__picture", {})
        assert result.content == "Here it is:\n[image of type image/png, not shown]"

    async def test_has_a_name_that_every_endpoint_takes(self, tmp_path: Path) -> None:
        async with calling({"near": program(tmp_path / "near")}) as dispatcher:
            names = [spec.name for spec in dispatcher.specs]
            assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in names)
            (dotted,) = [name for name in names if "dotted" in name]
            assert dotted.startswith("near__dotted_name_with_much_to_it_")
            assert (await dispatcher.dispatch(dotted, {})).content == "dotted"

    async def test_does_not_see_our_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        monkeypatch.setenv("THEIRS", "theirs")
        near = program(tmp_path / "near", env={"TOKEN": "a-${THEIRS}-b", "PLAIN": "$x"})
        async with calling({"near": near}) as dispatcher:
            seen = json.loads((await dispatcher.dispatch("near__environment", {})).content)
        assert SECRET not in seen.values()
        assert (seen["TOKEN"], seen["PLAIN"]) == ("a-theirs-b", "$x")
        assert set(seen) <= {
            *("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ"),
            *("USER", "TOKEN", "PLAIN", "LC_CTYPE"),  # the last one Python gives itself
        }
