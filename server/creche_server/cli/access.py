"""`creche token` and `creche link`: ways in, for programs and for browsers."""

from __future__ import annotations

import json
import sys
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import trio

from creche import InvalidContextError
from creche_server.auth import Auth
from creche_server.data_directory import Address, DataDirectoryError, load_key, read_address

_LOGIN_SECONDS = 3600.0


def own_token(data: Path, user: str) -> str:
    """A token for this machine's own use: whoever can read the key may speak for anybody."""
    return Auth(load_key(data)).mint_token(user, seconds=_LOGIN_SECONDS)


def print_token(data: Path, user: str, days: float) -> int:
    """Print a token for programs. Returns the exit code."""
    try:
        token = Auth(load_key(data)).mint_token(user, seconds=days * 24 * 3600)
    except (InvalidContextError, DataDirectoryError, OSError) as error:
        sys.stderr.write(f"creche: {error}\n")
        return 1
    sys.stdout.write(f"{token}\n")
    return 0


async def print_link(data: Path) -> int:
    """Print a one-time link to the running server's page. Returns the exit code."""
    address = read_address(data)
    if address is None:
        sys.stderr.write(f"creche: no server is at work in {data}; start one: creche serve\n")
        return 1
    try:
        ticket = await trio.to_thread.run_sync(_fetch_ticket, data, address)
    except (URLError, OSError) as error:
        sys.stderr.write(f"creche: {address.url} does not answer: {error}\n")
        return 1
    sys.stdout.write(f"{address.url}/?ticket={ticket}\n")
    return 0


def _fetch_ticket(data: Path, address: Address) -> str:
    request = Request(  # noqa: S310  the address is our own server's
        f"{address.url}/auth/tickets",
        data=json.dumps({"purpose": "page"}).encode(),
        headers={"Authorization": f"Bearer {own_token(data, address.user)}"},
        method="POST",
    )
    with urlopen(request, timeout=5) as answer:  # noqa: S310
        if answer.status != HTTPStatus.CREATED:
            raise HTTPError(address.url, answer.status, "no ticket", answer.headers, None)
        ticket: str = json.load(answer)["ticket"]
        return ticket
