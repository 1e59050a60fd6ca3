"""A thread's messages in memory: the same as in the store, bounded, and read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from tests.small_world import ADA, THREAD, TroubledStore, context, infrastructure
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    Journal,
    Limits,
    MessageId,
    NewThread,
    RunContext,
    RunId,
    RunRecord,
    RunStatus,
    StoredMessage,
    UserMessage,
    events,
    open_journals,
    open_supervisor,
    text_of,
)
from creche._conversation import Conversation
from creche._store import now


def said(run: str, words: str) -> StoredMessage:
    message = UserMessage(id=MessageId(f"{run}-{words}"), content=words)
    return StoredMessage(run_id=RunId(run), message=message, created_at=now())


def words_of(messages: Sequence[StoredMessage]) -> list[str]:
    return [text_of(stored.message) for stored in messages]


def test_messages_come_run_by_run_in_the_order_of_asking() -> None:
    conversation = Conversation(most_runs=9)
    conversation.add([said("a", "1"), said("b", "3"), said("a", "2")])
    assert words_of(conversation.latest(9)) == ["1", "2", "3"]


@pytest.mark.parametrize(("runs", "words"), [(0, []), (1, ["3"]), (2, ["2", "3"]), (9, ["2", "3"])])
def test_only_the_latest_runs_are_kept_and_given(runs: int, words: list[str]) -> None:
    conversation = Conversation(most_runs=2)
    conversation.add([said("a", "1"), said("b", "2"), said("c", "3")])
    assert words_of(conversation.latest(runs)) == words


def test_its_size_is_that_of_what_is_kept() -> None:
    conversation = Conversation(most_runs=1)
    conversation.add([said("a", "x" * 1000)])
    assert conversation.size >= 1000
    conversation.add([said("b", "y")])
    assert conversation.size < 1000


def test_what_is_there_already_is_not_taken_twice() -> None:
    conversation = Conversation(most_runs=1)
    conversation.add([said("a", "1")])
    size = conversation.size
    conversation.add([said("a", "1")])
    assert (words_of(conversation.latest(1)), conversation.size) == (["1"], size)


class CountingStore(TroubledStore):
    """Notes when its messages are asked for."""

    asked = 0

    async def messages(self, *owner: Any, **more: Any) -> Any:
        self.asked += 1
        return await super().messages(*owner, **more)


async def recall(run: RunContext) -> list[str]:
    await run.emit.text(f"heard {text_of(run.messages[-1])}")
    return [text_of(message) for message in run.messages]


@pytest.mark.parametrize("limit", [0, 256 * 1024], ids=["forgotten at once", "kept"])
async def test_every_run_of_a_live_thread_is_given_what_the_store_has(
    autojump_clock: MockClock,
    limit: int,
) -> None:
    store = CountingStore()
    made = infrastructure(store=store, recall=recall, limits=Limits(conversation_bytes=limit))
    async with open_supervisor(made) as supervisor:
        async with supervisor.journals.attached(ADA, THREAD):
            expected: list[str] = []
            for number in range(5):
                run = await supervisor.start(context(), "recall", f"q{number}")
                outcome = await run.ended()
                expected += [f"q{number}"]
                assert outcome.result == expected
                expected += [f"heard q{number}"]
        # Gone with its last holder, and read once for the next.
        before = store.asked
        run = await supervisor.start(context(), "recall", "q5")
        assert (await run.ended()).result == [*expected, "q5"]
        assert store.asked == before + 1
    assert before == (0 if limit else 5)


async def test_a_question_that_is_committed_while_the_history_is_read_is_not_lost(
    autojump_clock: MockClock,
) -> None:
    """Two runs are asked for at once on a thread that is known to the store only."""
    go_on = trio.Event()

    class Slow(CountingStore):
        async def messages(self, *owner: Any, **more: Any) -> Any:
            found = await super().messages(*owner, **more)
            await go_on.wait()
            return found

    store = Slow()
    made = infrastructure(store=store, recall=recall)
    async with open_supervisor(made) as supervisor:
        await (await supervisor.start(context(), "recall", "q0")).ended()
    async with open_supervisor(made) as supervisor:
        first = await supervisor.start(context(), "recall", "q1")
        await wait_all_tasks_blocked()
        second = await supervisor.start(context(), "recall", "q2")
        go_on.set()
        assert (await first.ended()).result == ["q0", "heard q0", "q1"]
        assert (await second.ended()).result == ["q0", "heard q0", "q1", "heard q1", "q2"]
    assert store.asked == 1


# --- runs that are rolled back: what they said is in nobody's history, whenever it was said


def as_run(run: str, status: RunStatus = "queued", **more: Any) -> RunRecord:
    return RunRecord(
        user_id=ADA,
        thread_id=THREAD,
        run_id=RunId(run),
        agent="hello",
        status=status,
        created_at=now(),
        **more,
    )


async def ask_for(journal: Journal, run: str, **more: Any) -> None:
    """Commit a run as it is asked for."""
    opens = NewThread(title="t", epoch=journal.epoch)
    messages = (said(run, f"asked {run}"),)
    await journal.propose(opens, new_runs=(as_run(run),), messages=messages, **more)


def speak(journal: Journal, run: str, status: RunStatus) -> int:
    """Say that a run begins or, with its last words, that it ends."""
    begins = status == "running"
    return journal.append(
        events.Custom(name="x", value=status),
        barrier=True,
        runs=(as_run(run, status, first_seq=1, last_seq=None if begins else 2),),
        messages=() if begins else (said(run, f"answered {run}"),),
    ).seq


async def test_a_history_that_is_read_while_a_run_is_rolled_back_is_read_again(
    autojump_clock: MockClock,
) -> None:
    go_on = trio.Event()

    class Slow(CountingStore):
        async def messages(self, *owner: Any, **more: Any) -> Any:
            found = await super().messages(*owner, **more)
            await go_on.wait()
            return found

    store = Slow()
    async with open_journals(store) as journals:
        async with journals.attached(ADA, THREAD) as journal:
            await ask_for(journal, "a")
        heard: list[list[StoredMessage]] = []
        async with journals.attached(ADA, THREAD) as journal, trio.open_nursery() as nursery:

            async def read() -> None:
                heard.append(await journal.history(9))

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            await ask_for(journal, "b", rolls_back=(RunId("a"),))
            go_on.set()
        assert words_of(heard[0]) == ["asked b"]
        assert store.asked == 2


@pytest.mark.parametrize("begun", ["before", "in the same transaction"])
async def test_the_last_words_of_a_run_that_was_rolled_back_are_not_kept(
    autojump_clock: MockClock, begun: str
) -> None:
    store = TroubledStore()
    async with open_journals(store) as journals:
        async with journals.attached(ADA, THREAD) as journal:
            await ask_for(journal, "a")
            if begun == "before":
                await journal.committed(speak(journal, "a", "running"))
            else:
                speak(journal, "a", "running")
            await ask_for(journal, "b", rolls_back=(RunId("a"),))
            assert words_of(await journal.history(9)) == ["asked b"], "and it is kept now"
            await journal.committed(speak(journal, "a", "cancelled"))
            assert words_of(await journal.history(9)) == ["asked b"]
            await journal.committed(speak(journal, "b", "running"))
            await journal.committed(speak(journal, "b", "success"))
            assert words_of(await journal.history(9)) == ["asked b", "answered b"]
            assert not journal._rolled_back, "who has ended is forgotten"
        assert words_of(await store.messages(ADA, THREAD)) == ["asked b", "answered b"]
