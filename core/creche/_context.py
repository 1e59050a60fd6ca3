"""Who, on which thread, in which run: the immutable identity that every call is handed.

A context is data and has no powers. It is passed as an argument; nothing in creche ever
reads an identity from anywhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import enum
import hashlib
import unicodedata
import uuid
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from datetime import UTC, date, datetime, time, timedelta, timezone
from types import MappingProxyType
from typing import Any, Final, NewType, cast

from creche._errors import ConnectionMismatchError, InvalidContextError
from creche._isolation import assert_isolated
from creche._redaction import redact_value

UserId = NewType("UserId", str)
ThreadId = NewType("ThreadId", str)
RunId = NewType("RunId", str)
RequestId = NewType("RequestId", str)
ConnectionId = NewType("ConnectionId", str)
MessageId = NewType("MessageId", str)
ToolCallId = NewType("ToolCallId", str)

MAX_ID_LENGTH: Final = 256  # characters
_NONCE_LENGTH: Final = 32  # characters of a connection's id before its owner's mark
_MARK_LENGTH: Final = 16
MAX_DEPTH: Final = 10  # children below the context of the request

_PLACEHOLDERS: Final = frozenset(
    {
        "registry",
        "placeholder",
        "default",
        "temp",
        "none",
        "null",
        "undefined",
        "xxx",
        "yyy",
        "example",
    },
)
# An application may number its users, so these are no placeholders for a user.
_NUMERIC_PLACEHOLDERS: Final = frozenset({"0", "1"})
_RUN_PREFIXES: Final = ("placeholder_", "registry_")
_RESERVED_METADATA: Final = frozenset(
    {
        "user_id",
        "thread_id",
        "run_id",
        "request_id",
        "created_at",
        "metadata",
        "parent",
        "operation",
        "depth",
        "database",
        "connection_id",
    },
)
# {category: what a character of it is}
_MISLEADING: Final = MappingProxyType(
    {
        "Cc": "control characters",
        "Cf": "characters that are invisible or turn the direction of writing",
        "Cs": "halves of surrogate pairs",
        "Zl": "line separators",
        "Zp": "paragraph separators",
    },
)
# How one of a subclass becomes a plain one, whatever its own methods say.
_EXACT: Final[Mapping[type, Callable[[Any], Any]]] = MappingProxyType(
    {
        str: str.__str__,
        int: int.__int__,
        float: float.__float__,
        bytes: lambda value: bytes(memoryview(value)),
        bytearray: lambda value: bytes(memoryview(value)),
    }
)
# Whatever cannot be changed: exactly these types, for things can be hung on one of a subclass,
# and it may lie about what it is equal to. An object of any other kind could be shared by runs.
_PLAIN: Final = frozenset(
    {
        *(bool, complex, type(None), date, datetime, time, timedelta),
        *(decimal.Decimal, uuid.UUID),
    }
)
_TIME_ZONES: Final = frozenset({type(None), timezone, zoneinfo.ZoneInfo})


def new_id() -> str:
    """A fresh random id, 32 hexadecimal characters."""
    return uuid.uuid4().hex


def new_connection_id(user_id: UserId) -> ConnectionId:
    """A fresh id for a connection of that user's; it fits in no other user's context."""
    nonce = new_id()
    return ConnectionId(f"{nonce}-{_owner_mark(nonce, user_id)}")


def is_connection_of(connection_id: str, user_id: UserId) -> bool:
    """Whether that is the id of a connection of that user's, and not of another's.

    Raises InvalidContextError for what is no connection's id.
    """
    nonce, _, mark = connection_id.rpartition("-")
    if len(nonce) != _NONCE_LENGTH or len(mark) != _MARK_LENGTH:
        msg = "connection_id must be one that `new_connection_id` made"
        raise InvalidContextError(msg)
    return mark == _owner_mark(nonce, user_id)


def _owner_mark(nonce: str, user_id: UserId) -> str:
    return hashlib.sha256(f"{nonce}:{user_id}".encode()).hexdigest()[:_MARK_LENGTH]


def _checked_text(field: str, value: object) -> str:
    """Return `value`, as an exact `str`, if it is a word or a line that can be shown anywhere.

    Raises InvalidContextError, as `check_id` does.
    """
    if not issubclass(type(value), str):
        msg = f"{field} must be a string, not {type(value).__name__}"
        raise InvalidContextError(msg)
    value = str.__str__(cast("str", value))  # before it is looked at: a subclass may lie
    if not value.strip():
        msg = f"{field} must not be blank"
        raise InvalidContextError(msg)
    if len(value) > MAX_ID_LENGTH:
        msg = f"{field} must not be longer than {MAX_ID_LENGTH} characters (it has {len(value)})"
        raise InvalidContextError(msg)
    check_characters(field, value)
    return value


def check_id(field: str, value: object) -> str:
    """Return `value` if it may serve as the id called `field` (`"user_id"`, `"run_id"`, ...).

    What is returned is an exact `str`, whatever subclass of it was passed.

    Raises InvalidContextError, which names the field and the rule but never the value.
    """
    value = _checked_text(field, value)
    lowered = value.strip().lower()
    if lowered in _PLACEHOLDERS or (field != "user_id" and lowered in _NUMERIC_PLACEHOLDERS):
        msg = f"{field} must be a real id, and this is a placeholder"
        raise InvalidContextError(msg)
    if field == "run_id" and lowered.startswith(_RUN_PREFIXES):
        msg = f"{field} must be a real id, and this starts like a placeholder"
        raise InvalidContextError(msg)
    return value


def check_characters(field: str, value: str) -> None:
    """Raise InvalidContextError if a character in it could make a log line or a page lie.

    These are of the categories in Unicode's chapter 4.5: control characters (Cc), line and
    paragraph separators (Zl, Zp), what is invisible or turns the direction of writing (Cf), and
    halves of surrogate pairs (Cs).
    """
    for character in value:
        told = _MISLEADING.get(unicodedata.category(character))
        if told is not None:
            msg = f"{field} must not contain {told} (U+{ord(character):04X})"
            raise InvalidContextError(msg)


def frozen(value: Any) -> Any:
    """A deep copy of JSON-like data that nobody can change, of exact built-in types.

    A member of an enum becomes its value; text, bytes and numbers of a subclass become plain ones.
    Raises InvalidContextError for what is no plain data.
    """
    if isinstance(value, enum.Enum):
        return frozen(value.value)
    for plain, exact in _EXACT.items():
        if issubclass(type(value), plain) and type(value) is not bool:
            return exact(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return MappingProxyType({_exact_key(key): frozen(item) for key, item in items})
    if isinstance(value, (list, tuple)):
        return tuple(map(frozen, cast("Sequence[Any]", value)))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(frozen, cast("AbstractSet[Any]", value)))
    _check_plain(value, _PLAIN)
    _check_plain(getattr(value, "tzinfo", None), _TIME_ZONES)
    return cast("object", value)


def _check_plain(value: object, allowed: AbstractSet[object]) -> None:
    if type(value) not in allowed:
        msg = f"metadata must be plain data, and has a {type(value).__qualname__}"
        raise InvalidContextError(msg)


def _exact_key(key: object) -> str:
    # What `__str__` returns may be of a subclass, too.
    return str.__str__(cast("str", key) if issubclass(type(key), str) else str(key))


def _checked_metadata(metadata: object) -> Mapping[str, Any]:
    if not isinstance(metadata, Mapping):
        msg = f"metadata must be a mapping, not {type(metadata).__name__}"
        raise InvalidContextError(msg)
    try:
        copied: Mapping[str, Any] = frozen(cast("Mapping[Any, Any]", metadata))
    except RecursionError:
        msg = "metadata is nested too deep"
        raise InvalidContextError(msg) from None
    reserved = sorted(_RESERVED_METADATA.intersection(copied))
    if reserved:
        msg = f"metadata must not carry the reserved keys {', '.join(reserved)}"
        raise InvalidContextError(msg)
    return copied


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class UserExecutionContext:
    """The identity of one request within one run.

    Make one by `from_request`, which validates; every field is immutable, metadata deeply so.
    Two contexts are equal when they are the same object: an identity is not a value to compare.
    """

    user_id: UserId
    thread_id: ThreadId
    run_id: RunId
    request_id: RequestId
    created_at: datetime  # UTC
    metadata: Mapping[str, Any]  # deeply frozen
    parent: UserExecutionContext | None = None
    operation: str | None = None  # what a child was made for
    depth: int = 0
    database: Callable[[], Any] | None = None  # opens a session of this request's own
    connection_id: ConnectionId | None = None  # through which the request came

    @classmethod
    def from_request(
        cls,
        *,
        user_id: str,
        thread_id: str,
        run_id: str | None = None,
        request_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> UserExecutionContext:
        """Validate what a request says about itself; absent run and request ids are made afresh.

        Raises InvalidContextError at the first field that breaks a rule (see `check_id`).
        """
        return cls(
            user_id=UserId(check_id("user_id", user_id)),
            thread_id=ThreadId(check_id("thread_id", thread_id)),
            run_id=RunId(new_id() if run_id is None else check_id("run_id", run_id)),
            request_id=RequestId(
                str(uuid.uuid4()) if request_id is None else check_id("request_id", request_id),
            ),
            created_at=datetime.now(UTC),
            metadata=_checked_metadata({} if metadata is None else metadata),
        )

    def child(self, operation: str, **extra: Any) -> UserExecutionContext:
        """A context for a part of this run: same user, thread and run, a request id of its own.

        `operation` says what for, in a word or a line; `extra` is added to the metadata. Raises
        InvalidContextError for an operation that is no text, blank, longer than 256 characters or
        has control characters, for a reserved key, and below `MAX_DEPTH` levels.
        """
        operation = _checked_text("operation", operation)
        if self.depth >= MAX_DEPTH:
            msg = f"a context has at most {MAX_DEPTH} levels of children"
            raise InvalidContextError(msg)
        return dataclasses.replace(
            self,
            request_id=RequestId(str(uuid.uuid4())),
            created_at=datetime.now(UTC),
            metadata=_checked_metadata({**self.metadata, **extra}),
            parent=self,
            operation=operation,
            depth=self.depth + 1,
        )

    def with_database(self, session_scope: Callable[[], Any]) -> UserExecutionContext:
        """The same identity with a way to its database session; this one stays as it is.

        `session_scope()` opens a session, usually as a context manager. Raises
        InvalidContextError if there is one already.
        """
        if not callable(session_scope):
            msg = f"session_scope must be callable, not {type(session_scope).__name__}"
            raise InvalidContextError(msg)
        if self.database is not None:
            msg = "this context has a database already; a request has one"
            raise InvalidContextError(msg)
        return dataclasses.replace(self, database=session_scope)

    def with_connection(self, connection_id: ConnectionId) -> UserExecutionContext:
        """The same identity with the connection that the request came through.

        Raises InvalidContextError for an id that `new_connection_id` did not make, and if there
        is a connection already; one of its kinds, ConnectionMismatchError, for another user's.
        """
        connection_id = ConnectionId(check_id("connection_id", connection_id))
        if not is_connection_of(connection_id, self.user_id):
            msg = "connection_id is not of a connection of this user's"
            raise ConnectionMismatchError(msg, user=self.user_id)
        if self.connection_id is not None:
            msg = "this context has a connection already; a request comes through one"
            raise InvalidContextError(msg)
        return dataclasses.replace(self, connection_id=connection_id)

    def verify_isolation(
        self,
        other: UserExecutionContext,
        *,
        infrastructure: Iterable[object] = (),
    ) -> None:
        """Raise IsolationError if anything that can be changed is reachable from both.

        `infrastructure` is what they share on purpose, such as a pool behind `database`.
        """
        assert_isolated((self, other), infrastructure=infrastructure)

    @property
    def correlation_id(self) -> str:
        """Short and unique enough to find this request's log lines; safe to show to anybody."""
        return self.request_id.replace("-", "")[:12]

    def audit_trail(self) -> tuple[str, ...]:
        """The operations that led here, outermost first; the request itself is `"request"`."""
        above = self.parent.audit_trail() if self.parent is not None else ()
        return (*above, self.operation or "request")

    def to_dict(self) -> dict[str, Any]:
        """Everything that may be logged, as JSON-like data; secrets in metadata are redacted."""
        return {
            "user_id": self.user_id,
            "thread_id": self.thread_id,
            "run_id": self.run_id,
            "request_id": self.request_id,
            "created_at": self.created_at.isoformat(),
            "connection_id": self.connection_id,
            "operation": self.operation,
            "depth": self.depth,
            "metadata": redact_value(self.metadata),
        }

    def __repr__(self) -> str:
        inner = ", ".join(f"{key}={value!r}" for key, value in self.to_dict().items())
        return f"UserExecutionContext({inner})"


# Whose work this is, for log lines and spans of code that was handed no context. Nothing reads
# an identity from here to act on it.
logged_context: Final[ContextVar[UserExecutionContext | None]] = ContextVar(
    "creche_logged_context", default=None
)


@contextlib.contextmanager
def logged_as(context: UserExecutionContext) -> Iterator[None]:
    """Log lines of this task, and of those that it starts inside the block, are this one's."""
    before = logged_context.set(context)
    try:
        yield
    finally:
        logged_context.reset(before)
