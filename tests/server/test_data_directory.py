"""The lock, the address file and the key."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from creche_server.data_directory import (
    Address,
    AlreadyServedError,
    DataDirectoryError,
    address_file,
    load_key,
    locked,
    read_address,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestTheLock:
    def test_is_held_by_one_at_a_time(self, tmp_path: Path) -> None:
        with locked(tmp_path):
            with pytest.raises(AlreadyServedError, match=str(tmp_path)):
                with locked(tmp_path):
                    pass
            with locked(tmp_path / "another"):
                pass
        with locked(tmp_path):
            pass

    def test_names_the_server_that_holds_it(self, tmp_path: Path) -> None:
        with locked(tmp_path), address_file(tmp_path, url="http://x:1", user="u", agents=["a"]):
            with pytest.raises(AlreadyServedError, match=f"http://x:1 .*{os.getpid()}"):
                with locked(tmp_path):
                    pass

    def test_goes_with_its_process_however_that_ends(self, tmp_path: Path) -> None:
        program = (
            "import os, pathlib, signal\n"
            "from creche_server.data_directory import locked\n"
            f"with locked(pathlib.Path({str(tmp_path)!r})):\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        assert ended.returncode == -9
        with locked(tmp_path):
            pass

    def test_makes_a_directory_that_is_its_owners_alone(self, tmp_path: Path) -> None:
        with locked(tmp_path / "a" / "b"):
            assert mode(tmp_path / "a" / "b") == 0o700


class TestTheAddress:
    def test_is_there_while_the_block_lasts(self, tmp_path: Path) -> None:
        assert read_address(tmp_path) is None
        with address_file(tmp_path, url="http://x:1", user="u", agents=["a", "b"]):
            assert read_address(tmp_path) == Address(
                url="http://x:1",
                pid=os.getpid(),
                user="u",
                agents=("a", "b"),
            )
            (path,) = tmp_path.iterdir()
            assert mode(path) == 0o600
        assert list(tmp_path.iterdir()) == []

    def test_goes_when_the_block_fails(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError):
            with address_file(tmp_path, url="http://x:1", user="u", agents=[]):
                raise RuntimeError
        assert read_address(tmp_path) is None

    @pytest.mark.parametrize("text", ["", "{", "\xff"])
    def test_that_cannot_be_read_is_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "server.json").write_text(text, "latin-1")
        assert read_address(tmp_path) is None

    @pytest.mark.parametrize("value", [[], "x", {"url": "http://x:1"}, None])
    def test_that_says_something_else_is_none(self, tmp_path: Path, value: object) -> None:
        (tmp_path / "server.json").write_text(json.dumps(value))
        assert read_address(tmp_path) is None

    def test_is_never_readable_by_others_not_even_for_a_moment(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            seen = []
            link = tmp_path / "server.json"
            with address_file(tmp_path, url="http://x:1", user="u", agents=[]):
                seen.append(mode(link))
        finally:
            os.umask(before)
        assert seen == [0o600]


class TestTheKey:
    def test_is_made_once_and_is_its_owners_alone(self, tmp_path: Path) -> None:
        key = load_key(tmp_path / "data")
        assert len(key) == 32
        assert load_key(tmp_path / "data") == key
        assert mode(tmp_path / "data" / "key") == 0o600
        assert mode(tmp_path / "data") == 0o700
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["key"]

    def test_is_another_in_another_directory(self, tmp_path: Path) -> None:
        assert load_key(tmp_path / "a") != load_key(tmp_path / "b")

    def test_is_the_same_for_all_processes_that_ask_at_once(self, tmp_path: Path) -> None:
        """`creche token` may run while a server starts."""
        program = (
            "import pathlib, sys\n"
            "from creche_server.data_directory import load_key\n"
            f"print(load_key(pathlib.Path({str(tmp_path / 'data')!r})).hex())\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        keys = {process.communicate(timeout=30)[0] for process in started}
        assert len(keys) == 1
        assert len(keys.pop().strip()) == 64

    def test_that_is_damaged_is_told_of(self, tmp_path: Path) -> None:
        load_key(tmp_path)
        (tmp_path / "key").write_bytes(b"short")
        with pytest.raises(DataDirectoryError, match="damaged"):
            load_key(tmp_path)
