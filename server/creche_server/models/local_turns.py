"""What the small local model is told when it talks: turns for its chat template. Pure, no I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from creche import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolMessage,
    ToolSpec,
    role_of,
    text_of,
)

Turn = dict[str, str]  # {"role": ..., "content": ...}

# Without any, the template says that it is SmolLM, and then it speaks of little else.
_INSTRUCTIONS: Final = "You are a helpful, concise assistant."
_FORGOTTEN: Final = (
    "(This conversation has become longer than the local model can keep in mind, so I answer "
    "without its beginning.)\n\n"
)
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
        elif isinstance(message, AssistantMessage):
            content = content.removeprefix(_FORGOTTEN)  # or the model would learn to say it
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
    """The turns in at most about `room` characters, unless the last alone is longer.

    First the oldest turns go, but for system's and the last; then the middle of system's. The
    last is never cut: it is what must be answered.
    They go in eights: what is left then begins alike for some turns to come, and what begins
    alike need not be read again.
    """
    kept = list(turns)
    while length(kept) > room:
        droppable = [i for i, turn in enumerate(kept[:-1]) if turn["role"] != "system"]
        if not droppable:
            break
        for i in reversed(droppable[:_DROPPED_AT_ONCE]):
            del kept[i]
    while (excess := length(kept) - room) > 0:
        if len(kept) == 1:
            break
        i = max(range(len(kept) - 1), key=lambda i: len(kept[i]["content"]))
        content = kept[i]["content"]
        most = max(len(content) - excess, len(content) // 2)
        if most < _SHORTEST:
            break
        kept[i] = {**kept[i], "content": shortened(content, most)}
    return kept


def forgotten(messages: Sequence[Message]) -> str:
    """What to say before an answer for which old turns were left out; said once a conversation."""
    for message in messages:
        if isinstance(message, AssistantMessage) and (message.content or "").startswith(_FORGOTTEN):
            return ""
    return _FORGOTTEN


def harmless(text: str) -> str:
    """Text in which the template's own marks, such as <|im_end|>, are just characters."""
    return text.replace("<|", "< |")


def shortened(text: str, length: int) -> str:
    """The beginning and the end of a text that is longer than `length` characters."""
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 3]} … {text[len(text) - tail :]}"


def length(turns: Sequence[Turn]) -> int:
    """Their characters, and about those of the template's marks."""
    return sum(len(turn["content"]) + 16 for turn in turns)
