"""What is wrong with the configuration, in sentences: where it was said, what, and why not."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from creche import redact_text
from creche_server.settings import CONFIG_FILE, PREFIX, Settings

_LONGEST = 60  # characters of a value
_MCP: Final = "mcp"
# {what pydantic calls a mistake in a server: what to write}
_OF_SERVERS: Final = MappingProxyType(
    {
        "tuple_type": 'must be a list of words, such as ["mcp-server-time"]',
        "string_pattern_mismatch": "a server's name has letters and digits, with single - or _ "
        "between them",
    }
)


def explain(
    error: ValidationError,
    flags: Mapping[str, object],
    environment: Mapping[str, str],
) -> list[str]:
    """A sentence for each problem. `flags` are those of the command line, None if not given."""
    known = set(Settings.model_fields)
    sentences: list[str] = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if name == _MCP:
            sentences.append(_of_a_server(problem, flags, environment))
            continue
        if problem["type"] == "extra_forbidden":
            guess = _guess(name, known)
            sentences.append(f"{CONFIG_FILE}: there is no setting {name!r}{guess}")
            continue
        source = _source(name, flags, environment)
        words = problem["msg"].removeprefix("Value error, ")
        value = redact_text(str(problem["input"]))[:_LONGEST]
        sentences.append(f"{source}: {value!r}: {words[:1].lower()}{words[1:]}")
    return sentences


def _of_a_server(
    problem: ErrorDetails, flags: Mapping[str, object], environment: Mapping[str, str]
) -> str:
    """Without the value, in which there may be secrets."""
    path = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    source = _source(_MCP, flags, environment).removesuffix(_MCP)
    if problem["type"] == "extra_forbidden":
        return f"{source}there is no setting {path!r}"
    words = _OF_SERVERS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return f"{source}{path}: {words[:1].lower()}{words[1:]}"


def unknown_names(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each name in the environment that looks like a setting and is none."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    return [
        f"{name} in the environment is no setting{_guess(name, known)}"
        for name in sorted(environment)
        if name.upper().startswith(PREFIX) and name.upper() not in known
    ]


def _source(name: str, flags: Mapping[str, object], environment: Mapping[str, str]) -> str:
    """Where a setting's value is from: the order is that of `Settings`."""
    if flags.get(name) is not None:
        return f"--{name}"
    variable = f"{PREFIX}{name.upper()}"
    if variable in {found.upper() for found in environment}:
        return variable
    return f"{CONFIG_FILE}: {name}"


def _guess(name: str, known: set[str]) -> str:
    close: list[Any] = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
