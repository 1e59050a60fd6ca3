"""Questions to a person: the run parks, is answered, and goes on; whatever else may happen."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import math
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import msgspec
import pytest
import trio
from tests.agui_rules import StockClient, check_history
from tests.small_world import (
    ADA,
    BOB,
    THREAD,
    TroubledStore,
    context,
    infrastructure,
    log_of,
    terminals_of,
    types_of,
)
from trio.testing import MockClock

from creche import (
    AnswerRefusedError,
    CrecheError,
    ExecutionEngine,
    Infrastructure,
    Limits,
    MemoryStore,
    Message,
    ModelAgent,
    NoSuchQuestionError,
    QuestionClosedError,
    QuestionDeclinedError,
    QuestionRecord,
    Run,
    RunContext,
    RunError,
    RunId,
    Step,
    Store,
    StoreUnavailableError,
    Supervisor,
    ThreadId,
    UserId,
    end_lost_runs,
    events,
    open_supervisor,
    role_of,
    text_of,
    tool,
)
from creche._answer_schema import AnswerForm
from creche._approval import digest_of
from creche.testing import ScriptedModel, open_pacer


class Colour(msgspec.Struct, forbid_unknown_fields=True):
    name: Literal["red", "blue"]
    shade: int = 5


async def question_on(
    supervisor: Supervisor, user: str = ADA, thread: str = THREAD
) -> QuestionRecord:
    """The question that is, or will be, open there; once it can be seen."""
    while True:
        for run in supervisor.runs(UserId(user), ThreadId(thread)):
            asking = run._life.questions
            if asking is not None and asking.open is not None:
                stored = await supervisor.journals.store.open_questions(
                    UserId(user), ThreadId(thread)
                )
                if any(each.question_id == asking.open.question_id for each in stored):
                    return asking.open
        await trio.sleep(0.01)


async def answer(
    supervisor: Supervisor, question: QuestionRecord, response: Any = None, **more: Any
) -> Run | None:
    return await supervisor.answer(
        question.user_id, question.thread_id, question.question_id, response, **more
    )


def check_log(log: Sequence[dict[str, Any]]) -> None:
    """A stock client takes all of it, and at its end nothing is left open or unanswered."""
    client = StockClient()
    for event in log:
        if event["type"] == "RUN_STARTED" and "parentRunId" not in event:
            client = StockClient()
        client.take(event)
    assert client.is_tidy or client.state == "failed", client.open


def interrupts_of(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    outcomes = [event.get("outcome", {}) for event in log if event["type"] == "RUN_FINISHED"]
    return [each for outcome in outcomes for each in outcome.get("interrupts", ())]


async def history_of(store: Store, thread: str = THREAD) -> list[Message]:
    return [stored.message for stored in await store.messages(ADA, ThreadId(thread))]


async def asks_a_colour(run: RunContext) -> str:
    await run.emit.text("One moment.")
    colour = await run.ask(Colour, "Which colour?")
    await run.emit.text(f"You said {colour.name} {colour.shade}.")
    return colour.name


async def asks_for_words(run: RunContext) -> str:
    return await run.ask(None, "What is your name?")


@contextlib.asynccontextmanager
async def parked(
    made: Infrastructure, agent: str = "asks", **ids: str
) -> AsyncIterator[tuple[Supervisor, Run, QuestionRecord]]:
    """A run that waits for an answer."""
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(**ids), agent, "Begin.")
        yield supervisor, run, await question_on(supervisor)


class TestAnAnswer:
    async def test_it_parks_the_run_and_goes_on_with_the_answer(
        self, autojump_clock: MockClock
    ) -> None:
        made = infrastructure(asks=asks_a_colour)
        async with parked(made) as (supervisor, run, question):
            assert run.status == "parked"
            stored = await made.store.run(ADA, run.run_id)
            assert stored is not None
            assert stored.status == "parked"
            assert await made.store.open_questions(ADA, THREAD) == [question]
            answered = await answer(supervisor, question, {"name": "red"}, run_id=RunId("r-2"))
            assert answered == run
            assert await made.store.open_questions(ADA, THREAD) == []
            outcome = await run.ended()
            assert (outcome.status, outcome.result) == ("success", "red")
        log = await log_of(made.store)
        assert types_of(log) == [
            "RUN_STARTED",
            "TEXT_MESSAGE_START",
            "TEXT_MESSAGE_CONTENT",
            "TEXT_MESSAGE_END",
            "RUN_FINISHED",
            "RUN_STARTED",
            "TEXT_MESSAGE_START",
            "TEXT_MESSAGE_CONTENT",
            "TEXT_MESSAGE_END",
            "RUN_FINISHED",
        ]
        check_log(log)
        (interrupt,) = interrupts_of(log)
        assert interrupt["id"] == question.question_id
        assert (interrupt["reason"], interrupt["message"]) == ("input_required", "Which colour?")
        assert interrupt["responseSchema"]["properties"]["name"] == {"enum": ["blue", "red"]}
        assert "expiresAt" in interrupt
        goes_on = log[5]
        assert (goes_on["runId"], goes_on["parentRunId"]) == ("r-2", run.run_id)
        assert goes_on["input"]["resume"] == [
            {
                "interruptId": question.question_id,
                "status": "resolved",
                "payload": {"name": "red"},
            }
        ]
        (terminal,) = terminals_of(log)
        assert terminal["runId"] == "r-2"
        assert terminal["metadata"]["creche"]["receipt"]["reason"] == "success"
        record = await made.store.question(ADA, question.question_id)
        assert record is not None
        assert record.status == "answered"
        (stored,) = await made.store.runs(ADA, THREAD)
        assert (stored.status, stored.first_seq, stored.last_seq) == ("success", 1, 10)
        check_history(await history_of(made.store))

    @pytest.mark.parametrize(
        ("schema", "response", "expected"),
        [
            (None, "Ada", "Ada"),
            (int, 7, 7),
            (bool, True, True),
            (list[int], [1, 2], [1, 2]),
            (int | None, None, None),
            (Colour, {"name": "blue", "shade": 1}, Colour("blue", 1)),
            ({"type": "object", "properties": {"a": {"type": "string"}}}, {"a": "b"}, {"a": "b"}),
            ({"enum": ["x", "y"]}, "y", "y"),
        ],
        ids=str,
    )
    async def test_it_comes_as_what_was_asked_for(
        self, schema: Any, response: Any, expected: Any, autojump_clock: MockClock
    ) -> None:
        got: list[Any] = []

        async def asks(run: RunContext) -> None:
            got.append(await run.ask(schema, "Well?"))

        async with parked(infrastructure(asks=asks)) as (supervisor, run, question):
            await answer(supervisor, question, response)
            assert (await run.ended()).status == "success"
        assert got == [expected]

    async def test_one_that_does_not_fit_is_refused_and_the_question_stays_open(
        self, autojump_clock: MockClock
    ) -> None:
        made = infrastructure(asks=asks_a_colour)
        async with parked(made) as (supervisor, run, question):
            for wrong in ({"name": "green"}, {"name": "red", "extra": 1}, "red", None, {}):
                with pytest.raises(AnswerRefusedError, match="does not fit"):
                    await answer(supervisor, question, wrong)
            assert run.status == "parked"
            assert await made.store.open_questions(ADA, THREAD) == [question]
            await answer(supervisor, question, {"name": "red"})
            assert (await run.ended()).result == "red"

    async def test_a_second_answer_gets_a_clear_error(self, autojump_clock: MockClock) -> None:
        made = infrastructure(asks=asks_for_words)
        async with parked(made) as (supervisor, run, question):
            outcomes: list[str] = []

            async def reply(words: str) -> None:
                try:
                    await answer(supervisor, question, words)
                    outcomes.append("taken")
                except QuestionClosedError as error:
                    outcomes.append(str(error))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reply, "Ada")
                nursery.start_soon(reply, "Eve")
            await run.ended()
            await reply("Bob")
            assert outcomes.count("taken") == 1
            assert outcomes[-1] == "the question has been answered"

    async def test_anothers_question_does_not_exist(self, autojump_clock: MockClock) -> None:
        async with parked(infrastructure(asks=asks_for_words)) as (supervisor, run, question):
            words = set[str]()
            for user, thread, wanted in (
                (BOB, THREAD, question.question_id),
                (ADA, ThreadId("another"), question.question_id),
                (ADA, THREAD, "no-such"),
            ):
                with pytest.raises(NoSuchQuestionError) as caught:
                    await supervisor.answer(user, thread, wanted, "Eve")
                words.add(str(caught.value))
            assert len(words) == 1
            assert run.status == "parked"
            store = supervisor.journals.store
            assert await store.is_anothers("question", question.question_id, BOB)
            assert not await store.is_anothers("question", question.question_id, ADA)

    async def test_a_run_id_that_is_taken_is_refused(self, autojump_clock: MockClock) -> None:
        async with parked(infrastructure(asks=asks_for_words)) as (supervisor, run, question):
            with pytest.raises(CrecheError, match="has been"):
                await answer(supervisor, question, "Ada", run_id=run.run_id)
            assert run.status == "parked"

    async def test_secrets_in_it_are_not_shown(self, autojump_clock: MockClock) -> None:
        async def asks(run: RunContext) -> Any:
            return (await run.ask({"type": "object"}, "Log in."))["password"] == "hunter2"

        made = infrastructure(asks=asks)
        async with parked(made) as (supervisor, run, question):
            await answer(supervisor, question, {"password": "hunter2"})
            assert (await run.ended()).result is True
        assert "hunter2" not in str(await log_of(made.store))

    async def test_a_segments_id_finds_and_cancels_the_run(self, autojump_clock: MockClock) -> None:
        async def asks(run: RunContext) -> None:
            await run.ask(None, "Well?")
            await trio.sleep_forever()

        made = infrastructure(asks=asks)
        async with parked(made) as (supervisor, run, question):
            await answer(supervisor, question, "yes", run_id=RunId("r-2"))
            assert supervisor.find(ADA, RunId("r-2")) == run
            assert supervisor.find(BOB, RunId("r-2")) is None
            found = supervisor.find(ADA, RunId("r-2"))
            assert found is not None
            found.cancel()
            assert (await run.ended()).receipt.reason == "user"
        check_log(await log_of(made.store))


class TestWithoutAnAnswer:
    async def test_who_declines_makes_the_asking_raise(self, autojump_clock: MockClock) -> None:
        async def asks(run: RunContext) -> str:
            try:
                return await run.ask(None, "Well?")
            except QuestionDeclinedError as error:
                return error.code

        made = infrastructure(asks=asks)
        async with parked(made) as (supervisor, run, question):
            await answer(supervisor, question, declined=True)
            assert (await run.ended()).result == "declined"
            with pytest.raises(QuestionClosedError):
                await answer(supervisor, question, "after all")
        log = await log_of(made.store)
        check_log(log)
        assert log[2]["input"]["resume"] == [
            {"interruptId": question.question_id, "status": "cancelled"}
        ]
        record = await made.store.question(ADA, question.question_id)
        assert record is not None
        assert record.status == "declined"

    async def test_unanswered_past_its_time_the_run_ends_with_that_reason(
        self, autojump_clock: MockClock
    ) -> None:
        made = infrastructure(
            asks=asks_for_words, limits=Limits(answer_timeout=5000, run_timeout=10)
        )
        async with parked(made) as (_, run, question):
            begun = trio.current_time()
            outcome = await run.ended()
            assert trio.current_time() - begun == pytest.approx(5000, abs=1)
            assert (outcome.status, outcome.receipt.reason) == ("cancelled", "unanswered")
            assert outcome.receipt.overran is False
        log = await log_of(made.store)
        check_log(log)
        assert terminals_of(log)[0]["outcome"] == {"type": "cancelled"}
        record = await made.store.question(ADA, question.question_id)
        assert record is not None
        assert record.status == "unanswered"

    async def test_in_cleanup_it_raises_what_is_the_matter(self, autojump_clock: MockClock) -> None:
        said: list[str] = []

        async def asks(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    try:
                        await run.ask(None, "Shall I clean up?")
                    except RunError as error:
                        said.append(error.code)

        async with open_supervisor(infrastructure(asks=asks)) as supervisor:
            run = await supervisor.start(context(), "asks", "x")
            await trio.sleep(1)
            run.cancel()
            await run.ended()
        assert said == ["run_ending"]

    @pytest.mark.parametrize("how", ["user", "superseded", "scope"])
    async def test_a_cancel_takes_the_question_back(
        self, how: str, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> str:
            with trio.move_on_after(50 if how == "scope" else math.inf):
                await run.ask(None, "Well?")
            await run.emit.text("Never mind.")
            return "on"

        made = infrastructure(asks=asks)
        async with parked(made) as (supervisor, run, question):
            if how == "scope":
                assert (await run.ended()).result == "on"
            else:
                run.cancel(how)  # type: ignore[arg-type]
                assert (await run.ended()).receipt.reason == how
            with pytest.raises(QuestionClosedError, match="nobody waits"):
                await answer(supervisor, question, "late")
        log = await log_of(made.store)
        check_log(log)
        record = await made.store.question(ADA, question.question_id)
        assert record is not None
        assert record.status == "withdrawn"
        check_history(await history_of(made.store))

    async def test_a_deleted_thread_takes_its_questions_along(
        self, autojump_clock: MockClock
    ) -> None:
        made = infrastructure(asks=asks_for_words)
        async with parked(made) as (supervisor, run, question):
            assert await supervisor.delete_thread(ADA, THREAD)
            assert run.status == "cancelled"
            assert await made.store.question(ADA, question.question_id) is None
            with pytest.raises(NoSuchQuestionError):
                await answer(supervisor, question, "late")

    @pytest.mark.parametrize(
        ("schema", "prompt"),
        [
            ({"type": "any"}, "Well?"),
            ({"if": {}}, "Well?"),
            ({"pattern": "("}, "Well?"),
            ({"$ref": "http://x"}, "Well?"),
            (object(), "Well?"),
            (None, "  "),
        ],
    )
    async def test_what_cannot_be_asked_is_refused_before_anybody_is(
        self, schema: Any, prompt: str, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> None:
            with pytest.raises((ValueError, TypeError)):
                await run.ask(schema, prompt)

        made = infrastructure(asks=asks)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "asks", "x")
            assert (await run.ended()).status == "success"
        assert interrupts_of(await log_of(made.store)) == []


class TestAShutdown:
    async def park_and_shut_down(
        self, made: Infrastructure, grace: float = 0.0
    ) -> tuple[Run, QuestionRecord]:
        async with open_supervisor(made, grace=grace) as supervisor:
            run = await supervisor.start(context(), "asks", "Begin.")
            question = await question_on(supervisor)
        return run, question

    async def test_it_ends_the_run_and_keeps_the_question(self, autojump_clock: MockClock) -> None:
        made = infrastructure(asks=asks_a_colour)
        begun = trio.current_time()
        run, question = await self.park_and_shut_down(made, grace=100)
        assert trio.current_time() - begun < 10  # nobody waits for a person
        assert run.outcome is not None
        assert run.outcome.receipt.reason == "shutdown"
        assert await made.store.open_questions(ADA, THREAD) == [question]
        check_log(await log_of(made.store))

    async def test_the_answer_then_starts_a_run_that_is_told_of_it(
        self, autojump_clock: MockClock
    ) -> None:
        heard: list[list[tuple[str, str]]] = []

        async def asks(run: RunContext) -> None:
            heard.append([(role_of(message), text_of(message)) for message in run.messages])
            if len(heard) == 1:
                await run.ask(Colour, "Which colour?")

        made = infrastructure(asks=asks)
        run, question = await self.park_and_shut_down(made)
        async with open_supervisor(made) as supervisor:
            with pytest.raises(AnswerRefusedError):
                await answer(supervisor, question, {"name": "green"})
            other = await answer(supervisor, question, {"name": "red"}, run_id=RunId("r-2"))
            assert other is not None
            assert (other.run_id, other.agent) == ("r-2", "asks")
            assert other != run
            assert (await other.ended()).status == "success"
            with pytest.raises(QuestionClosedError, match="has been answered"):
                await answer(supervisor, question, {"name": "red"})
        assert heard[1][-2:] == [("assistant", "Which colour?"), ("user", '{"name":"red"}')]
        assert await made.store.open_questions(ADA, THREAD) == []
        check_history(await history_of(made.store))
        check_log(await log_of(made.store))

    async def test_two_late_answers_start_one_run(self, autojump_clock: MockClock) -> None:
        made = infrastructure(asks=asks_for_words)
        _, question = await self.park_and_shut_down(made)
        taken: list[Run | None] = []
        refused: list[str] = []
        async with open_supervisor(made) as supervisor:

            async def reply(words: str) -> None:
                try:
                    taken.append(await answer(supervisor, question, words))
                except QuestionClosedError as error:
                    refused.append(str(error))

            async with trio.open_nursery() as nursery:
                for words in ("a", "b", "c"):
                    nursery.start_soon(reply, words)
            assert (len(taken), len(refused)) == (1, 2)
            assert len(await made.store.runs(ADA, THREAD)) == 2

    async def test_declined_late_it_is_closed_and_starts_nothing(
        self, autojump_clock: MockClock
    ) -> None:
        made = infrastructure(asks=asks_for_words)
        _, question = await self.park_and_shut_down(made)
        async with open_supervisor(made) as supervisor:
            assert await answer(supervisor, question, declined=True) is None
            assert await made.store.open_questions(ADA, THREAD) == []
        assert len(await made.store.runs(ADA, THREAD)) == 1

    async def test_an_answer_past_its_time_is_refused(self, autojump_clock: MockClock) -> None:
        made = infrastructure(asks=asks_for_words)
        _, question = await self.park_and_shut_down(made)
        store = made.store
        assert isinstance(store, MemoryStore)
        thread = store._threads[ADA, THREAD]
        thread.questions[question.question_id] = dataclasses.replace(
            question, expires_at=question.asked_at - timedelta(seconds=1)
        )
        async with open_supervisor(made) as supervisor:
            with pytest.raises(QuestionClosedError, match="sooner"):
                await answer(supervisor, question, "late")
        assert len(await store.runs(ADA, THREAD)) == 1

    async def test_a_store_that_refuses_the_new_run_leaves_the_question_open(
        self, autojump_clock: MockClock
    ) -> None:
        store = TroubledStore()
        made = infrastructure(asks=asks_for_words, store=store)
        _, question = await self.park_and_shut_down(made)
        async with open_supervisor(made) as supervisor:
            store.refuses = lambda commit: bool(commit.new_runs)
            with pytest.raises(StoreUnavailableError):
                await answer(supervisor, question, "Ada")
            store.refuses = lambda commit: False
            assert await store.open_questions(ADA, THREAD) == [question]
            assert await answer(supervisor, question, "Ada") is not None

    async def test_a_lost_run_keeps_its_question(self, autojump_clock: MockClock) -> None:
        """The process dies: what the store has of a parked run is all that there is."""

        async def asks(run: RunContext) -> None:
            with run.emit.step("look"):
                await run.spawn("helper", "Go.")

        made = infrastructure(asks=asks, helper=asks_for_words)
        left = MemoryStore()
        async with parked(made) as (_, run, question):
            assert isinstance(made.store, MemoryStore)
            left._threads = copy.deepcopy(made.store._threads)
        assert await end_lost_runs(left) == 1
        log = await log_of(left)
        check_log(log)
        assert types_of(log)[-3:] == ["SUBAGENT_STARTED", "SUBAGENT_ERROR", "RUN_ERROR"]
        assert await left.open_questions(ADA, THREAD) == [question]
        again = infrastructure(asks=asks_for_words, store=left)
        async with open_supervisor(again) as supervisor:
            other = await answer(supervisor, question, "Ada")
            assert other is not None
            assert other.run_id != run.run_id

    async def test_an_engine_that_is_cancelled_from_outside_keeps_it_too(
        self, autojump_clock: MockClock
    ) -> None:
        made = infrastructure(asks=asks_for_words)
        with trio.move_on_after(5):
            async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
                await engine.execute_agent("asks", "Begin.")
        (question,) = await made.store.open_questions(ADA, THREAD)
        assert question.prompt == "What is your name?"
        log = await log_of(made.store)
        check_log(log)
        assert terminals_of(log)[0]["metadata"]["creche"]["receipt"]["reason"] == "shutdown"


class TestWhileItIsParked:
    async def test_no_time_of_the_run_passes(self, autojump_clock: MockClock) -> None:
        async def asks(run: RunContext) -> str:
            await trio.sleep(6)
            words = await run.ask(None, "Well?")
            await trio.sleep(3)
            return words

        made = infrastructure(asks=asks, limits=Limits(run_timeout=10))
        async with parked(made) as (supervisor, run, question):
            await trio.sleep(1000)
            await answer(supervisor, question, "yes")
            assert (await run.ended()).result == "yes"

    async def test_what_is_left_of_its_time_still_counts(self, autojump_clock: MockClock) -> None:
        async def asks(run: RunContext) -> None:
            await trio.sleep(6)
            await run.ask(None, "Well?")
            await trio.sleep(100)

        made = infrastructure(asks=asks, limits=Limits(run_timeout=10))
        async with parked(made) as (supervisor, run, question):
            await trio.sleep(1000)
            begun = trio.current_time()
            await answer(supervisor, question, "yes")
            outcome = await run.ended()
            assert outcome.receipt.reason == "deadline"
            assert trio.current_time() - begun == pytest.approx(4, abs=0.2)

    async def test_a_model_call_around_it_has_its_time_too(self, autojump_clock: MockClock) -> None:
        async def asks(run: RunContext) -> str:
            async with run.model().open_stream(run.messages, ()) as stream:
                async for _ in stream:
                    return await run.ask(None, "Well?")
            return ""

        async with open_pacer() as pacer:
            made = infrastructure(
                asks=asks, models={"default": ScriptedModel(pacer)}, limits=Limits(turn_timeout=10)
            )
            async with parked(made) as (supervisor, run, question):
                await trio.sleep(1000)
                await answer(supervisor, question, "yes")
                assert (await run.ended()).result == "yes"

    async def test_others_that_want_to_speak_wait(self, autojump_clock: MockClock) -> None:
        async def asks(run: RunContext) -> None:
            async def talks() -> None:
                await run.emit.text("a")
                await trio.sleep(10)
                await run.emit.text("b")
                await run.emit.end_text()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(talks)
                await trio.sleep(1)
                await run.questions.ask(AnswerForm(None), "Well?", subagent=None)

        made = infrastructure(asks=asks)
        async with parked(made) as (supervisor, run, question):
            await trio.sleep(1000)
            assert types_of(await log_of(made.store))[-2:] == ["TEXT_MESSAGE_END", "RUN_FINISHED"]
            await answer(supervisor, question, "yes")
            await run.ended()
        log = await log_of(made.store)
        check_log(log)
        assert types_of(log)[5:] == [
            "RUN_STARTED",
            "TEXT_MESSAGE_START",
            "TEXT_MESSAGE_CONTENT",
            "TEXT_MESSAGE_END",
            "RUN_FINISHED",
        ]
        (said,) = [each for each in await history_of(made.store) if role_of(each) == "assistant"]
        assert text_of(said) == "ab"

    async def test_two_that_ask_at_once_are_asked_one_after_the_other(
        self, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> list[str]:
            got: list[str] = []

            async def ask(prompt: str) -> None:
                got.append(f"{prompt} {await run.ask(None, prompt)}")

            async with trio.open_nursery() as nursery:
                for prompt in ("A?", "B?", "C?"):
                    nursery.start_soon(ask, prompt)
            return sorted(got)

        made = infrastructure(asks=asks)
        async with parked(made) as (supervisor, run, question):
            open_now = question
            for _ in range(3):
                await answer(supervisor, open_now, open_now.prompt.lower())
                if run.status != "success":
                    await trio.sleep(1)
                    if run.outcome is None:
                        open_now = await question_on(supervisor)
            assert (await run.ended()).result == ["A? a?", "B? b?", "C? c?"]
        log = await log_of(made.store)
        check_log(log)
        assert len(interrupts_of(log)) == 3
        starts = [event for event in log if event["type"] == "RUN_STARTED"]
        assert [event.get("parentRunId") for event in starts] == [None, *[run.run_id] * 3]
        assert len({event["runId"] for event in starts}) == 4

    async def test_steps_that_begin_and_end_meanwhile_are_told_after_it(
        self, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> None:
            async def works() -> None:
                with run.emit.step("a"):
                    await trio.sleep(10)
                with run.emit.step("b"), run.emit.step("b"):
                    await trio.sleep(10)
                with run.emit.step("c"):
                    await trio.sleep_forever()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(works)
                await trio.sleep(1)
                await run.ask(None, "Well?")
                nursery.cancel_scope.cancel()

        made = infrastructure(asks=asks)
        async with parked(made) as (supervisor, run, question):
            await trio.sleep(1000)
            await answer(supervisor, question, "yes")
            await run.ended()
        log = await log_of(made.store)
        check_log(log)
        steps = [(event["type"][5], event["stepName"]) for event in log if "stepName" in event]
        assert steps == [
            ("S", "a"),
            ("F", "a"),
            ("S", "a"),
            ("F", "a"),
            ("S", "b"),
            ("S", "b (2)"),
            ("F", "b (2)"),
            ("F", "b"),
            ("S", "c"),
            ("F", "c"),
        ]

    async def test_a_result_that_comes_meanwhile_is_never_lost(
        self, autojump_clock: MockClock
    ) -> None:
        @tool
        async def slow() -> str:
            """Slow."""
            await trio.sleep(10)
            return "slowly done"

        async def asks(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.call_tool, "slow", {})
                await trio.sleep(1)
                await run.ask(None, "Well?")

        made = infrastructure(asks=asks, tools=[slow])
        async with parked(made) as (_, run, _):
            await trio.sleep(100)
            run.cancel()
            await run.ended()
        log = await log_of(made.store)
        check_log(log)
        (result,) = [event for event in log if event["type"] == "TOOL_CALL_RESULT"]
        assert result["content"] == "slowly done"

    async def test_a_reader_that_comes_back_resumes_at_every_place(
        self, autojump_clock: MockClock
    ) -> None:
        made = infrastructure(asks=asks_a_colour)
        async with parked(made) as (supervisor, run, question):
            before = [msgspec.json.encode(event) for event in await log_of(made.store)]

            async def read(after: int, until: int) -> list[bytes]:
                found: list[bytes] = []
                async with supervisor.journals.attached(ADA, THREAD) as journal:
                    while len(found) < until - after:
                        entries = await journal.read(after=after + len(found))
                        found.extend(entry.data for entry in entries)
                return [msgspec.json.encode(msgspec.json.decode(data)) for data in found]

            for cut in range(len(before)):
                assert await read(cut, len(before)) == before[cut:]
            waiting: list[list[bytes]] = []

            async def wait_for_the_rest() -> None:
                waiting.append(await read(len(before), len(before) + 5))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for_the_rest)
                await trio.testing.wait_all_tasks_blocked()
                await answer(supervisor, question, {"name": "red"})
            await run.ended()
            whole = [msgspec.json.encode(event) for event in await log_of(made.store)]
            assert waiting == [whole[len(before) :]]
            for cut in range(len(whole)):
                assert await read(cut, len(whole)) == whole[cut:]

    async def test_it_is_told_as_an_activity(self, autojump_clock: MockClock) -> None:
        async with parked(infrastructure(asks=asks_for_words)) as (supervisor, run, question):
            (activity,) = run._life.activities.now("question")
            assert activity.name == "input_required"
            await answer(supervisor, question, "Ada")
            assert run._life.activities.now("question") == ()

    async def test_a_run_that_is_asked_for_meanwhile_waits_its_turn(
        self, autojump_clock: MockClock
    ) -> None:
        made = infrastructure(asks=asks_for_words)
        async with parked(made) as (supervisor, run, question):
            second = await supervisor.start(context(), "hello", "And?")
            await trio.sleep(10)
            assert (run.status, second.status) == ("parked", "queued")
            await answer(supervisor, question, "Ada")
            assert (await second.ended()).status == "success"
            assert (await run.ended()).status == "success"
        check_log(await log_of(made.store))


class TestSubagents:
    async def test_one_that_asks_is_suspended_and_started_again(
        self, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> Any:
            (result,) = await run.sequence([Step(agent="helper", input="Go.")])
            return result.result

        async def helper(run: RunContext) -> Any:
            await run.emit.text("Let me see.")
            return (await run.spawn("below", "Go.")).result

        made = infrastructure(asks=asks, helper=helper, below=asks_for_words)
        async with parked(made) as (supervisor, run, question):
            await answer(supervisor, question, "Ada")
            assert (await run.ended()).result == "Ada"
        log = await log_of(made.store)
        check_log(log)
        (interrupt,) = interrupts_of(log)
        told = [event for event in log if event["type"].startswith("SUBAGENT")]
        first, second = told[0]["subagentRunId"], told[1]["subagentRunId"]
        assert interrupt["subagentRunId"] == second
        kinds = [
            (
                event["type"].removeprefix("SUBAGENT_"),
                event["subagentRunId"],
                event.get("outcome", {}).get("interruptIds"),
            )
            for event in told
        ]
        asked = [interrupt["id"]]
        assert kinds == [
            ("STARTED", first, None),
            ("STARTED", second, None),
            ("FINISHED", second, asked),
            ("FINISHED", first, asked),
            ("STARTED", first, None),
            ("STARTED", second, None),
            ("FINISHED", second, None),
            ("FINISHED", first, None),
        ]
        steps = [event["type"] for event in log if event["type"].startswith("STEP")]
        assert steps == ["STEP_STARTED", "STEP_FINISHED"] * 2

    async def test_one_that_ends_meanwhile_is_told_to_have_ended_after_it(
        self, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> Any:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.spawn, "helper", "Go.")
                nursery.start_soon(run.spawn, "fails", "Go.")
                await trio.sleep(1)
                words = await run.ask(None, "Well?")
                nursery.start_soon(run.spawn, "hello", "Go.")
            return words

        async def helper(run: RunContext) -> str:
            await trio.sleep(10)
            return "done"

        async def fails(run: RunContext) -> str:
            await trio.sleep(20)
            raise OSError

        made = infrastructure(asks=asks, helper=helper, fails=fails)
        async with parked(made) as (supervisor, run, question):
            await trio.sleep(100)
            await answer(supervisor, question, "Ada")
            assert (await run.ended()).result == "Ada"
        log = await log_of(made.store)
        check_log(log)
        told = [event["type"] for event in log if event["type"].startswith("SUBAGENT")]
        assert told[:2] == ["SUBAGENT_STARTED"] * 2
        assert told[2:4] == ["SUBAGENT_FINISHED"] * 2
        assert sorted(told[4:8]) == [
            "SUBAGENT_ERROR",
            "SUBAGENT_FINISHED",
            "SUBAGENT_STARTED",
            "SUBAGENT_STARTED",
        ]

    async def test_one_that_is_wanted_meanwhile_begins_after_it(
        self, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> None:
            async def later() -> None:
                await trio.sleep(10)
                await run.spawn("hello", "Go.", raises=True)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(later)
                await run.ask(None, "Well?")

        made = infrastructure(asks=asks)
        async with parked(made) as (supervisor, run, question):
            await trio.sleep(100)
            await answer(supervisor, question, "yes")
            assert (await run.ended()).status == "success"
        log = await log_of(made.store)
        check_log(log)
        kinds = types_of(log)
        assert kinds.index("SUBAGENT_STARTED") > kinds.index("RUN_FINISHED")

    async def test_a_sub_agent_that_asks_and_is_cancelled_alone_leaves_a_valid_log(
        self, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> str:
            with trio.move_on_after(30):
                await run.spawn("helper", "Go.")
            await run.emit.text("Without it, then.")
            return "on"

        made = infrastructure(asks=asks, helper=asks_for_words)
        async with parked(made) as (_, run, _):
            assert (await run.ended()).result == "on"
        log = await log_of(made.store)
        check_log(log)
        assert "SUBAGENT_ERROR" in types_of(log)

    async def test_an_agent_may_not_say_that_one_is_suspended(
        self, autojump_clock: MockClock
    ) -> None:
        async def asks(run: RunContext) -> None:
            suspended = events.SubagentFinished(
                subagent_run_id="s", outcome=events.Suspended(("q",))
            )
            with pytest.raises(CrecheError, match="engine's"):
                await run.emit.emit(suspended)

        async with open_supervisor(infrastructure(asks=asks)) as supervisor:
            run = await supervisor.start(context(), "asks", "x")
            assert (await run.ended()).status == "success"


class TestApproval:
    def paying(self, paid: list[int], limits: Limits | None = None) -> Infrastructure:
        @tool(approval=True, shared=(paid,))
        async def pay(amount: int, token: str = "") -> str:
            """Pay."""
            paid.append(amount)
            return f"paid {amount}"

        async def asks(run: RunContext) -> str:
            return (await run.tools.dispatch("pay", '{ "token": "s3cret", "amount": 5}')).content

        return infrastructure(asks=asks, tools=[pay], limits=limits)

    async def test_a_yes_lets_the_call_be_made(self, autojump_clock: MockClock) -> None:
        paid: list[int] = []
        made = self.paying(paid, Limits(tool_timeout=10, approval_timeout=10))
        async with parked(made) as (supervisor, run, question):
            await trio.sleep(1000)
            assert (question.reason, question.tool_name) == ("tool_call", "pay")
            assert paid == []
            await answer(supervisor, question, {"approved": True, "digest": question.digest})
            assert (await run.ended()).result == "paid 5"
        log = await log_of(made.store)
        check_log(log)
        (interrupt,) = interrupts_of(log)
        (call,) = [event for event in log if event["type"] == "TOOL_CALL_START"]
        assert interrupt["toolCallId"] == call["toolCallId"]
        assert interrupt["metadata"]["creche"] == {
            "tool_name": "pay",
            "arguments": '{"amount":5,"token":"[redacted]"}',
            "digest": question.digest,
        }
        assert types_of(log)[4:] == [
            "RUN_FINISHED",
            "RUN_STARTED",
            "TOOL_CALL_RESULT",
            "RUN_FINISHED",
        ]
        assert "s3cret" not in str(log)

    async def test_it_is_bound_to_the_hash_of_the_arguments(
        self, autojump_clock: MockClock
    ) -> None:
        paid: list[int] = []
        async with parked(self.paying(paid)) as (supervisor, run, question):
            assert question.digest == digest_of("pay", '{"amount":5,"token":"s3cret"}')
            other = digest_of("pay", '{"amount":500,"token":"s3cret"}')
            for wrong in (
                {"approved": True, "digest": other},
                {"approved": "yes", "digest": question.digest},
                {"approved": 1},
                True,
                "yes",
            ):
                with pytest.raises(AnswerRefusedError):
                    await answer(supervisor, question, wrong)
            assert paid == []
            await answer(supervisor, question, {"approved": True, "digest": question.digest})
            await run.ended()
        assert paid == [5]

    @pytest.mark.parametrize("how", ["refused", "declined"])
    async def test_a_no_is_a_result(self, how: str, autojump_clock: MockClock) -> None:
        paid: list[int] = []
        made = self.paying(paid)
        async with parked(made) as (supervisor, run, question):
            if how == "declined":
                await answer(supervisor, question, declined=True)
            else:
                await answer(supervisor, question, {"approved": False, "reason": "Too much."})
            said = (await run.ended()).result
        assert "not approved" in said
        assert ("Too much" in said) is (how == "refused")
        assert paid == []
        check_log(await log_of(made.store))

    @pytest.mark.parametrize("how", ["user", "shutdown", "unanswered"])
    async def test_whatever_ends_it_the_history_is_valid_and_the_next_call_is_taken(
        self, how: str, autojump_clock: MockClock
    ) -> None:
        @tool(approval=True)
        async def pay(amount: int) -> str:
            """Pay."""
            return "paid"

        class Assistant(ModelAgent):
            tools = (pay,)

        async with open_pacer() as pacer:
            made = Infrastructure(
                agents={"asks": Assistant},
                tools=[pay],
                models={"default": ScriptedModel(pacer)},
                limits=Limits(answer_timeout=100),
            )
            async with open_supervisor(made) as supervisor:
                run = await supervisor.start(context(), "asks", 'tool=pay:{"amount":1} tokens=2')
                question = await question_on(supervisor)
                if how != "unanswered":
                    run.cancel(how)  # type: ignore[arg-type]
                assert (await run.ended()).receipt.reason == how
            store = made.store
            assert isinstance(store, MemoryStore)
            check_history(await history_of(store))
            check_log(await log_of(store))
            async with open_supervisor(made) as supervisor:
                if how == "shutdown":
                    second = await answer(supervisor, question, {"approved": False})
                    assert second is not None
                else:
                    second = await supervisor.start(context(), "asks", "tokens=2")
                assert (await second.ended()).status == "success"
            check_history(await history_of(store))
            check_log(await log_of(store))

    async def test_two_calls_at_once_are_approved_one_after_the_other(
        self, autojump_clock: MockClock
    ) -> None:
        paid: list[int] = []

        @tool(approval=True, shared=(paid,))
        async def pay(amount: int) -> str:
            """Pay."""
            paid.append(amount)
            return "paid"

        async def asks(run: RunContext) -> None:
            async with trio.open_nursery() as nursery:
                for amount in (1, 2):
                    nursery.start_soon(run.call_tool, "pay", {"amount": amount})

        made = infrastructure(asks=asks, tools=[pay])
        async with parked(made) as (supervisor, run, question):
            await answer(supervisor, question, {"approved": True})
            await trio.sleep(1)
            second = await question_on(supervisor)
            await answer(supervisor, second, {"approved": False})
            await run.ended()
        assert len(paid) == 1
        check_log(await log_of(made.store))

    async def test_a_late_yes_is_told_in_words(self, autojump_clock: MockClock) -> None:
        heard: list[str] = []
        paid: list[int] = []
        made = self.paying(paid)
        async with open_supervisor(made) as supervisor:
            await supervisor.start(context(), "asks", "Begin.")
            question = await question_on(supervisor)

        async def hears(run: RunContext) -> None:
            heard.extend(text_of(message) for message in run.messages[-2:])

        again = infrastructure(asks=hears, store=made.store)
        async with open_supervisor(again) as supervisor:
            run = await answer(supervisor, question, {"approved": True})
            assert run is not None
            await run.ended()
        assert heard == [
            'May the tool pay be called? Its arguments would be {"amount":5,"token":"[redacted]"}',
            "Yes, call pay with exactly these arguments.",
        ]
        assert paid == []


async def test_a_parked_run_costs_less_than_50_kib(autojump_clock: MockClock) -> None:
    limits = Limits(runs_per_user=2000, running_per_user=2000)  # a parked run has its place still
    made = infrastructure(asks=asks_a_colour, limits=limits)
    count = 1000
    async with open_supervisor(made) as supervisor:
        warm = await supervisor.start(context(thread="warm"), "asks", "Begin.")
        await question_on(supervisor, thread="warm")
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            runs = [
                await supervisor.start(context(thread=f"t{number}"), "asks", "Begin.")
                for number in range(count)
            ]
            while any(run.status != "parked" for run in runs):
                await trio.sleep(0.1)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        each = (after - before) / count
        print(f"a parked run takes {each / 1024:.1f} KiB")  # noqa: T201
        assert each < 50 * 1024
        assert warm.status == "parked"
