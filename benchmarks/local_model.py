"""How well the local model chooses tools and uses what they return, and how fast it is.

    python benchmarks/local_model.py

Asks some questions, each in a new conversation, with the tools of the default agent and with those
of some agents such as a reader of the README would write, and prints a table. The default agent's
first eight and the shop's first three it must get right. On the others no example, no threshold
and no weight was tuned; but how results are told, and which sums are read off a message, was
mended after the default agent's had been asked for the first time; and which of two tools of one
trade is meant, after "Book a table for four on Friday".

    python benchmarks/local_model.py --calibrate

measures the default agent's tools anew, for the file that comes with the package. A test says
when that is due.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import trio

from creche import (
    AssistantMessage,
    FunctionCall,
    MemoryStore,
    Message,
    MessageId,
    RunError,
    SystemMessage,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallId,
    ToolCallRequest,
    ToolMessage,
    UserMessage,
    new_id,
    tool,
)
from creche_server.assistant import Assistant, calculator, clock, history_tool
from creche_server.models.local import LocalModel, open_local_model
from creche_server.models.local_calibration import SHIPPED

FOUND: Final = "I planted tomatoes and beans in the garden, and Rex the dog dug them up."


@dataclasses.dataclass(frozen=True)
class Case:
    """A question, the tool that it needs, and what the arguments or the answer must hold."""

    question: str
    tool: str | None = None
    arguments: tuple[str, ...] = ()  # any of these, for a search or a time zone
    answer: str = ""  # what the words of the answer must hold


TODAY: Final = datetime.now(UTC)
CASES: Final = (
    Case("What is 37 * 91? Use the calculator.", "calculator", answer="3367"),
    Case("What time is it?", "clock", ("UTC",), answer=str(TODAY.year)),
    Case("What is 12.5 + 7?", "calculator", answer="19.5"),
    Case("how much is 144 / 12", "calculator", answer="12"),
    Case("Hello!"),
    Case("Tell me a joke"),
    Case("Who are you?"),
    Case("Write a haiku about the sea."),
    # held out when examples and thresholds were chosen
    Case("What is 256 - 89?", "calculator", answer="167"),
    Case("Multiply 14 by 15", "calculator", answer="210"),
    Case("what's 7 * (8 + 2)", "calculator", answer="70"),
    Case("How much is 9.99 times 3?", "calculator", answer="29.97"),
    Case("A ticket costs 18 euros. What do 4 tickets cost?", "calculator", answer="72"),
    Case("1024 / 16 = ?", "calculator", answer="64"),
    Case("What day of the week is it?", "clock", ("UTC",), answer=f"{TODAY:%A}"),
    Case("Can you tell me today's date?", "clock", ("UTC",), answer=str(TODAY.year)),
    Case("What time is it in Rome?", "clock", ("Europe/Rome",), answer=str(TODAY.year)),
    Case("What did I tell you about my garden?", "search_history", ("garden",), "tomatoes"),
    Case("Search my chats for tomatoes", "search_history", ("tomato",), "tomatoes"),
    Case("Did I mention Rex before?", "search_history", ("Rex",), "Rex"),
    Case("Good afternoon, how are things?"),
    Case("Who discovered America?"),
    Case("Give me a recipe for pancakes."),
    Case("What is the largest ocean?", answer="Pacific"),
    Case("Write two sentences about friendship."),
    Case("Thank you very much!"),
    Case("Why do leaves fall in autumn?"),
    Case("Suggest a name for my blog about trains."),
)


@tool
def tell_stock(item: str) -> str:
    """Tell how many of an item are in stock."""
    return f"There are 12 of {item}."


@tool
def get_weather(city: str) -> dict[str, str | int]:
    """Get the current weather in a city."""
    return {"city": city, "sky": "light rain", "celsius": 17}


@tool
def book_table(people: int, day: str) -> str:
    """Book a table in the restaurant for a number of people."""
    return f"Booked: a table for {people}, {day}."


@tool
def cancel_booking(name: str) -> str:
    """Cancel the booking that somebody made."""
    return f"The booking of {name} is cancelled."


@tool
def translate(text: str, language: str) -> str:
    """Translate a text into another language."""
    return f"{text} = [{language}]"


SHOP: Final = (
    Case("How many apples are there?", "tell_stock", ("apple",), "12"),
    Case("How many apples are in stock?", "tell_stock", ("apple",), "12"),
    Case("What is the stock of pears?", "tell_stock", ("pear",), "12"),
    Case("Do we have any bananas left?", "tell_stock", ("banana",), "12"),
    Case("how many umbrellas do you have", "tell_stock", ("umbrella",), "12"),
    Case("Hello!"),
    Case("Who are you?"),
    Case("What is the capital of Spain?", answer="Madrid"),
    Case("Write a short poem about spring."),
)
WEATHER: Final = (
    Case("What's the weather in Paris?", "get_weather", ("Paris",), "17"),
    Case("Is it raining in London?", "get_weather", ("London",), "rain"),
    Case("How cold is it in Oslo today?", "get_weather", ("Oslo",), "17"),
    Case("Do I need an umbrella in Hamburg?", "get_weather", ("Hamburg",), "rain"),
    Case("Good morning!"),
    Case("Who wrote Romeo and Juliet?", answer="Shakespeare"),
    Case("Tell me a joke about dogs."),
    Case("How do I boil an egg?"),
)
RESTAURANT: Final = (
    Case("Book a table for four on Friday", "book_table", ("4",), "Booked"),
    Case("I'd like to reserve a table for 2 people on Sunday", "book_table", ("2",), "Booked"),
    Case("Can we have a table for six tomorrow?", "book_table", ("6",), "Booked"),
    Case("Please cancel the booking of Miller", "cancel_booking", ("Miller",), "cancelled"),
    Case("Hi"),
    Case("What is a good wine?"),
    Case("Why is the sea salty?"),
    Case("Thanks a lot!"),
)
TRANSLATOR: Final = (
    Case("Translate good night into Spanish", "translate", ("good night",), "Spanish"),
    Case("Translate 'where is the station' to German", "translate", ("station",), "German"),
    Case("Please translate water into Italian", "translate", ("water",), "Italian"),
    Case("How do you say cheese in French?", "translate", ("cheese",), "French"),
    Case("Hello there"),
    Case("Who was Napoleon?"),
    Case("Give me an idea for dinner."),
    Case("What is the tallest mountain?", answer="Everest"),
)


@dataclasses.dataclass(frozen=True)
class World:
    """An agent's instructions and tools, and what it is asked."""

    name: str
    instructions: str
    tools: Sequence[Tool]
    cases: Sequence[Case]


WORLDS: Final = (
    World(
        "default",
        Assistant.instructions,
        (calculator, clock, history_tool(MemoryStore())),
        CASES,
    ),
    World(
        "shop",
        "You work in a shop. Use tell_stock for questions about stock.",
        (tell_stock,),
        SHOP,
    ),
    World("weather", "You are a helpful assistant.", (get_weather,), WEATHER),
    World(
        "restaurant",
        "You work in a restaurant. Use book_table when somebody wants a table.",
        (book_table, cancel_booking),
        RESTAURANT,
    ),
    World("translator", "You are a translator. Call translate.", (translate,), TRANSLATOR),
)


@dataclasses.dataclass
class Outcome:
    """What the model made of a question."""

    call: ToolCallRequest | None
    answer: str
    first: float  # seconds to the first part of the answer's words
    speed: float  # tokens a second after that


def message_id() -> MessageId:
    """Any."""
    return MessageId(new_id())


async def ask(model: LocalModel, world: World, question: str) -> Outcome:
    """One question, and the answer that follows the tool's result if a tool is called."""
    tools = [tool.spec for tool in world.tools]
    messages: list[Message] = [
        SystemMessage(id=message_id(), content=world.instructions),
        UserMessage(id=message_id(), content=question),
    ]
    started = time.perf_counter()
    call: ToolCallRequest | None = None
    while True:
        times: list[float] = []
        words = ""
        wanted: ToolCallRequest | None = None
        async with model.open_stream(messages, tools) as parts:
            async for part in parts:
                if isinstance(part, TextDelta):
                    times.append(time.perf_counter())
                    words += part.text
                elif isinstance(part, ToolCallRequest):
                    wanted = part
        if wanted is None:
            break
        call, call_id = wanted, ToolCallId(new_id())
        result, error = await use(world, wanted)
        function = FunctionCall(wanted.name, wanted.arguments)
        called = (ToolCall(id=call_id, function=function),)
        messages += [
            AssistantMessage(id=message_id(), tool_calls=called),
            ToolMessage(id=message_id(), tool_call_id=call_id, content=result, error=error),
        ]
    seconds = times[-1] - times[0] if times else 0.0
    speed = (len(times) - 1) / seconds if seconds else 0.0
    return Outcome(call, words, (times[0] if times else started) - started, speed)


async def use(world: World, wanted: ToolCallRequest) -> tuple[str, str | None]:
    """What the tool returns, and why it failed; as a run has it, but for a made-up history."""
    if wanted.name == "search_history":
        return msgspec.json.encode([{"when": "2026-05-04 09:12", "text": FOUND}]).decode(), None
    tool = next(tool for tool in world.tools if tool.name == wanted.name)
    arguments: dict[str, Any] = msgspec.json.decode(wanted.arguments)
    try:
        value = tool.function(**arguments)
        value = await value if tool.is_async else value
        return value if isinstance(value, str) else msgspec.json.encode(value).decode(), None
    except RunError as error:
        return f"Error: {error.message}", error.message


def faults(case: Case, outcome: Outcome) -> str:
    """What is wrong with an outcome, empty where nothing is."""
    called = outcome.call.name if outcome.call else None
    if called != case.tool:
        return f"should have used {case.tool or 'no tool'}"
    arguments = outcome.call.arguments.lower() if outcome.call else ""
    if case.arguments and not any(wanted.lower() in arguments for wanted in case.arguments):
        return f"arguments should hold {' or '.join(case.arguments)}"
    if case.answer.lower() not in outcome.answer.lower():
        return f"should say {case.answer}"
    return ""


async def measure() -> None:
    """Ask them all and print the table."""
    opened = time.perf_counter()
    async with open_local_model() as model:
        print(f"loaded in {time.perf_counter() - opened:.2f} s\n")
        print("| question | tool | arguments | answer | verdict | first ms | tokens/s |")
        print("|---|---|---|---|---|---|---|")
        scores: list[str] = []
        for world in WORLDS:
            started = time.perf_counter()
            await model.warm_up([tool.spec for tool in world.tools], world.instructions)
            warm = time.perf_counter() - started
            chosen = right = called_for_nothing = 0
            for case in world.cases:
                outcome = await ask(model, world, case.question)
                fault = faults(case, outcome)
                called = outcome.call.name if outcome.call else "-"
                chosen += called == (case.tool or "-")
                called_for_nothing += case.tool is None and outcome.call is not None
                right += not fault
                print(
                    f"| {case.question} | {called} "
                    f"| {outcome.call.arguments if outcome.call else ''} "
                    f"| {' '.join(outcome.answer.split())[:90].replace('|', '/')} "
                    f"| {fault or 'right'} "
                    f"| {outcome.first * 1000:.0f} | {outcome.speed:.0f} |",
                    flush=True,
                )
            scores.append(
                f"{world.name}: {chosen} of {len(world.cases)} choices right, "
                f"{called_for_nothing} calls for nothing, "
                f"{right} of {len(world.cases)} answers right; warmed up in {warm:.1f} s"
            )
        print("\n" + "\n".join(scores))


async def calibrate() -> None:
    """Write the file that comes with the package."""
    SHIPPED.unlink(missing_ok=True)
    async with open_local_model(calibrations=SHIPPED) as model:
        await model.warm_up([tool.spec for tool in WORLDS[0].tools], WORLDS[0].instructions)
    print(SHIPPED.read_text())


if __name__ == "__main__":
    trio.run(calibrate if sys.argv[1:] == ["--calibrate"] else measure)
