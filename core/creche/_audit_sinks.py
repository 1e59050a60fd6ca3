"""Where audit records are kept: what every sink does, one in memory, one in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec
import trio

from creche._audit_chain import (
    NOTHING,
    AuditHead,
    AuditKind,
    AuditRecord,
    Verification,
    decode_record,
    encode_record,
    verify,
)

T = TypeVar("T")
_log: Final = logging.getLogger("creche.audit")
_BLOCK: Final = 256 * 1024  # bytes of a file's end that are looked through at a time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditQuery:
    """Which records: each field that is not None narrows the choice."""

    user: str | None = None
    kind: AuditKind | None = None
    since: datetime | None = None  # aware; what happened then or later
    until: datetime | None = None  # aware; what happened before
    limit: int | None = None  # the latest so many

    def matches(self, record: AuditRecord) -> bool:
        """Whether a record is meant, whatever the limit."""
        return (
            (self.user is None or record.user == self.user)
            and (self.kind is None or record.kind == self.kind)
            and (self.since is None or record.last >= self.since)
            and (self.until is None or record.first < self.until)
        )


EVERYTHING: Final = AuditQuery()


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """The end of what a sink keeps.

    `tail` begins with the record that the head names, unless there is none, and goes on with
    those that follow it; None stands for what is no record.
    """

    head: AuditHead | None
    tail: Sequence[AuditRecord | None]


class AuditSink(Protocol):
    """Keeps records. One writer at a time; any method may raise whatever its medium raises."""

    async def load(self) -> Kept:
        """Look at the end, before the first `append` and again after one that failed."""
        ...

    async def append(self, records: Sequence[AuditRecord], head: AuditHead) -> None:
        """Keep these and the head that they lead to, durably. Never abandoned when cancelled."""
        ...

    async def find(self, query: AuditQuery) -> list[AuditRecord]:
        """The records that a query means, oldest first."""
        ...

    async def counts(self, query: AuditQuery) -> dict[AuditKind, int]:
        """How often each kind of thing happened, folded repeats included."""
        ...

    async def check(self, key: bytes | None) -> Verification:
        """Verify all that is kept."""
        ...


def found(records: Iterable[AuditRecord | None], query: AuditQuery) -> list[AuditRecord]:
    """What of these a query means."""
    return [*deque((r for r in records if r is not None and query.matches(r)), query.limit)]


def counted(records: Iterable[AuditRecord | None], query: AuditQuery) -> dict[AuditKind, int]:
    """How often each kind of thing happened."""
    counter = Counter[AuditKind]()
    for record in found(records, query):
        counter[record.kind] += record.count
    return dict(counter)


class MemorySink:
    """Keeps the latest records for as long as the process lives; nothing in it waits."""

    def __init__(self, most: int = 10_000) -> None:
        self._records: deque[AuditRecord] = deque()
        self._most = most
        self._head: AuditHead | None = None
        self._forgotten = NOTHING  # the head of what was let go

    async def load(self) -> Kept:
        return Kept(self._head, [*self._records][-1:])

    async def append(self, records: Sequence[AuditRecord], head: AuditHead) -> None:
        self._records.extend(records)
        self._head = head
        while len(self._records) > self._most:
            oldest = self._records.popleft()
            self._forgotten = AuditHead(seq=oldest.seq, hash=oldest.hash)

    async def find(self, query: AuditQuery) -> list[AuditRecord]:
        return found(self._records, query)

    async def counts(self, query: AuditQuery) -> dict[AuditKind, int]:
        return counted(self._records, query)

    async def check(self, key: bytes | None) -> Verification:
        return verify(self._records, self._head, key=key, since=self._forgotten)


def head_file(path: Path) -> Path:
    """Where the head of the records in that file is."""
    return path.with_suffix(".head")


class JsonlSink:
    """Keeps records in a file, one a line of JSON, and the head in another one beside it.

    An append writes and fsyncs the lines, then replaces the head, fsynced, by rename. A line
    that a crash tore is cut off at the next `load`, to the byte, with a warning.
    """

    def __init__(self, path: Path, head_path: Path | None = None) -> None:
        self._path = path
        self._head_path = head_path or head_file(path)
        self._size = 0  # bytes of whole lines, as we left them
        self._limiter = trio.CapacityLimiter(1)

    async def load(self) -> Kept:
        return await self._hop(self._load)

    async def append(self, records: Sequence[AuditRecord], head: AuditHead) -> None:
        await self._hop(lambda: self._append(records, head))

    async def find(self, query: AuditQuery) -> list[AuditRecord]:
        return await trio.to_thread.run_sync(lambda: found(self.records(), query))

    async def counts(self, query: AuditQuery) -> dict[AuditKind, int]:
        return await trio.to_thread.run_sync(lambda: counted(self.records(), query))

    async def check(self, key: bytes | None) -> Verification:
        def whole() -> Verification:
            head = self._read_head()  # before the records: what comes meanwhile is beyond it
            return verify(self.records(), head, key=key)

        return await trio.to_thread.run_sync(whole)

    async def _hop(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._limiter)

    # --- what runs in threads

    def records(self) -> Iterator[AuditRecord | None]:
        """All of them, oldest first. Blocks."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # else it is being written, or torn
                    yield decode_record(line[:-1])

    def _read_head(self) -> AuditHead | None:
        try:
            return msgspec.json.decode(self._head_path.read_bytes(), type=AuditHead)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError:
            return AuditHead(seq=0, hash="(unreadable)", mac="")  # nobody's head, with any key

    def _load(self) -> Kept:
        head = self._read_head()
        seq = head.seq if head is not None else 0
        tail, torn, size = _end_of(self._path, seq)
        self._size = size - torn
        starts_right = not seq or (bool(tail) and tail[0] is not None and tail[0].seq == seq)
        if torn and starts_right:  # else it is evidence, and none of ours
            os.truncate(self._path, self._size)
            _log.warning("%d bytes of a torn record were cut off the audit", torn)
        return Kept(head, tail)

    def _append(self, records: Sequence[AuditRecord], head: AuditHead) -> None:
        data = b"".join([encode_record(record) + b"\n" for record in records])
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != self._size:
                msg = "the audit's file was changed behind its writer's back"
                raise OSError(msg)
            try:
                _write_all(file.fileno(), data)
                self._replace_head(head)
            # Boundary: one group of records, which is there whole or not at all, whatever ends
            # this thread; it is raised again.
            except BaseException:
                # Nobody was answered for these. Should this fail too, `load` finds them.
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), self._size)
                raise
        self._size += len(data)
        # The rename, and a file that is new.
        directory = os.open(self._head_path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _replace_head(self, head: AuditHead) -> None:
        aside = self._head_path.with_suffix(".head~")
        with open(aside, "wb", buffering=0, opener=_private) as file:
            _write_all(file.fileno(), msgspec.json.encode(head) + b"\n")
        aside.replace(self._head_path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _end_of(path: Path, seq: int) -> tuple[list[AuditRecord | None], int, int]:
    """A file's records from `seq` on, the bytes of its last line if torn, and its whole size.

    Read backwards, so that a long file takes no longer than a short one.
    """
    try:
        with path.open("rb") as file:
            start = size = file.seek(0, os.SEEK_END)
            data = b""
            while start > 0:
                step = min(_BLOCK, start)
                start = file.seek(start - step)
                data = file.read(step) + data
                whole = data if start == 0 else data.partition(b"\n")[2]
                first = decode_record(whole.partition(b"\n")[0])
                if first is not None and first.seq <= seq:
                    break
    except FileNotFoundError:
        return [], 0, 0
    if start:
        data = data.partition(b"\n")[2]
    *lines, torn = data.split(b"\n")
    records = [decode_record(line) for line in lines]
    kept = [record for record in records if record is None or record.seq >= seq]
    return kept, len(torn), size
