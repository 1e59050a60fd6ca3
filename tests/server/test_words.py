"""Which words of a sentence tell something, as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creche_server.words import is_pleasantry, phrases, shared, stems, telling


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What did I say about my cats?", ["cats"]),
        ("what have we talked about before", []),
        ("", []),
        ("?!", []),
        ("the garden, the Garden and C++", ["garden", "Garden", "C++"]),
        ("猫 に ついて", ["猫", "に", "ついて"]),
    ],
)
def test_telling_words_are_those_that_are_not_in_every_sentence(text: str, words: list[str]):
    assert telling(text) == words


@pytest.mark.parametrize(
    ("some", "others", "common"),
    [
        ("I booked it", "Book a table", True),
        ("darkness", "it is dark", True),
        ("translation", "Translate a text", True),
        ("my to-do list", "add_todo", True),
        ("how much is it", "Tell how many there are", True),
        ("many", "much", False),
        ("stock", "stockholm syndrome", False),
        ("car", "card", False),
        ("tell me", "tell you", False),
    ],
)
def test_forms_of_a_word_are_the_same_word(some: str, others: str, common: bool):
    assert bool(shared(stems(some), stems(others))) is common


def test_phrases_begin_and_end_with_a_word_that_tells_something():
    assert phrases("Is The Hobbit there?") == ["The", "Hobbit", "The Hobbit"]
    assert phrases("a jar of honey") == ["jar", "honey", "jar of honey"]
    assert phrases("word " * 61) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello!", True),
        ("Good morning, how are you?", True),
        ("Thanks a lot!!", True),
        ("", False),
        ("Hello, what time is it?", False),
        ("What day?", False),
        ("Is it night?", False),
        ("hello " * 9, False),
    ],
)
def test_a_pleasantry_wants_nothing(text: str, expected: bool):
    assert is_pleasantry(text) is expected


@given(st.text(max_size=200))
def test_no_text_is_too_odd(text: str):
    assert all(word in text for word in telling(text))
    assert all(phrase.split()[0] in text for phrase in phrases(text))
    assert shared(stems(text), stems(text)) == stems(text)
