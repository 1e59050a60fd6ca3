"""The audit in the database: rows that are only ever added, and what shows if they are not."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from tests.server.database.postgres import new_database
from tests.store_contract import ADA, BOB, T1, commit, record

from creche import (
    AuditQuery,
    AuditRecord,
    AuditTamperedError,
    AuditUnavailableError,
    RunId,
    SecurityAudit,
    leaves,
    open_audit,
)
from creche_server.database import open_database, open_sql_sink

KEY = b"k" * 32
EVERYTHING = AuditQuery()


@pytest.fixture(scope="module")
def postgres_database() -> Iterator[str]:
    with new_database() as url:
        yield url


@pytest.fixture
def postgres_url(postgres_database: str) -> str:
    """The module's database, emptied."""
    with psycopg.connect(postgres_database, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return postgres_database


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'creche.db'}"
    found: str = request.getfixturevalue("postgres_url")
    return found


def engine_of(url: str) -> Engine:
    """Somebody else's way in: no pool, no migration, no hooks of ours."""
    made = make_url(url)
    if made.get_backend_name() == "postgresql":
        made = made.set(drivername="postgresql+psycopg")
    return create_engine(made)


def behind_its_back(url: str, *statements: str) -> None:
    """What the role that owns the tables can do when nothing of ours is asked."""
    engine = engine_of(url)
    try:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text("SELECT set_config('app.audit', 'on', true)"))
                connection.execute(text("ALTER TABLE audit_records DISABLE TRIGGER audit_refuses"))
            else:
                for name in ("update", "delete", "replace"):
                    connection.execute(text(f"DROP TRIGGER IF EXISTS audit_refuses_{name}"))
            for statement in statements:
                assert connection.execute(text(statement)).rowcount != 0, statement
    finally:
        engine.dispose()


async def refuse(audit: SecurityAudit, resource: str, **more: Any) -> None:
    fields: dict[str, Any] = {"kind": "thread_mismatch", "user": ADA, "operation": "look", **more}
    await audit.record(fields.pop("kind"), resource=resource, **fields)


async def write(url: str, *resources: str) -> list[AuditRecord]:
    async with open_sql_sink(url) as sink, open_audit(sink, key=KEY) as audit:
        for resource in resources:
            await refuse(audit, resource)
        return await audit.find(EVERYTHING)


class TestRecords:
    async def test_are_gone_on_with_after_a_restart_and_come_back_as_they_were(
        self,
        url: str,
    ) -> None:
        await write(url, "a", "zoë \U0001f600")
        await write(url)
        found = await write(url, "c\x00d")
        assert [(r.seq, r.resource) for r in found] == [
            (1, "a"),
            (2, "zoë \U0001f600"),
            (3, r"c\x00d"),
        ]
        assert all(r.time.tzinfo == UTC for r in found)
        async with open_sql_sink(url) as sink:
            verification = await sink.check(KEY)
            assert (verification.records, verification.unanchored) == (3, 0)
            assert verification.flaws == ()
            assert (await sink.check(b"another")).flaws[0].problem == "head"

    async def test_are_chosen_by_user_kind_and_time(self, url: str) -> None:
        async with open_sql_sink(url) as sink, open_audit(sink, key=KEY) as audit:
            await refuse(audit, "a")
            await refuse(audit, "b", user=BOB)
            await refuse(audit, "c", user=BOB, kind="limit_hit")
            await refuse(audit, "d", user=None)

            async def resources(**query: Any) -> list[str]:
                return [r.resource for r in await audit.find(AuditQuery(**query))]

            later = datetime.now(UTC) + timedelta(seconds=1)
            assert await resources() == ["a", "b", "c", "d"]
            assert await resources(user="bob") == ["b", "c"]
            assert await resources(kind="limit_hit") == ["c"]
            assert await resources(limit=2) == ["c", "d"]
            assert await resources(since=later) == []
            assert await resources(until=later, user="ada") == ["a"]
            assert await audit.counts(EVERYTHING) == {"thread_mismatch": 3, "limit_hit": 1}
            for _ in range(4):
                await refuse(audit, "a")
        async with open_sql_sink(url) as sink:
            assert (await sink.counts(AuditQuery(user="ada"))) == {"thread_mismatch": 5}

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE audit_records SET user_id = 'eve'",
            "UPDATE audit_records SET user_id = 'eve' WHERE seq = 1",
            "DELETE FROM audit_records",
            "DELETE FROM audit_records WHERE seq = 2",
        ],
    )
    async def test_cannot_be_changed(self, url: str, statement: str) -> None:
        await write(url, "a", "b")
        engine = engine_of(url)
        try:
            with pytest.raises(DBAPIError, match="append-only"):
                with engine.begin() as connection:
                    if engine.dialect.name == "postgresql":
                        connection.execute(text("SELECT set_config('app.audit', 'on', true)"))
                    connection.execute(text(statement))
        finally:
            engine.dispose()
        assert [r.resource for r in await write(url)] == ["a", "b"]

    async def test_cannot_be_truncated_or_replaced(self, url: str) -> None:
        await write(url, "a", "b")
        engine = engine_of(url)
        statement = (
            "TRUNCATE audit_records"
            if engine.dialect.name == "postgresql"
            else "REPLACE INTO audit_records SELECT * FROM audit_records WHERE seq = 1"
        )
        try:
            with pytest.raises(DBAPIError, match="append-only"):
                with engine.begin() as connection:
                    connection.execute(text(statement))
        finally:
            engine.dispose()

    @pytest.mark.parametrize(
        ("statements", "problem", "at_the_end"),
        [
            (["UPDATE audit_records SET user_id = 'eve' WHERE seq = 2"], "edited", False),
            (["UPDATE audit_records SET count = 7 WHERE seq = 5"], "edited", True),
            (["DELETE FROM audit_records WHERE seq = 3"], "deleted", False),
            (["DELETE FROM audit_records WHERE seq > 3"], "cut off", True),
            (["DELETE FROM audit_records"], "cut off", True),
            (["DELETE FROM audit_heads"], "head", True),
            (["UPDATE audit_heads SET seq = 4"], "head", True),
            (
                [
                    "UPDATE audit_records SET seq = 99 WHERE seq = 2",
                    "UPDATE audit_records SET seq = 2 WHERE seq = 3",
                    "UPDATE audit_records SET seq = 3 WHERE seq = 99",
                ],
                "edited",
                False,
            ),
            (
                [
                    "DELETE FROM audit_records WHERE seq = 5",
                    "UPDATE audit_heads SET seq = 4, hash = "
                    "(SELECT hash FROM audit_records WHERE seq = 4)",
                ],
                "head",
                True,
            ),
        ],
    )
    async def test_changed_behind_our_back_are_found(
        self,
        url: str,
        statements: list[str],
        problem: str,
        at_the_end: bool,
    ) -> None:
        await write(url, *"abcde")
        behind_its_back(url, *statements)
        async with open_sql_sink(url) as sink:
            flaws = (await sink.check(KEY)).flaws
        assert problem in {flaw.problem for flaw in flaws}, flaws
        if at_the_end:  # which is all that is looked at before going on
            with pytest.raises(BaseException) as caught:  # noqa: PT011
                await write(url)
            assert all(isinstance(leaf, AuditTamperedError) for leaf in leaves(caught.value))
        else:
            await write(url)

    async def test_whose_head_somebody_else_moves_are_not_gone_on_with(self, url: str) -> None:
        async with open_sql_sink(url) as sink, open_audit(sink, key=KEY) as audit:
            await refuse(audit, "a")
            behind_its_back(url, "UPDATE audit_heads SET seq = 0")
            for resource in ("b", "c"):
                with pytest.raises(AuditUnavailableError):
                    await refuse(audit, resource)

    async def test_are_written_while_the_store_writes(self, tmp_path: Path) -> None:
        """Each has its own connection; on SQLite, where one writes at a time, it waits its turn."""
        url = f"sqlite:///{tmp_path / 'creche.db'}"
        async with open_database(url) as store, open_sql_sink(url) as sink:
            async with open_audit(sink, key=KEY) as audit:
                for number in range(5):
                    await store.commit([commit()])
                    await refuse(audit, f"thread {number}")
            assert (await sink.check(KEY)).records == 5


class TestTheWall:
    @pytest.mark.parametrize(
        "setting",
        [None, ("app.user_id", "ada"), ("app.recovery", "on"), ("app.anybody", "on")],
    )
    async def test_shows_no_user_a_row_of_the_audit(
        self,
        postgres_url: str,
        setting: tuple[str, str] | None,
    ) -> None:
        await write(postgres_url, "a", "b")
        with psycopg.connect(postgres_url) as connection:
            if setting is not None:
                connection.execute("SELECT set_config(%s, %s, true)", setting)
            for table in ("audit_records", "audit_heads"):
                assert connection.execute(f"SELECT 1 FROM {table}".encode()).fetchall() == []
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level"):
                connection.execute("INSERT INTO audit_heads VALUES (2, 0, '', '')")

    async def test_has_a_window_that_answers_yes_or_no_and_closes(self, postgres_url: str) -> None:
        async with open_database(postgres_url) as store:
            await store.commit([commit(BOB, runs=(record(user=BOB),))])
            assert await store.is_anothers("thread", T1, ADA)
            assert await store.thread(ADA, T1) is None
            assert await store.run(ADA, RunId("run-a")) is None
        with psycopg.connect(postgres_url) as connection:
            connection.execute("SELECT set_config('app.user_id', 'ada', true)")
            for table, wanted in (("threads", T1), ("runs", "run-a")):
                asked = f"SELECT {table}_of_another(%s, 'ada')".encode()
                assert connection.execute(asked, [wanted]).fetchone() == (True,)
                assert connection.execute(f"SELECT 1 FROM {table}".encode()).fetchall() == []

    async def test_shows_threads_and_runs_only_through_that_window(self, postgres_url: str) -> None:
        async with open_database(postgres_url) as store:
            await store.commit([commit(BOB, runs=(record(user=BOB),))])
        with psycopg.connect(postgres_url) as connection:
            connection.execute("SELECT set_config('app.anybody', 'on', true)")
            for table in ("messages", "chunks"):
                assert connection.execute(f"SELECT 1 FROM {table}".encode()).fetchall() == []
            for table in ("threads", "runs"):
                changed = connection.execute(f"DELETE FROM {table}".encode()).rowcount
                assert changed == 0, "for SELECT only"
