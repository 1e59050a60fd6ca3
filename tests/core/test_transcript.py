"""What a run said, as messages. That any stream amounts to a valid history: test_grammar."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.agui_rules import RefusedError, check_history

from creche import MessageId, ToolCallId, encode_message, events
from creche._grammar import UNFINISHED_RESULT
from creche._transcript import Transcript


def folded(*said: events.Event) -> list[dict[str, Any]]:
    transcript = Transcript()
    for event in said:
        transcript.add(event)
    check_history(transcript.messages())
    return [msgspec.json.decode(encode_message(message)) for message in transcript.messages()]


def text(message: str, *deltas: str, **more: Any) -> list[events.Event]:
    message_id = MessageId(message)
    return [
        events.TextMessageStart(message_id=message_id, **more),
        *(events.TextMessageContent(message_id=message_id, delta=delta) for delta in deltas),
        events.TextMessageEnd(message_id=message_id),
    ]


def call(name: str, parent: str | None = None, *arguments: str) -> list[events.Event]:
    call_id = ToolCallId(name)
    return [
        events.ToolCallStart(
            tool_call_id=call_id,
            tool_call_name="add",
            parent_message_id=None if parent is None else MessageId(parent),
        ),
        *(events.ToolCallArgs(tool_call_id=call_id, delta=delta) for delta in arguments),
        events.ToolCallEnd(tool_call_id=call_id),
    ]


def result(name: str, content: str) -> events.Event:
    return events.ToolCallResult(
        message_id=MessageId(f"result-{name}"),
        tool_call_id=ToolCallId(name),
        content=content,
    )


def test_words_become_one_message() -> None:
    assert folded(*text("m-1", "Hello", ", ", "you")) == [
        {"role": "assistant", "id": "m-1", "content": "Hello, you"},
    ]


def test_a_run_that_says_nothing_has_no_messages() -> None:
    assert folded(events.Custom(name="x", value=1), *text("m-1")) == []


def test_a_message_of_empty_deltas_is_no_message() -> None:
    """Providers send empty deltas as keep-alives; an assistant message without words is a 400."""
    assert folded(*text("m-1", "", "")) == []


def test_parallel_calls_are_one_message_followed_by_their_results() -> None:
    """However their events interleave."""
    one, two = call("c-1", "m-1", '{"a"', ":1}"), call("c-2", "m-1")
    messages = folded(
        *text("m-1", "I add."),
        one[0],
        two[0],
        *one[1:],
        *two[1:],
        result("c-2", "two"),
        result("c-1", "one"),
        *text("m-2", "Done."),
    )
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool", "assistant"]
    assert messages[0]["toolCalls"] == [
        {"id": "c-1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}},
        {"id": "c-2", "type": "function", "function": {"name": "add", "arguments": "{}"}},
    ]
    assert [message.get("content") for message in messages] == ["I add.", "one", "two", "Done."]
    assert messages[1]["id"] == "result-c-1"


def test_a_call_without_a_message_makes_one() -> None:
    messages = folded(*call("c-1"), result("c-1", "3"))
    assert [message["role"] for message in messages] == ["assistant", "tool"]
    assert "content" not in messages[0]


def test_a_call_without_a_result_gets_one_that_says_so() -> None:
    messages = folded(*call("c-1"))
    assert messages[1]["content"] == UNFINISHED_RESULT
    assert messages[1]["toolCallId"] == "c-1"


def test_a_sub_agents_work_is_not_its_parents_conversation() -> None:
    start, words, end = text("m-1", "inner", subagent_run_id="s-1")
    assert folded(start, words, end, *text("m-2", "outer")) == [
        {"role": "assistant", "id": "m-2", "content": "outer"},
    ]


def test_what_is_said_in_another_role_is_not_put_in_the_assistants_mouth() -> None:
    messages = folded(*text("m-1", "Why?", role="user"))
    assert [message["role"] for message in messages] in ([], ["user"])


@pytest.mark.parametrize(
    "broken",
    [
        [*text("m-1", "a"), *call("c-1", "m-1")],
        [*call("c-1"), *text("m-1", "a")],
    ],
    ids=["unanswered at the end", "unanswered in the middle"],
)
def test_the_validator_finds_an_unanswered_call(broken: list[events.Event]) -> None:
    """Without this, the validator that other tests rely on might take anything."""
    transcript = Transcript()
    for event in broken:
        transcript.add(event)
    messages = [m for m in transcript.messages() if not hasattr(m, "tool_call_id")]
    with pytest.raises(RefusedError):
        check_history(messages)
