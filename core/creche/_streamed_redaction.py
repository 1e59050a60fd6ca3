"""Redacts JSON that comes in pieces, as a tool call's arguments do. No I/O.

What is said of a piece is the piece, less the values under secret-looking keys: the first
character of such a value is said as `"[redacted]"`, the others not at all. So the pieces said make
the JSON of what `redact_value` makes of the whole, however it is cut. Held back is only a key that
is not complete, and a backslash whose character has not come.

What is no JSON cannot be followed, so from there on nothing is said but one `[redacted]`. Where
that is in the first piece, which then mostly is the whole (a model that writes Python, say), it is
cleaned as a sentence instead.
"""

from __future__ import annotations

import enum
import json
import re
from types import MappingProxyType
from typing import Final, NamedTuple

from creche._redaction import REDACTED, is_secret_key, redact_text

_DEEPEST: Final = 512  # brackets in brackets; no decoder of ours takes as many
_LONGEST_KEY: Final = 1024  # characters; a key is held back until it is complete

_BLANK: Final = re.compile(r"[ \t\n\r]*")
_KEY: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_CHARACTERS: Final = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SCALAR: Final = re.compile(r"[-+.0-9A-Za-z]*")
# Made once: what `json.loads` makes for each call with such a flag waits for the collector.
_lenient: Final = json.JSONDecoder(strict=False)
_CLOSERS: Final = MappingProxyType({"{": "}", "[": "]"})


class _Next(enum.Enum):
    """What comes next."""

    VALUE = enum.auto()
    STRING = enum.auto()  # the rest of a value that is one
    SCALAR = enum.auto()  # likewise, of a number, true, false or null
    KEY = enum.auto()
    COLON = enum.auto()
    COMMA = enum.auto()  # or what closes the bracket
    LOST = enum.auto()  # it was no JSON


class Scan(NamedTuple):
    """How far the pieces have come. Each call of `redact_piece` returns the next."""

    next: _Next = _Next.VALUE
    open: str = ""  # what will close the open brackets, the innermost last
    secret: bool = False  # the key before the value that comes
    hidden: int = 0  # how many brackets are around the value that is not said; 0: it is said
    held: str = ""  # of the pieces so far, what is read together with the next one


BEGINNING: Final = Scan()


def redact_piece(scan: Scan, piece: str) -> tuple[Scan, str]:
    """What may be said of the next piece, and where that leaves the scan."""
    if scan.next is _Next.LOST:
        return scan, ""
    text, at = scan.held + piece, 0
    reached = scan._replace(held="")
    said: list[str] = []
    while at < len(text):
        before, begin = reached, at
        if before.next not in {_Next.STRING, _Next.SCALAR}:
            at = _end_of(_BLANK, text, at)
            if not before.hidden:
                said.append(text[begin:at])
            if at == len(text):
                break
            begin = at
        reached, at = _step(before, text, at)
        if reached.next is _Next.LOST:
            first = scan is BEGINNING and not (before.hidden or before.secret)
            shown = "".join(said)
            return reached, redact_text(shown + text[begin:]) if first else shown + REDACTED
        if not before.hidden:
            said.append(f'"{REDACTED}"' if reached.hidden else text[begin:at])
        if reached.held:
            break
    return reached, "".join(said)


def _step(scan: Scan, text: str, at: int) -> tuple[Scan, int]:  # noqa: PLR0911  a table's rows
    """Read what is at that place: what comes after it, and from where."""
    character = text[at]
    match scan.next:
        case _Next.STRING:
            end = _end_of(_CHARACTERS, text, at)
            if text.startswith('"', end):
                return _ended(scan), end + 1
            return scan._replace(held=text[end:]), end  # a lone backslash, or nothing
        case _Next.SCALAR:
            end = _end_of(_SCALAR, text, at)
            return (scan if end == len(text) else _ended(scan)), end
        case _Next.KEY if character == '"':
            return _key(scan, text, at)
        case _Next.COLON if character == ":":
            return scan._replace(next=_Next.VALUE), at + 1
        case _Next.COMMA if character == "," and scan.open:
            after = _Next.KEY if scan.open[-1] == "}" else _Next.VALUE
            return scan._replace(next=after), at + 1
        case _Next.KEY | _Next.COMMA if scan.open.endswith(character):
            return _ended(scan._replace(open=scan.open[:-1])), at + 1
        case _Next.VALUE:
            return _value(scan, text, at)
        case _:
            return scan._replace(next=_Next.LOST), at


def _key(scan: Scan, text: str, at: int) -> tuple[Scan, int]:
    end = _end_of(_KEY, text, at)
    if (end if end > at else len(text)) - at > _LONGEST_KEY:
        return scan._replace(next=_Next.LOST), at
    if end == at:
        return scan._replace(held=text[at:]), at
    try:
        name = _lenient.decode(text[at:end])  # its escapes, too, may spell a secret word
    except ValueError:
        return scan._replace(next=_Next.LOST), at
    return scan._replace(next=_Next.COLON, secret=is_secret_key(name)), end


def _value(scan: Scan, text: str, at: int) -> tuple[Scan, int]:
    """The beginning of a value, or the end of an array."""
    character = text[at]
    if character == "]" and scan.open.endswith("]"):
        return _ended(scan._replace(open=scan.open[:-1])), at + 1
    hidden = scan.hidden or (len(scan.open) if scan.secret else 0)
    within = scan._replace(hidden=hidden, secret=False)
    if character == '"':
        return within._replace(next=_Next.STRING), at + 1
    if character in _CLOSERS and len(scan.open) < _DEEPEST:
        after = _Next.KEY if character == "{" else _Next.VALUE
        return within._replace(next=after, open=scan.open + _CLOSERS[character]), at + 1
    if _end_of(_SCALAR, text, at) > at:
        return within._replace(next=_Next.SCALAR), at
    return scan._replace(next=_Next.LOST), at


def _ended(scan: Scan) -> Scan:
    """A value is complete: also the one that was not said, if it is that."""
    hidden = scan.hidden if scan.hidden < len(scan.open) else 0
    return scan._replace(next=_Next.COMMA, hidden=hidden)


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()
