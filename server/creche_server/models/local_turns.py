"""What the small local model is told when it talks: turns for its chat template. Pure, no I/O."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Final

from creche import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolMessage,
    ToolSpec,
    UserMessage,
    role_of,
    text_of,
)

Turn = dict[str, str]  # {"role": ..., "content": ...}

# Without any, the template says that it is SmolLM, and then it speaks of little else.
_INSTRUCTIONS: Final = "You are a helpful, concise assistant."
_SHORT_RESULT: Final = 120  # characters of a tool's result that an answer repeats as they are
_NOTHING: Final = frozenset({"", "[]", "{}", "null", "None"})  # what a tool that found none returns
_MOST_NUMBERS: Final = 64  # that a grammar lists
_DROPPED_AT_ONCE: Final = 8  # turns
_SHORTEST: Final = 16  # characters that a turn keeps however long the others are


# --- the conversation


def chat(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[Turn]:
    """The conversation as the chat template wants it: what was said, without tools' machinery.

    Of the instructions, the sentences that name a tool are left out: in an answer this model can
    call none, and takes them for what it should talk about.
    """
    turns: list[Turn] = []
    for message in messages:
        content = text_of(message)
        if isinstance(message, SystemMessage):
            content = _without_tools(content, tools)
        if content and not isinstance(message, ToolMessage):
            turns.append({"role": role_of(message), "content": harmless(content)})
    if all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": _INSTRUCTIONS})
    return turns


def _without_tools(instructions: str, tools: Sequence[ToolSpec]) -> str:
    sentences = re.split(r"(?<=[.!?])\s+", instructions)
    names = {tool.name for tool in tools}
    return " ".join(s for s in sentences if names.isdisjoint(re.findall(r"\w+", s)))


def fit(turns: Sequence[Turn], room: int) -> list[Turn]:
    """The turns in at most about `room` characters.

    First the oldest turns go, but for system's and the last; then the middle of the longest.
    They go in eights: what is left then begins alike for some turns to come, and what begins
    alike need not be read again.
    """
    kept = list(turns)
    while _length(kept) > room:
        droppable = [i for i, turn in enumerate(kept[:-1]) if turn["role"] != "system"]
        if not droppable:
            break
        for i in reversed(droppable[:_DROPPED_AT_ONCE]):
            del kept[i]
    while (excess := _length(kept) - room) > 0:
        i = max(range(len(kept)), key=lambda i: len(kept[i]["content"]))
        content = kept[i]["content"]
        length = max(len(content) - excess, len(content) // 2)
        if length < _SHORTEST:
            break
        kept[i] = {**kept[i], "content": shortened(content, length)}
    return kept


def harmless(text: str) -> str:
    """Text in which the template's own marks, such as <|im_end|>, are just characters."""
    return text.replace("<|", "< |")


def shortened(text: str, length: int) -> str:
    """The beginning and the end of a text that is longer than `length` characters."""
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 3]} … {text[len(text) - tail :]}"


def _length(turns: Sequence[Turn]) -> int:
    return sum(len(turn["content"]) + 16 for turn in turns)


# --- telling a tool's result


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """An answer that tells what tools returned: the turns, and the grammar of the reply."""

    turns: list[Turn]
    grammar: str


def report(messages: Sequence[Message]) -> Report | None:
    """How to answer from the tool results that `messages` end with; None where they don't.

    The reply begins by naming its source. It ends with the result itself where that is one short
    line; otherwise it may at least hold no number that is in neither the question nor a result.
    Left to itself, a model this small would rather reckon on its own, and wrongly.
    """
    results: list[ToolMessage] = []
    for message in reversed(messages):
        if not isinstance(message, ToolMessage):
            break
        results.insert(0, message)
    if not results:
        return None
    names = {
        call.id: call.function.name.replace("_", " ")
        for message in messages
        if isinstance(message, AssistantMessage)
        for call in message.tool_calls
    }
    question = next((m.content for m in reversed(messages) if isinstance(m, UserMessage)), "")
    sources: list[str] = []
    returned: list[str] = []
    for result in results:
        verb = "says" if result.error is None else "failed:"
        sources.append(f"The {names.get(result.tool_call_id, 'tool')} {verb}")
        content = harmless(result.error or result.content).strip()
        returned.append("nothing" if content in _NOTHING else content)
    said = [f"{source} {text}" for source, text in zip(sources, returned, strict=True)]
    asked = "Answer in one sentence, stating what it says."
    turn = {"role": "user", "content": "\n".join([harmless(question), "", *said, "", asked])}
    short = (
        len(results) == 1
        and len(returned[0]) <= _SHORT_RESULT
        and returned[0].isprintable()
        and returned[0][0] not in "[{"  # JSON is not what a person should read
    )
    if short and results[0].error is not None:
        grammar = f"root ::= {literal(f'{sources[0]} {returned[0]}')}"
    elif short:
        grammar = _ending_with(returned[0], sources[0], question)
    else:
        grammar = _grounded(sources[0], " ".join([question, *returned]))
    return Report([turn], grammar)


def _ending_with(result: str, start: str, question: str) -> str:
    """GBNF: `start`, a few words in which the question's numbers may stand, and `result`."""
    numbers = _numbers(question)
    rules = [
        f"root ::= {literal(start)} between {literal(result)}"
        + (' "."' if result[-1].isalnum() else ""),
        f'between ::= ":"? " " | {"(words number){0,2} " if numbers else ""}words " "',
        'words ::= [^0-9,.;"\\n]{1,30}',
    ]
    if numbers:
        rules.append(f"number ::= {numbers}")
    return "\n".join(rules)


def _grounded(start: str, text: str) -> str:
    """GBNF: `start`, then one line whose numbers are all in `text`."""
    numbers = _numbers(text)
    rest = "words? (number words)* number?" if numbers else "words?"
    rules = [f"root ::= {literal(start)} {rest}", "words ::= [^0-9\\n]+"]
    if numbers:
        rules.append(f"number ::= {numbers}")
    return "\n".join(rules)


def _numbers(text: str) -> str:
    numbers = set(re.findall(r"\d+(?:[.,:]\d+)*", text))
    return " | ".join(map(literal, sorted(numbers, key=lambda n: (-len(n), n))[:_MOST_NUMBERS]))


def literal(text: str) -> str:
    """GBNF: just this text, which must be printable."""
    return json.dumps(text, ensure_ascii=False)
