"""What may be shown: secrets in keyed data, credentials and home paths in sentences."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, cast

import msgspec

REDACTED: Final = "[redacted]"

_SECRET_WORDS: Final = frozenset(
    {
        "apikey",
        "auth",
        "authorization",
        "cookie",
        "credential",
        "credentials",
        "passwd",
        "password",
        "secret",
        "token",
    },
)
_SECRET_PAIRS: Final = frozenset({("api", "key"), ("private", "key"), ("access", "key")})

# Written in one, in any case: APIkey, accesskey.
_SECRET_PAIR_IN_ONE: Final = re.compile(r"(?i)(?<![a-z])(?:api|private|access)key(?![a-z])")

# A key's words end at case changes, `_`, `-`, `.` and blanks: accessKeyId -> access, key, id.
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

# At the beginning of a path only: there is a /home in many a project. What may come before it is
# `-I`, an escaped end of a line, and where some systems keep homes.
_HOME: Final = re.compile(
    r"(?:(?<![\w.~+@%-])|(?<=\s-[A-Z])|(?<=\\[nrt]))"
    r"(?:(?:/var|/usr|/export|/mnt/[a-z]|/System/Volumes/Data)?(?:/home|/Users)/[^/\s'\":;,]+"
    r"|/root(?![\w.-]))|[A-Za-z]:\\Users\\[^\\\s]+",
)
_URL_PASSWORD: Final = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_BEARER: Final = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
# A key in a sentence, with what is between it and its value, be it quoted in a quotation.
_KEYED: Final = re.compile(
    r"(?<![\w.\-])(?P<key>[A-Za-z_][\w.\-]*+)(?P<end>\\*+[\"'])?\s*+[=:](?!//)\s*+"
    r"(?!\[redacted\]|Bearer\b|Basic\b)",
)
# Written together, as in `dbpassword`, a key's words are not to be told apart.
_SECRET_ENDING: Final = re.compile(
    r"(?i)(?:api|access|private)[_-]?key$|(?:passwd|password|secret|token|cookie|credentials?)$"
)
_OPENING: Final = re.compile(r"\\*+[\"']")
_QUOTED: Final = MappingProxyType(
    {quote: re.compile(rf"(?:[^{quote}\\]++|\\.)*+(?:{quote}|\Z)", re.DOTALL) for quote in "\"'"}
)
_BRACKET: Final = re.compile(
    r"[\[{(]|[\]})]|\"(?:[^\"\\]++|\\.)*+\"|'(?:[^'\\]++|\\.)*+'",
    re.DOTALL,
)
_BARE: Final = re.compile(r"[^\s,;)}\]]*+")
_VENDOR_KEY: Final = re.compile(r"\b(?:sk|pk|rk|ghp|gho|xox[abp])[-_][A-Za-z0-9_-]{8,}")


def is_secret_key(key: str) -> bool:
    """Whether a key's name says that its value is a secret.

    `author`, `monkey` and `input_tokens` are not: whole words count, not substrings.
    """
    words = [word.lower() for word in _WORD.findall(key)]
    if any(word in _SECRET_WORDS for word in words):
        return True
    if any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words)):
        return True
    return _SECRET_PAIR_IN_ONE.search(key) is not None


def _is_secret_in_words(key: str) -> bool:
    return is_secret_key(key) or _SECRET_ENDING.search(key) is not None


def redact_value(value: Any) -> Any:
    """A copy of JSON-like data in which the value under each secret-looking key is replaced."""
    return _redacted(value, texts=False)


def _redacted(value: Any, *, texts: bool) -> Any:
    """With `texts`, a text that is itself the JSON of an object or an array is looked into."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED
            if isinstance(key, str) and is_secret_key(key)
            else _redacted(item, texts=texts)
            for key, item in cast("Mapping[Any, Any]", value).items()
        }
    if isinstance(value, str):
        return redact_json(value) if texts and value.lstrip()[:1] in {"{", "["} else value
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_redacted(item, texts=texts) for item in cast("Sequence[Any]", value)]
    return value


def redact_json(text: str) -> str:
    """JSON text with the values under secret-looking keys replaced; other text as a sentence."""
    try:
        value = msgspec.json.decode(text)
        redacted = _redacted(value, texts=True)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return redact_keyed(text)
    return text if redacted == value else msgspec.json.encode(redacted).decode()


def printable(text: str) -> str:
    """The text with what no encoder takes, lone surrogates, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def redact_text(text: str) -> str:
    """A sentence (an error's message) without credentials and without anybody's home path."""
    text = _URL_PASSWORD.sub(REDACTED, text)
    text = redact_keyed(text)
    text = _VENDOR_KEY.sub(REDACTED, text)
    return _HOME.sub("~", text)


def redact_keyed(text: str) -> str:
    """A sentence without what follows secret-looking keys: `token=…`, `"password": {…}`."""
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    kept: list[str] = []
    at = 0
    while found := _KEYED.search(text, at):
        kept.append(text[at : found.end()])
        at = found.end()
        if _is_secret_in_words(found["key"]):
            end = _end_of_value(text, at)
            if end > at:
                kept.append(REDACTED)
            at = end
    return "".join([*kept, text[at:]]) if kept else text


def _end_of_value(text: str, begin: int) -> int:
    """Where a value ends that begins there; one that is not closed ends with the text."""
    opening = _OPENING.match(text, begin)
    if opening is None:
        if text[begin : begin + 1] in {"{", "[", "("}:
            return _end_of_bracket(text, begin)
        bare = _BARE.match(text, begin)
        return begin if bare is None else bare.end()
    quote = opening.group()
    if len(quote) > 1:  # within a text that is quoted itself
        end = text.find(quote, opening.end())
        return len(text) if end < 0 else end + len(quote)
    closed = _QUOTED[quote].match(text, opening.end())
    return len(text) if closed is None else closed.end()


def _end_of_bracket(text: str, begin: int) -> int:
    depth = 0
    for found in _BRACKET.finditer(text, begin):
        if found.group() in {"{", "[", "("}:
            depth += 1
        elif found.group() in {"}", "]", ")"}:
            depth -= 1
            if depth == 0:
                return found.end()
    return len(text)
