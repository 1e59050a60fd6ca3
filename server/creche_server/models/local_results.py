"""How the local model tells what a tool returned: the thing itself, in a short frame. Pure.

The model would put it into its own words, and one this small gets numbers, and much else, wrong.
So these words are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from creche import AssistantMessage, Message, ToolMessage

_LONGEST: Final = 1500  # characters of a result that are told
_NOTHING: Final = frozenset({"", "[]", "{}", "null", "None", '""'})  # what one that found none says
_SENTENCE: Final = re.compile(r"""\S+\s+\S+.*[.!?…]["'”’)]*""", re.DOTALL)  # noqa: RUF001
_NOUNS: Final = frozenset({"calculator", "clock", "tool"})
_HISTORY: Final = "search_history"


def told(messages: Sequence[Message]) -> str | None:
    """The answer that tells the tool results that `messages` end with; None where they don't.

    A sentence is told as it stands; a number, a word or JSON with the name of its source. What
    is longer than 1,500 characters is told by its beginning, and so is that this is not all.
    """
    results: list[ToolMessage] = []
    for message in reversed(messages):
        if not isinstance(message, ToolMessage):
            break
        results.insert(0, message)
    if not results:
        return None
    names = {
        call.id: call.function.name
        for message in messages
        if isinstance(message, AssistantMessage)
        for call in message.tool_calls
    }
    return "\n\n".join(
        _result(names.get(result.tool_call_id, "tool"), result) for result in results
    )


def _result(name: str, result: ToolMessage) -> str:
    source = f"The {name}" if name in _NOUNS else name  # a function is mostly named by a verb
    if result.error is not None:
        return f"{source} failed: {_short(result.error.strip())}"
    content = result.content.strip()
    if content in _NOTHING:
        if name == _HISTORY:
            return "I found nothing about that in your earlier conversations."
        return f"{source} found nothing."
    value = _parsed(content)
    if isinstance(value, str):
        text = _short(value)
        return text if _SENTENCE.fullmatch(value) else _framed(f"{source} says", text)
    if name == _HISTORY and isinstance(value, list):
        return _short(_conversations(cast("list[Any]", value)))
    return _framed(f"{source} says", _short(_readable(value)))


def _parsed(content: str) -> object:
    """What JSON stands for if it is an object or a list; anything else as it stands."""
    if content[0] in "[{":
        try:
            return msgspec.json.decode(content)
        except msgspec.DecodeError:
            pass
    return content


def _framed(frame: str, text: str) -> str:
    if "\n" in text or text.startswith("- "):
        return f"{frame}:\n{text}"
    return f"{frame} {text}." if text[-1:].isalnum() else f"{frame} {text}"


def _readable(value: object) -> str:
    """What JSON says, without its marks: `key: value` for an object, a line for each of a list."""
    if isinstance(value, Mapping):
        members = cast("Mapping[str, object]", value)
        return ", ".join(f"{key}: {_scalar(member)}" for key, member in members.items())
    if isinstance(value, list):
        items = cast("list[object]", value)
        if any(isinstance(item, (Mapping, list)) for item in items):
            return "\n".join(f"- {_readable(item)}" for item in items)
        return ", ".join(map(_scalar, items))
    return _scalar(value)


def _scalar(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _conversations(found: Sequence[Mapping[str, str]]) -> str:
    """What `search_history` of the default agent found: what was said, or whole conversations."""
    if all("title" in item for item in found):
        lines = [f"- {item.get('when', '')}: {_one_line(item['title'])}" for item in found]
        return "\n".join(["Lately we have talked about:", *lines])
    said = {"user": "you said", "assistant": "I said"}
    lines = [
        f"- {item.get('when', '')}, {said.get(item.get('role', ''), 'it was said')}: "
        f"{_one_line(item.get('text', ''))}"
        for item in found
    ]
    return "\n".join(["I found this in your earlier conversations:", *lines])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    kept = text[:_LONGEST].rsplit(maxsplit=1)[0]
    return f"{kept} …\n\n(These are the first {len(kept):,} of {len(text):,} characters.)"
