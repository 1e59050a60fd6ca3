"""The audit in the database: an `AuditSink` on tables that take new rows only.

Records and head are written in one transaction, so a crash leaves nothing torn. It has an
engine, and so a connection, of its own: what users do never waits for what is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec
import trio
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    Select,
    func,
    insert,
    select,
    text,
    update,
)

from creche import (
    AuditHead,
    AuditKind,
    AuditQuery,
    AuditRecord,
    AuditTamperedError,
    Kept,
    Verification,
    verify,
)
from creche_server.database.connection import open_engine
from creche_server.database.tables import audit_heads, audit_records

T = TypeVar("T")
_THE_HEAD: Final = 1  # the id of the one row
_AS_AUDIT: Final = text("SELECT set_config('app.audit', 'on', true)")
_ROWS_AT_ONCE: Final = 1000


class SqlSink:
    """A `creche.AuditSink`. Owned by `open_sql_sink`, which disposes of the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writing = engine.execution_options(writes=True)
        self._walled = engine.dialect.name == "postgresql"
        self._head: AuditHead | None = None  # as we left it
        self._writer = trio.CapacityLimiter(1)

    async def load(self) -> Kept:
        def work(connection: Connection) -> Kept:
            head = self._head = self._read_head(connection)
            seq = 0 if head is None else head.seq
            query = select(audit_records).where(audit_records.c.seq >= seq)
            return Kept(head, [*self._records(connection, query)])

        return await self._hop(work, limiter=self._writer)

    async def append(self, records: Sequence[AuditRecord], head: AuditHead) -> None:
        def work() -> None:
            with self._writing.begin() as connection:
                self._become(connection)
                self._move_head(connection, head)
                if records:
                    connection.execute(insert(audit_records), [*map(_row_of, records)])

        await trio.to_thread.run_sync(work, limiter=self._writer)
        self._head = head

    def _move_head(self, connection: Connection, head: AuditHead) -> None:
        """Raises AuditTamperedError if somebody else has moved it."""
        values = msgspec.structs.asdict(head)
        if self._head is None:
            connection.execute(insert(audit_heads).values(id=_THE_HEAD, **values))
            return
        moved = connection.execute(
            update(audit_heads)
            .where(audit_heads.c.seq == self._head.seq, audit_heads.c.hash == self._head.hash)
            .values(**values),
        )
        if moved.rowcount != 1:
            msg = "the audit's head was moved behind its writer's back"
            raise AuditTamperedError(msg)

    async def find(self, query: AuditQuery) -> list[AuditRecord]:
        def work(connection: Connection) -> list[AuditRecord]:
            newest_first = select(audit_records).order_by(audit_records.c.seq.desc())
            chosen = newest_first.where(*_conditions(query)).limit(query.limit)
            rows = connection.execute(chosen).mappings()
            return [_record_of(row) for row in rows][::-1]

        return await self._hop(work)

    async def counts(self, query: AuditQuery) -> dict[AuditKind, int]:
        def work(connection: Connection) -> dict[AuditKind, int]:
            kind = audit_records.c.kind
            total = func.sum(audit_records.c.count).label("total")
            chosen = select(kind, total).where(*_conditions(query)).group_by(kind)
            rows = connection.execute(chosen).mappings()
            return {row["kind"]: int(row["total"]) for row in rows}

        return await self._hop(work)

    async def check(self, key: bytes | None) -> Verification:
        def work(connection: Connection) -> Verification:
            head = self._read_head(connection)
            records = self._records(connection, select(audit_records))
            return verify(records, head, key=key)

        return await self._hop(work)

    async def _hop(
        self,
        work: Callable[[Connection], T],
        *,
        limiter: trio.CapacityLimiter | None = None,
    ) -> T:
        def whole() -> T:
            with self._engine.begin() as connection:
                self._become(connection)
                return work(connection)

        return await trio.to_thread.run_sync(whole, limiter=limiter)

    def _become(self, connection: Connection) -> None:
        """Until this transaction's end, the database shows and takes the audit's rows."""
        if self._walled:
            connection.execute(_AS_AUDIT)

    @staticmethod
    def _read_head(connection: Connection) -> AuditHead | None:
        row = connection.execute(select(audit_heads)).mappings().one_or_none()
        return None if row is None else AuditHead(seq=row.seq, hash=row.hash, mac=row.mac)

    @staticmethod
    def _records(
        connection: Connection, query: Select[*tuple[Any, ...]]
    ) -> Iterator[AuditRecord | None]:
        streamed = connection.execution_options(yield_per=_ROWS_AT_ONCE)
        for row in streamed.execute(query.order_by(audit_records.c.seq)).mappings():
            yield _record_of(row)


@contextlib.asynccontextmanager
async def open_sql_sink(url: str, *, migrates: bool = True) -> AsyncIterator[SqlSink]:
    """A sink on a database of ours, its schema brought up to date first; see `open_database`.

    Without `migrates` the database is left as it is: to be read only.
    """
    async with open_engine(url, migrates=migrates) as engine:
        yield SqlSink(engine)


def _conditions(query: AuditQuery) -> Iterator[ColumnElement[bool]]:
    columns = audit_records.c
    if query.user is not None:
        yield columns.user_id == query.user
    if query.kind is not None:
        yield columns.kind == query.kind
    if query.since is not None:
        yield columns.last >= query.since
    if query.until is not None:
        yield columns.first < query.until


def _row_of(record: AuditRecord) -> dict[str, Any]:
    row = msgspec.structs.asdict(record)
    row["user_id"] = row.pop("user")
    return row


def _record_of(row: RowMapping) -> AuditRecord:
    fields = dict(row)
    fields["user"] = fields.pop("user_id")
    return AuditRecord(**fields)
