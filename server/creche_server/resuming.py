"""Where a subscription begins, and in which parts it is sent: pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from creche import Entry, Journal
from creche_server.wire.commands import Subscribe
from creche_server.wire.frames import text_frame

PART_BYTES: Final = 64 * 1024  # of events that are posted in one go


def start_of(journal: Journal, command: Subscribe) -> tuple[int, bool]:
    """After which `seq` a subscription begins, and whether the client must start over.

    It must when its position was counted in another epoch, or lies beyond the log's end: what
    it saw may not be what is stored.
    """
    stale = command.epoch is not None and command.epoch != journal.epoch
    if command.since and (stale or command.since > journal.last_seq):
        return 0, True
    return command.since, False


def in_parts(entries: Sequence[Entry]) -> Iterator[tuple[bytes, int]]:
    """The entries' frames, joined to parts of some 64 KiB, each with its last `seq`.

    What a slow client has not taken is then bounded by a part, however much was read for it.
    """
    frames = [text_frame(entry.data) for entry in entries]
    if sum(map(len, frames)) <= PART_BYTES:  # nearly always: what came since the last look
        yield b"".join(frames), entries[-1].seq
        return
    part: list[bytes] = []
    size = 0
    for entry, frame in zip(entries, frames, strict=True):
        part.append(frame)
        size += len(frame)
        if size >= PART_BYTES:
            yield b"".join(part), entry.seq
            part, size = [], 0
    if part:
        yield b"".join(part), entries[-1].seq
