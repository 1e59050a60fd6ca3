"""A tracer that keeps what it is told, for tests to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

from creche import Span, SpanEnd, SpanStart


@dataclasses.dataclass(slots=True, eq=False)
class Told:
    """A span, as it was told."""

    started: SpanStart
    parent: Told | None
    ended: SpanEnd | None = None
    ends: int = 0  # how often it was ended
    breaks: Callable[[], BaseException] | None = None  # what it raises when it is to end

    def end(self, ended: SpanEnd) -> None:
        self.ends += 1
        self.ended = ended
        if self.breaks is not None:
            raise self.breaks()

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1


class RecordingTracer:
    """Every span, in the order of beginning."""

    def __init__(self) -> None:
        self.spans: list[Told] = []

    def begin(self, started: SpanStart, parent: Span | None) -> Told:
        told = Told(started, cast("Told | None", parent))
        self.spans.append(told)
        return told

    def tree(self) -> list[str]:
        """Kinds and names, indented by depth. Fails for a span that did not end, once."""
        assert [told for told in self.spans if told.ends != 1] == []
        return [f"{'  ' * t.depth}{t.started.kind} {t.started.name}" for t in self.spans]

    def end_of(self, kind: str) -> SpanEnd:
        """How the one span of that kind ended."""
        (told,) = (told for told in self.spans if told.started.kind == kind)
        assert told.ended is not None
        return told.ended
