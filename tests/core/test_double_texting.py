"""A run that is asked for while its thread is busy waits, is refused, or takes its place."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.agui_rules import StockClient, check_history
from tests.small_world import (
    ADA,
    BOB,
    THREAD,
    TroubledStore,
    context,
    infrastructure,
    log_of,
    one_at_a_time,
    terminals_of,
    types_of,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    BusyError,
    Infrastructure,
    LimitExceededError,
    Limits,
    MemoryStore,
    MultitaskStrategy,
    Run,
    RunContext,
    RunError,
    Store,
    StoreUnavailableError,
    UserId,
    open_supervisor,
)

SUPERSEDING: tuple[MultitaskStrategy, ...] = ("interrupt", "rollback")


@pytest.fixture
def store() -> TroubledStore:
    return TroubledStore()


async def talk(run: RunContext) -> None:
    """Says half of something, and needs two seconds to end."""
    await run.emit.text("half a sen")
    try:
        await trio.sleep_forever()
    finally:
        async with run.cleanup():
            await trio.sleep(2)


class Listener:
    """Keeps what agents were given to read: {what was asked: all words before it}."""

    def __init__(self) -> None:
        self.heard: dict[str, list[str]] = {}

    async def __call__(self, run: RunContext) -> None:
        *before, asked = [str(message.content) for message in run.messages]
        self.heard[asked] = before
        await run.emit.text(f"to {asked}")


async def words_in(store: Store, user: UserId = ADA) -> list[str]:
    """The thread's messages as anybody is told of them; models must take them as they are."""
    stored = await store.messages(user, THREAD)
    check_history([item.message for item in stored])
    return [str(item.message.content) for item in stored]


async def checked_log(store: Store) -> list[dict[str, Any]]:
    log = await log_of(store)
    one_at_a_time(log)
    own: list[dict[str, Any]] = []
    for event in log:
        own.append(event)
        if terminals_of([event]):
            client = StockClient()  # such clients look at one run
            client.take_all(own)
            assert client.is_tidy
            own = []
    return log


def said_by(log: Sequence[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """A run's events."""
    assert run.first_seq is not None
    own = list(log[run.first_seq - 1 :])
    return own[: types_of(own).index(terminals_of(own)[0]["type"]) + 1]


class TestReject:
    async def test_on_a_busy_thread_is_refused_and_leaves_nothing(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            first = await supervisor.start(context(), "hang", "one")
            with pytest.raises(BusyError, match="this thread is busy"):
                await supervisor.start(context(), "hello", "two", multitask_strategy="reject")
            assert supervisor.runs(ADA) == (first,)
            assert [run.run_id for run in await store.runs(ADA, THREAD)] == [first.run_id]
            assert await words_in(store) == ["one"]
            first.cancel()
            await first.ended()
            after = await supervisor.start(context(), "hello", "two", multitask_strategy="reject")
            assert (await after.ended()).status == "success"

    async def test_looks_at_its_own_thread_only(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            await supervisor.start(context(), "hang", "one")
            for other in (context(thread="another"), context(BOB)):
                run = await supervisor.start(other, "hello", "two", multitask_strategy="reject")
                assert (await run.ended()).status == "success"


class TestInterrupt:
    async def test_begins_once_the_others_nursery_has_closed_and_its_end_is_stored(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        listener = Listener()
        parts = infrastructure(store=store, talk=talk, listen=listener)
        async with open_supervisor(parts) as supervisor:
            first = await supervisor.start(context(), "talk", "one")
            await trio.sleep(1)
            second = await supervisor.start(
                context(), "listen", "two", multitask_strategy="interrupt"
            )
            assert supervisor.position(second) == 1
            outcome = await first.ended()
            assert (outcome.status, outcome.receipt.reason) == ("cancelled", "superseded")
            assert outcome.receipt.elapsed_ms == pytest.approx(2000)
            assert (await second.ended()).status == "success"
        log = await checked_log(store)
        assert second.first_seq == said_by(log, first)[-1]["seq"] + 1
        assert listener.heard == {"two": ["one", "half a sen"]}, "what was said so far is kept"

    async def test_ends_what_waits_too_and_is_next(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        listener = Listener()
        parts = infrastructure(store=store, talk=talk, listen=listener)
        async with open_supervisor(parts) as supervisor:
            await supervisor.start(context(), "talk", "one")
            waiting = [await supervisor.start(context(), "listen", words) for words in "abc"]
            last = await supervisor.start(
                context(), "listen", "two", multitask_strategy="interrupt"
            )
            assert supervisor.position(last) == 1
            following = await supervisor.start(context(), "listen", "three")
            assert supervisor.position(following) == 2
            for run in waiting:
                outcome = await run.ended()
                assert (outcome.status, outcome.receipt.reason) == ("cancelled", "superseded")
            await following.ended()
        await checked_log(store)
        assert list(listener.heard) == ["two", "three"]
        assert listener.heard["two"] == ["one", "half a sen", "a", "b", "c"]

    async def test_twice_the_later_one_counts(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        listener = Listener()
        parts = infrastructure(store=store, talk=talk, listen=listener)
        async with open_supervisor(parts) as supervisor:
            first = await supervisor.start(context(), "talk", "one")
            await trio.sleep(1)
            second, third = [
                await supervisor.start(context(), "listen", words, multitask_strategy="interrupt")
                for words in ("two", "three")
            ]
            outcomes = [await run.ended() for run in (first, second, third)]
        assert [outcome.receipt.reason for outcome in outcomes] == [
            "superseded",
            "superseded",
            "success",
        ]
        assert list(listener.heard) == ["three"]
        assert trio.current_time() == pytest.approx(3), "the first has its two seconds, once"

    async def test_of_one_that_overruns_its_cleanup_waits_until_nothing_of_it_is_left(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async def stubborn(_: RunContext) -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(60)

        async with open_supervisor(infrastructure(store=store, stubborn=stubborn)) as supervisor:
            first = await supervisor.start(context(), "stubborn", "one")
            await trio.sleep(1)
            second = await supervisor.start(
                context(), "hello", "two", multitask_strategy="interrupt"
            )
            told = await first.concluded()
            assert told.receipt.overran
            assert trio.current_time() == pytest.approx(6.1)
            assert second.status == "queued"
            await second.ended()
            assert trio.current_time() == pytest.approx(60)
        await checked_log(store)

    @pytest.mark.parametrize("strategy", SUPERSEDING)
    async def test_that_the_store_refuses_ends_nobody(
        self, autojump_clock: MockClock, store: TroubledStore, strategy: MultitaskStrategy
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            first = await supervisor.start(context(), "hang", "one")
            await trio.sleep(1)
            store.refuses = lambda commit: bool(commit.new_runs)
            with pytest.raises(StoreUnavailableError):
                await supervisor.start(context(), "hello", "two", multitask_strategy=strategy)
            store.refuses = lambda _: False
            assert first.reason is None
            assert supervisor.runs(ADA) == (first,)
            assert await words_in(store) == ["one"]

    @pytest.mark.parametrize("strategy", SUPERSEDING)
    async def test_on_an_idle_thread_it_is_as_any_other(
        self, autojump_clock: MockClock, store: TroubledStore, strategy: MultitaskStrategy
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            for words in ("one", "two"):
                run = await supervisor.start(context(), "hello", words, multitask_strategy=strategy)
                assert (await run.ended()).status == "success"
            elsewhere = await supervisor.start(context(thread="b"), "hang", "x")
            theirs = await supervisor.start(context(BOB), "hang", "x")
            run = await supervisor.start(context(), "hello", "three", multitask_strategy=strategy)
            await run.ended()
            assert (elsewhere.reason, theirs.reason) == (None, None)
        assert await words_in(store) == ["one", "hello", "two", "hello", "three", "hello"]
        assert "CUSTOM" not in types_of(await checked_log(store))

    async def test_there_is_no_other_strategy(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with open_supervisor(infrastructure(store=store)) as supervisor:
            unknown: Any = "ask"
            with pytest.raises(ValueError, match="enqueue, reject, interrupt, rollback"):
                await supervisor.start(context(), "hello", "hi", multitask_strategy=unknown)
            assert supervisor.count == 0


class TestRollback:
    async def test_takes_the_others_words_out_of_the_history_but_not_out_of_the_log(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        listener = Listener()
        parts = infrastructure(store=store, talk=talk, listen=listener)
        async with open_supervisor(parts) as supervisor:
            await (await supervisor.start(context(), "listen", "zero")).ended()
            first = await supervisor.start(context(), "talk", "one")
            await trio.sleep(1)
            queued = await supervisor.start(context(), "listen", "one and a half")
            last = await supervisor.start(context(), "listen", "two", multitask_strategy="rollback")
            # From now on, although the other has not ended yet.
            assert await words_in(store) == ["zero", "to zero", "two"]
            assert await store.search_messages(ADA, "half", limit=9) == []
            await last.ended()
            following = await supervisor.start(context(), "listen", "three")
            await following.ended()
        assert listener.heard["two"] == ["zero", "to zero"]
        assert listener.heard["three"] == ["zero", "to zero", "two", "to two"]
        assert "one and a half" not in listener.heard
        assert await words_in(store) == ["zero", "to zero", "two", "to two", "three", "to three"]
        records = {run.run_id: run for run in await store.runs(ADA, THREAD)}
        assert [run.rolled_back for run in records.values()] == [False, True, True, False, False]
        log = await checked_log(store)
        assert [event["type"] for event in said_by(log, first)][:2] == [
            "RUN_STARTED",
            "TEXT_MESSAGE_START",
        ]
        told = [event for event in log if event.get("name") == "creche.rolled_back"]
        assert [event["value"] for event in told] == [{"run_ids": [first.run_id, queued.run_id]}]
        started, waited, undid, *_ = said_by(log, last)
        assert (started["type"], waited["name"]) == ("RUN_STARTED", "creche.queued")
        assert waited["value"]["position"] == 1
        assert undid is told[0]

    async def test_of_a_run_that_ends_by_itself_meanwhile_undoes_it_all_the_same(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        """It was there when the person asked for its words to go."""
        listener = Listener()
        go_on = trio.Event()

        async def first_words(run: RunContext) -> None:
            await go_on.wait()
            await run.emit.text("done")

        parts = infrastructure(store=store, words=first_words, listen=listener)
        async with open_supervisor(parts) as supervisor, trio.open_nursery() as nursery:
            first = await supervisor.start(context(), "words", "one")
            await trio.sleep(1)
            store.hold()
            last = await supervisor.submit(
                context(), "listen", "two", multitask_strategy="rollback"
            )
            await wait_all_tasks_blocked()
            go_on.set()
            await wait_all_tasks_blocked()
            nursery.start_soon(last.accepted)
            store.release()
            assert (await first.ended()).status == "success"
            await last.ended()
        assert listener.heard == {"two": []}
        assert await words_in(store) == ["two", "to two"]
        told = [e["value"] for e in await checked_log(store) if e["type"] == "CUSTOM"]
        assert told == [{"run_ids": [first.run_id]}]

    async def test_that_is_cancelled_before_its_turn_stays_done_and_is_told(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        parts = infrastructure(store=store, talk=talk)
        async with open_supervisor(parts) as supervisor:
            first = await supervisor.start(context(), "talk", "one")
            await trio.sleep(1)
            last = await supervisor.start(context(), "hello", "two", multitask_strategy="rollback")
            last.cancel()
            await last.ended()
        assert await words_in(store) == ["two"]
        assert [e["value"] for e in said_by(await checked_log(store), last) if "value" in e] == [
            {"run_ids": [first.run_id]}
        ]

    async def test_survives_that_the_thread_is_deleted_under_it(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        parts = infrastructure(store=store, talk=talk)
        async with open_supervisor(parts) as supervisor, trio.open_nursery() as nursery:
            await supervisor.start(context(), "talk", "one")
            await trio.sleep(1)
            last = await supervisor.start(context(), "hello", "two", multitask_strategy="rollback")
            nursery.start_soon(supervisor.delete_thread, ADA, THREAD)
            assert (await last.ended()).receipt.reason == "superseded"
            await wait_all_tasks_blocked()
            assert await store.thread(ADA, THREAD) is None
            after = await supervisor.start(context(), "hello", "anew")
            assert (await after.ended()).status == "success"
        assert await words_in(store) == ["anew", "hello"]

    @pytest.mark.parametrize("strategy", SUPERSEDING)
    async def test_a_process_that_goes_ends_all_of_them(
        self, autojump_clock: MockClock, store: TroubledStore, strategy: MultitaskStrategy
    ) -> None:
        parts = infrastructure(store=store, talk=talk)
        async with open_supervisor(parts) as supervisor:
            first = await supervisor.start(context(), "talk", "one")
            await trio.sleep(1)
            last = await supervisor.start(context(), "hang", "two", multitask_strategy=strategy)
            await trio.sleep(0.5)
        assert (await first.ended()).receipt.reason == "superseded"
        assert (await last.ended()).receipt.reason == "shutdown"
        assert await store.unfinished_runs() == []
        await checked_log(store)


STRATEGIES: tuple[MultitaskStrategy, ...] = ("enqueue", "reject", "interrupt", "rollback")


class TestAStorm:
    @pytest.mark.parametrize("seed", range(20))
    async def test_of_a_hundred_mixed_starts_keeps_their_order(
        self, autojump_clock: MockClock, seed: int
    ) -> None:
        chance = random.Random(seed)
        await storm(
            [(chance.choice(STRATEGIES), chance.choice(PAUSES)) for _ in range(100)],
            seed=seed,
            held=chance.random() < 0.3,
        )

    # Trio's fake clock is one for each run of the event loop, which Hypothesis's examples share.
    @settings(max_examples=60, deadline=None)
    @given(
        starts=st.lists(
            st.tuples(st.sampled_from(STRATEGIES), st.sampled_from([0, 1, 2, 5])), max_size=12
        ),
        seed=st.integers(0, 100),
    )
    async def test_of_few_starts_in_every_order_keeps_it(
        self, starts: list[tuple[MultitaskStrategy, int]], seed: int
    ) -> None:
        await storm(starts, seed=seed, held=False)


PAUSES = (0, 0, 0, 1, 2, 3, 8, 20)  # checkpoints between one start and the next


@dataclasses.dataclass
class Storm:
    """Starts, one after the other, and what became of them."""

    store: TroubledStore = dataclasses.field(default_factory=TroubledStore)
    listener: Listener = dataclasses.field(default_factory=Listener)
    # Those that were taken on, with what was asked.
    asked: list[tuple[Run, str, MultitaskStrategy]] = dataclasses.field(default_factory=list)
    refused: int = 0


async def storm(starts: Sequence[tuple[MultitaskStrategy, int]], *, seed: int, held: bool) -> None:
    """Start these one after the other, and check what became of them and what each was told."""
    chance = random.Random(seed)
    found = Storm()

    async def listen(run: RunContext) -> None:
        await found.listener(run)
        for _ in range(chance.choice([0, 1, 10])):
            await trio.lowlevel.checkpoint()
            await run.emit.text(" and more")

    limits = Limits(runs_per_thread=200, runs_per_user=200, running=1, history_runs=200)
    parts = infrastructure(store=found.store, limits=limits, listen=listen)
    async with open_supervisor(parts, grace=1000) as supervisor:
        if held:
            found.store.hold()
        for number, (strategy, pauses) in enumerate(starts):
            words = f"ask {number}"
            try:
                run = await supervisor.submit(
                    context(), "listen", words, multitask_strategy=strategy
                )
                found.asked.append((run, words, strategy))
            except BusyError:
                assert strategy == "reject"
                found.refused += 1
            for _ in range(pauses):
                await trio.lowlevel.checkpoint()
            if held and chance.random() < 0.1:
                found.store.release()
        found.store.release()
        with trio.fail_after(100):
            for run, _, _ in found.asked:
                await run.ended()
    assert len(found.asked) + found.refused == len(starts)
    await check_order(found)
    await check_words(found)


async def check_order(found: Storm) -> None:
    """All are stored and told in the order of asking, and the last one is answered."""
    order = [run.run_id for run, _, _ in found.asked]
    assert await found.store.unfinished_runs() == []
    assert [record.run_id for record in await found.store.runs(ADA, THREAD)] == order
    assert one_at_a_time(await checked_log(found.store)) == order
    for position, (run, words, _) in enumerate(found.asked):
        assert run.outcome is not None
        if run.outcome.status == "success":
            assert words in found.listener.heard
            continue
        assert run.outcome.receipt.reason == "superseded"
        following = {strategy for _, _, strategy in found.asked[position + 1 :]}
        assert following & set(SUPERSEDING), "somebody took its place"


async def check_words(found: Storm) -> None:
    """What is undone is told, gone from the history, and was read by nobody who came later."""
    gone = {run.run_id for run in await found.store.runs(ADA, THREAD) if run.rolled_back}
    told: set[str] = set()
    for event in await log_of(found.store):
        if event.get("name") == "creche.rolled_back":
            told.update(event["value"]["run_ids"])
    assert told == gone
    for position, (run, words, _) in enumerate(found.asked):
        if words in found.listener.heard and run.run_id not in gone:
            asks = [word for word in found.listener.heard[words] if word.startswith("ask")]
            before = found.asked[:position]
            assert asks == [word for other, word, _ in before if other.run_id not in gone]
    left = [word for word in await words_in(found.store) if word.startswith("ask")]
    assert left == [word for run, word, _ in found.asked if run.run_id not in gone]


def weighted(
    limits: Limits, weights: dict[str, float], store: Store, starts: list[tuple[float, str]]
) -> Infrastructure:
    """Runs that take a second each, and note when each begins."""

    async def work(run: RunContext) -> None:
        starts.append((trio.current_time(), str(run.messages[-1].content)))
        await trio.sleep(1)

    made = infrastructure(limits=limits, work=work)
    return Infrastructure(
        agents=made.registry,
        limits=limits,
        store=store,
        weight=lambda user: weights.get(user, 1.0),
    )


class TestAdmission:
    async def test_a_user_at_the_cap_waits_and_holds_nobody_up(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        starts: list[tuple[float, str]] = []
        limits = Limits(running_per_user=2, running=3)
        async with open_supervisor(weighted(limits, {}, store, starts), grace=60) as supervisor:
            ada = [
                await supervisor.start(context(thread=f"t{n}"), "work", f"ada {n}")
                for n in range(6)
            ]
            assert [supervisor.position(run) for run in ada] == [0, 0, 1, 2, 3, 4]
            bob = [
                await supervisor.start(context(BOB, thread=f"t{n}"), "work", f"bob {n}")
                for n in range(2)
            ]
            assert [supervisor.position(run) for run in bob] == [0, 1]
        # What begins in the same instant says so in any order.
        assert sorted(starts) == [
            (0, "ada 0"),
            (0, "ada 1"),
            (0, "bob 0"),
            (1, "ada 2"),
            (1, "ada 3"),
            (1, "bob 1"),
            (2, "ada 4"),
            (2, "ada 5"),
        ]

    async def test_on_a_full_server_users_take_turns_by_their_weights(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        starts: list[tuple[float, str]] = []
        parts = weighted(Limits(running=1), {"carl": 2.0}, store, starts)
        async with open_supervisor(parts, grace=60) as supervisor:
            for number in range(4):
                for user in (ADA, BOB, "carl"):
                    mine = context(user, thread=f"t{number}")
                    await supervisor.start(mine, "work", f"{user} {number}")
        assert [words for _, words in starts] == [
            "ada 0",
            "bob 0",
            "carl 0",
            "carl 1",
            "ada 1",
            "bob 1",
            "carl 2",
            "carl 3",
            "ada 2",
            "bob 2",
            "ada 3",
            "bob 3",
        ]
        assert [when for when, _ in starts] == list(range(12))

    async def test_a_run_that_waited_for_a_place_says_so_after_its_start(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        starts: list[tuple[float, str]] = []
        parts = weighted(Limits(running_per_user=1), {}, store, starts)
        async with open_supervisor(parts, grace=60) as supervisor:
            for number in range(4):
                await supervisor.start(context(thread=f"t{number}"), "work", str(number))
        for number, expected in ((1, None), (3, {"waited_ms": 3000, "position": 3})):
            log = await log_of(store, thread=f"t{number}")
            told = [event["value"] for event in log[1:2] if event["type"] == "CUSTOM"]
            assert told == ([expected] if expected else []), number

    async def test_one_cancelled_while_it_waits_for_a_place_ends_at_once(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        async with open_supervisor(
            infrastructure(store=store, limits=Limits(running=1))
        ) as supervisor:
            await supervisor.start(context(BOB), "hang", "x")
            waiting = [
                await supervisor.start(context(thread=f"t{n}"), "hello", "x") for n in range(2)
            ]
            assert [supervisor.position(run) for run in waiting] == [1, 2]
            waiting[0].cancel()
            assert (await waiting[0].ended()).receipt.reason == "user"
            assert supervisor.position(waiting[1]) == 1
            with contextlib.suppress(RunError):
                await supervisor.cancel_thread(BOB, THREAD)
            assert (await waiting[1].ended()).status == "success"
        assert types_of(await log_of(store, thread="t0")) == ["RUN_STARTED", "RUN_FINISHED"]

    async def test_whoever_comes_while_all_wait_is_taken_until_the_queue_is_full(
        self, autojump_clock: MockClock, store: TroubledStore
    ) -> None:
        """The caps on live runs bound the queue; past them it is said how long to wait."""
        limits = Limits(running_per_user=1, runs_per_user=3)
        async with open_supervisor(infrastructure(store=store, limits=limits)) as supervisor:
            for number in range(3):
                await supervisor.start(context(thread=f"t{number}"), "hang", "x")
            await trio.sleep(12)
            with pytest.raises(LimitExceededError, match="this user already has 3 runs") as info:
                await supervisor.start(context(thread="t9"), "hang", "x")
            assert info.value.retry_after == 12.0, "as long as the one that executes has taken"
            assert (await supervisor.start(context(BOB), "hello", "x")).user_id == BOB


async def test_nothing_of_a_user_is_kept_by_the_supervisor_after_the_last_run(
    autojump_clock: MockClock,
) -> None:
    async with open_supervisor(infrastructure(store=MemoryStore())) as supervisor:
        for strategy in SUPERSEDING:
            runs = [
                await supervisor.start(context(), agent, "x", multitask_strategy=strategy)
                for agent in ("hang", "hello")
            ]
            for run in runs:
                await run.ended()
        assert not supervisor._admission._users
        assert not supervisor._admission._places
        assert not supervisor._runs
