"""`creche audit`: verify the chain of records, list them, count them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Final, Literal, cast, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from creche import AuditKind, AuditQuery, AuditRecord, AuditSink, JsonlSink
from creche._audit_chain import encode_record
from creche._audit_sinks import head_file
from creche_server.audit import audit_file, audit_key
from creche_server.data_directory import DataDirectoryError
from creche_server.database import open_sql_sink
from creche_server.settings import Settings

_OWNER: Final = 3  # the column; a terminal is shown it where there is anything in it
FINE, TAMPERED, WRONG_USE = 0, 1, 2  # exit codes

Format = Literal["text", "json"]


class WrongUseError(Exception):
    """There is nothing to be done as it was asked; the message says why."""


async def verify_audit(settings: Settings) -> int:
    """Say whether the audit is whole and, if not, what is wrong where. Returns the exit code."""
    return await _explained(partial(_verify, settings))


async def list_audit(
    settings: Settings,
    query: Callable[[], AuditQuery],
    form: Format,
) -> int:
    """Print the records that a query means: as text by their time, as JSON by their number.

    Returns the exit code.
    """
    return await _explained(partial(_list, settings, query, form))


async def count_audit(settings: Settings, query: Callable[[], AuditQuery]) -> int:
    """Print how often each kind of thing happened. Returns the exit code."""
    return await _explained(partial(_count, settings, query))


def asked(
    *,
    user: str | None = None,
    kind: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
) -> AuditQuery:
    """The query that these flags make; a moment without a zone is in UTC. Raises WrongUseError."""
    kinds = get_args(AuditKind)
    if kind is not None and kind not in kinds:
        msg = f"there is no kind {kind!r}; the kinds are {', '.join(kinds)}"
        raise WrongUseError(msg)
    if limit is not None and limit < 1:
        msg = "--limit must be at least 1"
        raise WrongUseError(msg)
    return AuditQuery(
        user=user,
        kind=cast("AuditKind | None", kind),
        since=_in_utc(since),
        until=_in_utc(until),
        limit=limit,
    )


def _in_utc(moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


async def _explained(command: Callable[[], Awaitable[int]]) -> int:
    """What a person can mend is told in a sentence."""
    try:
        return await command()
    except (WrongUseError, DataDirectoryError, OSError) as error:
        sentence = str(error)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        sentence = f"the database holds no audit that can be read: {reason}"
    sys.stderr.write(f"creche: {sentence}\n")
    return WRONG_USE


@contextlib.asynccontextmanager
async def _open_sink(settings: Settings) -> AsyncIterator[tuple[AuditSink, bytes]]:
    """The audit that is there, to be read, and its key; nothing is made. Raises WrongUseError."""
    _check_is_there(settings)
    key = audit_key(settings.data)
    if settings.audit == "file":
        yield JsonlSink(audit_file(settings.data)), key
        return
    async with open_sql_sink(settings.database_url, migrates=False) as sink:
        yield sink, key


def _check_is_there(settings: Settings) -> None:
    data, path = settings.data, audit_file(settings.data)
    url = make_url(settings.database_url)
    if not (data / "key").exists():
        msg = f"there is no key in {data} to check an audit by; name the server's --data"
    elif settings.audit == "file" and not any(p.exists() for p in (path, head_file(path))):
        msg = f"there is no audit in {data}"
    elif settings.audit == "database" and _is_absent(url):
        msg = f"there is no database {url.database}"
    else:
        return
    raise WrongUseError(msg)


def _is_absent(url: URL) -> bool:
    return url.get_backend_name() == "sqlite" and not Path(url.database or "").exists()


async def _verify(settings: Settings) -> int:
    async with _open_sink(settings) as (sink, key):
        verification = await sink.check(key)
    count = _plural(verification.records, "record")
    if verification.flaws:
        for flaw in verification.flaws:
            sys.stdout.write(f"{flaw.problem}: {flaw.message}\n")
        sys.stdout.write(f"creche: the audit was tampered with ({count} looked at)\n")
        return TAMPERED
    sys.stdout.write(f"creche: the audit is whole: {count}\n")
    if verification.unanchored:
        last = _plural(verification.unanchored, "record")
        sys.stdout.write(
            f"creche: the last {last} of it just written, or left by a process that died\n",
        )
    return FINE


async def _list(settings: Settings, query: Callable[[], AuditQuery], form: Format) -> int:
    wanted = query()
    async with _open_sink(settings) as (sink, _):
        records = await sink.find(wanted)
    if form == "json":
        for record in records:
            sys.stdout.write(f"{encode_record(record).decode()}\n")
        return FINE
    columns: tuple[str, ...] = (
        "last",
        "kind",
        "user",
        "claimed owner",
        "resource",
        "operation",
        "outcome",
        "times",
    )
    # Repeats are recorded when they are over, with the time of the last one: by `seq` they would
    # come after what happened later.
    rows = [_shown(record) for record in sorted(records, key=attrgetter("last"))]
    if sys.stdout.isatty() and all(row[_OWNER] == "-" for row in rows):
        columns, *rows = (row[:_OWNER] + row[_OWNER + 1 :] for row in (columns, *rows))
    _print_rows(columns, rows)
    return FINE


async def _count(settings: Settings, query: Callable[[], AuditQuery]) -> int:
    wanted = query()
    async with _open_sink(settings) as (sink, _):
        counts = await sink.counts(wanted)
    _print_rows(("kind", "times"), ((kind, str(counts[kind])) for kind in sorted(counts)))
    return FINE


def _shown(record: AuditRecord) -> tuple[str, ...]:
    return (
        record.last.isoformat(timespec="seconds"),
        record.kind,
        record.user or "-",
        record.claimed_owner or "-",
        record.resource,
        record.operation,
        record.outcome,
        str(record.count),
    )


def _print_rows(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A table for a terminal; for anything else lines, their parts separated by tabs."""
    if not sys.stdout.isatty():
        for row in rows:
            sys.stdout.write("\t".join(row) + "\n")
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: a resource may look like markup
    Console().print(table)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
