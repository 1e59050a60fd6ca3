"""A thread's log: order without gap or repeat, nothing shown that a crash could take back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.small_world import ADA, BOB, THREAD, TroubledStore, context, log_of
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    Chunk,
    Entry,
    IsolationError,
    Journal,
    Limits,
    MemoryStore,
    MessageId,
    NewThread,
    RunId,
    RunRecord,
    StoredMessage,
    StoreUnavailableError,
    ThreadDeletedError,
    ThreadId,
    UserId,
    UserMessage,
    events,
    open_journals,
)
from creche._events import encode_unnumbered
from creche._store import now
from creche._writer import Writer


def event(value: object = 0) -> events.Custom:
    return events.Custom(name="x", value=value)


def record(run: str = "run-a") -> RunRecord:
    return RunRecord(
        user_id=ADA,
        thread_id=THREAD,
        run_id=RunId(run),
        agent="hello",
        status="queued",
        created_at=now(),
    )


OPENS = NewThread(title="A title", epoch="epoch-1")


@asynccontextmanager
async def a_journal(
    store: MemoryStore,
    limits: Limits | None = None,
) -> AsyncIterator[Journal]:
    """A live journal of a thread that the store has."""
    async with open_journals(store, limits) as journals:
        async with journals.attached(ADA, THREAD) as journal:
            if await store.thread(ADA, THREAD) is None:
                await journal.propose(OPENS, new_runs=(record(),))
            yield journal


async def read_all(journal: Journal, after: int, upto: int) -> list[int]:
    seen: list[int] = []
    while after < upto:
        for entry in await journal.read(after=after):
            assert msgspec.json.decode(entry.data)["seq"] == entry.seq
            seen.append(entry.seq)
            after = entry.seq
    return seen


async def test_nobody_but_the_owners_runs_can_say_anything_on_it() -> None:
    store = TroubledStore()
    async with a_journal(store) as journal:
        with pytest.raises(IsolationError):
            journal.append_encoded(encode_unnumbered(event()), speaker=context(BOB))
        assert journal.last_seq == 0
        journal.append_encoded(encode_unnumbered(event()), speaker=context())
        assert journal.last_seq == 1


async def test_a_read_from_the_store_is_bounded_in_bytes_and_nothing_is_left_out(
    autojump_clock: MockClock,
) -> None:
    """A reader from the beginning must not have a whole log in memory."""
    store = TroubledStore()
    limits = Limits(read_bytes=2000, journal_bytes=0)
    async with a_journal(store, limits) as journal:
        for _ in range(100):
            journal.append(event("x" * 100))
        await journal.committed(100)
        after, sizes = 0, []
        while after < 100:
            entries = await journal.read(after=after)
            assert [entry.seq for entry in entries] == [*range(after + 1, entries[-1].seq + 1)]
            sizes.append(sum(len(entry.data) for entry in entries))
            after = entries[-1].seq
        assert max(sizes) < 2500
        assert len(sizes) > 5


class TestVisible:
    async def test_a_draft_is_visible_before_it_is_committed(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            store.hold()
            entry = journal.append(event("a"))
            assert entry.seq == journal.last_seq == journal.visible == 1
            with trio.fail_after(1):
                assert await journal.read(after=0) == [entry]
            assert await store.chunks(ADA, THREAD, after=0, limit=1) == []
            store.release()

    async def test_a_barrier_and_what_follows_it_are_not(self, autojump_clock: MockClock) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            store.hold()
            journal.append(event())
            journal.append(event(), barrier=True)
            journal.append(event())
            assert (journal.last_seq, journal.visible) == (3, 1)
            with trio.move_on_after(60) as waiting:
                await journal.read(after=1)
            assert waiting.cancelled_caught
            store.release()
            with trio.fail_after(1):
                assert await read_all(journal, 1, 3) == [2, 3]

    async def test_a_later_barrier_still_hides_when_an_earlier_one_is_committed(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            store.hold()
            journal.append(event(), barrier=True)
            await wait_all_tasks_blocked()  # the first is taken, and held up
            journal.append(event())
            journal.append(event(), barrier=True)
            journal.append(event())
            store.refuses = lambda commit: commit.chunk is not None and commit.chunk.first_seq > 1
            store.release()
            with trio.fail_after(1):
                await journal.committed(1)
            assert journal.visible == 2
            store.refuses = lambda _: False
            with trio.fail_after(1):
                await journal.committed(4)
            assert journal.visible == 4

    async def test_a_barrier_is_committed_at_once_and_a_draft_within_the_interval(
        self,
        autojump_clock: MockClock,
    ) -> None:
        async with a_journal(TroubledStore()) as journal:
            begun = trio.current_time()
            journal.append(event())
            await journal.committed(1)
            assert trio.current_time() - begun == pytest.approx(0.020)
            begun = trio.current_time()
            journal.append(event(), barrier=True)
            await journal.committed(2)
            assert trio.current_time() == begun

    async def test_a_barrier_after_drafts_hastens_them(self, autojump_clock: MockClock) -> None:
        async with a_journal(TroubledStore()) as journal:
            begun = trio.current_time()
            journal.append(event())
            await trio.sleep(0.005)
            journal.append(event(), barrier=True)
            await journal.committed(2)
            assert trio.current_time() - begun == pytest.approx(0.005)

    async def test_records_are_durable_with_their_entry_and_not_before(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            store.hold()
            journal.append(event(), barrier=True)
            await wait_all_tasks_blocked()
            message = StoredMessage(
                run_id=RunId("run-b"),
                message=UserMessage(id=MessageId("m"), content="hi"),
                created_at=now(),
            )
            journal.append(event(), barrier=True, runs=(record("run-b"),), messages=(message,))
            store.release()
            await journal.committed(1)
            first = store.attempts[1][1][0]  # the proposal was the one before
            assert (first.runs, first.messages) == ((), ())
            await journal.committed(2)
            assert await store.run(ADA, RunId("run-b")) is not None
            assert await store.messages(ADA, THREAD) == [message]

    async def test_records_wait_for_their_entry_when_a_commit_takes_a_part_only(
        self,
        autojump_clock: MockClock,
    ) -> None:
        """Or a run would be over in the store before its terminal event is."""
        store = TroubledStore()
        async with a_journal(store, Limits(commit_bytes=200)) as journal:
            store.hold()
            for _ in range(5):
                journal.append(event("x" * 100))
            journal.append(event(), barrier=True, runs=(record("run-b"),))
            store.release()
            with trio.fail_after(1):
                await journal.committed(6)
        having = [
            commit.chunk.last_seq
            for _, group in store.attempts
            for commit in group
            if commit.chunk is not None and commit.runs
        ]
        assert having == [6]

    async def test_an_event_that_has_no_json_leaves_the_log_as_it_was(self) -> None:
        """An agent may say anything; its own mistake must not cost the thread its log.

        On the real clock: a writer that cannot come to an end would stop the fake one.
        """
        store = TroubledStore()
        async with a_journal(store) as journal:
            journal.append(event(1))
            for value in (object(), "\ud800"):
                with pytest.raises((TypeError, ValueError)):
                    journal.append(event(value))
            assert journal.last_seq == 1
            journal.append(event(2), barrier=True)
            with trio.fail_after(1):
                await journal.committed(journal.last_seq)
        assert [line["value"] for line in await log_of(store)] == [1, 2]


class TestReading:
    async def test_every_reader_gets_exactly_what_follows_its_number(
        self,
        autojump_clock: MockClock,
    ) -> None:
        """From memory, from the store and across the border between them, live and afterwards."""
        total, store = 60, TroubledStore()
        limits = Limits(journal_bytes=400, read_entries=7)
        seen: dict[int, list[int]] = {}

        async def follow(after: int) -> None:
            seen[after] = await read_all(journal, after, total)

        async with a_journal(store, limits) as journal:
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    for number in range(1, total + 1):
                        journal.append(event("x" * (number % 7)), barrier=number % 5 == 0)
                        nursery.start_soon(follow, number - 1)
                        if number % 3 == 0:
                            await trio.sleep(0.007)
            assert seen == {after: [*range(after + 1, total + 1)] for after in range(total)}
            assert len(journal._entries) < total / 2, "memory was never let go: no border crossed"
            for after in range(total):
                assert await read_all(journal, after, total) == [*range(after + 1, total + 1)]
        async with open_journals(store, limits) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                for after in range(total):
                    assert await read_all(journal, after, total) == [*range(after + 1, total + 1)]

    async def test_one_read_returns_a_bounded_number(self, autojump_clock: MockClock) -> None:
        async with a_journal(TroubledStore(), Limits(read_entries=3)) as journal:
            for _ in range(10):
                journal.append(event())
            assert [entry.seq for entry in await journal.read(after=4)] == [5, 6, 7]

    async def test_a_reader_waits_and_is_woken_by_the_next_entry(
        self,
        autojump_clock: MockClock,
    ) -> None:
        async with a_journal(TroubledStore()) as journal:
            got: list[Entry] = []

            async def follow() -> None:
                got.extend(await journal.read(after=0))

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(follow)
                await wait_all_tasks_blocked()
                assert got == []
                journal.append(event("new"))
        assert [entry.seq for entry in got] == [1, 1, 1]

    async def test_an_entrys_event_is_what_was_appended(self) -> None:
        async with a_journal(MemoryStore()) as journal:
            assert journal.append(event({"a": [1]})).event == event({"a": [1]})

    async def test_a_store_with_a_hole_is_an_error_and_not_a_silent_gap(self) -> None:
        class Holed(MemoryStore):
            async def chunks(
                self,
                user_id: UserId,
                thread_id: ThreadId,
                *,
                after: int,
                limit: int,
            ) -> list[Chunk]:
                found = await super().chunks(user_id, thread_id, after=after, limit=limit)
                return found[1:]

        store = Holed()
        async with a_journal(store) as journal:
            for seq in (1, 2):
                journal.append(event(), barrier=True)
                await journal.committed(seq)
        async with open_journals(store) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                with pytest.raises(StoreUnavailableError):
                    await journal.read(after=0)


class TestMemory:
    async def test_only_committed_entries_are_let_go(self, autojump_clock: MockClock) -> None:
        store = TroubledStore()
        async with a_journal(store, Limits(journal_bytes=500)) as journal:
            store.hold()
            for _ in range(100):
                journal.append(event("x" * 20))
            assert len(journal._entries) == 100
            store.release()
            await journal.committed(100)
            assert sum(len(entry.data) for entry in journal._entries) <= 500

    async def test_uncommitted_bytes_are_counted_up_and_down(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            store.hold()
            entries = [journal.append(event(number)) for number in range(10)]
            assert journal.uncommitted_bytes == sum(len(entry.data) for entry in entries)
            store.release()
            await journal.committed(10)
            assert journal.uncommitted_bytes == 0

    async def test_relief_comes_when_enough_is_committed(self, autojump_clock: MockClock) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            store.hold()
            journal.append(event("x" * 1000))
            with trio.move_on_after(60) as waiting:
                await journal.relieved(500)
            assert waiting.cancelled_caught
            store.release()
            with trio.fail_after(1):
                await journal.relieved(500)

    async def test_one_transaction_takes_a_bounded_number_of_bytes(
        self,
        autojump_clock: MockClock,
    ) -> None:
        """And at least one entry, however large that is."""
        store = TroubledStore()
        async with a_journal(store, Limits(commit_bytes=1000)) as journal:
            store.hold()
            for size in (10, 10, 5000, 10, *[90] * 20):
                journal.append(event("x" * size))
            store.release()
            with trio.fail_after(5):
                await journal.committed(24)
        chunks = [c.chunk for _, group in store.attempts for c in group if c.chunk is not None]
        assert [chunk.first_seq for chunk in chunks[1:]] == [c.last_seq + 1 for c in chunks[:-1]]
        assert all(len(c.data) <= 1000 + 30 or c.first_seq == c.last_seq for c in chunks)
        assert len(chunks) >= 4


class TestProposals:
    async def test_records_are_durable_when_it_returns(self, autojump_clock: MockClock) -> None:
        store = TroubledStore()
        async with open_journals(store) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                with trio.fail_after(1):
                    await journal.propose(OPENS, new_runs=(record(),))
                assert await store.runs(ADA, THREAD) != []
                thread = await store.thread(ADA, THREAD)
                assert thread is not None
                assert thread.epoch == "epoch-1"

    async def test_a_refused_one_raises_writes_nothing_and_is_not_tried_again(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        store.refuses = lambda _: True
        async with open_journals(store) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                with trio.fail_after(1), pytest.raises(StoreUnavailableError) as caught:
                    await journal.propose(OPENS, new_runs=(record(),))
                assert isinstance(caught.value.__cause__, OSError)
                store.refuses = lambda _: False
                await trio.sleep(60)
                assert await store.thread(ADA, THREAD) is None
                assert len(store.attempts) == 1
                with trio.fail_after(1):
                    await journal.propose(OPENS, new_runs=(record("run-b"),))
        assert [run.run_id for run in await store.runs(ADA, THREAD)] == ["run-b"]

    async def test_a_refused_one_costs_the_thread_no_event(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            store.refuses = lambda _: True
            journal.append(event("kept"), barrier=True)
            with pytest.raises(StoreUnavailableError):
                await journal.propose(OPENS, new_runs=(record("run-b"),))
            assert journal.visible == 0
            store.refuses = lambda _: False
            with trio.fail_after(10):
                await journal.committed(1)
        assert [line["value"] for line in await log_of(store)] == ["kept"]
        assert await store.run(ADA, RunId("run-b")) is None

    async def test_one_whose_proposer_is_gone_is_not_committed_behind_its_back(
        self,
        autojump_clock: MockClock,
    ) -> None:
        """Nobody would ever end that run: either it is not written, or the proposer waits."""
        store = TroubledStore()
        async with open_journals(store) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                store.refuses = lambda _: True
                journal.append(event(), barrier=True)
                await trio.sleep(0.01)  # the source is failing now, so what is proposed waits
                with trio.move_on_after(0.001):
                    await journal.propose(OPENS, new_runs=(record(),))
                store.refuses = lambda _: False
                await trio.sleep(60)
                assert await store.runs(ADA, THREAD) == []


class TestJournals:
    async def test_all_who_are_attached_share_one_and_the_last_one_out_ends_it(self) -> None:
        async with open_journals(MemoryStore()) as journals:
            async with journals.attached(ADA, THREAD) as one:
                async with journals.attached(ADA, THREAD) as two:
                    assert one is two
                assert len(journals) == 1
            assert len(journals) == 0
            async with journals.attached(ADA, THREAD) as three:
                assert three is not one

    async def test_the_same_thread_id_of_two_users_is_two_journals(self) -> None:
        async with open_journals(MemoryStore()) as journals:
            async with journals.attached(ADA, THREAD) as ours:
                async with journals.attached(BOB, THREAD) as theirs:
                    assert ours is not theirs
                    await ours.propose(OPENS)
                    ours.append(event("ada's"))
                    assert theirs.last_seq == 0
                    assert (ours.user_id, theirs.user_id) == (ADA, BOB)

    async def test_looking_writes_nothing(self) -> None:
        store = MemoryStore()
        async with open_journals(store) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                assert (journal.last_seq, journal.visible) == (0, 0)
        assert await store.threads(ADA) == []

    async def test_a_journal_goes_on_where_the_log_ends_in_the_same_epoch(self) -> None:
        store = MemoryStore()
        async with a_journal(store) as journal:
            journal.append(event(), barrier=True)
            await journal.committed(1)
        async with a_journal(store) as journal:
            assert (journal.last_seq, journal.visible, journal.epoch) == (1, 1, "epoch-1")
            assert journal.append(event()).seq == 2

    async def test_a_store_that_cannot_be_read_leaves_nothing_attached(self) -> None:
        store = TroubledStore()
        store.cannot_be_read = True
        async with open_journals(store) as journals:
            with pytest.raises(OSError, match="disk"):
                async with journals.attached(ADA, THREAD):
                    pytest.fail("attached to nothing")
            assert len(journals) == 0
            store.cannot_be_read = False
            async with journals.attached(ADA, THREAD) as journal:
                assert journal.last_seq == 0

    async def test_what_was_appended_last_is_committed_on_the_way_out(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            journal.append(event("last"))
        assert [line["value"] for line in await log_of(store)] == ["last"]

    async def test_it_is_committed_on_the_way_out_of_a_cancellation_too(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        with trio.CancelScope() as scope:
            async with a_journal(store) as journal:
                journal.append(event("last"))
                scope.cancel()
                await trio.sleep_forever()
        assert [line["value"] for line in await log_of(store)] == ["last"]

    async def test_a_commit_that_is_under_way_is_not_cut_off_by_closing(
        self,
        autojump_clock: MockClock,
    ) -> None:
        class Slow(MemoryStore):
            async def commit(self, commits: Sequence[Any]) -> None:
                await trio.sleep(0.5)
                await super().commit(commits)

        store = Slow()
        async with a_journal(store) as journal:
            journal.append(event("last"))
            await trio.sleep(0.1)
        assert [line["value"] for line in await log_of(store)] == ["last"]

    async def test_closing_waits_for_an_absent_store_but_not_for_ever(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = TroubledStore()
        async with a_journal(store) as journal:
            store.refuses = lambda _: True
            journal.append(event())
            begun = trio.current_time()
        assert trio.current_time() - begun == pytest.approx(2.0)


class TestDeleting:
    async def test_who_reads_is_told_and_who_comes_later_finds_it_empty(self) -> None:
        store = MemoryStore()
        async with open_journals(store) as journals:
            async with journals.attached(ADA, THREAD) as journal:
                await journal.propose(OPENS)
                journal.append(event(), barrier=True)
                await journal.committed(1)

                async def follow() -> None:
                    with pytest.raises(ThreadDeletedError):
                        await journal.read(after=1)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(follow)
                    await wait_all_tasks_blocked()
                    assert await journals.delete(ADA, THREAD) is True
                async with journals.attached(ADA, THREAD) as fresh:
                    assert fresh is not journal
                    assert fresh.last_seq == 0
                    assert fresh.epoch != journal.epoch
            assert len(journals) == 0
        assert await store.thread(ADA, THREAD) is None

    async def test_deleting_what_is_absent_is_false_and_leaves_nothing(self) -> None:
        async with open_journals(MemoryStore()) as journals:
            assert await journals.delete(ADA, THREAD) is False
            assert len(journals) == 0

    async def test_a_reader_who_was_far_behind_is_told_the_same(self) -> None:
        """It is asking the store for old entries at the moment at which they go."""
        asked, go_on = trio.Event(), trio.Event()

        class Deliberate(MemoryStore):
            async def chunks(
                self,
                user_id: UserId,
                thread_id: ThreadId,
                *,
                after: int,
                limit: int,
            ) -> list[Chunk]:
                asked.set()
                await go_on.wait()
                return await super().chunks(user_id, thread_id, after=after, limit=limit)

        store = Deliberate()
        async with a_journal(store) as journal:
            journal.append(event(), barrier=True)
            await journal.committed(1)
        async with open_journals(store) as journals:
            async with journals.attached(ADA, THREAD) as journal:

                async def follow() -> None:
                    with pytest.raises(ThreadDeletedError):
                        await journal.read(after=0)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(follow)
                    await asked.wait()
                    await journals.delete(ADA, THREAD)
                    go_on.set()


# --- any interleaving, the writer's part played by hand

steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 60)),
        st.tuples(st.just("barrier"), st.integers(0, 60)),
        st.tuples(st.sampled_from(["take", "settle", "refuse"]), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, 30)),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(steps)
async def test_any_interleaving_keeps_order_and_never_shows_what_is_not_committed(
    plan: list[tuple[str, int]],
) -> None:
    store = MemoryStore()
    limits = Limits(journal_bytes=150, read_entries=4, commit_bytes=300)
    journal = Journal(
        ADA,
        THREAD,
        record=None,
        store=store,
        writer=Writer(store, limits),  # it never serves
        limits=limits,
    )
    appended: list[bytes] = []
    barriers: set[int] = set()
    committed, shown, commit = 0, 0, None

    async def check(after: int) -> None:
        nonlocal shown
        first_hidden = min((seq for seq in barriers if seq > committed), default=math.inf)
        assert journal.visible == min(len(appended), first_hidden - 1)
        assert journal.visible >= shown, "what was shown was taken back"
        shown = journal.visible
        while after < journal.visible:
            with trio.fail_after(5):
                entries = await journal.read(after=after)
            assert [entry.seq for entry in entries] == [
                *range(after + 1, after + 1 + len(entries)),
            ]
            assert [entry.data for entry in entries] == appended[after : after + len(entries)]
            after = entries[-1].seq
            assert after < first_hidden

    for what, number in plan:
        if what in {"append", "barrier"}:
            entry = journal.append(event("x" * number), barrier=what == "barrier")
            appended.append(entry.data)
            assert entry.seq == len(appended)
            if what == "barrier":
                barriers.add(entry.seq)
        elif what == "take" and commit is None:
            commit = journal.take()
            assert (commit is None) == (committed == len(appended))
        elif what == "settle" and commit is not None:
            assert commit.chunk is not None
            assert commit.chunk.first_seq == committed + 1
            await store.commit([dataclasses.replace(commit, opens=OPENS)])
            journal.settle(commit)
            committed, commit = commit.chunk.last_seq, None
        elif what == "refuse" and commit is not None:
            journal.refuse(commit, OSError("no"))
            commit = None
        elif what == "read":
            await check(min(number, len(appended)))
        assert journal.uncommitted_bytes == sum(map(len, appended[committed:]))
    await check(0)
