"""The audit's chain: that it is whole as written, and that any tampering shows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import msgspec
import pytest

from creche import AuditEntry, AuditHead, AuditKind, AuditRecord, Verification, verify
from creche._audit_chain import (
    NOTHING,
    anchored,
    canonical,
    chain,
    decode_record,
    digest,
    encode_record,
)

KEY = b"k" * 32
NOON = datetime(2026, 11, 23, 12, 0, 0, 250_000, tzinfo=UTC)
SEED = 20261123


def entry(number: int = 1, **more: Any) -> AuditEntry:
    fields: dict[str, Any] = {
        "kind": get_args(AuditKind)[number % 10],
        "user": None if number % 7 == 0 else f"user-{number % 50}",
        "claimed_owner": None,
        "resource": f"thread zoë-{number}",
        "operation": "GET /threads/<thread_id>",
        "outcome": "absent",
        "correlation_id": "",
        "count": 1 + number % 3,
        "first": NOON + timedelta(seconds=number),
        "last": NOON + timedelta(seconds=number + 1),
    }
    return AuditEntry(**{**fields, **more})


def chained(count: int, key: bytes | None = KEY) -> list[AuditRecord]:
    return chain(NOTHING, [entry(n) for n in range(1, count + 1)], time=NOON, key=key)


def head_of(records: Sequence[AuditRecord], key: bytes | None = KEY) -> AuditHead:
    return anchored(records[-1].seq, records[-1].hash, key)


def problems(verification: Verification) -> list[tuple[str, int]]:
    return [(flaw.problem, flaw.seq) for flaw in verification.flaws]


def altered(record: AuditRecord, field: str) -> AuditRecord:
    """The record with another value in that field."""
    value = getattr(record, field)
    if field == "kind":
        other: Any = "limit_hit" if value != "limit_hit" else "token_refused"
    elif isinstance(value, datetime):
        other = value + timedelta(microseconds=1)
    elif isinstance(value, int):
        other = value + 1
    elif field in {"previous", "hash"}:
        other = ("0" if value[0] != "0" else "1") + value[1:]
    else:
        other = f"{value or ''}x"
    return msgspec.structs.replace(record, **{field: other})


def rechained(records: Sequence[AuditRecord], start: int, key: bytes | None) -> list[AuditRecord]:
    """The records from `start` on hashed anew, so that each follows the one before."""
    after = AuditHead(seq=start, hash=records[start - 1].hash if start else NOTHING.hash)
    names = AuditEntry.__struct_fields__
    entries = [AuditEntry(**{n: getattr(r, n) for n in names}) for r in records[start:]]
    return [*records[:start], *chain(after, entries, time=NOON, key=key)]


class TestAChain:
    @pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
    @pytest.mark.parametrize("count", [0, 1, 2, 100])
    def test_is_whole_as_it_was_written(self, key: bytes | None, count: int) -> None:
        records = chained(count, key)
        head = head_of(records, key) if records else anchored(0, NOTHING.hash, key)
        assert verify(records, head, key=key) == Verification(records=count, unanchored=0, flaws=())

    def test_goes_on_where_it_was_left(self) -> None:
        first = chained(3)
        more = chain(head_of(first), [entry(9), entry(8)], time=NOON, key=KEY)
        assert [record.seq for record in more] == [4, 5]
        assert problems(verify([*first, *more], head_of(more), key=KEY)) == []
        assert problems(verify(more, head_of(more), key=KEY, since=head_of(first))) == []

    def test_survives_its_way_through_json(self) -> None:
        records = chained(50)
        lines = [encode_record(record) for record in records]
        assert [decode_record(line) for line in lines] == records
        assert all(b"\n" not in line for line in lines)

    @pytest.mark.parametrize("field", AuditRecord.__struct_fields__)
    def test_covers_every_field(self, field: str) -> None:
        records = chained(5)
        records[2] = altered(records[2], field)
        found = verify(records, head_of(chained(5)), key=KEY)
        assert ("edited", records[2].seq) in problems(found), found

    def test_that_goes_on_behind_its_head_says_how_far(self) -> None:
        records = chained(5)
        found = verify(records, head_of(records[:3]), key=KEY)
        assert (found.unanchored, found.flaws) == (2, ())

    @pytest.mark.parametrize(
        ("tamper", "expected"),
        [
            (lambda r: r[:4] + r[5:], [("deleted", 5)]),
            (lambda r: r[3:], [("deleted", 1)]),
            (lambda r: r[:7], [("cut off", 8)]),
            (lambda _: [], [("cut off", 1)]),
            (lambda r: [*r[:3], r[4], r[3], *r[5:]], [("deleted", 4), ("re-ordered", 4)]),
            (lambda r: [*r, r[9]], [("re-ordered", 10)]),
            (lambda r: [*r[:2], None, *r[3:]], [("unreadable", 3)]),
            (lambda r: rechained(r, 6, b"another key"), [("edited", 7), ("edited", 8)]),
        ],
        ids=["one gone", "first gone", "cut", "all gone", "swapped", "twice", "torn", "forged"],
    )
    def test_that_was_tampered_with_says_how_and_where(
        self,
        tamper: Callable[[list[AuditRecord]], list[AuditRecord | None]],
        expected: list[tuple[str, int]],
    ) -> None:
        records = chained(10)
        found = verify(tamper(records), head_of(records), key=KEY)
        assert problems(found)[: len(expected)] == expected
        assert len(found.flaws) == len(expected) or expected[0][0] == "edited"

    def test_without_a_key_shows_what_was_hashed_anew_by_its_head(self) -> None:
        records = chained(10, None)
        head = head_of(records, None)
        edited = [*records[:4], altered(records[4], "user"), *records[5:]]
        replaced = rechained(edited, 4, None)
        assert problems(verify(replaced, head)) == [("replaced", 10)]
        one_hashed_anew = [*replaced[:5], *records[5:]]
        assert problems(verify(one_hashed_anew, head)) == [("replaced", 6)]

    @pytest.mark.parametrize(
        ("head", "expected"),
        [
            (None, [("head", 0)]),
            (anchored(4, chained(4)[3].hash, None), [("head", 0)]),
            (anchored(4, chained(4)[3].hash, b"another key"), [("head", 0)]),
            (AuditHead(seq=0, hash="(unreadable)", mac=""), [("head", 0)]),
        ],
        ids=["none", "no key", "another key", "damaged"],
    )
    def test_is_not_shortened_by_a_forged_head(
        self,
        head: AuditHead | None,
        expected: list[tuple[str, int]],
    ) -> None:
        assert problems(verify(chained(4), head, key=KEY)) == expected

    def test_lists_a_bounded_number_of_flaws(self) -> None:
        records = [altered(record, "user") for record in chained(100)]
        assert len(verify(records, head_of(records), key=KEY).flaws) == 20
        assert len(verify(records, head_of(records), key=KEY, most=1).flaws) == 1


# --- 1,000 tamperings of 10,000 records

# What somebody does who can write everything but has no key: it takes the records, the place at
# which it begins and a random source, and gives what stands from that place on.
Tamper = Callable[[list[AuditRecord], int, random.Random], list[AuditRecord | None]]


def edit(records: list[AuditRecord], at: int, rng: random.Random) -> list[AuditRecord | None]:
    field = rng.choice(AuditRecord.__struct_fields__)
    return [altered(records[at], field), *records[at + 1 :]]


def spoil(records: list[AuditRecord], at: int, rng: random.Random) -> list[AuditRecord | None]:
    """One byte of a line changed, gone or come."""
    line = bytearray(encode_record(records[at]))
    place = rng.randrange(len(line))
    match rng.randrange(3):
        case 0:
            line[place] ^= 1 << rng.randrange(8)
        case 1:
            del line[place]
        case _:
            line.insert(place, rng.randrange(256))
    return [*map(decode_record, bytes(line).split(b"\n")), *records[at + 1 :]]


def forge(records: list[AuditRecord], at: int, _: random.Random) -> list[AuditRecord | None]:
    """One record edited and hashed anew."""
    edited = altered(records[at], "resource")
    forged = msgspec.structs.replace(edited, hash=digest(canonical(edited), None))
    return [forged, *records[at + 1 :]]


def forge_all(records: list[AuditRecord], at: int, _: random.Random) -> list[AuditRecord | None]:
    """One record edited, and all that follow hashed anew."""
    edited = [*records[:at], altered(records[at], "user"), *records[at + 1 :]]
    return [*rechained(edited, at, None)[at:]]


def delete(records: list[AuditRecord], at: int, rng: random.Random) -> list[AuditRecord | None]:
    return [*records[at + rng.randint(1, 5) :]]


def swap(records: list[AuditRecord], at: int, rng: random.Random) -> list[AuditRecord | None]:
    other = rng.randrange(at + 1, len(records) + 1)
    after: list[AuditRecord | None] = [*records[at:]]
    if other == len(records):  # there is nothing behind it, perhaps
        return [*after[1:], after[0], after[0]]
    after[0], after[other - at] = after[other - at], after[0]
    return after


def move(records: list[AuditRecord], at: int, rng: random.Random) -> list[AuditRecord | None]:
    other = rng.randrange(at, len(records))
    moved: list[AuditRecord | None] = [*records[at + 1 : other + 1], records[at]]
    return [*(moved if other > at else [records[at], records[at]]), *records[other + 1 :]]


def cut(_: list[AuditRecord], __: int, ___: random.Random) -> list[AuditRecord | None]:
    return []


def copy(records: list[AuditRecord], at: int, rng: random.Random) -> list[AuditRecord | None]:
    other = rng.choice([n for n in (rng.randrange(len(records)), at - 1, at + 1) if n != at])
    return [records[other % len(records)], *records[at:]]


TAMPERS: dict[str, tuple[Tamper, int]] = {  # {what: (how, how often of 100)}
    "edit": (edit, 15),
    "spoil a byte": (spoil, 15),
    "forge one": (forge, 10),
    "forge all that follow": (forge_all, 2),
    "delete": (delete, 15),
    "swap": (swap, 10),
    "move": (move, 10),
    "cut": (cut, 8),
    "cut, with a head to match": (cut, 7),
    "copy": (copy, 8),
}


def tampering(
    records: list[AuditRecord],
    head: AuditHead,
    rng: random.Random,
    what: str,
) -> tuple[int, list[AuditRecord | None], AuditHead]:
    """(where it begins, what stands from there on, the head)."""
    size = len(records)
    edges = [0, 1, size - 2, size - 1]
    at = rng.choice(edges) if rng.random() < 0.05 else rng.randrange(size)
    after = TAMPERS[what][0](records, at, rng)
    if what == "cut, with a head to match":
        last = records[at - 1] if at else NOTHING
        head = AuditHead(seq=last.seq, hash=last.hash, mac=head.mac)
    return at, after, head


def test_a_thousand_random_tamperings_of_ten_thousand_records_are_all_found() -> None:
    """What precedes a tampering was verified once; each is looked for from its place on."""
    records = chained(10_000)
    head = head_of(records)
    assert verify(records, head, key=KEY).flaws == ()
    rng = random.Random(SEED)
    kinds = rng.choices([*TAMPERS], [often for _, often in TAMPERS.values()], k=1000)
    for number, what in enumerate(kinds):
        at, after, left_head = tampering(records, head, rng, what)
        before = records[at - 1] if at else NOTHING
        since = AuditHead(seq=before.seq, hash=before.hash)
        found = verify(after, left_head, key=KEY, since=since, most=1)
        assert found.flaws, (SEED, number, what, at)
    assert set(kinds) == set(TAMPERS)


@pytest.mark.parametrize("what", TAMPERS)
def test_one_of_each_is_found_from_the_first_record_on_too(what: str) -> None:
    records = chained(10_000)
    rng = random.Random(SEED)
    at, after, head = tampering(records, head_of(records), rng, what)
    assert verify([*records[:at], *after], head, key=KEY, most=1).flaws, (SEED, at)
