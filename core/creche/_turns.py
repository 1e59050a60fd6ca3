"""A model as a run is handed it: each call counted, and under the run's turn deadline."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import trio

from creche._activities import Activities
from creche._errors import ModelError
from creche._limits import Limits
from creche._messages import Message
from creche._models import Model, ModelPart, ToolSpec, Usage
from creche._run_clock import RunClock
from creche._statistics import Tally
from creche._tracing import SpanBlock, Spans

# An agent's model calls that are under way, latest last, each with the task that made it.
Asking = list[tuple[trio.lowlevel.Task, SpanBlock]]


def note_cost(asking: Asking, model: str, usage: Usage) -> None:
    """Note what an answer cost for the span of its call: one that this very task has made."""
    if asking and trio.lowlevel.in_trio_task():
        here = trio.lowlevel.current_task()
        for task, span in reversed(asking):
            if task is here and span.spent(model, usage.input_tokens, usage.output_tokens):
                return


class TurnModel:
    """One of the process's models, for one run. See `Model`.

    Error handling: a call whose stream is not over after `Limits.turn_timeout` raises ModelError
    with the code `turn_timeout`, wherever in the block it is.
    """

    def __init__(
        self,
        model: Model,
        tally: Tally,
        activities: Activities,
        *,
        limits: Limits,
        spans: Spans,
        asking: Asking,
        clock: RunClock,
    ) -> None:
        """`asking` gets the calls that are under way."""
        self._model = model
        self._tally = tally
        self._activities = activities
        self._timeout = limits.turn_timeout
        self._clock = clock
        self._spans = spans
        self._asking = asking

    @property
    def name(self) -> str:
        return self._model.name

    @contextlib.asynccontextmanager
    async def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        """See `Model.open_stream`."""
        self._tally.model_calls += 1
        with (
            self._spans.block("model", self._model.name) as span,
            self._activities.during("model", self.name),
        ):
            asked = (trio.lowlevel.current_task(), span)
            self._asking.append(asked)
            try:
                with self._clock.move_on_after(self._timeout) as turn:
                    async with self._model.open_stream(messages, tools) as stream:
                        yield stream
            finally:
                self._asking.remove(asked)
            if turn.cancelled_caught:
                msg = f"The model's answer took longer than {self._timeout:g} s and was stopped."
                raise ModelError(msg, code="turn_timeout")
