"""What a client may say: `{"id": 7, "method": "run.start", "params": {...}}`.

The commands follow the Agent Streaming Protocol (the `langchain-protocol` package); what is
ours beside it is written down in docs/wire.md. Decoding is pure and answers with a struct or
with a `WireError` that is ready to be sent back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec

from creche import (
    AuditKind,
    InvalidContextError,
    MessageId,
    MultitaskStrategy,
    RunId,
    UserMessage,
    check_characters,
    new_id,
)
from creche_server.wire.replies import ErrorCode

MAX_COMMAND_BYTES: Final = 1024 * 1024
DEFAULT_RUNS: Final = 100  # that one reply tells of
MOST_GRACE: Final = 3600.0  # seconds that a run may go on unwatched
MOST_RUNS: Final = 1000  # that may be asked for at once


class WireError(Exception):
    """A frame that is no command; `id` is the frame's own, where it could be read.

    `kind` is what the audit calls it, None for what is no more than a mistake; `resource` what it
    was about.
    """

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode,
        id: int | None,  # noqa: A002
        kind: AuditKind | None = None,
        resource: str = "command",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code: ErrorCode = code
        self.id = id
        self.kind: Final = kind
        self.resource = resource


class Subscribe(msgspec.Struct, frozen=True):
    """Send me this thread's events, from the one after `since` on."""

    channels: tuple[str, ...] = ()  # of no meaning under ag-ui.v1
    since: int = 0
    epoch: str | None = None  # the one that `since` was counted in


class Unsubscribe(msgspec.Struct, frozen=True):
    subscription_id: str


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class InputMessage(msgspec.Struct, frozen=True):
    """A message of the person's; other roles are not a client's to speak for."""

    content: str | tuple[TextPart, ...]
    role: Literal["user"] = "user"
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None

    def to_message(self) -> UserMessage:
        words = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        return UserMessage(id=MessageId(self.id or new_id()), content=words)


class RunInput(msgspec.Struct, frozen=True):
    messages: tuple[InputMessage, ...]


class ResumeEntry(msgspec.Struct, frozen=True, rename="camel"):
    """AG-UI's answer to an interrupt; `cancelled` declines it."""

    interrupt_id: str
    status: Literal["resolved", "cancelled"]
    payload: Any = None


class RunStart(msgspec.Struct, frozen=True):
    """Run an agent on this thread.

    With `resume` it is an answer instead, to what a run of this thread asked.
    """

    input: RunInput = RunInput(())
    assistant_id: str = "assistant"
    metadata: Mapping[str, Any] = msgspec.field(default_factory=dict[str, Any])
    multitask_strategy: MultitaskStrategy = "enqueue"  # on a busy thread
    on_disconnect: Literal["continue", "cancel"] = "continue"
    disconnect_grace: Annotated[float, msgspec.Meta(ge=0, le=MOST_GRACE)] | None = None  # seconds
    resume: tuple[ResumeEntry, ...] = ()
    run_id: RunId | None = None  # how the run that is resumed goes on; new runs get one of ours


class RunCancel(msgspec.Struct, frozen=True):
    """End a run. With `wait` the reply comes when it has ended, with its receipt."""

    run_id: RunId
    wait: bool = False
    reason: Literal["user"] = "user"


class InputRespond(msgspec.Struct, frozen=True):
    """Answer what a run of this thread asked; `cancelled` declines."""

    interrupt_id: str
    response: Any = None
    status: Literal["resolved", "cancelled"] = "resolved"
    run_id: RunId | None = None  # how the run goes on


class TreeGet(msgspec.Struct, frozen=True):
    """Tell me what a run, or each of this thread's, does right now."""

    run_id: RunId | None = None


class StateGet(msgspec.Struct, frozen=True):
    """Tell me what was said on this thread in its latest runs, or in those before a run."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_RUNS)] = DEFAULT_RUNS
    before: RunId | None = None


Command = Subscribe | Unsubscribe | RunStart | RunCancel | InputRespond | TreeGet | StateGet

COMMANDS: Final[Mapping[str, type[Command]]] = MappingProxyType(
    {
        "subscription.subscribe": Subscribe,
        "subscription.unsubscribe": Unsubscribe,
        "run.start": RunStart,
        "run.cancel": RunCancel,
        "input.respond": InputRespond,
        "agent.getTree": TreeGet,
        "state.get": StateGet,
    },
)


class _Envelope(msgspec.Struct, frozen=True):
    id: int
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")
    type: Any = None


class _Named(msgspec.Struct, frozen=True):
    """What can be told of a frame that is otherwise wrong."""

    id: Any = None
    type: Any = None
    method: Any = None


_envelope: Final = msgspec.json.Decoder(_Envelope)
_EVENT_TYPE: Final = re.compile(r"event|[A-Z_]{1,64}")


def decode_command(frame: str | bytes) -> tuple[int, Command]:
    """A text frame as its id and its command. Raises WireError."""
    if isinstance(frame, bytes):
        msg = "commands are text frames, and this is a binary one"
        raise WireError(msg, code="invalid_argument", id=None)
    try:
        envelope = _envelope.decode(frame)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        named = _named(frame)
        number = named.id if type(named.id) is int else None
        _check_no_event(number, named.type, named.method)
        msg = f"this is no command: {error}"
        raise WireError(msg, code="invalid_argument", id=number) from None
    _check_no_event(envelope.id, envelope.type, envelope.method)
    kind = COMMANDS.get(envelope.method)
    if kind is None:
        msg = f"there is no command {envelope.method[:64]!r} (there is {', '.join(COMMANDS)})"
        raise WireError(msg, code="unknown_command", id=envelope.id)
    try:
        command = msgspec.json.decode(envelope.params, type=kind)
        check_command(command)
    except RecursionError:
        msg = f"{envelope.method}: this is nested too deeply"
        raise WireError(msg, code="invalid_argument", id=envelope.id) from None
    except (msgspec.DecodeError, UnicodeError, InvalidContextError, ValueError) as error:
        msg = f"{envelope.method}: {error}"
        raise WireError(msg, code="invalid_argument", id=envelope.id) from None
    return envelope.id, command


def check_command(command: Command) -> None:
    """What the types do not say. Raises ValueError."""
    if isinstance(command, Subscribe) and command.since < 0:
        msg = "`since` is the seq of the last event you have, 0 for none"
        raise ValueError(msg)
    if isinstance(command, RunStart):
        if not command.input.messages and not command.resume:
            msg = "`input.messages` must have at least one message"
            raise ValueError(msg)
        if len(command.resume) > 1:
            msg = "`resume` has one entry: one question of a thread is open at a time"
            raise ValueError(msg)
        for message in command.input.messages:
            check_characters("a message's id", message.id or "")


def _check_no_event(number: int | None, *names: object) -> None:
    """Raise WireError for a frame that says of itself to be an event: runs say these, not clients.

    AG-UI's types are in capitals, and no command of any vocabulary is; Agent Protocol's events
    are of the type `event`.
    """
    for name in names:
        if isinstance(name, str) and _EVENT_TYPE.fullmatch(name):
            msg = "events are for runs to say; a client sends commands"
            raise WireError(
                msg,
                code="invalid_argument",
                id=number,
                kind="event_injection",
                resource=f"event {name}",
            )


def _named(frame: str) -> _Named:
    """What a frame that is otherwise wrong says of itself, as far as it can be read."""
    try:
        return msgspec.json.decode(frame, type=_Named)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return _Named()
