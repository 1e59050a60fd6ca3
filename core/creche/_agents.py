"""Agents: classes are infrastructure, instances belong to one run."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Protocol, cast, runtime_checkable

import trio

from creche._agent_instances import check_makes_anew, make_instance
from creche._class_guard import ClassGuard, ClassWatch
from creche._context import MessageId, new_id
from creche._emitter import new_tool_call_id
from creche._errors import RunError, UnknownAgentError
from creche._messages import (
    AssistantMessage,
    FunctionCall,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from creche._models import TextDelta, ToolCallRequest
from creche._owned import OwnedWalk, advice, classes_of, faults
from creche._run_context import RunContext
from creche._tools import Tool, ToolResult, check_names, names_in, tools_or_names_in


@runtime_checkable
class Agent(Protocol):
    """Code that answers. Its class is called without arguments, anew for every run.

    A class may name the tools that it calls in `tools`: `Tool` objects, or names of tools that
    the process provides; and in `tool_sources` the sources whose tools each of its runs gets.
    What its methods close over and all its runs share on purpose, such as a database client, it
    names in `shared`, a tuple; see `check_agent_class`.
    """

    async def run(self, run: RunContext) -> Any:
        """Answer `run.messages`. What it returns becomes the result of the run."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AgentDescription:
    """What is known of a registered agent."""

    name: str
    agent_class: type[Agent]
    description: str
    version: str
    requires: tuple[str, ...]  # names of the tools that the process must provide

    @property
    def tools(self) -> tuple[Tool | str, ...]:
        return tuple(getattr(self.agent_class, "tools", ()))

    @property
    def tool_sources(self) -> tuple[str, ...]:
        """Names of the sources that the process must provide, too."""
        return tuple(getattr(self.agent_class, "tool_sources", ()))


class AgentClassRegistry:
    """Which class answers to which name. Filled at start-up, then frozen and shared by all runs."""

    def __init__(self, agents: Mapping[str, type[Agent]] | None = None) -> None:
        self._agents: dict[str, AgentDescription] = {}
        self._guards: dict[int, ClassGuard] = {}  # {id of what it watches, and holds: guard}
        self._guards_of: dict[str, tuple[ClassGuard, ...]] = {}  # {agent: those of its classes}
        self._frozen = False
        for name, agent_class in (agents or {}).items():
            self.register(name, agent_class)

    def register(
        self,
        name: str,
        agent_class: type[Agent],
        *,
        description: str | None = None,
        version: str = "1",
        requires: Sequence[str] = (),
    ) -> None:
        """Make a class known by a name.

        Raises TypeError for what is no agent class, for one with a class attribute that runs could
        change for each other, for one whose `__new__` could hand them the same instance, and for
        what is no tool or no list of them; ValueError for a blank or taken name, and for two tools
        of one name; RuntimeError once frozen.
        """
        if self._frozen:
            msg = f"the registry is frozen: register {name!r} before anything runs"
            raise RuntimeError(msg)
        if not name.strip():
            msg = "an agent's name must not be blank"
            raise ValueError(msg)
        if name in self._agents:
            msg = f"an agent named {name!r} is registered already"
            raise ValueError(msg)
        where = f"agent {name!r}"
        required = names_in(requires, where, "requires")
        check_names(required, f"`requires` of {where}")
        tools = tools_or_names_in(getattr(agent_class, "tools", ()), where)
        names_in(getattr(agent_class, "tool_sources", ()), where, "tool_sources")
        names = (tool if isinstance(tool, str) else tool.name for tool in tools)
        check_names(names, where)
        self._guards_of[name] = self._guard(check_agent_class(name, agent_class))
        named = [tool for tool in tools if isinstance(tool, str)]
        self._agents[name] = AgentDescription(
            name=name,
            agent_class=agent_class,
            description=description or inspect.cleandoc(agent_class.__doc__ or ""),
            version=version,
            requires=tuple(dict.fromkeys([*required, *named])),
        )

    def _guard(self, owned: Sequence[Sequence[tuple[str, object]]]) -> tuple[ClassGuard, ...]:
        """A guard for each group of what no agent before owned, and the guards of the rest."""
        guards: dict[ClassGuard, None] = {}
        for group in owned:
            unknown = [(path, item) for path, item in group if id(item) not in self._guards]
            if unknown:
                guard = ClassGuard(unknown)
                self._guards.update({id(item): guard for _, item in unknown})
            guards |= dict.fromkeys(self._guards[id(item)] for _, item in group)
        return tuple(guards)

    def freeze(self) -> None:
        """From now on, refuse registrations."""
        self._frozen = True

    def names(self) -> tuple[str, ...]:
        return tuple(self._agents)

    def describe(self, name: str) -> AgentDescription:
        """Raises UnknownAgentError, which lists the names that there are."""
        try:
            return self._agents[name]
        except KeyError:
            known = ", ".join(sorted(self._agents)) or "none"
            msg = f"no agent is named {name!r} (there is {known})"
            raise UnknownAgentError(msg) from None

    def guards_of(self, name: str) -> tuple[ClassGuard, ...]:
        """What notices writes to the classes that this agent is made of. Raises as `describe`."""
        return self._guards_of[self.describe(name).name]

    def make(self, name: str, watch: ClassWatch | None = None) -> Agent:
        """A new instance, once what was written to its class since registration is put back.

        `watch` is that of the run which the instance belongs to. Freezes the registry. Raises
        UnknownAgentError.
        """
        self.freeze()
        described, guards = self.describe(name), self.guards_of(name)
        if watch is not None:
            watch.begin(guards)
        else:
            for guard in guards:
                guard.check()
        return make_instance(described.agent_class)

    def missing_requirements(self, provided: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Which agents want tools that are not among those provided; empty when all is well."""
        return {
            name: missing
            for name, agent in self._agents.items()
            if (missing := tuple(tool for tool in agent.requires if tool not in provided))
        }

    def check_provided(self, tools: Sequence[str], tool_sources: Sequence[str]) -> None:
        """Raise ValueError if an agent wants a tool, or a source, that is not among these names."""
        for name, missing in self.missing_requirements(tools).items():
            _refuse_missing(name, "tool", missing, tools)
        for name, agent in self._agents.items():
            absent = tuple(each for each in agent.tool_sources if each not in tool_sources)
            if absent:
                _refuse_missing(name, "tool source", absent, tool_sources)

    def __contains__(self, name: object) -> bool:
        return name in self._agents

    def __iter__(self) -> Iterator[str]:
        return iter(self._agents)

    def __len__(self) -> int:
        return len(self._agents)


def _refuse_missing(
    agent: str, what: str, missing: Sequence[str], provided: Sequence[str]
) -> NoReturn:
    wanted = f"{what} {missing[0]!r}, which is"
    if len(missing) > 1:
        wanted = f"{what}s {', '.join(map(repr, missing))}, which are"
    msg = f"agent {agent!r} wants the {wanted} not there (there is {', '.join(provided) or 'none'})"
    raise ValueError(msg)


def check_agent_class(name: str, agent_class: object) -> tuple[tuple[tuple[str, object], ...], ...]:
    """Raise TypeError unless this is an agent class that no run can leave something behind in.

    Refused is what its runs could change for each other, wherever its class, bases, metaclass,
    nested classes and methods keep it: in attributes (of a method, too), default values, caches,
    and in what methods and their decorators close over; and a `__new__`, or a metaclass's
    `__call__`, that could hand two runs one instance. What the class names in `shared` is its
    maker's business, as is what a tool closes over that is no container. So are the globals that
    its methods name: `creche scan` looks at these, in their module's source.

    Returns what each class that it is made of owns, with its path.
    """
    if not inspect.isclass(agent_class):
        msg = f"agent {name!r} must be a class, so that each run gets an instance of its own"
        raise TypeError(msg)
    if not inspect.iscoroutinefunction(getattr(agent_class, "run", None)):
        msg = f"agent {name!r}: {agent_class.__name__} needs `async def run(self, run)`"
        raise TypeError(msg)
    _check_calls(name, agent_class)
    check_makes_anew(name, agent_class)
    roots = classes_of(agent_class)
    walk = OwnedWalk(roots, shared=_shared_by(name, agent_class), stops=(Tool,))
    # What bases own is met before what is made of them, so that each thing is its first owner's.
    owned = tuple(tuple(walk.over(root, root.__name__)) for root in reversed(roots))
    for path, found in faults(walk, itertools.chain.from_iterable(owned)):
        msg = f"agent {name!r}: {advice(path, found, place='on `self`')}; or name it in `shared`"
        raise TypeError(msg)
    return owned


def _shared_by(name: str, agent_class: type) -> Iterator[object]:
    """What the class and its bases say that runs share on purpose."""
    for owner in agent_class.__mro__:
        shared = vars(owner).get("shared", ())
        if not isinstance(shared, tuple):
            msg = f"agent {name!r}: {owner.__name__}.shared must be a tuple of what runs share"
            raise TypeError(msg)
        yield from cast("tuple[object, ...]", shared)


def _check_calls(name: str, agent_class: type[Any]) -> None:
    """Raise TypeError unless the class can be called as `Class()`, and its `run` with a run."""
    if inspect.isabstract(agent_class):
        missing = ", ".join(sorted(agent_class.__abstractmethods__))
        msg = f"agent {name!r}: {agent_class.__name__} is abstract; it needs {missing}"
        raise TypeError(msg)
    if not _takes(agent_class, 0):
        msg = (
            f"agent {name!r}: {agent_class.__name__}.__init__ needs arguments, and there are "
            "none: each run makes an instance of its own; give them defaults"
        )
        raise TypeError(msg)
    bound = isinstance(inspect.getattr_static(agent_class, "run"), (staticmethod, classmethod))
    if not _takes(agent_class.run, 1 if bound else 2):
        msg = f"agent {name!r}: {agent_class.__name__}.run must take the run, and nothing else"
        raise TypeError(msg)


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # one that is written in C may not tell
        return True
    return True


class ModelAgent:
    """The model-and-tools loop: ask the model, call the tools that it wants, ask again.

    Subclass it and set the class attributes; `run` is the whole of it.
    """

    instructions: ClassVar[str] = "You are a helpful assistant."
    tools: ClassVar[tuple[Tool | str, ...]] = ()
    tool_sources: ClassVar[tuple[str, ...]] = ()
    model: ClassVar[str] = "default"

    async def run(self, run: RunContext) -> None:
        """Answer by as many turns as it takes, `Limits.max_turns` at most."""
        messages: list[Message] = [
            SystemMessage(id=MessageId(new_id()), content=self.instructions),
            *run.messages,
        ]
        for _ in range(run.limits.max_turns):
            answer = await self._turn(run, messages)
            if not answer.tool_calls:
                return
            messages.append(answer)
            messages.extend(await self._call_tools(run, answer))
        msg = f"the agent did not finish within {run.limits.max_turns} model calls"
        raise RunError(msg, code="turn_limit")

    async def _turn(self, run: RunContext, messages: Sequence[Message]) -> AssistantMessage:
        """One answer of the model, streamed to the client as it comes."""
        model = run.model(self.model)
        text: list[str] = []
        calls: list[ToolCall] = []
        message_id: MessageId | None = None
        async with model.open_stream(messages, run.tools.specs) as stream:
            async for part in stream:
                if isinstance(part, TextDelta):
                    if message_id is None:
                        message_id = await run.emit.begin_text()
                    text.append(part.text)
                    await run.emit.text(part.text)
                elif isinstance(part, ToolCallRequest):
                    calls.append(_tool_call(part))
                else:
                    run.spent(model.name, part)
        await run.emit.end_text()
        return AssistantMessage(
            id=message_id or MessageId(new_id()),
            content="".join(text) or None,
            tool_calls=tuple(calls),
        )

    async def _call_tools(self, run: RunContext, answer: AssistantMessage) -> list[ToolMessage]:
        """Call what the answer asks for, all at once; the results keep the answer's order."""
        results: dict[str, ToolResult] = {}

        async def call(wanted: ToolCall) -> None:
            results[wanted.id] = await run.tools.dispatch(
                wanted.function.name,
                wanted.function.arguments,
                tool_call_id=wanted.id,
                parent_message_id=answer.id,
            )

        async with trio.open_nursery() as nursery:
            for wanted in answer.tool_calls:
                nursery.start_soon(call, wanted)
        return [
            ToolMessage(
                id=MessageId(new_id()),
                tool_call_id=wanted.id,
                content=results[wanted.id].content,
                error=results[wanted.id].error,
            )
            for wanted in answer.tool_calls
        ]


def _tool_call(request: ToolCallRequest) -> ToolCall:
    # A provider's ids are unique in its answer only, and ours must be so in the whole run.
    return ToolCall(
        id=new_tool_call_id(),
        function=FunctionCall(request.name, request.arguments),
    )
