"""What is made once and shared by all runs, in one frozen object that is passed as an argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from creche._agents import Agent, AgentClassRegistry
from creche._approval import Approver
from creche._audit import SecurityAudit
from creche._limits import Limits
from creche._models import Model
from creche._store import MemoryStore, Store
from creche._tool_calls import ToolPolicy, allow_every_tool
from creche._tool_sources import ToolSource
from creche._tools import Tool, check_names
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

    Raises ValueError if an agent asks for a tool, or for a source of tools, that is not there,
    and for two tools of one name.
    """

    agents: AgentClassRegistry | Mapping[str, type[Agent]]
    tools: Sequence[Tool] = ()
    tool_sources: Mapping[str, ToolSource] = dataclasses.field(
        default_factory=dict[str, ToolSource]
    )
    models: Mapping[str, Model] = dataclasses.field(default_factory=dict[str, Model])
    tool_policy: ToolPolicy = allow_every_tool
    approver: Approver | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    store: Store = dataclasses.field(default_factory=MemoryStore)
    audit: SecurityAudit | None = None
    tracer: Tracer | None = None
    registry: AgentClassRegistry = dataclasses.field(init=False)
    _tools_of: Mapping[str, tuple[Tool, ...]] = dataclasses.field(init=False, repr=False)
    _sources_of: Mapping[str, Mapping[str, ToolSource]] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", tuple(self.tools))
        object.__setattr__(self, "tool_sources", MappingProxyType(dict(self.tool_sources)))
        check_names((tool.name for tool in self.tools), "an infrastructure")
        object.__setattr__(self, "models", MappingProxyType(dict(self.models)))
        agents = self.agents
        registry = agents if isinstance(agents, AgentClassRegistry) else AgentClassRegistry(agents)
        registry.freeze()
        object.__setattr__(self, "registry", registry)
        missing = registry.missing_requirements([tool.name for tool in self.tools])
        if missing:
            wanted = "; ".join(
                f"{name!r} wants {', '.join(tools)}" for name, tools in missing.items()
            )
            msg = f"no such tools are provided: {wanted}"
            raise ValueError(msg)
        provided = {tool.name: tool for tool in self.tools}
        tools_of = {
            name: tuple(
                provided[tool] if isinstance(tool, str) else tool
                for tool in registry.describe(name).tools
            )
            for name in registry
        }
        object.__setattr__(self, "_tools_of", MappingProxyType(tools_of))
        object.__setattr__(self, "_sources_of", MappingProxyType(self._sources_by_agent()))

    def _sources_by_agent(self) -> dict[str, Mapping[str, ToolSource]]:
        found: dict[str, Mapping[str, ToolSource]] = {}
        for name in self.registry:
            wanted = self.registry.describe(name).tool_sources
            missing = [source for source in wanted if source not in self.tool_sources]
            if missing:
                msg = (
                    f"{name!r} wants tool sources that are not provided: {', '.join(missing)} "
                    f"(there is {', '.join(self.tool_sources) or 'none'})"
                )
                raise ValueError(msg)
            sources = {source: self.tool_sources[source] for source in wanted}
            found[name] = MappingProxyType(sources)
        return found

    def tools_of(self, agent: str) -> tuple[Tool, ...]:
        """The tools that runs of this agent may call. Raises UnknownAgentError."""
        return self._tools_of[self.registry.describe(agent).name]

    def sources_of(self, agent: str) -> Mapping[str, ToolSource]:
        """The sources that are opened for runs of this agent. Raises UnknownAgentError."""
        return self._sources_of[self.registry.describe(agent).name]
