"""Figures of the process for whoever watches it, in Prometheus's text format.

Source: prometheus.io, "Exposition formats", text format 0.0.4.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import trio
from quart import Blueprint, Response

from creche_server.scan import ProcessState, find_global_state, summed
from creche_server.services import Services

_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_STATE_MEANS: Final = (
    "Mutable objects that the loaded modules of a package and their classes hold (containers, "
    "objects with state, caches in use, functions with a mutable default), each once, counted in "
    "the process at every scrape; the packages are creche's own and those that the agents and "
    "their tools come from."
)

# What a label's value must not hold as it is.
_ESCAPED: Final = MappingProxyType(str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"}))


def metrics_routes(services: Services) -> Blueprint:
    """`/metrics`, for whoever asks: numbers of the process, and nothing of any user."""
    routes = Blueprint("metrics", __name__)

    @routes.get("/metrics")
    async def metrics() -> Any:
        state = await _counted(services.packages)
        told = exposition(global_state=state.by_package, runs_live=services.supervisor.count)
        return Response(told, content_type=_CONTENT_TYPE)

    return routes


async def _counted(packages: Sequence[str]) -> ProcessState:
    """Count module by module, so that runs have their turns between: a package may be large."""
    found: list[tuple[str, str]] = []
    for step in find_global_state(sys.modules.copy(), packages):
        found += step
        await trio.lowlevel.checkpoint()
    return summed(found, packages)


def exposition(*, global_state: Mapping[str, int], runs_live: int) -> str:
    """The figures as Prometheus reads them; `global_state` is {package: count}."""
    by_package = {
        f'{{package="{package.translate(_ESCAPED)}"}}': count
        for package, count in global_state.items()
    }
    gauges = (
        (
            "creche_process_global_state",
            _STATE_MEANS,
            by_package,
        ),
        ("creche_runs_live", "Runs that are running or queued.", {"": runs_live}),
    )
    return "".join(
        f"# HELP {name} {told}\n# TYPE {name} gauge\n"
        + "".join(f"{name}{labels} {value}\n" for labels, value in values.items())
        for name, told, values in gauges
    )
