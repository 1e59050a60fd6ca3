"""What can be run here."""

from __future__ import annotations

from typing import Any

from quart import Blueprint, jsonify
from werkzeug.exceptions import NotFound

from creche import AgentDescription, UnknownAgentError
from creche_server.http.identity import current_user
from creche_server.services import Services


def agent_routes(services: Services) -> Blueprint:
    """`/agents`, for whoever is logged in."""
    routes = Blueprint("agents", __name__)
    registry = services.supervisor.infrastructure.registry

    @routes.post("/agents/search")
    async def search() -> Any:
        """All of them, the one to offer first at the head."""
        current_user(services.auth)
        return jsonify([_described(registry.describe(name)) for name in registry.names()])

    @routes.get("/agents/<agent_id>")
    async def look(agent_id: str) -> Any:
        current_user(services.auth)
        try:
            return jsonify(_described(registry.describe(agent_id)))
        except UnknownAgentError as error:
            raise NotFound(str(error)) from error

    return routes


def _described(agent: AgentDescription) -> dict[str, Any]:
    return {
        "agent_id": agent.name,
        "name": agent.name,
        "description": agent.description,
        "version": agent.version,
    }
