"""What is told of a tool's result, as a table."""

from __future__ import annotations

import pytest

from creche import (
    AssistantMessage,
    FunctionCall,
    Message,
    MessageId,
    ToolCall,
    ToolCallId,
    ToolMessage,
    UserMessage,
)
from creche_server.models.local_results import told

ID = MessageId("m")


def used(name: str, result: str, error: str | None = None) -> list[Message]:
    """A question, and what a tool returned for it."""
    call = ToolCall(id=ToolCallId("c"), function=FunctionCall(name, "{}"))
    return [
        UserMessage(id=ID, content="Well?"),
        AssistantMessage(id=ID, tool_calls=(call,)),
        ToolMessage(id=ID, tool_call_id=call.id, content=result, error=error),
    ]


@pytest.mark.parametrize(
    ("name", "result", "expected"),
    [
        ("tell_stock", "There are 12 of apples.", "There are 12 of apples."),
        (
            "tell",
            ' "Is it 9 o\'clock?" he said.\nThen he left. ',
            '"Is it 9 o\'clock?" he said.\nThen he left.',
        ),
        ("tell", '"He left."', '"He left."'),
        ("calculator", "3367", "The calculator says 3367."),
        ("tell_stock", "12", "tell_stock says 12."),
        ("clock", "Monday, 23 November 2026", "The clock says Monday, 23 November 2026."),
        ("list_files", "a.txt\nb.txt", "list_files says:\na.txt\nb.txt"),
        ("weather", '{"sky": "rain", "celsius": 17.5}', "weather says sky: rain, celsius: 17.5."),
        ("rivers", '["Rhine", "Po", 3, null]', "rivers says Rhine, Po, 3, null."),
        (
            "rows",
            '[{"a": 1, "b": "x"}, {"a": 2, "b": [3]}]',
            "rows says:\n- a: 1, b: x\n- a: 2, b: [3]",
        ),
        ("rows", '[{"a": 1}]', "rows says:\n- a: 1"),
        ("tell", "[not JSON", "tell says [not JSON."),
        ("tell", "[]", "tell found nothing."),
        ("tell", "", "tell found nothing."),
        ("search_history", "[]", "I found nothing about that in your earlier conversations."),
        (
            "search_history",
            '[{"thread_id": "t", "when": "2026-05-04 09:12", "role": "user", "text": "My\\ncat"},'
            '{"thread_id": "t", "when": "2026-05-04 09:13", "role": "assistant", "text": "Nice."}]',
            "I found this in your earlier conversations:\n"
            "- 2026-05-04 09:12, you said: My cat\n"
            "- 2026-05-04 09:13, I said: Nice.",
        ),
        (
            "search_history",
            '[{"thread_id": "t", "when": "2026-05-04 09:12", "title": "Cats"}]',
            "Lately we have talked about:\n- 2026-05-04 09:12: Cats",
        ),
    ],
)
def test_a_result_is_told_as_it_is(name: str, result: str, expected: str):
    assert told(used(name, result)) == expected


def test_a_failure_is_told_with_its_source():
    messages = used("clock", "Error: no zone", "there is no zone 'X'")
    assert told(messages) == "The clock failed: there is no zone 'X'"


def test_a_long_result_is_told_by_its_beginning_and_says_so():
    text = told(used("read_file", "word " * 10_000))
    assert text is not None
    assert text.startswith("read_file says:\nword word")
    assert text.endswith("word …\n\n(These are the first 1,494 of 49,999 characters.)")


def test_several_results_are_told_one_after_the_other():
    messages = [
        *used("calculator", "4"),
        ToolMessage(id=ID, tool_call_id=ToolCallId("gone"), content="6"),
    ]
    assert told(messages) == "The calculator says 4.\n\nThe tool says 6."


@pytest.mark.parametrize(
    "messages",
    [[], [UserMessage(id=ID, content="Hi")], [*used("x", "4"), UserMessage(id=ID, content="x")]],
)
def test_there_is_nothing_to_tell_unless_results_come_last(messages: list[Message]):
    assert told(messages) is None
