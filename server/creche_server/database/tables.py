"""The tables. Every row but the audit's names its owner, and every key begins with the owner.

The migrations say the same in Alembic's words; a test holds the two together.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.types import TypeDecorator

ID_LENGTH: Final = 256  # creche's longest id, in characters


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite keeps no zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        del dialect
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        del dialect
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


# SQLite counts rows up by itself only in a column that is INTEGER to the letter.
_RowId: Final = BigInteger().with_variant(Integer, "sqlite")

metadata: Final = MetaData()  # creche: shared tables are added on import only; no rows in it


def _owned_by_thread() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["user_id", "thread_id"],
        ["threads.user_id", "threads.thread_id"],
        ondelete="CASCADE",
    )


threads: Final = Table(
    "threads",
    metadata,
    Column("user_id", String(ID_LENGTH), primary_key=True),
    Column("thread_id", String(ID_LENGTH), primary_key=True),
    Column("title", Text, nullable=False),
    Column("epoch", String(32), nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Index("threads_by_change", "user_id", "updated_at"),
    Index("threads_of_anybody", "thread_id"),  # for `is_anothers`
)

_UNFINISHED: Final = text("last_seq IS NULL")

runs: Final = Table(
    "runs",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),  # the order of asking
    Column("user_id", String(ID_LENGTH), nullable=False),
    Column("run_id", String(ID_LENGTH), nullable=False),
    Column("thread_id", String(ID_LENGTH), nullable=False),
    Column("agent", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("first_seq", BigInteger),
    Column("last_seq", BigInteger),
    Column("reason", Text),
    Column("receipt", JSON(none_as_null=True)),
    Column("rolled_back", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("user_id", "run_id", name="runs_by_id"),
    Index("runs_by_thread", "user_id", "thread_id"),
    Index("runs_of_anybody", "run_id"),
    Index(
        "runs_unfinished",
        "id",
        sqlite_where=_UNFINISHED,
        postgresql_where=_UNFINISHED,
    ),
    _owned_by_thread(),
)

messages: Final = Table(
    "messages",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),
    Column("user_id", String(ID_LENGTH), nullable=False),
    Column("thread_id", String(ID_LENGTH), nullable=False),
    Column("run_id", String(ID_LENGTH), nullable=False),
    Column("role", String(16), nullable=False),
    Column("words", Text, nullable=False),  # what a search looks through
    Column("data", LargeBinary, nullable=False),  # the message as JSON
    Column("created_at", UtcDateTime, nullable=False),
    Index("messages_by_thread", "user_id", "thread_id", "id"),
    _owned_by_thread(),
)

chunks: Final = Table(
    "chunks",
    metadata,
    Column("user_id", String(ID_LENGTH), primary_key=True),
    Column("thread_id", String(ID_LENGTH), primary_key=True),
    Column("first_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),  # entries as JSON, one a line
    _owned_by_thread(),
)

# Of no thread, for what was spent stays spent when its thread is deleted.
spending: Final = Table(
    "spending",
    metadata,
    Column("user_id", String(ID_LENGTH), primary_key=True),
    Column("day", Date, primary_key=True),  # in UTC
    Column("tokens", BigInteger, nullable=False),
    Column("micro_usd", BigInteger, nullable=False),
    Column("tool_calls", BigInteger, nullable=False),
)

questions: Final = Table(
    "questions",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),  # the order of asking
    Column("user_id", String(ID_LENGTH), nullable=False),
    Column("question_id", String(ID_LENGTH), nullable=False),
    Column("thread_id", String(ID_LENGTH), nullable=False),
    Column("run_id", String(ID_LENGTH), nullable=False),
    Column("agent", Text, nullable=False),
    Column("reason", String(32), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("schema", LargeBinary, nullable=False),  # of the answer, as JSON
    Column("asked_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("status", String(16), nullable=False),
    Column("closed_at", UtcDateTime),
    Column("subagent_run_id", String(ID_LENGTH)),
    Column("tool_call_id", Text),
    Column("tool_name", Text),
    Column("arguments", Text),  # JSON, its secrets redacted
    Column("digest", String(64)),
    UniqueConstraint("user_id", "question_id", name="questions_by_id"),
    Index("questions_by_thread", "user_id", "thread_id"),
    Index("questions_of_anybody", "question_id"),
    _owned_by_thread(),
)

# Of everybody and of nobody: its rows are never changed, which triggers see to.
audit_records: Final = Table(
    "audit_records",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("time", UtcDateTime, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("user_id", String(ID_LENGTH)),  # who acted; null for nobody we know
    Column("claimed_owner", Text),
    Column("resource", Text, nullable=False),
    Column("operation", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("correlation_id", Text, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("first", UtcDateTime, nullable=False),
    Column("last", UtcDateTime, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Index("audit_by_user", "user_id", "seq"),
)

audit_heads: Final = Table(
    "audit_heads",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # 1: there is one row
    Column("seq", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("mac", String(64)),
)

AUDIT: Final = (audit_records, audit_heads)
