"""WebSocket close codes: 4400 + an HTTP status for what is final, others invite a reconnect."""

from __future__ import annotations

from typing import Final

OUR_FAULT: Final = 1011
DRAINING: Final = 1012  # RFC 6455's registry: "Service Restart"
BAD_REQUEST: Final = 4400
UNAUTHORIZED: Final = 4401
FORBIDDEN: Final = 4403
TOO_SLOW: Final = 4408
TOO_MANY: Final = 4429

SUBPROTOCOL: Final = "ag-ui.v1"
