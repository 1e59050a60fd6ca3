"""Asks a model again where that may help: after a failure that may pass, before it has answered.

What has been said can't be unsaid, so once the first part of an answer has come, a failure is
the run's. tenacity is used as it is, not by way of stamina: that has one switch for the whole
process, which anybody's code may turn, and hooks that are shown everybody's errors.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

import tenacity
import trio

from creche import Message, Model, ModelError, ModelPart, ToolSpec

_log: Final = logging.getLogger("creche.models")

_FIRST_PAUSE: Final = 0.5  # seconds; each that follows is twice as long, up to
_LONGEST_PAUSE: Final = 8.0
_PATIENCE: Final = 60.0  # seconds from the first request, after which no other is begun


class PassingModelError(ModelError):
    """A failure that may pass; `retry_after` is in seconds, None where nothing was said of it."""

    def __init__(self, message: str, *, code: str, retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class RetryingModel:
    """A model that is asked up to `attempts` times, at growing intervals. See `Model`.

    Error handling: what the last attempt raised. A PassingModelError is one only until the first
    part of the answer has come. The endpoint's own `retry_after` is kept to, or, if it is longer
    than a minute, taken for a refusal.
    """

    def __init__(self, model: Model, *, attempts: int) -> None:
        self._model = model
        self._attempts = attempts

    @property
    def name(self) -> str:
        return self._model.name

    @contextlib.asynccontextmanager
    async def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        """See `Model.open_stream`. Entered once the first part of the answer has come."""
        async with contextlib.AsyncExitStack() as stack:
            parts: AsyncGenerator[ModelPart, None] | None = None
            async for attempt in self._retrying():
                with attempt:
                    async with contextlib.AsyncExitStack() as trying:
                        opening = self._model.open_stream(messages, tools)
                        rest = await trying.enter_async_context(opening)
                        parts = _joined(await anext(rest, None), rest)
                        stack.push_async_exit(trying.pop_all())
            assert parts is not None, "the last attempt succeeds or raises"
            yield await stack.enter_async_context(contextlib.aclosing(parts))

    def _retrying(self) -> tenacity.AsyncRetrying:
        """The attempts of one call."""
        latest = trio.current_time() + _PATIENCE

        def is_over(state: tenacity.RetryCallState) -> bool:
            too_late = trio.current_time() + state.upcoming_sleep > latest
            return too_late or state.attempt_number >= self._attempts

        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(PassingModelError),
            wait=_pause,
            stop=is_over,
            sleep=trio.sleep,
            before_sleep=self._log_retry,
            reraise=True,
        )

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        _log.warning(
            "%s: asking the model %s again in %.1f s, for the %d. time of %d",
            error,
            self.name,
            state.upcoming_sleep,
            state.attempt_number + 1,
            self._attempts,
        )


async def _joined(
    first: ModelPart | None,
    rest: AsyncIterator[ModelPart],
) -> AsyncGenerator[ModelPart, None]:
    if first is not None:
        yield first
        async for part in rest:
            yield part


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt."""
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, PassingModelError) and error.retry_after is not None:
        return error.retry_after
    return _growing(state)


_growing: Final = tenacity.wait_exponential_jitter(
    multiplier=_FIRST_PAUSE,
    max=_LONGEST_PAUSE,
    jitter=_FIRST_PAUSE,
)
