"""Which of the runs that wait may begin: a thread's order, caps, and fairness between users.

No I/O and no clock. Of a thread, one run at a time, in the order of asking; of a user, as many as
the user's cap; of all, as many as the server's. Within these a user's runs begin in the order of
asking, and between users it is start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): a run
begins with the tag `max(virtual time, end of the user's one before)`, ends `1 / weight` later, and
the least tag is next. The virtual time is the tag of the run that began last.

What is known of a user is forgotten with the user's last run: who comes back comes as new, which
is worth `1 / weight` at most.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, TypeVar

from creche._context import ThreadId, UserId
from creche._errors import CrecheError

RunT = TypeVar("RunT", bound=Hashable)
ItemT = TypeVar("ItemT", bound=Hashable)
RankT = TypeVar("RankT", int, tuple[float, int])
Weight = Callable[[UserId], float]

_LEAST_RETRY: Final = 1.0  # seconds
_LAST_RETRY: Final = 30.0


def equal_weight(user_id: UserId) -> float:
    """Every user has the same share."""
    del user_id
    return 1.0


def retry_after(ages: Iterable[float]) -> float:
    """Seconds after which who met a cap may try again; `ages` are of the runs that execute.

    A guess: each has as long left as it has taken so far, and it is enough that one of them ends.
    """
    known = list(ages)
    guess = sum(known) / len(known) ** 2 if known else 0.0
    return round(min(max(guess, _LEAST_RETRY), _LAST_RETRY), 1)


class _Queue(Generic[RankT, ItemT]):
    """Items by their rank, the least first; any may be taken out. Amortised O(log n) each."""

    def __init__(self) -> None:
        self.ranks: dict[ItemT, RankT] = {}  # of what is in it
        self._heap: list[tuple[RankT, ItemT]] = []  # what was taken out may be in it still

    def __bool__(self) -> bool:
        return bool(self.ranks)

    def add(self, rank: RankT, item: ItemT) -> None:
        self.ranks[item] = rank
        heapq.heappush(self._heap, (rank, item))

    def first(self) -> tuple[RankT, ItemT]:
        while self.ranks.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0]

    def discard(self, item: ItemT) -> None:
        self.ranks.pop(item, None)
        if len(self._heap) > 2 * len(self.ranks) + 8:
            self._heap = [(rank, each) for each, rank in self.ranks.items()]
            heapq.heapify(self._heap)


@dataclasses.dataclass(slots=True)
class _Place:
    """Where one run stands."""

    ticket: int  # counts up in the order of asking
    user: UserId
    thread: ThreadId
    begun: bool = False
    excused: bool = False  # it takes no place of the caps


class _User(Generic[RunT]):
    """Of a user who has runs."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.earliest = 0.0  # virtual time before which no more begins
        self.executing = 0
        # {thread: its runs in order}; the first is the one that executes or may be next
        self.threads: dict[ThreadId, OrderedDict[RunT, None]] = {}
        self.waiting: OrderedDict[RunT, None] = OrderedDict()  # in the order of asking
        self.ready: _Queue[int, RunT] = _Queue()  # those that no other run of their thread precedes


class Admission(Generic[RunT]):
    """Who is in, and who may begin. Each change answers with the runs that may begin now.

    Each is O(log n), n being the runs that are in.
    """

    def __init__(self, *, per_user: int, most: int, weight: Weight = equal_weight) -> None:
        self._per_user = per_user
        self._most = most
        self._weight = weight
        self._places: dict[RunT, _Place] = {}
        self._users: dict[UserId, _User[RunT]] = {}
        # Users who could begin a run if the server had room: (tag, ticket of their next).
        self._contending: _Queue[tuple[float, int], UserId] = _Queue()
        self._executing = 0
        self._virtual_time = 0.0
        self._tickets = itertools.count()

    def enter(self, run: RunT, user: UserId, thread: ThreadId) -> list[RunT]:
        """A run was asked for. Raises CrecheError for a user's weight that is none."""
        if user not in self._users:
            self._users[user] = _User(self._weight_of(user))
        own = self._users[user]
        place = self._places[run] = _Place(next(self._tickets), user, thread)
        order = own.threads.setdefault(thread, OrderedDict())
        order[run] = None
        own.waiting[run] = None
        if len(order) == 1:
            own.ready.add(place.ticket, run)
        self._contend(user, own)
        return self._begin()

    def leave(self, run: RunT) -> list[RunT]:
        """A run has ended, or came to nothing."""
        place = self._places.pop(run)
        own = self._users[place.user]
        order = own.threads[place.thread]
        was_first = next(iter(order)) == run
        del order[run]
        own.waiting.pop(run, None)
        own.ready.discard(run)
        if place.begun and not place.excused:
            own.executing -= 1
            self._executing -= 1
        begun: list[RunT] = []
        if not order:
            del own.threads[place.thread]
        elif was_first:
            begun = self._come_first(own, next(iter(order)))
        if own.threads:
            self._contend(place.user, own)
        else:
            self._contending.discard(place.user)
            del self._users[place.user]
        if not self._users:
            self._virtual_time = 0.0
        return begun + self._begin()

    def excuse(self, run: RunT) -> list[RunT]:
        """A run that waits will not execute: it needs its thread's turn, but no place."""
        place = self._places[run]
        if place.begun or place.excused:
            return []
        own = self._users[place.user]
        place.excused = True
        own.waiting.pop(run)
        own.ready.discard(run)
        self._contend(place.user, own)
        order = own.threads[place.thread]
        return self._come_first(own, run) if next(iter(order)) == run else []

    def position(self, run: RunT) -> int:
        """Its place among those that wait, in the order in which they will begin; 1 is the next.

        0 once it has begun. As far as that is known: it counts what keeps it waiting now, so of
        others' runs only while the server is full. O(users) then, O(the user's runs) before.
        """
        place = self._places[run]
        own = self._users[place.user]
        if place.begun or place.excused:
            return 0
        is_full = self._executing >= self._most
        if not is_full and own.executing < self._per_user:
            order = itertools.takewhile(lambda other: other != run, own.threads[place.thread])
            return 1 + sum(other in own.waiting for other in order)
        ahead = sum(1 for _ in itertools.takewhile(lambda other: other != run, own.waiting))
        if not is_full:
            return 1 + ahead
        tag = max(self._virtual_time, own.earliest)
        if place.user in self._contending.ranks:
            tag = self._contending.ranks[place.user][0]
        tag += ahead / own.weight
        return (
            1
            + ahead
            + sum(
                self._before(tag, place.ticket, self._users[user], first)
                for user, (first, _) in self._contending.ranks.items()
                if user != place.user
            )
        )

    def _before(self, tag: float, ticket: int, other: _User[RunT], first: float) -> int:
        """How many runs of another, whose next has the tag `first`, begin before that tag."""
        between = (tag - first) * other.weight
        if between < 0:
            return 0
        earlier = math.ceil(between)
        if earlier == between and earlier < len(other.waiting):  # both at once: who asked first
            rival = next(itertools.islice(other.waiting, earlier, None))
            earlier += self._places[rival].ticket < ticket
        return min(earlier, len(other.waiting))

    def _weight_of(self, user: UserId) -> float:
        weight = self._weight(user)
        if not 0 < weight < math.inf:
            msg = f"a user's weight must be a number above 0, not {weight!r}"
            raise CrecheError(msg)
        return weight

    def _come_first(self, own: _User[RunT], run: RunT) -> list[RunT]:
        """No other run of its thread precedes this one any more."""
        place = self._places[run]
        if place.excused:
            place.begun = True
            return [run]
        own.ready.add(place.ticket, run)
        return []

    def _contend(self, user: UserId, own: _User[RunT]) -> None:
        if not own.ready or own.executing >= self._per_user:
            self._contending.discard(user)
        elif user not in self._contending.ranks:
            tag = max(self._virtual_time, own.earliest)
            self._contending.add((tag, own.ready.first()[0]), user)

    def _begin(self) -> list[RunT]:
        """Give the places that are free."""
        begun: list[RunT] = []
        while self._contending and self._executing < self._most:
            (tag, _), user = self._contending.first()
            self._contending.discard(user)
            own = self._users[user]
            _, run = own.ready.first()
            own.ready.discard(run)
            del own.waiting[run]
            own.executing += 1
            self._executing += 1
            self._places[run].begun = True
            self._virtual_time = tag
            own.earliest = tag + 1 / own.weight
            self._contend(user, own)
            begun.append(run)
        return begun
