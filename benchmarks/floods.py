"""An agent that says as much as it may, as fast as it may: the worst neighbour there can be."""

from __future__ import annotations

from types import MappingProxyType

from creche import RunContext


class Flood:
    """Never gives way but where it is made to."""

    async def run(self, run: RunContext) -> None:
        """Speak until it is stopped, or has said all that a run may."""
        while True:
            await run.emit.text("as fast as it may ")


agents = MappingProxyType({"flood": Flood})
