"""Thread ids as they may stand in an address, for the WebSocket and for HTTP alike.

The core takes any id; an address does not. A slash in an id would have to travel as `%2F`,
which many proxies decode or refuse and which SDKs forget to write, and `.` and `..` are taken
out of addresses by every browser. So such ids are refused where they come in, in words, rather
than made on one way and not found on another.
"""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from creche import InvalidContextError, ThreadId, check_id


def check_thread_id(value: str) -> ThreadId:
    """The id, if it can be one and can stand in an address. Raises InvalidContextError."""
    checked = ThreadId(check_id("thread_id", value))
    if "/" in checked:
        msg = "thread_id must not contain a slash: it is a part of addresses"
        raise InvalidContextError(msg)
    if checked in {".", ".."}:
        msg = "thread_id must not be `.` or `..`: they have a meaning in addresses"
        raise InvalidContextError(msg)
    return checked


def why_not(raw_path: bytes) -> str | None:
    """Why a path, percent-encoded as it came, is none that we can have; None if it is."""
    if b"%2f" in raw_path.lower():
        return "an encoded slash (%2F) is in no address here: ids have none"
    try:
        unquote_to_bytes(raw_path).decode()
    except UnicodeDecodeError:
        return "the path must be UTF-8, percent-encoded"
    return None
