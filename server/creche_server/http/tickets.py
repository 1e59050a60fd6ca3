"""One-time tickets: for a browser's WebSocket, which cannot send an Authorization header."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from quart import Blueprint, jsonify

from creche_server.auth import NothingShownError
from creche_server.http import brought
from creche_server.http.afterwards import correlation_id
from creche_server.http.identity import current_user, operation
from creche_server.services import Services


class TicketRequest(BaseModel):
    """What the ticket is to open."""

    model_config = ConfigDict(extra="forbid", strict=True)

    purpose: Literal["page", "websocket"] = "websocket"


def ticket_routes(services: Services) -> Blueprint:
    """`/auth/tickets`."""
    routes = Blueprint("tickets", __name__)

    @routes.post("/auth/tickets")
    async def mint() -> Any:
        user_id = current_user(services.auth)
        body = await brought.body(TicketRequest)
        if body.purpose == "page":
            # It becomes a session, so a session alone may not mint one.
            try:
                user_id = current_user(services.auth, cookie=False)
            except NothingShownError:
                await services.audit.record(
                    "privilege_escalation",
                    user=user_id,
                    resource="page ticket",
                    operation=operation(),
                    correlation_id=correlation_id(),
                )
                raise
        ticket, seconds = services.auth.mint_ticket(user_id, body.purpose)
        return jsonify(ticket=ticket, expires_in=seconds), 201

    return routes
