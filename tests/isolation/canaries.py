"""Secrets that say whose they are, and the search for those that are where they should not be."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterator
from typing import Final

_CANARY: Final = re.compile(r"canary-(\w+?)-([a-z]+)-(\d+)")

# Under a key that says that its value is secret, or in an error as `password=...`: no client, no
# row and no line of a log may ever have it, not even its owner's.
HIDDEN: Final = "hidden"
# What an agent's own exception says: for its developer's traceback, and nobody else.
FAULT: Final = "fault"
_IDENTITY: Final = frozenset({"user_id", "thread_id", "run_id", "correlation_id", "tool_call_id"})
_ORDINARY: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be."""

    check: str  # which check found it
    what: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.what}"


def canary(owner: str, place: str, mark: str) -> str:
    """A secret of `owner`, as it is put into `place`. `mark` makes it unique to one story."""
    return f"canary-{owner}-{place}-{mark}"


def owner_of(user: str) -> str:
    """Whose canaries a user's are: `user-3` has those of `3`."""
    return user.removeprefix("user-")


def strangers(
    text: str,
    owner: str | None,
    mark: str,
    *,
    forbidden: Collection[str] = (HIDDEN,),
) -> list[str]:
    """The canaries in `text` that are not `owner`'s, are another story's, or are forbidden here."""
    if "canary-" not in text:
        return []
    return [
        match.group()
        for match in _CANARY.finditer(text)
        if match[1] != owner or match[3] != mark or match[2] in forbidden
    ]


def words_of_error(error: BaseException | None, seen: set[int] | None = None) -> Iterator[str]:
    """All that a traceback would print of an error: its own words, its causes', its group's."""
    seen = set() if seen is None else seen
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield f"{error!r} {error} {getattr(error, '__notes__', '')}"
    yield from words_of_error(error.__cause__, seen)
    if not error.__suppress_context__:
        yield from words_of_error(error.__context__, seen)
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from words_of_error(inner, seen)


def search_record(record: logging.LogRecord, mark: str) -> list[str]:
    """What a line of the log says that it must not.

    A line may name whose it is. A traceback may have the words of its user's own error, since a
    developer needs them; apart from that, nothing that users say goes into a log.
    """
    named = getattr(record, "user_id", None)
    owner = named and owner_of(named)
    extra = {key: value for key, value in vars(record).items() if key not in _ORDINARY}
    found: list[str] = []
    for key, value in extra.items():
        allowed = named is None and key in {"thread_id", "run_id"}
        if key not in _IDENTITY:
            found += strangers(str(value), owner, mark, forbidden=PAYLOAD)
        elif not allowed:
            found += strangers(str(value), owner, mark)
    found += strangers(f"{record.getMessage()} {record.args}", owner, mark, forbidden=PAYLOAD)
    if record.exc_info:
        for words in words_of_error(record.exc_info[1]):
            # What prints the traceback takes `password=...` out; whose it is, is ours to see to.
            found += strangers(words, owner, mark, forbidden=_NEVER_IN_ERRORS)
    return found


_NEVER_IN_ERRORS: Final = frozenset({"message", "argument", "result", "metadata", "state"})
PAYLOAD: Final = _NEVER_IN_ERRORS | {HIDDEN, FAULT}
