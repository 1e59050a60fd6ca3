"""The running server's HTTP side, as the commands ask it."""

from __future__ import annotations

import http.client
import json
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import ProxyHandler, Request, build_opener

import trio

from creche import CrecheError
from creche_server.auth import Auth
from creche_server.data_directory import Address, DataDirectoryError, read_address, read_key

_LOGIN_SECONDS: Final = 3600.0
_TIMEOUT: Final = 10.0  # seconds for an answer


class ClientError(CrecheError):
    """The server cannot be reached, refused, or went away; the message says which."""


class Api:
    """A server's HTTP side for one user."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.token = token
        # It is on this machine, whatever the environment says of proxies.
        self._opener = build_opener(ProxyHandler({}))

    async def get(self, *path: str, **query: object) -> Any:
        """What is at `/path/…`, or None where nothing is. Raises ClientError."""
        where = "/".join(quote(part, safe="") for part in path)
        request = Request(f"{self.url}/{where}?{urlencode(query)}")  # noqa: S310  our own server's
        # It changes nothing, so who does not wait for the answer may leave it.
        return await trio.to_thread.run_sync(self._answer, request, abandon_on_cancel=True)

    async def post(self, path: str, body: object) -> Any:
        """The answer to what is posted. Raises ClientError."""
        data = json.dumps(body).encode()
        request = Request(f"{self.url}/{path}", data=data, method="POST")  # noqa: S310  likewise
        return await trio.to_thread.run_sync(self._answer, request)

    def _answer(self, request: Request) -> Any:
        request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with self._opener.open(request, timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except HTTPError as error:
            if error.code == HTTPStatus.NOT_FOUND and _is_ours(error):
                return None
            msg = f"the server at {self.url} refused: {error.code} {error.reason}"
            raise ClientError(msg) from error
        except (OSError, http.client.HTTPException) as error:
            raise ClientError(no_answer(self.url)) from error
        except ValueError as error:
            msg = f"what answers at {self.url} is no creche server"
            raise ClientError(msg) from error


def _is_ours(error: HTTPError) -> bool:
    """Whether this is the server's own word, and not that of another on its port."""
    return error.headers.get_content_type() == "application/json"


def no_answer(url: str) -> str:
    """The words for a server that is not there any more, or hangs."""
    return f"the server at {url} does not answer"


def running_server(data: Path) -> Address:
    """Where the server of a data directory is. Raises DataDirectoryError where none is at work."""
    address = read_address(data)
    if address is None:
        msg = (
            f"no server is at work in {data.absolute()}; start one (creche serve), "
            "or say where one is (--data)"
        )
        raise DataDirectoryError(msg)
    return address


def open_api(data: Path, user: str | None) -> Api:
    """The running server's, for a user, or for whom its own link is.

    Whoever can read the key may speak for anybody. Raises DataDirectoryError, and
    InvalidContextError for what can be no user.
    """
    address = running_server(data)
    auth = Auth(read_key(data))
    return Api(address.url, auth.mint_token(user or address.user, seconds=_LOGIN_SECONDS))
