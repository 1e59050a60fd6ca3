"""Which packages a server's code comes from: ours, and those of the agents that it was given."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from creche import AgentClassRegistry, Tool

OURS: Final = ("creche", "creche_server")


def packages_of(
    agents: AgentClassRegistry,
    tools: Sequence[Tool],
    loaded: Iterable[str] = (),
) -> tuple[str, ...]:
    """The top-level packages of `loaded` modules, and of what each agent and tool is defined in.

    Ours come first, the others in order of their names; the standard library is nobody's.
    """
    found = {module.partition(".")[0] for module in (*loaded, *_modules(agents, tools))}
    return (*OURS, *sorted(found - {*OURS} - sys.stdlib_module_names))


def _modules(agents: AgentClassRegistry, tools: Sequence[Tool]) -> Iterator[str]:
    used: list[Tool | str] = [*tools]
    for name in agents:
        agent = agents.describe(name)
        used += agent.tools
        yield agent.agent_class.__module__
    for each in used:
        if isinstance(each, Tool):
            function = each.function
            while isinstance(function, functools.partial):
                function = function.func
            module: object = getattr(function, "__module__", None)
            if isinstance(module, str):
                yield module
