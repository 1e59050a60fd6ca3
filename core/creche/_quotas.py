"""What the runs of one user share: tool calls a minute, threads at once, and what a day allows.

One user's flood or stuck threads leave another's untouched: a run reaches its own user's share,
and nothing that is for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

import trio

from creche._budget import KINDS, Allowance, Kind, Spending
from creche._context import UserId
from creche._limits import Limits

Clock = Callable[[], datetime]  # what time it is, in UTC


def utc_now() -> datetime:
    """The clock of the machine."""
    return datetime.now(UTC)


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


class DayShare:
    """What one user has spent today, in UTC, as far as it is known here.

    That is what the store knew when a run began here, and what the runs here have spent since,
    committed or not. What runs in other processes spend meanwhile, the next run learns.
    """

    def __init__(self, limit: Allowance, clock: Clock) -> None:
        self.limit = limit
        self._clock = clock
        self._day = self.today
        self._spent = Spending()

    @property
    def today(self) -> date:
        return self._clock().date()

    @property
    def spent(self) -> Spending:
        if self._day != (today := self.today):
            self._day, self._spent = today, Spending()
        return self._spent

    @property
    def left(self) -> Allowance:
        return self.limit if self.limit.is_none else self.limit.less(self.spent)

    def add(self, spending: Spending) -> None:
        self._spent = self.spent + spending

    def learn(self, day: date, stored: Spending) -> None:
        """The store has so much for that day, in which some of ours may be, or none."""
        if day == self.today:
            self._spent = self.spent.at_least(stored)

    def used_up(self) -> Kind | None:
        """What the user can spend no more of today, if anything."""
        return self.limit.leaves_nothing(self.spent, KINDS)

    def until_midnight(self) -> float:
        """Seconds until the next day begins."""
        moment = self._clock()
        midnight = datetime.combine(moment.date() + timedelta(days=1), time(), tzinfo=UTC)
        return (midnight - moment).total_seconds()


@dataclasses.dataclass(slots=True, eq=False)
class ToolShare:
    """One user's part, held by each of the user's runs."""

    rate: Rate
    day: DayShare
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

    def __init__(self, limits: Limits, clock: Clock = utc_now) -> None:
        self._limits = limits
        self._clock = clock
        self.of_a_day = limits.of_a_day
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
            DayShare(self.of_a_day, self._clock),
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
