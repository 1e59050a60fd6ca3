"""With what arguments the local model calls a tool: read off the message, or asked for. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from creche import ToolSpec
from creche_server.models import local_examples
from creche_server.models.local_examples import examples_of, one_line
from creche_server.words import phrases

LONGEST_MESSAGE: Final = 1500  # characters; a longer message is no question for a tool

_SUM: Final = re.compile(
    r"(?<![\w.])[(\s]*\d+(?:\.\d+)?(?:[\s()]*(?:\*\*|[-+*/^×÷])[\s()]*\d+(?:\.\d+)?)+(?:\s*\))*(?![\w])"  # noqa: RUF001
)
# What narrows a schema already, or makes it ask for what nobody says in so many words.
_NARROWER: Final = frozenset({"enum", "const", "format", "pattern", "minLength", "maxLength"})
_NUMBERS: Final = frozenset({"number", "integer"})
_NUMBER_WORDS: Final = MappingProxyType(
    {
        "one": 1,
        "two": 2,
        "three": 3,
        "four": 4,
        "five": 5,
        "six": 6,
        "seven": 7,
        "eight": 8,
        "nine": 9,
        "ten": 10,
        "eleven": 11,
        "twelve": 12,
    }
)
_LONGEST_NUMBER: Final = 15  # digits


def arguments_prompt(tool: ToolSpec, message: str) -> str:
    """Ends where the JSON of the arguments would follow."""
    examples = examples_of(tool, local_examples.EXAMPLES) + examples_of(
        tool, local_examples.MORE_ARGUMENTS
    )
    shots = [(m, tool.name, a) for m, a in examples]
    if not shots:  # a tool that we have no example of sees how others are called
        shots = [
            (m, name, a) for name, all_ in local_examples.EXAMPLES.items() for m, a in all_[-2:]
        ]
    told = "".join(f"Message: {m}\n{n}: {json.dumps(a)}\n\n" for m, n, a in shots)
    about = f"{tool.name}: {one_line(tool.description)}\n\n"
    return f"{about}{told}Message: {one_line(message, LONGEST_MESSAGE)}\n{tool.name}:"


def arguments_at_sight(tool: ToolSpec, message: str) -> str | None:
    """JSON for the arguments where they stand in the message: the one sum in it; else None."""
    if tool.name != "calculator" or not examples_of(tool, local_examples.EXAMPLES):
        return None
    sums = [found[0].strip() for found in _SUM.finditer(message)]
    if len(sums) != 1 or sums[0].count("(") != sums[0].count(")"):
        return None
    if set(re.findall(r"\d+(?:\.\d+)?", message)) != set(re.findall(r"\d+(?:\.\d+)?", sums[0])):
        return None  # there is more to it
    return json.dumps({"expression": sums[0].replace("×", "*").replace("÷", "/")})  # noqa: RUF001


def arguments_schema(tool: ToolSpec, message: str) -> dict[str, Any]:
    """The tool's own schema, closed to other keys, and on one line as in the examples.

    For a tool that we have no example of, words and numbers must stand in the message: the model
    would rather use those that it saw in the examples.
    """
    schema = {"additionalProperties": False, **tool.parameters}
    if not examples_of(tool, local_examples.EXAMPLES):
        properties: Mapping[str, Any] = tool.parameters.get("properties", {})
        counts = any(property_.get("type") in _NUMBERS for property_ in properties.values())
        said = [phrase for phrase in phrases(message) if not (counts and re.search(r"\d", phrase))]
        schema["properties"] = {
            name: _narrowed(property_, said, message) for name, property_ in properties.items()
        }
    return {
        **schema,
        # Read by llguidance, which compiles the schema; without it the model may indent for ever.
        "x-guidance": {
            "whitespace_flexible": False,
            "key_separator": ": ",
            "item_separator": ", ",
        },
    }


def _narrowed(schema: Mapping[str, Any], said: Sequence[str], message: str) -> Mapping[str, Any]:
    """The schema of a word or a number, narrowed to what the message says if it says any."""
    kind = schema.get("type")
    values: Sequence[str | int | float] = ()
    if schema.keys() & _NARROWER:
        pass
    elif kind == "string":
        values = said
    elif kind in _NUMBERS:
        values = [n for n in _numbers_in(message) if kind == "number" or isinstance(n, int)]
    return {**schema, "enum": values} if values else schema


def _numbers_in(message: str) -> list[int | float]:
    lower = message.lower()
    words = [number for word, number in _NUMBER_WORDS.items() if re.search(rf"\b{word}\b", lower)]
    digits = re.findall(r"\d+(?:\.\d+)?", message.replace(",", ""))
    short = [text for text in digits if len(text) <= _LONGEST_NUMBER]
    found = [float(text) if "." in text else int(text) for text in short]
    return list(dict.fromkeys([*found, *words]))
