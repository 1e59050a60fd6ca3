"""A program that a run starts: it dies with the block that it is opened in, and so with the run.

It leads a session of its own. When its block ends, its group is asked to terminate, and what is
left of that, wherever it has gone, is killed (see `_descendants`). Missed is only what a program
has put into another session before it ended by itself; and, elsewhere than on Linux, whatever has
left its group.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import trio

from creche._activities import Activities
from creche._audit import SecurityAudit
from creche._auditing import note_refusal
from creche._barrier import split
from creche._context import UserExecutionContext
from creche._descendants import (
    HeldProcesses,
    adopting,
    is_leaderless_group,
    kill_tree,
)
from creche._errors import LimitExceededError, RunError
from creche._limits import Limits
from creche._redaction import printable

# What a program is told of our environment, which holds our secrets, too.
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")
_LAST_OUTPUT: Final = 0.5  # seconds in which what a program said is read after its end
_RETRY_AFTER: Final = 1.0  # seconds, told to who meets the limit
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


class HasPlaces(Protocol):
    """A user's share, as far as it is about programs."""

    @property
    def programs(self) -> trio.CapacityLimiter: ...


class Programs:
    """Starts programs for one run. Made for it, and gone with it."""

    def __init__(
        self,
        context: UserExecutionContext,
        limits: Limits,
        *,
        share: HasPlaces,
        activities: Activities,
        audit: SecurityAudit | None,
        killed: Callable[[str], None],
        outlived: Callable[[str], None],
    ) -> None:
        """`killed` is told of a program that a cancel ended, `outlived` of one that would not."""
        self._context = context
        self._limits = limits
        self._share = share
        self._activities = activities
        self._audit = audit
        self._killed = killed
        self._outlived = outlived

    @contextlib.asynccontextmanager
    async def open_process(
        self,
        command: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] = NOTHING,
    ) -> AsyncIterator[trio.Process]:
        """See `RunContext.open_process`."""
        if isinstance(command, str) or not command:
            msg = "a command is a list of words, the first of which names the program: no shell"
            raise TypeError(msg)
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment = {**passed_on, **env}
        path = _found(command[0], environment, cwd)
        name = printable(Path(command[0]).name)
        with self._place(), self._activities.during("program", name):
            # Once this has begun, no cancel parts us from what it has started.
            process = await trio.lowlevel.open_process(
                adopting(path, command),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )
            try:
                yield process
            except BaseException as error:
                if process.returncode is None and split(error)[0] is not None:
                    self._killed(name)
                raise
            finally:
                await self._end(process, name)

    async def run_process(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float | None = None,  # noqa: ASYNC109  as the standard library has it
        most_bytes: int | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] = NOTHING,
    ) -> subprocess.CompletedProcess[bytes]:
        """See `RunContext.run_process`."""
        output = _Output(self._limits.program_bytes if most_bytes is None else most_bytes)
        opened = self.open_process(
            command,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=env,
        )
        with trio.move_on_after(math.inf if timeout is None else timeout) as within:
            async with opened as process:
                async with trio.open_nursery() as nursery:
                    if process.stdin is not None:
                        nursery.start_soon(_send, process.stdin, stdin)
                    for stream, parts in (
                        (process.stdout, output.out),
                        (process.stderr, output.err),
                    ):
                        assert stream is not None
                        nursery.start_soon(output.take, stream, parts, nursery.cancel_scope)
                    await process.wait()
                    # Whoever it has left behind may hold its pipes, and must not hold us.
                    nursery.cancel_scope.deadline = trio.current_time() + _LAST_OUTPUT
                if output.is_too_much:
                    msg = f"{command[0]} said more than {output.most:,} bytes, and was stopped"
                    raise RunError(msg, code="program_output")
            return subprocess.CompletedProcess(
                list(command), process.returncode or 0, bytes(output.out), bytes(output.err)
            )
        assert within.cancelled_caught
        msg = f"{command[0]} took longer than {timeout:g} s, and was stopped"
        raise RunError(msg, code="program_timeout")

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of the user's places; not waited for, since who waits may hold the others."""
        places, holder = self._share.programs, object()
        try:
            places.acquire_on_behalf_of_nowait(holder)
        except trio.WouldBlock:
            msg = f"a user may have at most {places.total_tokens:g} programs at once"
            note_refusal(
                self._audit,
                "limit_hit",
                self._context,
                resource="programs",
                operation="start a program",
                outcome=msg,
            )
            raise LimitExceededError(msg, retry_after=_RETRY_AFTER) from None
        try:
            yield
        finally:
            places.release_on_behalf_of(holder)

    async def _end(self, process: trio.Process, name: str) -> None:
        """Terminate it if it is alive, then kill it and all below it; bounded."""
        stop_timeout = self._limits.stop_timeout
        # Whoever has left its group is told nothing, and is nobody's any more when it has ended.
        with HeldProcesses() as held:
            # Asking for the code is what reaps: as long as there is none, its number is its own.
            if process.returncode is None:
                held.hold_below(process.pid)
                with trio.move_on_after(stop_timeout, shield=True):
                    os.killpg(process.pid, signal.SIGTERM)
                    await process.wait()
            if process.returncode is None:
                with trio.move_on_after(stop_timeout, shield=True):
                    await kill_tree(process.pid)
                    await process.wait()
            held.kill()
        if process.returncode is None:
            self._outlived(name)
        elif is_leaderless_group(process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):  # closing pipes does not wait
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    await stream.aclose()


class _Output:
    """What a program has said, on both of its streams together."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.out = bytearray()
        self.err = bytearray()

    @property
    def is_too_much(self) -> bool:
        return len(self.out) + len(self.err) > self.most

    async def take(
        self, stream: trio.abc.ReceiveStream, parts: bytearray, scope: trio.CancelScope
    ) -> None:
        """Take in what comes; cancel `scope` if that is too much."""
        async for part in stream:
            parts += part
            if self.is_too_much:
                scope.cancel()


async def _send(stream: trio.abc.SendStream, data: bytes) -> None:
    with contextlib.suppress(trio.BrokenResourceError):  # it need not read
        async with stream:
            await stream.send_all(data)


def _found(program: str, environment: Mapping[str, str], cwd: str | os.PathLike[str] | None) -> str:
    """Where that program is. Raises FileNotFoundError, since its own process could only exit."""
    names_a_file = Path(program).name != program
    wanted = Path(cwd) / program if cwd and names_a_file else program
    path = shutil.which(wanted, path=environment.get("PATH", os.defpath))
    if path is None:
        raise FileNotFoundError(errno.ENOENT, "there is no such program", program)
    return str(Path(path).absolute())
