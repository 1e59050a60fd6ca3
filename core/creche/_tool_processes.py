"""A tool in a process of its own: killed, with whatever it started, when its call ends.

The process lives for one call, inside the await of that call, so there is nothing to tidy up
later. What is killed is all that is below it, if the kernel is Linux (see `_descendants`), and its
process group, which it leads. That misses only what a tool has left in another session before it
ended its own process (`os._exit`, a crash), and elsewhere whatever has left the group; and what
somebody else was asked to start, such as a container. What goes over its pipes is JSON;
`_tool_worker` is the other end.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec
import trio

from creche._descendants import kill_tree
from creche._tools import Tool

# A fresh interpreter looks for modules where we do before it imports any.
_BOOTSTRAP: Final = (
    "import json, sys; job = json.loads(sys.stdin.buffer.readline()); sys.path[:] = job['path']; "
    "from creche._tool_worker import work; work(job)"
)


class ToolProcessError(Exception):
    """What a tool raised in its process, in words; or how the process itself ended."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What comes back from the process: a result, or a failure with its traceback."""

    content: str = ""  # what the model reads
    value: Any = None  # plain data
    failure: str | None = None  # in words
    traceback: str = ""


async def call_in_process(
    tool: Tool,
    arguments: str,
    *,
    most_bytes: int,
    kill_timeout: float,
    killed: Callable[[], None],
    outlived: Callable[[], None],
) -> Answer:
    """Call the tool with these arguments, which fit its schema, in a process of its own.

    The process and what it started are killed before this returns or raises; `killed` is called
    if that was in the middle of its work, on a cancel. What the kernel does not let die within
    `kill_timeout` seconds is left, and `outlived` is called to say so.

    Raises ToolProcessError for a failure of the tool, whatever way it found to end: an
    exception, an exit, a signal, a result that has no JSON or is over `most_bytes`.
    """
    job = {
        "path": sys.path,
        "module": tool.function.__module__,
        "name": tool.function.__qualname__,
        "arguments": arguments or "{}",
    }
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", _BOOTSTRAP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    received = bytearray()
    try:
        # The worker reads its job whole before it writes, so neither waits for the other. Its
        # input stays open: that it ends is how the worker learns that we are gone.
        with contextlib.suppress(trio.BrokenResourceError):
            await process.stdin.send_all(json.dumps(job).encode() + b"\n")
        async for part in process.stdout:
            received += part
            if len(received) > most_bytes:
                msg = f"its result is larger than {most_bytes} bytes"
                raise ToolProcessError(msg)
    except trio.Cancelled:
        killed()
        raise
    finally:
        with trio.move_on_after(kill_timeout, shield=True) as dying:
            await kill_tree(process.pid)
            await process.wait()
        if dying.cancelled_caught:
            outlived()
        with trio.CancelScope(shield=True):  # closing pipes does not wait
            await process.stdin.aclose()
            await process.stdout.aclose()
    return _checked(bytes(received), process.returncode)


def _checked(received: bytes, returncode: int | None) -> Answer:
    try:
        answer = msgspec.json.decode(received, type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ToolProcessError(_ending(returncode)) from None
    if answer.failure is None:
        return answer
    error = ToolProcessError(answer.failure)
    error.add_note(answer.traceback)
    raise error


def _ending(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        with contextlib.suppress(ValueError):
            return f"its process ended by {signal.Signals(-returncode).name}"
    return f"its process ended without a result (exit code {returncode})"
