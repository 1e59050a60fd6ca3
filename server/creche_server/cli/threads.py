"""`creche threads`: what there is to go on with."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import trio

from creche import CrecheError
from creche_server.cli.api import open_api
from creche_server.cli.screen import printable
from creche_server.data_directory import DataDirectoryError

Format = Literal["text", "json"]


def print_threads(data: Path, *, user: str | None, limit: int, form: Format) -> int:
    """Print a user's threads, the latest changed first. Returns the exit code."""
    try:
        api = open_api(data, user)
        threads: list[dict[str, Any]] = trio.run(partial(api.get, "threads", limit=limit)) or []
    except (CrecheError, DataDirectoryError) as error:
        sys.stderr.write(f"creche: {error}\n")
        return 1
    if form == "json":
        json.dump(threads, sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines(threads))
        if not threads:
            sys.stderr.write("creche: there is no thread yet\n")
    return 0


def lines(threads: list[dict[str, Any]]) -> list[str]:
    """A line for each: its id, when it last changed here, how many runs it has, its title."""
    width = max((len(printable(thread["thread_id"])) for thread in threads), default=0)
    found: list[str] = []
    for thread in threads:
        when = datetime.fromisoformat(thread["updated_at"]).astimezone().strftime("%Y-%m-%d %H:%M")
        runs = "1 run" if thread["runs"] == 1 else f"{thread['runs']} runs"
        name = printable(thread["thread_id"]).ljust(width)
        title = " ".join(printable(thread["title"]).split())
        found.append(f"{name}  {when}  {runs:>8}  {title}".rstrip())
    return found
