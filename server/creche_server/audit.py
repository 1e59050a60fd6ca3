"""Opens the server's audit: in the data directory, or in the database.

Both are keyed with a key that comes from the data directory's, so that who can write the
records but not read the key can forge none.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from creche import AuditSink, JsonlSink, SecurityAudit, open_audit
from creche_server.data_directory import is_open_to_others, load_key, locked
from creche_server.database import open_alone, open_sql_sink
from creche_server.settings import Settings

_log: Final = logging.getLogger("creche.serve")


def audit_file(data: Path) -> Path:
    """Where the records are; the head is beside it, in `audit.head`."""
    return data / "audit.jsonl"


def audit_key(data: Path) -> bytes:
    """The key of a data directory's audit. Raises DataDirectoryError."""
    return hmac.digest(load_key(data), b"creche.audit", "sha256")


@contextlib.asynccontextmanager
async def open_data(settings: Settings, sink: AuditSink | None) -> AsyncIterator[SecurityAudit]:
    """The data directory and the database for ourselves, and the audit; in `sink`, if given.

    The database is claimed before the audit looks for its tables there. Raises
    AlreadyServedError, and what `open_alone` and `open_audit` raise.
    """
    with locked(settings.data):
        if is_open_to_others(settings.data):
            _log.warning(
                "other users of this machine can look into %s; `chmod 700` it", settings.data
            )
        key = audit_key(settings.data)
        async with contextlib.AsyncExitStack() as stack:
            url = settings.database_url
            await stack.enter_async_context(open_alone(url))
            if sink is None and settings.audit == "database":
                sink = await stack.enter_async_context(open_sql_sink(url, migrates=False))
            chosen = sink or JsonlSink(audit_file(settings.data))
            yield await stack.enter_async_context(open_audit(chosen, key=key))
