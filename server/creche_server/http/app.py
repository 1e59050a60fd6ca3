"""The application: its routes together, and what every answer has in common."""

from __future__ import annotations

import logging
from typing import Any, Final

from pydantic import ValidationError
from quart import Response, jsonify, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from creche import CrecheError, InvalidContextError, new_id
from creche_server.auth import NotAuthenticatedError
from creche_server.http.agents import agent_routes
from creche_server.http.health import health_routes
from creche_server.http.page import page_routes
from creche_server.http.threads import thread_routes
from creche_server.http.tickets import ticket_routes
from creche_server.services import Services
from creche_server.wire import replies

_log: Final = logging.getLogger("creche.http")

_MOST_BODY_BYTES: Final = 1024 * 1024
_STATUS: Final = {
    "invalid_argument": 400,
    "limit_exceeded": 429,
    "draining": 503,
    "unavailable": 503,
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # the printed link carries a ticket
    "X-Content-Type-Options": "nosniff",
}


def make_app(services: Services) -> QuartTrio:
    """The HTTP side of the server. It owns nothing: all it uses comes with `services`."""
    app = QuartTrio("creche_server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = _MOST_BODY_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]  # a provider's own attribute
    for routes in (
        agent_routes(services),
        health_routes(services),
        page_routes(services),
        thread_routes(services),
        ticket_routes(services),
    ):
        app.register_blueprint(routes)

    @app.after_request
    async def add_headers(response: Response) -> Response:
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.errorhandler(NotAuthenticatedError)
    async def not_authenticated(error: NotAuthenticatedError) -> Any:
        _log.info("refused a login from %s: %s", request.remote_addr, error)
        answer = jsonify(error="unauthenticated", message=str(error))
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer, 401

    @app.errorhandler(ValidationError)
    async def invalid_body(error: ValidationError) -> Any:
        details = [
            {"field": ".".join(map(str, item["loc"])), "problem": item["msg"]}
            for item in error.errors(include_input=False, include_url=False)
        ]
        message = "the request's body does not fit; see `details`"
        return jsonify(error="invalid_argument", message=message, details=details), 422

    @app.errorhandler(InvalidContextError)
    @app.errorhandler(CrecheError)
    async def told(error: CrecheError) -> Any:
        code = replies.code_of(error) or "unknown_error"
        return jsonify(error=code, message=str(error)), _STATUS.get(code, 500)

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Any:
        status = error.code or 500
        name = (error.name or "error").lower().replace(" ", "_")
        answer = jsonify(error=name, message=error.description)
        if isinstance(error, MethodNotAllowed):
            answer.headers["Allow"] = ", ".join(error.valid_methods or ())
        return answer, status

    @app.errorhandler(Exception)
    async def failed(error: Exception) -> Any:  # boundary: one request
        reference = new_id()[:12]
        _log.error("a request failed", exc_info=error, extra={"correlation_id": reference})
        message = f"the server failed at this request; reference: {reference}"
        return jsonify(error="unknown_error", message=message), 500

    return app
