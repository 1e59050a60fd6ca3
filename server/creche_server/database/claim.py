"""One server a database: another would take our live runs for lost ones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

import trio
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from creche_server.data_directory import AlreadyServedError, locked_file

CHECK_INTERVAL: Final = 2.0  # seconds

_RELEASE_TIMEOUT: Final = 1.0  # seconds

_CLAIM: Final = 0x63726564  # any number that is ours alone; PostgreSQL only

_log: Final = logging.getLogger("creche.database")


@contextlib.asynccontextmanager
async def open_claim(
    engine: Engine, *, check_interval: float = CHECK_INTERVAL
) -> AsyncIterator[None]:
    """Have the database to ourselves; the claim goes with the process, however that ends.

    On SQLite it is a lock file beside the database. On PostgreSQL it is an advisory lock, which
    goes with its connection: one that is lost is made again, and should another server have
    been quicker, the block ends. Raises AlreadyServedError, then as before it.
    """
    if engine.dialect.name != "postgresql":
        with locked_file(f"{engine.url.database}.lock", _refusal(engine)):
            yield
        return
    claim = _Claim(engine)
    try:
        await trio.to_thread.run_sync(claim.take)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep, claim, check_interval)
            yield
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(_RELEASE_TIMEOUT, shield=True):
            await trio.to_thread.run_sync(claim.release, abandon_on_cancel=True)


async def _keep(claim: _Claim, check_interval: float) -> None:
    while True:
        await trio.sleep(check_interval)
        try:
            await trio.to_thread.run_sync(claim.renew)
        except SQLAlchemyError as error:
            # Nor can anybody else reach it, or they have been quicker: the next try tells.
            _log.warning("the database cannot be reached", extra={"error": str(error.args[0])})


class _Claim:
    """An advisory lock, and the connection that holds it. Its methods run in threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._holder: Connection | None = None

    def take(self) -> None:
        """Raises AlreadyServedError if somebody else has it."""
        # A connection outside the pool, so that closing it really ends its session.
        connection = self._engine.connect()
        connection.detach()
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _CLAIM}):
            connection.close()
            raise AlreadyServedError(_refusal(self._engine))
        self._holder = connection

    def renew(self) -> None:
        """Take it again if the connection that held it is gone."""
        if self._holder is not None:
            try:
                self._holder.execute(text("SELECT 1"))
            except SQLAlchemyError:
                self.close()
        if self._holder is None:
            self.take()

    def release(self) -> None:
        """Give it back, for the next server to have at once."""
        if self._holder is not None:
            # PostgreSQL takes its time to notice that a connection is gone.
            with contextlib.suppress(SQLAlchemyError):
                self._holder.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _CLAIM})
            self.close()

    def close(self) -> None:
        """Give up the connection, and with it the claim."""
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.close()


def _refusal(engine: Engine) -> str:
    where = engine.url.render_as_string(hide_password=True)
    return f"another server is at work on {where}; stop it, or choose another --database"
