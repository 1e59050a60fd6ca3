"""`creche top`: what runs do right now, looked at again and again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import trio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from creche import CrecheError
from creche_server.cli.api import Api, ClientError, open_api
from creche_server.cli.screen import printable
from creche_server.data_directory import DataDirectoryError

_MOST: Final = 1000  # runs that one look tells of
_SHORT: Final = 8  # characters of an id that are enough to tell runs apart by
_WIDE: Final = 10_000  # columns of an output that is no terminal: nothing is cut there
_MINUTE: Final = 60  # seconds
_HOUR: Final = 3600
_STYLES: Final = MappingProxyType({"queued": "yellow", "parked": "magenta", "running": "green"})


def show_top(data: Path, *, user: str | None, once: bool, as_json: bool, every: float) -> int:
    """Show the runs until ^C, or once. Returns the exit code."""
    console = Console(highlight=False)
    try:
        api = open_api(data, user)
        if as_json:
            seen = trio.run(_look, api)
            sys.stdout.write(f"{json.dumps(seen, indent=2, ensure_ascii=False)}\n")
        elif not console.is_terminal:
            sys.stdout.write(_in_lines(picture(trio.run(_look, api), whole=True)))
        elif once:
            console.print(picture(trio.run(_look, api)))
        else:
            trio.run(_watch, api, console, every)
    except (CrecheError, DataDirectoryError) as error:
        sys.stderr.write(f"creche: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 0  # that is how one leaves
    return 0


def _in_lines(shown: Group) -> str:
    """For programs and files: nothing is cut, and no line ends in blanks."""
    console = Console(width=_WIDE, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


async def _look(api: Api) -> dict[str, Any]:
    seen = await api.get("runs", limit=_MOST)
    if seen is None:
        msg = f"the server at {api.url} is an older one, and tells of no runs"
        raise ClientError(msg)
    found: dict[str, Any] = seen
    return found


async def _watch(api: Api, console: Console, every: float) -> None:
    first = await _look(api)  # what goes wrong here is told without a screen that flashes
    with Live(picture(first), console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.refresh()
            await trio.sleep(every)
            live.update(picture(await _look(api)))


def picture(seen: Mapping[str, Any], *, whole: bool = False) -> Group:
    """A line for each run: what it is, how it stands, what it does. `whole` shortens nothing."""
    runs: Sequence[Mapping[str, Any]] = seen["runs"]
    table = Table(box=None, pad_edge=False, header_style="bold", expand=not whole)
    if seen["everybodys"]:
        table.add_column("USER", no_wrap=True, max_width=None if whole else 16)
    table.add_column("THREAD", no_wrap=True, max_width=None if whole else 16)
    table.add_column("RUN", no_wrap=True, min_width=_SHORT)
    table.add_column("AGENT", no_wrap=True, max_width=None if whole else 16)
    table.add_column("STATUS", no_wrap=True, min_width=7)
    table.add_column("AGE", no_wrap=True, justify="right", min_width=6)
    table.add_column("TASKS", no_wrap=True, justify="right", min_width=5)
    table.add_column("DOING", no_wrap=True, ratio=None if whole else 1)
    for run in runs:
        table.add_row(*_cells(run, everybodys=seen["everybodys"], whole=whole))
    return Group(_title(seen), *([table] if runs else []))


def _title(seen: Mapping[str, Any]) -> Text:
    total, shown = seen["total"], len(seen["runs"])
    what = "no run is" if not total else "1 run is" if total == 1 else f"{total} runs are"
    words = f"{what} live" + (f", the oldest {shown} of them are shown" if shown < total else "")
    whose = "everybody's" if seen["everybodys"] else "your own"
    return Text.assemble((words, "bold"), (f" ({whose})", "dim"))


def _cells(run: Mapping[str, Any], *, everybodys: bool, whole: bool) -> list[Text]:
    now = datetime.fromisoformat(run["at"])
    run_id = printable(run["run_id"])
    status = printable(run["status"])
    if "reason" in run:
        status = f"ending ({printable(run['reason'])})"
    return [
        *([Text(printable(run["user_id"]))] if everybodys else []),
        Text(printable(run["thread_id"])),
        Text(run_id if whole else run_id[:_SHORT], "dim"),
        Text(printable(run["agent"])),
        Text(status, _STYLES.get(run["status"], "")),
        Text(age((now - datetime.fromisoformat(run["created_at"])).total_seconds())),
        Text(str(run["task_count"])),
        Text(", ".join(words for node in run["doing"] for words in _doing(node, now)) or "-"),
    ]


def _doing(node: Mapping[str, Any], now: datetime) -> Iterator[str]:
    """What nothing else is inside of: `model scripted 3s`, or `tool search 3s in researcher`."""
    name = printable(node["name"])
    for inner in node.get("doing", ()):
        yield from (f"{words} in {name}" for words in _doing(inner, now))
    if not node.get("doing"):
        since = age((now - datetime.fromisoformat(node["since"])).total_seconds())
        yield f"{printable(node['kind'])} {name} {since}"


def age(seconds: float) -> str:
    """A duration in few characters: `7s`, `3m05s`, `2h07m`."""
    whole = max(0, int(seconds))
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m{whole % _MINUTE:02}s"
    return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02}m"
