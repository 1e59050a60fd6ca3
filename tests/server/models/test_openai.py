"""Models behind an OpenAI-compatible endpoint: a fake one, over a real socket."""

from __future__ import annotations

import gc
import logging

import pytest
import trio
from tests.server.models import fake_openai as fake
from tests.server.models.fake_openai import FakeEndpoint, Reply

from creche import (
    AssistantMessage,
    FunctionCall,
    Message,
    MessageId,
    ModelError,
    ModelPart,
    SystemMessage,
    TextDelta,
    ToolCall,
    ToolCallId,
    ToolCallRequest,
    ToolMessage,
    ToolSpec,
    Usage,
    UserMessage,
)
from creche_server.models.openai import OpenAIModel, open_openai_model
from creche_server.models.openai_wire import EventSplitter, wire_messages, wire_tools

KEY = "sk-super-secret"
ID = MessageId("m")
HELLO = (UserMessage(id=ID, content="Hello!"),)
CLOCK = ToolSpec(
    name="clock",
    description="Tell the time",
    parameters={"type": "object", "properties": {"timezone": {"type": "string"}}},
)
CALL = ToolCall(id=ToolCallId("call_1"), function=FunctionCall("clock", '{"timezone": "UTC"}'))


def opened(endpoint: FakeEndpoint):
    """The model `tiny` of this endpoint."""
    return open_openai_model("tiny", base_url=endpoint.url, api_key=KEY)


async def answer(model: OpenAIModel, tools: tuple[ToolSpec, ...] = ()) -> list[ModelPart]:
    """All parts of the answer to HELLO."""
    with trio.fail_after(10):
        async with model.open_stream(HELLO, tools) as parts:
            return [part async for part in parts]


async def failure(endpoint: FakeEndpoint) -> ModelError:
    """What an answer to HELLO fails with; it must not tell the key."""
    async with opened(endpoint) as model:
        with pytest.raises(ModelError) as caught:
            await answer(model)
    assert KEY not in str(caught.value)
    return caught.value


# --- the wire


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage(id=ID, content="Be brief."), {"role": "system", "content": "Be brief."}),
        (UserMessage(id=ID, content="Hi"), {"role": "user", "content": "Hi"}),
        (
            UserMessage(id=ID, content="Hi", name="ann", metadata={"private": 1}),
            {"role": "user", "content": "Hi", "name": "ann"},
        ),
        (UserMessage(id=ID, content="Hi", name="Ann Lee"), {"role": "user", "content": "Hi"}),
        (AssistantMessage(id=ID, content="Hi"), {"role": "assistant", "content": "Hi"}),
        (AssistantMessage(id=ID), {"role": "assistant", "content": ""}),
        (
            AssistantMessage(id=ID, tool_calls=(CALL,)),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "clock", "arguments": '{"timezone": "UTC"}'},
                    },
                ],
            },
        ),
        (
            ToolMessage(id=ID, tool_call_id=CALL.id, content="12:00"),
            {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
        ),
        (
            ToolMessage(id=ID, tool_call_id=CALL.id, content="", error="no such zone"),
            {"role": "tool", "tool_call_id": "call_1", "content": "no such zone"},
        ),
    ],
)
def test_a_message_is_spelled_as_the_api_wants_it(message: Message, expected: dict[str, object]):
    assert wire_messages([message]) == [expected]


def test_a_tool_is_spelled_as_the_api_wants_it():
    assert wire_tools([CLOCK]) == [
        {
            "type": "function",
            "function": {
                "name": "clock",
                "description": "Tell the time",
                "parameters": CLOCK.parameters,
            },
        }
    ]


async def test_the_request_has_the_model_the_messages_the_tools_and_the_key(
    endpoint: FakeEndpoint,
):
    endpoint.replies = [Reply([fake.finish()]), Reply([fake.finish()])]
    async with opened(endpoint) as model:
        assert model.name == "tiny"
        await answer(model, (CLOCK,))
        await answer(model)
    with_tools, without = endpoint.requests
    assert with_tools.path == "/v1/chat/completions"
    assert with_tools.headers["authorization"] == f"Bearer {KEY}"
    assert with_tools.body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello!"}],
        "tools": wire_tools([CLOCK]),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "tools" not in without.body  # an empty list would be refused


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_bytes_arrive(size: int):
    """Comments, other fields, CRLF and data on several lines are the protocol's own."""
    stream = (
        ': keep alive\n\ndata: {"a": 1}\n\nevent: x\r\ndata:{"b":\r\ndata: "\u2028\x85"}\r\n\r\n'
        "data: [DONE]\n\ndata: late\n\n"
    ).encode()
    splitter = EventSplitter()
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    events = [event.decode() for piece in pieces for event in splitter.feed(piece)]
    assert events == ['{"a": 1}', '{"b":\n"\u2028\x85"}']
    assert splitter.done


# --- answers


async def test_text_comes_in_deltas_and_the_usage_at_the_end(endpoint: FakeEndpoint):
    endpoint.replies = [
        Reply([fake.text(""), fake.text("Hel"), fake.text("lo!"), fake.finish(), fake.usage(7, 2)])
    ]
    async with opened(endpoint) as model:
        assert await answer(model) == [TextDelta("Hel"), TextDelta("lo!"), Usage(7, 2)]


async def test_a_delta_is_seen_before_the_next_one_is_written(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([fake.text("first")], then="hold")]
    async with opened(endpoint) as model:
        with trio.fail_after(10):
            async with model.open_stream(HELLO, ()) as parts:
                assert await anext(parts) == TextDelta("first")


async def test_tool_calls_are_put_together_from_their_fragments(endpoint: FakeEndpoint):
    """Two at a time, their fragments interleaved, with words before them."""
    endpoint.replies = [
        Reply(
            [
                fake.text("Let me see. "),
                fake.tool_call(0, call_id="a", name="clock"),
                fake.tool_call(0, arguments='{"time'),
                fake.tool_call(1, call_id="b", name="clock", arguments=""),
                fake.tool_call(0, arguments='zone": "UTC"}'),
                fake.tool_call(1, arguments="{}"),
                fake.finish("tool_calls"),
                fake.usage(30, 12),
            ]
        )
    ]
    async with opened(endpoint) as model:
        assert await answer(model, (CLOCK,)) == [
            TextDelta("Let me see. "),
            ToolCallRequest("clock", '{"timezone": "UTC"}', "a"),
            ToolCallRequest("clock", "{}", "b"),
            Usage(30, 12),
        ]


async def test_whole_tool_calls_that_share_an_index_stay_apart(endpoint: FakeEndpoint):
    endpoint.replies = [
        Reply(
            [
                fake.tool_call(0, call_id="a", name="clock", arguments='{"timezone": "UTC"}'),
                fake.tool_call(0, call_id="b", name="clock"),
                fake.finish("tool_calls"),
            ]
        )
    ]
    async with opened(endpoint) as model:
        assert await answer(model, (CLOCK,)) == [
            ToolCallRequest("clock", '{"timezone": "UTC"}', "a"),
            ToolCallRequest("clock", "{}", "b"),
        ]


async def test_a_refusal_is_words_too(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([fake.chunk({"refusal": "I won't."}), fake.finish()])]
    async with opened(endpoint) as model:
        assert await answer(model) == [TextDelta("I won't.")]


async def test_an_endpoint_that_forgets_its_last_line_has_answered(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([fake.text("Hi"), fake.finish()], then="end")]
    async with opened(endpoint) as model:
        assert await answer(model) == [TextDelta("Hi")]


async def test_answers_use_the_connection_again(endpoint: FakeEndpoint):
    """The second request would wait for ever on a connection that was left half read."""
    endpoint.replies = [Reply([fake.text("Hi"), fake.finish()]) for _ in range(3)]
    async with opened(endpoint) as model:
        for _ in range(3):
            assert await answer(model) == [TextDelta("Hi")]


async def test_many_answers_at_once_do_not_mix(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([fake.text(str(i)), fake.finish()]) for i in range(20)]
    found: list[ModelPart] = []

    async def ask(model: OpenAIModel) -> None:
        found.extend(await answer(model))

    async with opened(endpoint) as model:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask, model)
    assert sorted(part.text for part in found if isinstance(part, TextDelta)) == sorted(
        str(i) for i in range(20)
    )


# --- errors


@pytest.mark.parametrize(
    ("status", "body", "message", "code"),
    [
        (
            401,
            {"error": {"message": f"Incorrect API key: {KEY}", "code": "invalid_api_key"}},
            "the model endpoint refused the API key (401, invalid_api_key)",
            "model_unauthorized",
        ),
        (403, {}, "the model endpoint does not permit this (403)", "model_unauthorized"),
        (404, {}, "the model endpoint knows no model 'tiny' (404)", "model_not_found"),
        (
            429,
            {"error": {"message": "slow down", "code": "rate_limit_exceeded"}},
            "the model endpoint is over its rate limit or quota (429, rate_limit_exceeded)",
            "model_rate_limited",
        ),
        (
            400,
            {"error": {"message": "Hello! is too long", "code": "context_length_exceeded"}},
            "the model endpoint refused the request (400, context_length_exceeded)",
            "model_refused",
        ),
        (
            422,
            {"error": {"message": "?", "code": f"bad {KEY}"}},  # no word for programs
            "the model endpoint refused the request (422)",
            "model_refused",
        ),
        (500, {}, "the model endpoint is out of order (500)", "model_unavailable"),
        (
            503,
            "Service Unavailable",
            "the model endpoint is out of order (503)",
            "model_unavailable",
        ),
        (504, None, "the model endpoint took too long (504)", "model_timeout"),
    ],
)
async def test_a_refusal_says_why_and_keeps_secrets(
    endpoint: FakeEndpoint, status: int, body: object, message: str, code: str
):
    endpoint.replies = [Reply(status=status, error=body)]
    error = await failure(endpoint)
    assert (error.message, error.code) == (message, code)


async def test_nobody_at_the_address_is_an_error():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    endpoint = FakeEndpoint(f"http://127.0.0.1:{port}/v1")
    error = await failure(endpoint)
    assert error.message == "the model endpoint could not be reached"
    assert error.code == "model_unreachable"


@pytest.mark.parametrize(
    ("reply", "message", "code"),
    [
        pytest.param(
            Reply([fake.text("Hel")], then="break"),
            "the connection to the model endpoint broke in the middle of the answer",
            "model_broke_off",
            id="cut off",
        ),
        pytest.param(
            Reply([fake.text("Hel")], then="end"),
            "the model endpoint broke off in the middle of its answer",
            "model_broke_off",
            id="ended early",
        ),
        pytest.param(
            Reply([fake.text("Hel"), {"error": {"message": KEY, "code": "server_error"}}]),
            "the model endpoint broke off with an error, server_error",
            "model_broke_off",
            id="an error for a chunk",
        ),
        pytest.param(
            Reply([fake.text("Hel"), '{"choices": [{'], then="end"),
            "the model endpoint sent something that is not a chat completion",
            "model_malformed",
            id="no JSON",
        ),
        pytest.param(
            Reply([fake.text("Hel"), {"choices": [{"delta": 1}]}]),
            "the model endpoint sent something that is not a chat completion",
            "model_malformed",
            id="the wrong shape",
        ),
        pytest.param(
            Reply([fake.text("Hel"), fake.finish("content_filter")]),
            "the model endpoint's content filter stopped the answer",
            "content_filter",
            id="content filter",
        ),
    ],
)
async def test_an_answer_that_breaks_off_is_an_error_after_what_it_said(
    endpoint: FakeEndpoint, reply: Reply, message: str, code: str
):
    endpoint.replies = [reply]
    async with opened(endpoint) as model:
        with trio.fail_after(10):
            async with model.open_stream(HELLO, ()) as parts:
                assert await anext(parts) == TextDelta("Hel")
                with pytest.raises(ModelError) as caught:
                    await anext(parts)
    assert (caught.value.message, caught.value.code) == (message, code)


async def test_a_missing_key_is_told_at_once_with_the_variable_to_set():
    with pytest.raises(ModelError, match="set OPENAI_API_KEY"):
        async with open_openai_model("tiny"):
            pytest.fail("there is no key")


async def test_the_address_and_the_key_may_come_from_the_environment(
    endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint.replies = [Reply([fake.finish()])]
    async with open_openai_model("tiny") as model:
        await answer(model)
    assert endpoint.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_an_endpoint_of_ones_own_needs_no_key(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([fake.text("Hi"), fake.finish()])]
    async with open_openai_model("tiny", base_url=endpoint.url) as model:
        assert await answer(model) == [TextDelta("Hi")]


# --- leaving


async def test_a_cancel_while_words_are_awaited_closes_the_connection(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([fake.text("Hel")], then="hold")]
    async with opened(endpoint) as model:
        with trio.fail_after(10):
            with trio.CancelScope() as scope:
                async with model.open_stream(HELLO, ()) as parts:
                    async for _ in parts:
                        scope.cancel()
            assert scope.cancelled_caught
            await endpoint.hung_up.wait()


async def test_a_cancel_before_the_first_byte_closes_the_connection(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([], then="hold")]
    with trio.fail_after(10):
        async with opened(endpoint) as model:
            with trio.CancelScope() as scope:
                async with model.open_stream(HELLO, ()) as parts:
                    scope.cancel()
                    await anext(parts)
            assert scope.cancelled_caught
            await endpoint.hung_up.wait()


async def test_leaving_the_block_early_closes_the_connection_and_leaves_nothing(
    endpoint: FakeEndpoint,
):
    """The SDK's generators, too, are finished: Trio complains of those that are collected."""
    endpoint.replies = [Reply([fake.text("a"), fake.text("b"), fake.text("c")], then="hold")]
    async with opened(endpoint) as model:
        with trio.fail_after(10):
            async with model.open_stream(HELLO, ()) as parts:
                assert await anext(parts) == TextDelta("a")
            await endpoint.hung_up.wait()
    gc.collect()


async def test_what_the_reader_raises_comes_out_as_it_is(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([fake.text("a")], then="hold")]
    async with opened(endpoint) as model:
        with trio.fail_after(10):
            with pytest.raises(ZeroDivisionError):
                async with model.open_stream(HELLO, ()) as parts:
                    await anext(parts)
                    raise ZeroDivisionError
            await endpoint.hung_up.wait()


async def test_the_log_does_not_hold_the_key(
    endpoint: FakeEndpoint, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    endpoint.replies = [Reply([fake.text("Hi"), fake.finish()]), Reply(status=401, error={})]
    async with opened(endpoint) as model:
        await answer(model)
        with pytest.raises(ModelError):
            await answer(model)
    assert KEY not in caplog.text
