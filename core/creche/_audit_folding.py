"""What repeats have in common, and what of them is not written yet."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Final

import trio

from creche._audit_chain import AuditEntry, AuditKind
from creche._context import MAX_ID_LENGTH, check_id
from creche._errors import InvalidContextError
from creche._redaction import redact_text

_SHOWN: Final = MAX_ID_LENGTH  # characters of a text that somebody else chose


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """What repeats have in common."""

    kind: AuditKind
    user: str | None
    claimed_owner: str | None
    resource: str
    operation: str


@dataclasses.dataclass(slots=True, eq=False)
class Draft:
    """What is not written yet of one window."""

    count: int = 0
    first: datetime | None = None
    last: datetime | None = None
    outcome: str = ""
    correlation_id: str = ""
    urgent: bool = False  # somebody waits for it, or nothing of its window is written yet
    done: trio.Event = dataclasses.field(default_factory=trio.Event)
    error: Exception | None = None

    def add(self, moment: datetime, outcome: str, correlation_id: str) -> None:
        self.count += 1
        self.first = self.first or moment
        self.last = moment
        self.outcome = outcome
        self.correlation_id = correlation_id

    def absorb(self, earlier: Draft) -> None:
        """Take over what could not be written."""
        self.count += earlier.count
        self.first = earlier.first
        if self.last is None:
            self.last, self.outcome = earlier.last, earlier.outcome
            self.correlation_id = earlier.correlation_id

    def entry(self, key: Key) -> AuditEntry:
        assert self.first is not None
        assert self.last is not None
        return AuditEntry(
            kind=key.kind,
            user=key.user,
            claimed_owner=key.claimed_owner,
            resource=key.resource,
            operation=key.operation,
            outcome=self.outcome,
            correlation_id=self.correlation_id,
            count=self.count,
            first=self.first,
            last=self.last,
        )


@dataclasses.dataclass(slots=True, eq=False)
class Window:
    """The time in which repeats become one record."""

    ends: float  # trio time
    draft: Draft | None = None
    written: bool = False  # whether its first occurrence is durable


def key_of(
    kind: AuditKind,
    user: str | None,
    claimed_owner: str | None,
    resource: str,
    operation: str,
) -> Key:
    """What repeats of this have in common."""
    owner = None if claimed_owner is None else shown(claimed_owner)
    return Key(kind, _as_id(user), owner, shown(resource), shown(operation))


def _as_id(user: str | None) -> str | None:
    """A user's id as it is, so that it can be asked for; what is none, as other texts."""
    if user is None:
        return None
    try:
        return check_id("user_id", user)
    except InvalidContextError:
        return shown(user)  # one record that has no JSON would keep all others from the file


def shown(text: str) -> str:
    """What somebody claimed, as it may be kept: redacted, printable, at most 256 characters."""
    redacted = redact_text(text)[: _SHOWN + 1]  # first: half a secret is not known for one
    printable = "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in redacted
    )
    return printable if len(printable) <= _SHOWN else f"{printable[: _SHOWN - 1]}…"
