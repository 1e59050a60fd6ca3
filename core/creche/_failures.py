"""What may be told of a failure or a result: words and codes, and nothing of the inside."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from creche._barrier import leaves
from creche._context import UserExecutionContext
from creche._errors import RunError
from creche._redaction import printable, redact_text, redact_value


def public(failure: BaseException, context: UserExecutionContext) -> tuple[str, str]:
    """A failure as a client may see it: a code, and a sentence without anything of the inside."""
    words = told(failure)
    if words is not None:
        return words
    return "agent_failed", f"The agent failed. Reference: {context.correlation_id}"


def told(failure: BaseException) -> tuple[str, str] | None:
    """The code and the words of the first RunError in it, whatever its maker put into it."""
    for leaf in leaves(failure):
        if isinstance(leaf, RunError):
            message = str(getattr(leaf, "message", "")) or "The agent failed."
            code = str(getattr(leaf, "code", "agent_failed"))
            return printable(code), redact_text(printable(message))
    return None


def log_failure(
    log: logging.Logger,
    what: str,
    failure: BaseException,
    context: UserExecutionContext,
) -> None:
    """Log that `what` failed, and for whom."""
    words = told(failure)
    log.log(
        # A failure that was told in words is no surprise; any other needs its traceback.
        logging.ERROR if words is None else logging.WARNING,
        f"{what} failed" if words is None else f"{what} failed: {words[1]}",
        exc_info=failure if words is None else None,
        extra=dict(identity(context)),
    )


def identity(context: UserExecutionContext) -> Mapping[str, str]:
    """Whose a log line is."""
    return {
        "user_id": context.user_id,
        "thread_id": context.thread_id,
        "run_id": context.run_id,
        "correlation_id": context.correlation_id,
    }


def json_or_none(result: Any) -> Any:
    """What an agent returned if it is plain data; anything else stays in the process."""
    try:
        return redact_value(msgspec.json.decode(msgspec.json.encode(result)))
    except (TypeError, ValueError, RecursionError):
        return None
