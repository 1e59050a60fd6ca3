"""An MCP server to be started as a process: over stdio, or over HTTP with a port that it prints.

    program.py FOLDER [deaf | sulky | http | noisy]

It writes its process id to FOLDER/pid, `deaf` ones ignore SIGTERM and the end of their input.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import mcp_types
import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

FOLDER = Path(sys.argv[1])
MODE = sys.argv[2] if len(sys.argv) > 2 else ""
SECRET = "sesame-canary"

server = MCPServer("test", log_level="CRITICAL")


def note(name: str, text: str = "") -> None:
    """Say something to the test, whole."""
    part = FOLDER / f"{name}.part"
    part.write_text(text)
    part.rename(FOLDER / name)


@server.tool()
def pid() -> int:
    """Tell who serves."""
    return os.getpid()


@server.tool()
def environment() -> dict[str, str]:
    """Tell all of the environment."""
    return dict(os.environ)


@server.tool()
async def stuck() -> str:
    """Never return."""
    note("stuck")
    try:
        await anyio.sleep_forever()
    finally:
        note("unstuck")
    return ""


@server.tool()
async def busy() -> str:
    """Never return, and let nobody else work."""
    child = subprocess.Popen(["sleep", "300"])  # noqa: ASYNC220  it is to block
    note("busy", str(child.pid))
    while True:
        time.sleep(60)  # noqa: ASYNC251  likewise


@server.tool()
async def die() -> str:
    """End the process in the middle of the call."""
    os._exit(3)


@server.tool()
def picture() -> list[Any]:
    """Draw."""
    return [
        mcp_types.TextContent(text="Here it is:"),
        mcp_types.ImageContent(data="aGVsbG8=", mime_type="image/png"),
    ]


@server.tool(name="dotted.name/with much to it")
def dotted() -> str:
    """Have a name that endpoints refuse."""
    return "dotted"


@server.tool()
def order(item: str, amount: int, tags: list[str] | None = None) -> dict[str, Any]:
    """Order some of an item."""
    if item == "unicorn":
        raise ToolError("There are no unicorns.")
    return {"item": item, "amount": amount, "tags": tags}


class Guarded:
    """An application that only those may use who know the word."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"").decode()
        if scope["type"] == "http" and given != f"Bearer {SECRET}":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": given.encode()})
            return
        await self.app(scope, receive, send)


def main() -> None:
    note("pid", str(os.getpid()))
    if MODE == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "sulky":
        sys.stderr.write(f"the password is {SECRET}\n")
        sys.exit(1)
    if MODE == "noisy":
        sys.stdout.write("this is no message\n")
        sys.stdout.flush()
    if MODE == "http":
        listener = socket.create_server(("127.0.0.1", 0))
        note("port", str(listener.getsockname()[1]))
        app = Guarded(server.streamable_http_app())
        config = uvicorn.Config(app, log_level="error", lifespan="on")
        uvicorn.Server(config).run(sockets=[listener])
        return
    server.run()
    if MODE == "deaf":
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main()
