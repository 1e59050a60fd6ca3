"""What the runs of one user share: how many tool calls a minute, and how many threads at once.

One user's flood or stuck threads leave another's untouched, since nothing here is for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Final

import trio

from creche._context import UserId
from creche._limits import Limits

_MINUTE: Final = 60.0  # seconds
_FEW: Final = 1024  # entries that are not worth looking through


class Rate:
    """At most so many a minute for each user, kept as one moment a user. No clock, no sweeper.

    A full minute's worth may come at once; after that, one as each `60 / per_minute` seconds
    pass. The moment is when the user's account is empty again ("theoretical arrival time" of
    the generic cell rate algorithm, ITU-T I.371): entries behind it say nothing, and are dropped
    whenever the table has doubled.
    """

    def __init__(self, per_minute: int) -> None:
        self._interval = _MINUTE / per_minute
        self._empty_at: dict[UserId, float] = {}
        self._crowded = _FEW

    def __len__(self) -> int:
        return len(self._empty_at)

    def take(self, user_id: UserId, now: float) -> float:
        """Count one call; 0, or the seconds until there is room, and then nothing was counted."""
        empty_at = max(self._empty_at.get(user_id, now), now) + self._interval
        over = empty_at - now - _MINUTE
        if over > self._interval * 1e-6:  # sums of a float's thirds and sevenths are not exact
            return over
        self._empty_at[user_id] = empty_at
        if len(self._empty_at) > self._crowded:
            self._empty_at = {user: at for user, at in self._empty_at.items() if at > now}
            self._crowded = max(_FEW, 2 * len(self._empty_at))
        return 0.0


@dataclasses.dataclass(slots=True, eq=False)
class ToolShare:
    """One user's part, held by each of the user's runs."""

    user_id: UserId
    workers: trio.CapacityLimiter  # a place for each thread or process of a sync tool
    _rate: Rate
    holders: int = 0

    def take(self) -> float:
        """Count one tool call; 0, or the seconds until the user may make another."""
        return self._rate.take(self.user_id, trio.current_time())

    @property
    def is_at_work(self) -> bool:
        """Whether a thread or process runs, be it an abandoned one."""
        return self.workers.borrowed_tokens > 0


class ToolQuotas:
    """The shares of a process. Made by who owns the runs, and handed to each as an argument."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rate = Rate(limits.tool_calls_per_minute)
        self._held: dict[UserId, ToolShare] = {}  # an entry *is* `share`
        self._stuck: dict[UserId, ToolShare] = {}  # held no more, but with abandoned threads

    @property
    def count(self) -> int:
        """How many users have a share right now."""
        return len(self._held) + len(self._stuck)

    @contextlib.contextmanager
    def share(self, user_id: UserId) -> Iterator[ToolShare]:
        """That user's share, the same for all runs that hold it at once.

        It is forgotten when the last of them leaves, but for one whose abandoned threads still
        run: these go on counting, and it is forgotten when anybody leaves after their end.
        """
        share = self._held.get(user_id) or self._stuck.pop(user_id, None)
        if share is None:
            workers = trio.CapacityLimiter(self._limits.tool_threads)
            share = ToolShare(user_id, workers, self._rate)
        self._held[user_id] = share
        share.holders += 1
        try:
            yield share
        finally:
            share.holders -= 1
            if share.holders == 0:
                left = {**self._stuck, user_id: self._held.pop(user_id)}
                self._stuck = {user: one for user, one in left.items() if one.is_at_work}
