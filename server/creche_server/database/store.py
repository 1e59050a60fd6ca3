"""The one repository layer: creche's `Store` on SQLAlchemy, in which every query takes the owner.

Everything is synchronous SQLAlchemy in a thread hop, and one hop is one whole transaction,
never abandoned: a caller that is cancelled waits for it, so no write commits behind its back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import trio
from sqlalchemy import (
    BindParameter,
    Connection,
    Engine,
    RowMapping,
    Select,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from creche import (
    Chunk,
    Commit,
    RunId,
    RunRecord,
    StoredMessage,
    ThreadId,
    ThreadRecord,
    UserId,
    decode_message,
    encode_message,
    role_of,
    text_of,
)
from creche_server.database.claim import open_claim
from creche_server.database.tables import chunks, messages, runs, threads

T = TypeVar("T")
Row = dict[str, Any]

_AS_USER: Final = text("SELECT set_config('app.user_id', :user_id, true)")
_AS_RECOVERY: Final = text("SELECT set_config('app.recovery', 'on', true)")

# What changes of a run after it was first written.
_RUN_CHANGES: Final = (
    "status",
    "started_at",
    "ended_at",
    "first_seq",
    "last_seq",
    "reason",
    "receipt",
)


def _given(name: str) -> BindParameter[Any]:
    """A value that comes with each row."""
    return bindparam(name)


# The queries, made once: SQLAlchemy takes longer to make one than to run it.

_THREAD: Final = select(threads).where(
    threads.c.user_id == _given("user"),
    threads.c.thread_id == _given("thread"),
)
_THREADS: Final = (
    select(threads)
    .where(threads.c.user_id == _given("user"))
    .order_by(threads.c.updated_at.desc(), threads.c.thread_id.desc())
    .limit(_given("most"))
    .offset(_given("skipped"))
)
_RUNS: Final = (
    select(runs)
    .where(runs.c.user_id == _given("user"), runs.c.thread_id == _given("thread"))
    .order_by(runs.c.id)
)
_RUN: Final = select(runs).where(runs.c.user_id == _given("user"), runs.c.run_id == _given("run"))
_MESSAGES: Final = (
    select(messages.c.run_id, messages.c.data, messages.c.created_at)
    .join(runs, (runs.c.user_id == messages.c.user_id) & (runs.c.run_id == messages.c.run_id))
    .where(messages.c.user_id == _given("user"), messages.c.thread_id == _given("thread"))
    .order_by(runs.c.id, messages.c.id)
)
_OLDEST_OF_THE_LATEST: Final = (
    select(runs.c.id)
    .where(runs.c.user_id == _given("user"), runs.c.thread_id == _given("thread"))
    .order_by(runs.c.id.desc())
    .offset(_given("skipped"))
    .limit(1)
)
_LATEST_MESSAGES: Final = _MESSAGES.where(
    # A thread with fewer runs has no such one, and keeps them all.
    runs.c.id >= func.coalesce(_OLDEST_OF_THE_LATEST.scalar_subquery(), 0),
)
_CHUNKS: Final = (
    select(chunks.c.first_seq, chunks.c.last_seq, chunks.c.data)
    .where(
        chunks.c.user_id == _given("user"),
        chunks.c.thread_id == _given("thread"),
        chunks.c.last_seq > _given("after"),
    )
    .order_by(chunks.c.first_seq)
    .limit(_given("most"))
)
_NEW_RUNS: Final = insert(runs)
_NEW_MESSAGES: Final = insert(messages)
_NEW_CHUNKS: Final = insert(chunks)


class SqlStore:
    """A `creche.Store`. Owned by `open_database`, which disposes of the engine."""

    def __init__(self, engine: Engine, *, readers: int) -> None:
        self._engine = engine
        self._writing = engine.execution_options(writes=True)
        self._walled = engine.dialect.name == "postgresql"  # by row-level security
        self._readers = trio.CapacityLimiter(readers)
        self._writer = trio.CapacityLimiter(1)
        dialect_insert = postgresql.insert if self._walled else sqlite.insert
        opening = dialect_insert(threads)
        self._open_threads = opening.on_conflict_do_update(
            index_elements=[threads.c.user_id, threads.c.thread_id],
            set_={"title": opening.excluded.title},
            where=threads.c.title == "",
        )
        recording = dialect_insert(runs)
        self._record_runs = recording.on_conflict_do_update(
            index_elements=[runs.c.user_id, runs.c.run_id],
            set_={name: recording.excluded[name] for name in _RUN_CHANGES},
        )
        self._touch_threads = (
            update(threads)
            .where(
                threads.c.user_id == _given("owner"),
                threads.c.thread_id == _given("thread"),
            )
            .values(
                updated_at=_given("moment"),
                last_seq=func.coalesce(_given("seq"), threads.c.last_seq),
                epoch=func.coalesce(_given("new_epoch"), threads.c.epoch),
            )
        )

    # --- writing

    async def commit(self, commits: Sequence[Commit]) -> None:
        await trio.to_thread.run_sync(self._commit, commits, limiter=self._writer)

    def _commit(self, commits: Sequence[Commit]) -> None:
        with self._writing.begin() as connection:
            if not self._walled:
                self._write(connection, commits)
                return
            by_user = sorted(commits, key=lambda commit: commit.user_id)
            for user_id, own in itertools.groupby(by_user, lambda commit: commit.user_id):
                self._become(connection, user_id)
                self._write(connection, list(own))

    def _write(self, connection: Connection, commits: Sequence[Commit]) -> None:
        moment = datetime.now(UTC)
        _many(
            connection,
            self._open_threads,
            (
                {
                    "user_id": commit.user_id,
                    "thread_id": commit.thread_id,
                    "title": _without_nul(commit.opens.title),
                    "epoch": commit.opens.epoch,
                    "last_seq": 0,
                    "created_at": moment,
                    "updated_at": moment,
                }
                for commit in commits
                if commit.opens is not None
            ),
        )
        _many(connection, _NEW_RUNS, (_run_row(r) for c in commits for r in c.new_runs))
        _many(connection, self._record_runs, (_run_row(r) for c in commits for r in c.runs))
        _many(
            connection,
            _NEW_MESSAGES,
            (_message_row(commit, stored) for commit in commits for stored in commit.messages),
        )
        _many(
            connection,
            _NEW_CHUNKS,
            (
                {
                    "user_id": commit.user_id,
                    "thread_id": commit.thread_id,
                    "first_seq": commit.chunk.first_seq,
                    "last_seq": commit.chunk.last_seq,
                    "data": commit.chunk.data,
                }
                for commit in commits
                if commit.chunk is not None
            ),
        )
        _many(
            connection,
            self._touch_threads,
            (
                {
                    "owner": commit.user_id,
                    "thread": commit.thread_id,
                    "moment": moment,
                    "seq": commit.chunk.last_seq if commit.chunk is not None else None,
                    "new_epoch": commit.epoch,
                }
                for commit in commits
            ),
        )

    async def delete_thread(self, user_id: UserId, thread_id: ThreadId) -> bool:
        def remove() -> bool:
            with self._writing.begin() as connection:
                self._become(connection, user_id)
                # Its runs, messages and chunks go with it: ON DELETE CASCADE.
                result = connection.execute(
                    delete(threads).where(
                        threads.c.user_id == user_id,
                        threads.c.thread_id == thread_id,
                    ),
                )
                return result.rowcount > 0

        return await trio.to_thread.run_sync(remove, limiter=self._writer)

    # --- reading

    async def thread(self, user_id: UserId, thread_id: ThreadId) -> ThreadRecord | None:
        rows = await self._rows(_THREAD, user=user_id, thread=thread_id)
        return _thread(rows[0]) if rows else None

    async def threads(
        self,
        user_id: UserId,
        *,
        limit: int = 100,
        offset: int = 0,
    ) -> list[ThreadRecord]:
        rows = await self._rows(_THREADS, user=user_id, most=limit, skipped=offset)
        return [_thread(row) for row in rows]

    async def messages(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        last_runs: int | None = None,
    ) -> list[StoredMessage]:
        rows: Sequence[RowMapping] = ()
        if last_runs is None:
            rows = await self._rows(_MESSAGES, user=user_id, thread=thread_id)
        elif last_runs > 0:
            rows = await self._rows(
                _LATEST_MESSAGES,
                user=user_id,
                thread=thread_id,
                skipped=last_runs - 1,
            )
        return [_message(row) for row in rows]

    async def runs(self, user_id: UserId, thread_id: ThreadId) -> list[RunRecord]:
        return [_run(row) for row in await self._rows(_RUNS, user=user_id, thread=thread_id)]

    async def run(self, user_id: UserId, run_id: RunId) -> RunRecord | None:
        rows = await self._rows(_RUN, user=user_id, run=run_id)
        return _run(rows[0]) if rows else None

    async def chunks(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        after: int,
        limit: int,
    ) -> list[Chunk]:
        rows = await self._rows(_CHUNKS, user=user_id, thread=thread_id, after=after, most=limit)
        return [Chunk(**row) for row in rows]

    async def search_messages(
        self,
        user_id: UserId,
        query: str,
        *,
        limit: int,
    ) -> list[tuple[ThreadId, StoredMessage]]:
        words = _without_nul(query).lower().split()
        if not words:
            return []
        found = (
            select(messages)
            .where(
                messages.c.user_id == _given("user"),
                *(func.lower(messages.c.words).contains(word, autoescape=True) for word in words),
            )
            .order_by(messages.c.id.desc())
            .limit(_given("most"))
        )
        rows = await self._rows(found, user=user_id, most=limit)
        return [(ThreadId(row["thread_id"]), _message(row)) for row in rows]

    async def unfinished_runs(self) -> list[RunRecord]:
        def read() -> Sequence[RowMapping]:
            with self._engine.begin() as connection:
                if self._walled:
                    connection.execute(_AS_RECOVERY)
                query = select(runs).where(runs.c.last_seq.is_(None))
                return connection.execute(query.order_by(runs.c.id)).mappings().all()

        return [_run(row) for row in await trio.to_thread.run_sync(read, limiter=self._readers)]

    def open_claim(self) -> AbstractAsyncContextManager[None]:
        """Have the database to ourselves; see `database.claim`."""
        return open_claim(self._engine)

    async def ping(self) -> None:
        """Ask the database for an answer; raises whatever its driver raises."""
        await self._hop(lambda connection: connection.execute(text("SELECT 1")))

    async def _rows(
        self, query: Select[*tuple[Any, ...]], *, user: UserId, **values: Any
    ) -> Sequence[RowMapping]:
        """The rows of a query about one user's things."""

        def read(connection: Connection) -> Sequence[RowMapping]:
            self._become(connection, user)
            return connection.execute(query, {"user": user, **values}).mappings().all()

        return await self._hop(read)

    async def _hop(self, work: Callable[[Connection], T]) -> T:
        def whole() -> T:
            with self._engine.begin() as connection:
                return work(connection)

        return await trio.to_thread.run_sync(whole, limiter=self._readers)

    def _become(self, connection: Connection, user_id: str) -> None:
        """Until this transaction's end, the database shows and takes this user's rows only."""
        if self._walled:
            connection.execute(_AS_USER, {"user_id": user_id})


def _many(connection: Connection, statement: Any, rows: Iterable[Row]) -> None:
    if listed := list(rows):
        connection.execute(statement, listed)


def _run_row(run: RunRecord) -> Row:
    row = {name: getattr(run, name) for name in _RUN_FIELDS}
    if run.reason is not None:
        row["reason"] = _without_nul(run.reason)
    return row


_RUN_FIELDS: Final = tuple(RunRecord.__dataclass_fields__)
_THREAD_FIELDS: Final = tuple(ThreadRecord.__dataclass_fields__)


def _without_nul(text: str) -> str:
    """PostgreSQL's text has no NUL; what is searched and shown can do without."""
    return text.replace("\0", "")


def _message_row(commit: Commit, stored: StoredMessage) -> Row:
    data = encode_message(stored.message)
    return {
        "user_id": commit.user_id,
        "thread_id": commit.thread_id,
        "run_id": stored.run_id,
        "role": role_of(stored.message),
        "words": _without_nul(text_of(stored.message)),
        "data": data,
        "created_at": stored.created_at,
    }


def _message(row: RowMapping) -> StoredMessage:
    return StoredMessage(
        run_id=RunId(row["run_id"]),
        message=decode_message(row["data"]),
        created_at=row["created_at"],
    )


def _run(row: RowMapping) -> RunRecord:
    return RunRecord(**{name: row[name] for name in _RUN_FIELDS})


def _thread(row: RowMapping) -> ThreadRecord:
    return ThreadRecord(**{name: row[name] for name in _THREAD_FIELDS})
