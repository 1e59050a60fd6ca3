"""What an audit record is, and how records are chained and checked: pure, no I/O.

Each record carries the hash of the one before it and a hash of itself, so that none can be
edited, removed or moved without breaking what follows. The chain alone cannot tell that its end
was cut off: the head, which is kept elsewhere, says how long it is. With a key both are keyed
(HMAC), and who can write the files, but not read the key, can forge neither.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

AuditKind = Literal[
    "user_mismatch",
    "thread_mismatch",
    "run_mismatch",
    "connection_mismatch",
    "unauthorised_access",
    "invalid_context",
    "event_injection",
    "privilege_escalation",
    "limit_hit",
    "token_refused",
]

MOST_FLAWS: Final = 20  # that one verification lists; one is enough to say "tampered"

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What happened: once, or `count` times from `first` to `last`."""

    kind: AuditKind
    user: str | None  # who acted; None when nobody was authenticated
    claimed_owner: str | None  # whose it was said, or found, to be
    resource: str
    operation: str
    outcome: str
    correlation_id: str  # of the last occurrence; "" where there is none
    count: Count
    first: datetime  # UTC
    last: datetime


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry in its place in the chain."""

    seq: Count  # from 1, without a gap
    time: datetime  # of writing, UTC
    kind: AuditKind
    user: str | None
    claimed_owner: str | None
    resource: str
    operation: str
    outcome: str
    correlation_id: str
    count: Count
    first: datetime
    last: datetime
    previous: str  # the hash of the record before it
    hash: str  # of all the above; must stay the last field


class AuditHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the chain goes, kept outside it. `mac` is None for an audit without a key."""

    seq: Count
    hash: str  # of the record `seq`
    mac: str | None = None


NOTHING: Final = AuditHead(seq=0, hash="0" * 64)  # what the first record follows

Problem = Literal["edited", "replaced", "deleted", "re-ordered", "cut off", "unreadable", "head"]


class Flaw(msgspec.Struct, frozen=True):
    """One thing that is wrong, and at which record; `seq` is 0 for the head."""

    seq: int
    problem: Problem
    message: str


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found; nothing, if `flaws` is empty.

    `unanchored` records follow the head: a process died between writing and anchoring them, or
    is writing just now. Nobody was answered for them.
    """

    records: int
    unanchored: int
    flaws: tuple[Flaw, ...]


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(AuditRecord)


def canonical(record: AuditRecord) -> bytes:
    """The bytes that a record's hash is of: all its fields but that, in order, as JSON."""
    return _encoder.encode(msgspec.structs.astuple(record)[:-1])


def digest(data: bytes, key: bytes | None) -> str:
    """SHA-256, as HMAC where there is a key; 64 hexadecimal characters."""
    if key is None:
        return hashlib.sha256(data).hexdigest()
    return hmac.digest(key, data, "sha256").hex()


def anchored(seq: int, hash: str, key: bytes | None) -> AuditHead:  # noqa: A002  the field's name
    """The head of a chain that ends with that record."""
    mac = None if key is None else digest(_anchor(seq, hash), key)
    return AuditHead(seq=seq, hash=hash, mac=mac)


def is_genuine(head: AuditHead, key: bytes | None) -> bool:
    """Whether this head was made with this key; without one, whether it looks like a head."""
    if len(head.hash) != len(NOTHING.hash):
        return False
    if key is None:
        return True
    return hmac.compare_digest(head.mac or "", digest(_anchor(head.seq, head.hash), key))


def _anchor(seq: int, hash: str) -> bytes:  # noqa: A002
    return _encoder.encode(["head", seq, hash])  # no record begins like this


def chain(
    after: AuditHead,
    entries: Iterable[AuditEntry],
    *,
    time: datetime,
    key: bytes | None,
) -> list[AuditRecord]:
    """The entries as the records that follow a head."""
    records: list[AuditRecord] = []
    seq, previous = after.seq, after.hash
    for entry in entries:
        seq += 1
        fields = msgspec.structs.asdict(entry)
        open_end = AuditRecord(seq=seq, time=time, **fields, previous=previous, hash="")
        previous = digest(canonical(open_end), key)
        records.append(msgspec.structs.replace(open_end, hash=previous))
    return records


def encode_record(record: AuditRecord) -> bytes:
    """One line of JSON, without its end."""
    return _encoder.encode(record)


def decode_record(line: bytes) -> AuditRecord | None:
    """The record that a line holds, None unless it is exactly as `encode_record` wrote it."""
    try:
        record = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return record if _encoder.encode(record) == line else None


def verify(
    records: Iterable[AuditRecord | None],
    head: AuditHead | None,
    *,
    key: bytes | None = None,
    since: AuditHead = NOTHING,
    most: int = MOST_FLAWS,
) -> Verification:
    """Check a chain, as it is kept, against its head.

    A record is None where something stands that is no record. `since` is the head of what is
    known to be right already, and which `records` leave out. Stops at `most` flaws.
    """
    flaws = _flaws_of_head(head, key)
    end = head or since
    expected, previous = since.seq + 1, since.hash  # "" where the one before is not known
    count = unanchored = 0
    for record in records:
        if len(flaws) >= most:
            return Verification(records=count, unanchored=unanchored, flaws=tuple(flaws[:most]))
        count += 1
        if record is None:
            flaws.append(
                Flaw(expected, "unreadable", f"where record {expected} should be there is none")
            )
            expected, previous = expected + 1, ""
            continue
        seq = record.seq
        flaws += _flaws_of(record, expected, previous, end, key)
        if seq >= expected:
            expected, previous = seq + 1, record.hash
        unanchored += seq > end.seq
    if expected <= end.seq:
        gone = _named(expected, end.seq)
        flaws.append(Flaw(expected, "cut off", f"{gone} cut off"))
    if head is None and count:
        flaws.append(Flaw(0, "head", "there are records, and no head that says how many"))
    return Verification(records=count, unanchored=unanchored, flaws=tuple(flaws[:most]))


def _named(first: int, last: int) -> str:
    return f"record {first} is" if first == last else f"records {first} to {last} are"


def _flaws_of_head(head: AuditHead | None, key: bytes | None) -> list[Flaw]:
    if head is None or is_genuine(head, key):
        return []
    return [Flaw(0, "head", "the head is damaged, or made without this audit's key")]


def _flaws_of(
    record: AuditRecord,
    expected: int,
    previous: str,
    end: AuditHead,
    key: bytes | None,
) -> list[Flaw]:
    """What is wrong with one record in its place."""
    seq, flaws = record.seq, list[Flaw]()
    if digest(canonical(record), key) != record.hash:
        flaws.append(Flaw(seq, "edited", f"record {seq} was edited: its hash is of other contents"))
    if seq > expected:
        gone = _named(expected, seq - 1)
        flaws.append(Flaw(expected, "deleted", f"{gone} missing before record {seq}"))
    elif seq < expected:
        message = f"record {seq} stands behind record {expected - 1}"
        flaws.append(Flaw(seq, "re-ordered", message))
    elif previous and record.previous != previous:
        message = f"record {seq} was not written behind what stands before it"
        flaws.append(Flaw(seq, "replaced", message))
    if seq == end.seq and record.hash != end.hash:
        flaws.append(Flaw(seq, "replaced", f"record {seq} is not the one that the head names"))
    return flaws
