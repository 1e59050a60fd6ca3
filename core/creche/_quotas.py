"""What the runs of one user share: how many tool calls a minute, and how many threads at once.

One user's flood or stuck threads leave another's untouched: a run reaches its own user's share,
and nothing that is for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Final

import trio

from creche._context import UserId
from creche._limits import Limits

_MINUTE: Final = 60.0  # seconds
_FEW: Final = 1024  # moments that are not worth looking through


@dataclasses.dataclass(slots=True)
class Rate:
    """At most so many a minute, kept as one moment. It has no clock: `now` is passed.

    A full minute's worth may come at once; after that, one as each `60 / per_minute` seconds
    pass. The moment is when all that was taken is paid for ("theoretical arrival time" of the
    generic cell rate algorithm, ITU-T I.371); behind it, it says nothing.
    """

    per_minute: int
    paid_at: float = -math.inf

    def take(self, now: float) -> float:
        """Count one; 0, or the seconds until there is room, and then nothing was counted."""
        interval = _MINUTE / self.per_minute
        paid_at = max(self.paid_at, now) + interval
        over = paid_at - now - _MINUTE
        if over > interval * 1e-6:  # sums of floats are not exact
            return over
        self.paid_at = paid_at
        return 0.0


@dataclasses.dataclass(slots=True, eq=False)
class ToolShare:
    """One user's part, held by each of the user's runs."""

    rate: Rate
    workers: trio.CapacityLimiter  # a place for each thread or process of a sync tool
    programs: trio.CapacityLimiter  # a place for each program that a run has started
    holders: int = 0

    def take(self) -> float:
        """Count one tool call; 0, or the seconds until the user may make another."""
        return self.rate.take(trio.current_time())

    @property
    def is_at_work(self) -> bool:
        """Whether a thread or process runs, be it an abandoned one."""
        return self.workers.borrowed_tokens > 0


class ToolQuotas:
    """The shares of a process. Made by who owns the runs, and handed to each as an argument."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[UserId, ToolShare] = {}  # an entry *is* `share`
        self._stuck: dict[UserId, ToolShare] = {}  # held no more, but with abandoned threads
        self._paid_at: dict[UserId, float] = {}  # of those that are neither
        self._crowded = _FEW

    @property
    def count(self) -> int:
        """How many users have a share right now."""
        return len(self._held) + len(self._stuck)

    @contextlib.contextmanager
    def share(self, user_id: UserId) -> Iterator[ToolShare]:
        """That user's share, the same for all runs that hold it at once. Within Trio.

        It is forgotten when the last of them leaves, but for one whose abandoned threads still
        run: these go on counting, and it is forgotten when anybody leaves after their end. What
        a user has taken in the last minute is remembered, one number a user.
        """
        share = self._held.get(user_id) or self._stuck.pop(user_id, None) or self._made(user_id)
        self._held[user_id] = share
        share.holders += 1
        try:
            yield share
        finally:
            share.holders -= 1
            if share.holders == 0:
                self._let_go(user_id)

    def _made(self, user_id: UserId) -> ToolShare:
        paid_at = self._paid_at.pop(user_id, -math.inf)
        rate = Rate(self._limits.tool_calls_per_minute, paid_at)
        return ToolShare(
            rate,
            workers=trio.CapacityLimiter(self._limits.tool_threads),
            programs=trio.CapacityLimiter(self._limits.programs),
        )

    def _let_go(self, user_id: UserId) -> None:
        left = {**self._stuck, user_id: self._held.pop(user_id)}
        self._stuck = {user: share for user, share in left.items() if share.is_at_work}
        now = trio.current_time()
        for user, share in left.items():
            if user not in self._stuck and share.rate.paid_at > now:
                self._paid_at[user] = share.rate.paid_at
        if len(self._paid_at) > self._crowded:
            self._paid_at = {user: at for user, at in self._paid_at.items() if at > now}
            self._crowded = max(_FEW, 2 * len(self._paid_at))
