"""What one run took and did, counted by its own engine: for whoever asks what it cost."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """What a run took and did, its sub-agents' part included. Times are milliseconds."""

    queue_ms: int = 0  # from its being taken on until its turn on the thread came
    run_ms: int = 0  # from RUN_STARTED to the nursery's end
    model_calls: int = 0  # begun, whatever became of them
    untold_calls: int = 0  # of these, those that told no cost: one that is stopped does not
    input_tokens: int = 0  # as far as the models told
    output_tokens: int = 0
    tool_calls: int = 0  # begun
    tool_failures: int = 0  # whose result was an error; those that the run's end stopped are not
    subagents: int = 0  # begun, at all depths

    def to_dict(self) -> dict[str, Any]:
        """As it goes into `metadata.creche.statistics`."""
        # `asdict` copies deeply what cannot change.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(slots=True)
class Tally:
    """The counts of one run while it runs. Its agents are not handed it."""

    model_calls: int = 0
    subagents: int = 0
