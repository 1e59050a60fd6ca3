"""What may be shown: secrets in keyed data, credentials and home paths in sentences."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
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

# A key's words end at case changes, `_`, `-`, `.` and blanks: accessKeyId -> access, key, id.
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

_HOME: Final = re.compile(
    r"(?:/home|/Users)/[^/\s'\":;,]+|/root(?![\w.-])|[A-Za-z]:\\Users\\[^\\\s]+",
)
_URL_PASSWORD: Final = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_BEARER: Final = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
_KEYED: Final = re.compile(
    r"(?i)((?:api[_-]?key|access[_-]?key|private[_-]?key"
    r"|passwd|password|secret|token|cookie|credentials?|authorization|(?<![a-z])auth)"
    r"(?![A-Za-z0-9])[\"']?\s*[=:]\s*)(?!\[redacted\]|Bearer\b|Basic\b)(\"[^\"]*\"?|'[^']*'?|[^\s,;)}\]]+)",
)
_VENDOR_KEY: Final = re.compile(r"\b(?:sk|pk|rk|ghp|gho|xox[abp])[-_][A-Za-z0-9_-]{8,}")


def is_secret_key(key: str) -> bool:
    """Whether a key's name says that its value is a secret.

    `author`, `monkey` and `input_tokens` are not: whole words count, not substrings.
    """
    words = [word.lower() for word in _WORD.findall(key)]
    if any(word in _SECRET_WORDS for word in words):
        return True
    return any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words))


def redact_value(value: Any) -> Any:
    """A copy of JSON-like data in which the value under each secret-looking key is replaced."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if isinstance(key, str) and is_secret_key(key) else redact_value(item)
            for key, item in cast("Mapping[Any, Any]", value).items()
        }
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [redact_value(item) for item in cast("Sequence[Any]", value)]
    return value


def redact_json(text: str) -> str:
    """JSON text with the values under secret-looking keys replaced; other text as it is."""
    try:
        value = msgspec.json.decode(text)
        redacted = redact_value(value)
    except (msgspec.DecodeError, ValueError, RecursionError):
        # A model's arguments may break off: what looks like an object is cleaned as a sentence.
        return redact_text(text) if text.lstrip().startswith(("{", "[")) else text
    return text if redacted == value else msgspec.json.encode(redacted).decode()


def printable(text: str) -> str:
    """The text with what no encoder takes, lone surrogates, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def redact_text(text: str) -> str:
    """A sentence (an error's message) without credentials and without anybody's home path."""
    text = _URL_PASSWORD.sub(REDACTED, text)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    text = _KEYED.sub(rf"\1{REDACTED}", text)
    text = _VENDOR_KEY.sub(REDACTED, text)
    return _HOME.sub("~", text)
