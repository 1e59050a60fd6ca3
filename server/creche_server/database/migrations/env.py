"""Alembic's way in: migrates on the connection that `database.connection` hands over."""

from alembic import context

from creche_server.database.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
