"""What can go wrong, by name: every error that creche raises at its users."""

from __future__ import annotations

from typing import Final, Literal

MixUp = Literal[
    "user_mismatch", "thread_mismatch", "run_mismatch", "connection_mismatch", "event_injection"
]


class CrecheError(Exception):
    """The base of every error that creche raises on purpose."""


class InvalidContextError(CrecheError, ValueError):
    """An id or a piece of metadata cannot identify a run.

    The message names the field and the rule that it breaks, never the value:
    what was passed by mistake may be a secret.
    """


class IsolationError(CrecheError):
    """Two runs share something that one could change for the other, or one would act as another.

    Raised inside, before anything is said, written or sent; the message names nobody. The rest is
    for the audit: `kind` is how it calls this, `user` who acted, `owner` whose `resource` it is.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: MixUp = "user_mismatch",
        user: str | None = None,
        owner: str | None = None,
        resource: str = "isolation",
    ) -> None:
        super().__init__(message)
        self.kind: Final = kind
        self.user = user
        self.owner = owner
        self.resource = resource
        self.noted = False  # whether an audit was told: each boundary on its way would tell it


class ConnectionMismatchError(IsolationError, InvalidContextError):
    """A context was given a connection of another user's."""

    def __init__(self, message: str, *, user: str) -> None:
        super().__init__(message, kind="connection_mismatch", user=user, resource="connection")


class GrammarError(CrecheError):
    """An event may not follow what its run has said so far."""


class EmitterClosedError(CrecheError):
    """Its run has ended, so this emitter says nothing any more."""


class ToolDefinitionError(CrecheError, TypeError):
    """A function cannot be a tool as it is written; the message says what to change."""


class UnknownAgentError(CrecheError, LookupError):
    """No agent is registered by that name."""


class StoreUnavailableError(CrecheError):
    """The store did not take a write that must be committed before we may answer."""


class LogConflictError(StoreUnavailableError):
    """Somebody else has written a thread's log meanwhile, so what is said here cannot follow it.

    Trying again does not help; opening the thread anew does. Whoever writes on one store must
    share its journals.
    """


class CommitInDoubtError(CrecheError):
    """A store cannot tell whether it took a commit: its answer was lost on the way."""


class AuditUnavailableError(CrecheError):
    """The audit could not be written, so what was to be audited must fail."""


class AuditTamperedError(CrecheError):
    """The audit is not as it was left; `creche audit verify` says where."""


class ThreadDeletedError(CrecheError):
    """The thread was deleted while somebody was reading it."""


class DrainingError(CrecheError):
    """The process is shutting down and takes no new runs."""


class BusyError(CrecheError):
    """A run was asked for with `multitask_strategy="reject"`, and its thread is busy."""


class RunError(CrecheError):
    """A failure whose message may be told to the client as it stands.

    Any other exception reaches the client only as a code and a correlation id.

    `code` is a lower_snake_case word for programs, `message` a sentence for people.
    """

    def __init__(self, message: str, *, code: str = "agent_failed") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class ModelError(RunError):
    """The model refused, broke off or could not be reached."""

    def __init__(self, message: str, *, code: str = "model_failed") -> None:
        super().__init__(message, code=code)


class LimitExceededError(RunError):
    """A stated limit was reached; `retry_after` is in seconds, None where waiting does not help."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message, code="limit_exceeded")
        self.retry_after = retry_after


class BudgetExceededError(RunError):
    """More was spent than a budget allows, or it was used up before what wanted more of it.

    `budget` is the one that is over: what `run.budget()` gave, or the run's own.
    """

    def __init__(self, message: str, *, budget: object) -> None:
        super().__init__(message, code="budget_exceeded")
        self.budget: Final = budget


class AnswerRefusedError(CrecheError, ValueError):
    """An answer does not fit what was asked; the question stays open."""


class NoSuchQuestionError(CrecheError, LookupError):
    """There is no such question on this thread."""


class QuestionClosedError(CrecheError):
    """A question takes no answer any more: it has one, or nobody waits for one."""


class QuestionDeclinedError(RunError):
    """A person who was asked would not answer."""

    def __init__(self, message: str = "The question was declined.") -> None:
        super().__init__(message, code="declined")


class SubagentFailedError(RunError):
    """A sub-agent failed, and its parent asked for that to be raised; it has its code and words."""
