"""The limits that a process and its runs are held to, in one frozen object."""

from __future__ import annotations

import dataclasses
from typing import Final, cast

from creche._budget import NO_LIMIT, Allowance, Usd, as_count, as_usd

KIB = 1024
MIB = 1024 * KIB


# With fewer, nothing would ever move.
_AT_LEAST_ONE: Final = frozenset(
    {
        "tool_calls_per_minute",
        "tool_threads",
        "programs",
        "running_per_user",
        "running",
        "read_entries",
        "commit_threads",
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times are seconds, sizes bytes. Past a cap there is a clear error, never growth.

    Raises ValueError for a value that can be no limit.
    """

    # a run
    run_timeout: float = 600.0
    turn_timeout: float = 120.0  # one model call and its stream
    first_token_timeout: float = 60.0  # of it, until the first part of the answer
    idle_timeout: float = 30.0  # of it, between one part and the next
    tool_timeout: float = 60.0
    tool_source_timeout: float = 30.0  # until all tool sources of an agent are open
    approval_timeout: float = 300.0  # of an `Approver`, before a tool's own time begins
    answer_timeout: float = 86_400.0  # of a person who is asked; no other time passes meanwhile
    cleanup_timeout: float = 5.0  # what `run.cleanup()` allows after the end was asked for
    last_words_timeout: float = 0.5  # on top of that, for the commit of the terminal event
    stop_timeout: float = 1.0  # how long a sync tool may take to heed its stop flag
    max_turns: int = 20  # model calls of one ModelAgent run
    subagent_depth: int = 10  # levels of sub-agents below the run's own agent, 10 at most
    subagents_at_once: int = 20  # of one run, at all depths together
    history_runs: int = 50  # of a thread's latest runs, whose messages an agent is given
    tool_calls: int = 200  # of one run, which is told so and may answer with what it has
    run_tokens: int | None = None  # of one run, which ends past it; None: no limit
    run_usd: Usd | None = None  # the same in money; each of its models then needs a price
    run_bytes: int = 16 * MIB  # everything that one run says
    uncommitted_bytes: int = MIB  # what a run may be ahead of the store before `emit` waits

    # a user, a thread, the process
    runs_per_user: int = 100  # running or queued
    running_per_user: int = 20  # the others wait
    tool_calls_per_minute: int = 600  # of one user
    tokens_per_user_per_day: int | None = None  # a day is one in UTC; None: no limit
    usd_per_user_per_day: Usd | None = None  # each model then needs a price
    tool_calls_per_user_per_day: int | None = None
    tool_result_bytes: int = 256 * KIB  # of one result, as clients and models see it
    tool_threads: int = 4  # sync tools of one user at once, in threads or processes
    programs: int = 4  # that runs of one user have started, at once
    program_bytes: int = MIB  # what `run_process` takes of one program's output
    runs_per_thread: int = 20  # one runs, the others wait their turn
    runs: int = 10_000  # running or queued
    running: int = 2_000  # the others wait, and begin in fair order between users

    # a journal
    journal_bytes: int = 256 * KIB  # committed entries kept in memory per live thread
    conversation_bytes: int = 256 * KIB  # messages kept in memory per live thread
    read_entries: int = 512  # most entries that one read returns from memory
    read_bytes: int = 128 * KIB  # about what one read returns from the store
    commit_interval: float = 0.020  # how long drafts may gather before they are committed
    commit_threads: int = 100  # threads in one transaction
    commit_bytes: int = MIB  # of one thread in one transaction, or its first event alone

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is None:
                if value is not None:
                    self._check_budget(field.name, value)
                continue
            least = 1 if field.name in _AT_LEAST_ONE else 0
            if not value >= least:  # so that NaN is refused, too
                msg = f"Limits.{field.name} must be {least} or more, not {value!r}"
                raise ValueError(msg)

    def _check_budget(self, name: str, value: Usd) -> None:
        what = f"Limits.{name}"
        if "usd" in name:
            object.__setattr__(self, name, as_usd(what, value))
        else:
            as_count(what, cast("int", value))

    @property
    def of_a_run(self) -> Allowance:
        """What a run may spend on models; its tool calls have a limit of their own."""
        if self.run_tokens is None and self.run_usd is None:
            return NO_LIMIT  # which most have, and each run asks
        return Allowance.of_numbers(self.run_tokens, self.run_usd)

    @property
    def of_a_day(self) -> Allowance:
        """What a user may spend in a day, UTC."""
        return Allowance.of_numbers(
            self.tokens_per_user_per_day,
            self.usd_per_user_per_day,
            self.tool_calls_per_user_per_day,
        )
