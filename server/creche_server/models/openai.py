"""Any model behind an OpenAI-compatible endpoint: chat completions, streamed, tools and all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httpx2
import openai
import trio
from openai.types.chat import ChatCompletionMessageParam

from creche import Message, ModelError, ModelPart, TextDelta, ToolSpec, redact_text
from creche_server.models.openai_wire import (
    Answer,
    EventSplitter,
    error_word,
    may_pass,
    retry_after,
    wire_messages,
    wire_tools,
)
from creche_server.models.retrying import PassingModelError

_KEY: Final = "OPENAI_API_KEY"
_URL: Final = "OPENAI_BASE_URL"
_NO_KEY: Final = "none"  # the SDK insists on one; an endpoint on one's own machine wants none
_CLOSE_TIMEOUT: Final = 2.0  # seconds


@contextlib.asynccontextmanager
async def open_openai_model(
    name: str,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
) -> AsyncIterator[OpenAIModel]:
    """A client for the model `name`, and its connections, until the block is left.

    What is not given is taken from OPENAI_BASE_URL and OPENAI_API_KEY. The key may be missing
    only where there is a base URL. A request is made once: `RetryingModel` is who asks again, by
    the PassingModelErrors of this one.

    Error handling: raises ModelError where the key is missing, or the base URL is none. The
    endpoint is not asked yet.
    """
    base_url = base_url or os.environ.get(_URL) or None
    if base_url is not None and not _is_http(base_url):
        msg = f"{_URL}: {redact_text(base_url)!r} is no address such as http://127.0.0.1:11434/v1"
        raise ModelError(msg, code="model_unavailable")
    api_key = api_key or os.environ.get(_KEY) or None
    if base_url is None and api_key is None:
        msg = (
            f"there is no API key for the model {name!r}: set {_KEY}, "
            f"or set {_URL} to an endpoint that needs none"
        )
        raise ModelError(msg, code="model_unavailable")
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key or _NO_KEY, max_retries=0)
    try:
        yield OpenAIModel(client, name)
    finally:
        with trio.move_on_after(_CLOSE_TIMEOUT, shield=True):
            await client.close()


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


class OpenAIModel:
    """One model of one endpoint. See `Model`."""

    def __init__(self, client: openai.AsyncOpenAI, name: str) -> None:
        self._client = client
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @contextlib.asynccontextmanager
    async def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        """See `Model`. Leaving the block closes the connection if the answer is not complete."""
        opening = self._client.chat.completions.with_streaming_response.create(
            model=self._name,
            messages=cast("list[ChatCompletionMessageParam]", wire_messages(messages)),
            tools=cast("Any", wire_tools(tools)) if tools else openai.omit,
            stream=True,
            stream_options={"include_usage": True},
        )
        async with contextlib.AsyncExitStack() as stack:
            with self._told("the model endpoint could not be reached", "model_unreachable"):
                response = await stack.enter_async_context(opening)
            # The SDK would parse the stream, too, but when the answer is over it leaves its
            # generators suspended, each inside the next; Trio complains of each that is collected.
            received = response.iter_bytes()
            stack.push_async_callback(_unwind, received)
            yield await stack.enter_async_context(contextlib.aclosing(self._parts(received)))

    async def _parts(self, received: AsyncIterator[bytes]) -> AsyncGenerator[ModelPart, None]:
        answer = Answer()
        async with contextlib.aclosing(self._events(received)) as events:
            async for data in events:
                if text := answer.take(data):
                    yield TextDelta(text)
        for part in answer.rest():
            yield part

    async def _events(self, received: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        splitter = EventSplitter()
        while True:
            try:
                with self._told(
                    "the connection to the model endpoint broke in the middle of the answer",
                    "model_broke_off",
                ):
                    piece = await anext(received, None)
            except ModelError:
                if splitter.done:  # then it is no matter how the endpoint takes its leave
                    return
                raise
            if piece is None:  # read to the end: only then can the connection be used again
                return
            for data in splitter.feed(piece):
                yield data

    @contextlib.contextmanager
    def _told(self, lost: str, code: str) -> Iterator[None]:
        """The boundary at which what the SDK raises becomes a ModelError, which may be told.

        So it holds nothing of what the endpoint wrote, which may quote the key or the prompt:
        only the status and, if it is a word for programs, the error's code. `lost` and `code`
        are for a connection that fails.
        """
        try:
            yield
        except openai.APIStatusError as error:
            raise _refusal(error, self._name) from error
        except (openai.APITimeoutError, httpx2.TimeoutException) as error:
            msg = "the model endpoint took too long"
            raise PassingModelError(msg, code="model_timeout") from error
        except (openai.APIConnectionError, httpx2.RequestError, OSError) as error:
            raise PassingModelError(lost, code=code) from error
        except openai.OpenAIError as error:
            raise ModelError(lost, code=code) from error


async def _unwind(received: AsyncIterator[bytes]) -> None:
    """Finish the generators that `received` is made of, by a cancel in the innermost."""
    with trio.CancelScope(shield=True) as scope, contextlib.suppress(Exception):
        scope.cancel()
        while True:  # what is there already comes without a checkpoint
            await anext(received)


def _refusal(error: openai.APIStatusError, name: str) -> ModelError:
    match error.status_code:
        case HTTPStatus.UNAUTHORIZED:
            message, code = "refused the API key", "model_unauthorized"
        case HTTPStatus.FORBIDDEN:
            message, code = "does not permit this", "model_unauthorized"
        case HTTPStatus.NOT_FOUND:
            message, code = f"knows no model {name!r}", "model_not_found"
        case HTTPStatus.REQUEST_TIMEOUT | HTTPStatus.GATEWAY_TIMEOUT:
            message, code = "took too long", "model_timeout"
        case HTTPStatus.TOO_MANY_REQUESTS:
            message, code = "is over its rate limit or quota", "model_rate_limited"
        case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            message, code = "is out of order", "model_unavailable"
        case _:
            message, code = "refused the request", "model_refused"
    detail = f"{error.status_code}{error_word(error.code)}"
    message = f"the model endpoint {message} ({detail})"
    if not may_pass(error.status_code, error.code):
        return ModelError(message, code=code)
    pause = retry_after(error.response.headers, now=time.time())
    return PassingModelError(message, code=code, retry_after=pause)
