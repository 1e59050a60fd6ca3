"""Arguments that come in pieces: however they are cut, no secret is in what is said of them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.core.test_redaction import SECRET_KEYS

from creche import redact_value
from creche._redaction import is_secret_key
from creche._streamed_redaction import BEGINNING, redact_piece

MARK = "\N{SNOWMAN}"  # in every secret string, and nowhere else
NUMBER = 7654321  # likewise of numbers

PLAIN = st.text(st.characters(exclude_characters=MARK, exclude_categories=["Cs"]))
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | PLAIN
SECRETS = st.recursive(
    st.just(NUMBER) | PLAIN.map(lambda text: MARK + text + MARK),
    lambda inner: st.lists(inner, min_size=1) | st.dictionaries(PLAIN, inner, min_size=1),
    max_leaves=4,
)


def with_secrets(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    plain = st.dictionaries(PLAIN.filter(lambda key: not is_secret_key(key)), inner)
    secret = st.dictionaries(st.sampled_from(SECRET_KEYS), SECRETS, max_size=2)
    return st.lists(inner) | st.builds(lambda a, b: {**a, **b}, plain, secret)


OBJECTS = st.recursive(LEAVES, with_secrets, max_leaves=12).map(lambda value: {"of": value})


def said_of(pieces: list[str]) -> str:
    scan, said = BEGINNING, ""
    for piece in pieces:
        scan, more = redact_piece(scan, piece)
        said += more
    return said


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    return [text[begin:end] for begin, end in itertools.pairwise(places)]


@given(
    OBJECTS,
    st.lists(st.integers(0, 10_000), max_size=12),
    st.booleans(),
    st.sampled_from([None, 1]),
)
@example({"token": '\\"}'}, list(range(30)), True, None)
def test_the_pieces_said_make_the_redacted_whole(
    value: Any, cuts: list[int], escaped: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    marks = (MARK, json.dumps(MARK)[1:-1], str(NUMBER))
    shown = redact_value(value)
    for pieces in (cut(text, cuts), list(text), [text]):
        said = said_of(pieces)
        assert json.loads(said) == shown
        assert shown != value or said == text
        assert not any(mark in said for mark in marks)


@given(st.lists(st.text(st.sampled_from("{}[]\":,\\ 'tokenab1"), max_size=9)))
def test_whatever_comes_is_no_failure_and_says_no_more_than_came(pieces: list[str]) -> None:
    said_of(pieces)
    scan = BEGINNING
    for piece in pieces:
        scan, _ = redact_piece(scan, piece)
        assert len(scan.held) <= 1024


def test_a_key_may_spell_its_secret_word_in_escapes_or_be_there_twice() -> None:
    text = r'{"\u0070assword": "hunter2", "n": 1, "tok\u0065n": [1], "tok\u0065n": {"a": 2}}'
    shown = '{"\\u0070assword": "[redacted]", "n": 1, "tok\\u0065n": "[redacted]", '
    assert said_of([text]) == said_of(list(text)) == shown + '"tok\\u0065n": "[redacted]"}'


ENDS = (
    (['{"password": "hunt'], '{"password": "[redacted]"'),
    (['{"passw', 'ord": ["hunter2", 1'], '{"password": "[redacted]"'),
    (['{"n": 1, "pass'], '{"n": 1, '),
    (['{"n": "half a wo', "rd"], '{"n": "half a word'),
    (["plain words"], "plain words"),
    (["3 apples"], "3 apples"),
    (["", " ", '{"a":'], ' {"a":'),
    (["{'password': 'hunter2', 'n': 1}"], "{'password': [redacted], 'n': 1}"),
    (["{'pass", "word': 'hunter2'}"], "{'pass"),
    (['{"a": 1,', "'password': 'hunter2'", "}"], '{"a": 1,[redacted]'),
    (['{"a": 1}', '{"password": "hunter2"}'], '{"a": 1}[redacted]'),
    (['{"a": 1} {"password": "hunter2"}'], '{"a": 1} {"password": [redacted]}'),
    (["{\"password\": 'hunter2'}"], '{"password": [redacted]'),
    (["{\"password\" 'hunter2'}"], '{"password" [redacted]'),
    (['{"password": {"x" hunter2'], '{"password": "[redacted]"[redacted]'),
    (['{"a": 1}', " \n"], '{"a": 1} \n'),
    (["[1,]"], "[1,]"),
)


@pytest.mark.parametrize(("pieces", "said"), ENDS, ids=range(len(ENDS)))
def test_what_breaks_off_or_is_no_json_says_no_secret(pieces: list[str], said: str) -> None:
    assert said_of(pieces) == said


@pytest.mark.parametrize(
    "text",
    ["[" * 600, '{"a":' * 600, '{"' + "k" * 1100, '{"' + "k" * 1100 + '": 1}'],
    ids=["arrays", "objects", "a key that is begun", "a key"],
)
def test_what_no_decoder_takes_is_not_followed_any_further(text: str) -> None:
    """So what is kept of one call is bounded, whatever a model writes."""
    scan, _ = redact_piece(BEGINNING, text)
    assert redact_piece(scan, '{"password": "hunter2"}')[1] == ""
    assert said_of(list(text)).endswith("[redacted]")
