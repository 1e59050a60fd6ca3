"""What each user has spent, by day: a user's own, and of no thread."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "spending",
        sa.Column("user_id", sa.String(256), primary_key=True, nullable=False),
        sa.Column("day", sa.Date, primary_key=True, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("micro_usd", sa.BigInteger, nullable=False),
        sa.Column("tool_calls", sa.BigInteger, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        owner = "user_id = current_setting('app.user_id', true)"
        op.execute("ALTER TABLE spending ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE spending FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY owner ON spending USING ({owner}) WITH CHECK ({owner})")


def downgrade() -> None:
    op.drop_table("spending")
