"""Who is asking: bearer tokens, one-time tickets, session cookies, origins.

Tokens and cookies are signed and carry their own expiry, so nothing is kept of them. Tickets
are the one thing that is: single use means remembering, for their few seconds of life.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from collections import deque
from collections.abc import Collection
from typing import Final, Literal
from urllib.parse import urlsplit

from itsdangerous import BadData, URLSafeSerializer

from creche import InvalidContextError, UserId, check_id

TOKEN_PREFIX: Final = "creche_"  # noqa: S105  no secret: it tells what a token is for
SESSION_SECONDS: Final = 7 * 24 * 3600
PAGE_TICKET_SECONDS: Final = 600
SOCKET_TICKET_SECONDS: Final = 30
_MOST_TICKETS: Final = 10_000
_TICKETS_PER_USER: Final = 64

Purpose = Literal["page", "websocket"]


def _fingerprint(key: bytes) -> str:
    """Enough to tell servers apart by, and nothing to guess a key by."""
    return hashlib.sha256(b"creche.session-cookie" + key).hexdigest()[:12]


class NotAuthenticatedError(Exception):
    """Nobody we know; the message says what is missing, never what was sent."""


class NothingShownError(NotAuthenticatedError):
    """Not even a token that could be refused."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Ticket:
    user_id: UserId
    purpose: Purpose
    expires: float  # seconds since the epoch


class Auth:
    """Signs and checks who somebody is. Shared by all connections of a process."""

    def __init__(self, key: bytes, *, origins: Collection[str] = ()) -> None:
        # Cookies know no ports: two servers on one host must not log each other's users out.
        self.session_cookie = f"creche_session_{_fingerprint(key)}"
        self._bearer = URLSafeSerializer(key, salt="creche.bearer")
        self._session = URLSafeSerializer(key, salt="creche.session")
        self._origins = frozenset(origins)
        self._tickets: dict[str, _Ticket] = {}  # in the order of making
        self._names: dict[UserId, deque[str]] = {}  # {user: their tickets' names, oldest first}

    # --- bearer tokens

    def mint_token(self, user_id: str, *, seconds: float) -> str:
        """A token that speaks for that user. Raises InvalidContextError for a bad user id."""
        return TOKEN_PREFIX + self._signed(self._bearer, check_id("user_id", user_id), seconds)

    def check_token(self, token: str) -> UserId:
        """The user that a token speaks for. Raises NotAuthenticatedError."""
        if not token.startswith(TOKEN_PREFIX):
            msg = "the bearer token is not one of this server's"
            raise NotAuthenticatedError(msg)
        return self._checked(self._bearer, token.removeprefix(TOKEN_PREFIX), "bearer token")

    def check_authorization(self, header: str) -> UserId:
        """The same, from an Authorization header (RFC 6750 §2.1)."""
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            msg = "the Authorization header must be `Bearer TOKEN`"
            raise NotAuthenticatedError(msg)
        return self.check_token(token.strip())

    # --- session cookies

    def mint_session(self, user_id: UserId) -> str:
        return self._signed(self._session, user_id, SESSION_SECONDS)

    def check_session(self, cookie: str) -> UserId:
        """Raises NotAuthenticatedError."""
        return self._checked(self._session, cookie, "session")

    # --- tickets

    def mint_ticket(self, user_id: UserId, purpose: Purpose) -> tuple[str, int]:
        """A single-use ticket, and the seconds that it is good for."""
        seconds = PAGE_TICKET_SECONDS if purpose == "page" else SOCKET_TICKET_SECONDS
        names = self._names.setdefault(user_id, deque())
        if len(names) >= _TICKETS_PER_USER:  # a user's flood evicts that user's
            self._forget(names[0])
        if len(self._tickets) >= _MOST_TICKETS:
            self._forget(next(iter(self._tickets)))
        name = secrets.token_urlsafe(24)
        self._tickets[name] = _Ticket(user_id, purpose, time.time() + seconds)
        self._names.setdefault(user_id, deque()).append(name)
        return name, seconds

    def use_ticket(self, name: str, purpose: Purpose) -> UserId:
        """Take a ticket out of the world. Raises NotAuthenticatedError."""
        ticket = self._forget(name)
        if ticket is None or ticket.purpose != purpose or ticket.expires <= time.time():
            msg = "the ticket is unknown, used or expired"
            raise NotAuthenticatedError(msg)
        return ticket.user_id

    def _forget(self, name: str) -> _Ticket | None:
        ticket = self._tickets.pop(name, None)
        if ticket is not None:
            names = self._names[ticket.user_id]
            names.remove(name)
            if not names:
                del self._names[ticket.user_id]
        return ticket

    # --- origins

    def allows_origin(self, origin: str | None, host: str | None) -> bool:
        """Whether a page from `origin` may act here: our own pages, and those we were told of.

        Programs that are not browsers send no Origin and are not what this guards against.
        """
        if origin is None:
            return True
        if origin in self._origins:
            return True
        try:
            ours = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return bool(ours) and host is not None and ours == host.lower()

    @staticmethod
    def _signed(serializer: URLSafeSerializer, user_id: str, seconds: float) -> str:
        return str(serializer.dumps([user_id, int(time.time() + seconds)]))

    @staticmethod
    def _checked(serializer: URLSafeSerializer, signed: str, what: str) -> UserId:
        try:
            user_id, expires = serializer.loads(signed)
            user_id = check_id("user_id", user_id)
        except (BadData, InvalidContextError, TypeError, ValueError):
            msg = f"the {what} is not one of this server's"
            raise NotAuthenticatedError(msg) from None
        if expires <= time.time():
            msg = f"the {what} has expired"
            raise NotAuthenticatedError(msg)
        return UserId(user_id)
