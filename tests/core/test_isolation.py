"""What two objects share is found by walking, however it is hidden."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import itertools
import logging
import re
import types
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

import msgspec
import pytest
import trio
from tests.small_world import ADA, BOB, THREAD, context, infrastructure

import creche
from creche import InvalidContextError, IsolationError, UserExecutionContext, assert_isolated
from creche._isolation import mutables

SHARED: list[str] = []


class Holder:
    """Holds what it is given, in a dict of its own."""

    def __init__(self, held: object) -> None:
        self.held = held

    def get(self) -> object:
        return self.held


class Slotted:
    """The same in a slot."""

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Cannot be changed; what it holds perhaps can."""

    held: object


class Struct(msgspec.Struct, frozen=True):
    """msgspec's like."""

    held: Any


class Colour(enum.Enum):
    """Members are made once."""

    RED = 1


class Words(str):  # noqa: SLOT000  that is the point
    """Words that something can be hung on."""

    def __new__(cls, held: object) -> Self:
        words = super().__new__(cls, "words")
        words.held = held  # type: ignore[attr-defined]
        return words


class Row(tuple[int, ...]):  # noqa: SLOT001  that is the point
    """The same of a tuple."""

    def __new__(cls, held: object) -> Self:
        row = super().__new__(cls, (1,))
        row.held = held  # type: ignore[attr-defined]
        return row


class Thawed(Frozen):
    """Below a frozen dataclass, and none itself."""


ALIVE: list[object] = []


def KeptAlive(held: object) -> Holder:  # noqa: N802  it stands for a class
    ALIVE.append(holder := Holder(held))
    return holder


def counter() -> tuple[Callable[[], int], Callable[[], int]]:
    count = 0

    def one() -> int:
        nonlocal count
        count += 1
        return count

    def other() -> int:
        return count

    return one, other


def test_a_variable_that_two_functions_close_over_is_shared_if_one_rebinds_it() -> None:
    with pytest.raises(IsolationError, match="share a cell"):
        assert_isolated([(one, one) for one in [counter()[0]] for _ in "12"])
    one, other = counter()
    with pytest.raises(IsolationError):
        assert_isolated((one, (other, one)))


def closing_over(held: object) -> Callable[[], object]:
    return lambda: held


def generating(held: object) -> object:
    def generate() -> Any:
        yield held

    generator = generate()
    next(generator)
    return generator


class Uncollected(msgspec.Struct, frozen=True, gc=False):
    """A struct of which Python's collector is not told what it holds."""

    held: Any


def enum_of(held: object) -> Any:
    return enum.Enum("Kind", {"ONE": held})


WAYS: dict[str, Callable[[object], object]] = {
    "itself": lambda held: held,
    "an attribute": Holder,
    "a slot": Slotted,
    "a frozen dataclass": Frozen,
    "a frozen struct": Struct,
    "a tuple": lambda held: (1, (held,)),
    "a mapping that is read only": lambda held: MappingProxyType({"key": held}),
    "a dict": lambda held: {"key": [held]},
    "a deque": lambda held: collections.deque([held]),
    "an iterator": lambda held: iter([held]),
    "a closure": closing_over,
    "a default argument": lambda held: lambda given=held: given,
    "a keyword's default": lambda held: lambda *, given=held: given,
    "a partial function": lambda held: functools.partial(print, held),
    "a bound method": lambda held: Holder(held).get,
    "a generator's frame": generating,
    "an exception": ValueError,
    "a context manager": contextlib.nullcontext,
    "a builtin method": lambda held: cast("list[int]", held).append,
    "a method wrapper": lambda held: held.__len__,  # type: ignore[attr-defined]
    "a weak reference": lambda held: weakref.ref(KeptAlive(held)),
    "what hangs on words": Words,
    "what hangs on a tuple": Row,
    "one below a frozen dataclass": Thawed,
    "a struct that is not collected": Uncollected,
    "a slice": slice,
    "a type's parameter": lambda held: types.GenericAlias(list, (held,)),
    "an enum's value": lambda held: enum_of(held).ONE,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_two_share_is_found_through(way: Callable[[object], object]) -> None:
    shared: list[int] = []
    with pytest.raises(IsolationError, match="items 0 and 1 share a list"):
        assert_isolated((way(shared), way(shared)))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_two_only_look_alike_in_is_none_through(way: Callable[[object], object]) -> None:
    assert_isolated((way([]), way([])))


def function_with_an_attribute(held: object) -> Callable[[], None]:
    def function() -> None: ...

    function.held = held  # type: ignore[attr-defined]
    return function


def test_what_hangs_on_a_function_is_found() -> None:
    shared: list[int] = []
    with pytest.raises(IsolationError):
        assert_isolated([function_with_an_attribute(shared) for _ in "12"])


UNCHANGEABLE: dict[str, object] = {
    "words": "words",
    "a number": 7.5,
    "a moment": datetime.now(UTC),
    "a path": Path("here"),
    "a pattern": re.compile("x"),
    "a member of an enum": Colour.RED,
    "a tuple of such": (1, ("two", frozenset({3}))),
    "a class": Holder,
    "a module": itertools,
    "a function of a module": function_with_an_attribute,
    "a logger": logging.getLogger("creche"),
    "a frozen dataclass of such": Frozen(("a", 1)),
    "a struct of such": Struct("a"),
    "a lock of Trio's": trio.Lock(),
    "a type with parameters": dict[str, list[int]],
}


@pytest.mark.parametrize("item", UNCHANGEABLE.values(), ids=UNCHANGEABLE)
def test_it_is_fine_to_share(item: object) -> None:
    assert [*mutables(item)] == []
    assert_isolated((Holder(item), Holder(item)))


def test_the_way_to_it_is_told() -> None:
    shared: set[int] = set()
    one, other = Holder({"key": (shared,)}), Slotted([shared])
    with pytest.raises(IsolationError) as info:
        assert_isolated((Holder([]), one, other))
    words = str(info.value)
    assert "items 1 and 2 share a set" in words
    assert "items[1].held['key'][0]" in words
    assert "items[2].held[0]" in words


def test_infrastructure_is_shared_on_purpose() -> None:
    pool = Holder([])
    assert_isolated((Holder(pool), Holder(pool)), infrastructure=(pool,))


def test_a_circle_is_walked_once() -> None:
    circle: list[object] = []
    circle.append(circle)
    assert len([*mutables(circle)]) == 1


class TestContexts:
    def test_of_two_requests_share_nothing(self) -> None:
        passed = {"deep": [{"list": [1]}]}
        one, other = (
            UserExecutionContext.from_request(user_id="ada", thread_id="t", metadata=passed)
            for _ in "12"
        )
        one.verify_isolation(other)
        one.child("a").verify_isolation(other.child("b"))

    def test_are_told_apart_by_what_they_hold_and_not_by_their_ids(self) -> None:
        """The ids differ, and still one could change the other's session."""
        session = Holder([])
        one = context(ADA).with_database(lambda: session)
        other = context(BOB).with_database(lambda: session)
        with pytest.raises(IsolationError, match="Holder"):
            one.verify_isolation(other)
        one.verify_isolation(other, infrastructure=(session,))

    def test_metadata_that_is_nested_too_deep_is_refused(self) -> None:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(InvalidContextError, match="nested too deep"):
            UserExecutionContext.from_request(user_id="ada", thread_id="t", metadata={"deep": deep})

    def test_metadata_that_is_no_plain_data_is_refused(self) -> None:
        """It could not be copied, so whoever passed it in could still change it."""
        with pytest.raises(InvalidContextError, match="plain data, and has a Holder"):
            UserExecutionContext.from_request(
                user_id="ada",
                thread_id="t",
                metadata={"deep": [{"held": Holder(1)}]},
            )


class TestAttachments:
    def test_a_database_is_attached_to_a_new_context(self) -> None:
        bare = context()

        def scope() -> None: ...

        attached = bare.with_database(scope)
        assert bare.database is None
        assert attached.database is scope
        assert attached.child("part").database is scope
        same = (bare.user_id, bare.run_id, bare.request_id, bare.created_at)
        assert (
            attached.user_id,
            attached.run_id,
            attached.request_id,
            attached.created_at,
        ) == same

    def test_a_second_database_is_refused(self) -> None:
        attached = context().with_database(lambda: None)
        with pytest.raises(InvalidContextError, match="already"):
            attached.with_database(lambda: None)

    def test_what_opens_no_session_is_no_database(self) -> None:
        with pytest.raises(InvalidContextError, match="callable"):
            context().with_database("sqlite://")  # type: ignore[arg-type]

    def test_a_connection_is_attached_to_a_new_context(self) -> None:
        bare = context(ADA)
        connection_id = creche.new_connection_id(ADA)
        attached = bare.with_connection(connection_id)
        assert bare.connection_id is None
        assert attached.connection_id == connection_id
        assert attached.child("part").connection_id == connection_id

    def test_a_second_connection_is_refused(self) -> None:
        attached = context(ADA).with_connection(creche.new_connection_id(ADA))
        with pytest.raises(InvalidContextError, match="already"):
            attached.with_connection(creche.new_connection_id(ADA))

    @pytest.mark.parametrize(
        "connection_id",
        [
            creche.new_connection_id(BOB),
            creche.new_connection_id(ADA)[:-1] + "x",
            "x" + creche.new_connection_id(ADA),
            "made-up",
            "-",
            "nodash",
            "default",
            "",
        ],
    )
    def test_another_users_connection_is_refused(self, connection_id: str) -> None:
        with pytest.raises(InvalidContextError, match="connection_id") as info:
            context(ADA).with_connection(creche.ConnectionId(connection_id))
        assert connection_id not in str(info.value) or len(connection_id) < 2

    def test_are_shown_without_what_they_open(self) -> None:
        secret = Holder("hunter2")
        connection_id = creche.new_connection_id(ADA)
        attached = context(ADA).with_database(lambda: secret).with_connection(connection_id)
        assert "Holder" not in repr(attached)
        assert "lambda" not in repr(attached)
        assert "database" not in attached.to_dict()
        assert attached.to_dict()["connection_id"] == connection_id


class TestRuns:
    async def test_of_two_users_share_nothing_but_infrastructure(self) -> None:
        found: list[creche.RunContext] = []

        async def keep(run: creche.RunContext) -> None:
            found.append(run)
            await run.emit.text("here")
            await trio.sleep_forever()

        made = infrastructure(keep=keep)
        async with creche.open_supervisor(made) as supervisor:
            for user in (ADA, BOB):
                await supervisor.start(context(user, THREAD), "keep", "hi")
            while len(found) < 2:
                await trio.lowlevel.checkpoint()
            guards = made.registry.guards_of("keep")
            shared = (made, made.store, supervisor.journals._writer, *guards)
            assert_isolated(found, infrastructure=shared)
            with pytest.raises(IsolationError):
                assert_isolated(found)
            supervisor.cancel_all("user")

    @pytest.mark.parametrize(
        "name", ["context", "messages", "emit", "tools", "limits", "usage", "spans"]
    )
    async def test_cannot_be_given_anything_of_anothers(self, name: str) -> None:
        async def body(run: creche.RunContext) -> str:
            before = getattr(run, name)
            with pytest.raises(AttributeError):
                setattr(run, name, before)
            with pytest.raises(AttributeError):
                delattr(run, name)
            return "same" if getattr(run, name) is before else "another"

        async with creche.open_supervisor(infrastructure(body=body)) as supervisor:
            run = await supervisor.start(context(), "body", "hi")
            assert (await run.ended()).result == "same"


async def test_a_log_line_in_a_run_can_tell_whose_it_is() -> None:
    from creche._context import logged_context  # noqa: PLC0415

    seen: dict[str, str | None] = {}

    def whose() -> str | None:
        found = logged_context.get()
        return found.user_id if found else None

    async def look(run: creche.RunContext) -> None:
        async def below() -> None:
            seen[f"{run.context.user_id} below"] = whose()
            seen[f"{run.context.user_id} in a thread"] = await trio.to_thread.run_sync(whose)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(below)
        seen[run.context.user_id] = whose()

    async with creche.open_supervisor(infrastructure(look=look)) as supervisor:
        runs = [await supervisor.start(context(user), "look", "hi") for user in (ADA, BOB)]
        for run in runs:
            assert (await run.ended()).status == "success"
        assert whose() is None
    for user in (ADA, BOB):
        assert {seen[user], seen[f"{user} below"], seen[f"{user} in a thread"]} == {user}
