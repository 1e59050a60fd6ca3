"""How a run ended, in words and as an exit code. The page says it in the same words (thread.js)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

EXIT_FAILED: Final = 1
EXIT_STOPPED: Final = 130  # by the one who asked: what a shell says of ^C

# Why a run was stopped. For `user`, who knows why, there are no words.
REASONS: Final = MappingProxyType(
    {
        "deadline": "the run took longer than run_timeout",
        "budget": "the run spent more than it may",
        "disconnect": "nobody was watching",
        "superseded": "a later message took its place, or its thread was deleted",
        "shutdown": "the server was shut down",
        "unanswered": "nobody answered its question in time",
    }
)


def why(receipt: Mapping[str, Any]) -> str:
    """Why a cancelled run was stopped, with a colon before it; empty if its user did it."""
    reason = str(receipt.get("reason", "user"))
    if reason == "user":
        return ""
    words = REASONS.get(reason, reason)
    if reason == "deadline":
        # The end was asked for when the time was over; what came after it was the cleanup.
        seconds = (receipt.get("run_ms", 0) - receipt.get("elapsed_ms", 0)) / 1000
        words += f" ({round(seconds, 1):g} s)"
    return f": {words}"


def cleanup(receipt: Mapping[str, Any]) -> str:
    """What the cleanup of a cancelled run was like."""
    if receipt.get("overran"):
        alive = ", ".join(receipt.get("alive", ())) or "something"
        return f"its cleanup took longer than it may; still at work: {alive}"
    left = ", ".join(thread["name"] for thread in receipt.get("threads_abandoned", ()))
    if left:
        return f"{left} would not end and was left behind"
    tools = ", ".join(tool["name"] for tool in receipt.get("tools_stopped", ()))
    ended = f"everything of it had ended after {receipt.get('elapsed_ms', 0)} ms"
    return f"{ended}; tools stopped: {tools}" if tools else ended


def exit_code(receipt: Mapping[str, Any]) -> int:
    """Of a chat whose run was cancelled."""
    return EXIT_STOPPED if receipt.get("reason", "user") == "user" else EXIT_FAILED
