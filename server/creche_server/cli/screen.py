"""What a conversation looks like on a terminal; what others wrote is never obeyed by it.

A model's words, a tool's name and a result may hold rich's markup or a terminal's control
codes. The one is not read as such, the others are left out.
"""

from __future__ import annotations

import re
from typing import Final

from rich.console import Console
from rich.status import Status
from rich.text import Text

_LONGEST_SHOWN: Final = 400  # characters of a tool's arguments or result
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all of C0 and C1 but \t and \n


def printable(text: str) -> str:
    """The text without control characters, but for newlines and tabs."""
    return _CONTROL.sub("", text)


class Screen:
    """What is printed, and where to.

    The answer's words go to stdout; everything about them goes there, too, if that is a
    terminal, and to stderr otherwise.
    """

    def __init__(self) -> None:
        self._out = Console(soft_wrap=True, highlight=False)
        self._aside = (
            self._out
            if self._out.is_terminal
            else Console(stderr=True, soft_wrap=True, highlight=False)
        )

    def waiting(self, words: str) -> Status:
        """A line that moves, until it is stopped."""
        return self._aside.status(words)

    def answer(self, text: str) -> None:
        """Words of the answer, without the end of a line."""
        self._out.print(Text(printable(text)), end="")

    def end_of_line(self) -> None:
        self._out.print()

    def question(self, text: str) -> None:
        """What was asked before."""
        self._out.print(Text.assemble("\n", ("you> ", "bold"), printable(text)))

    def asked(self, text: str) -> None:
        """What a run asks whoever sits here."""
        self._aside.print(Text.assemble("\n", ("? ", "bold yellow"), printable(text)))

    def prompt(self, words: str) -> None:
        """Before what is typed, without the end of a line."""
        self._aside.print(Text(printable(words), "bold"), end="")
        self._aside.file.flush()

    def note(self, words: str) -> None:
        """Something about the conversation, not of it."""
        self._aside.print(Text(printable(words), "dim"))

    def problem(self, words: str, style: str, details: str) -> None:
        """How an answer came to an end that was not its own."""
        self._aside.print(
            Text.assemble("\n", (printable(words), style), (f" {printable(details)}", "dim"))
        )

    def call(self, name: str, arguments: str) -> None:
        self._tool("→", name, arguments)

    def result(self, name: str, content: str) -> None:
        self._tool("←", name, content)

    def _tool(self, arrow: str, name: str, text: str) -> None:
        shown = printable(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")
        self._aside.print(
            Text.assemble((f"{arrow} {printable(name)}", "cyan"), (f" {shown}", "dim"))
        )
