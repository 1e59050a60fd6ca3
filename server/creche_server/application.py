"""What an embedder brings to a server: agents, who may call which tool, and who approves calls.

`creche serve MODULE:NAME` takes one, or what its `agents` may be. It is made once and shared by
all runs; nothing in it belongs to a user.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from creche import (
    Agent,
    AgentClassRegistry,
    Approval,
    ApprovalRequest,
    ToolPolicy,
    allow_every_tool,
)

Approve = Callable[[ApprovalRequest], Awaitable[Approval]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Application:
    """What to serve beside `assistant`, and on what terms.

    `agents` is a mapping of names to agent classes, a registry, or one class, named after it.

    `tool_policy(context, tool)` is asked when a run begins whether that user may call that tool;
    to one who may not, it does not exist. `approve(request)` is awaited before each call of an
    `approval=True` tool, and gives `request.approve()` or `request.refuse(why)`; without one such
    calls are refused.

    Raises TypeError and ValueError for what is none of these, and for agents as the registry does.
    """

    agents: AgentClassRegistry | Mapping[str, type[Agent]] | type[Agent] = dataclasses.field(
        default_factory=dict[str, type[Agent]]
    )
    tool_policy: ToolPolicy = allow_every_tool
    approve: Approve | None = None
    registry: AgentClassRegistry = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "registry", _registry(self.agents))
        if _is_async(self.tool_policy):  # its coroutine would be no yes
            msg = (
                "tool_policy must be a function, and not an async one: its answer is True or False"
            )
            raise TypeError(msg)
        if self.approve is not None and not _is_async(self.approve):
            msg = "approve must be an `async def` function of an ApprovalRequest"
            raise TypeError(msg)

    @property
    def approver(self) -> Approver | None:
        """`approve` as the core asks it."""
        return None if self.approve is None else Approver(self.approve)


@dataclasses.dataclass(frozen=True, slots=True)
class Approver:
    """A `creche.Approver` that asks a function."""

    function: Approve

    async def approve(self, request: ApprovalRequest) -> Approval:
        return await self.function(request)


def _is_async(function: object) -> bool:
    """Whether calling it gives something to await: a function, a method, or an object's call."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  what it is, not whether it is there
    )


def _registry(found: Any) -> AgentClassRegistry:
    if inspect.isclass(found):
        agent_class: Any = found  # the registry says whether it is one
        return AgentClassRegistry({found.__name__.lower(): agent_class})
    if isinstance(found, AgentClassRegistry):
        return found
    if not isinstance(found, Mapping):
        msg = "agents must be a mapping of names to agent classes, a registry or a class"
        raise TypeError(msg)
    agents = cast("Mapping[Any, Any]", found)
    for name in agents:
        if not isinstance(name, str):
            msg = f"an agent's name must be a word, and {name!r} is none"
            raise TypeError(msg)
    return AgentClassRegistry(agents)
