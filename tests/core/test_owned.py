"""What runs could leave for each other in a class or a tool is refused, and told by its path."""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
import functools
import http
import logging
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypedDict, TypeVar, cast

import attrs
import msgspec
import outcome
import pydantic
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from tests.small_world import context, infrastructure
from trio.testing import MockClock

from creche import (
    AgentClassRegistry,
    Limits,
    MemoryStore,
    RunContext,
    ToolDefinitionError,
    open_supervisor,
    tool,
)

T = TypeVar("T")
log = logging.getLogger("tests")


class Plain:
    """Answers nothing."""

    async def run(self, run: RunContext) -> None: ...


class Nesting(Plain):
    """Can be imported, and so can what is in it."""

    class Memory:
        seen: ClassVar[list[str]] = []


class Client:
    """Does more than hold things, say."""

    def __init__(self) -> None:
        self.connections: list[str] = []


def plain_function(value: int = 0) -> int:
    return value


def with_default(given: object = None) -> object:
    return given


def wrapping(function: Callable[..., Any], *, with_wraps: bool = True) -> Callable[..., Any]:
    """A decorator that remembers nothing."""

    def wrapper(*given: Any) -> Any:
        return function(*given)

    return functools.wraps(function)(wrapper) if with_wraps else wrapper


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator with a cache."""
    cache: dict[Any, Any] = {}

    def wrapper(*given: Any) -> Any:
        return cache.setdefault(given, function(*given))

    return wrapper


def with_attribute(function: Callable[..., Any]) -> Callable[..., Any]:
    function.cache = {}  # type: ignore[attr-defined]
    return function


def made(**attributes: Any) -> type[Any]:
    return type("Leaky", (Plain,), attributes)


def holding(build: Callable[[], Any]) -> type[Any]:
    return made(note=build())


def itself(agent: type[Any]) -> type[Any]:
    return agent


def attribute_within(kind: Any) -> type[Any]:
    return made(note=kind(with_attribute(lambda self: None)))


def method_with_default() -> type[Any]:
    class Leaky(Plain):
        def note(self, first: int, seen: list[str] = []) -> None: ...  # noqa: B006

    return Leaky


def method_with_keyword_default() -> type[Any]:
    class Leaky(Plain):
        def note(self, *, seen: dict[str, str] = {}) -> None: ...  # noqa: B006

    return Leaky


def run_with_attribute() -> type[Any]:
    class Leaky(Plain):
        async def run(self, run: RunContext) -> None: ...

    Leaky.run.cache = {}  # type: ignore[attr-defined]
    return Leaky


def closing_over(held: Any) -> type[Any]:
    class Leaky(Plain):
        async def run(self, run: RunContext) -> None:
            held.append(run.messages)

    return Leaky


def rebinding() -> type[Any]:
    count = 0

    class Leaky(Plain):
        async def run(self, run: RunContext) -> None:
            nonlocal count
            count += 1

    return Leaky


def rebinding_within() -> type[Any]:
    last = ""

    class Leaky(Plain):
        async def run(self, run: RunContext) -> None:
            def note() -> None:
                nonlocal last
                last = str(run.messages)

            note()

    return Leaky


def nesting() -> type[Any]:
    class Leaky(Plain):
        class Memory:
            class Deep:
                seen: ClassVar[list[str]] = []

    return Leaky


def local_class() -> type[Any]:
    class Memory:
        seen: ClassVar[list[str]] = []

    class Leaky(Plain):
        async def run(self, run: RunContext) -> None:
            Memory.seen.append(str(run.messages))

    return Leaky


def with_metaclass() -> type[Any]:
    class Meta(type):
        made: ClassVar[dict[str, str]] = {}

    return Meta("Leaky", (Plain,), {})


def with_metaclass_method() -> type[Any]:
    seen: list[str] = []

    class Meta(type):
        def note(cls) -> None:
            seen.append("x")

    return Meta("Leaky", (Plain,), {})


def local_instance() -> type[Any]:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        seen: ClassVar[list[str]] = []
        number: int = 1

    return made(settings=Settings())


def sending() -> type[Any]:
    send, _ = trio.open_memory_channel[str](1)

    class Leaky(Plain):
        async def run(self, run: RunContext) -> None:
            await send.send("secret")

    return Leaky


def nested_enum() -> type[Any]:
    class Leaky(Plain):
        class Kind(enum.Enum):
            LIST = list[str]()  # noqa: RUF012
            WORD = "word"

    return Leaky


def enum_with_attribute() -> type[Any]:
    class Kind(enum.Enum):
        WORD = "word"

    Kind.WORD.seen = []  # type: ignore[attr-defined]
    return made(kind=Kind.WORD)


class Words(str):  # noqa: SLOT000  that is the point
    """Words that something can be hung on."""


class SlottedWords(str):
    """The same, in a slot."""

    __slots__ = ("seen",)


class SlottedSet(frozenset[int]):
    """The same of what is frozen otherwise."""

    __slots__ = ("seen",)


class Number(int):
    """The same of a number."""


class Uncollected(msgspec.Struct, frozen=True, gc=False):
    """Python's collector is not told what it holds."""

    held: Any


@dataclasses.dataclass(frozen=True)
class Caching:
    """Frozen, and yet it grows."""

    @functools.cached_property
    def seen(self) -> list[str]:
        return []


class CachingBelow(Caching):
    """A base's counts, too."""


@dataclasses.dataclass(frozen=True)
class FrozenList(list[str]):
    """Says that it is."""


HOLDING: dict[str, tuple[Callable[[], Any], str]] = {
    "a variable of Trio's": (lambda: trio.lowlevel.RunVar("x"), " is a RunVar"),
    "an event": (trio.Event, " is a Event"),
    "a semaphore": (lambda: trio.Semaphore(1), " is a Semaphore"),
    "a lock": (trio.Lock, " is a Lock"),
    "a scope": (trio.CancelScope, " is a CancelScope"),
    "a stream": (lambda: trio.testing.memory_stream_pair()[0], " is a StapledStream"),
    "a stream of bytes": (trio.testing.MemorySendStream, " is a MemorySendStream"),
    "an outcome": (lambda: outcome.Value([]), " is a Value"),
    "text of a subclass": (lambda: Words("a"), " is a Words"),
    "text with a slot": (lambda: SlottedWords("a"), " is a SlottedWords"),
    "a number of a subclass": (lambda: Number(1), " is a Number"),
    "a set with a slot": (lambda: SlottedSet((1,)), " is a SlottedSet"),
    "a cached property": (Caching, " is a Caching with a cached property"),
    "a base's cached property": (CachingBelow, " is a CachingBelow with a cached property"),
    "a struct that is not collected": (lambda: Uncollected([]), ".held is a list"),
    "a list that says it is frozen": (FrozenList, " is a FrozenList"),
    "a slice": (lambda: slice([]), ".stop is a list"),
    "a type's parameter": (lambda: types.GenericAlias(list, ([],)), ".__args__[0] is a list"),
    "a field": (lambda: dataclasses.field(default=[]), " is a Field"),
    "a module made by hand": (lambda: types.ModuleType("made"), " is a module"),
}


REFUSED: dict[str, tuple[Callable[[], type[Any]], str]] = {
    "an attribute of run": (run_with_attribute, "Leaky.run.cache is a dict"),
    "an attribute of a method": (
        lambda: made(note=with_attribute(lambda self: None)),
        "Leaky.note.cache is a dict",
    ),
    "an attribute of a wrapped function": (
        lambda: made(note=wrapping(wrapping(with_attribute(lambda self: None)))),
        "Leaky.note.cache is a dict",
    ),
    "an attribute of one that is wrapped in silence": (
        lambda: made(note=wrapping(with_attribute(lambda self: None), with_wraps=False)),
        "Leaky.note's closure 'function'.cache is a dict",
    ),
    **{
        f"an attribute of a function in a {kind.__name__}": (
            functools.partial(attribute_within, kind),
            "Leaky.note.cache is a dict",
        )
        for kind in (
            *(staticmethod, classmethod, property, functools.partial, functools.partialmethod),
        )
    },
    "an attribute of a cached property": (
        lambda: made(note=functools.cached_property(with_attribute(lambda self: None))),
        "Leaky.note.func.cache is a dict",
    ),
    "an attribute of a classmethod itself": (
        lambda: made(note=with_attribute(classmethod(lambda cls: None))),  # type: ignore[arg-type]
        "Leaky.note.cache is a dict",
    ),
    "a setter's": (
        lambda: made(note=property(None, with_attribute(lambda self, value: None))),
        "Leaky.note.fset.cache is a dict",
    ),
    "a partial's argument": (
        lambda: made(note=functools.partial(with_default, [])),
        "Leaky.note.args[0] is a list",
    ),
    "a partial's keyword": (
        lambda: made(note=functools.partial(with_default, given=[])),
        "Leaky.note.keywords['given'] is a list",
    ),
    "a default": (method_with_default, "Leaky.note's default 'seen' is a list"),
    "a keyword's default": (method_with_keyword_default, "Leaky.note's default 'seen' is a dict"),
    "a default of a wrapped function": (
        lambda: made(note=wrapping(lambda self, seen=[]: seen)),
        "Leaky.note's default 'seen' is a list",
    ),
    "a closure": (lambda: closing_over([]), "Leaky.run's closure 'held' is a list"),
    "a closure over a tuple": (
        lambda: closing_over((1, [])),
        "Leaky.run's closure 'held'[1] is a list",
    ),
    "a closure over an object": (
        lambda: closing_over(Client()),
        "Leaky.run's closure 'held' is a Client",
    ),
    "a closure over a bound method": (
        lambda: closing_over([].append),
        "Leaky.run's closure 'held'[0] is a list",
    ),
    "a variable that is rebound": (rebinding, "Leaky.run's closure 'count' is a variable"),
    "one that a function in a method rebinds": (
        rebinding_within,
        "Leaky.run's closure 'last' is a variable",
    ),
    "a decorator's closure": (
        lambda: made(note=remembering(lambda self: 1)),
        "Leaky.note's closure 'cache' is a dict",
    ),
    "functools.cache": (
        lambda: made(note=functools.cache(lambda self: 1)),
        "Leaky.note is a cache",
    ),
    "functools.cache in a classmethod": (
        lambda: made(note=classmethod(cast("Any", functools.lru_cache(lambda cls: 1)))),
        "Leaky.note is a cache",
    ),
    "functools.cache in a wrapper": (
        lambda: made(note=wrapping(functools.cache(lambda self: 1))),
        "Leaky.note is a cache",
    ),
    "a memory channel": (sending, "Leaky.run's closure 'send' is a MemorySendChannel"),
    **{
        kind: (functools.partial(holding, build), f"Leaky.note{told}")
        for kind, (build, told) in HOLDING.items()
    },
    "an enum's value": (nested_enum, "Leaky.Kind.LIST.value is a list"),
    "what hangs on an enum's member": (enum_with_attribute, "Leaky.kind.seen is a list"),
    "a nested class": (nesting, "Leaky.Memory.Deep.seen is a list"),
    "one of a module's": (lambda: Nesting, "Nesting.Memory.seen is a list"),
    "a class beside it": (local_class, "Leaky.run's closure 'Memory'.seen is a list"),
    "the class of what it holds": (local_instance, "Leaky.settings.__class__.seen is a list"),
    "a metaclass": (with_metaclass, "Meta.made is a dict"),
    "a method of a metaclass": (with_metaclass_method, "Meta.note's closure 'seen' is a list"),
}


@pytest.mark.parametrize(("build", "told"), REFUSED.values(), ids=REFUSED)
def test_what_runs_could_leave_there_is_refused(build: Callable[[], type[Any]], told: str) -> None:
    agent = build()
    below = type("Below", (agent,), {})
    for each in (agent, below):
        with pytest.raises(TypeError, match=re.escape(f"agent 'one': {told}")) as info:
            AgentClassRegistry().register("one", each)
        assert "`self`" in str(info.value) or "in the body" in str(info.value)
        assert "name it in `shared`" in str(info.value)


class Colour(enum.Flag):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    names: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        return self.names[0]


@tool
def lookup(word: str = "x") -> str:
    """Look up."""
    return word


class Parametrised:
    """Its class attributes are not those of an agent that names it."""

    seen: ClassVar[list[str]] = []
    __class_getitem__: Any = classmethod(cast("Any", types.GenericAlias))


class SlottedNot(str):
    """Adds nothing."""

    __slots__ = ()


def everything() -> type[Any]:
    """An agent with all that is ordinary, made here so that its classes belong to it."""

    class Point(NamedTuple):
        x: int = 0

    class Asked(TypedDict):
        words: str

    class Shape(enum.Enum):
        ROUND = 1

    @dataclasses.dataclass
    class Draft:
        words: list[str] = dataclasses.field(default_factory=list)

    @dataclasses.dataclass(frozen=True, slots=True, order=True)
    class Slotted:
        number: int = 1

    class Answer(msgspec.Struct):
        words: list[str] = msgspec.field(default_factory=list)

    class Model(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(frozen=True)
        words: list[str] = []
        later: Answer2 | None = None

        @pydantic.field_validator("words")
        @classmethod
        def _check(cls, value: list[str]) -> list[str]:
            return value

    class Answer2(pydantic.BaseModel):
        word: str = ""

    @attrs.define
    class Attrs:
        words: list[str] = attrs.field(factory=list)

    @attrs.frozen
    class Iced:
        word: str = ""

    class Speaks(Protocol):
        def speak(self) -> str: ...

    @typing.runtime_checkable
    class Runs(Protocol):
        async def run(self, run: RunContext) -> None: ...

    class Box(Generic[T]):
        def __init__(self, held: T) -> None:
            self.held = held

    class Base(abc.ABC):
        @abc.abstractmethod
        def word(self) -> str: ...

        def __init_subclass__(cls, **more: Any) -> None:
            super().__init_subclass__(**more)

    missing = object()
    limits, colour, settings = Limits(), Colour.RED, Settings(("a",))

    @wrapping
    def helper(value: int = 1) -> int:
        return value

    class Fine(Base, Plain):
        """Does ordinary things."""

        number: ClassVar[int] = 7
        names: ClassVar[Mapping[str, tuple[int, ...]]] = MappingProxyType({"a": (1,)})
        kinds: ClassVar[dict[str, type]]
        alias = dict[str, list[int]]
        either = int | None
        pattern = re.compile("x")
        logger = log
        limits = Limits()
        settings = Settings(("a",))
        iced = Iced()
        slotted = Slotted()
        point = Point()
        absent = object()
        tools = (lookup,)
        other_tool = lookup
        answer: ClassVar[type] = Answer
        models = (Model, Draft, Attrs, Asked, Box[int], Shape, Point, Client)
        partial = functools.partial(plain_function, value=1)
        home = trio.Path("here")
        partialmethod = functools.partialmethod(plain_function, value=1)
        __slots__ = ("mine",)

        class Nested(pydantic.BaseModel):
            words: list[str] = []

        class Kind(enum.StrEnum):
            A = enum.auto()

        async def run(self, run: RunContext, more: int = 1, *, word: str = "") -> None:
            await super().run(run)
            assert isinstance(self, Runs)
            Model(words=["a"], later=Answer2())
            msgspec.convert({"words": ["a"]}, Draft)
            msgspec.convert({"words": "a"}, Asked)
            msgspec.json.encode(Answer())
            repr((Draft(), Attrs(), Slotted(), Colour.RED | Colour.BLUE, Shape(1), self.settings))
            assert self.settings.first == settings.names[0]
            assert (self.word(), self.twice, self.thrice) == ("word", 2, 3)
            assert (helper(), limits.max_turns > 0, colour, missing) is not None
            plain_function()
            functools.reduce(max, [1])

        def word(self) -> str:
            return "word"

        @property
        def twice(self) -> int:
            return 2

        @twice.setter
        def twice(self, value: int) -> None: ...

        @wrapping
        def wrapped(self) -> None: ...

        @classmethod
        def of(cls) -> Fine:
            return cls()

        @staticmethod
        def apart(value: int = 3) -> int:
            return value

        @property
        def thrice(self) -> int:
            return self.apart()

    return Fine


@dataclasses.dataclass
class AsDataclass(Plain):
    """Agents may be made by whatever makes classes."""

    words: list[str] = dataclasses.field(default_factory=list)


class AsStruct(msgspec.Struct):
    words: list[str] = msgspec.field(default_factory=list)

    async def run(self, run: RunContext) -> None:
        self.words.append("x")


class AsModel(pydantic.BaseModel):
    words: list[str] = []

    async def run(self, run: RunContext) -> None:
        self.words.append("x")


@attrs.define
class AsAttrs:
    words: list[str] = attrs.field(factory=list)

    async def run(self, run: RunContext) -> None:
        self.words.append("x")


class AsGeneric(Plain, Generic[T]):
    """With a parameter."""

    @functools.cached_property
    def words(self) -> list[str]:
        return []


def without_a_value() -> type[Any]:
    """An agent with a variable that the function around it would set later."""

    class Fine(Plain):
        async def run(self, run: RunContext) -> None:
            str(client)

    for client in list[Client]():
        str(client)
    return Fine


ACCEPTED: dict[str, Callable[[], type[Any]]] = {
    "everything": everything,
    **{
        each.__name__: functools.partial(itself, each)
        for each in (AsDataclass, AsStruct, AsModel, AsAttrs, AsGeneric)
    },
    "a variable without a value": without_a_value,
    "a module": lambda: closing_over(collections),
    "a class of a module": lambda: closing_over(Client),
    "a function of a module": lambda: closing_over(plain_function),
    "words": lambda: closing_over("words"),
    "a logger": lambda: closing_over(log),
    "a type with parameters": lambda: made(alias=Parametrised[int]),  # type: ignore[misc]
    "a default of Trio's": lambda: made(
        serve=lambda self, task_status=trio.TASK_STATUS_IGNORED: None
    ),
    "a slice of numbers": lambda: made(part=slice(1, 2)),
    "an enum of the standard library": lambda: made(
        status=http.HTTPStatus.OK, flags=re.IGNORECASE | re.MULTILINE
    ),
    "words that nothing can be hung on": lambda: made(words=SlottedNot("a")),
    "a struct that is not collected, of words": lambda: made(struct=Uncollected("a")),
    "a tool": lambda: closing_over(lookup),
}


@pytest.mark.parametrize("build", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_ordinary_is_taken(build: Callable[[], type[Any]]) -> None:
    AgentClassRegistry().register("one", build())


@pytest.mark.parametrize(
    "agent",
    [everything(), AsDataclass, AsStruct, AsModel, AsAttrs, AsGeneric],
    ids=lambda agent: agent.__name__,
)
async def test_what_is_ordinary_may_be_used_by_runs(
    agent: type[Any], autojump_clock: MockClock
) -> None:
    """Libraries write to their classes when these are first used, and that is no violation."""
    async with open_supervisor(infrastructure(one=agent)) as supervisor:
        for _ in range(3):
            run = await supervisor.start(context(), "one", "x")
            outcome = await run.ended()
            assert (outcome.status, outcome.message) == ("success", None)


class TestShared:
    def test_what_a_class_names_in_shared_is_not_looked_at(self) -> None:
        client, seen = Client(), list[str]()

        class Fine(Plain):
            shared: ClassVar[tuple[object, ...]] = (client,)
            kept = client

            async def run(self, run: RunContext) -> None:
                client.connections.append("x")

        class Below(Fine):
            shared = (seen,)

            async def run(self, run: RunContext) -> None:
                seen.append(str(client))

        class Worse(Below):
            other = Client()

        AgentClassRegistry({"one": Fine, "two": Below})
        with pytest.raises(TypeError, match=r"Worse\.other is a Client"):
            AgentClassRegistry({"three": Worse})

    def test_a_function_is_named_there_with_all_that_it_holds(self) -> None:
        @remembering
        async def ask() -> None: ...

        AgentClassRegistry({"one": made(ask=ask, shared=(ask,))})

    @pytest.mark.parametrize("shared", [[], {}, 5, "words"], ids=repr)
    def test_it_is_a_tuple(self, shared: Any) -> None:
        with pytest.raises(TypeError, match=r"Leaky\.shared must be a tuple"):
            AgentClassRegistry({"one": made(shared=shared)})


def tool_with_default() -> Callable[..., Any]:
    def found(words: list[str] = []) -> None: ...  # noqa: B006

    return found


def tool_closing_over(held: Any) -> Callable[..., Any]:
    def found(word: str) -> Any:
        return held

    return found


def tool_rebinding() -> Callable[..., Any]:
    count = 0

    def found() -> int:
        nonlocal count
        count += 1
        return count

    return found


def generator() -> Iterator[int]:
    yield 1


FAULTY_TOOLS: dict[str, tuple[Callable[[], Callable[..., Any]], str]] = {
    "a default": (tool_with_default, "found's default 'words' is a list"),
    "an attribute": (lambda: with_attribute(tool_closing_over(1)), "found.cache is a dict"),
    "a list": (lambda: tool_closing_over([]), "found's closure 'held' is a list"),
    "a list in a tuple": (lambda: tool_closing_over(([],)), "found's closure 'held'[0] is a list"),
    "a list's method": (lambda: tool_closing_over([].append), "'held'[0] is a list"),
    "a counter": (
        lambda: tool_closing_over(collections.Counter()),
        "found's closure 'held' is a Counter",
    ),
    "a generator": (lambda: tool_closing_over(generator()), "'held' is a generator"),
    "a variable of Trio's": (
        lambda: tool_closing_over(trio.lowlevel.RunVar("x")),
        "'held' is a RunVar",
    ),
    "a variable that is rebound": (tool_rebinding, "found's closure 'count' is a variable"),
    "a cache": (lambda: functools.cache(tool_closing_over(1)), "found is a cache"),
    "a decorator's": (
        lambda: functools.wraps(tool_closing_over(1))(remembering(tool_closing_over(1))),
        "found's closure 'cache' is a dict",
    ),
}


@pytest.mark.parametrize(("build", "told"), FAULTY_TOOLS.values(), ids=FAULTY_TOOLS)
def test_a_tool_that_keeps_things_is_refused(
    build: Callable[[], Callable[..., Any]], told: str
) -> None:
    with pytest.raises(ToolDefinitionError, match=re.escape(told)) as info:
        tool(build())
    assert "name it in `shared`" in str(info.value)


@pytest.mark.parametrize(
    "held",
    [
        *(Client(), Client, collections, plain_function, lookup, MemoryStore(), "words", (1, "a")),
        *(log, trio.Lock(), Settings(), object(), None),
        functools.partial(plain_function, 1),
    ],
    ids=lambda held: type(held).__name__,
)
def test_a_tool_may_close_over_services_and_what_cannot_change(held: Any) -> None:
    assert tool(tool_closing_over(held)).name == "found"


def test_a_tool_names_what_it_shares_on_purpose() -> None:
    kept: list[str] = []
    assert tool(shared=(kept,))(tool_closing_over(kept)).name == "found"
    with pytest.raises(ToolDefinitionError):
        tool(shared=([],))(tool_closing_over(kept))


def closed(held: Any) -> Callable[..., Any]:
    return lambda: held


def default_of(held: Any) -> Callable[..., Any]:
    return lambda given=held: given


def hung_on(held: Any) -> Callable[..., Any]:
    def function() -> None: ...

    function.held = held  # type: ignore[attr-defined]
    return function


def in_a_class(held: Any) -> type[Any]:
    class Local:
        kept = held

    return Local


class Struct(msgspec.Struct, frozen=True):
    held: Any


HOLDERS: tuple[Callable[[Any], Any], ...] = (
    *(closed, default_of, hung_on, in_a_class, staticmethod, classmethod, property),
    *(functools.cached_property, lambda held: (held,), lambda held: MappingProxyType({"a": held})),
    *(lambda held: functools.partial(plain_function, held), Struct),
    lambda held: functools.partial(plain_function, value=held),
)


@given(st.lists(st.sampled_from(HOLDERS), max_size=8), st.sampled_from([[], {}, set(), Client()]))
def test_however_deep_it_is_hidden_it_is_found(
    holders: list[Callable[[Any], Any]], mutable: Any
) -> None:
    def hidden(held: Any) -> type[Any]:
        return made(kept=functools.reduce(lambda inside, holder: holder(inside), holders, held))

    AgentClassRegistry({"one": hidden((1, "two"))})
    with pytest.raises(TypeError, match=r"Leaky\.kept"):
        AgentClassRegistry({"one": hidden(mutable)})
