"""A thread's latest messages, kept in memory while the thread is live."""

from __future__ import annotations

from collections.abc import Iterable

from creche._context import MessageId, RunId
from creche._messages import text_of
from creche._store import StoredMessage

_OVERHEAD = 256  # bytes that a message takes beside its words, roughly


class Conversation:
    """Messages run by run, in the order in which runs were asked for; only the latest runs'.

    What is in here is what the store has: messages are added once they are committed.
    """

    def __init__(self, *, most_runs: int) -> None:
        self._most_runs = most_runs
        # {run: {message id: the message}}; both dicts keep the order of adding
        self._runs: dict[RunId, dict[MessageId, StoredMessage]] = {}
        self.size = 0  # bytes, roughly

    def add(self, messages: Iterable[StoredMessage]) -> None:
        """Take messages in; one that is there already changes nothing."""
        for stored in messages:
            run = self._runs.setdefault(stored.run_id, {})
            if stored.message.id not in run:
                run[stored.message.id] = stored
                self.size += _size(stored)
        while len(self._runs) > self._most_runs:
            oldest = self._runs.pop(next(iter(self._runs)))
            self.size -= sum(map(_size, oldest.values()))

    def latest(self, runs: int) -> list[StoredMessage]:
        """The messages of the latest so many runs."""
        kept = list(self._runs.values())[-runs:] if runs else []
        return [stored for run in kept for stored in run.values()]


def _size(stored: StoredMessage) -> int:
    return _OVERHEAD + len(text_of(stored.message))
