"""The application: its routes together, and what every answer has in common."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import BadRequest

from creche_server.addresses import why_not
from creche_server.http.afterwards import AfterReplies
from creche_server.http.agents import agent_routes
from creche_server.http.brought import MOST_BODY_BYTES
from creche_server.http.errors import tell_errors
from creche_server.http.health import health_routes
from creche_server.http.metrics import metrics_routes
from creche_server.http.page import page_routes
from creche_server.http.refusals import tell_refusals
from creche_server.http.runs import run_routes
from creche_server.http.threads import thread_routes
from creche_server.http.tickets import ticket_routes
from creche_server.services import Services

_HEADERS: Final = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "Referrer-Policy": "no-referrer",  # the printed link carries a ticket
        "X-Content-Type-Options": "nosniff",
    },
)


def make_app(services: Services) -> QuartTrio:
    """The HTTP side of the server. It owns nothing: all it uses comes with `services`."""
    app = QuartTrio("creche_server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MOST_BODY_BYTES
    app.asgi_app = AfterReplies(app.asgi_app)  # type: ignore[method-assign]
    app.json.sort_keys = False  # type: ignore[attr-defined]  # a provider's own attribute
    tell_errors(app, services.audit)
    for routes in (
        agent_routes(services),
        health_routes(services),
        metrics_routes(services),
        page_routes(services),
        run_routes(services),
        thread_routes(services),
        ticket_routes(services),
    ):
        app.register_blueprint(routes)

    @app.before_request
    async def refuse_odd_paths() -> None:
        # Routes see the path decoded, in which these would be something else.
        if refusal := why_not(request.scope["raw_path"]):
            raise BadRequest(refusal)

    @app.after_request
    async def add_headers(response: Response) -> Response:
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    tell_refusals(app, services.audit)

    return app
