"""What a new run does about those that are on its thread already.

The names are those of LangGraph's API.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

MultitaskStrategy = Literal["enqueue", "reject", "interrupt", "rollback"]

# They end whatever runs or waits on the thread, and are next. If what waits kept its place, an
# answer that nobody wants any more would come before the one that was asked for instead.
SUPERSEDING: Final[frozenset[MultitaskStrategy]] = frozenset({"interrupt", "rollback"})


def check_strategy(strategy: str) -> None:
    """Raise ValueError for what is no strategy."""
    if strategy not in get_args(MultitaskStrategy):
        known = ", ".join(get_args(MultitaskStrategy))
        msg = f"multitask_strategy is one of {known}"
        raise ValueError(msg)
