"""`creche serve`: the process around the server: signals, exit codes, and what it prints."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from typing import Final

import trio
from sqlalchemy.exc import SQLAlchemyError

from creche import CrecheError, leaves
from creche_server.application import Application
from creche_server.cli.loading import AgentsNotFoundError, load_application
from creche_server.data_directory import DataDirectoryError
from creche_server.database import DatabaseUrlError
from creche_server.models import UnknownModelError
from creche_server.serve import Listening, Stop, serve
from creche_server.settings import Settings
from creche_server.telemetry import configure_logging
from creche_server.tracing import TracingUnavailableError

_log: Final = logging.getLogger("creche.serve")

# Events are many, small and acyclic: frequent full collections double the cost of a thousand
# connections, and rare ones pause for too long (measured; benchmarks/stream.py).
_GC_THRESHOLDS: Final = (10_000, 50, 100)
_NOTICED: Final = 0.3  # seconds after which somebody wonders whether their ^C was heard


_EXPLAIN_THEMSELVES: Final = (
    AgentsNotFoundError,
    DataDirectoryError,
    DatabaseUrlError,
    CrecheError,
    OSError,
    TracingUnavailableError,
    UnknownModelError,
)


def serve_until_signalled(settings: Settings, agents: str | None) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP. Returns an exit code: 0, or 1 with words."""
    configure_logging(settings.log_level, sys.stderr)
    try:
        application = load_application(agents, settings) if agents is not None else None
        loaded = () if agents is None else (agents.partition(":")[0],)
        trio.run(partial(_serve, settings, application, loaded))
    except KeyboardInterrupt:  # before the server took the signals over
        return 130
    # Boundary: the process. What a person can mend is told in a sentence; the rest as it is.
    except BaseException as error:
        sentence = _explained(next(leaves(error)), settings)
        if sentence is None:
            raise
        sys.stderr.write(f"creche: {sentence}\n")
        return 1
    _say("creche: stopped\n")
    return 0


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # after a SIGHUP there may be nobody to tell
        sys.stdout.write(words)
        sys.stdout.flush()


def _explained(error: BaseException, settings: Settings) -> str | None:
    """What went wrong and what to do, if this is something that a person can mend."""
    if isinstance(error, SQLAlchemyError):
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        return f"the database cannot be used: {reason}"
    if isinstance(error, ModuleNotFoundError) and error.name == "psycopg":
        return "PostgreSQL needs its driver: pip install 'psycopg[binary]'"
    if isinstance(error, socket.gaierror):
        return f"--host: {settings.host!r} cannot be found: {error.strerror}"
    if isinstance(error, OSError) and error.filename is None:
        return _explained_listening(error, settings)
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, _EXPLAIN_THEMSELVES) else None


def _explained_listening(error: OSError, settings: Settings) -> str:
    """What the system said to the address, which it does not repeat."""
    if error.errno == errno.EADDRINUSE:
        return f"port {settings.port} is taken; choose another with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host: {settings.host} is no address of this machine"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"port {settings.port} is not for ordinary users; choose another with --port"
    return f"{settings.host} port {settings.port}: {error.strerror or error}"


async def _serve(
    settings: Settings, application: Application | None, loaded: tuple[str, ...]
) -> None:
    stop = Stop()
    async with trio.open_nursery() as nursery:
        await nursery.start(_heed_signals, stop, settings.shutdown_timeout)
        await serve(settings, application, stop=stop, announce=_announce, loaded=loaded)
        nursery.cancel_scope.cancel()


async def _heed_signals(
    stop: Stop,
    shutdown_timeout: float,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which is what `nohup` asks for
        numbers.append(signal.SIGHUP)
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(*numbers) as signals:
            task_status.started()
            async for number in signals:
                if stop.soon.is_set():
                    stop.now.set()
                    continue
                _log.info("%s: shutting down", signal.Signals(number).name)
                _exit_when_overdue(shutdown_timeout)
                stop.soon.set()
                if number == signal.SIGINT and sys.stderr.isatty():
                    nursery.start_soon(_tell_of_the_short_way)


async def _tell_of_the_short_way() -> None:
    await trio.sleep(_NOTICED)
    sys.stderr.write("creche: ^C again to stop now\n")


def _exit_when_overdue(seconds: float) -> None:
    """End the process regardless, should some code of an agent's refuse to end.

    Trio cannot abandon a task; past the limit the runs that are left count as lost, and the
    next start says so.
    """

    def overdue() -> None:
        sys.stderr.write(f"creche: not everything ended within {seconds:g} s; leaving anyway\n")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, overdue)  # creche: shared it must outlast all, to end them
    timer.daemon = True
    timer.start()


def _announce(listening: Listening) -> None:
    gc.collect()
    gc.freeze()  # creche: shared once, when the process has started; about memory, not its content
    gc.set_threshold(*_GC_THRESHOLDS)  # creche: shared once, when the process has started
    _say(f"creche: listening on {listening.url}\ncreche: open {listening.page_link}\n")
