"""Which words of an English sentence tell what it is about. Pure, no I/O."""

from __future__ import annotations

import re
from typing import Final

# Words that are in sentences about anything, and those with which people speak of speaking.
_STOP_WORDS: Final = frozenset(
    """
    a about after again all am an and any anything are as ask asked at be because been before
    being but by can chat chats chatted conversation conversations could d did discuss discussed
    discussion do does doing don earlier ever find for from get give go had has have he her here
    him his history how i if in into is it its just know last let list ll look m make many may me
    mention mentioned might mine much must my need now of off old on one or other our out over past
    please previous previously questions re recent recently remember s said say search see shall
    she should show so some something speak spoke spoken t talk talked talking tell than that
    the their them then there these they thing things this those to told topic topics up us use
    ve want wants was we were what whats when where which who whom why will with word words
    would you your yours
    """.split()  # noqa: SIM905 - so many are read more easily like this
)
# What people say without wanting anything.
_PLEASANTRIES: Final = frozenset(
    """
    a afternoon again all alright and are bye cheers cool day do doing evening everyone fine good
    goodbye great hello hey hi how later lot meet morning much nice night ok okay perfect please
    see so sorry thank thanks there things to very welcome well wonderful you
    """.split()  # noqa: SIM905 - likewise
)
_LONGEST_PLEASANTRY: Final = 8  # words
_PUNCTUATION: Final = "\"'`´’.,:;!?()[]{}<>…"  # noqa: RUF001
_MOST_WORDS: Final = 60
_LONGEST_PHRASE: Final = 8  # words
_LEAST_SHARED: Final = 4  # letters with which two forms of a word begin
_MOST_APART: Final = 3  # letters by which the forms may differ in length
_ENDING: Final = re.compile(r"(?<=...)(?:ations?|ings?|ness|ies|ers?|ed|es|s|y)$")  # of a word


def telling(text: str) -> list[str]:
    """The words that say what a text is about, as they stand and in its order, once each.

    "What did I say about my cats?" has one, "cats"; "What have we talked about?" has none.
    """
    words = (word.strip(_PUNCTUATION) for word in text.split())
    told = (word for word in words if word and not _all_stop_words(word))
    return list(dict.fromkeys(told))


def stems(text: str) -> set[str]:
    """The telling words' beginnings, without the endings of the plural and of tenses.

    "how many" and "how much" count as a word: they ask for a number.
    """
    lower = text.lower().replace("-", "").replace("_", " ")
    found = {_ENDING.sub("", word) for word in _words(lower) if word not in _STOP_WORDS}
    return found | {"how_many"} if re.search(r"\bhow (?:many|much)\b", lower) else found


def shared(some: set[str], others: set[str]) -> set[str]:
    """Those of `some` stems that are, in this form or another, among the others."""
    return {stem for stem in some if any(_same(stem, other) for other in others)}


def phrases(text: str) -> list[str]:
    """What may be named in a text: up to eight words of it in a row, the longest last.

    None begins or ends with a word that tells nothing, unless its capital is no sentence's
    beginning, as in "Is The Hobbit there?". Empty where there would be too many.
    """
    words = [word.strip(_PUNCTUATION) for word in text.split()]
    if len(words) > _MOST_WORDS:
        return []
    ends = [
        bool(word) and (not _all_stop_words(word) or (i > 0 and word[0].isupper() and word != "I"))
        for i, word in enumerate(words)
    ]
    found = [
        " ".join(words[start : start + length])
        for length in range(1, _LONGEST_PHRASE + 1)
        for start in range(len(words) - length + 1)
        if ends[start] and ends[start + length - 1]
    ]
    return list(dict.fromkeys(found))


def is_pleasantry(text: str) -> bool:
    """Whether this is said to be polite, and wants no more than a polite answer."""
    words = _words(text.lower())
    return 0 < len(words) <= _LONGEST_PLEASANTRY and _PLEASANTRIES.issuperset(words)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _all_stop_words(word: str) -> bool:
    parts = _words(word.lower())
    return bool(parts) and _STOP_WORDS.issuperset(parts)


def _same(stem: str, other: str) -> bool:
    """Equal, or two forms of one long word: "translat" and "translate"."""
    short, long = sorted((stem, other), key=len)
    return stem == other or (
        len(short) > _LEAST_SHARED
        and len(long) - len(short) <= _MOST_APART
        and long.startswith(short)
    )
