"""Which MCP servers the settings name, and what they are handed of our environment."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator

from creche import CrecheError

# All that a server's process has of our environment: where programs are, who and where one is.
_PASSED_ON: Final = (
    *("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER"),
)
_REFERENCE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

# No two underscores in a row, and none at the end: those part it from the names of its tools.
Name = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9]+([_-][A-Za-z0-9]+)*$", max_length=32)
]


class McpServerError(CrecheError):
    """An MCP server cannot be used as the settings have it; the message says what to change."""


class McpServer(BaseModel):
    """One server: a program that is started for each run, or an address."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    command: tuple[str, ...] = ()
    env: dict[str, SecretStr] = Field(default_factory=dict)
    cwd: Path | None = None
    url: str | None = None
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    assistant: bool = True  # whether the agent `assistant` has its tools

    @model_validator(mode="after")
    def _is_one_of_two(self) -> McpServer:
        if bool(self.command) == (self.url is not None):
            msg = "give either `command`, a list, or `url`"
            raise ValueError(msg)
        if self.headers and self.command:
            msg = "`headers` go with a `url`"
            raise ValueError(msg)
        if (self.env or self.cwd) and self.url is not None:
            msg = "`env` and `cwd` go with a `command`"
            raise ValueError(msg)
        if self.url is not None and not _is_http(self.url):
            msg = "`url` is no address such as https://mcp.example.com/mcp"
            raise ValueError(msg)
        return self


class McpSettings(BaseModel):
    """`[mcp]` in creche.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    servers: dict[Name, McpServer] = Field(default_factory=dict)

    @property
    def for_assistant(self) -> tuple[str, ...]:
        return tuple(name for name, server in self.servers.items() if server.assistant)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedServer:
    """A server with its secrets, which its `repr` does not show."""

    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(repr=False)  # whole
    cwd: Path | None = None
    url: str | None = dataclasses.field(default=None, repr=False)
    headers: Mapping[str, str] = dataclasses.field(repr=False)


def resolved_servers(
    settings: McpSettings, environment: Mapping[str, str]
) -> dict[str, ResolvedServer]:
    """The servers by name, each `${NAME}` in `env` and `headers` replaced from the environment.

    Raises McpServerError for a name that the environment does not have.
    """
    return {name: _resolved(name, each, environment) for name, each in settings.servers.items()}


def _resolved(name: str, server: McpServer, environment: Mapping[str, str]) -> ResolvedServer:
    def filled(where: str, values: Mapping[str, SecretStr]) -> dict[str, str]:
        return {
            key: _filled(f"mcp.servers.{name}.{where}.{key}", value.get_secret_value(), environment)
            for key, value in values.items()
        }

    passed_on = {key: environment[key] for key in _PASSED_ON if key in environment}
    handed = {**passed_on, **filled("env", server.env)}
    command = server.command
    if command and (program := found_program(command[0], server.cwd, handed)) is not None:
        command = (program, *command[1:])
    return ResolvedServer(
        command=command,
        environment=handed,
        cwd=server.cwd,
        url=server.url,
        headers=filled("headers", server.headers),
    )


def found_program(name: str, cwd: Path | None, environment: Mapping[str, str]) -> str | None:
    """How a server's process can be started by this name: as it is, by a whole path, or not.

    A plain name is looked for on the PATH that the process is handed, then beside our own
    interpreter: what is installed in the environment of `creche` need not be activated.
    """
    if "/" in name:  # `cwd` is entered before it is looked for
        return name if shutil.which(Path(cwd or "", name)) else None
    if shutil.which(name, path=environment.get("PATH", os.defpath)):
        return name
    return shutil.which(name, path=str(Path(sys.executable).parent))


def _filled(where: str, text: str, environment: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in environment:
            msg = f"{where}: the environment has no {match[1]}"
            raise McpServerError(msg)
        return environment[match[1]]

    return _REFERENCE.sub(value, text)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
