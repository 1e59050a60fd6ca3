"""Who makes this request: a bearer token, or the page's session cookie."""

from __future__ import annotations

from quart import request
from werkzeug.exceptions import Forbidden

from creche import UserId
from creche_server.auth import Auth, NotAuthenticatedError

_SAFE: frozenset[str] = frozenset({"GET", "HEAD", "OPTIONS"})


def current_user(auth: Auth, *, cookie: bool = True) -> UserId:
    """The user whose request this is. Raises NotAuthenticatedError.

    A cookie travels by itself, so with it a request that changes something must come from a
    page of ours (its Origin is checked); a bearer token is nobody else's to send.
    """
    header = request.headers.get("Authorization")
    if header is not None:
        return auth.check_authorization(header)
    session = request.cookies.get(auth.session_cookie) if cookie else None
    if session is None:
        msg = "a bearer token is needed: `Authorization: Bearer TOKEN`"
        raise NotAuthenticatedError(msg)
    origin = request.headers.get("Origin")
    if request.method not in _SAFE and not auth.allows_origin(origin, request.host):
        msg = "pages from this origin may not do that"
        raise Forbidden(msg)
    return auth.check_session(session)
