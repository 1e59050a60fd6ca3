"""`creche serve`: the process around the server: signals, exit codes, and what it prints."""

from __future__ import annotations

import errno
import gc
import importlib
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, cast

import trio
from sqlalchemy.exc import SQLAlchemyError

from creche import AgentClassRegistry, CrecheError, leaves
from creche_server.data_directory import DataDirectoryError
from creche_server.models import UnknownModelError
from creche_server.serve import Listening, Stop, serve
from creche_server.settings import Settings
from creche_server.telemetry import configure_logging

_log: Final = logging.getLogger("creche.serve")

# Events are many, small and acyclic: frequent full collections double the cost of a thousand
# connections, and rare ones pause for too long (measured; benchmarks/stream.py).
_GC_THRESHOLDS: Final = (10_000, 50, 100)


class AgentsNotFoundError(Exception):
    """What was said to hold agents does not."""


_EXPLAIN_THEMSELVES: Final = (
    AgentsNotFoundError,
    DataDirectoryError,
    CrecheError,
    OSError,
    UnknownModelError,
)


def serve_until_signalled(settings: Settings, agents: str | None) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code: 0, or 1 with a word about why."""
    configure_logging(settings.log_level, sys.stderr)
    try:
        registry = load_agents(agents) if agents is not None else None
        trio.run(partial(_serve, settings, registry))
    except KeyboardInterrupt:  # before the server took the signals over
        return 130
    # Boundary: the process. What a person can mend is told in a sentence; the rest as it is.
    except BaseException as error:
        sentence = _explained(next(leaves(error)), settings)
        if sentence is None:
            raise
        sys.stderr.write(f"creche: {sentence}\n")
        return 1
    return 0


def _explained(error: BaseException, settings: Settings) -> str | None:
    """What went wrong and what to do, if this is something that a person can mend."""
    if isinstance(error, SQLAlchemyError):
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        return f"the database cannot be used: {reason}"
    if isinstance(error, ModuleNotFoundError) and error.name == "psycopg":
        return "PostgreSQL needs its driver: pip install 'creche[postgres]'"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"port {settings.port} is taken; choose another with --port"
    return str(error) if isinstance(error, _EXPLAIN_THEMSELVES) else None


async def _serve(settings: Settings, registry: AgentClassRegistry | None) -> None:
    stop = Stop()
    async with trio.open_nursery() as nursery:
        await nursery.start(_heed_signals, stop, settings.shutdown_timeout)
        await serve(settings, registry, stop=stop, announce=_announce)
        nursery.cancel_scope.cancel()


async def _heed_signals(
    stop: Stop,
    shutdown_timeout: float,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            if stop.soon.is_set():
                stop.now.set()
                continue
            _log.info("%s: shutting down", signal.Signals(number).name)
            _exit_when_overdue(shutdown_timeout)
            stop.soon.set()


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
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    sys.stdout.write(f"creche: listening on {listening.url}\n")
    sys.stdout.write(f"creche: open {listening.page_link}\n")
    sys.stdout.flush()


def load_agents(spec: str) -> AgentClassRegistry:
    """The agents at MODULE:NAME, looked for from the working directory on.

    Raises AgentsNotFoundError, which says what to write.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        msg = f"{spec!r} is not MODULE:NAME, such as myapp:agents"
        raise AgentsNotFoundError(msg)
    # creche's own command line, before the server and its first run.
    here = os.getcwd()  # noqa: PTH109  the path is for the import system
    sys.path.insert(0, here)  # creche: shared the operator's agents are found there; once, on start
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise
        msg = f"there is no module {module_name!r} here ({os.getcwd()})"  # noqa: PTH109
        raise AgentsNotFoundError(msg) from error
    found: Any = getattr(module, attribute, None)
    try:
        return _registry(attribute, found)
    except (TypeError, ValueError) as error:
        msg = f"{spec}: {error}"
        raise AgentsNotFoundError(msg) from error


def _registry(attribute: str, found: Any) -> AgentClassRegistry:
    if isinstance(found, AgentClassRegistry):
        return found
    if isinstance(found, Mapping):
        return AgentClassRegistry(cast("Mapping[str, Any]", found))
    if inspect.isclass(found):
        agent_class: Any = found  # the registry says whether it is one
        return AgentClassRegistry({found.__name__.lower(): agent_class})
    msg = f"{attribute!r} must be a mapping of names to agent classes, a registry or a class"
    raise TypeError(msg)
