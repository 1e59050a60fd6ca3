"""A session with an MCP server, which lives in one run: opened, asked for tools, called, closed."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any, Final

import httpx2
import mcp_types
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from creche import RunError, Tool, ToolDefinitionError, ToolSourceContext, leaves
from creche_server.mcp.servers import ResolvedServer
from creche_server.mcp.stdio import open_stdio
from creche_server.mcp.tools import result_of, tool_of

_log: Final = logging.getLogger("creche.mcp")

_TIMEOUT: Final = httpx2.Timeout(30.0, read=None)  # seconds; a call has its tool's own deadline
_MOST_TOOLS: Final = 128  # of one server; endpoints take no more
_MOST_PAGES: Final = 100
_CLIENT: Final = mcp_types.Implementation(
    name="creche", version=importlib.metadata.version("creche")
)


class McpSource:
    """An MCP server as a tool source. Each run that asks for it has a session of its own."""

    def __init__(self, name: str, server: ResolvedServer) -> None:
        self._name = name
        self._server = server

    @contextlib.asynccontextmanager
    async def open_tools(self, opening: ToolSourceContext) -> AsyncIterator[Sequence[Tool]]:
        """See `ToolSource`. A server that is a process is started, and ends with the block."""
        refusals: list[int] = []  # the latest HTTP status that was an error
        async with contextlib.AsyncExitStack() as stack:
            try:
                transport = self._transport(opening, refusals)
                client = await stack.enter_async_context(
                    # Nobody can be asked anything in the middle of a call, and nothing is kept.
                    Client(transport, client_info=_CLIENT, cache=None)
                )
                tools = await self._tools(client)
            # Boundary: one session. What the library or the server says may hold secrets.
            except Exception as error:  # noqa: BLE001
                raise RunError(_why(error, self._server, refusals)) from None
            yield tools

    def _transport(
        self, opening: ToolSourceContext, refusals: list[int]
    ) -> contextlib.AbstractAsyncContextManager[Any]:
        if self._server.url is None:
            return open_stdio(self._server, killed=opening.killed, outlived=opening.outlived)
        return self._open_http(self._server.url, refusals)

    @contextlib.asynccontextmanager
    async def _open_http(self, url: str, refusals: list[int]) -> AsyncIterator[Any]:
        async def note(response: httpx2.Response) -> None:
            if response.status_code >= HTTPStatus.BAD_REQUEST:
                refusals[:] = [response.status_code]

        async with httpx2.AsyncClient(
            headers=dict(self._server.headers),
            timeout=_TIMEOUT,
            event_hooks={"response": [note]},
        ) as http:
            async with streamable_http_client(url, http_client=http) as streams:
                yield streams

    async def _tools(self, client: Client) -> list[Tool]:
        found: list[Tool] = []
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            page = await client.list_tools(cursor=cursor)
            for described in page.tools:
                call = functools.partial(self._call, client, described.name)
                try:
                    found.append(tool_of(self._name, described, call))
                except ToolDefinitionError as error:
                    _log.warning("MCP server %s: %s", self._name, error)
            cursor = page.next_cursor
            if cursor is None:
                break
        if len(found) > _MOST_TOOLS:
            _log.warning(
                "MCP server %s has %d tools; the first %d are offered",
                self._name,
                len(found),
                _MOST_TOOLS,
            )
        return found[:_MOST_TOOLS]

    async def _call(self, client: Client, name: str, arguments: dict[str, Any]) -> Any:
        """Call one of its tools. Raises RunError in the words of the server, or in ours."""
        try:
            result = await client.call_tool(name, arguments)
            words = result_of(result)
        except MCPError as error:
            if error.code == mcp_types.CONNECTION_CLOSED:
                msg, code = f"The MCP server {self._name!r} has ended.", "mcp_server_ended"
            else:
                msg = f"The MCP server {self._name!r} refused the call: {error.message}"
                code = "mcp_call_refused"
            raise RunError(msg, code=code) from None
        # Boundary: one call, and whatever the library makes of what the server answered.
        except Exception as error:  # noqa: BLE001
            _log.warning("MCP server %s: %s in a call", self._name, type(error).__name__)
            msg = f"The MCP server {self._name!r} gave an answer that cannot be used."
            raise RunError(msg, code="mcp_answer_unusable") from None
        if result.is_error:
            raise RunError(words or "The tool failed and said no more.", code="mcp_tool_error")
        return words


def _why(error: BaseException, server: ResolvedServer, refusals: Sequence[int]) -> str:
    """Why a session could not be opened, without anything that a server or a system said."""
    if refusals:
        return f"the MCP server answered with HTTP status {refusals[0]}."
    match next(leaves(error)):
        case RunError(message=message):
            words = message
        case OSError(strerror=reason) if server.command:
            words = f"{server.command[0]!r} cannot be run: {reason or 'no reason is known'}."
        case httpx2.TransportError() | OSError():
            words = "the MCP server cannot be reached."
        case MCPError(code=mcp_types.CONNECTION_CLOSED):
            words = "the MCP server ended before it answered."
        case MCPError(code=code):
            words = f"the MCP server refused the session (error {code})."
        case _:
            words = "the MCP server does not speak MCP as we do."
    return words
