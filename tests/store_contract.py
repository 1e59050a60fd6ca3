"""What every `Store` must do; a test class of each implementation inherits `StoreContract`.

The class that inherits gives a fixture called `store`, an empty store for each test:

    class TestMemoryStore(StoreContract):
        @pytest.fixture
        def store(self) -> Store:
            return MemoryStore()
"""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from creche import (
    AssistantMessage,
    Chunk,
    Commit,
    FunctionCall,
    IdKind,
    LogConflictError,
    Message,
    MessageId,
    NewThread,
    QuestionRecord,
    QuestionStatus,
    RunId,
    RunRecord,
    RunStatus,
    Spending,
    Store,
    StoredMessage,
    SystemMessage,
    ThreadId,
    ToolCall,
    ToolCallId,
    ToolMessage,
    UserId,
    UserMessage,
    events,
    open_journals,
)

ADA, BOB = UserId("ada"), UserId("bob")
T1, T2 = ThreadId("thread-1"), ThreadId("thread-2")
NOON = datetime(2026, 5, 17, 12, 0, 0, 123456, tzinfo=UTC)


def record(
    run: str = "run-a",
    status: RunStatus = "queued",
    *,
    user: UserId = ADA,
    thread: ThreadId = T1,
    minute: int = 0,
    **more: Any,
) -> RunRecord:
    return RunRecord(
        user_id=user,
        thread_id=thread,
        run_id=RunId(run),
        agent="chat",
        status=status,
        created_at=NOON + timedelta(minutes=minute),
        **more,
    )


def asked(
    question: str = "q-1",
    status: QuestionStatus = "open",
    *,
    user: UserId = ADA,
    thread: ThreadId = T1,
    **more: Any,
) -> QuestionRecord:
    return QuestionRecord(
        user_id=user,
        thread_id=thread,
        run_id=RunId("run-a"),
        question_id=question,
        agent="chat",
        reason="input_required",
        prompt="Zoë, well?",
        schema={"type": "object", "properties": {"b": {"const": None}, "a": {}}},
        asked_at=NOON,
        expires_at=NOON + timedelta(days=1),
        status=status,
        **more,
    )


def said(run: str, text: str, *, minute: int = 0, message: Message | None = None) -> StoredMessage:
    return StoredMessage(
        run_id=RunId(run),
        message=message or UserMessage(id=MessageId(f"m-{run}-{text}"), content=text),
        created_at=NOON + timedelta(minutes=minute),
    )


def chunk(first: int, last: int) -> Chunk:
    lines = [
        f'{{"type":"CUSTOM","name":"zoë","value":{seq},"seq":{seq}}}'
        for seq in range(first, last + 1)
    ]
    return Chunk(first_seq=first, last_seq=last, data="\n".join(lines).encode())


def commit(
    user: UserId = ADA,
    thread: ThreadId = T1,
    *,
    opens: str | None = "A title",
    **more: Any,
) -> Commit:
    return Commit(
        user_id=user,
        thread_id=thread,
        opens=None if opens is None else NewThread(title=opens, epoch="epoch-1"),
        **more,
    )


class StoreContract:
    """The tests; see the head of this module for how to run them over a store."""

    async def test_what_was_never_written_is_absent(self, store: Store) -> None:
        assert await store.thread(ADA, T1) is None
        assert await store.threads(ADA) == []
        assert await store.messages(ADA, T1) == []
        assert await store.runs(ADA, T1) == []
        assert await store.run(ADA, RunId("run-a")) is None
        assert await store.chunks(ADA, T1, after=0, limit=10) == []
        assert await store.search_messages(ADA, "word", limit=10) == []
        assert await store.open_questions(ADA, T1) == []
        assert await store.question(ADA, "q-1") is None
        assert await store.unfinished_runs() == []
        assert await store.delete_thread(ADA, T1) is False

    async def test_a_question_comes_back_as_it_was_asked(self, store: Store) -> None:
        whole = asked(
            "q-2",
            subagent_run_id="s-1",
            tool_call_id=ToolCallId("c-1"),
            tool_name="pay",
            arguments='{"amount":5}',
            digest="d" * 64,
        )
        assert {field.name for field in fields(whole) if getattr(whole, field.name) is None} == {
            "closed_at"
        }
        bare = asked()
        await store.commit([commit(new_runs=(record(),), questions=(bare, whole))])
        assert await store.open_questions(ADA, T1) == [bare, whole]
        assert await store.question(ADA, "q-1") == bare
        assert await store.question(ADA, "q-2") == whole
        assert await store.open_questions(ADA, T2) == []

    async def test_a_question_that_is_closed_is_open_no_more(self, store: Store) -> None:
        await store.commit([commit(questions=(asked(), asked("q-2")))])
        closed = asked(status="answered", closed_at=NOON + timedelta(minutes=1))
        await store.commit([commit(opens=None, questions=(closed,))])
        assert await store.open_questions(ADA, T1) == [asked("q-2")]
        assert await store.question(ADA, "q-1") == closed

    async def test_a_question_is_its_owners_alone_and_goes_with_its_thread(
        self, store: Store
    ) -> None:
        of_bob = asked(user=BOB)
        await store.commit(
            [
                commit(questions=(asked(),)),
                commit(user=BOB, questions=(of_bob, asked("q-9", user=BOB))),
            ]
        )
        assert await store.question(ADA, "q-9") is None
        assert await store.question(BOB, "q-1") == of_bob
        for question, user, is_anothers in (
            ("q-9", ADA, True),
            ("q-9", BOB, False),
            ("q-1", ADA, True),
            ("q-0", ADA, False),
        ):
            assert await store.is_anothers("question", question, user) is is_anothers
        assert await store.delete_thread(BOB, T1)
        assert await store.question(BOB, "q-1") is None
        assert await store.open_questions(BOB, T1) == []
        assert await store.open_questions(ADA, T1) == [asked()]

    async def test_a_commit_that_fails_asks_nothing(self, store: Store) -> None:
        await store.commit([commit(new_runs=(record(),))])
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever its medium raises
            await store.commit([commit(opens=None, questions=(asked(),), new_runs=(record(),))])
        assert await store.question(ADA, "q-1") is None

    async def test_a_commit_that_opens_makes_the_thread(self, store: Store) -> None:
        before = datetime.now(UTC) - timedelta(seconds=5)
        await store.commit([commit(runs=(record(),))])
        thread = await store.thread(ADA, T1)
        assert thread is not None
        assert (thread.user_id, thread.thread_id) == (ADA, T1)
        assert (thread.title, thread.epoch, thread.last_seq) == ("A title", "epoch-1", 0)
        assert before <= thread.created_at <= thread.updated_at
        assert thread.updated_at <= datetime.now(UTC) + timedelta(seconds=5)

    async def test_a_commit_to_an_absent_thread_is_refused_whole(self, store: Store) -> None:
        """One transaction: what stands beside the faulty commit is not written either."""
        good = commit(runs=(record(),), messages=(said("run-a", "hello"),), chunk=chunk(1, 2))
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever the medium raises
            await store.commit([good, commit(BOB, T2, opens=None, chunk=chunk(1, 1))])
        assert await store.thread(ADA, T1) is None
        assert await store.runs(ADA, T1) == []
        assert await store.messages(ADA, T1) == []
        assert await store.chunks(ADA, T1, after=0, limit=10) == []
        await store.commit([good])
        assert await store.runs(ADA, T1) == [record()]

    async def test_of_two_journals_of_one_thread_the_one_that_is_behind_is_told(
        self, store: Store
    ) -> None:
        """Its entries can never follow, so they are not tried for ever."""
        async with open_journals(store) as one, open_journals(store) as other:
            async with one.attached(ADA, T1) as ahead, other.attached(ADA, T1) as behind:
                await ahead.propose(NewThread(title="", epoch=ahead.epoch))
                ahead.append(events.Custom(name="ahead", value=1), barrier=True)
                await ahead.committed(1)
                behind.append(events.Custom(name="behind", value=1), barrier=True)
                with pytest.raises(LogConflictError, match="share `journals`"):
                    await behind.committed(1)
                async with other.attached(ADA, T1) as anew:
                    (entry,) = await anew.read(after=0)
                assert b"ahead" in entry.data

    async def test_opening_a_thread_that_is_there_keeps_its_epoch_and_title(
        self,
        store: Store,
    ) -> None:
        await store.commit([commit()])
        again = NewThread(title="Another title", epoch="epoch-9")
        await store.commit([Commit(user_id=ADA, thread_id=T1, opens=again, runs=(record(),))])
        thread = await store.thread(ADA, T1)
        assert thread is not None
        assert (thread.title, thread.epoch) == ("A title", "epoch-1")

    async def test_an_epoch_is_replaced_when_the_commit_says_so(self, store: Store) -> None:
        await store.commit([commit()])
        await store.commit([commit(opens=None, epoch="epoch-2")])
        thread = await store.thread(ADA, T1)
        assert thread is not None
        assert thread.epoch == "epoch-2"

    async def test_every_field_of_a_run_survives(self, store: Store) -> None:
        full = record(
            status="failed",
            started_at=NOON + timedelta(seconds=1),
            ended_at=NOON + timedelta(seconds=2),
            first_seq=3,
            last_seq=9,
            reason="model_failed",
            receipt={"reason": "model_failed", "tools_stopped": ["zoë"], "elapsed_ms": 0},
        )
        assert all(getattr(full, field.name) is not None for field in fields(full))
        bare = record("run-b", minute=1)
        await store.commit([commit(runs=(full, bare))])
        assert await store.run(ADA, RunId("run-a")) == full
        assert await store.runs(ADA, T1) == [full, bare]

    async def test_a_run_record_replaces_the_one_before_and_keeps_its_place(
        self,
        store: Store,
    ) -> None:
        await store.commit([commit(runs=(record("run-b"), record("run-a", minute=1)))])
        await store.commit([commit(opens=None, runs=(record("run-b", "running", first_seq=1),))])
        runs = await store.runs(ADA, T1)
        assert [(run.run_id, run.status) for run in runs] == [
            ("run-b", "running"),
            ("run-a", "queued"),
        ]

    async def test_a_new_run_whose_id_is_taken_fails_its_commit_whole(self, store: Store) -> None:
        """On any thread of that user; another user's run of that id is another thing."""
        await store.commit([commit(new_runs=(record(status="success"),))])
        await store.commit([commit(BOB, new_runs=(record(user=BOB),))])
        for thread in (T1, T2):
            taken = commit(
                thread=thread,
                new_runs=(record(thread=thread),),
                messages=(said("run-a", "again"),),
                chunk=chunk(1, 1),
            )
            with pytest.raises(Exception):  # noqa: B017, PT011  whatever the medium raises
                await store.commit([commit(BOB, T2, chunk=chunk(1, 1)), taken])
        assert await store.runs(ADA, T1) == [record(status="success")]
        assert await store.messages(ADA, T1) == []
        assert await store.thread(ADA, T2) is None
        assert await store.thread(BOB, T2) is None

    async def test_every_kind_of_message_survives(self, store: Store) -> None:
        call = ToolCall(
            id=ToolCallId("call-1"),
            function=FunctionCall(name="add", arguments='{"a": 1, "zoë": "\\n"}'),
        )
        messages: list[Message] = [
            SystemMessage(id=MessageId("m0"), content="Be brief."),
            UserMessage(
                id=MessageId("m1"), content="ünï\x7f \U0001f600 'q' \"q\" %_\\", name="Zoë"
            ),
            UserMessage(id=MessageId("m2"), content="", metadata={"a": [1, None, {"b": 2.5}]}),
            AssistantMessage(id=MessageId("m3"), tool_calls=(call,)),
            ToolMessage(id=MessageId("m4"), tool_call_id=call.id, content="3", error="no"),
            AssistantMessage(id=MessageId("m5"), content="It is 3."),
        ]
        stored = tuple(said("run-a", "", message=message) for message in messages)
        await store.commit([commit(runs=(record(),), messages=stored)])
        assert await store.messages(ADA, T1) == list(stored)

    async def test_messages_come_run_by_run_in_the_order_of_asking(self, store: Store) -> None:
        """The second run is asked while the first still answers."""
        await store.commit([commit(runs=(record("run-z"),), messages=(said("run-z", "one"),))])
        later = record("run-a", minute=1)
        asked = said("run-a", "two", minute=1)
        await store.commit([commit(opens=None, runs=(later,), messages=(asked,))])
        answers = (said("run-z", "answer one", minute=2), said("run-z", "more of it", minute=2))
        await store.commit([commit(opens=None, messages=answers)])
        await store.commit([commit(opens=None, messages=(said("run-a", "answer two", minute=3),))])
        texts = [item.message.content for item in await store.messages(ADA, T1)]
        assert texts == ["one", "answer one", "more of it", "two", "answer two"]

    async def test_messages_can_be_those_of_the_latest_runs_only(self, store: Store) -> None:
        for minute, run in enumerate(("run-c", "run-a", "run-b")):
            messages = (said(run, f"asked {run}"), said(run, f"answered {run}"))
            await store.commit([commit(runs=(record(run, minute=minute),), messages=messages)])
        for last_runs, runs in (
            (1, ["run-b"]),
            (2, ["run-a", "run-b"]),
            (3, ["run-c", "run-a", "run-b"]),
            (9, ["run-c", "run-a", "run-b"]),
            (None, ["run-c", "run-a", "run-b"]),
            (0, []),
        ):
            found = await store.messages(ADA, T1, last_runs=last_runs)
            expected = [f"{verb} {run}" for run in runs for verb in ("asked", "answered")]
            assert [item.message.content for item in found] == expected, last_runs

    async def test_what_a_run_that_is_rolled_back_said_is_no_part_of_the_thread(
        self, store: Store
    ) -> None:
        """Whenever it is said: before the commit that says so, in it, or after it."""
        for minute, run in enumerate(("run-a", "run-b", "run-c")):
            messages = (said(run, f"asked {run}"),)
            await store.commit([commit(new_runs=(record(run, minute=minute),), messages=messages)])
        before = await store.thread(ADA, T1)
        await store.commit(
            [
                commit(
                    opens=None,
                    new_runs=(record("run-d", minute=3), record("run-e", minute=4)),
                    messages=(said("run-d", "asked run-d"), said("run-e", "asked run-e")),
                    rolls_back=(RunId("run-b"), RunId("run-d"), RunId("run-absent")),
                    chunk=chunk(1, 2),
                )
            ]
        )
        ended = record("run-b", "cancelled", minute=1, first_seq=1, last_seq=2)
        last_words = (said("run-b", "answered run-b"), said("run-e", "answered run-e"))
        await store.commit([commit(opens=None, runs=(ended,), messages=last_words)])

        async def texts(last_runs: int | None = None) -> list[Any]:
            stored = await store.messages(ADA, T1, last_runs=last_runs)
            return [item.message.content for item in stored]

        left = ["asked run-a", "asked run-c", "asked run-e", "answered run-e"]
        assert await texts() == left
        assert await texts(1) == left[2:]
        assert await texts(2) == left[1:], "those that are gone do not count"
        assert await texts(3) == left
        for word, found in (("run-b", 0), ("run-d", 0), ("run-e", 2)):
            assert len(await store.search_messages(ADA, word, limit=9)) == found, word
        marks = {run.run_id: run.rolled_back for run in await store.runs(ADA, T1)}
        assert [run for run, mark in marks.items() if mark] == ["run-b", "run-d"]
        kept = await store.run(ADA, RunId("run-b"))
        assert kept is not None
        assert (kept.status, kept.last_seq, kept.rolled_back) == ("cancelled", 2, True)
        assert await store.chunks(ADA, T1, after=0, limit=9) == [chunk(1, 2)], "the log keeps all"
        after = await store.thread(ADA, T1)
        assert before is not None
        assert after is not None
        assert (before.runs, after.runs) == (3, 5)

    async def test_a_commit_that_fails_rolls_nothing_back(self, store: Store) -> None:
        for user in (ADA, BOB):
            await store.commit(
                [commit(user, new_runs=(record(user=user),), messages=(said("run-a", "word"),))]
            )
        taken = commit(opens=None, new_runs=(record(),), rolls_back=(RunId("run-a"),))
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever the medium raises
            await store.commit([taken])
        assert len(await store.messages(ADA, T1)) == 1
        await store.commit([commit(thread=T2, rolls_back=(RunId("run-a"),))])
        assert len(await store.messages(ADA, T1)) == 1, "it is on another thread"
        await store.commit([commit(opens=None, rolls_back=(RunId("run-a"),))])
        assert await store.messages(ADA, T1) == []
        assert len(await store.messages(BOB, T1)) == 1, "it is another user's of that id"

    async def test_the_log_is_read_from_the_chunk_that_holds_the_next_entry(
        self,
        store: Store,
    ) -> None:
        chunks = [chunk(1, 3), chunk(4, 4), chunk(5, 9)]
        for item in chunks:
            await store.commit([commit(chunk=item)])
        for after in range(12):
            rest = [item for item in chunks if item.last_seq > after]
            assert await store.chunks(ADA, T1, after=after, limit=10) == rest, after
            assert await store.chunks(ADA, T1, after=after, limit=1) == rest[:1], after
        thread = await store.thread(ADA, T1)
        assert thread is not None
        assert thread.last_seq == 9

    async def test_the_same_ids_of_two_users_are_different_things(self, store: Store) -> None:
        ours = commit(
            opens="Ada's",
            runs=(record(),),
            messages=(said("run-a", "ada word"),),
            chunk=chunk(1, 2),
        )
        theirs = commit(
            BOB,
            opens="Bob's",
            runs=(record(user=BOB, status="running"),),
            messages=(said("run-a", "bob word"),),
            chunk=chunk(1, 5),
        )
        await store.commit([ours, theirs])
        for user, title, last_seq, status, text in (
            (ADA, "Ada's", 2, "queued", "ada word"),
            (BOB, "Bob's", 5, "running", "bob word"),
        ):
            thread = await store.thread(user, T1)
            assert thread is not None
            assert (thread.title, thread.last_seq) == (title, last_seq)
            assert [found.title for found in await store.threads(user)] == [title]
            run = await store.run(user, RunId("run-a"))
            assert run is not None
            assert (run.user_id, run.status) == (user, status)
            assert [found.user_id for found in await store.runs(user, T1)] == [user]
            assert [item.message.content for item in await store.messages(user, T1)] == [text]
            found = await store.search_messages(user, "word", limit=10)
            assert [item.message.content for _, item in found] == [text]
            read = await store.chunks(user, T1, after=0, limit=10)
            assert [item.last_seq for item in read] == [last_seq]
        assert await store.delete_thread(BOB, T1) is True
        assert await store.thread(ADA, T1) is not None
        assert await store.messages(ADA, T1) == [said("run-a", "ada word")]
        assert len(await store.chunks(ADA, T1, after=0, limit=10)) == 1
        assert await store.run(ADA, RunId("run-a")) == record()

    async def test_what_is_anothers_is_absent(self, store: Store) -> None:
        await store.commit(
            [commit(runs=(record(),), messages=(said("run-a", "word"),), chunk=chunk(1, 2))],
        )
        assert await store.thread(BOB, T1) is None
        assert await store.threads(BOB) == []
        assert await store.messages(BOB, T1) == []
        assert await store.runs(BOB, T1) == []
        assert await store.run(BOB, RunId("run-a")) is None
        assert await store.chunks(BOB, T1, after=0, limit=10) == []
        assert await store.search_messages(BOB, "word", limit=10) == []
        assert await store.delete_thread(BOB, T1) is False
        assert await store.thread(ADA, T1) is not None

    async def test_threads_come_latest_changed_first(self, store: Store) -> None:
        names = [ThreadId(f"thread-{letter}") for letter in "abcd"]
        for name in names:
            await store.commit([commit(thread=name)])
        await store.commit([commit(thread=names[1], opens=None, chunk=chunk(1, 1))])
        found = [thread.thread_id for thread in await store.threads(ADA)]
        assert found == [names[1], names[3], names[2], names[0]]
        page = [thread.thread_id for thread in await store.threads(ADA, limit=2, offset=1)]
        assert page == [names[3], names[2]]
        assert await store.threads(ADA, offset=9) == []

    async def test_a_thread_tells_how_many_runs_it_has(self, store: Store) -> None:
        other = ThreadId("thread-b")
        await store.commit(
            [
                commit(runs=(record("run-a"), record("run-b", "success"))),
                commit(thread=other),
                commit(user=BOB, runs=(record("run-a", user=BOB),)),
            ],
        )
        counts = {thread.thread_id: thread.runs for thread in await store.threads(ADA)}
        assert counts == {T1: 2, other: 0}
        thread = await store.thread(ADA, T1)
        assert thread is not None
        assert thread.runs == 2

    async def test_a_deleted_thread_leaves_nothing_behind(self, store: Store) -> None:
        await store.commit(
            [commit(runs=(record(),), messages=(said("run-a", "word"),), chunk=chunk(1, 2))],
        )
        assert await store.delete_thread(ADA, T1) is True
        await self.test_what_was_never_written_is_absent(store)
        await store.commit([commit(opens="Anew", chunk=chunk(1, 1))])
        thread = await store.thread(ADA, T1)
        assert thread is not None
        assert (thread.title, thread.last_seq) == ("Anew", 1)
        assert await store.messages(ADA, T1) == []
        assert await store.chunks(ADA, T1, after=0, limit=10) == [chunk(1, 1)]

    async def test_a_search_wants_every_word_and_gives_the_newest_first(
        self,
        store: Store,
    ) -> None:
        messages = tuple(
            said("run-a", text, minute=minute)
            for minute, text in enumerate(
                ["The quick brown fox", "a quick note", "QUICK thinking, Fox", "nothing"],
            )
        )
        await store.commit([commit(runs=(record(),), messages=messages)])

        async def found(query: str, limit: int = 10) -> list[str | None]:
            pairs = await store.search_messages(ADA, query, limit=limit)
            assert all(thread == T1 for thread, _ in pairs)
            return [item.message.content for _, item in pairs]

        assert await found("quick") == [
            "QUICK thinking, Fox",
            "a quick note",
            "The quick brown fox",
        ]
        assert await found("fox  Quick") == ["QUICK thinking, Fox", "The quick brown fox"]
        assert await found("quick", limit=1) == ["QUICK thinking, Fox"]
        assert await found("quick nothing") == []

    @pytest.mark.parametrize(
        "query",
        ["", "   ", "%", "_", "'", '"', "\\", "*", "a AND", "NEAR(", "-x", "x:y", "'; --", "("],
    )
    async def test_a_search_takes_any_characters_as_they_are(
        self,
        store: Store,
        query: str,
    ) -> None:
        """None of these is in what was said, and none is an operator."""
        await store.commit([commit(runs=(record(),), messages=(said("run-a", "plain words"),))])
        assert await store.search_messages(ADA, query, limit=10) == []

    async def test_unfinished_runs_are_everybodys_whose_log_has_no_end(self, store: Store) -> None:
        statuses: list[RunStatus] = ["success", "cancelled", "failed", "lost"]
        ended = tuple(record(f"run-{status}", status, last_seq=7) for status in statuses)
        unended = (
            record("run-queued"),
            record("run-running", "running", first_seq=8),
            record("run-called-off", "cancelled"),  # decided, but not yet said
        )
        await store.commit(
            [
                commit(runs=(*ended, *unended)),
                commit(BOB, T2, runs=(record(user=BOB, thread=T2),)),
            ]
        )
        found = {(run.user_id, run.thread_id, run.run_id) for run in await store.unfinished_runs()}
        assert found == {
            (ADA, T1, "run-queued"),
            (ADA, T1, "run-running"),
            (ADA, T1, "run-called-off"),
            (BOB, T2, "run-a"),
        }

    async def test_says_of_an_id_only_whether_it_is_somebody_elses(self, store: Store) -> None:
        await store.commit([commit(runs=(record(),))])
        await store.commit([commit(BOB, T2, runs=(record("run-b", user=BOB, thread=T2),))])
        cases: list[tuple[IdKind, str, UserId, bool]] = [
            ("thread", T1, ADA, False),
            ("thread", T1, BOB, True),
            ("thread", T2, ADA, True),
            ("thread", T2, BOB, False),
            ("run", "run-a", ADA, False),
            ("run", "run-a", BOB, True),
            ("run", "run-b", ADA, True),
            ("thread", "run-a", BOB, False),  # of another kind
            ("run", T1, BOB, False),
            ("thread", "absent", ADA, False),
            ("run", "absent", ADA, False),
            ("thread", "", ADA, False),
            ("thread", "%", BOB, False),
        ]
        for kind, id_, user, expected in cases:
            assert await store.is_anothers(kind, id_, user) is expected, (kind, id_, user)
        await store.commit([commit(BOB, runs=(record(user=BOB),))])
        assert await store.is_anothers("thread", T1, ADA) is True  # both have one of that name
        assert await store.delete_thread(BOB, T1) is True
        assert await store.is_anothers("thread", T1, ADA) is False
        assert await store.is_anothers("run", "run-a", ADA) is False

    async def test_what_a_user_spends_adds_up_by_day_and_outlives_the_thread(
        self, store: Store
    ) -> None:
        today, tomorrow = NOON.date(), NOON.date() + timedelta(days=1)
        some = Spending(tokens=10, micro_usd=2**40, tool_calls=1)
        assert await store.spending(ADA, today) == Spending()
        await store.commit(
            [
                commit(spent=((today, some), (tomorrow, Spending(tokens=1)))),
                commit(thread=T2, spent=((today, some),)),
                commit(BOB, spent=((today, Spending(tool_calls=7)),)),
            ]
        )
        await store.commit([commit(opens=None, spent=((today, some),))])
        assert await store.spending(ADA, today) == some + some + some
        assert await store.spending(ADA, tomorrow) == Spending(tokens=1)
        assert await store.spending(BOB, today) == Spending(tool_calls=7)
        assert await store.delete_thread(ADA, T1) is True
        assert await store.spending(ADA, today) == some + some + some

    async def test_a_refused_commit_spends_nothing(self, store: Store) -> None:
        spent = ((NOON.date(), Spending(tokens=10)),)
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever the medium raises
            await store.commit(
                [commit(spent=spent), commit(BOB, T2, opens=None, chunk=chunk(1, 1))]
            )
        assert await store.spending(ADA, NOON.date()) == Spending()

    async def test_an_empty_group_of_commits_is_nothing(self, store: Store) -> None:
        await store.commit([])
        assert await store.threads(ADA) == []
