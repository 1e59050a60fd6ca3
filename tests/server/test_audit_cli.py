"""`creche audit`, as an operator meets it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from tests.server.processes import run_creche

from creche import AuditQuery, AuditSink, JsonlSink, open_audit
from creche_server.audit import audit_file, audit_key
from creche_server.cli.app import app
from creche_server.database import open_database, open_sql_sink

Creche = Callable[..., tuple[int, str, str]]


@pytest.fixture
def creche(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Creche:
    """`creche` in this process, in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            app(list(arguments))
        said = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return leaving.value.code, said.out, said.err

    return run


async def fill(sink: AuditSink, key: bytes) -> None:
    async with open_audit(sink, key=key) as audit:
        for user, kind, resource in (
            ("ada", "thread_mismatch", "thread x"),
            ("bob", "run_mismatch", "run [red]y[/red]"),
            (None, "token_refused", "HTTP"),
            ("bob", "run_mismatch", "run [red]y[/red]"),
            ("bob", "run_mismatch", "run [red]y[/red]"),
        ):
            await audit.record(kind, user=user, resource=resource, operation="look")  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with an audit of four records: the last one folds two."""
    found = tmp_path / "data"
    key = audit_key(found)
    trio.run(fill, JsonlSink(audit_file(found)), key)
    return found


@pytest.fixture
def database(tmp_path: Path) -> str:
    """The same in a database, with the key in the data directory."""
    url = f"sqlite:///{tmp_path / 'audit.db'}"

    async def make() -> None:
        async with open_sql_sink(url) as sink:
            await fill(sink, audit_key(tmp_path / "data"))

    trio.run(make)
    return url


@pytest.fixture(params=["file", "database"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The flags that name an audit, in a file or in a database."""
    if request.param == "file":
        request.getfixturevalue("data")
        return ["--data", str(tmp_path / "data")]
    url = request.getfixturevalue("database")
    return ["--data", str(tmp_path / "data"), "--database", url]


class TestVerify:
    def test_of_a_whole_audit_says_so(self, creche: Creche, where: list[str]) -> None:
        assert creche("audit", "verify", *where) == (
            0,
            "creche: the audit is whole: 4 records\n",
            "",
        )

    def test_names_what_was_done_to_which_record(self, creche: Creche, data: Path) -> None:
        path = audit_file(data)
        lines = path.read_bytes().splitlines(keepends=True)
        for changed, expected in (
            ([lines[0], lines[1].replace(b"bob", b"eve"), *lines[2:]], "edited: record 2 was"),
            ([lines[0], *lines[2:]], "deleted: record 2 is missing"),
            ([lines[0], lines[2], lines[1], lines[3]], "re-ordered: record 2 stands behind"),
            (lines[:3], "cut off: record 4 is cut off"),
            ([lines[0], b"{}\n", *lines[2:]], "unreadable: where record 2 should be there is none"),
        ):
            path.write_bytes(b"".join(changed))
            code, said, _ = creche("audit", "verify", "--data", str(data))
            assert code == 1
            assert expected in said
            assert "the audit was tampered with" in said
        path.write_bytes(b"".join(lines))
        path.with_suffix(".head").unlink()
        code, said, _ = creche("audit", "verify", "--data", str(data))
        assert (code, said.startswith("head: ")) == (1, True)

    def test_of_one_that_is_being_written_says_so_and_is_fine(
        self,
        creche: Creche,
        data: Path,
    ) -> None:
        head = audit_file(data).with_suffix(".head")
        before = head.read_bytes()
        trio.run(fill, JsonlSink(audit_file(data)), audit_key(data))
        head.write_bytes(before)
        code, said, _ = creche("audit", "verify", "--data", str(data))
        assert code == 0
        assert "the last 4 records" in said

    def test_with_anothers_key_takes_nothing_for_whole(self, creche: Creche, data: Path) -> None:
        (data / "key").write_bytes(os.urandom(32))
        assert creche("audit", "verify", "--data", str(data))[0] == 1


class TestList:
    def test_prints_lines_that_a_program_can_split(self, creche: Creche, where: list[str]) -> None:
        code, said, _ = creche("audit", "list", *where)
        rows = [line.split("\t") for line in said.splitlines()]
        assert code == 0
        assert [row[1:] for row in rows] == [
            ["thread_mismatch", "ada", "-", "thread x", "look", "refused", "1"],
            ["run_mismatch", "bob", "-", "run [red]y[/red]", "look", "refused", "1"],
            ["token_refused", "-", "-", "HTTP", "look", "refused", "1"],
            ["run_mismatch", "bob", "-", "run [red]y[/red]", "look", "refused", "2"],
        ]
        moment = datetime.fromisoformat(rows[0][0])
        assert abs(datetime.now(UTC) - moment) < timedelta(minutes=5)

    def test_prints_json_that_holds_the_whole_record(
        self, creche: Creche, where: list[str]
    ) -> None:
        code, said, _ = creche("audit", "list", "--format", "json", *where)
        records = [json.loads(line) for line in said.splitlines()]
        assert code == 0
        assert [record["seq"] for record in records] == [1, 2, 3, 4]
        assert records[1]["previous"] == records[0]["hash"]

    @pytest.mark.parametrize(
        ("flags", "seqs"),
        [
            (["--user", "bob"], [2, 4]),
            (["--user", "nobody"], []),
            (["--kind", "token_refused"], [3]),
            (["--limit", "2"], [3, 4]),
            (["--user", "bob", "--limit", "1"], [4]),
            (["--since", "2020-01-01"], [1, 2, 3, 4]),
            (["--until", "2020-01-01T00:00:00"], []),
        ],
    )
    def test_narrows_the_choice(
        self,
        creche: Creche,
        where: list[str],
        flags: list[str],
        seqs: list[int],
    ) -> None:
        code, said, _ = creche("audit", "list", "--format", "json", *flags, *where)
        assert code == 0
        assert [json.loads(line)["seq"] for line in said.splitlines()] == seqs

    def test_on_a_terminal_is_a_table_with_what_was_asked_as_it_was(
        self,
        creche: Creche,
        data: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        code, said, _ = creche("audit", "list", "--data", str(data))
        assert code == 0
        assert "resource" in said
        assert "claimed owner" not in said, "nobody's is known, so it has no column"
        assert "[red]y[/red]" in said

    def test_on_a_terminal_tells_whose_it_was_where_that_is_known(
        self, creche: Creche, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fill_with_owner() -> None:
            key = audit_key(tmp_path)
            async with open_audit(JsonlSink(audit_file(tmp_path)), key=key) as audit:
                await audit.record(
                    "user_mismatch",
                    user="ada",
                    claimed_owner="bob",
                    resource="x",
                    operation="look",
                )

        trio.run(fill_with_owner)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        _, said, _ = creche("audit", "list", "--data", str(tmp_path))
        assert "claimed owner" in said

    def test_is_in_the_order_of_the_times_that_it_shows(
        self, creche: Creche, tmp_path: Path
    ) -> None:
        """Repeats are recorded when their minute is over, after what happened meanwhile."""

        async def fill_folded() -> None:
            async with open_audit(
                JsonlSink(audit_file(tmp_path)), key=audit_key(tmp_path)
            ) as audit:
                for resource in ("a", "a", "b"):
                    await audit.record("limit_hit", user="ada", resource=resource, operation="look")

        trio.run(fill_folded)
        _, said, _ = creche("audit", "list", "--data", str(tmp_path))
        rows = [line.split("\t") for line in said.splitlines()]
        assert [row[4] for row in rows] == ["a", "a", "b"]


class TestStats:
    def test_counts_what_was_folded_too(self, creche: Creche, where: list[str]) -> None:
        code, said, _ = creche("audit", "stats", *where)
        assert code == 0
        assert said == "run_mismatch\t3\nthread_mismatch\t1\ntoken_refused\t1\n"
        assert creche("audit", "stats", "--user", "bob", *where)[1] == "run_mismatch\t3\n"


class TestWrongUse:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["verify", "--data", "absent"], "there is no key in absent"),
            (["verify", "--data", "keyed"], "there is no audit in keyed"),
            (["verify", "--data", "keyed", "--database", "sqlite:///no.db"], "no database no.db"),
            (["verify", "--data", "keyed", "--database", "sqlite:///empty.db"], "no audit that"),
            (["list", "--kind", "nonsense", "--data", "keyed"], "the kinds are user_mismatch, "),
            (["list", "--limit", "0", "--data", "keyed"], "--limit must be at least 1"),
        ],
    )
    def test_is_told_in_a_sentence_and_makes_nothing(
        self,
        creche: Creche,
        arguments: list[str],
        sentence: str,
        tmp_path: Path,
    ) -> None:
        audit_key(tmp_path / "keyed")
        (tmp_path / "empty.db").touch()
        code, said, told = creche("audit", *arguments)
        assert (code, said) == (2, "")
        assert sentence in told
        assert told.startswith("creche: ")
        assert {path.name for path in tmp_path.iterdir()} <= {"keyed", "empty.db"} | {
            "empty.db-wal",
            "empty.db-shm",
        }

    @pytest.mark.parametrize(
        "arguments",
        [["verify", "--bogus"], ["list", "--since", "yesterday"], ["nonsense"]],
    )
    async def test_of_the_flags_is_2_as_well(self, arguments: list[str], tmp_path: Path) -> None:
        ended = await run_creche("audit", *arguments, cwd=tmp_path)
        assert ended.returncode == 2
        assert b"Traceback" not in ended.stderr


async def test_a_database_is_read_by_another_process_while_the_server_writes(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path / 'creche.db'}"
    key = audit_key(tmp_path)
    async with open_database(url), open_sql_sink(url) as sink, open_audit(sink, key=key) as audit:
        await audit.record("limit_hit", resource="x", operation="y")
        flags = ("--data", str(tmp_path), "--database", url)
        ended = await run_creche("audit", "verify", *flags, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert await audit.counts(AuditQuery()) == {"limit_hit": 1}
