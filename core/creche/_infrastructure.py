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
from creche._tools import Tool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Infrastructure:
    """Agent classes, tools, models, limits and the store; nothing in it belongs to a run.

    `agents` may be a plain mapping of names to classes. `tools` are those that agents ask for
    by name. `models["default"]` is the one that an agent gets if it names none. `audit` is told
    of limits that were hit and of mix-ups that were stopped; whoever opened it closes it.

    `tool_policy(context, tool)` says whether that user may call that tool: a pure function, asked
    when a run begins. To a user who may not, the tool does not exist. `approver` is asked before
    each call of an `approval=True` tool; without one the user
    is asked, as by `RunContext.ask`.

    Raises ValueError if an agent asks for a tool that is not there.
    """

    agents: AgentClassRegistry | Mapping[str, type[Agent]]
    tools: Sequence[Tool] = ()
    models: Mapping[str, Model] = dataclasses.field(default_factory=dict[str, Model])
    tool_policy: ToolPolicy = allow_every_tool
    approver: Approver | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    store: Store = dataclasses.field(default_factory=MemoryStore)
    audit: SecurityAudit | None = None
    registry: AgentClassRegistry = dataclasses.field(init=False)
    _tools_of: Mapping[str, tuple[Tool, ...]] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", tuple(self.tools))
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

    def tools_of(self, agent: str) -> tuple[Tool, ...]:
        """The tools that runs of this agent may call. Raises UnknownAgentError."""
        return self._tools_of[self.registry.describe(agent).name]
