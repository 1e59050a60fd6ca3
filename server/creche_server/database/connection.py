"""Opens the database: the engine with its pool, claimed if asked, then migrated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import trio
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

from creche_server.database.claim import open_claim
from creche_server.database.store import SqlStore

READERS: Final = 4  # hops that read at once; writing is one more, and one at a time

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_CONNECT_TIMEOUT: Final = 5  # seconds; a hop to a thread cannot be cut short
_MIGRATION_LOCK: Final = 0x63726563  # any number that is ours alone; PostgreSQL only


_FORMS: Final = "use sqlite:///PATH or postgresql://USER@HOST/NAME"


class DatabaseUrlError(ValueError):
    """A database URL that names no database of ours; the message says what to write."""


@contextlib.asynccontextmanager
async def open_alone(url: str) -> AsyncIterator[None]:
    """A server's block around all that it opens in the database, which it has to itself.

    Nothing is touched before it is claimed; then the schema is brought up to date, once, so what
    is opened inside need not (`migrates=False`). Raises what `open_database` raises.
    """
    async with open_engine(url, alone=True) as engine:
        engine.dispose()  # of what migrating took: the claim's connection is its own
        yield


@contextlib.asynccontextmanager
async def open_database(
    url: str, *, alone: bool = False, migrates: bool = True
) -> AsyncIterator[SqlStore]:
    """A store on `url`, its schema brought up to date first, if it `migrates`.

    `sqlite:///PATH` or `postgresql://...`. `alone`, it has the database to itself for as long as
    the block, and touches nothing of it before it knows that it has; see `open_alone`, too.
    Resource handling: the pool is closed with the block. Raises DatabaseUrlError before anything
    is opened, AlreadyServedError, see `open_claim`, and sqlalchemy.exc.SQLAlchemyError if the
    database cannot be reached or migrated.
    """
    async with open_engine(url, alone=alone, migrates=migrates) as engine:
        yield SqlStore(engine, readers=READERS)


@contextlib.asynccontextmanager
async def open_engine(
    url: str, *, alone: bool = False, migrates: bool = True
) -> AsyncIterator[Engine]:
    """The engine alone, the schema brought up to date or left as it is; the same holds."""
    engine = _engine(checked_url(url))
    try:
        async with open_claim(engine) if alone else contextlib.nullcontext():
            if migrates:
                await trio.to_thread.run_sync(_migrate, engine)
            yield engine
    finally:
        engine.dispose()


def checked_url(text: str) -> URL:
    """The URL with the driver that we use. Raises DatabaseUrlError, which names no password."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        msg = f"the database URL cannot be read: {_FORMS}"
        raise DatabaseUrlError(msg) from None
    kind = url.get_backend_name()
    if kind in {"postgresql", "postgres"}:
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        msg = f"{kind} is not supported: {_FORMS}"
        raise DatabaseUrlError(msg)
    if not url.database or ":memory:" in url.database or url.query.get("mode") == "memory":
        # Each of the pool's connections would have a database of its own.
        msg = "SQLite needs a file: use sqlite:///PATH"
        raise DatabaseUrlError(msg)
    return url.set(drivername="sqlite")


def _engine(url: URL) -> Engine:
    """Not connected yet."""
    if url.get_backend_name() == "sqlite":
        return _sqlite(url)
    return create_engine(
        url,
        pool_size=READERS + 1,
        max_overflow=0,
        pool_pre_ping=True,
        connect_args={"connect_timeout": _CONNECT_TIMEOUT},
        hide_parameters=True,  # what people said is nothing for an error or a log
    )


def _migrate(engine: Engine) -> None:
    """Runs in a thread."""
    with engine.execution_options(writes=True).begin() as connection:
        migrate(connection)


def _sqlite(url: URL) -> Engine:
    if url.database is not None:
        path = Path(url.database)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What people said is nobody else's to read. SQLite gives -wal and -shm the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    engine = create_engine(
        url,
        pool_size=READERS + 1,
        max_overflow=0,
        connect_args={"check_same_thread": False},
        hide_parameters=True,  # what people said is nothing for an error or a log
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: object) -> None:
        # Transactions are begun below, by name; the driver must not begin any of its own.
        connection.isolation_level = None
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",  # a commit that we answered for survives a power cut
            "foreign_keys=ON",
            "busy_timeout=5000",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # A reader asks one question, which is a transaction by itself. A writer says so first:
        # one that only turns writer later may meet SQLITE_BUSY at once.
        if connection.get_execution_options().get("writes", False):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def migrate(connection: Connection) -> None:
    """Bring the schema up to date, one process at a time."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
