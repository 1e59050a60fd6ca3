"""The command line, as somebody at a terminal meets it: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio
from tests.server.processes import (
    COMMAND,
    START_TIMEOUT,
    ServerProcess,
    environment,
    open_creche,
    run_creche,
    started_creche,
)
from tests.server.running import MISLEADING, Server, eventually, open_server, settings_for

from creche_server.cli import endings
from creche_server.cli.api import Api
from creche_server.cli.app import app
from creche_server.cli.client import open_client
from creche_server.cli.conversation import Conversation
from creche_server.cli.screen import Screen
from creche_server.serve import Listening, Stop

AGENTS = '''
import msgspec
import trio
from typing import Literal

from creche import tool

class Slow:
    """Says a word now and then."""

    async def run(self, run):
        for number in range(1000):
            await run.emit.text(f"word{number} ")
            await trio.sleep(0.05)

class Stubborn:
    """Does not end when it is told to."""

    async def run(self, run):
        await run.emit.text("here to stay")
        with trio.CancelScope(shield=True):
            await trio.sleep(600)

class Rude:
    """Says what a terminal would obey."""

    async def run(self, run):
        await run.emit.text("\\x1b[31mred\\x07 [/nope] [bold]as it is[/bold] :smile:\\n\\tnext")
        await run.emit.end_text()
        await run.call_tool("[/nope]\\x1b[2J", {"[/x]": "\\x1b"})

class Helper:
    """Tells whoever asks."""

    async def run(self, run):
        await run.emit.text("whispered aside")

class Boss:
    """Has another do the work."""

    async def run(self, run):
        result = await run.spawn("helper", "go")
        await run.emit.text(f"It said {len(result.text)} letters.")

class Trip(msgspec.Struct, forbid_unknown_fields=True):
    to: Literal["Paris", "Rome"]
    days: int = 3

@tool(approval=True)
async def pay(amount: int) -> str:
    """Pay."""
    return f"paid {amount}"

class Asker:
    """Asks back."""

    tools = (pay,)

    async def run(self, run):
        name = await run.ask(None, "What is your name?")
        trip = await run.ask(Trip, "Where to?")
        paid = await run.call_tool("pay", {"amount": 5})
        await run.emit.text(f"{name}: {trip.days} days in {trip.to}, {paid.content}")

agents = {
    "slow": Slow, "stubborn": Stubborn, "rude": Rude, "helper": Helper, "boss": Boss,
    "asker": Asker,
}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server of this module works, on `data`."""
    found = tmp_path_factory.mktemp("served")
    (found / "mine.py").write_text(AGENTS)
    return found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server process with two agents of its own, for all tests that leave it alive."""
    with started_creche(folder / "data", "mine:agents") as found:
        yield found


@pytest.fixture
async def creche(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    """A server process with two agents of its own, for a test that ends it."""
    (tmp_path / "mine.py").write_text(AGENTS)
    async with open_creche(tmp_path / "data", "mine:agents", cwd=tmp_path) as process:
        yield process


class CommandLine:
    """`creche` in this process: its exit code and its stderr; where many cases are tried."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.printed = ""

    def __call__(self, *arguments: str) -> tuple[object, str]:
        code: object
        try:
            code = app(list(arguments))
        except SystemExit as leaving:
            code = leaving.code
        self.printed, said = self._capsys.readouterr()
        return code or 0, said

    def refused(self, *arguments: str, code: int = 1) -> str:
        """The sentence that it refuses these with, and nothing else."""
        ended, said = self(*arguments)
        (line,) = said.splitlines()
        assert (ended, line[:8]) == (code, "creche: ")
        return line[8:]


@pytest.fixture
def command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[CommandLine]:
    """What the command changes of the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield CommandLine(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("mine", "below"):
        sys.modules.pop(name, None)


def told(result: subprocess.CompletedProcess[bytes]) -> str:
    """What it said on stderr, which must be sentences and no traceback."""
    text = result.stderr.decode()
    assert "Traceback" not in text, text
    return text


class TestServe:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    async def test_ends_in_order_at_a_signal(
        self,
        creche: ServerProcess,
        number: signal.Signals,
    ) -> None:
        async with creche.server.chat() as chat:
            await chat.subscribe()
            await chat.run("tokens=2")
            creche.send(number)
            assert await creche.ended() == 0
            assert (await chat.end())[0] == 1012
        ran, goes = map(json.loads, creche.errors().splitlines())
        assert (ran["event"], ran["level"]) == ("a run ended", "info")
        assert (ran["agent"], ran["status"], ran["tokens"]) == ("assistant", "success", 2)
        assert (goes["event"], goes["level"]) == (
            f"{signal.Signals(number).name}: shutting down",
            "info",
        )
        assert await creche.rest() == b"creche: stopped\n"
        assert not (creche.server.settings.data / "server.json").exists()

    async def test_under_nohup_outlives_its_terminal(self, tmp_path: Path) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which is what a child inherits
        try:
            async with open_creche(tmp_path / "data") as creche:
                creche.send(signal.SIGHUP)
                async with creche.server.chat() as chat:
                    await chat.subscribe()
                    await chat.run("tokens=1")
                creche.send(signal.SIGTERM)
                assert await creche.ended() == 0
                assert "SIGHUP" not in creche.errors()
        finally:
            signal.signal(signal.SIGHUP, before)

    async def test_on_a_terminal_tells_of_the_short_way_out(self, tmp_path: Path) -> None:
        command = ("serve", "--model", "scripted", "--port", "0", "--data", "data")
        async with talking(*command, cwd=tmp_path, terminal=True) as serving:
            await serving.until(b"creche: open ")
            url, link = re.findall(rb"http://\S+", serving.shown)
            listening = Listening(url.decode(), link.decode())
            server = Server(settings_for(tmp_path / "data"), Stop(), listening, trio.Event())
            async with server.chat() as chat:
                await chat.subscribe()
                await chat.start("hang")
                await chat.until(lambda: chat.seen("RUN_STARTED"))
                await serving.interrupt()
                await serving.until(b"1 run has 2 s to finish")
                await serving.until(b"creche: ^C again to stop now")
                await serving.interrupt()
                assert await serving.ended() == 0
        assert b"creche: stopped" in serving.shown

    async def test_logs_each_login_that_it_refuses(self, creche: ServerProcess) -> None:
        async with creche.server.http(None) as http:
            assert (await http.get("/threads")).status_code == 401
        async with creche.server.chat(headers=[(b"Authorization", b"Bearer secret-word")]) as chat:
            await chat.end()
        over_http, over_socket = map(json.loads, creche.errors().splitlines())
        assert over_http["event"].startswith("refused a login from 127.0.0.1: ")
        assert over_socket["event"].startswith("refused a WebSocket from 127.0.0.1: ")
        assert (over_http["level"], over_socket["level"]) == ("info", "info")
        assert "secret-word" not in creche.errors()

    async def test_interrupted_while_it_is_still_being_imported_says_nothing(
        self,
        tmp_path: Path,
    ) -> None:
        (tmp_path / "cyclopts.py").write_text("raise KeyboardInterrupt")
        result = await run_creche("serve", cwd=tmp_path)
        assert result.returncode == 130
        assert told(result) == ""

    async def test_ends_at_once_at_a_second_signal(self, tmp_path: Path) -> None:
        env = {"CRECHE_SHUTDOWN_TIMEOUT": "60"}
        async with open_creche(tmp_path / "data", env=env) as creche:
            async with creche.server.chat() as chat:
                await chat.subscribe()
                run_id = await chat.start("hang")
                await chat.until(lambda: chat.seen("RUN_STARTED"))
                creche.send(signal.SIGTERM)
                with trio.fail_after(10):
                    while "shutting down" not in creche.errors():
                        await trio.sleep(0.01)
                creche.send(signal.SIGTERM)
                assert await creche.ended(within=8) == 0
                assert (await chat.finished(run_id))["outcome"] == {"type": "cancelled"}

    async def test_ends_in_its_time_although_a_run_does_not(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(AGENTS)
        env = {"CRECHE_SHUTDOWN_TIMEOUT": "2", "CRECHE_CLEANUP_TIMEOUT": "0.2"}
        async with open_creche(tmp_path / "data", "mine:agents", env=env) as creche:
            async with creche.server.chat() as chat:
                await chat.subscribe()
                await chat.start("go", "stubborn")
                await chat.until(lambda: chat.seen("TEXT_MESSAGE_CONTENT"))
                creche.send(signal.SIGTERM)
                assert await creche.ended(within=6) == 1
            assert "not everything ended" in creche.errors()
            assert "Traceback" not in creche.errors()
        async with open_creche(tmp_path / "data", cwd=tmp_path) as again:
            async with again.server.http() as http:
                history = (await http.get("/threads/thread-a/history")).json()
        assert history[0]["metadata"]["status"] in {"lost", "cancelled"}

    async def test_on_a_taken_port_says_so(self, tmp_path: Path) -> None:
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            result = await run_creche(
                *("serve", "--model", "scripted", "--port", str(port), "--data", "d"),
                cwd=tmp_path,
            )
        assert result.returncode == 1
        assert told(result) == f"creche: port {port} is taken; choose another with --port\n"
        assert result.stdout == b""

    async def test_beside_another_says_where_that_is(self, server: Server, folder: Path) -> None:
        result = await run_creche("serve", "--port", "0", "--data", "data", cwd=folder)
        assert result.returncode == 1
        (line,) = told(result).splitlines()
        assert server.url in line
        assert "another server" in line

    async def test_with_a_configuration_that_is_wrong_ends_with_2(self, tmp_path: Path) -> None:
        (tmp_path / "creche.toml").write_text("prot = 1\n")
        result = await run_creche("serve", cwd=tmp_path)
        assert result.returncode == 2
        (line,) = told(result).splitlines()
        assert "prot" in line

    @pytest.mark.parametrize(
        ("arguments", "file", "env", "sentence"),
        [
            ([], "prot = 1", {}, "creche.toml: there is no setting 'prot' (did you mean port?)"),
            ([], "zzz = 1", {}, "creche.toml: there is no setting 'zzz'"),
            ([], "port = 'x'", {}, "creche.toml: port: 'x': input should be a valid integer"),
            ([], "port = ", {}, "creche.toml: "),
            ([], "", {"CRECHE_PORT": "many"}, "CRECHE_PORT: 'many': input should be"),
            ([], "", {"CRECHE_LOG_LEVEL": "loud"}, "CRECHE_LOG_LEVEL: 'loud': use one of "),
            ([], "", {"CRECHE_ORIGINS": "a.example"}, "CRECHE_ORIGINS: 'a.example': "),
            ([], "port = 'x'", {"creche_port": "many"}, "CRECHE_PORT: 'many': input should be"),
            (["--port", "99999"], "", {"CRECHE_PORT": "1"}, "--port: '99999': input should be"),
            (
                [],
                "",
                {"CRECHE_ORIGINS": "https://a.example/x"},
                "CRECHE_ORIGINS: 'https://a.example/x': 'https://a.example/x' is no origin",
            ),
        ],
        ids=repr,
    )
    def test_a_setting_that_is_wrong_is_named_with_its_source_and_value(
        self,
        command_line: CommandLine,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        file: str,
        env: dict[str, str],
        sentence: str,
    ) -> None:
        Path("creche.toml").write_text(file)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert command_line.refused("serve", *arguments, code=2).startswith(sentence)

    def test_a_configuration_file_that_is_no_text_is_told_of(
        self,
        command_line: CommandLine,
    ) -> None:
        Path("creche.toml").write_bytes(b"user = '\xff'")
        code, said = command_line("serve")
        assert code == 2
        assert said.startswith("creche: creche.toml: ")
        assert len(said.splitlines()) == 1

    def test_a_name_in_the_environment_that_is_no_setting_is_warned_of(
        self,
        command_line: CommandLine,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("CRECHE_PROT", "8001")
        _, said = command_line("serve", "--model", "oracle")
        warning, _ = said.splitlines()
        assert warning == (
            "creche: CRECHE_PROT in the environment is no setting (did you mean CRECHE_PORT?)"
        )

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--database", "sqlite://"], "SQLite needs a file: use sqlite:///PATH"),
            (["--database", "sqlite:///:memory:"], "SQLite needs a file: use sqlite:///PATH"),
            (
                ["--database", "mysql://u:secret-word@h/d"],
                "mysql is not supported: use sqlite:///PATH or postgresql://USER@HOST/NAME",
            ),
            (
                ["--database", "nonsense"],
                "the database URL cannot be read: use sqlite:///PATH or postgresql://USER@HOST/NAME",
            ),
            (["--database", "sqlite:///a-file/x.db"], "a-file: File exists"),
            (["--data", "a-file"], "--data: {here}/a-file is a file"),
            (["--data", "a-file/below"], "--data: {here}/a-file/below cannot be made: Not a dire"),
            (["--host", "nowhere.invalid"], "--host: 'nowhere.invalid' cannot be found"),
            (["--host", "192.0.2.1"], "--host: 192.0.2.1 is no address of this machine"),
            (["--host", "256.256.256.256"], "--host: '256.256.256.256' cannot be found"),
            (["--data", "/proc/nope"], "--data: /proc/nope cannot be made: "),
            (["--database", "sqlite:////proc/nope/x.db"], "/proc/nope: "),
            (
                ["--database", "postgresql://nobody:secret-word@127.0.0.1:1/x"],
                "the database cannot be used: connection failed: ",
            ),
            (["--model", "oracle"], "there is no model 'oracle': use "),
            (["--model", "openai:"], "there is no model 'openai:': use "),
            (["nowhere:agents"], "there is no module 'nowhere' here "),
            (["mine"], "'mine' is not MODULE:NAME, such as myapp:agents"),
            (["mine:nothing"], "mine has no 'nothing'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_it_cannot_use_is_named(
        self,
        command_line: CommandLine,
        arguments: list[str],
        sentence: str,
    ) -> None:
        Path("a-file").touch()
        Path("mine.py").write_text(AGENTS)
        model = [] if "--model" in arguments else ["--model", "scripted"]
        line = command_line.refused("serve", *arguments, *model, "--port", "0")
        assert line.startswith(sentence.replace("{here}", str(Path.cwd())))
        assert "secret-word" not in line
        assert not Path("creche.db").exists()

    @pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://x", "http://x:port/v1"])
    def test_an_endpoint_that_is_none_is_refused_at_the_start(
        self,
        command_line: CommandLine,
        monkeypatch: pytest.MonkeyPatch,
        url: str,
    ) -> None:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        line = command_line.refused("serve", "--model", "openai:x", "--port", "0")
        assert line.startswith(f"OPENAI_BASE_URL: {url!r} is no address")

    @pytest.mark.parametrize(
        ("module", "headline", "shown"),
        [
            ("x = 1\nclass :", "SyntaxError: invalid syntax (mine.py line 2)", "class :"),
            ("\n1/0", "ZeroDivisionError: division by zero (mine.py line 2)", "1/0"),
            (
                "import nowhere",
                "ModuleNotFoundError: No module named 'nowhere' (mine.py line 1)",
                "",
            ),
            (
                "from os import nope",
                "ImportError: cannot import name 'nope'",
                "from os import nope",
            ),
            ("import sys; sys.exit('no')", "SystemExit: no (mine.py line 1)", "sys.exit"),
            ("import below", "ZeroDivisionError: division by zero (mine.py line 1)", "1/0 # here"),
        ],
    )
    def test_a_module_that_cannot_be_imported_is_shown_from_its_own_first_line_on(
        self,
        command_line: CommandLine,
        module: str,
        headline: str,
        shown: str,
    ) -> None:
        Path("mine.py").write_text(f"{module}\n")
        Path("below.py").write_text("1/0 # here\n")
        code, said = command_line("serve", "mine:agents", "--model", "scripted", "--port", "0")
        assert code == 1
        first, *rest = said.splitlines()
        assert first.startswith(f"creche: cannot import mine: {headline}")
        assert shown in "\n".join(rest)
        assert "importlib" not in said
        assert "creche_server" not in said

    @pytest.mark.parametrize(
        ("agents", "sentence"),
        [
            ("{}", "there is no agent in it"),
            ("7", "agents must be a mapping of names to agent classes"),
            ("None", "agents must be a mapping of names to agent classes"),
            ("{1: Fine}", "an agent's name must be a word, and 1 is none"),
            ("{'a': 1}", "agent 'a' must be a class"),
            ("Needy", "agent 'needy': Needy.__init__ needs arguments"),
            ("Blind", "agent 'blind': Blind.run must take the run"),
            (
                "{'shop': type('Shop', (Fine,), {'tools': ('tell_stock',)})}",
                "agent 'shop' wants the tool 'tell_stock', which is not there (there is "
                "calculator, clock, search_history)",
            ),
            (
                "{'shop': type('Shop', (Fine,), {'tool_sources': ('time',)})}",
                "agent 'shop' wants the MCP server 'time', which the settings do not name: they "
                "need [mcp.servers.time]",
            ),
            (
                "AgentClassRegistry(); agents.register('shop', Fine, requires=('billing', 'tax'))",
                "agent 'shop' wants the tools 'billing', 'tax', which are not there",
            ),
            (
                "Application(agents={'shop': type('Shop', (Fine,), {'tools': ('nail',)})})",
                "agent 'shop' wants the tool 'nail', which is not there",
            ),
            ("{'shop': type('Shop', (Fine,), {'tools': (len,)})}", "agent 'shop': len is no tool"),
        ],
    )
    def test_what_holds_no_agent_is_refused_in_a_sentence(
        self,
        command_line: CommandLine,
        agents: str,
        sentence: str,
    ) -> None:
        Path("mine.py").write_text(
            "from creche import AgentClassRegistry\n"
            "from creche_server.application import Application\n"
            "class Fine:\n async def run(self, run): ...\n"
            "class Needy(Fine):\n def __init__(self, key): ...\n"
            "class Blind:\n async def run(self): ...\n"
            f"agents = {agents}\n",
        )
        line = command_line.refused("serve", "mine:agents", "--model", "scripted", "--port", "0")
        assert line.startswith(f"mine:agents: {sentence}")
        assert not Path(".creche").exists()

    def test_with_a_damaged_key_says_so(self, command_line: CommandLine) -> None:
        Path("key").write_bytes(b"short")
        options = ("--model", "scripted", "--port", "0", "--data", ".")
        assert "damaged" in command_line.refused("serve", *options)

    async def test_serves_agents_of_ones_own(self, server: Server) -> None:
        async with server.http() as http:
            found = (await http.post("/agents/search")).json()
        assert [agent["name"] for agent in found] == [
            *("slow", "stubborn", "rude", "helper", "boss", "asker", "assistant"),
        ]


class TestChat:
    async def test_answers_a_question(self, server: Server, folder: Path) -> None:
        result = await run_creche(
            *("chat", "tokens=3", "--agent", "assistant", "--data", "data"),
            cwd=folder,
        )
        assert result.returncode == 0
        assert result.stdout.decode().split() == ["tok0", "tok1", "tok2"]
        assert "Traceback" not in result.stderr.decode()

    async def test_shows_tools_beside_the_answer(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        question = 'tokens=1 tool=calculator:{"expression":"6*7"}'
        result = await run_creche(
            *("chat", question, "--agent", "assistant", "--data", "data"),
            cwd=folder,
        )
        assert result.returncode == 0
        assert result.stdout.decode().split() == ["42", "tok0"]
        assert "calculator" in told(result)
        assert "42" in told(result)

    async def test_says_that_a_thread_which_was_named_is_a_new_one(
        self, server: Server, folder: Path
    ) -> None:
        common = ("--thread", "typo", "--agent", "assistant", "--data", "data")
        for expected in ("thread typo is a new thread\n", ""):
            done = await run_creche("chat", "tokens=1", *common, cwd=folder)
            assert (done.returncode, told(done)) == (0, expected)

    async def test_goes_on_with_a_thread(self, server: Server, folder: Path) -> None:
        common = ("--thread", "t", "--agent", "assistant", "--data", "data")
        first = await run_creche("chat", "tokens=1 first [bold]words[/bold]", *common, cwd=folder)
        second = await run_creche("chat", *common, cwd=folder, stdin=b"tokens=2 second words\n")
        assert (first.returncode, second.returncode) == (0, 0)
        shown = second.stdout.decode()
        assert "tokens=1 first [bold]words[/bold]" in shown
        assert shown.index("first") < shown.index("tok1")
        async with server.http("local") as http:
            history = (await http.get("/threads/t/history")).json()
        assert len(history) == 2

    async def test_talks_until_the_input_ends(self, server: Server, folder: Path) -> None:
        result = await run_creche(
            *("chat", "--agent", "assistant", "--data", "data"),
            cwd=folder,
            stdin=b"tokens=1\n\ntokens=2\n",
        )
        assert result.returncode == 0
        assert result.stdout.decode().split() == ["tok0", "tok0", "tok1"]
        assert re.search(r"creche chat --thread [0-9a-f]{32}", told(result))

    async def test_tells_a_failure_and_exits_with_1(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        result = await run_creche(
            *("chat", "tokens=2 fail=no luck today", "--agent", "assistant", "--data", "data"),
            cwd=folder,
        )
        assert result.returncode == 1
        assert "no luck today" in told(result)

    async def test_with_an_unknown_agent_says_which_there_are(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        result = await run_creche("chat", "x", "--agent", "nobody", "--data", "data", cwd=folder)
        assert result.returncode == 1
        assert "assistant" in told(result)

    @pytest.mark.parametrize("command", [["chat", "hello"], ["chat"], ["link"]])
    def test_without_a_server_says_how_to_start_one(
        self,
        command_line: CommandLine,
        command: list[str],
    ) -> None:
        assert "creche serve" in command_line.refused(*command)

    async def test_of_a_server_that_was_killed_says_that_it_does_not_answer(
        self,
        creche: ServerProcess,
        tmp_path: Path,
    ) -> None:
        creche.send(signal.SIGKILL)
        await creche.ended()
        for command in (("chat", "hello"), ("link",)):
            result = await run_creche(*command, "--data", "data", cwd=tmp_path)
            assert result.returncode == 1
            assert told(result) == f"creche: the server at {creche.server.url} does not answer\n"

    async def test_what_a_subagent_says_is_no_part_of_the_answer(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        result = await run_creche("chat", "go", "--agent", "boss", "--data", "data", cwd=folder)
        assert result.stdout.decode().strip() == "It said 15 letters."
        assert told(result).splitlines() == ["⤷ helper"]

    async def test_says_so_when_the_server_goes_in_the_middle(
        self,
        creche: ServerProcess,
        tmp_path: Path,
    ) -> None:
        async with talking("chat", "go", "--agent", "slow", "--data", "data", cwd=tmp_path) as chat:
            await chat.until(b"word1 ")
            creche.send(signal.SIGKILL)
            assert await chat.ended() == 1
            assert b"Traceback" not in chat.shown
            assert b"closed the connection" in chat.shown

    @pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
    async def test_at_an_interrupt_stops_the_run_itself(
        self,
        server: Server,
        folder: Path,
        terminal: bool,
    ) -> None:
        thread = f"interrupted {terminal}"
        arguments = ("chat", "go", "--thread", thread, "--agent", "slow", "--data", "data")
        async with talking(*arguments, cwd=folder, terminal=terminal) as chat:
            await chat.until(b"word1 ")
            await chat.interrupt()
            assert await chat.ended() == 130
            assert b"Traceback" not in chat.shown
            assert b"stopped" in chat.shown
        async with server.http("local") as http:
            (run,) = (await http.get(f"/threads/{thread}/history")).json()
        assert run["metadata"]["status"] == "cancelled"
        assert run["metadata"]["reason"] == "user"

    async def test_on_a_terminal_asks_answers_and_leaves(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        arguments = ("chat", "--agent", "slow", "--data", "data")
        async with talking(*arguments, cwd=folder, terminal=True) as chat:
            await chat.until(b"you")
            await chat.type(b"go on\r")
            await chat.until(b"word1 ")
            await chat.interrupt()  # stops the answer, not the conversation
            await chat.until(b"stopped")
            await chat.until(b"you", after=chat.shown.index(b"stopped"))
            await chat.type(b"\x04")  # ^D
            await chat.ended()
            assert b"Traceback" not in chat.shown
            assert b"creche chat --thread" in chat.shown

    async def test_asks_what_the_run_asks_and_takes_the_answers(
        self, server: Server, folder: Path
    ) -> None:
        arguments = ("chat", "Plan.", "--agent", "asker", "--data", "data")
        async with talking(*arguments, cwd=folder, terminal=True) as chat:
            await chat.until(b"What is your name?")
            await chat.type(b"\r")  # nothing, so it waits on
            await chat.type(b"Ada\r")
            await chat.until(b'as JSON, {"to": Paris|Rome, "days": integer}>')
            await chat.type(b'{"to": "Oslo"}\r')
            await chat.until(b"the answer does not fit")
            await chat.type(b'{"to": "Rome"}\r')
            await chat.until(b"May the tool pay be called?")
            await chat.until(b'{"amount":5}')
            await chat.until(b"[y/n]>")
            await chat.type(b"maybe\r")
            await chat.type(b"y\r")
            await chat.until(b"Ada: 3 days in Rome, paid 5")
            assert await chat.ended() == 0
        assert b"Traceback" not in chat.shown

    async def test_stops_a_run_that_asks_with_an_interrupt(
        self, server: Server, folder: Path
    ) -> None:
        arguments = ("chat", "Plan.", "--agent", "asker", "--data", "data")
        async with talking(*arguments, cwd=folder, terminal=True) as chat:
            await chat.until(b"What is your name?")
            await chat.interrupt()
            await chat.until(b"stopped")
            assert await chat.ended() == 130
        assert b"Traceback" not in chat.shown

    async def test_declines_where_nobody_can_answer(self, server: Server, folder: Path) -> None:
        arguments = ("chat", "Plan.", "--agent", "asker", "--data", "data")
        result = await run_creche(*arguments, cwd=folder)
        assert result.returncode == 1
        assert b"declined" in result.stderr
        assert b"Traceback" not in result.stderr

    async def test_takes_up_a_question_that_waits_on_the_thread(
        self, server: Server, folder: Path
    ) -> None:
        async with server.chat("left-open") as other:
            await other.subscribe()
            run_id = await other.start("Plan.", "asker")
            await other.finished(run_id)  # as far as its first question
            arguments = ("chat", "--thread", "left-open", "--user", "ada", "--data", "data")
            async with talking(*arguments, cwd=folder, terminal=True) as chat:
                await chat.until(b"What is your name?")
                await chat.type(b"Ada\r")
                await chat.until(b"Where to?")
                question = other.events[-1]["outcome"]["interrupts"][0]["id"]
                await other.ask(
                    "input.respond", interrupt_id=question, response={"to": "Paris"}
                )  # elsewhere, which the terminal heeds
                await chat.until(b"[y/n]>")
                await chat.type(b"n\r")
                last = b"3 days in Paris, Error: The call was not approved"
                await chat.until(last)
                await chat.until(b"you", after=chat.shown.index(last))
                await chat.type(b"\x04")
                await chat.ended()
            assert b"Traceback" not in chat.shown

    async def test_takes_words_without_quotes(self, server: Server, folder: Path) -> None:
        common = ("--agent", "assistant", "--data", "data")
        result = await run_creche("chat", "please", "say", "tokens=1", *common, cwd=folder)
        assert (result.returncode, result.stdout) == (0, b"tok0 \n")

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ([""], "there is nothing to ask: the question is empty"),
            (["  ", "\n"], "there is nothing to ask: the question is empty"),
            (["x", "--last", "--thread", "t"], "--last and --thread are two ways"),
        ],
    )
    def test_refuses_what_makes_no_sense(
        self,
        command_line: CommandLine,
        arguments: list[str],
        sentence: str,
    ) -> None:
        assert command_line.refused("chat", *arguments, code=2).startswith(sentence)

    async def test_says_so_when_there_is_nothing_in_an_answer(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        common = ("--thread", "silent", "--agent", "assistant", "--data", "data")
        first = await run_creche("chat", "tokens=0", *common, cwd=folder)
        assert (first.returncode, first.stdout) == (0, b"")
        assert told(first) == "thread silent is a new thread\n(no answer)\n"
        second = await run_creche("chat", *common, cwd=folder)
        assert told(second).splitlines()[0] == "(no answer)"

    async def test_of_others_words_obeys_none(self, server: Server, folder: Path) -> None:
        common = ("--thread", "rude", "--agent", "rude", "--data", "data")
        first = await run_creche("chat", "[/go] \x1b[2J", *common, cwd=folder)
        again = await run_creche("chat", *common, cwd=folder, stdin=b"x\n")
        text = "[31mred [/nope] [bold]as it is[/bold] :smile:\n        next\n"
        assert (first.returncode, first.stdout.decode()) == (0, text)
        assert again.stdout.decode() == f"\nyou> [/go] [2J\n{text}{text}"
        for result in (first, again):
            assert '→ [/nope][2J {"[/x]":"\\u001b"}' in told(result)
            assert "← [/nope][2J " in told(result)
            assert b"\x1b" not in result.stdout + result.stderr

    async def test_shows_of_the_past_what_was_called_and_what_was_stopped(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        common = ("--thread", "past", "--agent", "assistant", "--data", "data")
        async with server.chat("past", "local") as chat:
            await chat.subscribe()
            await chat.run('tokens=1 tool=calculator:{"expression":"6*7"}')
            run_id = await chat.start("go", "slow")
            await chat.until(lambda: "word1 " in str(chat.events[-1]))
            await chat.ask("run.cancel", run_id=run_id, wait=True)
            await chat.run("tokens=2 fail=out of luck")
        result = await run_creche("chat", *common, cwd=folder)
        lines = told(result).splitlines()
        assert lines[:2] == ['→ calculator {"expression":"6*7"}', "← calculator 42"]
        assert re.fullmatch(r"stopped \(everything of it had ended after \d+ ms\)", lines[3])
        assert lines[5] == "failed (model_failed)"

    async def test_shows_the_latest_of_a_long_past(self, server: Server, folder: Path) -> None:
        common = ("--thread", "long past", "--agent", "assistant", "--data", "data")
        async with server.chat("long past", "local") as chat:
            await chat.subscribe()
            for number in range(23):
                await chat.run(f"tokens=1 number {number}")
        result = await run_creche("chat", *common, cwd=folder)
        asked = re.findall(r"number (\d+)", result.stdout.decode())
        assert asked == [str(number) for number in range(3, 23)]
        assert told(result).startswith("(6 earlier messages are not shown)\n")

    async def test_goes_on_with_the_latest_thread(self, server: Server, folder: Path) -> None:
        common = ("--agent", "assistant", "--user", "lena", "--data", "data")
        nothing = await run_creche("chat", "tokens=1", "--last", *common, cwd=folder)
        assert nothing.returncode == 1
        assert told(nothing) == "creche: there is no thread yet; ask without --last\n"
        for thread in ("one", "two"):
            words = f"tokens=1 on {thread}"
            await run_creche("chat", words, "--thread", thread, *common, cwd=folder)
        once = await run_creche("chat", "tokens=2", "--last", *common, cwd=folder)
        assert (once.stdout.decode(), told(once)) == ("tok0 tok1 \n", ""), "the answer, no more"
        talked = await run_creche("chat", "--last", *common, cwd=folder)
        past = "\nyou> tokens=1 on two\ntok0 \n\nyou> tokens=2\ntok0 tok1 \n"
        assert talked.stdout.decode() == past

    @pytest.mark.parametrize("thread", ["none", "a/b", *MISLEADING], ids=ascii)
    def test_on_what_is_no_thread_is_refused(self, command_line: CommandLine, thread: str) -> None:
        line = command_line.refused("chat", "x", "--thread", thread)
        assert line.startswith("thread_id must ")

    async def test_on_a_terminal_tells_its_thread_at_the_end(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        arguments = ("chat", "tokens=1", "--agent", "assistant", "--data", "data")
        async with talking(*arguments, cwd=folder, terminal=True) as chat:
            assert await chat.ended() == 0
        assert re.search(rb"go on with: creche chat --thread [0-9a-f]{32}", chat.shown)

    async def test_goes_on_after_a_question_that_failed(self, tmp_path: Path) -> None:
        long = b"x" * 1_350_000
        async with open_server(tmp_path / "data") as server:
            arguments = ("chat", "--data", str(server.settings.data))
            result = await run_creche(*arguments, cwd=tmp_path, stdin=long + b"\ntokens=1\n")
            assert (result.returncode, result.stdout) == (0, b"tok0 \n")
            _, refused, hint = told(result).splitlines()
            assert refused == "creche: the question is too long (1.3 MiB; at most 1 MiB)"
            assert hint.startswith("go on with: creche chat --thread ")

    async def test_of_a_server_that_is_gone_says_so_at_each_question(
        self,
        creche: ServerProcess,
        tmp_path: Path,
    ) -> None:
        creche.send(signal.SIGKILL)
        await creche.ended()
        result = await run_creche("chat", "--data", "data", cwd=tmp_path, stdin=b"one\ntwo\n")
        assert result.returncode == 1
        _, first, second, hint = told(result).splitlines()
        assert first == second == f"creche: the server at {creche.server.url} does not answer"
        assert hint.startswith("go on with: creche chat --thread ")

    async def test_at_the_prompt_an_interrupt_clears_the_line_first(
        self,
        server: Server,
        folder: Path,
    ) -> None:
        arguments = ("chat", "--agent", "assistant", "--data", "data")
        async with talking(*arguments, cwd=folder, terminal=True) as chat:
            await chat.until(b"you> ")
            await chat.type(b"half a question")
            await chat.until(b"half a question")
            await chat.asleep()
            seen = len(chat.shown)
            await chat.interrupt_until(lambda: b"you> " in chat.shown[seen:])
            await chat.type(b"tokens=1\r")
            await chat.until(b"tok0", after=seen)
            await chat.until(b"you> ", after=chat.shown.index(b"tok0"))
            await chat.asleep()
            await chat.interrupt_until(lambda: chat.has_ended)  # on an empty line
            assert await chat.ended() == 0
        assert b"go on with: creche chat --thread" in chat.shown
        assert b"half a question" not in chat.shown[seen:]

    async def test_an_interrupt_before_the_run_is_accepted_stops_it_too(
        self,
        tmp_path: Path,
    ) -> None:
        """Else the client would go, and a run that nobody watches would stay."""
        async with open_server(tmp_path / "data") as server:
            database = sqlite3.connect(tmp_path / "data" / "creche.db", isolation_level=None)
            arguments = ("chat", "hang", "--thread", "t", "--data", "data")
            async with talking(*arguments, cwd=tmp_path, terminal=True) as chat:
                database.execute("BEGIN IMMEDIATE")  # so the reply to run.start must wait
                await chat.until(b"asking")
                await chat.interrupt()
                await chat.until(b"^C")
                database.execute("ROLLBACK")
                assert await chat.ended() == 130
                assert b"stopped" in chat.shown
            database.close()
            async with server.http("local") as http:
                (run,) = (await http.get("/threads/t/history")).json()
        assert (run["metadata"]["status"], run["metadata"]["reason"]) == ("cancelled", "user")

    @pytest.mark.parametrize("end", ["deletion", "shutdown", "deadline"])
    async def test_tells_who_or_what_stopped_a_run(self, tmp_path: Path, end: str) -> None:
        words = {
            "deletion": b"a later message took its place, or its thread was deleted",
            "shutdown": b"the server was shut down",
            "deadline": b"stopped: the run took longer than run_timeout (1 s)",
        }
        timeout = 1.0 if end == "deadline" else 600.0
        async with open_server(tmp_path / "data", run_timeout=timeout) as server:
            question = "tokens=1000 delay_ms=20"
            arguments = ("chat", question, "--thread", "t", "--data", "data")
            async with talking(*arguments, cwd=tmp_path) as chat:
                await chat.until(b"tok1 ")
                if end == "deletion":
                    async with server.http("local") as http:
                        assert (await http.delete("/threads/t")).status_code == 204
                elif end == "shutdown":
                    server.stop.soon.set()
                    server.stop.now.set()
                assert await chat.ended() == 1
            assert words[end] in chat.shown

    async def test_on_a_thread_with_a_long_log_answers_at_once(self, tmp_path: Path) -> None:
        """More events than the client reads ahead."""
        async with open_server(tmp_path / "data") as server:
            async with server.chat("t", "local") as chat:
                await chat.subscribe()
                await chat.run("tokens=10100")
            arguments = ("chat", "tokens=1", "--thread", "t", "--data", "data")
            result = await run_creche(*arguments, cwd=tmp_path)
            assert result.returncode == 0
            assert result.stdout == b"tok0 \n"
            api = Api(server.url, server.token("local"))
            conversation = Conversation(api, Screen(), thread_id="t", agent="assistant")
            assert (await conversation._end_of_the_log())["since"] > 10_100
            async with open_client(server.url, "t", server.token("local")) as client:
                with trio.fail_after(20):
                    await client.ask("subscription.subscribe", {"since": 0})
                    state = await client.ask("state.get", {})
                    assert len(state["values"]["messages"]) == 4
                    for seq in range(1, 10_101):
                        assert (await client.next_event())["seq"] == seq

    async def test_of_no_server_names_the_whole_path(self, tmp_path: Path) -> None:
        for command in (("chat", "x"), ("link",), ("threads",), ("top",)):
            result = await run_creche(*command, cwd=tmp_path)
            assert result.returncode == 1
            assert told(result) == (
                f"creche: no server is at work in {tmp_path / '.creche'}; "
                "start one (creche serve), or say where one is (--data)\n"
            )
        assert not (tmp_path / ".creche").exists()


@pytest.mark.parametrize(
    ("receipt", "words", "code"),
    [
        ({"reason": "user"}, "", 130),
        (
            {"reason": "deadline", "run_ms": 605_000, "elapsed_ms": 5_000},
            ": the run took longer than run_timeout (600 s)",
            1,
        ),
        (
            {"reason": "superseded"},
            ": a later message took its place, or its thread was deleted",
            1,
        ),
        ({"reason": "shutdown"}, ": the server was shut down", 1),
        ({"reason": "something new"}, ": something new", 1),
    ],
)
def test_a_stopped_run_says_why(receipt: dict[str, object], words: str, code: int) -> None:
    assert (endings.why(receipt), endings.exit_code(receipt)) == (words, code)


def test_the_page_says_it_in_the_same_words() -> None:
    page = (Path(endings.__file__).parents[1] / "ui" / "thread.js").read_text()
    table = page.split("const REASONS = {", 1)[1].split("};", 1)[0]
    assert dict(re.findall(r'(\w+): "(.*)"', table)) == endings.REASONS


class TestThreads:
    async def test_are_listed_with_what_is_in_them(self, server: Server, folder: Path) -> None:
        for thread, questions in (("first", 1), ("second", 2)):
            async with server.chat(thread, "tess") as chat:
                await chat.subscribe()
                for number in range(questions):
                    await chat.run(f"tokens=1 on\n{thread} \x1b {number}")
        common = ("threads", "--user", "tess", "--data", "data")
        text = await run_creche(*common, cwd=folder)
        assert (text.returncode, told(text)) == (0, "")
        second, first = text.stdout.decode().splitlines()
        when = r"\d{4}-\d\d-\d\d \d\d:\d\d"
        assert re.fullmatch(rf"second  {when}    2 runs  tokens=1 on second 0", second)
        assert re.fullmatch(rf"first   {when}     1 run  tokens=1 on first 0", first)
        found = await run_creche(*common, "--format", "json", "--limit", "1", cwd=folder)
        (thread,) = json.loads(found.stdout)
        assert (thread["thread_id"], thread["runs"]) == ("second", 2)

    async def test_of_who_has_none_are_none(self, server: Server, folder: Path) -> None:
        common = ("threads", "--user", "nobody yet", "--data", "data")
        text = await run_creche(*common, cwd=folder)
        assert (text.returncode, text.stdout) == (0, b"")
        assert told(text) == "creche: there is no thread yet\n"
        found = await run_creche(*common, "--format", "json", cwd=folder)
        assert (found.returncode, json.loads(found.stdout), told(found)) == (0, [], "")


class TestToken:
    async def test_speaks_for_a_user(self, server: Server, folder: Path) -> None:
        result = await run_creche("token", "--user", "zoë", "--data", "data", cwd=folder)
        assert (result.returncode, told(result)) == (0, "")
        token = result.stdout.decode().strip()
        assert server.auth.check_token(token) == "zoë"
        headers = {"Authorization": f"Bearer {token}"}
        async with server.http(None) as http:
            assert (await http.get("/threads", headers=headers)).status_code == 200

    @pytest.mark.parametrize("days", ["nan", "inf", "-1", "0", "1e99", "3651"])
    def test_for_no_sensible_time_is_refused(self, command_line: CommandLine, days: str) -> None:
        line = command_line.refused("token", "--user", "ada", f"--days={days}")
        assert line.startswith("--days must be more than 0 and at most 3650, not ")

    def test_where_no_server_has_been_is_refused(self, command_line: CommandLine) -> None:
        """One signed with a key of its own would open nothing."""
        code, said = command_line("token", "--user", "ada", "--data", "typo")
        assert code == 1
        place = Path.cwd() / "typo"
        assert said == f"creche: there is no key in {place}; start a server there first\n"
        assert not place.exists()

    @pytest.mark.parametrize("user", ["", "none", *MISLEADING], ids=ascii)
    def test_for_nobody_is_refused(self, command_line: CommandLine, user: str) -> None:
        assert command_line.refused("token", "--user", user).startswith("user_id must ")


async def test_a_link_opens_the_page(server: Server, folder: Path) -> None:
    result = await run_creche("link", "--data", "data", cwd=folder)
    assert (result.returncode, told(result)) == (0, "")
    async with server.http(None) as http:
        assert (await http.get(result.stdout.decode().strip())).status_code == 303
        assert (await http.get("/")).status_code == 200


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["chat", "--help"]])
def test_help_is_given(
    command_line: CommandLine,
    arguments: list[str],
) -> None:
    code, said = command_line(*arguments)
    assert (code, said) == (0, "")
    assert "Usage" in command_line.printed


class Talk:
    """A process that is talked to while it runs."""

    def __init__(self, process: trio.Process, ours: int | None) -> None:
        self.shown = b""
        self._process = process
        self._ours = ours  # the terminal's other side
        self._more = trio.Event()

    async def read(self, stream: trio.abc.ReceiveStream) -> None:
        # A terminal whose last user is gone reads as an error on Linux.
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            while data := await stream.receive_some():
                self.shown += data
                self._more.set()
                self._more = trio.Event()

    async def until(self, wanted: bytes, *, after: int = 0) -> None:
        try:
            with trio.fail_after(START_TIMEOUT):
                while wanted not in self.shown[after:]:
                    await self._more.wait()
        except trio.TooSlowError:
            raise AssertionError(f"no {wanted!r} in {self.shown!r}") from None

    async def type(self, keys: bytes) -> None:
        assert self._ours is not None
        os.write(self._ours, keys)
        await trio.lowlevel.checkpoint()

    async def interrupt(self) -> None:
        """^C: on a terminal by its key, otherwise by its signal."""
        if self._ours is not None:
            await self.type(b"\x03")
        else:
            self._process.send_signal(signal.SIGINT)

    async def asleep(self) -> None:
        """Wait until it waits for a key: CPython misses a signal while it is on its way there."""
        seen = 0
        with trio.fail_after(START_TIMEOUT):
            while seen < 3 and self._process.poll() is None:
                stat = Path(f"/proc/{self._process.pid}/stat").read_text()
                seen = seen + 1 if stat.rpartition(")")[2].split()[0] == "S" else 0
                await trio.sleep(0.02)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    async def interrupt_until(self, done: Callable[[], bool]) -> None:
        """^C, again if need be: CPython's readline forgets one that comes between two waits."""
        for _ in range(3):
            await self.interrupt()
            with contextlib.suppress(AssertionError):
                await eventually(done, "", seconds=4)
                return
        raise AssertionError(f"^C changes nothing: {self.shown!r}")

    async def ended(self) -> int:
        with trio.fail_after(15):
            code = await self._process.wait()
        await trio.sleep(0.05)  # what is in the pipe or the terminal still comes
        return code


def heed_interrupts() -> None:
    """As at a terminal, also where the tests run in the background, whose children ignore ^C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.asynccontextmanager
async def talking(*arguments: str, cwd: Path, terminal: bool = False) -> AsyncIterator[Talk]:
    """A command that goes on; killed with the block, if it has not ended."""
    ours: int | None = None
    if terminal:
        ours, theirs = pty.openpty()
        process = await trio.lowlevel.open_process(
            ["setsid", "--ctty", "--wait", *COMMAND, *arguments],
            cwd=cwd,
            env=environment(TERM="xterm", COLUMNS="100"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=heed_interrupts,
        )
        os.close(theirs)
        streams: list[trio.abc.ReceiveStream] = [trio.lowlevel.FdStream(os.dup(ours))]
    else:
        process = await trio.lowlevel.open_process(
            [*COMMAND, *arguments],
            cwd=cwd,
            env=environment(PYTHONUNBUFFERED="1"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=heed_interrupts,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        streams = [process.stdout, process.stderr]
    talk = Talk(process, ours)
    try:
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(talk.read, stream)
            yield talk
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.kill()
            await process.wait()
            for stream in streams:
                await stream.aclose()
            if ours is not None:
                os.close(ours)
