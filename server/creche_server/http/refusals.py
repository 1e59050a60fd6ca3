"""Refused access over HTTP: audited first, then told; what cannot be audited is `unavailable`."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final

from quart import jsonify, request
from quart_trio import QuartTrio

from creche import AuditKind, AuditUnavailableError, SecurityAudit
from creche_server.auth import NotAuthenticatedError, NothingShownError
from creche_server.http.afterwards import correlation_id
from creche_server.http.identity import ForeignOriginError, operation

_log: Final = logging.getLogger("creche.http")


def tell_refusals(app: QuartTrio, audit: SecurityAudit) -> None:
    """Have the application answer those who are not let in."""

    async def audited(kind: AuditKind, resource: str, answer: Any) -> Any:
        try:
            await audit.record(
                kind,
                resource=resource,
                operation=operation(),
                outcome=f"answered {answer[1].value}",
                correlation_id=correlation_id(),
            )
        except AuditUnavailableError as error:
            answer = jsonify(error="unavailable", message=str(error))
            return answer, HTTPStatus.SERVICE_UNAVAILABLE
        return answer

    @app.errorhandler(NotAuthenticatedError)
    async def not_authenticated(error: NotAuthenticatedError) -> Any:
        _log.info(
            "refused a login from %s: %s",
            request.remote_addr,
            error,
            extra={"correlation_id": correlation_id()},
        )
        answer = jsonify(error="unauthenticated", message=str(error))
        answer.headers["WWW-Authenticate"] = "Bearer"
        refusal = answer, HTTPStatus.UNAUTHORIZED
        if isinstance(error, NothingShownError):
            return refusal
        return await audited("token_refused", "HTTP", refusal)

    @app.errorhandler(ForeignOriginError)
    async def foreign_origin(error: ForeignOriginError) -> Any:
        answer = jsonify(error="forbidden", message=error.description)
        return await audited("unauthorised_access", "session", (answer, HTTPStatus.FORBIDDEN))
