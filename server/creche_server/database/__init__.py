"""Threads, messages, runs and event logs in SQLite or PostgreSQL, through SQLAlchemy."""

from creche_server.database.audit import SqlSink, open_sql_sink
from creche_server.database.connection import DatabaseUrlError, open_alone, open_database
from creche_server.database.store import SqlStore

__all__ = [
    "DatabaseUrlError",
    "SqlSink",
    "SqlStore",
    "open_alone",
    "open_database",
    "open_sql_sink",
]
