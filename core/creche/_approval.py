"""Approval of a high-risk tool call: one yes, for one call with exactly these arguments."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from typing import Final, Protocol

import msgspec
import trio

from creche._audit import SecurityAudit
from creche._auditing import note_mix_up_of
from creche._barrier import split
from creche._context import ToolCallId, UserExecutionContext, new_id
from creche._redaction import redact_text

_log: Final = logging.getLogger("creche.approval")

NOT_APPROVED: Final = "The call was not approved"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """An answer. Made by `ApprovalRequest.approve` or `refuse`, or from what was stored of them."""

    request_id: str
    tool_name: str
    digest: str
    approved: bool
    reason: str = ""  # told to the model when it is a no


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRequest:
    """What somebody is asked. Nothing in it can change between the asking and the call."""

    context: UserExecutionContext
    tool_name: str
    tool_call_id: ToolCallId
    # Canonical JSON, whole: who shows it to others redacts it, as `repr` leaves it out.
    arguments: str = dataclasses.field(repr=False)
    id: str = dataclasses.field(default_factory=new_id)  # of this asking: an answer serves once

    @property
    def digest(self) -> str:
        """SHA-256 of the tool's name and the arguments, 64 hexadecimal characters."""
        return digest_of(self.tool_name, self.arguments)

    def approve(self) -> Approval:
        return self._answered(approved=True)

    def refuse(self, reason: str = "") -> Approval:
        return self._answered(approved=False, reason=reason)

    def _answered(self, *, approved: bool, reason: str = "") -> Approval:
        return Approval(
            request_id=self.id,
            tool_name=self.tool_name,
            digest=self.digest,
            approved=approved,
            reason=reason,
        )


class Approver(Protocol):
    """Who is asked before a call of an `approval=True` tool. Shared by all runs."""

    async def approve(self, request: ApprovalRequest) -> Approval:
        """Yes or no; may take long. It is cancelled with the run and at its own deadline."""
        ...


def digest_of(tool_name: str, arguments: str) -> str:
    """The hash that an approval is bound to; `arguments` is canonical JSON."""
    return hashlib.sha256(msgspec.json.encode([tool_name, arguments])).hexdigest()


def objection(request: ApprovalRequest, answer: object) -> str | None:
    """Why the call may not be made, for the model; None if this answer is a yes to this request."""
    if not isinstance(answer, Approval):
        return f"{NOT_APPROVED}: there was no answer."
    asked = (request.id, request.tool_name, request.digest)
    if (answer.request_id, answer.tool_name, answer.digest) != asked:
        return f"{NOT_APPROVED}: the answer was for another call."
    if answer.approved is not True:
        reason = redact_text(str(answer.reason).strip().rstrip("."))
        return f"{NOT_APPROVED}: {reason}." if reason else f"{NOT_APPROVED}."
    return None


async def ask(
    approver: Approver | None,
    request: ApprovalRequest,
    seconds: float,
    *,
    audit: SecurityAudit | None = None,
) -> str | None:
    """Ask, for at most so many seconds; None for a yes, otherwise why not, for the model."""
    if approver is None:
        return f"{NOT_APPROVED}: there is nobody here who could approve it."
    with trio.move_on_after(seconds):
        try:
            return objection(request, await approver.approve(request))
        except BaseException as error:  # noqa: BLE001  boundary: one question, which is a no
            note_mix_up_of(audit, error, f"approval of {request.tool_name}", request.context)
            passing, _ = split(error)
            if passing is not None:
                raise passing from None
            _log.exception(
                "an approver failed, so a call of %s was refused",
                request.tool_name,
                extra={"user_id": request.context.user_id, "run_id": request.context.run_id},
            )
            return f"{NOT_APPROVED}: it could not be asked for."
    return f"{NOT_APPROVED}: nobody answered within {seconds:g} s."
