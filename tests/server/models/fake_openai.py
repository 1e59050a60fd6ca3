"""An endpoint that speaks the chat completions API over a real socket, and says what it is told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

import h11
import trio


@dataclasses.dataclass
class Reply:
    """What to do with one request."""

    events: Sequence[dict[str, Any] | str] = ()  # one `data:` line each; a str goes out as it is
    then: Literal["done", "end", "break", "hold"] = "done"  # hold: until the client hangs up
    status: int = 200
    error: Any = None  # the body where the status is not 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict[str, str])


@dataclasses.dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclasses.dataclass
class FakeEndpoint:
    """Answers request after request with the next of `replies`."""

    url: str
    replies: list[Reply] = dataclasses.field(default_factory=list[Reply])
    requests: list[Request] = dataclasses.field(default_factory=list[Request])
    hung_up: trio.Event = dataclasses.field(default_factory=trio.Event)  # a client, on a `hold`

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        connection = h11.Connection(h11.SERVER)
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                while await self._serve_request(stream, connection):
                    connection.start_next_cycle()

    async def _serve_request(self, stream: trio.SocketStream, connection: h11.Connection) -> bool:
        """Whether the connection may be used again."""
        request = await _receive(stream, connection)
        if request is None:
            return False
        self.requests.append(request)
        reply = self.replies.pop(0)
        send = functools.partial(_send, stream, connection)
        if reply.status != 200:
            await _refuse(send, reply)
            return True
        headers = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]
        await send(h11.Response(status_code=200, headers=headers))
        for event in reply.events:
            line = event if isinstance(event, str) else json.dumps(event)
            await send(h11.Data(data=f"data: {line}\n\n".encode()))
        if reply.then == "done":
            await send(h11.Data(data=b"data: [DONE]\n\n"))
        if reply.then in {"done", "end"}:
            await send(h11.EndOfMessage())
            return True
        if reply.then == "hold":
            with contextlib.suppress(trio.BrokenResourceError):  # with something unread
                while await stream.receive_some():
                    pass
            self.hung_up.set()
        return False  # in the middle of the chunked body


async def _receive(stream: trio.SocketStream, connection: h11.Connection) -> Request | None:
    """The next request, or None where the client has gone."""
    request: h11.Request | None = None
    body = b""
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(await stream.receive_some())
            case h11.Request() as request:
                pass
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                break
            case _:
                return None
    assert request is not None
    headers = {name.decode(): value.decode() for name, value in request.headers}
    return Request(request.target.decode(), headers, json.loads(body))


async def _refuse(send: Callable[[h11.Event], Awaitable[None]], reply: Reply) -> None:
    content = json.dumps(reply.error).encode()
    length = ("content-length", str(len(content)))
    headers = [("content-type", "application/json"), length, *reply.headers.items()]
    await send(h11.Response(status_code=reply.status, headers=headers))
    await send(h11.Data(data=content))
    await send(h11.EndOfMessage())


async def _send(stream: trio.SocketStream, connection: h11.Connection, event: h11.Event) -> None:
    data = connection.send(event)
    if data:
        await stream.send_all(data)


@contextlib.asynccontextmanager
async def open_fake_endpoint() -> AsyncIterator[FakeEndpoint]:
    """Listens on a port of its own until the block is left."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    endpoint = FakeEndpoint(f"http://127.0.0.1:{port}/v1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, endpoint.serve, [listener])
        yield endpoint
        nursery.cancel_scope.cancel()


# --- what goes into `Reply.events`


def chunk(
    delta: dict[str, Any], *, finish: str | None = None, usage: dict[str, int] | None = None
) -> dict[str, Any]:
    """One chunk with one choice."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "fake",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        "usage": usage,
    }


def text(words: str, *, finish: str | None = None) -> dict[str, Any]:
    """A chunk that says something."""
    return chunk({"role": "assistant", "content": words}, finish=finish)


def finish(reason: str = "stop") -> dict[str, Any]:
    """The last chunk of an answer."""
    return chunk({}, finish=reason)


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The chunk after the last one."""
    numbers = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    return {**chunk({}, usage=numbers), "choices": []}


def tool_call(
    index: int, *, call_id: str | None = None, name: str | None = None, arguments: str = ""
) -> dict[str, Any]:
    """A fragment of a tool call."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    whole = {"index": index, "function": function}
    if call_id is not None:
        whole |= {"id": call_id, "type": "function"}
    return chunk({"tool_calls": [whole]})
