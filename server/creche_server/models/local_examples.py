"""What people say when they need a tool that we know, and the tool's arguments then. Data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from creche import ToolSpec
from creche_server.models.local_turns import harmless, shortened

Examples = dict[str, tuple[tuple[str, dict[str, Any]], ...]]

# What people say when they need a tool of this name, and its arguments then. A tool that is not
# here is introduced by what its author, and its agent's instructions, say of it.
EXAMPLES: Final[Examples] = {  # creche: shared only read; JSON's encoder takes no proxies
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
MORE_ARGUMENTS: Final[Examples] = {  # creche: shared only read; JSON's encoder takes no proxies
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
_LONGEST_LINE: Final = 400  # characters


def examples_of(tool: ToolSpec, examples: Examples) -> list[tuple[str, dict[str, Any]]]:
    """Those whose arguments this tool's own schema knows: its name may be all it shares."""
    known: Mapping[str, Any] = tool.parameters.get("properties", {})
    return [
        (m, arguments)
        for m, arguments in examples.get(tool.name, ())
        if arguments.keys() <= known.keys()
    ]


def one_line(text: str, longest: int = _LONGEST_LINE) -> str:
    """The text without line breaks, which would let it pose as another example."""
    return shortened(" ".join(harmless(text).split()), longest)
