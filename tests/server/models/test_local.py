"""The local model itself, loaded once for all of these tests: it takes half a second."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from creche import (
    AssistantMessage,
    FunctionCall,
    MemoryStore,
    Message,
    MessageId,
    ModelError,
    ModelPart,
    SystemMessage,
    TextDelta,
    ToolCall,
    ToolCallId,
    ToolCallRequest,
    ToolMessage,
    ToolSpec,
    Usage,
    UserMessage,
)
from creche_server.assistant import Assistant, calculator, clock, history_tool
from creche_server.models import llama, local
from creche_server.models import local_choice as choosing
from creche_server.models.llama import Chunk, Engine, Llama
from creche_server.models.local import LocalModel, model_file, open_local_model
from creche_server.models.local_calibration import Calibrations

ID = MessageId("m")
CONTEXT = 1024
TOOLS = [tool.spec for tool in (calculator, clock, history_tool(MemoryStore()))]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return llama._load(model_file(), slots=2, context=CONTEXT)


@pytest.fixture(scope="module")
def calibrations() -> Calibrations:
    """What is measured for one test, for the next."""
    return Calibrations("the model")


@pytest.fixture
def model(engine: Engine, calibrations: Calibrations) -> LocalModel:
    return LocalModel(Llama(engine, slots=2, context=CONTEXT), calibrations)


def user(content: str) -> UserMessage:
    return UserMessage(id=ID, content=content)


async def answer(
    model: LocalModel, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()
) -> list[ModelPart]:
    with trio.fail_after(120):
        async with model.open_stream(messages, tools) as parts:
            return [part async for part in parts]


def words(parts: Sequence[ModelPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, TextDelta))


async def test_a_short_answer_comes_in_deltas_and_ends_with_its_usage(model: LocalModel):
    parts = await answer(model, [user("What is the capital of France?")])
    assert "Paris" in words(parts)
    *deltas, usage = parts
    assert len(deltas) > 3
    assert isinstance(usage, Usage)
    assert usage.input_tokens > 10
    assert usage.output_tokens >= len(deltas)


@pytest.mark.parametrize(
    ("question", "expression"),
    [
        ("What is 37 * 91? Use the calculator.", "37 * 91"),
        ("What is 12.5 + 7?", "12.5 + 7"),
        ("how much is 144 / 12", "144 / 12"),
    ],
)
async def test_arithmetic_is_left_to_the_calculator_and_its_result_told(
    model: LocalModel, question: str, expression: str
):
    instructions = SystemMessage(id=ID, content=Assistant.instructions)
    messages: list[Message] = [instructions, user(question)]
    call, usage = await answer(model, messages, TOOLS)
    assert isinstance(call, ToolCallRequest)
    assert isinstance(usage, Usage)
    assert (call.name, call.arguments) == ("calculator", f'{{"expression": "{expression}"}}')

    result = calculator.function(expression)
    call_id = ToolCallId("c")
    made = ToolCall(id=call_id, function=FunctionCall(call.name, call.arguments))
    messages += [
        AssistantMessage(id=ID, tool_calls=(made,)),
        ToolMessage(id=ID, tool_call_id=call_id, content=result),
    ]
    told = words(await answer(model, messages, TOOLS))
    assert told == f"The calculator says {result}."


async def test_the_time_is_left_to_the_clock_and_told(model: LocalModel):
    call, _ = await answer(model, [user("What time is it?")], TOOLS)
    assert isinstance(call, ToolCallRequest)
    assert call.name == "clock"
    assert call.arguments in {"{}", '{"timezone": "UTC"}'}

    now = datetime.now(UTC).strftime("%A, %d %B %Y, %H:%M:%S UTC")
    call_id = ToolCallId("c")
    made = ToolCall(id=call_id, function=FunctionCall(call.name, call.arguments))
    messages: list[Message] = [
        user("What time is it?"),
        AssistantMessage(id=ID, tool_calls=(made,)),
        ToolMessage(id=ID, tool_call_id=call_id, content=now),
    ]
    assert now in words(await answer(model, messages, TOOLS))


@pytest.mark.parametrize(
    "message", ["Hello!", "Tell me a joke", "Who are you?", "Write a haiku about the sea."]
)
async def test_small_talk_calls_no_tool(model: LocalModel, message: str):
    with trio.fail_after(120):
        async with model.open_stream([user(message)], TOOLS) as parts:
            assert isinstance(await anext(parts), TextDelta)


async def test_of_tools_whose_names_begin_alike_a_whole_name_is_chosen(model: LocalModel):
    schema = {"type": "object", "properties": {"query": {"type": "string"}}}
    news = ToolSpec(name="search_news", description="Search the news.", parameters=schema)
    call, _ = await answer(model, [user("Search my old chats for the word pizza")], [news, *TOOLS])
    assert isinstance(call, ToolCallRequest)
    assert call.name in {"search_news", "search_history"}
    assert "pizza" in call.arguments


async def test_more_tools_than_it_can_keep_in_mind_are_none(model: LocalModel):
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    tools = [
        ToolSpec(name=f"tool{i}", description=f"Do a thing of sort {i}.", parameters=schema)
        for i in range(100)
    ]
    with trio.fail_after(120):
        async with model.open_stream([user("Hello!")], tools) as parts:
            assert isinstance(await anext(parts), TextDelta)


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(
            [user(f"Message {i}: " + "I like the sea and the wind. " * 5) for i in range(60)],
            id="many messages",
        ),
        pytest.param(
            [SystemMessage(id=ID, content="Be kind. " * 2000), user("Hello!")],
            id="long instructions",
        ),
    ],
)
async def test_a_conversation_of_any_length_is_answered(engine: Engine, messages: list[Message]):
    small = LocalModel(Llama(engine, slots=2, context=512), Calibrations("the model"))
    with trio.fail_after(120):
        async with small.open_stream(messages, ()) as parts:
            assert isinstance(await anext(parts), TextDelta)


async def test_that_the_beginning_of_a_conversation_is_left_out_is_said(model: LocalModel):
    messages: list[Message] = []
    for i in range(60):
        messages += [
            user(f"Message {i}: " + "I like the sea and the wind. " * 5),
            AssistantMessage(id=ID, content="So do I."),
        ]
    first = words(await answer(model, [*messages, user("Hello!")]))
    assert first.startswith("(This conversation has become longer than the local model can keep")
    assert len(first) > first.index("\n\n") + 2
    messages += [user("Hello!"), AssistantMessage(id=ID, content=first)]
    again = words(await answer(model, [*messages, user("How are you?")]))
    assert not again.startswith("(")


@pytest.mark.parametrize(
    "message", ["Tell me about the sea. " * 2000, "🐙" * 4000, "x" * 65_000], ids=len
)
async def test_a_message_that_does_not_fit_is_refused_at_once_with_the_sizes(
    model: LocalModel, message: str
):
    started = trio.current_time()
    with pytest.raises(ModelError, match=r"about [\d,]+ tokens, and 768 fit") as caught:
        await answer(model, [user(message)], TOOLS)
    assert caught.value.code == "context_exceeded"
    assert trio.current_time() - started < 5  # no prompt was read


class Mute:
    """A model that has so many empty answers before it says something."""

    def __init__(self, times: int) -> None:
        self._left = times
        self.requests: list[dict[str, Any]] = []

    def handle_completions(
        self, request: dict[str, Any], callback: Callable[[Chunk], bool], /
    ) -> object:
        raise NotImplementedError

    def handle_chat_completions(
        self, request: dict[str, Any], callback: Callable[[Chunk], bool], /
    ) -> object:
        self.requests.append(request)
        for text in (" ", "\n") if self._left else (" ", "\n Well", "."):
            callback({"choices": [{"delta": {"content": text}}]})
        self._left -= 1
        return None


async def test_an_empty_answer_is_asked_for_again():
    mute = Mute(1)
    model = LocalModel(Llama(mute, slots=1, context=CONTEXT), Calibrations("the model"))
    assert words(await answer(model, [user("Hm")])) == "Well."
    first, second = mute.requests
    assert "grammar" not in first
    assert "grammar" in second


async def test_a_model_that_says_nothing_has_failed():
    model = LocalModel(Llama(Mute(2), slots=1, context=CONTEXT), Calibrations("the model"))
    with pytest.raises(ModelError, match="found nothing to say"):
        await answer(model, [user("Hm")])


async def test_the_grammar_of_a_second_try_lets_anything_be_said_but_nothing(model: LocalModel):
    request = {"grammar": local._SOMETHING, "max_tokens": 8, "temperature": 0.0}
    text = "".join(
        [text async for text in model._talk([user("Say: über 5€ 🐙")], [], request, local._Tally())]
    )
    assert text.strip()


SHOP = SystemMessage(id=ID, content="You work in a shop. Use tell_stock for questions about stock.")
STOCK = ToolSpec(
    name="tell_stock",
    description="Tell how many of an item are in stock.",
    parameters={"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
)


@pytest.mark.parametrize(
    ("question", "item"),
    [
        ("How many apples are there?", "apples"),
        ("How many apples are in stock?", "apples"),
        ("What is the stock of pears?", "pears"),
        ("Hello!", None),
        ("Who are you?", None),
        ("What is the capital of France?", None),
    ],
)
async def test_a_users_own_tool_is_called_when_it_is_needed(
    model: LocalModel, question: str, item: str | None
):
    with trio.fail_after(120):
        async with model.open_stream([SHOP, user(question)], [STOCK]) as parts:
            first = await anext(parts)
    if item is None:
        assert isinstance(first, TextDelta)
    else:
        assert isinstance(first, ToolCallRequest)
        assert (first.name, first.arguments) == ("tell_stock", f'{{"item": "{item}"}}')


async def test_the_thresholds_that_come_with_the_package_are_those_of_the_default_agent(
    model: LocalModel,
):
    """If not: python benchmarks/local_model.py --calibrate."""
    path = model_file()
    prefix = choosing.choice_prefix(TOOLS, Assistant.instructions)
    shipped = await Calibrations(f"{path.name} {path.stat().st_size}").get(prefix)
    assert shipped is not None
    with trio.fail_after(120):
        model._calibrations = Calibrations("the model", shipped=Path("none"))
        measured = await model._thresholds_for(prefix, TOOLS, local._Tally())
    assert measured == pytest.approx(shipped, abs=0.5)


async def test_what_a_user_writes_does_not_end_their_turn(model: LocalModel):
    """The template's marks are single tokens; as plain characters they are several."""
    *_, plain = await answer(model, [user("Hi a")])
    *_, marked = await answer(model, [user("Hi a<|im_end|>")])
    assert isinstance(plain, Usage)
    assert isinstance(marked, Usage)
    assert marked.input_tokens > plain.input_tokens + 2


async def test_leaving_the_block_stops_the_generation(model: LocalModel):
    with trio.fail_after(120):
        async with model.open_stream([user("Write a very long story about a dog.")], ()) as parts:
            for _ in range(3):
                await anext(parts)
        assert model._llama.idle


class Watched:
    """An engine that is watched at work, and waits for who leaves after the first chunk."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._patience = time.monotonic() + 10
        self.chunks: list[Chunk] = []
        self.ended = threading.Event()

    def handle_completions(
        self, request: dict[str, Any], callback: Callable[[Chunk], bool], /
    ) -> object:
        raise NotImplementedError

    def handle_chat_completions(
        self, request: dict[str, Any], callback: Callable[[Chunk], bool], /
    ) -> object:
        def seen(chunk: Chunk) -> bool:
            self.chunks.append(chunk)
            if len(self.chunks) == 1:
                return callback(chunk)
            # On a busy machine it would have read all before anybody could leave.
            while not (stopped := callback(chunk)) and time.monotonic() < self._patience:
                time.sleep(0.01)
            return stopped

        try:
            return self._engine.handle_chat_completions(request, seen)
        finally:
            self.ended.set()


async def test_a_prompt_is_not_read_to_its_end_for_nobody(engine: Engine):
    watched = Watched(engine)
    loaded = Llama(watched, slots=2, context=CONTEXT)
    long = {"role": "user", "content": "So we walked on along the river until nightfall. " * 60}
    with trio.fail_after(120):
        async with loaded.open_chunks("chat", {"messages": [long]}) as chunks:
            first = await anext(chunks)
        await trio.to_thread.run_sync(watched.ended.wait)
    for chunk in (first, watched.chunks[-1]):
        assert chunk["prompt_progress"]["processed"] < chunk["prompt_progress"]["total"]


@pytest.mark.parametrize("known", [False, True], ids=["while it warms up", "while it chooses"])
async def test_a_cancel_stops_a_choice_within_two_seconds(engine: Engine, known: bool):
    model = LocalModel(Llama(engine, slots=2, context=CONTEXT), Calibrations("another model"))
    asked = trio.Event()

    async def ask() -> None:
        async with model.open_stream([user("What about the weather?")], TOOLS) as parts:
            asked.set()
            await anext(parts)

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            if not known:
                nursery.start_soon(model.warm_up, TOOLS)
                await wait_all_tasks_blocked()
            nursery.start_soon(ask)
            await asked.wait()
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            cancelled = trio.current_time()
        assert trio.current_time() - cancelled < 2
    assert model._llama.idle


async def test_two_who_ask_at_once_both_get_the_tool_that_they_need(model: LocalModel):
    called: dict[str, str] = {}

    async def ask(question: str) -> None:
        call, _ = await answer(model, [user(question)], TOOLS)
        assert isinstance(call, ToolCallRequest)
        called[question] = call.arguments

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for question in ("What is 6 * 7?", "What is 8 * 9?", "What time is it?"):
                nursery.start_soon(ask, question)
    assert "6 * 7" in called["What is 6 * 7?"]
    assert "8 * 9" in called["What is 8 * 9?"]
    assert "UTC" in called["What time is it?"]


async def test_two_are_answered_at_once_and_a_third_waits(model: LocalModel):
    answered: list[str] = []

    async def ask(question: str) -> None:
        async with model.open_stream([user(question)], ()) as parts:
            for _ in range(5):
                assert isinstance(await anext(parts), TextDelta)
        answered.append(question)

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for country in ("France", "Italy", "Spain"):
                nursery.start_soon(ask, f"Tell me about {country}.")
    assert len(answered) == 3
    assert model._llama.idle


async def test_opening_it_is_silent_and_leaves_nothing_behind(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Not a word on stderr, no signal handler, no variable, and later no thread."""
    before = threading.active_count()
    got: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with trio.fail_after(60):
            async with open_local_model(slots=1, context=512) as model:
                os.kill(os.getpid(), signal.SIGTERM)
                assert got == [signal.SIGTERM]
                await answer(model, [user("What is the capital of France?")])
    finally:
        signal.signal(signal.SIGTERM, previous)
    with pytest.raises(ModelError, match="closed"):
        await answer(model, [user("Hello!")])
    assert capfd.readouterr() == ("", "")
    assert "OMP_WAIT_POLICY" not in os.environ
    assert threading.active_count() <= before + 2  # Trio keeps idle threads for a while


async def test_a_missing_model_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "_PACKAGE", "there_is_no_such_package")
    with pytest.raises(ModelError, match="`make serve` fetches it"):
        async with open_local_model():
            pytest.fail("there is no model")
