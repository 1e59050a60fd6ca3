"""Who makes this request: a bearer token, or the page's session cookie."""

from __future__ import annotations

from quart import request
from werkzeug.exceptions import Forbidden

from creche import UserId
from creche_server.auth import Auth, NothingShownError

_SAFE: frozenset[str] = frozenset({"GET", "HEAD", "OPTIONS"})


class ForeignOriginError(Forbidden):
    """A page that is not ours tried to act with somebody's session."""


def operation() -> str:
    """What is asked for, in words that no asker can choose."""
    return f"{request.method} {request.url_rule}"


def current_user(auth: Auth, *, cookie: bool = True) -> UserId:
    """The user whose request this is. Raises NotAuthenticatedError, ForeignOriginError.

    A cookie travels by itself, so with it a request that changes something must come from a
    page of ours (its Origin is checked); a bearer token is nobody else's to send.
    """
    # Quart hands a request over in no other way; from here on the user is passed.
    header = request.headers.get("Authorization")  # creche: shared Quart binds it to this task
    if header is not None:
        return auth.check_authorization(header)
    cookies = request.cookies  # creche: shared Quart binds it to this task
    session = cookies.get(auth.session_cookie) if cookie else None
    if session is None:
        msg = "a bearer token is needed: `Authorization: Bearer TOKEN`"
        raise NothingShownError(msg)
    origin = request.headers.get("Origin")  # creche: shared Quart binds it to this task
    if request.method not in _SAFE and not auth.allows_origin(origin, request.host):
        msg = "pages from this origin may not do that"
        raise ForeignOriginError(msg)
    return auth.check_session(session)
