"""The chat completions API as it is on the wire: our messages in its words, its stream in ours."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final

import msgspec

from creche import (
    AssistantMessage,
    Message,
    ModelError,
    SystemMessage,
    ToolCallRequest,
    ToolMessage,
    ToolSpec,
    Usage,
    UserMessage,
)

# --- what is sent


def wire_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, as JSON objects."""
    return [_wire_message(message) for message in messages]


def wire_tools(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """The tools, as JSON objects."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
            },
        }
        for tool in tools
    ]


def _wire_message(message: Message) -> dict[str, Any]:
    match message:
        case SystemMessage():
            return {"role": "system", "content": message.content}
        case UserMessage():
            wire = {"role": "user", "content": message.content}
            # A name of any other form would have the whole request refused.
            if message.name and re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", message.name):
                wire["name"] = message.name
            return wire
        case ToolMessage():
            return {
                "role": "tool",
                "tool_call_id": message.tool_call_id,
                "content": message.content or message.error or "",
            }
        case AssistantMessage(tool_calls=()):
            return {"role": "assistant", "content": message.content or ""}
        case AssistantMessage():
            calls = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": call.function.arguments or "{}",
                    },
                }
                for call in message.tool_calls
            ]
            return {"role": "assistant", "content": message.content, "tool_calls": calls}


# --- what comes back


class EventSplitter:
    """Cuts what is received into the data of server-sent events, as far as `[DONE]`.

    Lines end with LF, maybe after a CR; the other characters that Unicode takes for a line's end
    may stand in JSON. (HTML, "Server-sent events", section 9.2.6.)
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self.done = False

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The events that `received` completes."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            name, _, value = line.removesuffix(b"\r").partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not name and not value and self._data:  # an empty line, not a comment
                event = b"\n".join(self._data)
                self._data.clear()
                self.done = self.done or event.strip() == b"[DONE]"
                if not self.done:
                    yield event


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Fragment(msgspec.Struct):
    """A piece of a tool call."""

    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Fragment] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    finish_reason: str | None = None


class _TokenCount(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    code: Any = None


class _Chunk(msgspec.Struct):
    """As much of a chat.completion.chunk as is used; other keys are let pass."""

    choices: list[_Choice] | None = None  # one, or none beside the usage
    usage: _TokenCount | None = None
    error: _Error | None = None


_decoder: Final = msgspec.json.Decoder(_Chunk)


class Answer:
    """One answer, put together from its chunks."""

    def __init__(self) -> None:
        # {(index, how many calls had it before): [id, name, arguments]}
        self._calls: dict[tuple[int, int], list[str]] = {}
        self._turns: dict[int, int] = {}  # {index: how many calls had it before the latest}
        self._usage: Usage | None = None
        self._reason: str | None = None

    def take(self, data: bytes) -> str:
        """The words that a chunk adds. Raises ModelError if it is none, or an error."""
        try:
            chunk = _decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeError) as error:
            msg = "the model endpoint sent something that is not a chat completion"
            raise ModelError(msg, code="model_malformed") from error
        if chunk.error is not None:
            msg = f"the model endpoint broke off with an error{error_word(chunk.error.code)}"
            raise ModelError(msg, code="model_broke_off")
        if chunk.usage is not None:
            self._usage = Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        text = ""
        for choice in chunk.choices or ():
            for fragment in choice.delta.tool_calls or ():
                self._add(fragment)
            self._reason = choice.finish_reason or self._reason
            text += choice.delta.content or choice.delta.refusal or ""  # a refusal is words, too
        return text

    def rest(self) -> Iterator[ToolCallRequest | Usage]:
        """What is known at the end: the tool calls in the model's order, and what it all cost.

        Raises ModelError if the answer has not come to its end.
        """
        if self._reason is None:
            msg = "the model endpoint broke off in the middle of its answer"
            raise ModelError(msg, code="model_broke_off")
        if self._reason == "content_filter":
            msg = "the model endpoint's content filter stopped the answer"
            raise ModelError(msg, code="content_filter")
        for _, (call_id, name, arguments) in sorted(self._calls.items()):
            yield ToolCallRequest(name, arguments or "{}", call_id or None)
        if self._usage is not None:
            yield self._usage

    def _add(self, fragment: _Fragment) -> None:
        index = fragment.index or 0
        turn = self._turns.get(index, 0)
        call = self._calls.setdefault((index, turn), ["", "", ""])
        if fragment.id and call[0] and fragment.id != call[0]:
            # Some endpoints give whole calls, one a chunk, and all of them the index 0.
            self._turns[index] = turn = turn + 1
            call = self._calls[index, turn] = ["", "", ""]
        call[0] = call[0] or fragment.id or ""
        if fragment.function is not None:
            call[1] += fragment.function.name or ""
            call[2] += fragment.function.arguments or ""


def error_word(code: object) -> str:
    """An error's code behind a comma, if it is a word such as `context_length_exceeded`."""
    known = isinstance(code, str) and re.fullmatch(r"[a-z][a-z_]{2,63}", code)
    return f", {code}" if known else ""


# --- asking again


def may_pass(status: int, code: object) -> bool:
    """Whether a refusal may be another answer in a moment; an account that is empty stays so."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return code != "insufficient_quota"
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """The seconds for which the endpoint asks to be left alone; None where it does not say.

    `now` is in seconds since the epoch, for an endpoint that gives a date. (RFC 9110, section
    10.2.3; `retry-after-ms` is a habit of the provider's.)
    """
    with contextlib.suppress(KeyError, ValueError):
        return _seconds(float(headers["retry-after-ms"]) / 1000)
    told = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return _seconds(float(told))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(told).timestamp() - now)
    return None


def _seconds(told: float) -> float:
    if not 0 <= told < math.inf:
        msg = "no length of time"
        raise ValueError(msg)
    return told
