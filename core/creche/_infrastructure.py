"""What is made once and shared by all runs, in one frozen object that is passed as an argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import cast

from creche._admission import Weight, equal_weight
from creche._agents import Agent, AgentClassRegistry
from creche._approval import Approver
from creche._audit import SecurityAudit
from creche._budget import Price
from creche._limits import Limits
from creche._models import Model
from creche._quotas import Clock, utc_now
from creche._store import MemoryStore, Store
from creche._thread_turn import ThreadTurns
from creche._tool_calls import ToolPolicy, allow_every_tool
from creche._tool_sources import ToolSource
from creche._tools import Tool, check_names, tools_in
from creche._tracing import Tracer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Infrastructure:
    """Agent classes, tools, models, limits and the store; nothing in it belongs to a run.

    `agents` may be a plain mapping of names to classes. `tools` are those that agents ask for
    by name; `tool_sources`, too, and they are opened for each run of such an agent.
    `models["default"]` is the one that an agent gets if it names none. `audit` is told of limits
    that were hit, of tools that were denied, of mix-ups and of writes to a class that were
    stopped; whoever opened it closes it.

    `tool_policy(context, tool)` says whether that user may call that tool: a pure function, asked
    when a run begins. To a user who may not, the tool does not exist. `approver` is asked before
    each call of an `approval=True` tool; without one the user is asked, as by `RunContext.ask`.
    `tracer` is told of the spans of runs; without one, nobody is.

    `weight(user_id)` is that user's share of the server when it is full, relative to others': a
    pure function, asked when the first of a user's runs is taken on.

    `prices` are those of models by their own names (`Model.name`); where a limit or a budget is in
    USD, only models that have one can be asked. `clock` says what time it is, in UTC, and so which
    day a user's spending counts for.

    Raises ValueError if an agent asks for a tool, or for a source of tools, that is not there,
    and for two tools of one name; TypeError for what is no tool, or no list of them.
    """

    agents: AgentClassRegistry | Mapping[str, type[Agent]]
    tools: Sequence[Tool] = ()
    tool_sources: Mapping[str, ToolSource] = dataclasses.field(
        default_factory=dict[str, ToolSource]
    )
    models: Mapping[str, Model] = dataclasses.field(default_factory=dict[str, Model])
    tool_policy: ToolPolicy = allow_every_tool
    approver: Approver | None = None
    weight: Weight = equal_weight
    limits: Limits = dataclasses.field(default_factory=Limits)
    store: Store = dataclasses.field(default_factory=MemoryStore)
    audit: SecurityAudit | None = None
    tracer: Tracer | None = None
    prices: Mapping[str, Price] = dataclasses.field(default_factory=dict[str, Price])
    clock: Clock = utc_now
    registry: AgentClassRegistry = dataclasses.field(init=False)
    # Lent to engines that are given no journals: an entry lives as long as such an engine's block.
    turns: ThreadTurns = dataclasses.field(init=False, repr=False, default_factory=ThreadTurns)
    _tools_of: Mapping[str, tuple[Tool, ...]] = dataclasses.field(init=False, repr=False)
    _sources_of: Mapping[str, Mapping[str, ToolSource]] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", tools_in(self.tools, "Infrastructure"))
        if not isinstance(cast("object", self.tool_sources), Mapping):
            msg = "Infrastructure: `tool_sources` must be a mapping of names to tool sources"
            raise TypeError(msg)
        object.__setattr__(self, "tool_sources", MappingProxyType(dict(self.tool_sources)))
        check_names((tool.name for tool in self.tools), "an infrastructure")
        object.__setattr__(self, "models", MappingProxyType(dict(self.models)))
        object.__setattr__(self, "prices", MappingProxyType(dict(self.prices)))
        agents = self.agents
        registry = agents if isinstance(agents, AgentClassRegistry) else AgentClassRegistry(agents)
        registry.freeze()
        object.__setattr__(self, "registry", registry)
        registry.check_provided([tool.name for tool in self.tools], tuple(self.tool_sources))
        provided = {tool.name: tool for tool in self.tools}
        tools_of = {
            name: tuple(
                provided[tool] if isinstance(tool, str) else tool
                for tool in registry.describe(name).tools
            )
            for name in registry
        }
        object.__setattr__(self, "_tools_of", MappingProxyType(tools_of))
        sources_of = {
            name: MappingProxyType(
                {
                    source: self.tool_sources[source]
                    for source in registry.describe(name).tool_sources
                }
            )
            for name in registry
        }
        object.__setattr__(self, "_sources_of", MappingProxyType(sources_of))

    def tools_of(self, agent: str) -> tuple[Tool, ...]:
        """The tools that runs of this agent may call. Raises UnknownAgentError."""
        return self._tools_of[self.registry.describe(agent).name]

    def sources_of(self, agent: str) -> Mapping[str, ToolSource]:
        """The sources that are opened for runs of this agent. Raises UnknownAgentError."""
        return self._sources_of[self.registry.describe(agent).name]
