"""A run's question at a terminal: what is asked, and what somebody types as the answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec
import trio

from creche_server.cli.client import Client, RefusedCommandError
from creche_server.cli.screen import Screen

_LONGEST_LINE: Final = 1024 * 1024
_YES: Final = frozenset({"y", "yes"})
_NO: Final = frozenset({"n", "no"})


async def respond(client: Client, screen: Screen, interrupt: Mapping[str, Any]) -> str | None:
    """Ask at the terminal and send the answer, until one is taken.

    Returns the run that goes on; None if the question was answered elsewhere, or is over, or was
    declined and there is no run any more. Raises ClientError.
    """
    _show(screen, interrupt)
    while (answer := await _typed_in_time(client, screen, interrupt)) is not None:
        try:
            reply = await client.ask("input.respond", {"interrupt_id": interrupt["id"], **answer})
        except RefusedCommandError as error:
            screen.problem("not taken:", "yellow", str(error))
            if error.code != "invalid_argument":
                return None
        else:
            run_id: str | None = reply.get("parent_run_id") or reply.get("run_id")
            return run_id
    return None


async def _typed_in_time(
    client: Client, screen: Screen, interrupt: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the person types; None if somebody else answers meanwhile, or the run ends."""
    answer: dict[str, Any] | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await client.coming()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        answer = await _typed(screen, interrupt)
        nursery.cancel_scope.cancel()
    return answer


def _show(screen: Screen, interrupt: Mapping[str, Any]) -> None:
    screen.asked(interrupt.get("message") or "The run asks for something.")
    told = interrupt.get("metadata", {}).get("creche", {})
    if "tool_name" in told:
        screen.call(told["tool_name"], told["arguments"])


async def _typed(screen: Screen, interrupt: Mapping[str, Any]) -> dict[str, Any]:
    """What the person types, as it goes into the command."""
    schema: dict[str, Any] = interrupt.get("responseSchema") or {}
    is_approval = interrupt.get("reason") == "tool_call"
    hint = "[y/n]" if is_approval else _hint(schema)
    while True:
        screen.prompt(f"{hint}> " if hint else "> ")
        line = await _read_line()
        if line is None:
            screen.note("declined")
            return {"status": "cancelled"}
        line = line.strip()
        if not line:
            continue
        if is_approval and line.lower() in _YES | _NO:
            digest = interrupt.get("metadata", {}).get("creche", {}).get("digest")
            approved = {"approved": line.lower() in _YES}
            return {"response": approved | ({"digest": digest} if digest else {})}
        if not is_approval:
            return {"response": _value_of(line, schema)}


def _hint(schema: Mapping[str, Any]) -> str:
    """What kind of answer is wanted, in short."""
    if "enum" in schema:
        return " / ".join(str(each) for each in schema["enum"])
    kind = schema.get("type")
    if kind == "string":
        return ""
    if kind == "boolean":
        return "[y/n]"
    properties = schema.get("properties", {})
    if not properties:
        return f"as JSON, {kind}" if kind else "as JSON"
    fields = ", ".join(f'"{name}": {_kind_of(field)}' for name, field in properties.items())
    return f"as JSON, {{{fields}}}"


def _kind_of(schema: Any) -> str:
    if not isinstance(schema, dict):
        return "…"
    field = cast("dict[str, Any]", schema)
    choices = field.get("enum")
    return "|".join(map(str, choices)) if choices else str(field.get("type", "…"))


def _value_of(line: str, schema: Mapping[str, Any]) -> Any:
    """The answer that a line stands for: words where words are wanted, JSON otherwise."""
    if schema.get("type") == "string" or line in schema.get("enum", ()):
        return line
    if schema.get("type") == "boolean" and line.lower() in _YES | _NO:
        return line.lower() in _YES
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        return line  # which the server refuses in its words, unless it is what is wanted


async def _read_line() -> str | None:
    """The next line, None at the input's end. Can be cancelled."""
    if not sys.stdin.isatty():
        return await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True) or None
    # A terminal gives a line at a time, so nothing is read ahead and no thread is left waiting.
    await trio.lowlevel.wait_readable(sys.stdin.fileno())
    return os.read(sys.stdin.fileno(), _LONGEST_LINE).decode(errors="replace") or None
