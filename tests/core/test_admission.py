"""Which waiting run may begin: the rules alone, without runs, tasks or a clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creche import CrecheError, ThreadId, UserId
from creche._admission import Admission, retry_after

# A run is `a1x`: user a, run 1, on the thread x; without a letter, on one of its own.


def user_of(run: str) -> UserId:
    return UserId(run[0])


def thread_of(run: str) -> ThreadId:
    return ThreadId(run[-1] if run[-1].isalpha() else run)


def admission(
    per_user: int = 100, most: int = 100, weights: Mapping[str, float] | None = None
) -> Admission[str]:
    def weight(user: UserId) -> float:
        return (weights or {}).get(user, 1.0)

    return Admission(per_user=per_user, most=most, weight=weight)


def change(door: Admission[str], what: str) -> list[str]:
    """`+run` comes, `-run` has ended, `~run` was cancelled in the queue."""
    kind, run = what[0], what[1:]
    if kind == "+":
        return door.enter(run, user_of(run), thread_of(run))
    return door.leave(run) if kind == "-" else door.excuse(run)


def drained(door: Admission[str], running: Iterable[str]) -> list[str]:
    """The order in which all others begin, if what runs ends one after the other."""
    order: list[str] = []
    left = list(running)
    while left:
        begun = door.leave(left.pop(0))
        order += begun
        left += begun
    return order


# name: (per user, in all, weights, [(change, runs that begin by it)])
STORIES: dict[str, tuple[int, int, dict[str, float], list[tuple[str, str]]]] = {
    "a thread's runs begin one at a time and in order": (
        9,
        9,
        {},
        [("+a1x", "a1x"), ("+a2x", ""), ("+a3x", ""), ("-a1x", "a2x"), ("-a2x", "a3x")],
    ),
    "other threads do not wait for it": (
        9,
        9,
        {},
        [("+a1x", "a1x"), ("+a2x", ""), ("+a3y", "a3y")],
    ),
    "threads of one name are two users' own": (9, 9, {}, [("+a1x", "a1x"), ("+b1x", "b1x")]),
    "one that leaves the middle of its thread is in nobody's way": (
        9,
        9,
        {},
        [("+a1x", "a1x"), ("+a2x", ""), ("+a3x", ""), ("-a2x", ""), ("-a1x", "a3x")],
    ),
    "a user at the cap waits, others do not": (
        2,
        9,
        {},
        [("+a1", "a1"), ("+a2", "a2"), ("+a3", ""), ("+b1", "b1"), ("-a1", "a3")],
    ),
    "a user's runs begin in the order of asking, unless their thread holds them up": (
        1,
        9,
        {},
        [
            ("+a1x", "a1x"),
            ("+a2x", ""),
            ("+a3y", ""),
            ("+a4z", ""),
            ("-a1x", "a2x"),
            ("-a2x", "a3y"),
            ("-a3y", "a4z"),
        ],
    ),
    "what waits for its thread lets later ones of its user go first": (
        2,
        9,
        {},
        [("+a1x", "a1x"), ("+a2x", ""), ("+a3y", "a3y"), ("+a4z", ""), ("-a3y", "a4z")],
    ),
    "on a full server, users take turns": (
        9,
        1,
        {},
        [
            ("+a1", "a1"),
            ("+a2", ""),
            ("+a3", ""),
            ("+b1", ""),
            ("+c1", ""),
            ("+b2", ""),
            ("-a1", "b1"),
            ("-b1", "c1"),
            ("-c1", "a2"),
            ("-a2", "b2"),
            ("-b2", "a3"),
        ],
    ),
    "who has twice the weight is given two for one": (
        9,
        1,
        {"a": 2.0},
        [
            ("+z1", "z1"),
            ("+a1", ""),
            ("+a2", ""),
            ("+a3", ""),
            ("+a4", ""),
            ("+b1", ""),
            ("+b2", ""),
            ("-z1", "a1"),
            ("-a1", "b1"),
            ("-b1", "a2"),
            ("-a2", "a3"),
            ("-a3", "b2"),
            ("-b2", "a4"),
        ],
    ),
    "who was held up by the own cap has saved nothing for later": (
        1,
        2,
        {},
        [
            ("+a1", "a1"),
            ("+a2", ""),
            ("+b1", "b1"),
            ("-b1", ""),
            ("+b2", "b2"),
            ("-b2", ""),
            ("+b3", "b3"),
            ("+c1", ""),
            ("-a1", "c1"),
            ("-c1", "a2"),
        ],
    ),
    "one that was cancelled in the queue needs its thread's turn, and no place": (
        9,
        1,
        {},
        [
            ("+a1x", "a1x"),
            ("+a2x", ""),
            ("+b1", ""),
            ("~a2x", ""),
            ("-a1x", "a2x b1"),
            ("+a3x", ""),
            ("-b1", ""),
            ("-a2x", "a3x"),
        ],
    ),
    "one that is cancelled at the head of its thread begins at once": (
        9,
        1,
        {},
        [("+a1", "a1"), ("+b1", ""), ("~b1", "b1"), ("-b1", ""), ("-a1", "")],
    ),
    "what runs already is not excused": (
        9,
        1,
        {},
        [("+a1", "a1"), ("+b1", ""), ("~a1", ""), ("-a1", "b1")],
    ),
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_who_begins_when(
    story: tuple[int, int, dict[str, float], list[tuple[str, str]]],
) -> None:
    per_user, most, weights, changes = story
    door = admission(per_user, most, weights)
    for what, begins in changes:
        assert change(door, what) == begins.split(), what


class Plain:
    """The same rules, as one would write them who has all the time in the world."""

    def __init__(self, per_user: int, most: int, weights: Mapping[str, float]) -> None:
        self.per_user, self.most, self.weights = per_user, most, weights
        self.order: list[str] = []  # all that are in
        self.begun: list[str] = []
        self.excused: list[str] = []
        self.time = 0.0
        self.earliest: dict[str, float] = {}
        self.tags: dict[str, tuple[float, int]] = {}

    def first_of_thread(self, run: str) -> bool:
        same = [r for r in self.order if (r[0], thread_of(r)) == (run[0], thread_of(run))]
        return same[0] == run

    def executing(self, user: str = "") -> int:
        places = [run for run in self.begun if run not in self.excused]
        return sum(run.startswith(user) for run in places)

    def ready(self, user: str) -> list[str]:
        waiting = [r for r in self.order if r not in self.begun and r not in self.excused]
        return [r for r in waiting if r[0] == user and self.first_of_thread(r)]

    def step(self, what: str, tickets: Mapping[str, int]) -> list[str]:
        kind, run = what[0], what[1:]
        if kind == "+":
            self.order.append(run)
        elif kind == "-":
            for listed in (self.order, self.begun, self.excused):
                if run in listed:
                    listed.remove(run)
        elif run not in self.begun + self.excused:
            self.excused.append(run)
        here = {run[0] for run in self.order}
        self.earliest = {user: tag for user, tag in self.earliest.items() if user in here}
        self.time = self.time if here else 0.0
        begins = [
            each for each in self.excused if each not in self.begun and self.first_of_thread(each)
        ]
        self.begun += begins
        while True:
            self.contend(tickets)
            if not self.tags or self.executing() >= self.most:
                return begins
            user = min(self.tags, key=self.tags.__getitem__)
            self.time = self.tags.pop(user)[0]
            self.earliest[user] = self.time + 1 / self.weights.get(user, 1.0)
            chosen = self.ready(user)[0]
            self.begun.append(chosen)
            begins.append(chosen)

    def contend(self, tickets: Mapping[str, int]) -> None:
        for user in {run[0] for run in self.order} | set(self.tags):
            if not self.ready(user) or self.executing(user) >= self.per_user:
                self.tags.pop(user, None)
            elif user not in self.tags:
                tag = max(self.time, self.earliest.get(user, 0.0))
                self.tags[user] = (tag, tickets[self.ready(user)[0]])


WEIGHTS = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]))


@settings(max_examples=400, deadline=None)
@given(
    per_user=st.integers(1, 3),
    most=st.integers(1, 4),
    weights=WEIGHTS,
    data=st.data(),
)
def test_whatever_comes_and_goes_it_does_as_the_plain_rules_say(
    per_user: int, most: int, weights: dict[str, float], data: st.DataObject
) -> None:
    door, plain = admission(per_user, most, weights), Plain(per_user, most, weights)
    tickets: dict[str, int] = {}
    threads: dict[tuple[str, str], list[str]] = {}  # {(user, thread): in the order of asking}
    for step in range(data.draw(st.integers(1, 40))):
        kind = data.draw(st.sampled_from("+++--~"))
        if kind == "+" or not plain.order:
            user, thread = data.draw(st.sampled_from("abc")), data.draw(st.sampled_from("xyz"))
            what = f"+{user}{step}{thread}"
            tickets[what[1:]] = step
            threads.setdefault((user, thread), []).append(what[1:])
        else:
            what = kind + data.draw(st.sampled_from(plain.order))
        begun = change(door, what)
        assert begun == plain.step(what, tickets), what
        assert plain.executing() <= most
        for user in "abc":
            assert plain.executing(user) <= per_user
            free = plain.executing() < most and plain.executing(user) < per_user
            assert not (free and plain.ready(user)), "a place stays free and somebody waits for it"
        for run in plain.order:
            assert (door.position(run) == 0) == (run in plain.begun or run in plain.excused)
    order = [*plain.begun]
    left = [*plain.begun]
    while left:
        begun = door.leave(left.pop(0))
        left += begun
        order += begun
    assert len(order) == len(plain.order), "everything comes to its turn"
    for runs in threads.values():
        assert [run for run in order if run in runs] == [run for run in runs if run in order]
    assert not door._places
    assert not door._users, "nothing of a user is kept"
    assert not door._contending
    assert door._virtual_time == 0.0


@given(
    weights=st.tuples(*[st.sampled_from([0.3, 0.5, 1.0, 2.0, 7.0])] * 3),
    most=st.integers(1, 5),
    count=st.integers(1, 30),
)
def test_between_users_who_always_want_more_shares_are_as_their_weights(
    weights: tuple[float, float, float], most: int, count: int
) -> None:
    """At every moment, by not more than one run of each."""
    shares = dict(zip("abc", weights, strict=True))
    door = admission(1000, most, shares)
    running = [
        run for n in range(most) for run in door.enter(f"z{n}", UserId("z"), ThreadId(f"{n}"))
    ]
    for n in range(count):
        for user in "abc":
            assert door.enter(f"{user}{n}", UserId(user), ThreadId(f"{user}{n}")) == []
    given_to: Counter[str] = Counter()
    while all(given_to[user] < count for user in "abc"):
        for begun in door.leave(running.pop(0)):
            given_to[begun[0]] += 1
            running.append(begun)
        for one in "abc":
            for other in "abc":
                ahead = given_to[one] / shares[one] - given_to[other] / shares[other]
                assert ahead <= 1 / shares[one] + 1 / shares[other] + 1e-9


@given(
    flooding=st.integers(1, 5),
    most=st.integers(1, 5),
    ended=st.integers(0, 60),
)
def test_a_calm_user_waits_for_one_run_of_each_other_at_most(
    flooding: int, most: int, ended: int
) -> None:
    door = admission(1000, most)
    users = "abcde"[:flooding]
    running: list[str] = []
    for n in range(100):
        for user in users:
            running += door.enter(f"{user}{n}", UserId(user), ThreadId(f"{user}{n}"))
    for _ in range(ended):
        running += door.leave(running.pop(0))
    assert door.enter("q0", UserId("q"), ThreadId("q")) == []
    assert 1 <= door.position("q0") <= flooding + 1
    order = drained(door, running)
    before = Counter(run[0] for run in order[: order.index("q0")])
    assert set(before.values()) <= {1}


@settings(max_examples=200)
@given(
    runs=st.lists(st.sampled_from("abcd"), min_size=2, max_size=25),
    weights=WEIGHTS,
    ended=st.integers(0, 5),
)
def test_positions_on_a_full_server_are_the_order_if_nobody_else_comes(
    runs: list[str], weights: dict[str, float], ended: int
) -> None:
    """Where each run has a thread of its own, they are exact."""
    door = admission(1000, 1, weights)
    running: list[str] = []
    for n, user in enumerate(runs):
        running += door.enter(f"{user}{n}", UserId(user), ThreadId(str(n)))
    for _ in range(min(ended, len(runs) - 1)):
        running = door.leave(running[0])
    told = {run: door.position(run) for run in door._places}
    assert told.pop(running[0]) == 0
    assert {run: place for place, run in enumerate(drained(door, running), 1)} == told


def test_a_position_counts_what_keeps_the_run_waiting_and_nothing_else() -> None:
    door = admission(3, 5)
    for run in ("a1x", "a2x", "a3x", "a4y", "b1", "b2"):
        door.enter(run, user_of(run), thread_of(run))
    assert [door.position(run) for run in ("a1x", "a2x", "a3x", "a4y")] == [0, 1, 2, 0]
    door.enter("a5z", UserId("a"), ThreadId("z"))  # now the user is at the cap, the server is full
    door.enter("a6w", UserId("a"), ThreadId("w"))
    assert door.position("a6w") == 3, "two of its user wait already, whatever for"
    door.enter("c1", UserId("c"), ThreadId("c"))
    assert door.position("c1") == 1, "the user who is at the cap is not before anybody"
    door.excuse("a2x")
    assert [door.position(run) for run in ("a2x", "a3x", "a6w")] == [0, 2, 3], "and c1 before them"


def test_who_comes_and_goes_in_the_queue_leaves_no_trace() -> None:
    door = admission(1, 1)
    door.enter("a0", UserId("a"), ThreadId("0"))
    door.enter("a1", UserId("a"), ThreadId("1"))
    for n in range(2, 5000):
        for user in "ab":
            door.enter(f"{user}{n}", UserId(user), ThreadId(str(n)))
            assert door.leave(f"{user}{n}") == []
    assert len(door._users[UserId("a")].ready._heap) < 20
    assert len(door._contending._heap) < 20
    assert set(door._places) == {"a0", "a1"}


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused_and_leaves_nothing(weight: float) -> None:
    door = admission(weights={"a": weight})
    with pytest.raises(CrecheError, match="weight must be a number above 0"):
        door.enter("a1", UserId("a"), ThreadId("x"))
    assert not door._users
    assert not door._places


@pytest.mark.parametrize(
    ("ages", "seconds"),
    [([], 1.0), ([0.1], 1.0), ([12.34], 12.3), ([20.0, 20.0], 10.0), ([600.0], 30.0)],
)
def test_who_meets_a_cap_is_told_to_wait_for_about_as_long_as_the_next_end_takes(
    ages: list[float], seconds: float
) -> None:
    assert retry_after(ages) == seconds
