"""`creche scan` as somebody at a terminal meets it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from tests.server.processes import COMMAND, environment

from creche_server.cli.app import app


class Said:
    """What one call of the command printed, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code: object
        try:
            self.code = app(["scan", *arguments]) or 0
        except SystemExit as leaving:
            self.code = leaving.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good file and a bad one, and things that are not to be looked at."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "app/good.py": "A = ()\n",
        "app/bad.py": "CACHE = {}\n",
        "app/.hidden/bad.py": "A = {}\n",
        "app/.venv/bad.py": "A = {}\n",
        "app/venv/bad.py": "A = {}\n",
        "app/__pycache__/bad.py": "A = {}\n",
        "app/notes.txt": "A = {}\n",
        "script": "A = {}\n",
        "odd.py": "def (:\n",
        "empty/readme.txt": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["app/good.py"], 0, "no findings in 1 file;"),
        (["app"], 1, "1 finding in 2 files;"),
        (["app/bad.py"], 1, "bad.py:1:1 CR001"),
        (["app/good.py", "app/bad.py", "app"], 1, "1 finding in 2 files;"),
        (["app", "script"], 1, "2 findings in 3 files;"),
        (["odd.py"], 1, "odd.py:1:1 CR000 cannot be parsed"),
        (["app/good.py", "--report"], 0, "isolation score               100.0"),
        (["app", "--format", "json"], 1, '"by_rule": {'),
        (["app", "--format", "sarif"], 1, '"version": "2.1.0"'),
        (["app", "--format", "github"], 1, "::error file=app/bad.py,line=1,col=1,title=CR001::"),
        (["app/good.py", "--format", "github"], 0, ""),
        (["--rules"], 0, "CR014 nursery kept beyond its block"),
    ],
)
def test_the_exit_code_tells_whether_something_was_found(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    said = Said(capsys, *arguments)
    assert (said.code, said.err) == (code, "")
    assert words in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "creche scan PATH"),
        (["nowhere"], "creche: nowhere: No such file or directory"),
        (["app", "nowhere.py"], "creche: nowhere.py: No such file or directory"),
        (["empty"], "creche: empty: there is no Python file in it"),
        (["app", "--format", "xml"], "xml"),
    ],
)
def test_wrong_use_is_told_in_a_line_and_exits_with_2(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    said = Said(capsys, *arguments)
    assert said.code in {2, "2"}
    assert words in said.out + said.err
    assert "Traceback" not in said.err


def test_the_report_is_in_what_programs_read(
    project: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = json.loads(Said(capsys, "app", "--format", "json", "--report").out)
    assert told["report"]["isolation_score"] == 50.0
    log = json.loads(Said(capsys, "app", "--format", "sarif", "--report").out)
    assert log["runs"][0]["properties"] == told["report"]


def test_a_reader_that_leaves_is_no_crash(project: Path) -> None:
    """`creche scan ... | head -1`, with more to say than a pipe holds."""
    (project / "long.py").write_text("".join(f"A{n} = {{}}\n" for n in range(3000)))
    with subprocess.Popen(
        [*COMMAND, "scan", "long.py"],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"CR001" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 1


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_colours_are_for_terminals(project: Path, terminal: bool) -> None:
    ours, theirs = pty.openpty() if terminal else os.pipe()  # to read from, to write to
    env = environment(TERM="xterm-256color")
    env.pop("NO_COLOR", None)
    result = subprocess.run(
        [*COMMAND, "scan", "app/bad.py"],
        cwd=project,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        check=False,
        timeout=30,
    )
    shown = os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)
    assert (result.returncode, result.stderr) == (1, b"")
    assert b"CACHE = {}" in shown
    assert (b"\x1b[" in shown) is terminal
