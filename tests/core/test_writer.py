"""The one task that commits: when, with whom together, and what becomes of what fails."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from tests.small_world import ADA, TroubledStore
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import Chunk, Commit, Limits, NewThread, ThreadId
from creche._writer import Writer


class Pile:
    """A source with a number of lines to commit."""

    def __init__(self, name: str) -> None:
        self.name = ThreadId(name)
        self.lines = 0
        self.settled = 0
        self.errors: list[Exception] = []

    def add(self, lines: int = 1) -> Pile:
        self.lines += lines
        return self

    def take(self) -> Commit | None:
        if self.settled == self.lines:
            return None
        return Commit(
            user_id=ADA,
            thread_id=self.name,
            opens=NewThread(title="", epoch="e"),
            chunk=Chunk(first_seq=self.settled + 1, last_seq=self.lines, data=b""),
        )

    def settle(self, commit: Commit) -> None:
        assert commit.chunk is not None
        self.settled = commit.chunk.last_seq

    def refuse(self, commit: Commit, error: Exception) -> bool:
        assert commit.thread_id == self.name
        self.errors.append(error)
        return True


@asynccontextmanager
async def serving(store: TroubledStore, limits: Limits | None = None) -> AsyncIterator[Writer]:
    writer = Writer(store, limits or Limits())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.serve)
        yield writer
        nursery.cancel_scope.cancel()


def groups(store: TroubledStore) -> list[tuple[float, list[str]]]:
    """What was committed when, by threads' names; times rounded to 0.1 ms."""
    return [
        (round(moment, 4), [commit.thread_id for commit in group])
        for moment, group in store.attempts
    ]


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


class TestGathering:
    async def test_drafts_gather_for_the_interval_and_go_together(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        one, two = Pile("one"), Pile("two")
        async with serving(store) as writer:
            writer.mark(one.add(), urgent=False)
            await trio.sleep(0.010)
            writer.mark(two.add(), urgent=False)
            await trio.sleep(1)
        assert groups(store) == [(0.02, ["one", "two"])]
        assert (one.settled, two.settled) == (1, 1)

    async def test_who_waits_is_committed_at_once_and_drafts_keep_gathering(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        one, two = Pile("one"), Pile("two")
        async with serving(store) as writer:
            await trio.sleep(1)
            writer.mark(one.add(), urgent=False)
            await trio.sleep(0.005)
            writer.mark(two.add(), urgent=True)
            await trio.sleep(1)
        assert groups(store) == [(1.005, ["two"]), (1.02, ["one"])]

    async def test_nothing_is_committed_for_a_source_with_nothing(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        async with serving(store) as writer:
            writer.mark(Pile("one"), urgent=True)
            await trio.sleep(1)
        assert store.attempts == []

    async def test_an_idle_writer_sleeps(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        """It would otherwise keep the fake clock, and a real processor, from resting."""
        async with serving(store) as writer:
            writer.mark(Pile("one").add(), urgent=True)
            before = trio.current_time()
            await trio.sleep(3600)
            assert trio.current_time() - before == pytest.approx(3600)

    async def test_one_transaction_takes_a_bounded_number_of_threads(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        piles = [Pile(f"p{number}") for number in range(5)]
        async with serving(store, Limits(commit_threads=2)) as writer:
            for pile in piles:
                writer.mark(pile.add(), urgent=True)
            await trio.sleep(1)
        assert [len(names) for _, names in groups(store)] == [2, 2, 1]
        assert all(pile.settled == 1 for pile in piles)

    async def test_what_comes_during_a_commit_goes_with_the_next(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        one, two = Pile("one"), Pile("two")
        store.hold()
        async with serving(store) as writer:
            writer.mark(one.add(), urgent=True)
            await wait_all_tasks_blocked()
            writer.mark(one.add(), urgent=True)
            writer.mark(two.add(), urgent=True)
            await wait_all_tasks_blocked()
            store.release()
            await trio.sleep(1)
        assert [names for _, names in groups(store)] == [["one"], ["one", "two"]]
        assert (one.settled, two.settled) == (2, 1)


class SlowToFail(TroubledStore):
    """A store that is away: each commit takes five seconds to fail."""

    async def commit(self, commits: Sequence[Commit]) -> None:
        if any(map(self.refuses, commits)):
            await trio.sleep(5)
        await super().commit(commits)


class TestFailing:
    async def test_a_store_that_is_away_is_not_asked_again_for_each_of_a_group(
        self,
        autojump_clock: MockClock,
    ) -> None:
        """A hundred time-outs one after the other are minutes; who waits must be told before."""
        store = SlowToFail()
        store.refuses = lambda _: True
        piles = [Pile(f"pile-{number}").add() for number in range(50)]
        async with serving(store) as writer:
            for pile in piles:
                writer.mark(pile, urgent=True)
            await trio.sleep(10.01)
            assert [len(pile.errors) for pile in piles] == [1] * 50
            store.refuses = lambda _: False
            await trio.sleep(10)
            assert [pile.settled for pile in piles] == [1] * 50

    async def test_what_failed_is_not_tried_together_with_what_did_not(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        bad = Pile("bad").add()
        good = [Pile(f"good-{number}") for number in range(5)]
        store.refuses = lambda commit: commit.thread_id == "bad"
        async with serving(store) as writer:
            writer.mark(bad, urgent=True)
            await trio.sleep(0.01)
            for _ in range(20):
                for pile in good:
                    writer.mark(pile.add(), urgent=False)
                await trio.sleep(0.1)
        together = {frozenset(names) for _, names in groups(store)}
        assert together == {frozenset({"bad"}), frozenset(pile.name for pile in good)}

    async def test_one_bad_row_harms_only_its_owner(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        good, bad, late = Pile("good"), Pile("bad"), Pile("late")
        store.refuses = lambda commit: commit.thread_id == "bad"
        async with serving(store) as writer:
            for pile in (good, bad, late):
                writer.mark(pile.add(), urgent=True)
            await trio.sleep(0.01)
            assert (good.settled, bad.settled, late.settled) == (1, 0, 1)
            assert (len(good.errors), len(bad.errors), len(late.errors)) == (0, 1, 0)
            assert isinstance(bad.errors[0], OSError)
            writer.mark(good.add(), urgent=True)
            await trio.sleep(0.01)
            assert good.settled == 2

    async def test_the_error_of_one_row_does_not_carry_that_of_the_group(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        """A database's error prints parameters: those of the group are of several users' rows."""
        good, bad = Pile("good"), Pile("bad")
        store.refuses = lambda commit: commit.thread_id == "bad"
        async with serving(store) as writer:
            writer.mark(good.add(), urgent=True)
            writer.mark(bad.add(), urgent=True)
            await trio.sleep(0.01)
        assert len(store.attempts[0][1]) == 2
        assert [error.__context__ for error in bad.errors] == [None]

    async def test_what_failed_is_tried_again_ever_more_slowly_until_it_is_taken(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        bad = Pile("bad")
        store.refuses = lambda _: True
        async with serving(store) as writer:
            writer.mark(bad.add(), urgent=True)
            await trio.sleep(25)
            moments = [moment for moment, _ in store.attempts]
            delays = [round(b - a, 3) for a, b in itertools.pairwise(moments)]
            assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
            store.refuses = lambda _: False
            await trio.sleep(5)
            assert bad.settled == 1
            tries = len(store.attempts)
            await trio.sleep(60)
            assert len(store.attempts) == tries
            store.refuses = lambda _: True
            writer.mark(bad.add(), urgent=True)
            await trio.sleep(0.15)
            assert len(store.attempts) == tries + 2, "a source that got well starts anew"

    async def test_marking_does_not_hasten_what_is_failing(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        """An agent that goes on talking must not turn an outage into a storm of tries."""
        bad = Pile("bad")
        store.refuses = lambda _: True
        async with serving(store) as writer:
            for _ in range(100):
                writer.mark(bad.add(), urgent=True)
                await trio.sleep(0.01)
        assert len(store.attempts) <= 5

    async def test_what_fails_with_nothing_left_is_not_tried_again(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        class GivesUp(Pile):
            def refuse(self, commit: Commit, error: Exception) -> bool:
                super().refuse(commit, error)
                self.lines = self.settled
                return False

        pile = GivesUp("one")
        store.refuses = lambda _: True
        async with serving(store) as writer:
            writer.mark(pile.add(), urgent=True)
            await trio.sleep(60)
        assert len(store.attempts) == 1


class TestFlushing:
    async def test_a_flush_commits_all_that_is_marked(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        writer = Writer(store, Limits(commit_threads=2))
        piles = [Pile(f"p{number}") for number in range(5)]
        for pile in piles:
            writer.mark(pile.add(), urgent=False)
        await writer.flush()
        assert all(pile.settled == 1 for pile in piles)
        assert trio.current_time() == 0

    async def test_a_flush_tries_again_what_fails(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        writer = Writer(store, Limits())
        pile = Pile("one").add()
        store.refuses = lambda _: len(store.attempts) < 3
        writer.mark(pile, urgent=False)
        with trio.fail_after(5):
            await writer.flush()
        assert pile.settled == 1

    async def test_a_flush_waits_for_the_commit_that_is_under_way(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        """Or its caller cancels that commit, and what it held is lost."""
        pile = Pile("one")
        store.hold()
        async with serving(store) as writer:
            writer.mark(pile.add(), urgent=True)
            await wait_all_tasks_blocked()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.flush)
                await wait_all_tasks_blocked()
                still_flushing = len(nursery.child_tasks)
                store.release()
        assert still_flushing == 1
        assert pile.settled == 1

    async def test_a_commit_that_is_cancelled_loses_nothing(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        piles = [Pile("one"), Pile("two")]
        store.hold()
        async with serving(store) as writer:
            for pile in piles:
                writer.mark(pile.add(), urgent=True)
            await wait_all_tasks_blocked()
        assert [pile.settled for pile in piles] == [0, 0]
        store.release()
        await writer.flush()
        assert [pile.settled for pile in piles] == [1, 1]

    async def test_a_retry_one_by_one_that_is_cancelled_loses_nothing(
        self,
        store: TroubledStore,
        autojump_clock: MockClock,
    ) -> None:
        piles = [Pile("one"), Pile("two"), Pile("three")]

        def refuses(commit: Commit) -> bool:
            if len(store.attempts) == 1:
                return True
            if len(store.attempts) == 2:
                store.hold()  # the second of the three, tried singly, is held up
            return False

        store.refuses = refuses
        async with serving(store) as writer:
            for pile in piles:
                writer.mark(pile.add(), urgent=True)
            await wait_all_tasks_blocked()
        assert [pile.settled for pile in piles] == [1, 0, 0]
        store.release()
        await writer.flush()
        assert [pile.settled for pile in piles] == [1, 1, 1]
