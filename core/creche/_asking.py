"""Questions of one run to a person: asked, the run parked, answered, and the run goes on.

One question is open at a time; who asks meanwhile waits, and asks next. While one is open the
run's nursery lives and no time of its passes, but nothing of it is said: to a stock AG-UI client
the run has finished with an interrupt, and what comes after the answer is another run.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any, Final

import trio

from creche import _events as events
from creche._answer_schema import AnswerForm
from creche._approval import Approval, ApprovalRequest
from creche._context import RunId, new_id
from creche._emitter import EngineVoice
from creche._errors import (
    AnswerRefusedError,
    QuestionClosedError,
    QuestionDeclinedError,
    RunError,
)
from creche._limits import Limits
from creche._redaction import printable, redact_json, redact_value
from creche._run_life import RunLife
from creche._run_rows import run_record
from creche._store import QuestionRecord, QuestionStatus, now

# An interrupt's reason, in AG-UI's words:
INPUT_REQUIRED: Final = "input_required"  # an agent asked
TOOL_CALL: Final = "tool_call"  # a tool is to be called, if that is approved

_LONGEST: Final = timedelta(days=3650)  # a moment that every calendar has
OVER: Final = "nobody waits for an answer to that question any more"
_ENDING: Final = "the run is ending, so nobody can be asked"


@dataclasses.dataclass(slots=True, eq=False)
class _Asked:
    """A question that is open, or was until now."""

    record: QuestionRecord
    form: AnswerForm
    settled: trio.Event = dataclasses.field(default_factory=trio.Event)
    declined: bool = False
    answer: Any = None


class Questions:
    """Those of one run and its sub-agents. Owned by its engine."""

    def __init__(self, life: RunLife, voice: EngineVoice, limits: Limits) -> None:
        self._life = life
        self._voice = voice
        self._timeout = limits.answer_timeout
        self._turn = trio.Lock()
        self._asked: _Asked | None = None

    @property
    def open(self) -> QuestionRecord | None:
        """What waits for an answer right now."""
        return None if self._asked is None else self._asked.record

    async def ask(self, form: AnswerForm, prompt: str, *, subagent: str | None) -> Any:
        """Park the run until there is an answer. See `RunContext.ask`."""
        prompt = printable(prompt).strip()
        if not prompt:
            msg = "a question needs words"
            raise ValueError(msg)
        return await self._ask(form, INPUT_REQUIRED, prompt, {"subagent_run_id": subagent})

    async def approve(self, request: ApprovalRequest) -> Approval:
        """Ask whether a tool may be called: the engine's `Approver` where there is no other."""
        own = request.context.request_id == self._life.context.request_id
        tool = {
            "subagent_run_id": None if own else request.context.request_id,
            "tool_call_id": request.tool_call_id,
            "tool_name": request.tool_name,
            "arguments": redact_json(request.arguments),
            "digest": request.digest,
        }
        prompt = f"May the tool {request.tool_name} be called?"
        if self._life.ending.is_set():
            return request.refuse(_ENDING)
        try:
            answer = await self._ask(_approval_form(request), TOOL_CALL, prompt, tool)
        except QuestionDeclinedError:
            return request.refuse()
        if answer["approved"]:
            return request.approve()
        return request.refuse(answer.get("reason", ""))

    async def _ask(self, form: AnswerForm, reason: str, prompt: str, about: dict[str, Any]) -> Any:
        async with self._turn:
            if self._life.ending.is_set():
                raise RunError(_ENDING, code="run_ending")
            asked = self._park(form, reason, prompt, about)
            try:
                deadline = trio.move_on_after(self._timeout)
                with self._life.activities.during("question", reason), deadline:
                    await asked.settled.wait()
                if not asked.settled.is_set():
                    self._life.cancel("unanswered")
            except trio.Cancelled:
                # Who cancels from outside without a word is found out by the engine's watcher,
                # which is woken together with us.
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.checkpoint()
                raise
            finally:
                self.close()
        if not asked.settled.is_set():
            await trio.lowlevel.checkpoint()  # where the run's end reaches us, unless shielded
            msg = f"nobody answered within {self._timeout:g} s"
            raise RunError(msg, code="unanswered")
        if asked.declined:
            raise QuestionDeclinedError
        return asked.answer

    def answer(self, response: Any, *, declined: bool, run_id: RunId) -> int:
        """Answer what is open; the run goes on as `run_id`.

        Returns the `seq` whose commit makes the answer durable. Raises QuestionClosedError, and
        AnswerRefusedError for what does not fit: then the question stays open.
        """
        asked = self._asked
        if asked is None or self._life.ending.is_set():
            msg = "the run is ending, so the question takes no answer any more"
            raise QuestionClosedError(msg)
        if declined:
            asked.declined = True
            given = events.Resumption(interrupt_id=asked.record.question_id, status="cancelled")
        else:
            asked.answer = read_answer(asked.form, response)
            given = events.Resumption(
                interrupt_id=asked.record.question_id,
                status="resolved",
                payload=redact_value(response),
            )
        seq = self._go_on("declined" if declined else "answered", run_id, given)
        asked.settled.set()
        return seq

    def close(self) -> None:
        """If a question is still open, say that the run goes on without an answer."""
        if self._asked is None:
            return
        # A question that only a shutdown took the asker from is still to be answered.
        fates: dict[str | None, QuestionStatus] = {"shutdown": "open", "unanswered": "unanswered"}
        fate = fates.get(self._life.reason, "withdrawn")
        self._go_on(fate, RunId(new_id()), None)

    def _park(self, form: AnswerForm, reason: str, prompt: str, about: dict[str, Any]) -> _Asked:
        life = self._life
        asked_at = now()
        record = QuestionRecord(
            user_id=life.context.user_id,
            thread_id=life.context.thread_id,
            run_id=life.context.run_id,
            question_id=new_id(),
            agent=life.agent,
            reason=reason,
            prompt=prompt,
            schema=form.schema,
            asked_at=asked_at,
            expires_at=asked_at + min(_LONGEST, timedelta(seconds=min(self._timeout, 1e9))),
            **about,
        )
        self._voice.park(
            interrupt_of(record), life.segments[-1], run_record(life, "parked"), record
        )
        self._asked = asked = _Asked(record, form)
        life.clock.stop()
        return asked

    def _go_on(self, fate: QuestionStatus, run_id: RunId, given: events.Resumption | None) -> int:
        assert self._asked is not None
        life, record = self._life, self._asked.record
        closed = () if fate == "open" else (closed_as(record, fate),)
        life.segments.append(run_id)
        self._asked = None
        life.clock.go_on()
        return self._voice.go_on(run_id, given, run_record(life, "running"), closed).seq


def interrupt_of(record: QuestionRecord) -> events.Interrupt:
    """A question as AG-UI tells it."""
    tool = {
        "tool_name": record.tool_name,
        "arguments": record.arguments,
        "digest": record.digest,
    }
    return events.Interrupt(
        id=record.question_id,
        reason=record.reason,
        message=record.prompt,
        tool_call_id=record.tool_call_id,
        response_schema=record.schema,
        expires_at=record.expires_at.isoformat(timespec="milliseconds"),
        subagent_run_id=record.subagent_run_id,
        metadata=None if record.digest is None else {"creche": tool},
    )


def closed_as(record: QuestionRecord, fate: QuestionStatus) -> QuestionRecord:
    """The record of a question that takes no answer any more."""
    return dataclasses.replace(record, status=fate, closed_at=now())


def check_open(record: QuestionRecord, *, is_live: bool) -> None:
    """Raise QuestionClosedError unless that question, of a run that is over, takes an answer."""
    if record.status == "answered":
        msg = "the question has been answered"
        raise QuestionClosedError(msg)
    if record.status == "open" and record.expires_at <= now():
        msg = "the question was to be answered sooner"
        raise QuestionClosedError(msg)
    if record.status != "open" or is_live:
        raise QuestionClosedError(OVER)


def read_answer(form: AnswerForm, response: Any) -> Any:
    """The answer as the asker gets it. Raises AnswerRefusedError for one that does not fit."""
    try:
        return form.read(response)
    except ValueError as error:
        msg = f"the answer does not fit the question: {error}"
        raise AnswerRefusedError(msg) from None


def _approval_form(request: ApprovalRequest) -> AnswerForm:
    """A yes or a no, to a call with exactly these arguments.

    A question never changes, so its id stands for their hash; who repeats the hash is held to it.
    """
    return AnswerForm(
        {
            "type": "object",
            "properties": {
                "approved": {"type": "boolean"},
                "digest": {"const": request.digest},
                "reason": {"type": "string"},
            },
            "required": ["approved"],
            "additionalProperties": False,
        }
    )
