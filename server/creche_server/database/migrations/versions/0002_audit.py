"""The audit, append-only; and one question about everybody: is this id somebody else's?"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_MOMENT = sa.DateTime(timezone=True)
_REFUSAL = "the audit is append-only"
_ANYBODY = (("threads", "thread_id"), ("runs", "run_id"))


def upgrade() -> None:
    op.create_table(
        "audit_records",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time", _MOMENT, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("user_id", sa.String(256)),
        sa.Column("claimed_owner", sa.Text),
        sa.Column("resource", sa.Text, nullable=False),
        sa.Column("operation", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("correlation_id", sa.Text, nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("first", _MOMENT, nullable=False),
        sa.Column("last", _MOMENT, nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.create_index("audit_by_user", "audit_records", ["user_id", "seq"])
    op.create_table(
        "audit_heads",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("mac", sa.String(64)),
    )
    for table, column in _ANYBODY:
        op.create_index(f"{table}_of_anybody", table, [column])
    if op.get_bind().dialect.name == "postgresql":
        _forbid_on_postgresql()
        _wall_off()
        _open_a_window()
    else:
        _forbid_on_sqlite()


def _forbid_on_sqlite() -> None:
    for what in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_refuses_{what.lower()} BEFORE {what} ON audit_records "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
        )
    op.execute(
        "CREATE TRIGGER audit_refuses_replace BEFORE INSERT ON audit_records "  # noqa: S608
        "WHEN EXISTS (SELECT 1 FROM audit_records WHERE seq = NEW.seq) "
        f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
    )


def _forbid_on_postgresql() -> None:
    """Its owner can drop a trigger, as it can drop the table: that is what the chain is for."""
    op.execute(
        "CREATE FUNCTION audit_refuses() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    )
    op.execute(
        "CREATE TRIGGER audit_refuses BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_records "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_refuses()",
    )


def _wall_off() -> None:
    """No user's setting shows a row of the audit, not even of their own."""
    audit = "current_setting('app.audit', true) = 'on'"
    for table in ("audit_records", "audit_heads"):
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY audit ON {table} USING ({audit}) WITH CHECK ({audit})")


def _open_a_window() -> None:
    """Through the wall in 0001, as narrow as can be: a function that answers yes or no."""
    for table, column in _ANYBODY:
        op.execute(
            f"CREATE POLICY anybody ON {table} FOR SELECT "
            "USING (current_setting('app.anybody', true) = 'on')",
        )
        # The setting lasts for that one query (a function's own SET is for superusers to give).
        op.execute(
            f"""
            CREATE FUNCTION {table}_of_another(wanted text, asking text) RETURNS boolean
            LANGUAGE plpgsql AS $$
            DECLARE answer boolean;
            BEGIN
                PERFORM set_config('app.anybody', 'on', true);
                answer := EXISTS (
                    SELECT 1 FROM {table} WHERE {column} = wanted AND user_id <> asking
                );
                PERFORM set_config('app.anybody', 'off', true);
                RETURN answer;
            END $$
            """,  # noqa: S608  names of our own
        )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table, _ in _ANYBODY:
            op.execute(f"DROP FUNCTION {table}_of_another(text, text)")
            op.execute(f"DROP POLICY anybody ON {table}")
    for table, _ in _ANYBODY:
        op.drop_index(f"{table}_of_anybody", table)
    op.drop_table("audit_heads")
    op.drop_table("audit_records")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_refuses()")
