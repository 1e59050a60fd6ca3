"""The stores of the server: the contract on SQLite and on PostgreSQL, and what is theirs alone."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError
from tests.server.database.postgres import new_database
from tests.server.running import CommandError, eventually, open_server, settings_for
from tests.small_world import log_of
from tests.store_contract import (
    ADA,
    BOB,
    NOON,
    T1,
    StoreContract,
    asked,
    chunk,
    commit,
    record,
    said,
)

from creche import (
    AssistantMessage,
    Commit,
    CommitInDoubtError,
    MessageId,
    NewThread,
    RunId,
    Spending,
    Store,
    ThreadId,
    UserId,
    leaves,
)
from creche_server.data_directory import AlreadyServedError
from creche_server.database import SqlStore, open_database
from creche_server.database.claim import open_claim
from creche_server.database.connection import READERS, DatabaseUrlError, checked_url, migrate
from creche_server.database.tables import AUDIT, metadata
from creche_server.serve import Stop, serve


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


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'creche.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


class TestSqlite(StoreContract):
    @pytest.fixture
    async def store(self, sqlite_url: str) -> AsyncIterator[Store]:
        async with open_database(sqlite_url) as store:
            yield store


class TestPostgres(StoreContract):
    @pytest.fixture
    async def store(self, postgres_url: str) -> AsyncIterator[Store]:
        async with open_database(postgres_url) as store:
            yield store


def within(store: SqlStore, work: Callable[[Connection], Any]) -> Any:
    """Do something with the store's own connection, behind its back."""
    with store._writing.begin() as connection:
        return work(connection)


class TestTheSchema:
    async def test_of_the_migrations_is_that_of_the_tables(self, url: str) -> None:
        async with open_database(url) as store:

            def compare(connection: Connection) -> Any:
                options = {"compare_type": True, "compare_server_default": True}
                return compare_metadata(
                    MigrationContext.configure(connection, opts=options),
                    metadata,
                )

            assert within(store, compare) == []

    async def test_names_an_owner_in_every_table_and_leads_every_key_with_it(
        self,
        url: str,
    ) -> None:
        async with open_database(url) as store:

            def look(connection: Connection) -> None:
                inspector = inspect(connection)
                for table in set(metadata.tables) - {audit.name for audit in AUDIT}:
                    columns = {column["name"]: column for column in inspector.get_columns(table)}
                    assert columns["user_id"]["nullable"] is False
                    for key in inspector.get_foreign_keys(table):
                        assert key["constrained_columns"][0] == "user_id"
                        assert key["options"]["ondelete"] == "CASCADE"

            within(store, look)

    async def test_is_left_alone_when_it_is_up_to_date(self, url: str) -> None:
        for _ in range(3):
            async with open_database(url) as store:
                await store.commit([commit()])
                assert await store.thread(ADA, T1) is not None

    async def test_is_made_by_one_when_many_begin_at_once(self, postgres_url: str) -> None:
        stores: list[SqlStore] = []

        async def begin() -> None:
            async with open_database(postgres_url) as store:
                stores.append(store)
                await store.ping()

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(begin)
        assert len(stores) == 4

    async def test_can_be_taken_back_and_made_anew(self, url: str) -> None:
        from alembic import command  # noqa: PLC0415
        from alembic.config import Config  # noqa: PLC0415

        from creche_server.database import connection as module  # noqa: PLC0415

        async with open_database(url) as store:

            def back_and_forth(connection: Connection) -> list[str]:
                config = Config()
                folder = Path(module.__file__).parent / "migrations"
                config.set_main_option("script_location", str(folder))
                config.attributes["connection"] = connection
                command.downgrade(config, "base")
                left = inspect(connection).get_table_names()
                migrate(connection)
                return left

            assert set(within(store, back_and_forth)) <= {"alembic_version"}
            await store.commit([commit()])


def mode_of(path: Path | str) -> int:
    """Who may do what with it."""
    return stat.S_IMODE(Path(path).stat().st_mode)


class TestOnSqlite:
    async def test_a_commit_survives_a_power_cut_and_readers_do_not_wait(
        self,
        sqlite_url: str,
    ) -> None:
        async with open_database(sqlite_url) as store:

            def look(connection: Connection) -> list[Any]:
                return [
                    connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                    for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
                ]

            assert within(store, look) == ["wal", 2, 1, 5000]

    async def test_a_writer_of_another_process_is_waited_for(
        self,
        tmp_path: Path,
        sqlite_url: str,
    ) -> None:
        async with open_database(sqlite_url) as store:
            with contextlib.closing(sqlite3.connect(tmp_path / "creche.db")) as other:
                other.isolation_level = None
                other.execute("BEGIN IMMEDIATE")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(store.commit, [commit()])
                    await trio.sleep(0.05)
                    assert await store.thread(ADA, T1) is None
                    other.execute("COMMIT")
            assert await store.thread(ADA, T1) is not None

    @pytest.mark.parametrize("mask", [0o000, 0o022])
    async def test_nobody_else_can_read_it(self, tmp_path: Path, mask: int) -> None:
        """Neither in a directory that was there before, nor elsewhere."""
        (tmp_path / "open").mkdir(mode=0o755)
        before = os.umask(mask)
        try:
            for place in (tmp_path / "open" / "creche.db", tmp_path / "new" / "x.db"):
                async with open_database(f"sqlite:///{place}") as store:
                    await store.commit([commit()])
                    modes = {name: mode_of(f"{place}{name}") for name in ("", "-wal", "-shm")}
                    assert set(modes.values()) == {0o600}, modes
        finally:
            os.umask(before)
        assert mode_of(tmp_path / "new") == 0o700


class TestOnPostgres:
    """The role is no superuser, so that row-level security is in force."""

    async def test_a_query_that_forgot_its_owner_sees_the_users_rows_only(
        self,
        postgres_url: str,
    ) -> None:
        async with open_database(postgres_url) as store:
            for user in (ADA, BOB):
                await store.commit(
                    [
                        commit(
                            user,
                            runs=(record(user=user),),
                            messages=(said("run-a", "x"),),
                            questions=(asked(user=user),),
                            chunk=chunk(1, 1),
                            spent=((NOON.date(), Spending(tokens=1)),),
                        ),
                    ],
                )
            with psycopg.connect(postgres_url, autocommit=False) as connection:
                for table in set(metadata.tables) - {audit.name for audit in AUDIT}:
                    owners = sql_rows(connection, f"SELECT user_id FROM {table}", user=None)
                    assert owners == [], f"nobody set: {table}"
                    owners = sql_rows(connection, f"SELECT user_id FROM {table}", user="ada")
                    assert owners == [("ada",)], table
                    connection.rollback()

    @pytest.mark.parametrize(
        "statement",
        [
            "INSERT INTO threads SELECT 'bob', 'forged', '', '', 0, now(), now()",
            "UPDATE threads SET user_id = 'bob'",
            "INSERT INTO chunks VALUES ('bob', 'thread-1', 1, 1, 'x')",
            "INSERT INTO spending VALUES ('bob', '2026-05-17', 1, 1, 1)",
        ],
    )
    async def test_a_row_of_somebody_elses_cannot_be_written(
        self,
        postgres_url: str,
        statement: str,
    ) -> None:
        async with open_database(postgres_url) as store:
            await store.commit([commit()])
            with psycopg.connect(postgres_url) as connection:
                with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level"):
                    sql_rows(connection, statement, user="ada")

    @pytest.mark.parametrize("statement", ["DELETE FROM threads", "UPDATE threads SET title = 'x'"])
    async def test_a_row_of_somebody_elses_cannot_be_changed(
        self,
        postgres_url: str,
        statement: str,
    ) -> None:
        async with open_database(postgres_url) as store:
            await store.commit([commit(BOB, opens="Bob's")])
            with psycopg.connect(postgres_url) as connection:
                sql_rows(connection, statement, user="ada")
                connection.commit()
            thread = await store.thread(BOB, T1)
            assert thread is not None
            assert thread.title == "Bob's"

    async def test_the_user_is_forgotten_with_the_transaction(self, postgres_url: str) -> None:
        """Pooled connections go from user to user."""
        async with open_database(postgres_url) as store:
            await store.commit([commit()])
            await store.thread(ADA, T1)

            def look(connection: Connection) -> list[Any]:
                rows = connection.execute(text("SELECT user_id FROM threads")).all()
                setting = connection.execute(
                    text("SELECT current_setting('app.user_id', true)"),
                ).scalar()
                return [rows, setting or None]

            for _ in range(READERS + 2):
                assert within(store, look) == [[], None]

    async def test_recovery_reads_runs_of_all_and_nothing_else(self, postgres_url: str) -> None:
        async with open_database(postgres_url) as store:
            for user in (ADA, BOB):
                await store.commit([commit(user, runs=(record(user=user),))])
            found = await store.unfinished_runs()
            assert {run.user_id for run in found} == {ADA, BOB}
            with psycopg.connect(postgres_url) as connection:
                connection.execute("SELECT set_config('app.recovery', 'on', true)")
                assert len(connection.execute("SELECT 1 FROM runs").fetchall()) == 2
                for table in ("threads", "messages", "chunks"):
                    rows = connection.execute(f"SELECT 1 FROM {table}".encode()).fetchall()
                    assert rows == [], table
                changed = connection.execute("UPDATE runs SET status = 'x'").rowcount
                assert changed == 0

    async def test_a_group_of_many_users_is_one_transaction(self, postgres_url: str) -> None:
        async with open_database(postgres_url) as store:
            await store.commit([commit(UserId(f"user-{n}")) for n in range(20)])
            faulty = commit(BOB, ThreadId("absent"), opens=None, chunk=chunk(1, 1))
            with pytest.raises(Exception, match="foreign key"):
                await store.commit([commit(ADA), faulty])
            assert await store.thread(ADA, T1) is None
            for number in range(20):
                user = UserId(f"user-{number}")
                assert [thread.user_id for thread in await store.threads(user)] == [user]

    async def test_a_lost_connection_is_replaced(self, postgres_url: str) -> None:
        """As after a restart of the database."""
        async with open_database(postgres_url) as store:
            await store.commit([commit()])
            with psycopg.connect(postgres_url, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()",
                )
            assert await store.thread(ADA, T1) is not None
            await store.commit([commit(opens=None, chunk=chunk(1, 1))])


def sql_rows(
    connection: psycopg.Connection[Any],
    statement: str,
    *,
    user: str | None,
) -> list[tuple[Any, ...]]:
    if user is not None:
        connection.execute("SELECT set_config('app.user_id', %s, true)", [user])
    cursor = connection.execute(statement.encode())
    return cursor.fetchall() if cursor.description else []


class TestTheClaim:
    """On PostgreSQL, where it is a connection's, and connections come and go."""

    @staticmethod
    @contextlib.contextmanager
    def after_a_restart(postgres_url: str) -> Iterator[psycopg.Connection[Any]]:
        """A connection that is made when all the others have just been broken."""
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            yield connection

    async def test_is_made_again_when_its_connection_is_lost(self, postgres_url: str) -> None:
        async with open_database(postgres_url) as store, open_database(postgres_url) as other:
            async with open_claim(store._engine, check_interval=0.02):
                with self.after_a_restart(postgres_url) as connection:

                    def held() -> bool:
                        cursor = connection.execute(
                            "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND database = "
                            "(SELECT oid FROM pg_database WHERE datname = current_database())",
                        )
                        return cursor.fetchone() is not None

                    await eventually(held, "the claim is held")
                with pytest.RaisesGroup(AlreadyServedError, allow_unwrapped=True):
                    async with open_claim(other._engine):
                        pytest.fail("two servers on one database")

    async def test_that_somebody_else_has_taken_meanwhile_ends_its_server(
        self,
        postgres_url: str,
    ) -> None:
        async with open_database(postgres_url) as store, open_database(postgres_url) as other:
            with trio.fail_after(10), pytest.RaisesGroup(AlreadyServedError):
                async with open_claim(store._engine, check_interval=0.5):
                    with self.after_a_restart(postgres_url):
                        async with open_claim(other._engine):
                            await trio.sleep_forever()

    async def test_is_given_back_with_its_block(self, postgres_url: str) -> None:
        async with open_database(postgres_url) as store, open_database(postgres_url) as other:
            for claimant in (store, other, store):
                async with open_claim(claimant._engine):
                    pass


class TestOnBoth:
    async def test_a_commit_whose_answer_is_lost_is_in_doubt(self, url: str) -> None:
        """It may have been taken; any other failure has changed nothing."""
        async with open_database(url) as store:
            lost = OperationalError("COMMIT", None, Exception("the line went dead"))

            def lose(_connection: Connection) -> None:
                raise lost

            event.listen(store._engine, "commit", lose)
            with pytest.raises(CommitInDoubtError):
                await store.commit([commit()])
            event.remove(store._engine, "commit", lose)
            await store.commit([commit()])
            with pytest.raises(IntegrityError):
                await store.commit(
                    [commit(thread=ThreadId("absent"), opens=None, chunk=chunk(1, 1))]
                )

    async def test_who_wants_to_be_alone_and_is_not_changes_nothing(self, url: str) -> None:
        """A newer server beside an older one must not migrate what that one is at work on."""

        def tables(connection: Connection) -> set[str]:
            return set(inspect(connection).get_table_names())

        async with open_database(url, alone=True) as store:
            within(store, lambda c: c.execute(text("DROP TABLE alembic_version")))
            before = within(store, tables)
            with pytest.RaisesGroup(AlreadyServedError, allow_unwrapped=True):
                async with open_database(url, alone=True):
                    pytest.fail("two servers on one database")
            assert within(store, tables) == before

    @pytest.mark.parametrize("words", ["a\0b", "\0"])
    async def test_words_with_a_nul_are_kept(self, url: str, words: str) -> None:
        """A model may say it; if it cannot be stored, its run never ends."""
        async with open_database(url) as store:
            message = AssistantMessage(id=MessageId("m"), content=words)
            await store.commit(
                [
                    commit(
                        opens=words,
                        runs=(record(reason=words),),
                        messages=(said("run-a", "", message=message),),
                    ),
                ],
            )
            (found,) = await store.messages(ADA, T1)
            assert found.message == message

    async def test_what_people_said_is_in_no_error(
        self,
        url: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Errors are logged, and a log is not the place for it."""
        async with open_database(url) as store:
            faulty = Commit(
                user_id=ADA,
                thread_id=T1,
                messages=(said("run-a", "canary-of-a-person"),),
            )
            with pytest.raises(Exception, match=r"(?i)foreign key") as info:
                await store.commit([faulty])
            within(store, lambda c: c.execute(text("ALTER TABLE messages RENAME TO gone")))
            with pytest.raises(Exception, match=r"(?i)messages") as second:
                await store.search_messages(ADA, "canary-of-a-person", limit=1)
        for error in (info.value, second.value):
            assert "canary-of-a-person" not in f"{error} {error!r}"

    async def test_a_cancelled_write_is_either_there_or_not_when_the_caller_goes_on(
        self,
        url: str,
    ) -> None:
        async with open_database(url) as store:
            for number in range(20):
                thread = ThreadId(f"thread-{number}")
                with trio.move_on_after(0.0003 * number):
                    await store.commit([commit(thread=thread)])
                first = await store.thread(ADA, thread)
                await trio.sleep(0.01)
                assert await store.thread(ADA, thread) == first

    async def test_cancelled_reads_lose_no_connection(self, url: str) -> None:
        async with open_database(url) as store:
            for _ in range(40):
                with trio.move_on_after(0.0002):
                    await store.threads(ADA)
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    for _ in range(3 * READERS):
                        nursery.start_soon(store.threads, ADA)

    async def test_more_at_once_than_there_are_connections_wait(self, url: str) -> None:
        async with open_database(url) as store:
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    for number in range(60):
                        thread = ThreadId(f"thread-{number}")
                        nursery.start_soon(store.commit, [commit(thread=thread)])
                        nursery.start_soon(store.threads, ADA)
                        nursery.start_soon(store.ping)
            assert len(await store.threads(ADA)) == 60

    async def test_a_thread_that_is_opened_again_keeps_its_title_and_epoch(self, url: str) -> None:
        async with open_database(url) as store:
            await store.commit([commit(opens="")])
            await store.commit([commit(opens="First words")])
            await store.commit(
                [
                    Commit(
                        user_id=ADA,
                        thread_id=T1,
                        opens=NewThread(title="Later words", epoch="other"),
                    ),
                ],
            )
            thread = await store.thread(ADA, T1)
            assert thread is not None
            assert (thread.title, thread.epoch) == ("First words", "epoch-1")

    async def test_run_ids_of_two_threads_of_a_user_are_not_mixed_up(self, url: str) -> None:
        """A run id is its user's: the second thread cannot take the first one's run over."""
        async with open_database(url) as store:
            await store.commit([commit(runs=(record("run-a"),))])
            with contextlib.suppress(Exception):
                other = ThreadId("thread-2")
                await store.commit([commit(thread=other, runs=(record("run-a", thread=other),))])
            run = await store.run(ADA, RunId("run-a"))
            assert run is not None
            assert run.thread_id == T1


class TestAServer:
    async def test_on_postgres_serves_as_one_on_sqlite(
        self,
        tmp_path: Path,
        postgres_url: str,
    ) -> None:
        async with open_server(tmp_path, database=postgres_url) as server:
            async with server.chat() as chat, server.chat(user="bob") as bob:
                await chat.subscribe()
                await bob.subscribe()
                await chat.run('tokens=30 tool=calculator:{"expression":"1+1"}')
                await bob.run("tokens=2")
                seen = chat.raw_events
            async with server.chat() as chat:
                await chat.subscribe(since=3)
                await chat.until(lambda: len(chat.raw_events) == len(seen) - 3, "the rest")
                assert chat.raw_events == seen[3:]
            async with server.http("bob") as http:
                assert len((await http.get("/threads")).json()) == 1

    async def test_says_that_it_is_not_ready_while_its_database_is_away(
        self,
        tmp_path: Path,
        postgres_url: str,
    ) -> None:
        """New connections are refused and old ones ended, as while PostgreSQL restarts."""
        from tests.server.database.postgres import admin_url  # noqa: PLC0415

        name = postgres_url.rpartition("/")[2]
        async with open_server(tmp_path, database=postgres_url) as server:
            async with server.http() as http, server.chat() as chat:
                assert (await http.get("/readyz")).status_code == 200
                await chat.subscribe()
                with psycopg.connect(admin_url(), autocommit=True) as admin:
                    admin.execute(f'ALTER ROLE "{name}" NOLOGIN'.encode())
                    admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                        [name],
                    )
                    try:
                        answer = await http.get("/readyz")
                        assert answer.status_code == 503
                        assert answer.json() == {"status": "store unavailable"}
                        assert (await http.get("/healthz")).status_code == 200
                        with pytest.raises(CommandError) as info:
                            await chat.start("tokens=1")
                        assert info.value.code == "unavailable"
                    finally:
                        admin.execute(f'ALTER ROLE "{name}" LOGIN'.encode())
                assert (await http.get("/readyz")).status_code == 200
                run = await chat.run("tokens=1")
                assert run[-1]["type"] == "RUN_FINISHED"

    async def test_shows_no_terminal_before_it_is_stored_and_loses_none(
        self,
        tmp_path: Path,
        postgres_url: str,
    ) -> None:
        from tests.server.database.postgres import admin_url  # noqa: PLC0415

        name = postgres_url.rpartition("/")[2]
        go = trio.Event()

        async def wait(run: Any) -> None:
            await go.wait()
            await run.emit.text("said while the store was away")

        async with open_server(tmp_path, {"wait": wait}, database=postgres_url) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run_id = await chat.start("go", "wait")
                await chat.until(lambda: chat.seen("RUN_STARTED"))
                with psycopg.connect(admin_url(), autocommit=True) as admin:
                    admin.execute(f'ALTER ROLE "{name}" NOLOGIN'.encode())
                    admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                        [name],
                    )
                    try:
                        go.set()
                        await chat.until(lambda: chat.seen("TEXT_MESSAGE_END"), "the words")
                        await trio.sleep(0.3)  # three tries of the writer
                        assert chat.terminal(run_id) is None
                    finally:
                        admin.execute(f'ALTER ROLE "{name}" LOGIN'.encode())
                assert (await chat.finished(run_id))["outcome"] == {"type": "success"}

    async def test_beside_another_on_the_same_database_leaves_its_runs_alone(
        self,
        tmp_path: Path,
        postgres_url: str,
    ) -> None:
        """It refuses to start, or shares; but a live run of another process is not lost."""
        async with open_server(tmp_path / "one", database=postgres_url) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run_id = await chat.start("hang")
                await chat.until(lambda: chat.seen("RUN_STARTED"))
                stop = Stop()
                settings = settings_for(tmp_path / "two", database=postgres_url)
                try:
                    with trio.fail_after(10):
                        await serve(settings, stop=stop, announce=lambda _: stop.soon.set())
                except BaseException as error:  # noqa: BLE001
                    assert isinstance(next(leaves(error)), AlreadyServedError)
                async with open_database(postgres_url) as store:
                    run = await store.run(ADA, RunId(run_id))
                    assert run is not None
                    assert run.status == "running"
                await chat.ask("run.cancel", run_id=run_id, wait=True)
                await chat.finished(run_id)
                async with open_database(postgres_url) as store:
                    log = await log_of(store, "ada", "thread-a")
        terminals = [event for event in log if event["type"] in {"RUN_FINISHED", "RUN_ERROR"}]
        assert len(terminals) == 1

    async def test_logs_nothing_of_what_people_said_when_it_cannot_be_stored(
        self,
        tmp_path: Path,
        sqlite_url: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.DEBUG, logger="creche")
        async with open_server(tmp_path, database=sqlite_url) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                await chat.run("tokens=1")
                with contextlib.closing(sqlite3.connect(tmp_path / "creche.db")) as other:
                    other.execute("ALTER TABLE messages RENAME COLUMN words TO other")
                with pytest.raises(CommandError):
                    await chat.start("canary-of-a-person")
                with contextlib.closing(sqlite3.connect(tmp_path / "creche.db")) as other:
                    other.execute("ALTER TABLE messages RENAME COLUMN other TO words")
                await chat.run("tokens=1")
        (failed,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
        assert failed.getMessage() == "a commit failed and its run was not started"
        assert "no column named words" in vars(failed)["error"]
        shown = "".join(f"{r.getMessage()} {r.exc_text} {vars(r)}" for r in caplog.records)
        assert "canary-of-a-person" not in shown


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgres://u@h/d", "postgresql+psycopg"),
        ("postgresql://u@h/d", "postgresql+psycopg"),
        ("postgresql+asyncpg://u@h/d", "postgresql+psycopg"),
        ("sqlite:///x.db", "sqlite"),
        ("sqlite+aiosqlite:///x.db", "sqlite"),
    ],
)
def test_a_database_url_is_opened_with_our_own_driver(url: str, driver: str) -> None:
    assert checked_url(url).drivername == driver


@pytest.mark.parametrize(
    "url",
    ["", "x", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory", "mysql://u:pw@h"],
)
def test_a_database_url_that_names_none_of_ours_is_refused(url: str) -> None:
    with pytest.raises(DatabaseUrlError, match="use sqlite:///PATH") as info:
        checked_url(url)
    assert "pw" not in str(info.value)
