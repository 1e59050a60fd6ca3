"""Figures of the process for whoever watches it, in Prometheus's text format.

Source: prometheus.io, "Exposition formats", text format 0.0.4.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from quart import Blueprint, Response

from creche_server.scan import count_global_state
from creche_server.services import Services

_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def metrics_routes(services: Services) -> Blueprint:
    """`/metrics`, for whoever asks: numbers of the process, and nothing of any user."""
    routes = Blueprint("metrics", __name__)

    @routes.get("/metrics")
    async def metrics() -> Any:
        told = exposition(
            global_state=count_global_state(sys.modules.copy()).count,
            runs_live=services.supervisor.count,
        )
        return Response(told, content_type=_CONTENT_TYPE)

    return routes


def exposition(*, global_state: int, runs_live: int) -> str:
    """The figures as Prometheus reads them."""
    gauges = (
        (
            "creche_process_global_state",
            "Mutable objects that creche's loaded modules and their classes hold.",
            global_state,
        ),
        ("creche_runs_live", "Runs that are running or queued.", runs_live),
    )
    return "".join(
        f"# HELP {name} {told}\n# TYPE {name} gauge\n{name} {value}\n"
        for name, told, value in gauges
    )
