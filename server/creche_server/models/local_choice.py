"""Which tool a message needs, and with what arguments: what the local model is asked. No I/O.

SmolLM2-135M's chat template knows no tools, and asked outright to pick one it guesses. What
it does well is to continue a pattern. So a list of messages, each with the tool that it needs,
ends with the user's message, and what counts is how likely each tool's name is as the next
word. A small model also likes some words better than others whatever the message is; so each
likelihood is measured against what the same tool gets for messages that plainly need none
(contextual calibration: Zhao et al. 2021, "Calibrate Before Use").
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from creche import ToolSpec
from creche_server.models.local_turns import harmless, literal, shortened

NO_TOOL: Final = "talk"  # the label for a message that needs no tool

_Examples = dict[str, tuple[tuple[str, dict[str, Any]], ...]]

# What people say when they need a tool of this name, and its arguments then. A tool that is not
# here is introduced by its description alone, and is used less reliably.
_EXAMPLES: Final[_Examples] = {  # creche: shared only read; JSON's encoder takes no proxies
    "calculator": (
        ("What is 8 * 6?", {"expression": "8 * 6"}),
        ("How much is 15 plus 4.5", {"expression": "15 + 4.5"}),
        ("(2 + 6) / (4 - 1) =", {"expression": "(2 + 6) / (4 - 1)"}),
        ("9 people pay 20 each, what is the total?", {"expression": "9 * 20"}),
    ),
    "clock": (
        ("What time is it in London?", {"timezone": "Europe/London"}),
        ("What's the date?", {"timezone": "UTC"}),
        ("What time is it now", {"timezone": "UTC"}),
        ("Is it Friday?", {"timezone": "UTC"}),
    ),
    "search_history": (
        ("What did I say about my cat last week?", {"query": "cat"}),
        ("Find where I mentioned a recipe", {"query": "recipe"}),
        ("Search our old chats for the word garden", {"query": "garden"}),
        ("Do you remember my brother's name?", {"query": "brother"}),
        ("Did we ever speak of cars?", {"query": "cars"}),
    ),
}
# More of them that show only the arguments: a choice does not get better by them, but slower.
_MORE_ARGUMENTS: Final[_Examples] = {  # creche: shared only read; JSON's encoder takes no proxies
    "calculator": (
        ("what's (9 - 5) * 3?", {"expression": "(9 - 5) * 3"}),
        ("Compute 750 - 180", {"expression": "750 - 180"}),
        ("(12+4)*(6-2)", {"expression": "(12+4)*(6-2)"}),
        ("What's 20% of 60?", {"expression": "20 / 100 * 60"}),
        ("6 * (1 + 8)", {"expression": "6 * (1 + 8)"}),
        ("Divide 50 by 2", {"expression": "50 / 2"}),
        ("what is 6 to the power of 2", {"expression": "6 ** 2"}),
        ("4*(5+9)", {"expression": "4*(5+9)"}),
    ),
    "clock": (
        ("time in New York", {"timezone": "America/New_York"}),
        ("Tell me the date in Tokyo", {"timezone": "Asia/Tokyo"}),
        ("Which day is today?", {"timezone": "UTC"}),
        ("what is the time in Berlin", {"timezone": "Europe/Berlin"}),
        ("Time in Madrid?", {"timezone": "Europe/Madrid"}),
    ),
}
_TALK: Final = (
    "Hi there",
    "Tell me a story",
    "What is the capital of Italy?",
    "Thank you",
    "Write a program that sorts numbers",
    "Who was Einstein?",
    "How are you?",
    "Why is grass green?",
    "Translate 'thank you' into French",
)
# Messages that need no tool and are not among the examples: what they score is the baseline.
REFERENCES: Final = (
    "Hi",
    "Why do cats purr?",
    "Give me some advice",
    "What can I cook tonight?",
    "How is it going?",
    "Who wrote Hamlet?",
    "What is love?",
    "List five animals",
    "Correct this sentence: he go home",
    "Nice to meet you",
)
# How far above the baseline a tool must be. Both were chosen on questions other than those of
# benchmarks/local_model.py.
_SPREAD: Final = 1.5  # standard deviations
_MARGIN: Final = 1.0  # nats
_NAMED: Final = 1.0  # nats in favour of a tool whose name is in the message
_UNSEEN: Final = -20.0  # the log-likelihood of a label that is not among the likeliest tokens

_LONGEST_DESCRIPTION: Final = 120  # characters of what a tool does that a choice is told
_LONGEST_MESSAGE: Final = 400  # characters of the message that a choice looks at


# --- choosing a tool


def choice_prefix(tools: Sequence[ToolSpec]) -> str:
    """The part of the choice's prompt that is the same for every message, so is kept in cache."""
    columns = [
        [(message, tool.name) for message, _ in _examples_of(tool, _EXAMPLES)]
        or [(_one_line(tool.description, _LONGEST_DESCRIPTION), tool.name)]
        for tool in tools
    ]
    columns.append([(message, NO_TOOL) for message in _TALK])
    shots: list[tuple[str, str]] = []
    rows = max(map(len, columns))
    for row in range(rows):  # interleaved: a small model overrates what it saw last
        for column in columns:
            shots += column[row * len(column) // rows : (row + 1) * len(column) // rows]
    return "".join(f"Message: {message}\nTool: {label}\n\n" for message, label in shots)


def choice_prompt(prefix: str, message: str) -> str:
    """Ends where the label of the tool would follow."""
    return f"{prefix}Message: {_one_line(message)}\nTool:"


def log_odds(tools: Sequence[ToolSpec], likelihoods: Mapping[str, float]) -> dict[str, float]:
    """{tool's name: how much likelier than no tool}, from {token: log-likelihood}.

    A label is judged by its first token.
    """
    none = _likelihood(NO_TOOL, likelihoods)
    return {tool.name: _likelihood(tool.name, likelihoods) - none for tool in tools}


def rivals(chosen: str, tools: Sequence[ToolSpec], likelihoods: Mapping[str, float]) -> list[str]:
    """The names that begin with the same token as the chosen one, which is among them."""
    first = _first_token(chosen, likelihoods)
    return [tool.name for tool in tools if _first_token(tool.name, likelihoods) == first]


def one_of(names: Sequence[str]) -> str:
    """GBNF: one of these labels, as it follows the prompt of a choice."""
    return f"root ::= {' | '.join(literal(f' {name}') for name in names)}"


def thresholds(references: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """{tool's name: log-odds that a choice must exceed}, from the log-odds of the REFERENCES."""
    found: dict[str, float] = {}
    for name in references[0]:
        scores = [odds[name] for odds in references]
        found[name] = statistics.fmean(scores) + _SPREAD * statistics.pstdev(scores) + _MARGIN
    return found


def choose(odds: Mapping[str, float], thresholds: Mapping[str, float], message: str) -> str | None:
    """The tool that stands out most from its own threshold; None: no tool does.

    A tool that the message calls by its name has that in its favour.
    """
    words = f" {' '.join(re.findall(r'[a-z0-9]+', message.lower()))} "
    excess = {
        name: value
        - thresholds[name]
        + (_NAMED if f" {name.lower().replace('_', ' ')} " in words else 0.0)
        for name, value in odds.items()
    }
    best = max(excess, key=excess.__getitem__)
    return best if excess[best] > 0 else None


def _first_token(label: str, likelihoods: Mapping[str, float]) -> str | None:
    """The longest of the tokens that the label begins with, if there is one."""
    word = f" {label}"
    tokens = [token for token in likelihoods if token.strip() and word.startswith(token)]
    return max(tokens, key=len, default=None)


def _likelihood(label: str, likelihoods: Mapping[str, float]) -> float:
    token = _first_token(label, likelihoods)
    return _UNSEEN if token is None else likelihoods[token]


# --- its arguments


def arguments_prompt(tool: ToolSpec, message: str) -> str:
    """Ends where the JSON of the arguments would follow."""
    examples = _examples_of(tool, _EXAMPLES) + _examples_of(tool, _MORE_ARGUMENTS)
    shots = [(m, tool.name, a) for m, a in examples]
    if not shots:  # a tool that we have no example of sees how others are called
        shots = [(m, name, a) for name, all_ in _EXAMPLES.items() for m, a in all_[-2:]]
    told = "".join(f"Message: {m}\n{n}: {json.dumps(a)}\n\n" for m, n, a in shots)
    about = f"{tool.name}: {_one_line(tool.description)}\n\n"
    return f"{about}{told}Message: {_one_line(message)}\n{tool.name}:"


def arguments_schema(tool: ToolSpec) -> dict[str, Any]:
    """The tool's own schema, closed to other keys, and on one line as in the examples."""
    return {
        "additionalProperties": False,
        **tool.parameters,
        # Read by llguidance, which compiles the schema; without it the model may indent for ever.
        "x-guidance": {
            "whitespace_flexible": False,
            "key_separator": ": ",
            "item_separator": ", ",
        },
    }


def _examples_of(tool: ToolSpec, examples: _Examples) -> list[tuple[str, dict[str, Any]]]:
    """Those whose arguments this tool's own schema knows: its name may be all it shares."""
    known: Mapping[str, Any] = tool.parameters.get("properties", {})
    return [
        (m, arguments)
        for m, arguments in examples.get(tool.name, ())
        if arguments.keys() <= known.keys()
    ]


def _one_line(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """The text without line breaks, which would let it pose as another example."""
    return shortened(" ".join(harmless(text).split()), longest)
