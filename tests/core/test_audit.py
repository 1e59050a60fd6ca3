"""The audit: what is durable when, how repeats are folded, and the sinks of the core."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.core.test_audit_chain import KEY, NOON, entry, head_of, problems
from tests.small_world import ADA, BOB, context, infrastructure
from tests.store_contract import record as run_record

from creche import (
    AuditHead,
    AuditKind,
    AuditQuery,
    AuditRecord,
    AuditTamperedError,
    AuditUnavailableError,
    EventEmitter,
    Infrastructure,
    IsolationError,
    JsonlSink,
    LimitExceededError,
    Limits,
    MemorySink,
    MemoryStore,
    NewThread,
    RunContext,
    SecurityAudit,
    StoreUnavailableError,
    ThreadId,
    Verification,
    open_audit,
    open_journals,
    open_supervisor,
)
from creche._audit import (
    MOST_WINDOWS,
    MOST_WINDOWS_PER_USER,
    VARIOUS,
    WINDOW,
)
from creche._audit_chain import NOTHING, chain, decode_record, encode_record
from creche._audit_folding import shown
from creche._audit_sinks import EVERYTHING
from creche._auditing import note_mix_up

# --- the audit itself


class TroubledSink(MemorySink):
    """A sink that can be full, and held up."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.groups: list[int] = []
        self._gate = trio.Event()
        self._gate.set()

    def hold(self) -> None:
        self._gate = trio.Event()

    def release(self) -> None:
        self._gate.set()

    async def append(self, records: Sequence[AuditRecord], head: AuditHead) -> None:
        await self._gate.wait()
        if self.full:
            raise OSError(28, "No space left on device")
        self.groups.append(len(records))
        await super().append(records, head)


class ForgetfulSink(MemorySink):
    """A sink that takes what it is given and then, once, cannot say so."""

    loses_the_answer = False

    async def append(self, records: Sequence[AuditRecord], head: AuditHead) -> None:
        await super().append(records, head)
        if self.loses_the_answer:
            self.loses_the_answer = False
            msg = "the connection was lost"
            raise OSError(msg)


async def refuse(audit: SecurityAudit, resource: str = "thread x", **more: Any) -> None:
    kind: AuditKind = more.pop("kind", "thread_mismatch")
    user = more.pop("user", ADA)
    await audit.record(kind, user=user, resource=resource, operation="look", **more)


async def all_of(sink: MemorySink | JsonlSink) -> list[AuditRecord]:
    return await sink.find(EVERYTHING)


class TestARecord:
    async def test_is_durable_when_record_returns(self) -> None:
        sink = TroubledSink()
        async with open_audit(sink, key=KEY) as audit:
            before = datetime.now(UTC)
            await refuse(audit, claimed_owner="bob", outcome="absent", correlation_id="c-1")
            [record] = await all_of(sink)
            assert (record.seq, record.kind, record.user) == (1, "thread_mismatch", "ada")
            assert (record.claimed_owner, record.resource) == ("bob", "thread x")
            assert (record.operation, record.outcome) == ("look", "absent")
            assert (record.correlation_id, record.count) == ("c-1", 1)
            assert before <= record.first == record.last <= record.time <= datetime.now(UTC)
            assert audit.head.seq == 1
            assert (await audit.check()).flaws == ()

    async def test_is_not_there_before_the_sink_has_it(self, autojump_clock: object) -> None:
        sink = TroubledSink()
        async with open_audit(sink) as audit:
            sink.hold()
            with trio.move_on_after(10) as waiting:
                await refuse(audit)
            assert waiting.cancelled_caught
            sink.release()

    async def test_that_cannot_be_written_fails_the_action(self) -> None:
        sink = TroubledSink()
        async with open_audit(sink) as audit:
            sink.full = True
            with pytest.raises(AuditUnavailableError) as caught:
                await refuse(audit)
            assert isinstance(caught.value.__cause__, OSError)
            assert await all_of(sink) == []

    async def test_written_by_nobody_who_waits_is_written_all_the_same(self) -> None:
        sink = TroubledSink()
        async with open_audit(sink) as audit:
            audit.record_nowait("limit_hit", resource="x", operation="y")
            await trio.testing.wait_all_tasks_blocked()
            assert [record.kind for record in await all_of(sink)] == ["limit_hit"]

    @pytest.mark.parametrize(
        ("claimed", "kept"),
        [
            ("thread x", "thread x"),
            ("zoë \U0001f600", "zoë \U0001f600"),
            ("Bearer abcdef123456", "Bearer [redacted]"),
            ("Bearer\tabcdef123456", "Bearer [redacted]"),
            ("api_key=abcdef", "api_key=[redacted]"),
            ("sk-abcdefghijkl", "[redacted]"),
            ("/home/ada/x", "~/x"),
            ("a\nb\x00c\x1b[31m", r"a\nb\x00c\x1b[31m"),
            ("\u202egnp.exe", r"\u202egnp.exe"),
            ("\ud800", r"\ud800"),
            ("x" * 256, "x" * 256),
            ("x" * 300, "x" * 255 + "…"),
            ("\n" * 200, r"\n" * 127 + "\\" + "…"),
            ("x" * 250 + " sk-abcdefghijkl", "x" * 250 + " [redacted]"[:5] + "…"),
            ("", ""),
        ],
    )
    async def test_keeps_what_was_claimed_redacted_printable_and_short(
        self,
        claimed: str,
        kept: str,
    ) -> None:
        assert shown(claimed) == kept
        sink = MemorySink()
        async with open_audit(sink) as audit:
            await audit.record(
                "invalid_context",
                resource=claimed,
                operation=claimed,
                claimed_owner=claimed,
                outcome=claimed,
                correlation_id=claimed,
            )
            audit.record_nowait("token_refused", resource="", operation="", user=claimed)
        record, other = await all_of(sink)
        assert other.user in {kept, claimed}
        texts = (record.resource, record.operation, record.claimed_owner)
        assert {*texts, record.outcome, record.correlation_id} == {kept}
        encode_record(record)
        encode_record(other)


class TestRepeats:
    async def test_within_a_window_become_one_record(self, mock_clock: Any) -> None:
        sink = TroubledSink()
        async with open_audit(sink, key=KEY) as audit:
            for _ in range(1000):
                await refuse(audit)
            assert [record.count for record in await all_of(sink)] == [1]
            mock_clock.jump(WINDOW - 1)
            await refuse(audit, correlation_id="last")
            assert len(await all_of(sink)) == 1
            mock_clock.jump(1)
            await until(lambda: len(sink.groups) == 3)
            first, rest = await all_of(sink)
            assert (first.count, rest.count) == (1, 1000)
            assert first.last <= rest.first < rest.last <= rest.time
            assert rest.correlation_id == "last"
            assert (await audit.check()).flaws == ()

    async def test_that_go_on_make_one_record_a_window_and_a_pause_ends_them(
        self,
        mock_clock: Any,
    ) -> None:
        sink = TroubledSink()
        async with open_audit(sink) as audit:
            await refuse(audit)
            for window in range(1, 6):
                await refuse(audit)
                await refuse(audit)
                mock_clock.jump(WINDOW)
                await until(lambda n=window: len(sink.groups) == 2 + n)  # type: ignore[misc]
            assert [record.count for record in await all_of(sink)] == [1, 2, 2, 2, 2, 2]
            mock_clock.jump(2 * WINDOW)
            await until(lambda: not audit._windows)
            await refuse(audit)  # the first again: written before it is answered
            assert [record.count for record in await all_of(sink)] == [1, 2, 2, 2, 2, 2, 1]

    async def test_differ_in_kind_user_owner_resource_or_operation(self) -> None:
        sink = MemorySink()
        base: dict[str, Any] = {
            "kind": "thread_mismatch",
            "user": ADA,
            "claimed_owner": None,
            "resource": "r",
            "operation": "o",
        }
        others: list[dict[str, Any]] = [
            {"kind": "run_mismatch"},
            {"user": BOB},
            {"user": None},
            {"claimed_owner": "bob"},
            {"resource": "s"},
            {"operation": "p"},
        ]
        async with open_audit(sink) as audit:
            for other in [{}, *others]:
                await audit.record(**{**base, **other})
            assert len(await all_of(sink)) == 1 + len(others)
            for other in [{}, *others]:
                await audit.record(**{**base, **other}, outcome="another", correlation_id="c")
            assert len(await all_of(sink)) == 1 + len(others)

    async def test_are_written_when_the_audit_is_closed(self) -> None:
        sink = MemorySink()
        async with open_audit(sink) as audit:
            for _ in range(5):
                await refuse(audit)
        assert [record.count for record in await all_of(sink)] == [1, 4]

    async def test_are_written_although_the_block_is_cancelled(self) -> None:
        sink = MemorySink()
        with trio.CancelScope() as scope:
            async with open_audit(sink) as audit:
                for _ in range(5):
                    await refuse(audit)
                scope.cancel()
                await trio.sleep_forever()
        assert [record.count for record in await all_of(sink)] == [1, 4]

    async def test_are_not_folded_while_the_audit_cannot_be_written(
        self,
        mock_clock: Any,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        sink = TroubledSink()
        async with open_audit(sink) as audit:
            await refuse(audit)
            await refuse(audit)  # counted
            sink.full = True
            mock_clock.jump(WINDOW)
            await until(lambda: audit._failing)
            for _ in range(3):
                with pytest.raises(AuditUnavailableError):
                    await refuse(audit)
            sink.full = False
            await refuse(audit)
            counts = [record.count for record in await all_of(sink)]
            assert (counts[0], sum(counts)) == (1, 6), "what was counted is not lost"
            await refuse(audit)  # folds again
            assert len(await all_of(sink)) == len(counts)
        told = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(told) == 1, "once, not at every try"

    async def test_that_could_not_be_written_at_the_end_are_said_to_be_lost(
        self,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        sink = TroubledSink()
        async with open_audit(sink) as audit:
            for _ in range(4):
                await refuse(audit)
            sink.full = True
        assert "3 occurrences could not be written to the audit" in caplog.text

    async def test_goes_on_rightly_after_a_write_of_which_nobody_knows_whether_it_was_one(
        self,
    ) -> None:
        """As when a connection is lost at the commit: twice in the audit is better than never."""
        sink = ForgetfulSink()
        async with open_audit(sink, key=KEY) as audit:
            sink.loses_the_answer = True
            with pytest.raises(AuditUnavailableError):
                await refuse(audit, "a")
            await refuse(audit, "b")
            assert (await audit.check()).flaws == ()
        assert [record.resource for record in await all_of(sink)] == ["a", "b", "a"]
        assert (await sink.check(KEY)).flaws == ()

    async def test_of_many_at_once_share_few_writes(self) -> None:
        sink = TroubledSink()
        async with open_audit(sink) as audit:
            sink.hold()
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(refuse, audit, f"thread {number}")
                await trio.testing.wait_all_tasks_blocked()
                for number in range(30):
                    nursery.start_soon(refuse, audit, f"thread {number}")
                await trio.testing.wait_all_tasks_blocked()
                sink.release()
            assert len(sink.groups) <= 4, sink.groups
            assert sum(record.count for record in await all_of(sink)) == 50

    async def test_a_flood_of_different_ones_grows_neither_memory_nor_the_audit(self) -> None:
        sink = MemorySink(most=100_000)
        async with open_audit(sink) as audit:
            for number in range(5_000):
                await refuse(audit, f"thread {number}")
            written = await all_of(sink)
            assert len(written) <= MOST_WINDOWS_PER_USER + 1
            assert len(audit._windows) <= MOST_WINDOWS_PER_USER + 1
            await refuse(audit, user=BOB)  # another user's is written as ever
            assert (await all_of(sink))[-1].user == "bob"
        records = await all_of(sink)
        assert sum(record.count for record in records if record.user == "ada") == 5_000
        [coarse] = [record for record in records if record.count > 1]
        assert (coarse.kind, coarse.resource, coarse.operation) == (
            "thread_mismatch",
            VARIOUS,
            VARIOUS,
        )

    async def test_a_flood_of_different_users_is_folded_by_kind_and_still_counted(self) -> None:
        sink = MemorySink(most=100_000)
        async with open_audit(sink) as audit:
            for number in range(3_000):
                await refuse(audit, user=f"user-{number}")
            assert len(audit._windows) <= MOST_WINDOWS + 10
            assert len(await all_of(sink)) <= MOST_WINDOWS + 10
        assert await sink.counts(EVERYTHING) == {"thread_mismatch": 3_000}


class TestAnswers:
    async def test_to_questions_choose_by_user_kind_and_time(self) -> None:
        sink = MemorySink()
        async with open_audit(sink) as audit:
            await refuse(audit, "a")
            await refuse(audit, "b", user=BOB)
            await refuse(audit, "c", kind="limit_hit", user=BOB)
            await refuse(audit, "d", user=None)

            async def resources(**query: Any) -> list[str]:
                return [record.resource for record in await audit.find(AuditQuery(**query))]

            assert await resources() == ["a", "b", "c", "d"]
            assert await resources(user="bob") == ["b", "c"]
            assert await resources(user="bob", kind="limit_hit") == ["c"]
            assert await resources(limit=2) == ["c", "d"]
            later = datetime.now(UTC) + timedelta(seconds=1)
            assert await resources(since=later) == []
            assert await resources(until=later) == ["a", "b", "c", "d"]
            assert await audit.counts(EVERYTHING) == {"thread_mismatch": 3, "limit_hit": 1}
            assert await audit.counts(AuditQuery(user="bob")) == {
                "thread_mismatch": 1,
                "limit_hit": 1,
            }

    async def test_of_a_memory_that_forgets_are_still_verified(self) -> None:
        sink = MemorySink(most=10)
        async with open_audit(sink, key=KEY) as audit:
            for number in range(25):
                await refuse(audit, f"thread {number}")
            verification = await audit.check()
            assert (verification.records, verification.flaws) == (10, ())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other tasks do without the clock's moving."""
    for _ in range(100):
        await trio.testing.wait_all_tasks_blocked()
        if condition():
            return
    raise AssertionError("it never came to that")


# --- the file


async def write(path: Path, *resources: str, key: bytes | None = KEY) -> None:
    async with open_audit(JsonlSink(path), key=key) as audit:
        for resource in resources:
            await refuse(audit, resource)


async def resources_in(path: Path) -> list[str]:
    return [record.resource for record in await all_of(JsonlSink(path))]


class TestTheFile:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "audit.jsonl"

    async def test_is_gone_on_with_after_a_restart(self, path: Path) -> None:
        await write(path, "a", "b")
        await write(path)
        await write(path, "c")
        assert await resources_in(path) == ["a", "b", "c"]
        assert await JsonlSink(path).check(KEY) == Verification(records=3, unanchored=0, flaws=())
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.with_suffix(".head").stat().st_mode & 0o777 == 0o600

    async def test_is_there_before_anything_happens_so_that_its_loss_shows(
        self,
        path: Path,
    ) -> None:
        await write(path)
        assert path.read_bytes() == b""
        assert (await JsonlSink(path).check(KEY)).flaws == ()
        await write(path, "a")
        path.unlink()
        assert problems(await JsonlSink(path).check(KEY)) == [("cut off", 1)]

    async def test_loses_exactly_the_line_that_a_crash_tore_and_says_so(
        self,
        path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        await write(path, "a", "b")
        whole = path.read_bytes()
        following = chain(head_of(await all_of(JsonlSink(path))), [entry()], time=NOON, key=KEY)
        line = encode_record(following[0])
        for torn in (line[:1], line[:-1], line):
            path.write_bytes(whole + torn)
            assert (await JsonlSink(path).check(KEY)).flaws == ()
            caplog.clear()
            await write(path)
            assert path.read_bytes() == whole
            assert f"{len(torn)} bytes of a torn record were cut off" in caplog.text

    async def test_keeps_whole_records_that_a_crash_left_unanchored(
        self,
        path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        await write(path, "a")
        records = await all_of(JsonlSink(path))
        more = chain(head_of(records), [entry(1), entry(2)], time=NOON, key=KEY)
        with path.open("ab") as file:
            file.write(b"".join(encode_record(record) + b"\n" for record in more) + b'{"seq":4')
        found = await JsonlSink(path).check(KEY)
        assert (found.records, found.unanchored, found.flaws) == (3, 2, ())
        await write(path, "b")
        found = await JsonlSink(path).check(KEY)
        assert (found.records, found.unanchored, found.flaws) == (4, 0, ())
        assert "2 records of the audit were written, but not anchored" in caplog.text

    @pytest.mark.parametrize(
        "tamper",
        [
            lambda lines: lines[:-1],
            lambda _: [],
            lambda lines: [*lines[:-1], lines[-1].replace(b"thread", b"threat", 1)],
            lambda lines: [*lines[:-1], lines[-1][:-9]],  # torn, but it was anchored
            lambda lines: [*lines, lines[-1]],
            lambda lines: [*lines, forged_line(lines)],
        ],
        ids=["cut", "emptied", "edited", "torn", "repeated", "forged"],
    )
    async def test_whose_end_was_tampered_with_is_not_gone_on_with(
        self,
        path: Path,
        tamper: Callable[[list[bytes]], list[bytes]],
    ) -> None:
        await write(path, "a", "b", "c")
        changed = b"".join(tamper(path.read_bytes().splitlines(keepends=True)))
        path.write_bytes(changed)
        assert (await JsonlSink(path).check(KEY)).flaws
        with pytest.RaisesGroup(AuditTamperedError, allow_unwrapped=True, flatten_subgroups=True):
            await write(path, "d")
        assert path.read_bytes() == changed, "it is evidence"

    @pytest.mark.parametrize("damage", ["removed", "emptied", "another's", "another key"])
    async def test_without_its_head_is_not_gone_on_with(self, path: Path, damage: str) -> None:
        await write(path, "a")
        head = path.with_suffix(".head")
        key = KEY
        if damage == "removed":
            head.unlink()
        elif damage == "emptied":
            head.write_bytes(b"")
        elif damage == "another's":
            head.write_bytes(head.read_bytes().replace(b'"seq":1', b'"seq":0'))
        else:
            key = b"another" * 5
        assert (await JsonlSink(path).check(key)).flaws
        with pytest.raises(AuditTamperedError):
            await write(path, key=key)

    async def test_is_written_to_again_when_the_trouble_is_over(
        self,
        path: Path,
        tmp_path: Path,
    ) -> None:
        aside, heads = tmp_path / "aside", tmp_path / "heads"
        heads.mkdir()
        sink = JsonlSink(path, heads / "audit.head")
        async with open_audit(sink, key=KEY) as audit:
            await refuse(audit, "a")
            written = path.read_bytes()
            heads.rename(aside)
            for _ in range(2):
                with pytest.raises(AuditUnavailableError):
                    await refuse(audit, "b")
            assert path.read_bytes() == written, "nothing that nobody was answered for"
            aside.rename(heads)
            await refuse(audit, "b")
            assert (await audit.check()).flaws == ()
            assert await audit.counts(EVERYTHING) == {"thread_mismatch": 4}

    async def test_that_somebody_else_writes_to_is_found_out_at_the_next_write(
        self,
        path: Path,
    ) -> None:
        async with open_audit(JsonlSink(path), key=KEY) as audit:
            await refuse(audit, "a")
            with path.open("ab") as file:
                file.write(b"something\n")
            for resource in ("b", "c"):
                with pytest.raises(AuditUnavailableError):
                    await refuse(audit, resource)

    async def test_of_any_length_is_opened_by_its_end(self, path: Path) -> None:
        """More than one block of it is read, since its last records are that long."""
        long = [entry(n, resource="x" * 250_000) for n in range(4)]
        records = chain(NOTHING, long, time=NOON, key=KEY)
        sink = JsonlSink(path)
        await sink.load()
        await sink.append(records, head_of(records))
        await write(path, "b")
        assert (await JsonlSink(path).check(KEY)).flaws == ()

    async def test_in_a_folder_that_is_not_there_cannot_be_opened(self, tmp_path: Path) -> None:
        with pytest.raises(AuditUnavailableError, match="cannot be opened"):
            await write(tmp_path / "absent" / "audit.jsonl")


def forged_line(lines: list[bytes]) -> bytes:
    """A record that follows rightly, by somebody who has no key."""
    last = decode_record(lines[-1].rstrip(b"\n"))
    assert last is not None
    return encode_record(chain(head_of([last]), [entry()], time=NOON, key=None)[0]) + b"\n"


# --- what the core tells it


class TestTheCore:
    async def test_audits_a_limit_on_runs_that_was_hit(self) -> None:
        sink = MemorySink()
        async with open_audit(sink) as audit:
            made = with_audit(audit, Limits(runs_per_user=1))
            async with open_supervisor(made) as supervisor:
                await supervisor.start(context(), "hang", "x")
                asked = context(thread="other")
                with pytest.raises(LimitExceededError):
                    await supervisor.start(asked, "hello", "x")
                [record] = await all_of(sink)
                assert (record.kind, record.user, record.resource) == ("limit_hit", "ada", "runs")
                assert record.correlation_id == asked.correlation_id
                supervisor.cancel_all("user")

    async def test_fails_what_cannot_be_audited(self) -> None:
        sink = TroubledSink()
        async with open_audit(sink) as audit:
            made = with_audit(audit, Limits(runs_per_user=1))
            async with open_supervisor(made) as supervisor:
                await supervisor.start(context(), "hang", "x")
                sink.full = True
                with pytest.raises(AuditUnavailableError):
                    await supervisor.start(context(thread="other"), "hello", "x")
                assert supervisor.count == 1
                supervisor.cancel_all("user")

    async def test_works_without_an_audit(self) -> None:
        async with open_supervisor(infrastructure(limits=Limits(runs_per_user=0))) as supervisor:
            with pytest.raises(LimitExceededError):
                await supervisor.start(context(), "hello", "x")

    async def test_stops_a_run_that_was_given_anothers_journal_and_audits_it(
        self,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The leak is planted: every run is handed the journal of bob's thread."""
        sink, store = MemorySink(), MemoryStore()
        async with open_audit(sink) as audit, open_journals(store) as journals:
            real = journals.attached
            monkeypatch.setattr(journals, "attached", lambda *_: real(BOB, ThreadId("bobs")))
            made = with_audit(audit, store=store)
            async with open_supervisor(made, journals) as supervisor:
                with pytest.raises(StoreUnavailableError) as caught:
                    await supervisor.start(context(), "hello", "x")
                assert isinstance(caught.value.__cause__, IsolationError)
            await trio.testing.wait_all_tasks_blocked()
            [record] = await all_of(sink)
            assert (record.kind, record.user, record.claimed_owner) == (
                "user_mismatch",
                "ada",
                "bob",
            )
            assert await store.threads(BOB) == []
            assert await store.threads(ADA) == []

    async def test_lets_no_emitter_speak_on_anothers_journal(self) -> None:
        async with open_journals(MemoryStore()) as journals:
            async with journals.attached(BOB, ThreadId("bobs")) as journal:
                with pytest.raises(IsolationError) as caught:
                    EventEmitter(context(), journal, Limits())
        sink = MemorySink()
        async with open_audit(sink) as audit:
            note_mix_up(audit, ExceptionGroup("", [caught.value, ValueError()]), "run")
            note_mix_up(None, caught.value, "run")
        [record] = await all_of(sink)
        assert (record.kind, record.user, record.claimed_owner) == ("event_injection", "ada", "bob")

    async def test_lets_no_journal_take_anothers_run(self) -> None:
        store = MemoryStore()
        async with open_journals(store) as journals:
            async with journals.attached(BOB, ThreadId("bobs")) as journal:
                foreign = run_record()
                with pytest.raises(IsolationError):
                    await journal.propose(NewThread(title="", epoch="e"), new_runs=(foreign,))
                with pytest.raises(IsolationError):
                    await journal.propose(NewThread(title="", epoch="e"), runs=(foreign,))
                with pytest.raises(IsolationError):
                    journal.append_encoded(
                        b'{"type":"CUSTOM"}', speaker=context(BOB, "bobs"), runs=(foreign,)
                    )
                assert journal.last_seq == 0
        assert await store.threads(BOB) == []


async def test_a_mix_up_inside_a_run_fails_it_and_is_recorded() -> None:
    async def mixes_up(run: RunContext) -> None:
        EventEmitter(context(BOB), run.emit._journal, run.limits)

    sink = MemorySink()
    async with open_audit(sink) as audit:
        plain = infrastructure(mixes_up=mixes_up)
        made = Infrastructure(agents=plain.registry, store=plain.store, audit=audit)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "mixes_up", "hi")
            assert (await run.ended()).status == "failed"
    [record] = await all_of(sink)
    assert (record.kind, record.user, record.claimed_owner) == ("event_injection", "bob", "ada")


def with_audit(
    audit: SecurityAudit,
    limits: Limits | None = None,
    store: MemoryStore | None = None,
) -> Any:
    plain = infrastructure(limits=limits, store=store)
    return Infrastructure(
        agents=plain.registry,
        limits=plain.limits,
        store=plain.store,
        audit=audit,
    )
