"""One server a database: another would take our live runs for lost ones."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio
from sqlalchemy import Connection, Engine, text

from creche_server.data_directory import AlreadyServedError, locked_file

_CLAIM = 0x63726564  # any number that is ours alone; PostgreSQL only


@contextlib.asynccontextmanager
async def open_claim(engine: Engine) -> AsyncIterator[None]:
    """Have the database to ourselves; the claim goes with the process, however that ends.

    Raises AlreadyServedError. On PostgreSQL it is an advisory lock of one connection's, on
    SQLite a lock file beside the database.
    """
    if engine.dialect.name == "postgresql":
        connection = await trio.to_thread.run_sync(_claim, engine)
        try:
            yield
        finally:
            connection.close()
    else:
        with locked_file(f"{engine.url.database}.lock", _refusal(engine)):
            yield


def _claim(engine: Engine) -> Connection:
    # A connection outside the pool, so that closing it really ends its session.
    connection = engine.execution_options(isolation_level="AUTOCOMMIT").connect()
    connection.detach()
    claimed = connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _CLAIM})
    if not claimed:
        connection.close()
        raise AlreadyServedError(_refusal(engine))
    return connection


def _refusal(engine: Engine) -> str:
    where = engine.url.render_as_string(hide_password=True)
    return f"another server is at work on {where}; stop it, or choose another --database"
