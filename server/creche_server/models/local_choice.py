"""Which tool a message needs: what the local model is asked, and what is made of it. No I/O.

SmolLM2-135M's chat template knows no tools, and asked outright to pick one it guesses. What
it does well is to continue a pattern. So a list of messages, each with the tool that it needs,
ends with the user's message, and what counts is how likely each tool's name is as the next
word. A small model also likes some words better than others whatever the message is; so each
likelihood is measured against what the same tool gets for messages that plainly need none
(contextual calibration: Zhao et al. 2021, "Calibrate Before Use"). What the message has in
common with what its author wrote of a tool is evidence beside that.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from creche import ToolSpec
from creche_server.models import local_examples
from creche_server.models.local_examples import examples_of, one_line
from creche_server.words import is_pleasantry, shared, stems

NO_TOOL: Final = "talk"  # the label for a message that needs no tool

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
# Ways of saying things that a tool of this name is for, whatever else they speak of.
_CUES: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "calculator": re.compile(r"\d\s*[-+*/^×÷]\s*\(?\s*\d"),  # noqa: RUF001
        "clock": re.compile(
            r"\b(?:what|which) (?:time|day|date)\b|\b(?:time|day|date) (?:is it|in|now)\b"
            r"|\btoday'?s date",
            re.IGNORECASE,
        ),
        "search_history": re.compile(
            r"\b(?:did|have|had) (?:i|we)\b|\b(?:i|we) (?:\w+ )?(?:said|told|mentioned|talked)\b"
            r"|\b(?:earlier|old|past|previous|our|my) (?:chat|conversation)s?\b",
            re.IGNORECASE,
        ),
    }
)
# With these a tool's name begins that says by its other words what it is about.
_VERBS: Final = frozenset(
    {"ask", "check", "fetch", "find", "get", "look", "lookup", "query", "read", "show", "tell"}
)
# How far above the baseline a tool must be, and what counts for it besides. All were chosen on
# questions other than those of benchmarks/local_model.py.
_SPREAD: Final = 1.5  # standard deviations
_MARGIN: Final = 1.0  # nats
_NAMED: Final = 1.0  # nats in favour of a tool if the telling words of its name are in the message
_IN_NAME: Final = 0.5  # nats if only some of them are
_CUED: Final = 1.5  # nats in favour of a tool whose cue is in the message
_SHARED: Final = (1.2, 0.6)  # nats for the first and for the second word that they have in common
_NOTHING_SHARED: Final = -0.5  # nats
_ALONE: Final = 0.5  # nats for the one tool of an agent whose instructions speak of it
_LONGEST_DESCRIPTION: Final = 120  # characters of what a tool does that a choice is told
_UNSEEN: Final = -20.0  # the log-likelihood of a label that is not among the likeliest tokens


def choice_prefix(tools: Sequence[ToolSpec], instructions: str = "") -> str:
    """The part of the choice's prompt that is the same for every message, so is kept in cache."""
    named = labels(tools)
    columns = [[(told, named[tool.name]) for told in _shown(tool, instructions)] for tool in tools]
    # About twice as many as the most that a tool has: fewer, and it would call tools for nothing.
    columns.append([(told, NO_TOOL) for told in _TALK[: 2 * max(map(len, columns))]])
    shots: list[tuple[str, str]] = []
    rows = max(map(len, columns))
    for row in range(rows):  # interleaved: a small model overrates what it saw last
        for column in columns:
            shots += column[row * len(column) // rows : (row + 1) * len(column) // rows]
    return "".join(f"Message: {message}\nTool: {label}\n\n" for message, label in shots)


def choice_prompt(prefix: str, message: str) -> str:
    """Ends where the label of the tool would follow."""
    return f"{prefix}Message: {one_line(message)}\nTool:"


def labels(tools: Sequence[ToolSpec]) -> dict[str, str]:
    """{tool's name: what a choice calls it}.

    A name says least by its first word if that is "get" or "tell", and the first is what counts.
    """
    found: dict[str, str] = {}
    for tool in tools:
        words = tool.name.split("_")
        while len(words) > 1 and words[0].lower() in _VERBS:
            words = words[1:]
        label = " ".join(filter(None, words)) or tool.name
        known = bool(examples_of(tool, local_examples.EXAMPLES))
        found[tool.name] = tool.name if known or label == NO_TOOL else label
    taken = list(found.values())
    return {name: label if taken.count(label) == 1 else name for name, label in found.items()}


def log_odds(tools: Sequence[ToolSpec], likelihoods: Mapping[str, float]) -> dict[str, float]:
    """{tool's name: how much likelier than no tool}, from {token: log-likelihood}.

    A label is judged by its first token.
    """
    none = _likelihood(NO_TOOL, likelihoods)
    return {name: _likelihood(label, likelihoods) - none for name, label in labels(tools).items()}


def rivals(chosen: str, tools: Sequence[ToolSpec], likelihoods: Mapping[str, float]) -> list[str]:
    """The names whose labels begin with the same token as the chosen one's, which is among them."""
    named = labels(tools)
    first = _first_token(named[chosen], likelihoods)
    return [name for name, label in named.items() if _first_token(label, likelihoods) == first]


def one_of(labels: Iterable[str]) -> str:
    """GBNF: one of these labels, as it follows the prompt of a choice."""
    return f"root ::= {' | '.join(literal(f' {label}') for label in labels)}"


def literal(text: str) -> str:
    """GBNF: just this text, which must be printable."""
    return json.dumps(text, ensure_ascii=False)


def evidence(tools: Sequence[ToolSpec], instructions: str, message: str) -> dict[str, float]:
    """{tool's name: nats in its favour} from the words of the message alone.

    A tool that we have examples of is known by them; any other by the words of its name, its
    description, its parameters, and what the instructions say of it.
    """
    asked = stems(message)
    found: dict[str, float] = {}
    for tool in tools:
        name = stems(tool.name)
        named = shared(name, asked)
        nats = _NAMED if named and named == name else _IN_NAME if named else 0.0
        if examples_of(tool, local_examples.EXAMPLES):
            cue = _CUES.get(tool.name)
            nats += _CUED if cue and cue.search(message) else 0.0
        else:
            mentions = " ".join(_mentions(tool, instructions))
            about = stems(" ".join([tool.name, tool.description, mentions, *_parameters(tool)]))
            common = shared(asked, about)
            nats += sum(_SHARED[: len(common)]) if common else _NOTHING_SHARED
            nats += _ALONE if mentions and len(tools) == 1 else 0.0
        found[tool.name] = nats
    return found


def thresholds(references: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """{tool's name: log-odds that a choice must exceed}, from the log-odds of the REFERENCES."""
    found: dict[str, float] = {}
    for name in references[0]:
        scores = [odds[name] for odds in references]
        found[name] = statistics.fmean(scores) + _SPREAD * statistics.pstdev(scores) + _MARGIN
    return found


def is_talk(message: str, evidence: Mapping[str, float]) -> bool:
    """Whether a message plainly wants no tool: it is polite, and no tool is known by its words."""
    return is_pleasantry(message) and all(nats < _SHARED[0] for nats in evidence.values())


def choose(
    odds: Mapping[str, float], thresholds: Mapping[str, float], evidence: Mapping[str, float]
) -> str | None:
    """The tool that stands out from its own threshold; None: no tool does.

    If several do, it is the one that most evidence speaks for, then the one that stands out most:
    of two tools of one trade, the words of the message tell better which is meant.
    """
    excess = {name: value - thresholds[name] + evidence[name] for name, value in odds.items()}
    standing = [name for name in excess if excess[name] > 0]
    return max(standing, key=lambda name: (evidence[name], excess[name]), default=None)


def _shown(tool: ToolSpec, instructions: str) -> list[str]:
    """Messages for which the tool is shown to be called."""
    if examples := examples_of(tool, local_examples.EXAMPLES):
        return [message for message, _ in examples]
    words = " ".join(tool.name.split("_"))
    (label,) = labels([tool]).values()
    mentions = [mention.replace(tool.name, words) for mention in _mentions(tool, instructions)]
    return [
        one_line(text, _LONGEST_DESCRIPTION)
        for text in (tool.description or words, f"What about the {label}?", *mentions[:1])
    ]


def _mentions(tool: ToolSpec, instructions: str) -> list[str]:
    """The sentences of the instructions that name the tool."""
    sentences = re.split(r"(?<=[.!?])\s+", instructions)
    return [sentence for sentence in sentences if tool.name in re.findall(r"\w+", sentence)]


def _parameters(tool: ToolSpec) -> list[str]:
    """What is said of the tool's parameters: names, descriptions and the values to choose from."""
    properties: Mapping[str, Mapping[str, Any]] = tool.parameters.get("properties", {})
    return [
        str(said)
        for name, schema in properties.items()
        for said in (name, schema.get("description", ""), *schema.get("enum", ()))
    ]


def _first_token(label: str, likelihoods: Mapping[str, float]) -> str | None:
    """The longest of the tokens that the label begins with, if there is one."""
    word = f" {label}"
    tokens = [token for token in likelihoods if token.strip() and word.startswith(token)]
    return max(tokens, key=len, default=None)


def _likelihood(label: str, likelihoods: Mapping[str, float]) -> float:
    token = _first_token(label, likelihoods)
    return _UNSEEN if token is None else likelihoods[token]
