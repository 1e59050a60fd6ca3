"""llama.cpp in this process: a request runs in a thread, and its chunks are an async iterator."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Protocol, cast

import outcome
import trio

from creche import ModelError

Chunk = dict[str, Any]  # as in OpenAI's streams, plus `prompt_progress`; or {"error": {...}}

_STOP_TIMEOUT: Final = 2.0  # seconds in which the next token, or batch of prompt, must come
# How much of a prompt is read between two looks at the stop flag, in tokens. llama.cpp's default
# of 2048 is a matter of ten seconds on a slow CPU; a sixth of its speed is the price.
_BATCH: Final = 64
_PROMPT_CACHE: Final = 128  # MiB of prompts already read; llama.cpp's default is 8192
_LEAST_ROOM: Final = 256  # tokens of context that a prompt must leave for the answer

# `return_progress` calls back while the prompt is being read, too, so that can be stopped as well.
_STREAMED: Final = {  # creche: shared only read; JSON's encoder takes no proxies
    "stream": True,
    "return_progress": True,
    "stream_options": {"include_usage": True},
}


class Engine(Protocol):
    """As much of xllamacpp.Server, which has no types, as is used here.

    A call blocks its thread until the answer has ended or the callback has returned True. An
    exception in the callback would be lost. Errors come as a chunk.
    """

    def handle_completions(
        self, request: dict[str, Any], callback: Callable[[Chunk], bool], /
    ) -> object:
        """Go on from `request["prompt"]`."""
        ...

    def handle_chat_completions(
        self, request: dict[str, Any], callback: Callable[[Chunk], bool], /
    ) -> object:
        """Answer `request["messages"]`, put into words by the model's own template."""
        ...


class PromptTooLongError(Exception):
    """The prompt has `tokens` tokens, and only `limit` would leave room for an answer."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"{tokens} tokens are more than {limit}")
        self.tokens = tokens
        self.limit = limit


@contextlib.asynccontextmanager
async def open_llama(path: Path, *, slots: int, context: int) -> AsyncIterator[Llama]:
    """Load the model in a GGUF file, in a thread, and have it until the block is left.

    `slots` requests can run at once, each with `context` tokens of memory; more wait.

    Resource handling: a request that does not stop in time keeps its thread, its slot and the
    model's memory until it does.

    Error handling: raises ModelError if llama.cpp is missing or the model won't load.
    """
    llama = Llama(await trio.to_thread.run_sync(_load, path, slots, context), slots, context)
    try:
        yield llama
    finally:
        llama.close()


class Llama:
    """A model that is loaded, and its slots."""

    def __init__(self, engine: Engine, slots: int, context: int) -> None:
        self._engine: Engine | None = engine
        self._slots = trio.CapacityLimiter(slots)
        self.context = context  # tokens that one request can have, its answer included

    @property
    def idle(self) -> bool:
        """Whether no request is running, not even one that does not stop when it should."""
        return self._slots.borrowed_tokens == 0

    def close(self) -> None:
        """Free the model's memory, once no request holds it. Nothing can be asked after that."""
        self._engine = None

    @contextlib.asynccontextmanager
    async def open_chunks(
        self, kind: Literal["chat", "text"], request: Mapping[str, Any]
    ) -> AsyncIterator[AsyncIterator[Chunk]]:
        """Run one request, once a slot is free; its chunks, until the block is left.

        Leaving the block stops it at its next token, or next batch of the prompt.

        Iterating raises PromptTooLongError before the prompt is read, and ModelError for
        whatever goes wrong in llama.cpp.
        """
        if (engine := self._engine) is None:
            msg = "the local model is closed"
            raise ModelError(msg, code="model_unavailable")
        handle = engine.handle_chat_completions if kind == "chat" else engine.handle_completions
        call = functools.partial(handle, {**request, **_STREAMED})
        async with _open_thread(call, self._slots) as chunks:
            async with contextlib.aclosing(self._checked(chunks)) as checked:
                yield checked

    async def _checked(self, chunks: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
        limit = self.context - _LEAST_ROOM
        async for chunk in chunks:
            if (error := chunk.get("error")) is not None:
                if error.get("type") == "exceed_context_size_error":
                    raise PromptTooLongError(error["n_prompt_tokens"], limit)
                msg = f"the local model failed: {error.get('message', 'no reason given')}"
                raise ModelError(msg)
            tokens = chunk.get("prompt_progress", {}).get("total", 0)
            if tokens > limit:
                raise PromptTooLongError(tokens, limit)
            yield chunk


@contextlib.asynccontextmanager
async def _open_thread(
    call: Callable[[Callable[[Chunk], bool]], object],
    slots: trio.CapacityLimiter,
) -> AsyncIterator[AsyncIterator[Chunk]]:
    """Run `call(on_chunk)` in a thread once a slot is free; iterate over what it passes on.

    Not `trio.to_thread.run_sync`: that wants a task of its own beside the reader's, so a nursery
    around the reader, which would wrap every error of the reader in an exception group.

    Resource handling: leaving the block makes `on_chunk` return True, and waits, shielded but
    not for ever, until the thread has ended. The slot is given back when it really has.
    """
    send, receive = trio.open_memory_channel[Chunk](math.inf)  # as many as the longest answer
    token = trio.lowlevel.current_trio_token()
    stop = threading.Event()
    ended = trio.Event()
    borrower = object()

    def deliver(chunk: Chunk) -> None:  # in Trio's thread, where nothing may be raised
        with contextlib.suppress(trio.BrokenResourceError):  # the reader has left
            send.send_nowait(chunk)

    def on_chunk(chunk: Chunk) -> bool:  # in the other thread
        try:
            token.run_sync_soon(deliver, chunk)
        except trio.RunFinishedError:
            return True
        return stop.is_set()

    def finish(result: outcome.Outcome[object]) -> None:  # in Trio's thread, after every deliver
        if isinstance(result, outcome.Error):
            deliver({"error": {"message": str(result.error)}})
        send.close()
        slots.release_on_behalf_of(borrower)
        ended.set()

    def on_end(result: outcome.Outcome[object]) -> None:  # in the other thread
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(finish, result)

    await slots.acquire_on_behalf_of(borrower)
    try:  # no checkpoint between having the slot and the start, or a cancel would lose it
        trio.lowlevel.start_thread_soon(  # creche: shared this block ends it, and waits for it
            functools.partial(call, on_chunk), on_end, "local model"
        )
    except RuntimeError as error:
        slots.release_on_behalf_of(borrower)
        msg = "there is no thread to be had for the local model"
        raise ModelError(msg) from error
    try:
        with receive:
            yield receive
    finally:
        stop.set()
        with trio.move_on_after(_STOP_TIMEOUT, shield=True):
            await ended.wait()


def _load(path: Path, slots: int, context: int) -> Engine:
    with _sleeping_threads():
        try:
            library: Any = importlib.import_module("xllamacpp")
        except ImportError as error:
            msg = "llama.cpp is not installed; in a checkout: pip install '.[server]'"
            raise ModelError(msg, code="model_unavailable") from error
    parameters = library.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = slots * context
    parameters.n_parallel = slots
    parameters.n_batch = parameters.n_ubatch = _BATCH
    parameters.cache_ram_mib = _PROMPT_CACHE
    parameters.warmup = False
    parameters.verbosity = -1  # or it tells its life on stderr
    parameters.ui = parameters.endpoint_slots = False
    parameters.n_threads_http = 1
    # llama.cpp's server listens for HTTP, too, and lets everybody in. Nobody finds a socket in a
    # folder that is ours alone, and gone as soon as it listens.
    with tempfile.TemporaryDirectory(prefix="creche-") as folder:
        parameters.hostnames = [f"{folder}/unused.sock"]
        try:
            return cast("Engine", library.Server(parameters))
        except RuntimeError as error:
            msg = f"the local model could not be loaded from {path.name}"
            raise ModelError(msg, code="model_unavailable") from error


@contextlib.contextmanager
def _sleeping_threads() -> Iterator[None]:
    """Make OpenMP's threads sleep while they wait for each other, if it is loaded in this block.

    They spin otherwise, and where other processes want the cores, too, the model is then twenty
    times slower. OpenMP reads this variable once, when its library is loaded.
    """
    name = "OMP_WAIT_POLICY"
    if name in os.environ:
        yield
        return
    os.environ[name] = "passive"  # creche: shared OpenMP reads it nowhere else, and only on load
    try:
        yield
    finally:
        del os.environ[name]  # creche: shared it is put back as it was
