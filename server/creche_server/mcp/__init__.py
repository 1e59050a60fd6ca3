"""MCP servers as tool sources, opened inside the run."""

from creche_server.mcp.servers import (
    McpServer,
    McpServerError,
    McpSettings,
    ResolvedServer,
    resolved_servers,
)
from creche_server.mcp.sources import mcp_sources

__all__ = [
    "McpServer",
    "McpServerError",
    "McpSettings",
    "ResolvedServer",
    "mcp_sources",
    "resolved_servers",
]
