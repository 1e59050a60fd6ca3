"""What a language model is to creche: something that answers messages with a stream of parts."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from creche._messages import Message


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """The next words of the answer."""

    text: str


class ToolCallRequest(msgspec.Struct, frozen=True, gc=False):
    """The model wants a tool called. `arguments` is the JSON text as it wrote it, maybe faulty."""

    name: str
    arguments: str
    id: str | None = None  # the provider's own, of no meaning here: calls get ids of ours


class Usage(msgspec.Struct, frozen=True, gc=False):
    """What the answer cost, told at most once, at its end."""

    input_tokens: int
    output_tokens: int


ModelPart = TextDelta | ToolCallRequest | Usage


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """What a model is told of a tool. `parameters` is the JSON Schema of its arguments object."""

    name: str
    description: str
    parameters: dict[str, Any]


class Model(Protocol):
    """A language model, shared by all runs, so it holds nothing of any of them.

    Resource handling: the stream is a block. Leaving it, by whatever way, ends the generation:
    the HTTP request is closed, the local model stops at its next token.

    Error handling: raises ModelError, whose message may be told to the client.
    """

    @property
    def name(self) -> str:
        """What to call it in usage and logs."""
        ...

    def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AbstractAsyncContextManager[AsyncIterator[ModelPart]]:
        """Ask for the next answer to `messages`, in which `tools` may be called."""
        ...
