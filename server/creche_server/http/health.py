"""Whether the process lives, and whether it may be sent work."""

from __future__ import annotations

import logging
from typing import Any, Final

import trio
from quart import Blueprint, jsonify

from creche_server.services import Services

_log: Final = logging.getLogger("creche.http")
_STORE_TIMEOUT: Final = 2.0  # seconds


def health_routes(services: Services) -> Blueprint:
    """`/healthz` and `/readyz`, for whoever asks."""
    routes = Blueprint("health", __name__)

    @routes.get("/healthz")
    async def healthz() -> Any:
        return jsonify(status="ok")

    @routes.get("/readyz")
    async def readyz() -> Any:
        if services.supervisor.draining:
            return jsonify(status="draining"), 503
        try:
            with trio.fail_after(_STORE_TIMEOUT):
                await services.ping()
        except Exception:  # noqa: BLE001  boundary: whatever the store raises, we are not ready
            _log.warning("the store does not answer")
            return jsonify(status="store unavailable"), 503
        return jsonify(status="ready")

    return routes
