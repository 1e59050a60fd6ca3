"""Records that somebody waits for: taken by the store or refused as one, or withdrawn."""

from __future__ import annotations

import dataclasses
from typing import Final

import trio

from creche._context import RunId
from creche._errors import StoreUnavailableError
from creche._store import NewThread, QuestionRecord, RunRecord, StoredMessage

_ANSWER_TIMEOUT: Final = 15.0  # seconds that a proposer waits for a store that is away
_WITHDRAW_TIMEOUT: Final = 2.0  # seconds that a cancelled proposer waits for its fate


@dataclasses.dataclass(slots=True, eq=False)
class Proposal:
    """What one proposer wants committed."""

    opens: NewThread | None
    new_runs: tuple[RunRecord, ...]
    runs: tuple[RunRecord, ...]
    messages: tuple[StoredMessage, ...]
    questions: tuple[QuestionRecord, ...]
    rolls_back: tuple[RunId, ...]
    done: trio.Event = dataclasses.field(default_factory=trio.Event)
    error: Exception | None = None


class Proposals:
    """Those of one journal, in their order. Those that were taken are in the commit under way."""

    def __init__(self) -> None:
        self._waiting: list[Proposal] = []
        self._taken: tuple[Proposal, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, proposal: Proposal) -> None:
        self._waiting.append(proposal)

    def take(self) -> tuple[Proposal, ...]:
        """All that wait. They wait on until their commit is settled or refused."""
        self._taken = tuple(self._waiting)
        return self._taken

    def finish(self, error: Exception | None) -> None:
        """The commit under way is durable, or came to nothing because of `error`."""
        for proposal in self._taken:
            self._remove(proposal)
            proposal.error = error
            proposal.done.set()
        self._taken = ()

    def give_up(self, error: Exception) -> None:
        """Nothing of these, taken or not, can come into the store because of `error`."""
        self.take()
        self.finish(error)

    async def wait(self, proposal: Proposal) -> None:
        """Wait for its fate. Raises StoreUnavailableError if it was refused, or is not known."""
        try:
            with trio.move_on_after(_ANSWER_TIMEOUT):
                await proposal.done.wait()
        except trio.Cancelled:
            await self._withdraw(proposal)
            if not proposal.done.is_set() or proposal.error is not None:
                raise
            # It is durable, so the caller must know; Trio tells it at the next checkpoint.
        if not proposal.done.is_set():
            await self._withdraw(proposal)
        if not proposal.done.is_set():
            msg = "the store does not answer; whether the run was taken down is not known"
            raise StoreUnavailableError(msg)
        if proposal.error is not None:
            msg = "the store is not taking writes; nothing was started, try again"
            raise StoreUnavailableError(msg) from proposal.error

    async def _withdraw(self, proposal: Proposal) -> None:
        """Nothing may be committed behind the back of a proposer that has gone."""
        if proposal in self._taken:
            # Too late to take back, so its fate is waited for: one transaction, not more.
            with trio.move_on_after(_WITHDRAW_TIMEOUT, shield=True):
                await proposal.done.wait()
        self._remove(proposal)

    def _remove(self, proposal: Proposal) -> None:
        if proposal in self._waiting:
            self._waiting.remove(proposal)
