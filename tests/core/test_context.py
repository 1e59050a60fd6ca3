"""Who is asking: ids that are refused, metadata that nobody can change, children."""

from __future__ import annotations

import dataclasses
import decimal
import enum
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creche import (
    ConnectionId,
    InvalidContextError,
    UserExecutionContext,
    new_connection_id,
)
from creche._context import MAX_ID_LENGTH

FIELDS = ("user_id", "thread_id", "run_id", "request_id")
WORDS = (
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
)


def made(**changed: Any) -> UserExecutionContext:
    return UserExecutionContext.from_request(
        **{"user_id": "ada", "thread_id": "t-7", "run_id": "r-7", **changed},
    )


# What makes a log line, or a page that shows it, say something else than is there.
MISLEADING = {
    "\u2028": "a line separator",
    "\u2029": "a paragraph separator",
    **{chr(code): f"the bidi control U+{code:X}" for code in (*range(0x202A, 0x202F), 0x61C)},
    **{chr(code): f"the bidi control U+{code:X}" for code in range(0x2066, 0x206A)},
    **{chr(code): f"the invisible U+{code:X}" for code in range(0x200B, 0x2010)},
    "\ufeff": "a byte order mark",
    "\u00ad": "a soft hyphen",
    "\u2060": "a word joiner",
    "\U000e0041": "a tag character",
    "\udc80": "half a surrogate pair",
    "\x85": "a next line",
    "\x1b": "an escape",
}
REFUSED_EVERYWHERE: list[tuple[str, Any]] = [
    ("a number", 7),
    ("bytes", b"ada"),
    ("a list", ["ada"]),
    ("a bool", True),
    ("nothing", ""),
    ("blanks", "   "),
    ("a wide blank", "\u3000"),
    ("a line break", "\n"),
    ("257 characters", "a" * 257),
    ("a NUL within", "ada\x00"),
    ("a line break within", "a\nb"),
    ("a DEL within", "a\x7f"),
    ("a C1 control within", "a\x9b31m"),
    ("half a surrogate pair", "a\ud800"),
    *((f"{name} within", f"a{character}b") for character, name in MISLEADING.items()),
    *((f"{name} at the end", f"a{character}") for character, name in MISLEADING.items()),
    *((word, word) for word in WORDS),
    *((f"{word} in capitals", word.upper()) for word in WORDS),
    ("a placeholder between blanks", " Default "),
]
TAKEN_EVERYWHERE = [
    "a",
    "2",
    "a" * 256,
    "default_user",
    "test_user_7",
    "my-default",
    "temporary",
    "nonesuch",
    "xxxx",
    "example.org",
    "user@example.com",
    "0f5e-11",
    "zoë",
    "zoe\u0308",  # the same, its dots a character of their own
    "עברית",
    "مرحبا",
    "देवनागरी",
    "👩🏽",
    "甲",
    "with blanks within",
    "00",
    "10",
]


class TestIds:
    @pytest.mark.parametrize("field", FIELDS)
    @pytest.mark.parametrize(
        "value",
        [value for _, value in REFUSED_EVERYWHERE],
        ids=[name for name, _ in REFUSED_EVERYWHERE],
    )
    def test_what_is_no_id_is_refused_in_every_field(self, field: str, value: object) -> None:
        with pytest.raises(InvalidContextError) as caught:
            made(**{field: value})
        assert str(caught.value).startswith(f"{field} must ")

    @pytest.mark.parametrize(
        ("value", "rule"),
        [
            ("a\nb", "control characters (U+000A)"),
            ("a\u2028", "line separators (U+2028)"),
            ("a\u2029", "paragraph separators (U+2029)"),
            ("a\u202eb", "invisible or turn the direction of writing (U+202E)"),
            ("a\u200bb", "invisible or turn the direction of writing (U+200B)"),
            ("a\ud800", "halves of surrogate pairs (U+D800)"),
        ],
        ids=ascii,
    )
    def test_a_character_that_misleads_is_told_by_its_rule(self, value: str, rule: str) -> None:
        with pytest.raises(InvalidContextError) as caught:
            made(thread_id=value)
        assert rule in str(caught.value)
        assert str(caught.value).isascii(), "the words do not carry it on"

    @pytest.mark.parametrize("field", FIELDS)
    @pytest.mark.parametrize("value", TAKEN_EVERYWHERE, ids=range(len(TAKEN_EVERYWHERE)))
    def test_what_only_resembles_a_placeholder_is_an_id(self, field: str, value: str) -> None:
        assert getattr(made(**{field: value}), field) == value

    @pytest.mark.parametrize(
        ("field", "value", "is_taken"),
        [
            ("user_id", "0", True),
            ("user_id", "1", True),
            ("thread_id", "0", False),
            ("thread_id", "1", False),
            ("run_id", "0", False),
            ("run_id", "1", False),
            ("request_id", "0", False),
            ("request_id", "1", False),
            ("run_id", "placeholder_7", False),
            ("run_id", "Registry_7", False),
            ("run_id", " registry_7", False),
            ("run_id", "placeholder7", True),
            ("run_id", "my_placeholder_7", True),
            ("user_id", "placeholder_7", True),
            ("user_id", "registry_7", True),
            ("thread_id", "placeholder_7", True),
            ("request_id", "registry_7", True),
        ],
    )
    def test_some_rules_are_of_one_field(self, field: str, value: str, is_taken: bool) -> None:
        if is_taken:
            assert getattr(made(**{field: value}), field) == value
        else:
            with pytest.raises(InvalidContextError, match=field):
                made(**{field: value})

    @pytest.mark.parametrize("field", ["user_id", "thread_id"])
    def test_a_user_and_a_thread_cannot_be_left_out(self, field: str) -> None:
        with pytest.raises(InvalidContextError, match=field):
            made(**{field: None})

    @pytest.mark.parametrize("field", ["run_id", "request_id"])
    def test_an_absent_run_or_request_id_is_made_afresh(self, field: str) -> None:
        values = {getattr(made(**{field: None}), field) for _ in range(50)}
        assert len(values) == 50

    @given(st.text(), st.sampled_from(FIELDS))
    def test_any_text_is_taken_as_it_is_or_refused_without_repeating_it(
        self,
        value: str,
        field: str,
    ) -> None:
        try:
            found = getattr(made(**{field: value}), field)
        except InvalidContextError as error:
            secret = value.strip()
            assert len(secret) < 12 or secret not in str(error)
            return
        assert found == value
        assert value.strip()
        assert len(value) <= 256
        assert value.isprintable() or not any(ord(letter) < 32 for letter in value)

    def test_an_error_never_repeats_the_value(self) -> None:
        """What was passed by mistake may be a secret."""
        with pytest.raises(InvalidContextError) as caught:
            made(user_id="sk-live-123456789\x00")
        assert "sk-live" not in str(caught.value)


class Lying(str):  # noqa: SLOT000  that is the point
    """Text that something can be hung on, and that says it is anybody."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash("bob")

    def __str__(self) -> str:
        return self

    def strip(self, *given: Any) -> str:
        return "bob"

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return iter("bob")


class TestSubclassesOfStr:
    """What hangs on one would show in every context that has it."""

    @pytest.mark.parametrize("field", FIELDS)
    def test_an_id_is_an_exact_str(self, field: str) -> None:
        found = getattr(made(**{field: Lying("mallory")}), field)
        assert type(found) is str
        assert (found == "bob", found == "mallory") == (False, True)

    @pytest.mark.parametrize("value", ["", " ", "a\nb", "default", "a" * 257], ids=ascii)
    def test_a_lie_does_not_get_a_value_past_the_rules(self, value: str) -> None:
        with pytest.raises(InvalidContextError, match="thread_id"):
            made(thread_id=Lying(value))

    def test_so_are_an_operation_and_a_connections_id(self) -> None:
        context = made()
        assert type(context.child(Lying("search")).operation) is str
        attached = context.with_connection(ConnectionId(Lying(new_connection_id(context.user_id))))
        assert type(attached.connection_id) is str


class Count(int):
    """Numbers that something can be hung on."""


class Part(float):
    """The same with a point."""


class Buffer(bytes):
    """The same of bytes."""


class Moment(datetime):
    """The same of time."""


class Zone(tzinfo):
    """A time zone of somebody's own, which is anything."""

    def utcoffset(self, _: datetime | None) -> None: ...

    def dst(self, _: datetime | None) -> None: ...

    def tzname(self, _: datetime | None) -> None: ...


class Word(enum.StrEnum):
    ONE = "one"


class Kind(enum.Enum):
    LIST = [1]  # noqa: RUF012  that is the point


class Pair(NamedTuple):
    one: str


class TestMetadata:
    @pytest.mark.parametrize(
        ("passed", "kept"),
        [
            (Lying("a"), "a"),
            (Count(7), 7),
            (True, True),
            (Part(0.5), 0.5),
            (Buffer(b"a"), b"a"),
            (Word.ONE, "one"),
            (Kind.LIST, (1,)),
            (Pair(Lying("a")), ("a",)),
            ({Lying("a"): Lying("b")}, MappingProxyType({"a": "b"})),
            ({Lying("a")}, frozenset({"a"})),
            (timedelta(1), timedelta(1)),
            (date(2026, 1, 2), date(2026, 1, 2)),
            (datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)),
            (uuid.UUID(int=7), uuid.UUID(int=7)),
            (decimal.Decimal(7), decimal.Decimal(7)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_it_is_of_exact_built_in_types(self, passed: Any, kept: Any) -> None:
        def types(value: Any) -> Any:
            if isinstance(value, Mapping):
                return (type(value), *((type(key), types(item)) for key, item in value.items()))
            if isinstance(value, (tuple, frozenset)):
                return (type(value), *map(types, value))
            return type(value)

        found = made(metadata={Lying("deep"): [passed]}).metadata
        assert [type(key) for key in found] == [str]
        (value,) = found["deep"]
        assert (types(value), value) == (types(kept), kept)

    @pytest.mark.parametrize(
        "passed",
        [
            Moment(2026, 1, 2, tzinfo=UTC),
            datetime(2026, 1, 2, tzinfo=Zone()),
            time(1, tzinfo=Zone()),
            type("Own", (uuid.UUID,), {})(int=7),
            object(),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_cannot_be_copied_so_is_refused(self, passed: Any) -> None:
        with pytest.raises(InvalidContextError, match="plain data"):
            made(metadata={"deep": [passed]})

    def test_a_reserved_key_that_says_it_is_another_is_refused(self) -> None:
        class Quiet(str):  # noqa: SLOT000
            def __eq__(self, other: object) -> bool:
                return False

            def __hash__(self) -> int:
                return 0

        with pytest.raises(InvalidContextError, match="reserved keys user_id"):
            made(metadata={Quiet("user_id"): "x"})

    def test_changing_what_was_passed_in_changes_nothing(self) -> None:
        passed: dict[str, Any] = {"a": {"b": [1, {"c": 2}]}, "s": {1, 2}}
        context = made(metadata=passed)
        passed["a"]["b"][1]["c"] = 99
        passed["a"]["b"].append(3)
        passed["a"]["new"] = 1
        passed["s"].add(3)
        passed["x"] = 1
        assert dict(context.metadata) == {"a": {"b": (1, {"c": 2})}, "s": frozenset({1, 2})}

    def test_nobody_can_change_it_at_any_depth(self) -> None:
        context = made(metadata={"a": {"b": [1, {"c": 2}]}})
        for mapping in (context.metadata, context.metadata["a"], context.metadata["a"]["b"][1]):
            assert isinstance(mapping, Mapping)
            with pytest.raises(TypeError):
                mapping["new"] = 1  # type: ignore[index]
        with pytest.raises(AttributeError):
            context.metadata["a"]["b"].append(3)

    def test_a_bytearray_in_it_is_frozen_too(self) -> None:
        buffer = bytearray(b"one")
        context = made(metadata={"buffer": buffer})
        buffer[0] = 0
        assert bytes(context.metadata["buffer"]) == b"one"

    @pytest.mark.parametrize(
        "key",
        ["user_id", "thread_id", "run_id", "request_id", "created_at", "parent", "depth"],
    )
    def test_a_reserved_key_is_refused(self, key: str) -> None:
        with pytest.raises(InvalidContextError, match=key):
            made(metadata={"fine": 1, key: "x"})
        with pytest.raises(InvalidContextError, match=key):
            made().child("search", **{key: "x"})

    @pytest.mark.parametrize("metadata", ["text", ["a"], 7, [("a", 1)]], ids=repr)
    def test_it_must_be_a_mapping(self, metadata: Any) -> None:
        with pytest.raises(InvalidContextError, match="metadata must be a mapping"):
            made(metadata=metadata)

    @given(
        st.dictionaries(
            st.text().map(lambda key: f"{key} "),  # never a reserved one
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=8,
            ),
            max_size=3,
        ),
    )
    def test_any_json_object_is_kept_as_it_was(self, metadata: dict[str, Any]) -> None:
        shown = made(metadata=metadata).metadata

        def thawed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: thawed(item) for key, item in value.items()}
            return [thawed(item) for item in value] if isinstance(value, tuple) else value

        assert thawed(shown) == metadata


class TestIdentity:
    def test_no_field_can_be_set_and_none_added(self) -> None:
        context = made()
        for field in dataclasses.fields(context):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(context, field.name, "x")
        assert not hasattr(context, "__dict__")

    def test_it_can_be_a_key_and_is_equal_to_itself_only(self) -> None:
        one, other = made(), made()
        assert {one: 1, other: 2}[one] == 1
        assert one != other

    def test_it_knows_when_it_was_made_in_utc(self) -> None:
        created = made().created_at
        assert created.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - created) < timedelta(seconds=5)

    def test_to_dict_and_repr_show_no_secret_and_are_json(self) -> None:
        context = made(metadata={"api_key": "hunter2", "deep": [{"password": "hunter2"}], "n": 1})
        shown = context.to_dict()
        assert json.loads(json.dumps(shown)) == shown
        assert shown["metadata"] == {
            "api_key": "[redacted]",
            "deep": [{"password": "[redacted]"}],
            "n": 1,
        }
        assert (shown["user_id"], shown["run_id"]) == ("ada", "r-7")
        assert "hunter2" not in repr(context)
        assert "ada" in repr(context)

    def test_a_correlation_id_is_short_and_another_for_each_request(self) -> None:
        ids = {made(request_id=None).correlation_id for _ in range(100)}
        assert len(ids) == 100
        assert all(len(found) == 12 and found.isalnum() for found in ids)


class TestChildren:
    def test_a_child_is_the_same_run_and_another_request(self) -> None:
        parent = made(metadata={"kept": 1, "replaced": 1})
        child = parent.child("search", replaced=2, new=[3])
        assert (child.user_id, child.thread_id, child.run_id) == ("ada", "t-7", "r-7")
        assert child.request_id != parent.request_id
        assert child.parent is parent
        assert (child.operation, child.depth) == ("search", 1)
        assert dict(child.metadata) == {"kept": 1, "replaced": 2, "new": (3,)}
        assert dict(parent.metadata) == {"kept": 1, "replaced": 1}

    def test_its_trail_names_what_led_to_it(self) -> None:
        context = made().child("plan").child("search")
        assert context.audit_trail() == ("request", "plan", "search")

    @pytest.mark.parametrize(
        ("operation", "rule"),
        [
            (5, "must be a string, not int"),
            (None, "must be a string, not NoneType"),
            (b"search", "must be a string, not bytes"),
            (["search"], "must be a string, not list"),
            ("", "must not be blank"),
            ("  ", "must not be blank"),
            ("\t", "must not be blank"),
            ("x" * (MAX_ID_LENGTH + 1), "must not be longer than 256 characters (it has 257)"),
            ("search\nfor", "must not contain control characters (U+000A)"),
            ("search\x00", "must not contain control characters (U+0000)"),
            ("search\x7f", "must not contain control characters (U+007F)"),
            ("search\ud800", "must not contain halves of surrogate pairs (U+D800)"),
        ],
        ids=lambda value: repr(value)[:20],
    )
    def test_an_operation_that_cannot_be_shown_is_refused_by_its_rule(
        self, operation: Any, rule: str
    ) -> None:
        with pytest.raises(InvalidContextError) as refused:
            made().child(operation)
        assert str(refused.value) == f"operation {rule}"
        assert isinstance(refused.value, ValueError)

    @pytest.mark.parametrize("operation", ["x" * MAX_ID_LENGTH, "default", "0", "agent näme"])
    def test_an_operation_is_no_id_so_any_line_of_text_will_do(self, operation: str) -> None:
        assert made().child(operation).operation == operation

    def test_there_are_ten_levels_and_not_eleven(self) -> None:
        context = made()
        for level in range(10):
            context = context.child(f"level-{level}")
        assert context.depth == 10
        with pytest.raises(InvalidContextError, match="10"):
            context.child("one more")
