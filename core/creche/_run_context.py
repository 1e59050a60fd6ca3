"""What an agent is handed: who it works for, and the only ways to act."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, overload

import trio

from creche._answer_schema import AnswerForm, Schema
from creche._asking import Questions
from creche._budget import Allowance, Usd
from creche._context import UserExecutionContext
from creche._dispatcher import ToolDispatcher
from creche._emitter import EventEmitter
from creche._errors import RunError
from creche._limits import Limits
from creche._messages import AgentInput, Message
from creche._models import Model, Usage
from creche._programs import NOTHING
from creche._run_life import RunLife
from creche._spending import Budget
from creche._statistics import Tally
from creche._steps import Step, SubagentResult, in_parallel, in_sequence
from creche._tools import ToolResult
from creche._tracing import Spans
from creche._turns import Asking, TurnModel, note_cost

_T = TypeVar("_T")


class Spawner(Protocol):
    """Who can run a sub-agent for an agent: the engine's part of `RunContext.spawn`."""

    async def spawn(self, parent: RunContext, agent: str, state: AgentInput) -> SubagentResult:
        """See `RunContext.spawn`; a failure is always a result here."""
        ...


class RunContext:
    """What an agent is handed: who it works for, and the only ways to act.

    A sub-agent is handed one of its own, with its own context, messages, tools and voice. What
    it spends, and its deadlines, are the run's.
    """

    def __init__(
        self,
        life: RunLife,
        *,
        context: UserExecutionContext,
        messages: tuple[Message, ...],
        emitter: EventEmitter,
        dispatcher: ToolDispatcher,
        models: Mapping[str, Model],
        limits: Limits,
        spawner: Spawner,
        tally: Tally,
        usage: list[tuple[str, Usage]],
        questions: Questions,
        spans: Spans,
    ) -> None:
        self._life = life
        self._spans = spans
        self._asking: Asking = []
        self._models = models
        self._spawner = spawner
        self._tally = tally
        self._questions = questions
        self._context = context
        self._messages = messages
        self._emitter = emitter
        self._dispatcher = dispatcher
        self._limits = limits
        self._usage = usage

    # All of it is the run's for good: nobody can set another's identity or voice here.

    @property
    def context(self) -> UserExecutionContext:
        """Who it works for."""
        return self._context

    @property
    def messages(self) -> tuple[Message, ...]:
        """The thread's history and then what this run was asked; what a sub-agent was asked."""
        return self._messages

    @property
    def emit(self) -> EventEmitter:
        """Its voice: the only way to say anything."""
        return self._emitter

    @property
    def tools(self) -> ToolDispatcher:
        """The tools that it may call."""
        return self._dispatcher

    @property
    def limits(self) -> Limits:
        """What it may spend at most."""
        return self._limits

    @property
    def usage(self) -> list[tuple[str, Usage]]:
        """(model, what one answer cost), of the whole run."""
        return self._usage

    @property
    def spans(self) -> Spans:
        """Where the spans of what it does belong."""
        return self._spans

    def spent(self, model: str, usage: Usage) -> None:
        """Note what an answer of a model cost, for the run's terminal event.

        Noted in the block of the model's stream, by the task that opened it, it is in the span of
        that call, too. It is spent of each budget that the calling task is in, the run's own and
        its user's day included; one that is exceeded ends at its next checkpoint.

        Raises TypeError for what is no Usage, and RunError (`no_price`) where a budget is in USD
        and the model has no price.
        """
        if type(usage) is not Usage:
            msg = f"a model's stream has text, tool calls and usage, not {type(usage).__name__}"
            raise TypeError(msg)
        self.usage.append((model, usage))
        note_cost(self._asking, model, usage)
        # Providers leave counts out, whatever the types say.
        self._life.budgets.charge_answer(model, usage.input_tokens or 0, usage.output_tokens or 0)

    async def call_tool(self, name: str, params: Mapping[str, Any]) -> ToolResult:
        """Call one of this run's tools by name; see `ToolDispatcher.dispatch`."""
        return await self.tools.dispatch(name, params)

    def open_process(
        self,
        command: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] = NOTHING,
    ) -> contextlib.AbstractAsyncContextManager[trio.Process]:
        """A block in which a program is alive at most: it dies with the run, with all below it.

        `command` is its words, without a shell. What is not asked for as a `subprocess.PIPE` is
        nothing. Its environment is `env` and, of ours, no more than where things are (PATH,
        HOME, TMPDIR) and what language and time zone to speak: never our secrets.

        Resource handling: however the block is left, a program that is still alive is asked to
        terminate, has `Limits.stop_timeout` to do so, and is then killed, with what it has
        started; one that the run's end met at work is among the receipt's `processes_killed`.

        Raises FileNotFoundError if there is no such program, TypeError for a command in one
        string, and LimitExceededError past `Limits.programs` of the user's.
        """
        return self.tools.programs.open_process(
            command, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=env
        )

    async def run_process(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float | None = None,  # noqa: ASYNC109  as the standard library has it
        most_bytes: int | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] = NOTHING,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program to its end, as in `open_process`; what it said is in the result.

        Its exit code is, too, and raises nothing; see `CompletedProcess.check_returncode`.

        Raises what `open_process` raises, and RunError for a program that took longer than
        `timeout` seconds (code `program_timeout`) or said more than `most_bytes`, or
        `Limits.program_bytes`, on both streams together (`program_output`): it is then stopped.
        """
        return await self.tools.programs.run_process(
            command, stdin=stdin, timeout=timeout, most_bytes=most_bytes, cwd=cwd, env=env
        )

    def model(self, name: str = "default") -> Model:
        """One of the models that this process offers. Raises RunError if there is none so named.

        Each of its calls counts for the run's statistics, and has `Limits.turn_timeout`,
        `first_token_timeout` and `idle_timeout`. None begins under a budget that is used up.
        """
        try:
            model = self._models[name]
        except KeyError:
            known = ", ".join(sorted(self._models)) or "none"
            msg = f"no model is named {name!r} here (there is {known})"
            raise RunError(msg, code="no_such_model") from None
        return TurnModel(
            model,
            self._tally,
            self._life.activities,
            self._life.budgets,
            self._life.silences,
            limits=self.limits,
            spans=self.spans,
            asking=self._asking,
            clock=self._life.clock,
        )

    @property
    def questions(self) -> Questions:
        """Those of the run; agents use `ask`."""
        return self._questions

    @overload
    async def ask(self, schema: None, prompt: str) -> str: ...
    @overload
    async def ask(self, schema: type[_T], prompt: str) -> _T: ...
    @overload
    async def ask(self, schema: Schema, prompt: str) -> Any: ...
    async def ask(self, schema: Any, prompt: str) -> Any:
        """Ask the user something, and wait for the answer, which may take long.

        `schema` says what an answer looks like: a type that msgspec knows (a Struct, an int, a
        Literal, ...), of which the answer then is one; a JSON Schema, for plain data; or None,
        for words. An answer that does not fit is refused to whoever gives it.

        The run is parked meanwhile: it says nothing, and no time of its passes, but for
        `Limits.answer_timeout`, after which it ends as cancelled, with the reason `unanswered`.
        A run has one question open at a time; others wait for their turn.

        Cancelled, it takes the question back. Raises QuestionDeclinedError if the user will not
        answer, RunError with the code `run_ending` from cleanup, ValueError for a prompt without
        words and for a schema that says what we cannot check, TypeError for what is no schema,
        and LimitExceededError as `emit` does.
        """
        form = AnswerForm(schema)
        await self.emit.end_text()
        return await self._questions.ask(form, prompt, subagent=self.emit.subagent_run_id)

    async def spawn(
        self,
        agent: str,
        state: AgentInput,
        *,
        raises: bool = False,
    ) -> SubagentResult:
        """Have another agent do a part of this run; returns what became of it.

        An instance of its own is made, which works in this task, is told what `state` says and
        nothing of the thread, has its own tools, and speaks as a sub-agent. A cancel of the run
        ends it; cancelled alone (by a scope around this call) it is told as an error.

        Whatever it raises is a result with an `error`, or, with `raises`, a SubagentFailedError.
        Raises UnknownAgentError, ValueError for an empty input, and LimitExceededError past
        `Limits.subagent_depth` or `Limits.subagents_at_once`.
        """
        result = await self._spawner.spawn(self, agent, state)
        return result.or_raise() if raises else result

    async def sequence(
        self,
        steps: Sequence[Step],
        *,
        raises: bool = False,
    ) -> tuple[SubagentResult, ...]:
        """Have sub-agents work one after another; the results are in the order of the steps.

        After a step that failed, the rest is skipped, unless it has `continue_on_error`. With
        `raises`, the first such failure is raised in the end. Raises what `spawn` raises.
        """
        results = await in_sequence(steps, self.spawn, self.emit)
        return _checked(steps, results) if raises else results

    async def parallel(
        self,
        steps: Sequence[Step],
        *,
        raises: bool = False,
    ) -> tuple[SubagentResult, ...]:
        """Have sub-agents work at once; the results are in the order of the steps.

        A step that fails cancels those that still run, unless it has `continue_on_error`; see
        `sequence`.
        """
        results = await in_parallel(steps, self.spawn, self.emit)
        return _checked(steps, results) if raises else results

    @contextlib.contextmanager
    def budget(
        self,
        *,
        tokens: int | None = None,
        usd: Usd | None = None,
        tool_calls: int | None = None,
    ) -> Iterator[Budget]:
        """A block that may spend so much, and ends when it has spent more: a cancel scope.

        For what this task does in it, and what tasks and sub-agents do that are started within it.
        Blocks nest: an inner one gets what is left of the outer ones at most. Tokens are those that
        models read and write, and `usd` what they cost by `Infrastructure.prices`. What an answer
        cost is known at its end, so it is noticed then, and the block may have spent more than it
        may; a call of a model or a tool that would begin when nothing is left does not begin.

        Raises BudgetExceededError on leaving a block that was ended so, unless it is left by
        another exception, and ValueError for a limit that is none. Of several budgets that are
        exceeded at once the outermost ends; if that is the run's own, the run is cancelled with
        the reason `budget`. `budget.spent` and `budget.left` say how it stands.
        """
        with self._life.budgets.opened(Allowance.of_numbers(tokens, usd, tool_calls)) as budget:
            yield budget

    @contextlib.asynccontextmanager
    async def cleanup(self) -> AsyncIterator[trio.CancelScope]:
        """A block that a cancel does not interrupt until `Limits.cleanup_timeout` is over.

        The allowance is the run's, not the block's: it counts from the moment at which the
        run was told to end.
        """
        with self._life.cleanup() as scope:
            yield scope


def _checked(
    steps: Sequence[Step],
    results: tuple[SubagentResult, ...],
) -> tuple[SubagentResult, ...]:
    """The results, unless a step failed whose failure matters. Raises SubagentFailedError."""
    for step, result in zip(steps, results, strict=True):
        if not step.continue_on_error:
            result.or_raise()
    return results
