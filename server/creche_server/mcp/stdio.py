"""An MCP server that is a process of one run: its pipes, and its end.

The library has such a transport, too, but keeps the process to itself and takes up to 6.5 s to
end it. A run must know whether it had to be killed, and within what time it is gone.
(modelcontextprotocol.io/specification/2025-11-25/basic/lifecycle#shutdown: close its input, wait,
SIGTERM, wait, SIGKILL. How long is ours to choose.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Final

import anyio
import mcp_types
import trio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.shared.message import SessionMessage

from creche import RunError
from creche_server.mcp.servers import ResolvedServer

_GRACE: Final = 1.0  # seconds after its input has ended, and after SIGTERM
_KILL_TIMEOUT: Final = 1.0  # seconds that the kernel may take for SIGKILL
_MOST_BYTES: Final = 16 * 1024 * 1024  # of one message

_Incoming = SessionMessage | Exception


@contextlib.asynccontextmanager
async def open_stdio(
    server: ResolvedServer,
    *,
    killed: Callable[[], None],
    outlived: Callable[[], None],
) -> AsyncIterator[
    tuple[MemoryObjectReceiveStream[_Incoming], MemoryObjectSendStream[SessionMessage]]
]:
    """Start the server's process: what it says, and what it is to be told, while the block lasts.

    Resource handling: leaving the block by its end closes the process's input and gives it a
    second to go, then another after SIGTERM. Leaving it by an error or a cancellation gives it
    none. Then its whole process group is killed. `killed` is called if it did not go by itself,
    `outlived` if it is not gone then either.

    Raises OSError if it cannot be started. What it writes to stderr is dropped: it may hold
    anything.
    """
    process = await trio.lowlevel.open_process(
        list(server.command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(server.environment),
        cwd=server.cwd,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told = False
    try:
        incoming_send, incoming = anyio.create_memory_object_stream[_Incoming](0)
        outgoing, outgoing_receive = anyio.create_memory_object_stream[SessionMessage](0)
        with incoming_send, incoming, outgoing, outgoing_receive:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read, process.stdout, incoming_send)
                nursery.start_soon(_write, process.stdin, outgoing_receive)
                yield incoming, outgoing
                outgoing.close()  # which ends its input, once it has read what was sent
                incoming.close()
                if not await _ends(process):
                    killed()
                    told = True
                    _signal(process, signal.SIGTERM)
                    await _ends(process)
                nursery.cancel_scope.cancel()
    finally:
        if process.returncode is None and not told:
            killed()
        # It may be reaped by now, but nothing has happened since: while its group has members
        # their number is nobody else's, and without any there is nobody to hit.
        _signal(process, signal.SIGKILL)
        with trio.move_on_after(_KILL_TIMEOUT, shield=True) as dying:
            await process.wait()
        if dying.cancelled_caught:
            outlived()
        with trio.CancelScope(shield=True):  # closing pipes does not wait
            await process.stdin.aclose()
            await process.stdout.aclose()


async def _ends(process: trio.Process) -> bool:
    with trio.move_on_after(_GRACE):
        await process.wait()
    return process.returncode is not None


def _signal(process: trio.Process, number: signal.Signals) -> None:
    # PermissionError is how macOS says that only a zombie is left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _read(
    stdout: trio.abc.ReceiveStream, incoming: MemoryObjectSendStream[_Incoming]
) -> None:
    """Pass on the messages of a process, one a line, until it says no more.

    Once nobody wants them it still reads: a process that cannot write cannot end in order.
    """
    with incoming:  # that it is closed tells the session that the server is gone
        line = bytearray()
        with contextlib.suppress(trio.BrokenResourceError):
            async for part in stdout:
                *ended, rest = part.split(b"\n")
                for end in ended:
                    line += end
                    await _pass_on(bytes(line), incoming)
                    line.clear()
                line += rest
                if len(line) > _MOST_BYTES:
                    msg = f"it sent a message of more than {_MOST_BYTES:,} bytes"
                    raise RunError(msg)


async def _pass_on(line: bytes, incoming: MemoryObjectSendStream[_Incoming]) -> None:
    try:
        message = mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValueError:
        return  # no message: programs do print things
    with contextlib.suppress(anyio.BrokenResourceError):  # nobody wants it any more
        await incoming.send(SessionMessage(message))


async def _write(
    stdin: trio.abc.SendStream, outgoing: MemoryObjectReceiveStream[SessionMessage]
) -> None:
    """Tell the process what there is to tell, then end its input."""
    async with stdin:
        with contextlib.suppress(trio.BrokenResourceError):
            async for message in outgoing:
                data = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                await stdin.send_all(data.encode() + b"\n")
