"""A model as a run is handed it: each call counted, under the run's budgets and its deadlines."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

import trio

from creche._activities import Activities
from creche._errors import ModelError
from creche._limits import Limits
from creche._messages import Message
from creche._models import Model, ModelPart, ToolSpec, Usage
from creche._run_clock import RunClock
from creche._silence import Silence, Silences
from creche._spending import Budgets
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
    with the code `turn_timeout`, wherever in the block it is. One whose first part does not come
    within `first_token_timeout` does so with that code, and `idle_timeout` is the same between
    parts; what the agent does between them does not count. Raises RunError (`no_price`), and ends
    the block of a budget that is used up.
    """

    def __init__(
        self,
        model: Model,
        tally: Tally,
        activities: Activities,
        budgets: Budgets,
        silences: Silences,
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
        self._budgets = budgets
        self._silences = silences
        self._limits = limits
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
        await self._budgets.admit_model(self.name)
        self._tally.model_calls += 1
        with (
            self._spans.block("model", self._model.name) as span,
            self._activities.during("model", self.name),
        ):
            asked = (trio.lowlevel.current_task(), span)
            self._asking.append(asked)
            try:
                with self._in_time() as silence:
                    async with self._model.open_stream(messages, tools) as stream:
                        yield silence.heard(stream)
            finally:
                self._asking.remove(asked)

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[Silence]:
        """The block of one call, and its deadlines."""
        limits = self._limits
        silence = Silence(limits.first_token_timeout, limits.idle_timeout)
        with self._clock.move_on_after(limits.turn_timeout) as turn:
            with self._silences.during(silence):
                yield silence
        if turn.cancelled_caught:
            msg = f"The model's answer took longer than {limits.turn_timeout:g} s and was stopped."
            raise ModelError(msg, code="turn_timeout")
        if silence.scope.cancelled_caught and silence.parts:
            msg = f"The model said nothing more for {limits.idle_timeout:g} s and was stopped."
            raise ModelError(msg, code="idle_timeout")
        if silence.scope.cancelled_caught:
            msg = f"The model did not begin to answer within {limits.first_token_timeout:g} s."
            raise ModelError(msg, code="first_token_timeout")
