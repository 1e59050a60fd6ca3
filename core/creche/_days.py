"""What a user may spend in a day, asked of the store before a run is taken on, and as it begins."""

from __future__ import annotations

import logging
from typing import Final, Protocol

from creche._audit import SecurityAudit
from creche._auditing import record_limit
from creche._budget import in_words
from creche._context import UserExecutionContext, UserId
from creche._errors import LimitExceededError, StoreUnavailableError
from creche._quotas import DayShare, ToolQuotas
from creche._store import Store

_log: Final = logging.getLogger("creche.days")


class DayInfrastructure(Protocol):
    """What is wanted of an `Infrastructure`."""

    @property
    def store(self) -> Store: ...
    @property
    def audit(self) -> SecurityAudit | None: ...


async def check_day(
    infrastructure: DayInfrastructure, quotas: ToolQuotas, context: UserExecutionContext
) -> None:
    """Let a user start a run, unless they have spent what they may in a day.

    Returns at once where there is no such limit. Raises LimitExceededError, whose `retry_after` is
    until midnight UTC (it is audited, or AuditUnavailableError raised), and StoreUnavailableError
    if the store cannot say.
    """
    if quotas.of_a_day.is_none:
        return
    with quotas.share(context.user_id) as share:
        try:
            await learn_day(infrastructure.store, share.day, context.user_id)
        # Boundary: one start of a run; the medium may raise whatever it does.
        except Exception as error:
            _log.exception("what a user spent today cannot be read")
            msg = "the store cannot be read; nothing was started, try again"
            raise StoreUnavailableError(msg) from error
        kind = share.day.used_up()
        if kind is None:
            return
        said = f"spent {in_words(kind, share.day.limit, share.day.spent)} of a day (UTC)"
        wait = share.day.until_midnight()
    await record_limit(
        infrastructure.audit,
        context,
        resource="budget of a day",
        operation="start a run",
        outcome=said,
    )
    msg = f"this user has {said}; there is more after midnight"
    raise LimitExceededError(msg, retry_after=wait)


async def learn_day(store: Store, day: DayShare, user_id: UserId) -> None:
    """Have a user's day know what the store has for it."""
    if not day.limit.is_none:
        today = day.today
        day.learn(today, await store.spending(user_id, today))
