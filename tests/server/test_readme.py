"""The README's programs, run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(kind: str, name: str) -> str:
    """The fenced block that follows `<!-- kind: name -->`."""
    match = re.search(rf"<!-- {kind}: {re.escape(name)} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert match is not None, f"the README has no {kind} {name}"
    return match[1]


def commands_after(name: str) -> list[str]:
    """The indented commands that follow a file's block."""
    rest = README.split(f"<!-- file: {name} -->", 1)[1].split("```", 2)[2]
    return [line.strip() for line in rest.split("\n\n")[1].splitlines()]


def run(program: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "name", ["embedded.py", "blocks.py", "careful.py", "budgets.py", "asking.py"]
)
def test_an_example_prints_what_the_readme_says(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(block("file", name))

    done = run([sys.executable, name], tmp_path)

    assert done.stderr == ""
    assert done.stdout == block("output", name)


def test_the_embedding_example_needs_trio_and_msgspec_only(tmp_path: Path) -> None:
    program = block("file", "embedded.py") + (
        "\nimport sys\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'creche_server', 'sqlalchemy', 'quart', 'hypercorn', 'pydantic', 'trio_websocket'}))\n"
    )
    (tmp_path / "embedded.py").write_text(program)

    done = run([sys.executable, "embedded.py"], tmp_path)

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("model", ["scripted", "local"])
def test_the_ten_line_agent_is_served_and_answers(tmp_path: Path, model: str) -> None:
    """The server and the chat are started by the README's own commands."""
    (tmp_path / "myapp.py").write_text(block("file", "myapp.py"))
    serve, chat = commands_after("myapp.py")
    assert serve.startswith(".venv/bin/creche ")  # which is where a clone has it
    assert chat.startswith(".venv/bin/creche ")
    creche = [sys.executable, "-m", "creche_server"]

    with subprocess.Popen(
        [*creche, *serve.split()[1:]],
        cwd=tmp_path,
        env={**os.environ, "CRECHE_MODEL": model, "CRECHE_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("creche: listening on http://127.0.0.1:")
            command = shlex.split(chat)[1:]
            if model == "scripted":  # which calls what it is told to
                command[-1] = 'tool=tell_stock:{"item": "apples"} tokens=0'
            answered = run([*creche, *command], tmp_path)
        finally:
            server.terminate()
            _, log = server.communicate(timeout=20)

    assert answered.stdout.strip() == "There are 12 of apples."
    assert "tell_stock" in answered.stderr
    assert answered.returncode == 0
    assert server.returncode == 0, log


def test_a_server_starts_with_the_mcp_servers_of_the_readme(tmp_path: Path) -> None:
    """As they are written: nothing in them needs what a new user does not have."""
    (tmp_path / "creche.toml").write_text(block("file", "creche.toml"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mcp-server-time").touch(0o755)
    with subprocess.Popen(
        [sys.executable, "-m", "creche_server", "serve", "--model", "scripted", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        announced = server.stdout.readline()
        server.terminate()
        _, log = server.communicate(timeout=20)
    assert announced.startswith("creche: listening on ")
    assert "mcp-server-time" not in log
