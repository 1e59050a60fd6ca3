"""Threads, runs, messages and event logs; on PostgreSQL each row is its owner's alone."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_MOMENT = sa.DateTime(timezone=True)
_UNFINISHED = sa.text("last_seq IS NULL")
_TABLES = ("threads", "runs", "messages", "chunks")


def _id(name: str, *, primary_key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(256), primary_key=primary_key, nullable=False)


def _owned_by_thread() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["user_id", "thread_id"],
        ["threads.user_id", "threads.thread_id"],
        ondelete="CASCADE",
    )


def upgrade() -> None:
    op.create_table(
        "threads",
        _id("user_id", primary_key=True),
        _id("thread_id", primary_key=True),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("epoch", sa.String(32), nullable=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("updated_at", _MOMENT, nullable=False),
    )
    op.create_index("threads_by_change", "threads", ["user_id", "updated_at"])
    op.create_table(
        "runs",
        sa.Column("id", _ROW_ID, primary_key=True, autoincrement=True),
        _id("user_id"),
        _id("run_id"),
        _id("thread_id"),
        sa.Column("agent", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("started_at", _MOMENT),
        sa.Column("ended_at", _MOMENT),
        sa.Column("first_seq", sa.BigInteger),
        sa.Column("last_seq", sa.BigInteger),
        sa.Column("reason", sa.Text),
        sa.Column("receipt", sa.JSON(none_as_null=True)),
        sa.UniqueConstraint("user_id", "run_id", name="runs_by_id"),
        _owned_by_thread(),
    )
    op.create_index("runs_by_thread", "runs", ["user_id", "thread_id"])
    op.create_index(
        "runs_unfinished",
        "runs",
        ["id"],
        sqlite_where=_UNFINISHED,
        postgresql_where=_UNFINISHED,
    )
    op.create_table(
        "messages",
        sa.Column("id", _ROW_ID, primary_key=True, autoincrement=True),
        _id("user_id"),
        _id("thread_id"),
        _id("run_id"),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("words", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        _owned_by_thread(),
    )
    op.create_index("messages_by_thread", "messages", ["user_id", "thread_id", "id"])
    op.create_table(
        "chunks",
        _id("user_id", primary_key=True),
        _id("thread_id", primary_key=True),
        sa.Column("first_seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        _owned_by_thread(),
    )
    if op.get_bind().dialect.name == "postgresql":
        _wall_off()


def _wall_off() -> None:
    """The second wall: even a query that forgot its owner sees that owner's rows only."""
    owner = "user_id = current_setting('app.user_id', true)"
    for table in _TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY owner ON {table} USING ({owner}) WITH CHECK ({owner})")
    # One question is asked about everybody: which runs did a dead process leave behind?
    op.execute(
        "CREATE POLICY recovery ON runs FOR SELECT "
        "USING (current_setting('app.recovery', true) = 'on')",
    )


def downgrade() -> None:
    for table in reversed(_TABLES):
        op.drop_table(table)
