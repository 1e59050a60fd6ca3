"""What is done when a reply has been sent, for whatever must not change it, nor its time.

And what a request is called by in the log and the audit, which no reply may show either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from quart import request

from creche import new_id

_LEFT: Final = "creche.afterwards"
_CALLED: Final = "creche.correlation_id"


def after_reply(work: Callable[[], None]) -> None:
    """Have `work` called when the reply to the present request has been sent, or cannot be."""
    cast("dict[str, Any]", request.scope)[_LEFT].append(work)


def correlation_id() -> str:
    """What finds the present request's log lines and audit records."""
    return str(cast("dict[str, Any]", request.scope)[_CALLED])


class AfterReplies:
    """An ASGI application around one whose handlers use `after_reply`."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app

    async def __call__(
        self,
        scope: Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
    ) -> None:
        left: list[Callable[[], None]] = []
        cast("dict[str, Any]", scope).update({_LEFT: left, _CALLED: new_id()[:12]})
        try:
            await self._app(scope, receive, send)
        finally:
            for work in left:
                work()
