"""What was said on a thread: replies of bounded size, which together tell everything once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.store_contract import ADA, T1, record

from creche import (
    AssistantMessage,
    Commit,
    FunctionCall,
    MemoryStore,
    Message,
    MessageId,
    NewThread,
    RunId,
    StoredMessage,
    ToolCall,
    ToolCallId,
    ToolMessage,
    UserMessage,
    new_epoch,
)
from creche_server.recall import MOST_BYTES, UnknownRunError, history, recall

MEGABYTE = 1_000_000


async def store_of(sizes: list[int], said: Sequence[Message] = ()) -> MemoryStore:
    """A thread whose runs, `run-0` on, have one message of each of these lengths; or just these."""
    store = MemoryStore()
    await store.commit(
        [
            Commit(
                user_id=ADA,
                thread_id=T1,
                opens=NewThread(title="t", epoch=new_epoch()),
                new_runs=tuple(record(f"run-{number}") for number in range(len(sizes))),
                messages=tuple(
                    StoredMessage(
                        run_id=RunId(f"run-{number}"),
                        message=message,
                        created_at=record().created_at,
                    )
                    for number, size in enumerate(sizes)
                    for message in said
                    or [UserMessage(id=MessageId(f"m-{number}"), content="x" * size)]
                ),
            ),
        ],
    )
    return store


def ids_of(answer: dict[str, Any]) -> list[str]:
    """The ids of the messages in it."""
    decoded = json.loads(msgspec.json.encode(answer))
    return [message["id"] for message in decoded["values"]["messages"]]


SIZES = st.lists(st.sampled_from([1, 1000, 80_000, 250_000, MEGABYTE]), max_size=20)
LIMITS = st.sampled_from([1, 2, 3, 7, 100])


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, limit=LIMITS)
async def test_page_by_page_everything_is_told_once_and_in_order(
    sizes: list[int],
    limit: int,
) -> None:
    store = await store_of(sizes)
    told: list[str] = []
    before: RunId | None = None
    while True:
        recalled = await recall(store, ADA, T1, limit=limit, before=before)
        page = recalled.to_dict()
        assert len(recalled.runs) <= limit
        size = len(msgspec.json.encode(page))
        assert size < MOST_BYTES + 10_000
        assert page.get("shortened", []) == [
            run.run_id for run in recalled.runs if sizes[int(run.run_id[4:])] == MEGABYTE
        ]
        told = ids_of(page) + told
        before = recalled.earlier
        if before is None:
            break
        assert ids_of(page)[0] == before.replace("run", "m"), "it is where the page begins"
    assert told == [f"m-{number}" for number in range(len(sizes))]


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, limit=LIMITS)
async def test_state_by_state_every_run_is_told_of_once(sizes: list[int], limit: int) -> None:
    store = await store_of(sizes)
    told: list[str] = []
    before: RunId | None = None
    while True:
        states, before = await history(store, ADA, T1, limit=limit, before=before)
        assert len(states) <= limit
        size = len(msgspec.json.encode(states))
        assert size < MOST_BYTES + 40_000
        for state in states:
            number = int(state["metadata"]["run_id"].removeprefix("run-"))
            ids = ids_of(state)
            assert ids == [f"m-{n}" for n in range(number + 1 - len(ids), number + 1)]
            assert ids, "a state has at least what its own run said"
            first = number + 1 - len(ids)
            assert state.get("earlier") == (f"run-{first}" if first else None)
        told += [state["metadata"]["run_id"] for state in states]
        if before is None:
            break
        assert states[-1]["metadata"]["run_id"] == before
    assert told == [f"run-{number}" for number in range(len(sizes))][::-1]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 250_000]), min_size=1, max_size=12),
    limit=LIMITS,
    gone=st.sets(st.integers(0, 11)),
)
async def test_runs_that_were_rolled_back_are_passed_over(
    sizes: list[int], limit: int, gone: set[int]
) -> None:
    store = await store_of(sizes)
    undone = tuple(RunId(f"run-{number}") for number in gone)
    await store.commit([Commit(user_id=ADA, thread_id=T1, rolls_back=undone)])
    expected = [number for number in range(len(sizes)) if number not in gone]
    told: list[str] = []
    before: RunId | None = None
    while True:
        recalled = await recall(store, ADA, T1, limit=limit, before=before)
        told = ids_of(recalled.to_dict()) + told
        before = recalled.earlier
        if before is None:
            break
    assert told == [f"m-{number}" for number in expected]
    runs: list[str] = []
    while True:
        states, before = await history(store, ADA, T1, limit=limit, before=before)
        runs += [state["metadata"]["run_id"] for state in states]
        if before is None:
            break
    assert runs == [f"run-{number}" for number in expected][::-1]
    for number in gone & set(range(len(sizes))):  # somebody may have been told of it before
        recalled = await recall(store, ADA, T1, before=RunId(f"run-{number}"))
        earlier = [f"m-{n}" for n in expected if n < number]
        assert ids_of(recalled.to_dict()) == earlier[len(earlier) - len(recalled.runs) :]


def calling(count: int, size: int) -> list[Message]:
    """A question, and an answer with so many calls, their arguments and results of that size."""
    ids = [ToolCallId(f"c-{number}") for number in range(count)]
    calls = tuple(
        ToolCall(id=each, function=FunctionCall("f", json.dumps({"x": "x" * size}))) for each in ids
    )
    return [
        UserMessage(id=MessageId("q"), content="why?"),
        AssistantMessage(id=MessageId("a"), content="so:", tool_calls=calls),
        *(
            ToolMessage(id=MessageId(f"r-{each}"), tool_call_id=each, content="y" * size)
            for each in ids
        ),
        AssistantMessage(id=MessageId("b"), content="z" * size),
    ]


LARGE: dict[str, list[Message]] = {
    "one long answer": [AssistantMessage(id=MessageId("a"), content="x" * 16 * MEGABYTE)],
    "what grows in JSON": [AssistantMessage(id=MessageId("a"), content="\x01" * 2 * MEGABYTE)],
    "a failure": [
        *calling(1, 1)[:2],
        ToolMessage(
            id=MessageId("r"), tool_call_id=ToolCallId("c-0"), content="x", error="y" * MEGABYTE
        ),
    ],
    "many calls": calling(200, 50_000),
    "few large calls": calling(3, 2 * MEGABYTE),
}


@pytest.mark.parametrize("messages", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("ask", [recall, history])
async def test_a_run_that_is_too_large_for_a_reply_is_told_with_its_texts_cut(
    ask: Any, messages: list[Message]
) -> None:
    store = await store_of([1], messages)
    answer = await ask(store, ADA, T1)
    page = answer.to_dict() if ask is recall else answer[0][0]
    encoded = msgspec.json.encode(page)
    assert MOST_BYTES / 5 < len(encoded) < MOST_BYTES + 2_000
    told = json.loads(encoded)
    assert told["shortened"] == ["run-0"]
    assert [each["id"] for each in told["values"]["messages"]] == [each.id for each in messages]
    assert "cut" in str(told)
    for each in told["values"]["messages"]:
        for call in each.get("toolCalls", ()):
            assert isinstance(json.loads(call["function"]["arguments"]), dict)


@pytest.mark.parametrize("calls", [1, 2, 3])
async def test_of_a_run_of_thousands_of_messages_the_latest_are_told(calls: int) -> None:
    rounds = [
        msgspec.structs.replace(each, id=MessageId(f"{each.id}-{number}"))
        for number in range(3000)
        for each in calling(calls, 1)[1 : 2 + calls]
    ]
    recalled = await recall(await store_of([1], rounds), ADA, T1)
    told = recalled.to_dict()["values"]["messages"]
    assert MOST_BYTES - 2000 < sum(len(bytes(each)) for each in told) <= MOST_BYTES
    assert json.loads(bytes(told[0]))["role"] == "assistant", "no result is without its call"
    assert [bytes(each) for each in told] == [
        msgspec.json.encode(each) for each in rounds[-len(told) :]
    ]


async def test_of_a_long_thread_little_is_read() -> None:
    """Else who asks for a page costs the memory of the whole."""
    looked_at: list[int | None] = []

    class Watched(MemoryStore):
        async def messages(self, *args: Any, last_runs: int | None = None) -> Any:
            looked_at.append(last_runs)
            return await super().messages(*args, last_runs=last_runs)

    store = Watched()
    store._threads = (await store_of([400_000] * 40))._threads
    recalled = await recall(store, ADA, T1)
    assert [said.run_id for said in recalled.runs] == ["run-39"]
    assert looked_at == [5]


@pytest.mark.parametrize("ask", [recall, history])
async def test_before_a_run_that_is_not_the_threads_there_is_nothing(ask: Any) -> None:
    store = await store_of([1, 1])
    with pytest.raises(UnknownRunError):
        await ask(store, ADA, T1, before=RunId("run-9"))
