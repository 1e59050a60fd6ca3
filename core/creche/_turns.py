"""A model as a run is handed it: each call counted, and under the run's turn deadline."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from creche._activities import Activities
from creche._errors import ModelError
from creche._limits import Limits
from creche._messages import Message
from creche._models import Model, ModelPart, ToolSpec
from creche._run_clock import RunClock
from creche._statistics import Tally


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
        limits: Limits,
        clock: RunClock,
    ) -> None:
        self._model = model
        self._tally = tally
        self._activities = activities
        self._timeout = limits.turn_timeout
        self._clock = clock

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
        within = self._clock.move_on_after(self._timeout)
        with self._activities.during("model", self.name), within as turn:
            async with self._model.open_stream(messages, tools) as stream:
                yield stream
        if turn.cancelled_caught:
            msg = f"The model's answer took longer than {self._timeout:g} s and was stopped."
            raise ModelError(msg, code="turn_timeout")
