"""The tool sources of the MCP servers that the settings name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from creche import ToolSource
from creche_server.mcp.servers import McpServerError, McpSettings, found_program, resolved_servers

_log: Final = logging.getLogger("creche.mcp")


def mcp_sources(settings: McpSettings, environment: Mapping[str, str]) -> dict[str, ToolSource]:
    """A source for each server, by name; nothing is opened yet.

    Warns of a program that is not there, which may yet be installed while we serve. Raises
    McpServerError if a secret is missing, or the library that speaks MCP.
    """
    servers = resolved_servers(settings, environment)
    if not servers:
        return {}
    try:
        # Imported by those who use it, and at start-up: it takes most of a second.
        from creche_server.mcp.session import McpSource  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in {"mcp", "mcp_types"}:
            raise
        msg = "the settings name MCP servers, and these need: pip install 'creche[mcp]'"
        raise McpServerError(msg) from None
    for name, server in servers.items():
        if server.command and not found_program(server.command[0], server.cwd, server.environment):
            _log.warning(
                "MCP server %s: there is no program %r, on the PATH or in %s; runs that ask for "
                "this server will fail",
                name,
                server.command[0],
                Path(sys.executable).parent,
            )
    return {name: McpSource(name, server) for name, server in servers.items()}
