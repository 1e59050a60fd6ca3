"""Tells the audit, where there is one, what a run was refused; each mix-up once.

A mix-up is noted where it is raised, if there is an audit at hand (a journal has one), so that
code which swallows the error hides nothing; else by the boundary that stops it: one tool call,
one sub-agent, one run, one command.
"""

from __future__ import annotations

from creche._audit import SecurityAudit
from creche._audit_chain import AuditKind
from creche._barrier import causes
from creche._context import UserExecutionContext
from creche._errors import IsolationError


def note_mix_up(
    audit: SecurityAudit | None,
    error: BaseException,
    operation: str,
    *,
    user: str | None = None,
    correlation_id: str = "",
) -> None:
    """Record the mix-ups among what somebody raised, but for those that are recorded already.

    `user` is who is taken to have acted where the error does not know. Nobody waits for it: what
    was to be done has failed by itself.
    """
    if audit is None:
        return
    for leaf in causes(error):  # also one that was raised again under another name
        if isinstance(leaf, IsolationError) and not leaf.noted:
            leaf.noted = True
            audit.record_nowait(
                leaf.kind,
                user=leaf.user or user,
                claimed_owner=leaf.owner,
                resource=leaf.resource,
                operation=operation,
                outcome="stopped",
                correlation_id=correlation_id,
            )


def note_mix_up_of(
    audit: SecurityAudit | None,
    error: BaseException,
    operation: str,
    context: UserExecutionContext,
) -> None:
    """The same for what happened in the request of `context`."""
    correlation_id = context.correlation_id
    note_mix_up(audit, error, operation, user=context.user_id, correlation_id=correlation_id)


def note_refusal(
    audit: SecurityAudit | None,
    kind: AuditKind,
    context: UserExecutionContext,
    *,
    resource: str,
    operation: str,
    outcome: str = "refused",
) -> None:
    """Record what was refused, without waiting: where nobody may, or where the time would tell."""
    if audit is not None:
        audit.record_nowait(
            kind,
            user=context.user_id,
            resource=resource,
            operation=operation,
            outcome=outcome,
            correlation_id=context.correlation_id,
        )


async def record_limit(
    audit: SecurityAudit | None,
    context: UserExecutionContext,
    *,
    resource: str,
    operation: str,
    outcome: str,
) -> None:
    """Record a limit that was hit, before anybody is told. Raises AuditUnavailableError."""
    if audit is not None:
        await audit.record(
            "limit_hit",
            user=context.user_id,
            resource=resource,
            operation=operation,
            outcome=outcome,
            correlation_id=context.correlation_id,
        )
