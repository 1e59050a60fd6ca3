"""The commands and their flags; what each does is in a module of its own."""

from __future__ import annotations

import os
import sys
import tomllib
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from cyclopts import App, CycloptsError, Parameter, validators
from pydantic_settings import SettingsError

from creche_server.cli.setting_errors import explain, unknown_names
from creche_server.settings import CONFIG_FILE, Settings, load_settings

app = App(  # creche: shared commands are added on import only, and a process runs one
    name="creche",
    help="Runs AI agents for many users at once.",
    version=lambda: version("creche"),
    backend="trio",
)

Data = Annotated[Path | None, Parameter(help="the data directory (default .creche)")]


def run() -> None:
    """Run the command line, and end the process with its exit code."""
    try:
        sys.exit(app(exit_on_error=False))
    except CycloptsError:  # which was told
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command
def serve(
    agents: str | None = None,
    /,
    *,
    host: str | None = None,
    port: int | None = None,
    database: str | None = None,
    data: Data = None,
    model: str | None = None,
) -> int:
    """Serve the web page, the WebSocket and the HTTP API on one port.

    Parameters
    ----------
    agents
        Your own agents, as MODULE:NAME: a mapping of names to agent classes, a registry, one
        agent class, or an Application. They are served beside `assistant`, but one of that name
        replaces it.
    host
        The address to listen on (default 127.0.0.1).
    port
        The port to listen on (default 8000); 0 takes any that is free and prints it.
    database
        A database URL, sqlite:///PATH or postgresql://USER@HOST/NAME (default: SQLite in the
        data directory).
    model
        local, scripted or openai:NAME (default local).
    """
    from creche_server.cli.serving import serve_until_signalled  # noqa: PLC0415

    settings = _settings(host=host, port=port, database=database, data=data, model=model)
    for sentence in unknown_names(os.environ):
        sys.stderr.write(f"creche: {sentence}\n")
    return serve_until_signalled(settings, agents)


@app.command
def chat(
    *question: str,
    thread: str | None = None,
    last: Annotated[bool, Parameter(negative="")] = False,
    agent: str | None = None,
    user: str | None = None,
    data: Data = None,
) -> int:
    """Ask the running server; without a question, talk with it.

    Parameters
    ----------
    question
        What to ask, on a new thread unless --thread or --last says which.
    thread
        The thread to go on with; without a question its history is shown first.
    last
        Go on with the latest thread.
    agent
        Whom to ask (default: the first agent that the server has).
    user
        Whom to speak for (default: the user that the server's own link is for).
    """
    from creche_server.cli.chat import chat as start_chat  # noqa: PLC0415

    settings = _settings(data=data)
    words = " ".join(question) if question else None
    return start_chat(settings.data, words, thread=thread, last=last, agent=agent, user=user)


@app.command
def threads(
    *,
    user: str | None = None,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=1000))] = 50,
    format: Literal["text", "json"] = "text",  # noqa: A002  the flag's name
    data: Data = None,
) -> int:
    """List threads, the latest first: id, when it changed, how many runs, title.

    Parameters
    ----------
    user
        Whose (default: the user that the server's own link is for).
    limit
        How many at most.
    format
        text or json.
    """
    from creche_server.cli.threads import print_threads  # noqa: PLC0415

    return print_threads(_settings(data=data).data, user=user, limit=limit, form=format)


@app.command
def top(
    *,
    user: str | None = None,
    once: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    every: Annotated[float, Parameter(validator=validators.Number(gte=0.2, lte=3600))] = 1.0,
    data: Data = None,
) -> int:
    """Show what runs do right now, until ^C: everybody's for an operator, else one's own.

    Where the output is no terminal, it is shown once, with whole ids.

    Parameters
    ----------
    user
        Whom to look for (default: the user that the server's own link is for); who is an operator
        is said in the server's settings.
    once
        Show it once.
    json
        Print what the server says, once.
    every
        Seconds between two looks.
    """
    from creche_server.cli.top import show_top  # noqa: PLC0415

    return show_top(_settings(data=data).data, user=user, once=once, as_json=json, every=every)


@app.command
def token(*, user: str, days: float = 30.0, data: Data = None) -> int:
    """Print a bearer token that speaks for a user.

    Parameters
    ----------
    user
        The user's id.
    days
        How long the token is good for, at most 3650.
    """
    from creche_server.cli.access import print_token  # noqa: PLC0415

    return print_token(_settings(data=data).data, user, days)


@app.command
async def link(*, data: Data = None) -> int:
    """Print a fresh one-time link to the running server's page."""
    from creche_server.cli.access import print_link  # noqa: PLC0415

    return await print_link(_settings(data=data).data)


audit = App(  # creche: shared the command line, built when it is imported
    name="audit", help="Look at the audit: who tried what was not theirs."
)
app.command(audit)

AuditDatabase = Annotated[
    str | None, Parameter(help="the database that holds the audit (default: the data directory)")
]
Since = Annotated[datetime | None, Parameter(help="what happened then or later, in UTC")]
Until = Annotated[datetime | None, Parameter(help="what happened before")]


@audit.command
async def verify(*, data: Data = None, database: AuditDatabase = None) -> int:
    """Find any record that was edited, deleted, moved or cut off: exit code 1 if there is one."""
    from creche_server.cli.audit import verify_audit  # noqa: PLC0415

    return await verify_audit(_audit_settings(data, database))


@audit.command(name="list")
async def list_(
    *,
    user: str | None = None,
    kind: str | None = None,
    since: Since = None,
    until: Until = None,
    limit: int = 100,
    format: Literal["text", "json"] = "text",  # noqa: A002  the flag's name
    data: Data = None,
    database: AuditDatabase = None,
) -> int:
    """Print records by the time that they show, oldest first; as json in the chain's order.

    Parameters
    ----------
    user
        Who acted.
    kind
        Such as token_refused; a wrong one is told which there are.
    limit
        Print the latest so many.
    format
        json is one object a line, with the hashes.
    """
    from creche_server.cli.audit import asked, list_audit  # noqa: PLC0415

    query = partial(asked, user=user, kind=kind, since=since, until=until, limit=limit)
    return await list_audit(_audit_settings(data, database), query, format)


@audit.command
async def stats(
    *,
    user: str | None = None,
    since: Since = None,
    until: Until = None,
    data: Data = None,
    database: AuditDatabase = None,
) -> int:
    """Print how often each kind of thing happened.

    Parameters
    ----------
    user
        Who acted.
    """
    from creche_server.cli.audit import asked, count_audit  # noqa: PLC0415

    query = partial(asked, user=user, since=since, until=until)
    return await count_audit(_audit_settings(data, database), query)


def _audit_settings(data: Path | None, database: str | None) -> Settings:
    return _settings(data=data, database=database, audit="database" if database else None)


@app.command
def scan(
    *paths: Path,
    format: Literal["text", "json", "sarif", "github"] = "text",  # noqa: A002  the flag's name
    report: bool = False,
    rules: bool = False,
) -> int:
    """Find in Python source what runs of different users would share.

    Exits with 0 if nothing was found, 1 if something was, 2 if it could not be looked at. A
    comment on the line, `# creche: shared REASON`, explains what is shared on purpose.

    Parameters
    ----------
    paths
        Files, and folders with all that is below them.
    format
        How findings are told: to people, to programs, or to GitHub's runner.
    report
        Add isolation score, context-propagation coverage and global-state count.
    rules
        Explain the rules instead.
    """
    from creche_server.cli.scan import print_rules  # noqa: PLC0415
    from creche_server.cli.scan import scan as scan_paths  # noqa: PLC0415

    if rules:
        return print_rules()
    if not paths:
        sys.stderr.write("creche: scan what? Name files or folders: creche scan PATH...\n")
        return 2
    return scan_paths(paths, format, report=report)


def _settings(**flags: object) -> Settings:
    """The settings, or the end of the process with a sentence for each that is wrong."""
    try:
        return load_settings(**flags)
    except pydantic.ValidationError as error:
        sentences = explain(error, flags, os.environ)
    except SettingsError as error:
        sentences = [str(error)]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        sentences = [f"{CONFIG_FILE}: {error}"]
    except OSError as error:
        sentences = [f"{CONFIG_FILE}: {error.strerror}"]
    for sentence in sentences:
        sys.stderr.write(f"creche: {sentence}\n")
    sys.exit(2)
