"""How an answer that is no success looks: `{"error": CODE, "message": SENTENCE}`, always."""

from __future__ import annotations

import logging
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

from quart import jsonify, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from creche import CrecheError, InvalidContextError, SecurityAudit
from creche._auditing import note_mix_up
from creche_server.http.afterwards import correlation_id
from creche_server.http.brought import UnfitError
from creche_server.http.identity import operation
from creche_server.recall import UnknownRunError
from creche_server.wire import replies

_log: Final = logging.getLogger("creche.http")

_STATUS: Final = MappingProxyType(
    {
        "invalid_argument": HTTPStatus.BAD_REQUEST,
        "busy": HTTPStatus.CONFLICT,
        "limit_exceeded": HTTPStatus.TOO_MANY_REQUESTS,
        "draining": HTTPStatus.SERVICE_UNAVAILABLE,
        "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    }
)


def tell_errors(app: QuartTrio, audit: SecurityAudit) -> None:
    """Have every error of the application's answered in words of ours, and mix-ups audited."""

    async def told(error: CrecheError) -> Any:
        note_mix_up(audit, error, operation(), correlation_id=correlation_id())
        return await _told(error)

    app.register_error_handler(UnfitError, _unfit)
    app.register_error_handler(UnknownRunError, _unknown_run)
    app.register_error_handler(InvalidContextError, _told)
    app.register_error_handler(CrecheError, told)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _failed)


async def _unfit(error: UnfitError) -> Any:
    answer = jsonify(error="invalid_argument", message=str(error), details=error.details)
    return answer, HTTPStatus.UNPROCESSABLE_ENTITY


async def _unknown_run(error: UnknownRunError) -> Any:
    return jsonify(error="no_such_run", message=str(error)), HTTPStatus.NOT_FOUND


async def _told(error: CrecheError) -> Any:
    code = replies.code_of(error) or "unknown_error"
    status = _STATUS.get(code, HTTPStatus.INTERNAL_SERVER_ERROR)
    retry_after = getattr(error, "retry_after", None)
    if retry_after is None:
        return jsonify(error=code, message=str(error)), status
    answer = jsonify(error=code, message=str(error), retry_after=retry_after)
    answer.headers["Retry-After"] = str(max(1, round(retry_after)))  # whole seconds
    return answer, status


async def _http_error(error: HTTPException) -> Any:
    name = (error.name or "error").lower().replace(" ", "_")
    unmatched = isinstance(error, NotFound) and error is request.routing_exception
    message = "there is nothing at this address" if unmatched else error.description
    answer = jsonify(error=name, message=message)
    if isinstance(error, MethodNotAllowed):
        answer.headers["Allow"] = ", ".join(error.valid_methods or ())
    return answer, error.code or HTTPStatus.INTERNAL_SERVER_ERROR


async def _failed(error: Exception) -> Any:  # boundary: one request
    reference = correlation_id()
    _log.error("a request failed", exc_info=error, extra={"correlation_id": reference})
    message = f"the server failed at this request; reference: {reference}"
    return jsonify(error="unknown_error", message=message), HTTPStatus.INTERNAL_SERVER_ERROR
