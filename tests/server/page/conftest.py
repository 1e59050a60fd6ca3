"""A server in a process of its own, and a browser that looks at its page."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    ViewportSize,
    expect,
    sync_playwright,
)

from creche import UserId
from creche_server.auth import Auth
from creche_server.data_directory import load_key

PATIENCE: Final = 20_000  # milliseconds until something that should be on the page is missed
_START_TIMEOUT: Final = 30.0  # seconds
_STOP_TIMEOUT: Final = 20.0

_CHROMIUM_ARGUMENTS: Final = (
    "--headless=new",
    "--no-sandbox",  # Chromium has none for root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# `parrot` says what it is told, so that a test can have an answer of its own words.
_AGENTS: Final = '''\
import msgspec
from typing import Literal

from creche import RunContext, text_of, tool
from creche_server.assistant import Assistant


class Parrot:
    """Repeats what it hears."""

    async def run(self, run: RunContext) -> None:
        for word in text_of(run.messages[-1]).split(" "):
            await run.emit.text(word + " ")


class Foreman:
    """Has the parrot say it."""

    async def run(self, run: RunContext) -> None:
        result = await run.spawn("parrot", run.messages[-1].content)
        await run.emit.text(f"It said {len(result.text)} letters.")


class Trip(msgspec.Struct, forbid_unknown_fields=True):
    to: Literal["Paris", "Rome"]
    days: int = 3


@tool(approval=True)
async def pay(amount: int) -> str:
    """Pay."""
    return f"paid {amount}"


class Clerk:
    """Asks back."""

    tools = (pay,)

    async def run(self, run: RunContext) -> None:
        await run.emit.text("First things first.")
        name = await run.ask(None, "What is your name?")
        trip = await run.ask(Trip, "Where to?")
        paid = await run.call_tool("pay", {"amount": 5})
        await run.emit.text(f"{name}: {trip.days} days in {trip.to}, {paid.content}")


agents = {"assistant": Assistant, "parrot": Parrot, "foreman": Foreman, "clerk": Clerk}
'''


class PageServer:
    """`creche serve` as a process, which can be ended and started again where it was."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.url = ""
        self.link = ""
        self._folder = folder
        self._port = 0
        self._process: subprocess.Popen[str] | None = None
        (folder / "menagerie.py").write_text(_AGENTS)

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start it, from the second time on at the port that it had."""
        command = [sys.executable, "-m", "creche_server", "serve", "menagerie:agents"]
        command += ["--port", str(self._port), "--data", str(self.data)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CRECHE_")}
        environment |= {
            "PYTHONPATH": os.pathsep.join(sys.path),  # it imports what we do, from wherever it is
            "CRECHE_MODEL": "scripted",
            "CRECHE_MAX_CONNECTIONS_PER_USER": "50",
            "CRECHE_SHUTDOWN_TIMEOUT": "7",  # leaves no grace: what runs is cancelled at once
        }
        with (self._folder / "server.log").open("a") as log:
            process = self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        giving_up = threading.Timer(_START_TIMEOUT, process.kill)
        giving_up.start()
        try:
            self.url = self._read_line("listening on ")
            self.link = self._read_line("open ")
        finally:
            giving_up.cancel()
            giving_up.join()
        self._port = int(self.url.rpartition(":")[2])

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process, and wait until it has gone."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with process:
            process.send_signal(how)
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise

    def log_in(self, context: BrowserContext) -> None:
        """Give a browser the session that the printed link would."""
        auth = Auth(load_key(self.data))
        session = auth.mint_session(UserId("local"))
        context.add_cookies([{"name": auth.session_cookie, "value": session, "url": self.url}])

    def _read_line(self, before: str) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert before in line, f"{line!r}\n{(self._folder / 'server.log').read_text()}"
        return line.partition(before)[2].strip()


@contextlib.contextmanager
def open_page_server(folder: Path) -> Iterator[PageServer]:
    """A running server; whatever process it then has ends with the block."""
    server = PageServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """One server for a module's tests, each of which has threads of its own."""
    with open_page_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def server(one_server: PageServer) -> PageServer:
    """A running server, which a test may end."""
    if not one_server.running:
        one_server.start()
    return one_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium with a fresh profile. In CI its absence is a failure."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        reason = "there is no Chromium on this machine"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=_CHROMIUM_ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What the page's scripts complain of: must be empty at the end of a test."""
    found: list[str] = []
    yield found
    assert not found, "\n".join(found)


@pytest.fixture
def context(browser: Browser, complaints: list[str]) -> Iterator[BrowserContext]:
    """A browser's profile without any history, watched for complaints."""
    size: ViewportSize = {"width": 1000, "height": 700}
    with browser.new_context(viewport=size, reduced_motion="reduce") as profile:
        profile.set_default_timeout(PATIENCE)
        profile.on("console", lambda message: complaints.extend(_complaint(message)))
        profile.on("weberror", lambda error: complaints.append(str(error.error)))
        yield profile


@pytest.fixture
def page(server: PageServer, context: BrowserContext) -> Page:
    """The page, opened with a session, on a new thread."""
    server.log_in(context)
    page = context.new_page()
    page.goto(server.url)
    return page


def _complaint(message: ConsoleMessage) -> list[str]:
    # A server that is away, or says 401, is not the scripts' fault.
    network = ("Failed to load resource", "WebSocket connection to")
    if message.type not in {"error", "warning"} or message.text.startswith(network):
        return []
    return [message.text]
