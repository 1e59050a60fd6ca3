"""Agent classes and their registry, and the loop of model and tools."""

from __future__ import annotations

import abc
import collections
import functools
import itertools
import re
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from types import MappingProxyType
from typing import Any, ClassVar, cast

import pytest
import trio
from tests.agui_rules import check_history
from tests.small_world import ADA, THREAD, context, infrastructure, log_of, terminals_of, types_of
from trio.testing import MockClock

from creche import (
    Agent,
    AgentClassRegistry,
    AssistantMessage,
    Infrastructure,
    Limits,
    MemoryStore,
    Message,
    ModelAgent,
    ModelError,
    ModelPart,
    RunContext,
    RunOutcome,
    SystemMessage,
    TextDelta,
    ToolCallRequest,
    ToolDispatcher,
    ToolMessage,
    ToolSpec,
    UnknownAgentError,
    Usage,
    UserExecutionContext,
    UserMessage,
    open_supervisor,
    tool,
)


class Client:
    """Holds a connection, say."""


def forgotten() -> None:
    """Wants to be a tool."""


@tool
def some_tool() -> None: ...


class Plain:
    """Answers nothing."""

    async def run(self, run: RunContext) -> None: ...


class TestRegistry:
    def test_what_is_registered_can_be_described(self) -> None:
        registry = AgentClassRegistry({"one": Plain})
        registry.register("two", Plain, description="Two.", version="2", requires=("add",))
        assert registry.names() == tuple(registry) == ("one", "two")
        assert ("one" in registry, "three" in registry, len(registry)) == (True, False, 2)
        assert registry.describe("one").description == "Answers nothing."
        two = registry.describe("two")
        assert (two.description, two.version, two.requires) == ("Two.", "2", ("add",))
        assert two.agent_class is Plain

    def test_an_unknown_name_is_answered_with_those_that_there_are(self) -> None:
        with pytest.raises(UnknownAgentError, match="one"):
            AgentClassRegistry({"one": Plain}).describe("three")

    def test_it_makes_a_new_instance_of_a_class_that_is_put_back_and_then_is_frozen(self) -> None:
        class Written:
            async def run(self, run: RunContext) -> None: ...

        registry = AgentClassRegistry({"one": Written})
        one: Any = registry.make("one")
        type(one).secret = "of somebody"
        two = registry.make("one")
        assert (type(one), type(two), one is two) == (Written, Written, False)
        assert not hasattr(Written, "secret")
        with pytest.raises(RuntimeError, match="frozen"):
            registry.register("late", Plain)
        with pytest.raises(UnknownAgentError):
            registry.make("three")

    @pytest.mark.parametrize("name", ["", "  ", "one"], ids=repr)
    def test_a_blank_or_taken_name_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="name"):
            AgentClassRegistry({"one": Plain}).register(name, Plain)

    def test_once_frozen_it_takes_nothing_more(self) -> None:
        registry = AgentClassRegistry()
        registry.freeze()
        with pytest.raises(RuntimeError, match="frozen"):
            registry.register("one", Plain)
        assert len(registry) == 0

    @pytest.mark.parametrize(
        "faulty",
        [
            Plain(),
            "Plain",
            lambda run: None,
            type("NoRun", (), {}),
            type("SyncRun", (), {"run": lambda self, run: None}),
            type("NotAFunction", (), {"run": 1}),
        ],
        ids=["instance", "string", "function", "no run", "sync run", "run is a number"],
    )
    def test_what_is_no_agent_class_is_refused(self, faulty: Any) -> None:
        with pytest.raises(TypeError):
            AgentClassRegistry().register("one", faulty)

    @pytest.mark.parametrize(
        ("body", "word"),
        [
            ("def __init__(self, key): ...", "Faulty.__init__ needs arguments"),
            ("def __init__(self, *, key): ...", "Faulty.__init__ needs arguments"),
            ("async def run(self): ...", "Faulty.run must take the run"),
            ("async def run(self, run, more): ...", "Faulty.run must take the run"),
            ("async def run(self, *, run): ...", "Faulty.run must take the run"),
            ("@staticmethod\n async def run(self, run): ...", "Faulty.run must take the run"),
            ("@abc.abstractmethod\n def rest(self): ...", "Faulty is abstract; it needs rest"),
        ],
    )
    def test_a_class_that_no_run_could_use_is_refused_when_it_is_registered(
        self,
        body: str,
        word: str,
    ) -> None:
        """And not only when somebody asks it."""
        names: dict[str, Any] = {"Plain": Plain, "abc": abc}
        exec(f"class Faulty(Plain, metaclass=abc.ABCMeta):\n {body}", names)
        with pytest.raises(TypeError, match=re.escape(word)):
            AgentClassRegistry().register("one", names["Faulty"])

    @pytest.mark.parametrize(
        "body",
        [
            "def __init__(self, key='', *rest, **more): ...",
            "async def run(self, run, more=None): ...",
            "async def run(self, *everything): ...",
            "@staticmethod\n async def run(run): ...",
            "@classmethod\n async def run(cls, run): ...",
        ],
    )
    def test_whatever_takes_the_run_is_taken(self, body: str) -> None:
        names: dict[str, Any] = {"Plain": Plain}
        exec(f"class Fine(Plain):\n {body}", names)
        AgentClassRegistry().register("one", names["Fine"])

    @pytest.mark.parametrize(
        "value",
        [
            [],
            {},
            set(),
            bytearray(),
            collections.defaultdict(list),
            collections.Counter(),
            collections.deque(),
            ("deep", ({"list": []},)),
            MappingProxyType({"key": [1]}),
            functools.lru_cache(len),
            itertools.count(),
            threading.Lock(),
            Client(),
            lambda self, memory=[]: memory,
            staticmethod(lambda *, memory={}: memory),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_mutable_class_attribute_is_refused_by_its_name(self, value: object) -> None:
        """All runs would share it: the way in which one user's words reach another."""
        leaky = type("Leaky", (Plain,), {"memory": value})
        below = type("Below", (leaky,), {})
        for agent_class in (leaky, below):
            with pytest.raises(TypeError, match=r"Leaky\.memory"):
                AgentClassRegistry().register("one", agent_class)

    def test_two_underscores_hide_nothing(self) -> None:
        leaky = type("Leaky", (Plain,), {"__cache__": {}})
        with pytest.raises(TypeError, match=r"Leaky\.__cache__"):
            AgentClassRegistry().register("one", leaky)

    def test_what_nobody_can_change_may_be_a_class_attribute(self) -> None:
        kept: list[str] = []

        @tool(shared=(kept,))
        def private() -> None:
            """What a tool shares on purpose is its maker's business."""
            kept.append("called")

        class Fine(Plain):
            names: ClassVar[tuple[str, ...]] = ("a",)
            limit = 7
            kinds: ClassVar[frozenset[str]] = frozenset({"a"})
            pattern = re.compile("a")
            pause = timedelta(seconds=1)
            deep: ClassVar[Mapping[str, tuple[int, ...]]] = MappingProxyType({"a": (1, 2)})
            tools = (private,)
            __slots__ = ("memory",)

            def __init__(self, limit: int = 7) -> None:
                self.memory: list[str] = []

            @property
            def first(self) -> str:
                return self.memory[0]

            @classmethod
            def kind(cls) -> str:
                return cls.__name__

        class Abstract(abc.ABC):
            @abc.abstractmethod
            async def run(self, run: RunContext) -> None: ...

        class Concrete(Abstract):
            async def run(self, run: RunContext) -> None: ...

        class Declared(Agent):
            async def run(self, run: RunContext) -> None: ...

        class Chat(ModelAgent):
            instructions = "Be brief."

        agents: dict[str, type[Agent]] = {"a": Fine, "b": Declared, "c": Chat, "d": Concrete}
        assert len(AgentClassRegistry(agents)) == 4

    def test_missing_tools_are_named_before_anything_runs(self) -> None:
        class Adds(Plain):
            tools: ClassVar[tuple[str, ...]] = ("add", "sub")

        @tool
        def sub() -> None: ...

        assert AgentClassRegistry({"one": Adds}).missing_requirements(["sub"]) == {"one": ("add",)}
        with pytest.raises(
            ValueError, match=r"'one' wants the tool 'add', which is not there \(there is sub\)"
        ):
            Infrastructure(agents={"one": Adds}, tools=[sub])

    @pytest.mark.parametrize(
        ("attributes", "words"),
        [
            ({"tools": (forgotten,)}, "forgotten is no tool: put @creche.tool above it"),
            ({"tools": (len,)}, "len is no tool: @creche.tool makes one of a function"),
            ({"tools": (7,)}, "something of type int is no tool: @creche.tool makes one"),
            (
                {"tools": forgotten},
                "`tools` is a function, not a tuple of them: write (forgotten,)",
            ),
            ({"tools": some_tool}, "`tools` is a tool, not a tuple of them: write (some_tool,)"),
            ({"tools": "clock"}, "`tools` is a name, not a tuple of them: write ('clock',)"),
            ({"tools": None}, "`tools` must be a tuple, not something of type NoneType"),
            ({"tool_sources": "time"}, "`tool_sources` is a name, not a tuple of them: write ('ti"),
            ({"tool_sources": (some_tool,)}, "`tool_sources` lists names, and some_tool is none"),
        ],
    )
    def test_what_is_no_tool_or_no_list_of_them_is_told_in_words(
        self, attributes: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(TypeError, match=re.escape(f"agent 'one': {words}")):
            AgentClassRegistry({"one": type("Wrong", (Plain,), attributes)})

    async def test_so_it_is_of_requirements_of_an_infrastructure_and_of_a_dispatcher(self) -> None:
        wrong: Any = "clock"
        with pytest.raises(TypeError, match=r"agent 'one': `requires` .* write \('clock',\)"):
            AgentClassRegistry().register("one", Plain, requires=wrong)
        with pytest.raises(TypeError, match="Infrastructure: 'clock' is a name, and no tool"):
            Infrastructure(agents={}, tools=["clock"])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="Infrastructure: len is no tool"):
            Infrastructure(agents={}, tools=[len])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="Infrastructure: `tool_sources` must be a mapping"):
            Infrastructure(agents={}, tool_sources=("time",))  # type: ignore[arg-type]
        asked = UserExecutionContext.from_request(user_id="ann", thread_id="one")
        for tools, words in (([len], "len is no tool"), (some_tool, "`tools` is a tool, not a")):
            block = ToolDispatcher.create_scoped_dispatcher_context(asked, tools=cast("Any", tools))
            with pytest.raises(TypeError, match=f"a dispatcher: {words}"):
                async with block:
                    pass

    def test_two_tools_of_one_name_in_a_list_are_refused(self) -> None:
        """One of them would never be called, and nobody could tell which."""

        @tool
        def add() -> None: ...

        @tool(name="add")
        def plus() -> None: ...

        def agent(*tools: object) -> type[Plain]:
            return type("Adds", (Plain,), {"tools": tools})

        for tools in ([add, plus], [add, add]):
            with pytest.raises(ValueError, match="infrastructure may have one .* of 'add'"):
                Infrastructure(agents={}, tools=tools)
            with pytest.raises(ValueError, match="agent 'one' may have one .* of 'add'"):
                Infrastructure(agents={"one": agent(*tools)})
        for named in (("add", "add"), ("add", plus)):
            with pytest.raises(ValueError, match="agent 'one' may have one .* of 'add'"):
                AgentClassRegistry({"one": agent(*named)})
        registry = AgentClassRegistry()
        with pytest.raises(ValueError, match="`requires` of agent 'one' .* of 'add'"):
            registry.register("one", Plain, requires=("add", "add"))
        assert len(registry) == 0
        registry.register("one", agent("add"), requires=("add",))  # two lists
        assert Infrastructure(agents=registry, tools=[add]).tools_of("one") == (add,)
        own = Infrastructure(agents={"one": agent(plus)}, tools=[add])
        assert own.tools_of("one") == (plus,), "its own goes before the process's"

    def test_an_agent_gets_the_tools_that_it_names_and_no_others(self) -> None:
        @tool
        def shared() -> None: ...

        @tool
        def private() -> None: ...

        @tool
        def unrelated() -> None: ...

        made = Infrastructure(
            agents={
                "one": type("One", (Plain,), {"tools": (private, "shared")}),
                "two": Plain,
            },
            tools=[shared, unrelated],
        )
        assert made.tools_of("one") == (private, shared)
        assert made.tools_of("two") == ()

    def test_what_an_infrastructure_was_made_from_can_change_without_harm(self) -> None:
        models: dict[str, Any] = {}
        tools: list[Any] = []
        made = Infrastructure(agents={"one": Plain}, models=models, tools=tools)
        models["default"] = object()
        tools.append(object())
        assert (dict(made.models), made.tools) == ({}, ())
        with pytest.raises(RuntimeError):
            made.registry.register("two", Plain)


class Book:
    """A model that reads its answers from a list, and keeps what it was asked."""

    name = "book"

    def __init__(self, *answers: Sequence[ModelPart | Exception]) -> None:
        self._answers = iter(answers)
        self.asked: list[tuple[Message, ...]] = []
        self.tools: list[tuple[ToolSpec, ...]] = []
        self.closed = 0

    @asynccontextmanager
    async def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        self.asked.append(tuple(messages))
        self.tools.append(tuple(tools))

        async def parts() -> AsyncIterator[ModelPart]:
            for part in next(self._answers):
                await trio.lowlevel.checkpoint()
                if isinstance(part, Exception):
                    raise part
                yield part

        try:
            yield parts()
        finally:
            self.closed += 1


@tool
async def double(n: int) -> int:
    """Twice as much."""
    await trio.sleep(10 - n)  # the first to be called is the last to end
    return 2 * n


async def answered(
    book: Book,
    *,
    limits: Limits | None = None,
    store: MemoryStore | None = None,
    asked: str = "hi",
) -> RunOutcome:
    class Chat(ModelAgent):
        instructions = "Be brief."
        tools = (double,)

    made = infrastructure(models={"default": book}, limits=limits, store=store, chat=Chat)
    async with open_supervisor(made) as supervisor:
        with trio.fail_after(100):
            run = await supervisor.start(context(), "chat", asked)
            return await run.ended()


class TestModelAgent:
    async def test_it_streams_what_the_model_says(self, autojump_clock: MockClock) -> None:
        store = MemoryStore()
        book = Book([TextDelta("Hello"), TextDelta(" you"), Usage(3, 2)])
        outcome = await answered(book, store=store)
        assert outcome.status == "success"
        log = await log_of(store)
        assert types_of(log) == [
            "RUN_STARTED",
            "TEXT_MESSAGE_START",
            "TEXT_MESSAGE_CONTENT",
            "TEXT_MESSAGE_CONTENT",
            "TEXT_MESSAGE_END",
            "RUN_FINISHED",
        ]
        assert log[-1]["usage"] == [{"model": "book", "inputTokens": 3, "outputTokens": 2}]
        system, user = book.asked[0]
        assert isinstance(system, SystemMessage)
        assert system.content == "Be brief."
        assert isinstance(user, UserMessage)
        assert user.content == "hi"
        assert [spec.name for spec in book.tools[0]] == ["double"]
        assert book.closed == 1

    async def test_parallel_calls_run_together_and_are_answered_in_their_order(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = MemoryStore()
        book = Book(
            [
                TextDelta("I double."),
                ToolCallRequest("double", '{"n": 1}', id="same"),
                ToolCallRequest("double", '{"n": 2}', id="same"),
                ToolCallRequest("double", '{"n": "x"}', id="same"),
                Usage(1, 1),
            ],
            [TextDelta("Done."), Usage(10, 10)],
        )
        begun = trio.current_time()
        assert (await answered(book, store=store)).status == "success"
        assert trio.current_time() - begun < 10
        asked = book.asked[1][2:]
        assert isinstance(asked[0], AssistantMessage)
        assert [call.function.arguments for call in asked[0].tool_calls] == [
            '{"n": 1}',
            '{"n": 2}',
            '{"n": "x"}',
        ]
        results = [message for message in asked[1:] if isinstance(message, ToolMessage)]
        assert [r.tool_call_id for r in results] == [call.id for call in asked[0].tool_calls]
        assert [r.content for r in results][:2] == ["2", "4"]
        assert results[2].error is not None
        check_history(book.asked[1])
        stored = [item.message for item in await store.messages(ADA, THREAD)]
        check_history(stored)
        assert [type(message) for message in stored] == [
            UserMessage,
            AssistantMessage,
            *[ToolMessage] * 3,
            AssistantMessage,
        ], "what was said and what was called are one message"
        (finish,) = terminals_of(await log_of(store))
        assert finish["usage"] == [{"model": "book", "inputTokens": 11, "outputTokens": 11}]

    async def test_what_was_said_before_is_asked_with_the_next_question(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = MemoryStore()
        await answered(Book([ToolCallRequest("double", '{"n": 1}')], [TextDelta("2")]), store=store)
        book = Book([TextDelta("bye")])
        await answered(book, store=store, asked="and now?")
        roles = [type(message).__name__ for message in book.asked[0]]
        assert roles == [
            "SystemMessage",
            "UserMessage",
            "AssistantMessage",
            "ToolMessage",
            "AssistantMessage",
            "UserMessage",
        ]
        check_history(book.asked[0])

    async def test_an_answer_of_empty_deltas_does_not_spoil_the_next_question(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = MemoryStore()
        await answered(Book([TextDelta("")]), store=store)
        book = Book([TextDelta("bye")])
        await answered(book, store=store, asked="and now?")
        check_history(book.asked[0])

    async def test_a_model_that_never_stops_calling_is_stopped(
        self,
        autojump_clock: MockClock,
    ) -> None:
        book = Book(*[[ToolCallRequest("double", '{"n": 1}')]] * 5)
        outcome = await answered(book, limits=Limits(max_turns=3))
        assert (outcome.status, outcome.receipt.reason) == ("failed", "turn_limit")
        assert len(book.asked) == 3

    async def test_a_model_that_breaks_off_fails_the_run_with_what_it_said(
        self,
        autojump_clock: MockClock,
    ) -> None:
        store = MemoryStore()
        book = Book([TextDelta("Hel"), ModelError("The model is overloaded.")])
        outcome = await answered(book, store=store)
        assert (outcome.status, outcome.message) == ("failed", "The model is overloaded.")
        assert book.closed == 1
        log = await log_of(store)
        assert types_of(log)[-2:] == ["TEXT_MESSAGE_END", "RUN_ERROR"]
        assert log[-1]["code"] == "model_failed"
        messages = [item.message.content for item in await store.messages(ADA, THREAD)]
        assert messages == ["hi", "Hel"]

    @pytest.mark.parametrize("part", ["words", None, 7, object()], ids=lambda p: type(p).__name__)
    async def test_a_model_that_says_what_is_no_part_fails_its_run_alone(
        self,
        autojump_clock: MockClock,
        part: Any,
    ) -> None:
        store = MemoryStore()
        outcome = await answered(Book([TextDelta("a"), part]), store=store)
        assert outcome.status in {"failed", "success"}
        assert len(terminals_of(await log_of(store))) == 1

    async def test_a_model_that_nobody_provides_is_a_failure_that_says_so(
        self,
        autojump_clock: MockClock,
    ) -> None:
        made = infrastructure(chat=ModelAgent)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "chat", "hi")
            outcome = await run.ended()
        assert (outcome.status, outcome.receipt.reason) == ("failed", "no_such_model")
