"""The page at `/`: static files, and the way from a printed link to a session."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from importlib import resources
from types import MappingProxyType
from typing import Any, Final

from quart import Blueprint, Response, redirect, request
from werkzeug.exceptions import NotFound

from creche_server.auth import (
    SESSION_SECONDS,
    NotAuthenticatedError,
    NothingShownError,
)
from creche_server.http.afterwards import correlation_id
from creche_server.http.identity import current_user, operation
from creche_server.services import Services

_TYPES: Final = MappingProxyType(
    {
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    },
)


def page_routes(services: Services) -> Blueprint:
    """`/`, and the files that it is made of under `/ui/`."""
    page = _Page(services)
    routes = Blueprint("page", __name__)
    routes.get("/")(page.index)
    routes.get("/ui/<name>")(page.file)
    return routes


class _Page:
    def __init__(self, services: Services) -> None:
        self._auth = services.auth
        self._audit = services.audit
        self._files = _files()

    async def index(self) -> Any:
        ticket = request.args.get("ticket")
        if ticket is None:
            return await self._page()
        try:
            user_id = self._auth.use_ticket(ticket, "page")
        except NotAuthenticatedError:
            await self._note_refused("ticket")
            # A used link opened once more is as good as the session that it once gave.
            if await self._has_session():
                return redirect("/", HTTPStatus.SEE_OTHER)
            return await self._page()
        answer = redirect("/", HTTPStatus.SEE_OTHER)  # the ticket leaves the address bar
        answer.set_cookie(
            self._auth.session_cookie,
            self._auth.mint_session(user_id),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            secure=request.scheme == "https",
        )
        return answer

    async def file(self, name: str) -> Any:
        if name not in self._files:
            msg = "there is no such file"
            raise NotFound(msg)
        return self._served(name, HTTPStatus.OK)

    async def _page(self) -> Response:
        if await self._has_session():
            return self._served("index.html", HTTPStatus.OK)
        return self._served("locked.html", HTTPStatus.UNAUTHORIZED)

    async def _has_session(self) -> bool:
        try:
            current_user(self._auth)
        except NothingShownError:
            return False
        except NotAuthenticatedError:
            await self._note_refused("session")
            return False
        return True

    async def _note_refused(self, resource: str) -> None:
        await self._audit.record(
            "token_refused",
            resource=resource,
            operation=operation(),
            correlation_id=correlation_id(),
        )

    def _served(self, name: str, status: HTTPStatus) -> Response:
        data, tag = self._files[name]
        if status is HTTPStatus.OK and request.if_none_match.contains(tag):
            return Response(status=HTTPStatus.NOT_MODIFIED, headers={"ETag": f'"{tag}"'})
        response = Response(data, status=status, content_type=_TYPES[name[name.rindex(".") :]])
        response.headers["Cache-Control"] = "no-cache"
        response.set_etag(tag)
        return response


def _files() -> dict[str, tuple[bytes, str]]:
    """{name: (contents, entity tag)}: few and small, so they are read once."""
    folder = resources.files("creche_server") / "ui"
    found: dict[str, tuple[bytes, str]] = {}
    for file in folder.iterdir():
        if file.name.endswith(tuple(_TYPES)):
            data = file.read_bytes()
            found[file.name] = (data, hashlib.sha256(data).hexdigest()[:16])
    return found
