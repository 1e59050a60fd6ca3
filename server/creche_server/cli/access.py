"""`creche token` and `creche link`: ways in, for programs and for browsers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from creche import CrecheError, InvalidContextError
from creche._context import check_id
from creche_server.auth import Auth
from creche_server.cli.api import open_api
from creche_server.data_directory import DataDirectoryError, read_key

_MOST_DAYS: Final = 3650.0


def print_token(data: Path, user: str, days: float) -> int:
    """Print a token for programs. Returns the exit code."""
    try:
        check_id("user_id", user)
        if not 0 < days <= _MOST_DAYS:  # which holds of no NaN, either
            sys.stderr.write(
                f"creche: --days must be more than 0 and at most {_MOST_DAYS:g}, not {days:g}\n"
            )
            return 1
        token = Auth(read_key(data)).mint_token(user, seconds=days * 24 * 3600)
    except (InvalidContextError, DataDirectoryError) as error:
        sys.stderr.write(f"creche: {error}\n")
        return 1
    sys.stdout.write(f"{token}\n")
    return 0


async def print_link(data: Path) -> int:
    """Print a one-time link to the running server's page. Returns the exit code."""
    try:
        api = open_api(data, None)
        answer = await api.post("auth/tickets", {"purpose": "page"})
    except (CrecheError, DataDirectoryError) as error:
        sys.stderr.write(f"creche: {error}\n")
        return 1
    sys.stdout.write(f"{api.url}/?ticket={answer['ticket']}\n")
    return 0
