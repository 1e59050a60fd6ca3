"""Which MCP servers the settings name, and that what they hold is told to nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
from tests.server.processes import environment, run_creche

from creche_server.mcp import McpServerError, McpSettings, mcp_sources, resolved_servers
from creche_server.settings import load_settings

SECRET = "hunter2-canary"


def settings_of(**servers: Any) -> McpSettings:
    return McpSettings(servers=servers)


def program(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch(0o755)


class TestTheFile:
    def test_names_servers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("creche.toml").write_text(
            '[mcp.servers.time]\ncommand = ["mcp-server-time"]\nassistant = false\n'
            '[mcp.servers.far]\nurl = "https://example.com/mcp"\n'
            f'headers = {{ Authorization = "{SECRET}" }}\n'
        )
        settings = load_settings()
        assert settings.mcp.servers["time"].command == ("mcp-server-time",)
        assert settings.mcp.servers["far"].url == "https://example.com/mcp"
        assert settings.mcp.for_assistant == ("far",)
        assert SECRET not in repr(settings)

    @pytest.mark.parametrize(
        ("server", "words"),
        [
            ({}, "give either `command`, a list, or `url`"),
            ({"command": ["x"], "url": "http://x/"}, "give either"),
            ({"command": "x"}, "tuple"),
            ({"command": ["x"], "headers": {"a": "b"}}, "`headers` go with a `url`"),
            ({"url": "http://x/", "env": {"a": "b"}}, "go with a `command`"),
            ({"url": "ftp://x/"}, "no address"),
            ({"url": "http://x:99999/"}, "no address"),
            ({"command": ["x"], "comand": 1}, "Extra inputs"),
        ],
    )
    def test_is_refused_where_it_means_nothing(self, server: Any, words: str) -> None:
        with pytest.raises(pydantic.ValidationError, match=words):
            settings_of(a=server)

    @pytest.mark.parametrize("name", ["", "a__b", "a_", "_a", "a.b", "a b", "x" * 33])
    def test_takes_no_name_from_which_tools_names_cannot_be_made(self, name: str) -> None:
        with pytest.raises(pydantic.ValidationError):
            settings_of(**{name: {"command": ["x"]}})

    @pytest.mark.parametrize(
        ("file", "sentence"),
        [
            (
                f'[mcp.servers.a]\ncommand = ["x"]\ncomand = "{SECRET}"\n',
                "creche.toml: there is no setting 'mcp.servers.a.comand'",
            ),
            (
                f'[mcp.servers.a]\nenv = {{ T = "{SECRET}" }}\n',
                "creche.toml: mcp.servers.a: give either `command`, a list, or `url`",
            ),
            (
                f'[mcp.servers.a]\ncommand = "{SECRET}"\n',
                'creche.toml: mcp.servers.a.command: must be a list of words, such as ["mcp-s',
            ),
            (
                f'[mcp.servers.a__b]\ncommand = ["{SECRET}"]\n',
                "creche.toml: mcp.servers.a__b: a server's name has letters and digits, with sin",
            ),
            (
                f'[mcp.servers.a]\ncommand = ["x"]\nenv = {{ T = "${{NOT_THERE}}{SECRET}" }}\n',
                "mcp.servers.a.env.T: the environment has no NOT_THERE",
            ),
        ],
    )
    async def test_that_is_wrong_is_told_without_its_secrets(
        self, tmp_path: Path, file: str, sentence: str
    ) -> None:
        (tmp_path / "creche.toml").write_text(file)
        done = await run_creche("serve", "--port", "0", "--model", "scripted", cwd=tmp_path)
        assert done.returncode != 0
        assert sentence in done.stderr.decode()
        assert SECRET not in done.stderr.decode() + done.stdout.decode()
        assert "Traceback" not in done.stderr.decode()


class TestSecrets:
    def test_come_from_the_environment_by_name(self) -> None:
        settings = settings_of(
            near={
                "command": ["x"],
                "env": {"KEY": "${A}", "BOTH": "${A}-${B_2}", "NONE": "$A {A}"},
            },
            far={"url": "https://example.com/", "headers": {"Authorization": "Bearer ${A}"}},
        )
        found = resolved_servers(settings, {"A": SECRET, "B_2": "b", "PATH": "/bin", "OTHER": "o"})
        assert found["near"].environment == {
            "PATH": "/bin",
            "KEY": SECRET,
            "BOTH": f"{SECRET}-b",
            "NONE": "$A {A}",
        }
        assert found["far"].headers == {"Authorization": f"Bearer {SECRET}"}
        assert SECRET not in repr(found)

    def test_that_are_missing_are_named(self) -> None:
        settings = settings_of(far={"url": "https://x.com/", "headers": {"Auth": "${NOPE}"}})
        with pytest.raises(McpServerError, match=r"mcp\.servers\.far\.headers\.Auth: .* no NOPE"):
            mcp_sources(settings, {})


class TestAProgram:
    def test_beside_our_interpreter_is_found_without_being_on_the_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program(tmp_path / "venv" / "server")
        monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
        nowhere = {"PATH": str(tmp_path)}
        found = resolved_servers(settings_of(a={"command": ["server", "x"]}), nowhere)
        assert found["a"].command == (str(tmp_path / "venv" / "server"), "x")
        program(tmp_path / "server")
        found = resolved_servers(settings_of(a={"command": ["server", "x"]}), nowhere)
        assert found["a"].command == ("server", "x"), "the PATH goes first"

    def test_that_cannot_be_found_is_warned_of_at_the_start(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        program(tmp_path / "bin" / "there")
        settings = settings_of(
            near={"command": ["there"]},
            given={"command": ["other"], "env": {"PATH": "/nowhere"}},
            below={"command": ["bin/there"], "cwd": str(tmp_path)},
            typo={"command": ["bin/their"], "cwd": str(tmp_path)},
            far={"url": "https://example.com/mcp"},
        )
        mcp_sources(settings, {"PATH": str(tmp_path / "bin")})
        here = str(Path(sys.executable).parent)
        assert [record.getMessage() for record in caplog.records] == [
            f"MCP server {name}: there is no program {command!r}, on the PATH or in {here}; runs "
            "that ask for this server will fail"
            for name, command in (("given", "other"), ("typo", "bin/their"))
        ]


class TestWithoutTheLibrary:
    """As `pip install creche[server]` leaves it."""

    PROGRAM = (
        "import sys\n"
        "sys.modules['mcp'] = sys.modules['mcp_types'] = None\n"
        "from creche_server.mcp import McpSettings, mcp_sources\n"
        "import creche_server.serve\n"
        "assert mcp_sources(McpSettings(), {}) == {}\n"
        "try:\n"
        "    mcp_sources(McpSettings(servers={'a': {'command': ['x']}}), {})\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )

    def test_a_server_starts_and_says_what_to_install_when_it_is_asked_for(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", self.PROGRAM],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        assert done.stdout == (
            "McpServerError the settings name MCP servers, and these need: "
            "pip install 'creche[mcp]'\n"
        )

    def test_nothing_of_it_is_imported_by_who_asks_for_no_server(self) -> None:
        program = (
            "import sys, creche_server.serve\n"
            "from creche_server.mcp import McpSettings, mcp_sources\n"
            "mcp_sources(McpSettings(), {})\n"
            "print({'mcp', 'mcp_types', 'jsonschema'} & set(sys.modules))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "set()\n"
