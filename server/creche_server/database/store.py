"""The one repository layer: creche's `Store` on SQLAlchemy, in which every query takes the owner.

Everything is synchronous SQLAlchemy in a thread hop, and one hop is one whole transaction,
never abandoned: a caller that is cancelled waits for it, so no write commits behind its back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from typing import Any, Final, TypeVar

import trio
from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    Select,
    delete,
    insert,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from creche import (
    Chunk,
    Commit,
    CommitInDoubtError,
    IdKind,
    QuestionRecord,
    RunId,
    RunRecord,
    Spending,
    StoredMessage,
    ThreadId,
    ThreadRecord,
    UserId,
)
from creche_server.database import queries
from creche_server.database.rows import (
    chunk_row,
    message_of,
    message_row,
    question_of,
    question_row,
    rolled_back_rows,
    run_of,
    run_row,
    spending_row,
    thread_of,
    thread_row,
    touch_row,
    without_nul,
)
from creche_server.database.tables import chunks, messages, runs, threads

T = TypeVar("T")
_AS_USER: Final = text("SELECT set_config('app.user_id', :user_id, true)")
_AS_RECOVERY: Final = text("SELECT set_config('app.recovery', 'on', true)")


class SqlStore:
    """A `creche.Store`. Owned by `open_database`, which disposes of the engine."""

    def __init__(self, engine: Engine, *, readers: int) -> None:
        self._engine = engine
        self._writing = engine.execution_options(writes=True)
        self._walled = engine.dialect.name == "postgresql"  # by row-level security
        self._readers = trio.CapacityLimiter(readers)
        self._writer = trio.CapacityLimiter(1)
        dialect_insert = postgresql.insert if self._walled else sqlite.insert
        self._open_threads = queries.open_threads(dialect_insert)
        self._record_runs = queries.record_runs(dialect_insert)
        self._add_spending = queries.add_spending(dialect_insert)
        self._record_questions = queries.record_questions(dialect_insert)

    # --- writing

    async def commit(self, commits: Sequence[Commit]) -> None:
        await trio.to_thread.run_sync(self._commit, commits, limiter=self._writer)

    def _commit(self, commits: Sequence[Commit]) -> None:
        with self._writing.connect() as connection, connection.begin() as transaction:
            self._write_all(connection, commits)
            try:
                transaction.commit()
            except SQLAlchemyError as error:
                connection.invalidate(error)  # whatever state it is in, nobody else is to meet it
                msg = "the database did not say whether it took a transaction"
                raise CommitInDoubtError(msg) from error

    def _write_all(self, connection: Connection, commits: Sequence[Commit]) -> None:
        if not self._walled:
            self._write(connection, commits)
        else:
            by_user = sorted(commits, key=lambda commit: commit.user_id)
            for user_id, own in itertools.groupby(by_user, lambda commit: commit.user_id):
                self._become(connection, user_id)
                self._write(connection, list(own))

    def _write(self, connection: Connection, commits: Sequence[Commit]) -> None:
        moment = datetime.now(UTC)
        for statement, rows in (
            (self._open_threads, (thread_row(c, moment) for c in commits if c.opens)),
            (insert(runs), (run_row(run) for c in commits for run in c.new_runs)),
            (self._record_runs, (run_row(run) for c in commits for run in c.runs)),
            (queries.ROLL_BACK, (row for c in commits for row in rolled_back_rows(c))),
            (insert(messages), (message_row(c, said) for c in commits for said in c.messages)),
            (self._record_questions, (question_row(q) for c in commits for q in c.questions)),
            (insert(chunks), (chunk_row(c) for c in commits if c.chunk)),
            (self._add_spending, (spending_row(c, *spent) for c in commits for spent in c.spent)),
            (queries.TOUCH_THREADS, (touch_row(c, moment) for c in commits)),
        ):
            if listed := list(rows):
                connection.execute(statement, listed)

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
        rows = await self._rows(queries.THREAD, user=user_id, thread=thread_id)
        return thread_of(rows[0]) if rows else None

    async def threads(
        self,
        user_id: UserId,
        *,
        limit: int = 100,
        offset: int = 0,
    ) -> list[ThreadRecord]:
        rows = await self._rows(queries.THREADS, user=user_id, most=limit, skipped=offset)
        return [thread_of(row) for row in rows]

    async def messages(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        last_runs: int | None = None,
    ) -> list[StoredMessage]:
        rows: Sequence[RowMapping] = ()
        if last_runs is None:
            rows = await self._rows(queries.MESSAGES, user=user_id, thread=thread_id)
        elif last_runs > 0:
            rows = await self._rows(
                queries.LATEST_MESSAGES,
                user=user_id,
                thread=thread_id,
                skipped=last_runs - 1,
            )
        return [message_of(row) for row in rows]

    async def runs(self, user_id: UserId, thread_id: ThreadId) -> list[RunRecord]:
        return [
            run_of(row) for row in await self._rows(queries.RUNS, user=user_id, thread=thread_id)
        ]

    async def run(self, user_id: UserId, run_id: RunId) -> RunRecord | None:
        rows = await self._rows(queries.RUN, user=user_id, run=run_id)
        return run_of(rows[0]) if rows else None

    async def open_questions(self, user_id: UserId, thread_id: ThreadId) -> list[QuestionRecord]:
        rows = await self._rows(queries.OPEN_QUESTIONS, user=user_id, thread=thread_id)
        return [question_of(row) for row in rows]

    async def question(self, user_id: UserId, question_id: str) -> QuestionRecord | None:
        rows = await self._rows(queries.QUESTION, user=user_id, question=question_id)
        return question_of(rows[0]) if rows else None

    async def chunks(
        self,
        user_id: UserId,
        thread_id: ThreadId,
        *,
        after: int,
        limit: int,
    ) -> list[Chunk]:
        rows = await self._rows(
            queries.CHUNKS, user=user_id, thread=thread_id, after=after, most=limit
        )
        return [Chunk(**row) for row in rows]

    async def spending(self, user_id: UserId, day: date) -> Spending:
        rows = await self._rows(queries.SPENDING, user=user_id, day=day)
        return Spending(**rows[0]) if rows else Spending()

    async def search_messages(
        self,
        user_id: UserId,
        query: str,
        *,
        limit: int,
    ) -> list[tuple[ThreadId, StoredMessage]]:
        words = without_nul(query).lower().split()
        if not words:
            return []
        rows = await self._rows(queries.containing(words), user=user_id, most=limit)
        return [(ThreadId(row["thread_id"]), message_of(row)) for row in rows]

    async def unfinished_runs(self) -> list[RunRecord]:
        def read() -> Sequence[RowMapping]:
            with self._engine.begin() as connection:
                if self._walled:
                    connection.execute(_AS_RECOVERY)
                return connection.execute(queries.UNFINISHED_RUNS).mappings().all()

        return [run_of(row) for row in await trio.to_thread.run_sync(read, limiter=self._readers)]

    async def is_anothers(self, kind: IdKind, id: str, user_id: UserId) -> bool:  # noqa: A002
        questions = queries.OF_ANOTHER_BEHIND_THE_WALL if self._walled else queries.OF_ANOTHER

        def ask(connection: Connection) -> bool:
            values = {"wanted": id, "asking": user_id}
            return bool(connection.scalar(questions[kind], values))

        return await self._hop(ask)

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
