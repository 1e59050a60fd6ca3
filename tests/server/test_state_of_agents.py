"""What the modules of one's own agents hold shows in the server's metrics, by package."""

from __future__ import annotations

import functools
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pytest
from tests.server.processes import open_creche

from creche import AgentClassRegistry, RunContext, Tool, tool
from creche_server.http.metrics import exposition
from creche_server.packages import packages_of

TIDY: Final = """\
class Tidy:
    async def run(self, run):
        return None
"""
MODULES: Final = MappingProxyType(
    {
        "leaky.py": f"{TIDY}\nCACHE = {{}}\nagents = {{'leaky': Tidy}}\n",
        "tidy.py": f"NAMES = ('a',)\n{TIDY}",
        "mixed.py": """\
from types import MappingProxyType
import leaky
from tidy import Tidy
from toolbox import look_up

class Uses(Tidy):
    tools = (look_up,)

agents = MappingProxyType({"uses": Uses, "leaky": leaky.Tidy, "tidy": Tidy})
""",
        "toolbox.py": """\
from creche import tool

SEEN = []

@tool
async def look_up(name: str) -> str:
    return name
""",
        "door.py": "from tidy import Tidy\nDOORS = []\n",
        "package/__init__.py": "from package import elsewhere\n",
        "package/agents.py": TIDY,
        "package/elsewhere.py": "KEPT = set()\n",
    }
)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("leaky:agents", {"leaky": 2}),
        ("tidy:Tidy", {"tidy": 0}),
        ("mixed:agents", {"leaky": 2, "mixed": 0, "tidy": 0, "toolbox": 1}),
        ("door:Tidy", {"door": 1, "tidy": 0}),
        ("package.agents:Tidy", {"package": 1}),
    ],
)
async def test_a_running_server_counts_what_its_agents_modules_hold(
    tmp_path: Path,
    arguments: str,
    shown: dict[str, int],
) -> None:
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    async with (
        open_creche(tmp_path / "data", arguments, cwd=tmp_path) as creche,
        creche.server.http(None) as http,
    ):
        answer = await http.get("/metrics")
    begin = 'creche_process_global_state{package="'
    told = dict(
        line.removeprefix(begin).split('"} ')
        for line in answer.text.splitlines()
        if line.startswith(begin)
    )
    assert told.pop("creche").isdigit()
    assert told.pop("creche_server").isdigit()
    assert told == {name: str(count) for name, count in shown.items()}


async def test_the_help_says_what_is_counted_and_when(tmp_path: Path) -> None:
    text = exposition(global_state={"creche": 1}, runs_live=0)
    (told,) = (line for line in text.splitlines() if line.startswith("# HELP creche_process"))
    for words in ("loaded modules", "their classes", "each once", "at every scrape", "agents"):
        assert words in told


def test_a_packages_name_is_escaped_as_prometheus_asks() -> None:
    told = exposition(global_state={'a"\\\n': 1}, runs_live=0)
    assert 'creche_process_global_state{package="a\\"\\\\\\n"} 1\n' in told


class TestThePackages:
    def test_are_ours_then_those_of_agents_and_tools_and_of_what_was_loaded(self) -> None:
        class Mine:
            tools: tuple[Tool | str, ...] = (of("zoo.tools"), "named")

            async def run(self, run: RunContext) -> Any: ...

        Mine.__module__ = "mine.agents.deep"
        agents = AgentClassRegistry({"mine": Mine})
        assert packages_of(agents, [of("creche_server.tools")], ["app.main"]) == (
            *("creche", "creche_server"),
            *("app", "mine", "zoo"),
        )

    def test_are_not_the_standard_library(self) -> None:
        agents = AgentClassRegistry()
        assert packages_of(agents, [of("json.decoder")], ["os"]) == ("creche", "creche_server")

    def test_of_a_partial_is_its_functions(self) -> None:
        made = of("zoo.tools")
        object.__setattr__(made, "function", functools.partial(made.function))
        assert packages_of(AgentClassRegistry(), [made])[2:] == ("zoo",)


def of(module: str) -> Tool:
    """A tool that is defined there."""

    async def look_up(name: str) -> str:
        return name

    made = tool(look_up)
    made.function.__module__ = module
    return made
