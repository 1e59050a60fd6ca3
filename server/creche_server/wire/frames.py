"""WebSocket frames as a server sends them (RFC 6455 §5.2): a header, then the bytes unmasked."""

from __future__ import annotations

from typing import Final

_FIN_TEXT: Final = 0x81
_SHORT: Final = 126  # from here on the length takes two bytes more
_LONG: Final = 0x10000  # and from here on eight

# The headers of short frames, which nearly all are, made once.
_SHORT_HEADERS: Final = tuple(bytes((_FIN_TEXT, length)) for length in range(_SHORT))


def text_frame(payload: bytes) -> bytes:
    """One whole text message. `payload` is UTF-8."""
    length = len(payload)
    if length < _SHORT:
        return _SHORT_HEADERS[length] + payload
    if length < _LONG:
        return b"\x81\x7e" + length.to_bytes(2, "big") + payload
    return b"\x81\x7f" + length.to_bytes(8, "big") + payload
