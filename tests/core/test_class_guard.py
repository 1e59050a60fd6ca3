"""What a run writes to its agent's class reaches no later run, and fails the runs it may have."""

from __future__ import annotations

import copy
import enum
import functools
import logging
import typing
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import trio
from tests.small_world import agent_of, context, infrastructure, log_of, terminals_of
from trio.testing import MockClock

from creche import (
    AgentClassRegistry,
    MemoryStore,
    ModelAgent,
    RunContext,
    RunError,
    RunOutcome,
    open_supervisor,
    text_of,
)
from creche._agents import check_agent_class
from creche._class_guard import ClassGuard, ClassWatch
from creche._owned import classes_of

CANARY = "canary-3f1d"


def wrapping(function: Any) -> Any:
    def wrapper(*given: Any) -> Any:
        return function(*given)

    return functools.wraps(function)(wrapper)


def make_writer() -> type[Any]:
    """An agent that does to its class what it is asked, and then looks what is there."""
    closed_over = "as it was"

    class Meta(type):
        word = "as it was"

        def method(cls) -> str:
            return "as it was"

    class Beside:
        word = "as it was"

    class Kind(enum.Flag):
        ONE = 1
        TWO = 2

    class Base:
        inherited: ClassVar[str] = "as it was"

    class Writer(Base, metaclass=Meta):
        greeting: ClassVar[str] = "hello"
        kind = Kind.ONE
        part = functools.partial(str, encoding="utf8")

        class Nested:
            word = "as it was"

            class Deep:
                def method(self) -> str:
                    return "as it was"

        @property
        def called(self) -> str:
            return "as it was"

        @staticmethod
        def apart(given: str = "as it was") -> str:
            return given

        @wrapping
        def wrapped(self, *, given: str = "as it was") -> str:
            return given

        def closes(self) -> str:
            return closed_over + Beside.word

        @classmethod
        def remember(cls, value: str) -> None:
            cls.kept = value  # type: ignore[attr-defined]

        async def helper(self) -> str:
            return "helped"

        async def run(self, run: RunContext) -> Any:  # noqa: PLR0912, PLR0915  a case a way
            cls: Any = type(self)
            match text_of(run.messages[-1]):
                case "add":
                    cls.secret = CANARY
                case "classmethod":
                    self.remember(CANARY)
                case "by name":
                    Writer.secret = CANARY  # type: ignore[attr-defined]
                case "change":
                    cls.greeting = CANARY
                case "equal":
                    cls.greeting = f"{self.greeting[:2]}llo"
                case "delete":
                    del cls.greeting
                case "base":
                    Base.inherited = CANARY
                case "method":
                    cls.helper = lambda self: CANARY
                case "rename":
                    cls.welcome = cls.greeting
                    del cls.greeting
                case "metaclass":
                    type(cls).word = CANARY
                case "metaclass's method":
                    type(cls).method.kept = CANARY
                case "name":
                    cls.__name__ = CANARY
                case "bases":
                    cls.__bases__ = (type("Evil", (Base,), {"inherited": CANARY}),)
                case "nested":
                    cls.Nested.word = CANARY
                case "nested method":
                    cls.Nested.Deep.method.__defaults__ = (CANARY,)
                case "beside":
                    Beside.word = CANARY
                case "attribute":
                    cls.run.kept = CANARY
                case "attributes":
                    cls.run.__dict__ = {"kept": CANARY}
                case "attribute of a wrapped one":
                    cls.wrapped.__wrapped__.kept = CANARY
                case "keyword's default":
                    cls.wrapped.__wrapped__.__kwdefaults__["given"] = CANARY
                case "keyword's defaults":
                    cls.helper.__kwdefaults__ = {"given": CANARY}
                case "default":
                    cls.apart.__defaults__ = (CANARY,)
                case "attribute of a staticmethod":
                    vars(cls)["apart"].kept = CANARY
                case "attribute of a property":
                    cls.called.fget.kept = CANARY
                case "code":
                    cls.helper.__code__ = (lambda self: CANARY).__code__
                case "docstring":
                    cls.run.__doc__ = CANARY
                case "cell":
                    cls.closes.__closure__[1].cell_contents = CANARY
                case "partial's keyword":
                    cls.part.keywords["errors"] = CANARY
                case "partial's attribute":
                    cls.part.kept = CANARY
                case "annotation":
                    cls.run.__annotations__["kept"] = CANARY
                case "annotations":
                    cls.run.__annotations__ = {"kept": CANARY}
                case "annotation of a wrapped one":
                    cls.wrapped.__annotations__["kept"] = CANARY
                case "function's name":
                    cls.run.__name__ = CANARY
                case "function's module":
                    cls.run.__module__ = CANARY
                case "class's annotation":
                    cls.__annotations__["kept"] = CANARY
                case "class's annotations":
                    cls.__annotations__ = {"kept": CANARY}
                case "first annotations":
                    Beside.__annotations__ = {"kept": CANARY}
                case "first annotation":
                    Beside.__annotations__["kept"] = CANARY
                case "as if by pydantic":
                    setattr(cls, "__pydantic_kept", CANARY)  # else it is mangled
                case "as if by pydantic, by a name of its own":
                    cls.__pydantic_fields__ = CANARY
                case "as if by msgspec":
                    cls.__msgspec_cache__ = CANARY
                case "member":
                    Kind.ONE.kept = CANARY  # type: ignore[attr-defined]
                case "member's value":
                    Kind.ONE._value_ = CANARY  # type: ignore[assignment]
                case "member's inversion":
                    Kind.ONE._inverted_ = CANARY  # type: ignore[attr-defined]
                case "fail":
                    cls.secret = CANARY
                    raise RunError("no")
                case "hang":
                    cls.secret = CANARY
                    await trio.sleep_forever()
                case "subagent":
                    return (await run.spawn("writer", "add")).result
                case "sleep":
                    await trio.sleep(10)
                case _:
                    pass
            functions: Any = (cls.run, cls.helper, cls.apart, cls.closes, Meta.method)
            functions += (cls.wrapped.__wrapped__, cls.called.fget, cls.Nested.Deep.method)
            return [
                *(
                    {name: str(value) for name, value in vars(each).items() if name[:2] != "__"}
                    for each in (Writer, Base, Meta, Beside, Writer.Nested)
                ),
                cls.__name__,
                str(cls.__mro__),
                *(str((vars(f), f.__defaults__, f.__kwdefaults__, f.__doc__)) for f in functions),
                str((vars(vars(cls)["apart"]), vars(cls.part), cls.part.keywords)),
                *(str((f.__annotations__, f.__name__, f.__module__)) for f in functions),
                str([vars(each).get("__annotations__") or None for each in (cls, Beside)]),
                sorted(name for name in vars(cls) if "pydantic" in name or "msgspec" in name),
                str(vars(Kind.ONE)),
                await self.helper(),
                self.closes(),
            ]

    return Writer


async def runs_of(agent: type[Any], *asked: str, store: MemoryStore) -> list[RunOutcome]:
    """What becomes of runs that are asked one after another, each on a thread of its own."""
    made = infrastructure(store=store, writer=agent)
    async with open_supervisor(made) as supervisor:
        outcomes: list[RunOutcome] = []
        for number, words in enumerate(asked):
            who = context("ada" if number % 2 else "bob", f"thread-{number}")
            run = await supervisor.start(who, "writer", words)
            with trio.move_on_after(5):
                await run.ended()
            run.cancel()
            outcomes.append(await run.ended())
    return outcomes


@pytest.mark.parametrize(
    "how",
    [
        *("add", "classmethod", "by name", "change", "equal", "delete", "base", "method", "rename"),
        *("fail", "hang", "subagent", "metaclass", "metaclass's method", "name", "bases"),
        *("nested", "nested method", "beside", "attribute", "attributes", "keyword's default"),
        *("attribute of a wrapped one", "keyword's defaults", "default", "code", "docstring"),
        *("attribute of a staticmethod", "attribute of a property", "cell"),
        *("partial's keyword", "partial's attribute"),
        *("annotation", "annotations", "annotation of a wrapped one", "function's name"),
        *("function's module", "class's annotation", "class's annotations"),
        *("first annotations", "first annotation", "as if by pydantic", "as if by msgspec"),
        *("as if by pydantic, by a name of its own", "member", "member's value"),
        "member's inversion",
    ],
)
async def test_what_a_run_writes_to_its_class_no_later_run_sees_and_the_run_fails(
    how: str,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStore()
    before, bad, after = await runs_of(make_writer(), "look", how, "look", store=store)
    assert (bad.status, bad.receipt.reason) == ("failed", "isolation_violation")
    assert (before.status, after.status) == ("success", "success")
    assert CANARY not in str(after.result)
    assert after.result == before.result
    (terminal,) = terminals_of(await log_of(store, "ada", "thread-1"))
    assert (terminal["type"], terminal["code"]) == ("RUN_ERROR", "isolation_violation")
    (logged,) = (record for record in caplog.records if record.name == "creche.isolation")
    assert logged.levelno == logging.ERROR
    assert CANARY not in caplog.text


async def test_a_run_that_begins_while_the_writer_is_alive_sees_nothing_either(
    autojump_clock: MockClock,
) -> None:
    async with open_supervisor(infrastructure(writer=make_writer())) as supervisor:
        writer = await supervisor.start(context("ada", "a"), "writer", "hang")
        await trio.sleep(1)
        later = await supervisor.start(context("bob", "b"), "writer", "look")
        outcome = await later.ended()
        assert outcome.status == "success"
        assert CANARY not in str(outcome.result)
        writer.cancel()
        assert (await writer.ended()).receipt.reason == "isolation_violation"


async def test_a_run_that_may_have_seen_what_another_wrote_does_not_succeed(
    autojump_clock: MockClock,
) -> None:
    """Its result may hold what is another's; whose it is cannot be known."""
    async with open_supervisor(infrastructure(writer=make_writer())) as supervisor:
        neighbour = await supervisor.start(context("bob", "b"), "writer", "sleep")
        await trio.sleep(1)
        writer = await supervisor.start(context("ada", "a"), "writer", "add")
        assert (await writer.ended()).receipt.reason == "isolation_violation"
        assert (await neighbour.ended()).receipt.reason == "isolation_violation"
        later = await supervisor.start(context("bob", "b"), "writer", "look")
        assert (await later.ended()).status == "success"


async def test_what_a_sub_agent_writes_to_its_class_fails_the_run_that_spawned_it(
    autojump_clock: MockClock,
) -> None:
    async def asks(run: RunContext) -> Any:
        return (await run.spawn("writer", text_of(run.messages[0]))).result

    made = infrastructure(asks=agent_of(asks), writer=make_writer())
    async with open_supervisor(made) as supervisor:
        bad = await supervisor.start(context("ada", "a"), "asks", "add")
        assert (await bad.ended()).receipt.reason == "isolation_violation"
        later = await supervisor.start(context("bob", "b"), "asks", "look")
        outcome = await later.ended()
    assert outcome.status == "success"
    assert CANARY not in str(outcome.result)


async def test_a_base_that_two_agents_share_is_watched_for_both(
    autojump_clock: MockClock,
) -> None:
    class Reads(ModelAgent):
        async def run(self, run: RunContext) -> Any:
            return getattr(self, "secret", None)

    class Writes(ModelAgent):
        async def run(self, run: RunContext) -> Any:
            ModelAgent.secret = CANARY  # type: ignore[attr-defined]
            await trio.sleep(10)

    async with open_supervisor(infrastructure(reads=Reads, writes=Writes)) as supervisor:
        writer = await supervisor.start(context("ada", "a"), "writes", "x")
        await trio.sleep(1)
        reader = await supervisor.start(context("bob", "b"), "reads", "x")
        outcome = await reader.ended()
        assert (outcome.status, outcome.result) == ("success", None)
        assert (await writer.ended()).receipt.reason == "isolation_violation"
    assert not hasattr(ModelAgent, "secret")


async def test_what_python_itself_writes_to_a_class_is_no_violation(
    autojump_clock: MockClock,
) -> None:
    class Kind(enum.Flag):
        ONE = 1
        TWO = 2

    class Copies:
        kind = Kind.ONE

        async def run(self, run: RunContext) -> None:
            copy.copy(self)
            typing.get_type_hints(type(self))
            assert type(self).__annotations__ is not None
            assert ~self.kind is Kind.TWO
            self.mine = 1

    async with open_supervisor(infrastructure(copies=Copies)) as supervisor:
        for _ in range(2):
            run = await supervisor.start(context(), "copies", "x")
            assert (await run.ended()).status == "success"


async def test_an_agent_whose_class_is_let_alone_succeeds(autojump_clock: MockClock) -> None:
    """Whatever its bases: protocols and abstract classes keep books of their own."""

    class Chat(ModelAgent, typing.Generic[typing.TypeVar("T")]):  # type: ignore[misc]
        async def run(self, run: RunContext) -> None:
            assert isinstance(self, ModelAgent)

    async with open_supervisor(infrastructure(chat=Chat)) as supervisor:
        for _ in range(3):
            run = await supervisor.start(context(), "chat", "x")
            assert (await run.ended()).status == "success"


def test_the_classes_of_an_agent_are_those_that_somebody_wrote() -> None:
    class Base: ...

    class Mine(Base):
        async def run(self, run: RunContext) -> None: ...

    assert classes_of(Mine) == (Mine, Base)
    registry = AgentClassRegistry({"one": Mine, "two": type("Other", (Base,), {"run": Mine.run})})
    one, two = registry.guards_of("one"), registry.guards_of("two")
    # The base's, and that of the method that they share.
    assert (one, len(two), set(one) < set(two)) == (one, 3, True)


def test_a_class_is_put_back_to_what_it_was_attribute_by_attribute() -> None:
    guarded: Any = agent_of(None, ())  # type: ignore[arg-type]
    guard = ClassGuard(check_agent_class("made", guarded)[-1])
    was = dict(vars(guarded))
    guard.check()
    assert guard.breaches == 0
    guarded.one, guarded.two = 1, 2
    guarded.tools = ("x",)
    del guarded.run
    guard.check()
    assert (guard.breaches, dict(vars(guarded))) == (1, was)
    guard.check()
    assert guard.breaches == 1
    last = next(reversed(vars(guarded)))  # another name in its place, for the same value
    setattr(guarded, f"{last}_too", getattr(guarded, last))
    delattr(guarded, last)
    guard.check()
    assert (guard.breaches, dict(vars(guarded))) == (2, was)


class TestVariables:
    """Those that a method closes over are the function's around the class, too."""

    @staticmethod
    def reading() -> tuple[type[Any], Callable[[Any], None]]:
        client: Any = "none yet"

        def put(value: Any) -> None:
            nonlocal client
            client = value

        class Reads:
            async def run(self, run: RunContext) -> Any:
                await trio.sleep(10)
                return client

        return Reads, put

    async def test_may_be_set_by_it_before_a_run_and_between_two(
        self, autojump_clock: MockClock
    ) -> None:
        agent, put = self.reading()
        async with open_supervisor(infrastructure(reads=agent)) as supervisor:
            for value in ("one", "two"):
                put(value)
                run = await supervisor.start(context(), "reads", "x")
                assert (await run.ended()).result == value

    async def test_do_not_change_while_runs_are_alive(self, autojump_clock: MockClock) -> None:
        agent, put = self.reading()
        async with open_supervisor(infrastructure(reads=agent)) as supervisor:
            alive = await supervisor.start(context("ada", "a"), "reads", "x")
            await trio.sleep(1)
            put("two")
            later = await supervisor.start(context("bob", "b"), "reads", "x")
            assert (await alive.ended()).receipt.reason == "isolation_violation"
            assert (await later.ended()).result == "none yet"

    async def test_may_change_at_any_time_if_what_they_held_is_shared(
        self, autojump_clock: MockClock
    ) -> None:
        client = object()

        class Reads:
            shared = (client,)

            async def run(self, run: RunContext) -> Any:
                await trio.sleep(10)
                return str(client)

        async with open_supervisor(infrastructure(reads=Reads)) as supervisor:
            run = await supervisor.start(context(), "reads", "x")
            await trio.sleep(1)
            client = "another"
            assert (await run.ended()).result == "another"

    async def test_may_get_their_first_value_at_any_time(self, autojump_clock: MockClock) -> None:
        class Reads:
            async def run(self, run: RunContext) -> Any:
                await trio.sleep(10)
                return first

        async with open_supervisor(infrastructure(reads=Reads)) as supervisor:
            run = await supervisor.start(context(), "reads", "x")
            await trio.sleep(1)
            first = "late"
            assert (await run.ended()).result == "late"


def test_what_two_agents_have_in_common_has_one_guard() -> None:
    """So that none of them takes for its own what another's run wrote there."""

    class Beside:
        word = "as it was"

    def method(self: object) -> str:
        return Beside.word

    class One:
        same = method

        async def run(self, run: RunContext) -> None: ...

    class Two:
        also = method

        async def run(self, run: RunContext) -> None: ...

    registry = AgentClassRegistry({"one": One, "two": Two})
    one, two = ClassWatch(), ClassWatch()
    one.begin(registry.guards_of("one"))
    two.begin(registry.guards_of("two"))
    Beside.word = CANARY
    assert one.end() is not None
    assert two.end() is not None
    assert Beside.word == "as it was"
    assert [guard.alive for guard in registry.guards_of("two")] == [0, 0]


def test_what_was_written_is_logged_with_the_run_that_it_was_found_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    written: Any = agent_of(None, ())  # type: ignore[arg-type]
    guards = AgentClassRegistry({"one": written}).guards_of("one")
    one, two, three = (ClassWatch({"run_id": name}) for name in ("one", "two", "three"))
    one.begin(guards)
    two.begin(guards)
    written.word = CANARY
    one.end()
    two.end()
    written.word = CANARY
    three.begin(guards)
    three.end()
    said = [(vars(record)["run_id"], record.getMessage()) for record in caplog.records]
    name = written.__name__
    assert said == [
        ("one", f"a run wrote to its agent's class, which was put back: {name}.word"),
        ("two", f"while a run was alive, its agent's class was written to: {name}"),
        ("three", f"before a run began, its agent's class was put back: {name}.word"),
    ]
