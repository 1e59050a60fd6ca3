"""The same agent twice: as creche runs it, and behind one semaphore, as the older design did."""

from __future__ import annotations

from typing import Final

import trio

from creche import ModelAgent, RunContext

# What the older design had: one place for everybody's work. It is the point of the comparison.
_ONE_FOR_ALL: Final = trio.Semaphore(1)  # creche: shared the benchmark's older design


class Isolated(ModelAgent):
    """Asks the model, calls the calculator, asks again."""

    tools = ("calculator",)


class OneAtATime(Isolated):
    """The same, while nobody else does."""

    async def run(self, run: RunContext) -> None:
        """Wait for everybody who came before, whoever they are."""
        async with _ONE_FOR_ALL:
            await super().run(run)


agents = {"isolated": Isolated, "one-at-a-time": OneAtATime}
