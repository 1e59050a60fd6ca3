"""WebSocket close codes: 4400 + an HTTP status for what is final, others invite a reconnect.

A client that reads too slowly is told nothing: its socket takes nothing, a close frame neither, and
may be in the middle of another frame. It sees the connection end, which is 1006 to a browser.
"""

from __future__ import annotations

from typing import Final

OUR_FAULT: Final = 1011
DRAINING: Final = 1012  # RFC 6455's registry: "Service Restart"
BAD_REQUEST: Final = 4400
UNAUTHORIZED: Final = 4401
FORBIDDEN: Final = 4403
TOO_MANY: Final = 4429

SUBPROTOCOL: Final = "ag-ui.v1"
