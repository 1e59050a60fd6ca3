"""For those who test agents, and for benchmarks: a model that does what it is told, and orphans."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

import trio

from creche._background import open_background
from creche._errors import ModelError
from creche._messages import Message, ToolMessage, UserMessage, text_of
from creche._models import ModelPart, TextDelta, ToolCallRequest, ToolSpec, Usage
from creche._orphans import assert_no_orphans

__all__ = ["Directives", "Pacer", "ScriptedModel", "assert_no_orphans", "open_pacer"]

_NUMBER: Final = re.compile(r"\d{1,9}(?:\.\d+)?")
_TOOL: Final = re.compile(r"[A-Za-z_][\w.-]*")
_SLOT: Final = 0.001  # seconds; wakes within the same slot cost one timer together
_DEFAULT_TOKENS: Final = 20
_DIRECTIVE: Final = re.compile(
    r"(?<!\S)(?:(?P<key>tokens|delay_ms)=(?P<number>\S*)"
    r"|tool=(?P<tool>[^\s:]*)(?P<rest>.*)"
    r"|fail=(?P<message>.*)"
    r"|(?P<hang>hang)(?!\S))",
    re.DOTALL,
)


class Pacer:
    """Wakes many sleepers with one timer, in slots of 1 ms.

    A `trio.sleep` costs 16 µs a wake; paced streams of a thousand runs would measure that.
    """

    def __init__(self) -> None:
        self._slots: dict[int, trio.lowlevel.ParkingLot] = {}  # {slot number: who sleeps}
        self._earlier = trio.Event()

    async def sleep(self, seconds: float) -> None:
        """Sleep for at least `seconds`, to the end of a slot."""
        slot = math.ceil((trio.current_time() + seconds) / _SLOT)
        if not self._slots or slot < min(self._slots):
            self._earlier.set()
        await self._slots.setdefault(slot, trio.lowlevel.ParkingLot()).park()

    async def serve(self) -> None:
        """Wake whoever is due, until cancelled."""
        while True:
            self._earlier = trio.Event()
            next_slot = min(self._slots, default=math.inf)
            with trio.move_on_at(next_slot * _SLOT):
                await self._earlier.wait()
            # A millionth of a slot early is in time: 2001 * 0.001 / 0.001 is less than 2001.
            due = math.floor(trio.current_time() / _SLOT + 1e-6)
            for slot in sorted(slot for slot in self._slots if slot <= due):
                self._slots.pop(slot).unpark_all()


@contextlib.asynccontextmanager
async def open_pacer() -> AsyncIterator[Pacer]:
    """A pacer, its one task alive for as long as the block."""
    async with open_background() as nursery:
        pacer = Pacer()
        nursery.start_soon(pacer.serve)
        try:
            yield pacer
        finally:
            nursery.cancel_scope.cancel()


class Directives:
    """What the last user message tells the scripted model to do.

    Raises ModelError for a directive that says nothing: a test that relies on it would else
    pass for another reason.
    """

    def __init__(self, text: str) -> None:
        self.tokens = _DEFAULT_TOKENS
        self.delay = 0.0  # seconds between deltas
        self.tool: tuple[str, str] | None = None  # its name, and its arguments' JSON
        self.failure: str | None = None
        self.hang = False
        position = 0
        while match := _DIRECTIVE.search(text, position):
            position = match.end()
            if match["key"] == "tokens":
                self.tokens = int(_number(match))
            elif match["key"] == "delay_ms":
                self.delay = _number(match) / 1000
            elif match["tool"] is not None:
                arguments = _json_object(match["rest"].removeprefix(":"))
                if not (_TOOL.fullmatch(match["tool"]) and match["rest"][:1] == ":" and arguments):
                    msg = f"the script's tool={match['tool']} needs a name and JSON: tool=NAME:{{}}"
                    raise ModelError(msg)
                self.tool = (match["tool"], arguments)
                position = match.start("rest") + 1 + len(arguments)
            elif match["hang"]:
                self.hang = True
            else:
                self.failure = match["message"].strip() or "the script says so"


def _number(match: re.Match[str]) -> float:
    if not _NUMBER.fullmatch(match["number"]):
        msg = f"the script's {match['key']}={match['number']} needs a number, such as 20"
        raise ModelError(msg)
    return float(match["number"])


def _json_object(text: str) -> str:
    """The JSON object that `text` begins with, or its first word where it begins with none."""
    depth, quoted, escaped = 0, False, False
    for position, character in enumerate(text):
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        if depth == 0 and not quoted and (character in "}]" or character.isspace()):
            return text[: position + 1].rstrip()
    return text


class ScriptedModel:
    """A deterministic model that obeys directives in the last user message.

    - `tokens=N`: answer with N deltas, `tok0 `, `tok1 `, ... (20 if it is not said)
    - `delay_ms=D`: wait D milliseconds before each
    - `tool=NAME:JSON`: call that tool first, then answer with its result in the text
    - `fail=MESSAGE`: raise ModelError(MESSAGE) in mid-stream, after half of the deltas; it
      takes the rest of the message, so it comes last
    - `hang`: never answer

    A directive that cannot be read (`tokens=many`, `tool=add` without JSON) is a ModelError.
    """

    name = "scripted"

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer

    @contextlib.asynccontextmanager
    async def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        """See `Model.open_stream`; which tools there are makes no difference to it."""
        del tools
        async with contextlib.aclosing(self._parts(messages)) as parts:
            yield parts

    async def _parts(self, messages: Sequence[Message]) -> AsyncGenerator[ModelPart]:
        asked = max(
            (at for at, message in enumerate(messages) if isinstance(message, UserMessage)),
            default=-1,
        )
        directives = Directives(text_of(messages[asked]) if asked >= 0 else "")
        results = [m for m in messages[asked + 1 :] if isinstance(m, ToolMessage)]
        if directives.hang:
            await trio.sleep_forever()
        if directives.tool is not None and not results:
            name, arguments = directives.tool
            yield ToolCallRequest(name, arguments)
            return
        for result in results:
            yield TextDelta(f"{result.content} ")
        for number in range(directives.tokens):
            if directives.failure is not None and number >= directives.tokens // 2:
                raise ModelError(directives.failure)
            if directives.delay:
                await self._pacer.sleep(directives.delay)
            yield TextDelta(f"tok{number} ")
        if directives.failure is not None:
            raise ModelError(directives.failure)
        yield Usage(len(messages), directives.tokens)
