"""The tool sources of the MCP servers that the settings name."""

from __future__ import annotations

from collections.abc import Mapping

from creche import ToolSource
from creche_server.mcp.servers import McpServerError, McpSettings, resolved_servers


def mcp_sources(settings: McpSettings, environment: Mapping[str, str]) -> dict[str, ToolSource]:
    """A source for each server, by name; nothing is opened yet.

    Raises McpServerError if a secret is missing, or the library that speaks MCP.
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
    return {name: McpSource(name, server) for name, server in servers.items()}
