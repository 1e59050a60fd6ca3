"""How a request to llama.cpp runs, stops and fails; an engine of the tests' own in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from creche import ModelError
from creche_server.models import llama as module
from creche_server.models.llama import Chunk, Llama, PromptTooLongError, open_llama


class StandIn:
    """An engine that calls back until it is told to stop, as llama.cpp does."""

    def __init__(self, act: Callable[[Callable[[Chunk], bool]], None]) -> None:
        self._act = act
        self.requests: list[dict[str, Any]] = []

    def handle_completions(
        self, request: dict[str, Any], callback: Callable[[Chunk], bool], /
    ) -> None:
        self.requests.append(request)
        self._act(callback)

    handle_chat_completions = handle_completions


def saying(*chunks: Chunk) -> StandIn:
    def act(callback: Callable[[Chunk], bool]) -> None:
        for chunk in chunks:
            if callback(chunk):
                return

    return StandIn(act)


class Endless:
    """Goes on until it is stopped, and says when it was."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def __call__(self, callback: Callable[[Chunk], bool]) -> None:
        number = 0
        while not callback({"n": number}):
            number += 1
        self.stopped.set()


async def ask(llama: Llama) -> list[Chunk]:
    with trio.fail_after(10):
        async with llama.open_chunks("chat", {"messages": []}) as chunks:
            return [chunk async for chunk in chunks]


async def test_chunks_come_in_order_and_end_with_the_request():
    engine = saying(*({"n": n} for n in range(100)))
    assert await ask(Llama(engine, slots=1, context=1000)) == [{"n": n} for n in range(100)]
    (request,) = engine.requests
    assert request["stream"] is True
    assert request["return_progress"] is True


async def test_leaving_the_block_stops_the_request_and_gives_the_slot_back():
    endless = Endless()
    llama = Llama(StandIn(endless), slots=1, context=1000)
    with trio.fail_after(10):
        async with llama.open_chunks("chat", {}) as chunks:
            assert await anext(chunks) == {"n": 0}
    assert endless.stopped.is_set()
    assert llama.idle


async def test_a_cancel_stops_the_request():
    endless = Endless()
    llama = Llama(StandIn(endless), slots=1, context=1000)
    with trio.fail_after(10):
        with trio.CancelScope() as scope:
            async with llama.open_chunks("chat", {}) as chunks:
                async for _ in chunks:
                    scope.cancel()
    assert scope.cancelled_caught
    assert endless.stopped.is_set()
    assert llama.idle


async def test_what_the_reader_raises_comes_out_as_it_is():
    llama = Llama(StandIn(Endless()), slots=1, context=1000)
    with trio.fail_after(10):
        with pytest.raises(ZeroDivisionError):
            async with llama.open_chunks("chat", {}):
                raise ZeroDivisionError
    assert llama.idle


async def test_waiting_for_a_slot_can_be_cancelled():
    llama = Llama(StandIn(Endless()), slots=1, context=1000)
    with trio.fail_after(10):
        async with llama.open_chunks("chat", {}):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, llama)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught
    assert llama.idle


async def test_a_request_that_does_not_stop_is_not_waited_for_but_keeps_its_slot(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "_STOP_TIMEOUT", 0.01)
    end = threading.Event()

    def deaf(callback: Callable[[Chunk], bool]) -> None:
        callback({"n": 0})
        end.wait(10)

    llama = Llama(StandIn(deaf), slots=1, context=1000)
    with trio.fail_after(10):
        async with llama.open_chunks("chat", {}) as chunks:
            await anext(chunks)
        assert not llama.idle
        end.set()
        llama = Llama(saying({"n": 1}), slots=1, context=1000)
        assert await ask(llama) == [{"n": 1}]


async def test_a_slot_is_for_one_request_at_a_time():
    running: list[int] = []
    most: list[int] = []
    lock = threading.Lock()

    def act(callback: Callable[[Chunk], bool]) -> None:
        with lock:
            running.append(1)
            most.append(len(running))
        callback({})
        with lock:
            running.pop()

    llama = Llama(StandIn(act), slots=2, context=1000)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask, llama)
    assert len(most) == 10
    assert max(most) <= 2


def failing(callback: Callable[[Chunk], bool]) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (saying({"error": {"message": "bad grammar"}}), "the local model failed: bad grammar"),
        (saying({"error": {}}), "the local model failed: no reason given"),
        (StandIn(failing), "the local model failed: out of memory"),
    ],
)
async def test_what_llama_complains_of_is_a_model_error(engine: StandIn, message: str):
    llama = Llama(engine, slots=1, context=1000)
    with pytest.raises(ModelError) as caught:
        await ask(llama)
    assert caught.value.message == message
    assert llama.idle


@pytest.mark.parametrize(
    "chunk",
    [
        {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 800}},
        {"prompt_progress": {"total": 800, "processed": 0}},  # it would fit, but leave no room
    ],
)
async def test_a_prompt_that_leaves_no_room_for_an_answer_is_told_with_its_length(chunk: Chunk):
    with pytest.raises(PromptTooLongError) as caught:
        await ask(Llama(saying(chunk), slots=1, context=1000))
    assert (caught.value.tokens, caught.value.limit) == (800, 744)


async def test_nothing_can_be_asked_once_it_is_closed():
    llama = Llama(saying(), slots=1, context=1000)
    llama.close()
    with pytest.raises(ModelError, match="closed"):
        await ask(llama)


async def test_a_file_that_is_no_model_is_told(tmp_path: Path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"could not be loaded from broken\.gguf"):
        async with open_llama(path, slots=1, context=512):
            pytest.fail("it was loaded")
