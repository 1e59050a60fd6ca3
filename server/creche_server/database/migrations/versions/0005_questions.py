"""Questions to a person, each its owner's alone, answered whether or not their runs still live."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "questions",
        sa.Column("id", _ROW_ID, primary_key=True, autoincrement=True),
        sa.Column("user_id", sa.String(256), nullable=False),
        sa.Column("question_id", sa.String(256), nullable=False),
        sa.Column("thread_id", sa.String(256), nullable=False),
        sa.Column("run_id", sa.String(256), nullable=False),
        sa.Column("agent", sa.Text, nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("schema", sa.LargeBinary, nullable=False),
        sa.Column("asked_at", _MOMENT, nullable=False),
        sa.Column("expires_at", _MOMENT, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("closed_at", _MOMENT),
        sa.Column("subagent_run_id", sa.String(256)),
        sa.Column("tool_call_id", sa.Text),
        sa.Column("tool_name", sa.Text),
        sa.Column("arguments", sa.Text),
        sa.Column("digest", sa.String(64)),
        sa.UniqueConstraint("user_id", "question_id", name="questions_by_id"),
        sa.ForeignKeyConstraint(
            ["user_id", "thread_id"],
            ["threads.user_id", "threads.thread_id"],
            ondelete="CASCADE",
        ),
    )
    op.create_index("questions_by_thread", "questions", ["user_id", "thread_id"])
    op.create_index("questions_of_anybody", "questions", ["question_id"])
    if op.get_bind().dialect.name == "postgresql":
        _wall_off()


def _wall_off() -> None:
    """As 0001 does for a user's other rows, with a window as 0002 has them."""
    owner = "user_id = current_setting('app.user_id', true)"
    op.execute("ALTER TABLE questions ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE questions FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY owner ON questions USING ({owner}) WITH CHECK ({owner})")
    op.execute(
        "CREATE POLICY anybody ON questions FOR SELECT "
        "USING (current_setting('app.anybody', true) = 'on')",
    )
    op.execute(
        """
        CREATE FUNCTION questions_of_another(wanted text, asking text) RETURNS boolean
        LANGUAGE plpgsql AS $$
        DECLARE answer boolean;
        BEGIN
            PERFORM set_config('app.anybody', 'on', true);
            answer := EXISTS (
                SELECT 1 FROM questions WHERE question_id = wanted AND user_id <> asking
            );
            PERFORM set_config('app.anybody', 'off', true);
            RETURN answer;
        END $$
        """,
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION questions_of_another(text, text)")
    op.drop_table("questions")
