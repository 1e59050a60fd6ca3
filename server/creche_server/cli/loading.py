"""The application at MODULE:NAME, and what is said where it cannot be had."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

from creche_server.application import Application
from creche_server.serve import check_provided
from creche_server.settings import Settings


class AgentsNotFoundError(Exception):
    """What was said to hold agents does not."""


def load_application(spec: str, settings: Settings) -> Application:
    """The application at MODULE:NAME, or the agents there; looked for from the working directory.

    Raises AgentsNotFoundError, which says what to write, also where an agent wants what a server
    with these settings does not have; for a module that cannot be imported
    it goes on with the traceback, from the module's own first line on.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        msg = f"{spec!r} is not MODULE:NAME, such as myapp:agents"
        raise AgentsNotFoundError(msg)
    here = os.getcwd()  # noqa: PTH109  the path is for the import system
    sys.path.insert(0, here)  # creche: shared the operator's agents are found there; once, on start
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    # Boundary: somebody's module, which may do anything, sys.exit() included.
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}.",
        ):
            msg = f"there is no module {module_name!r} here ({here})"
            raise AgentsNotFoundError(msg) from error
        raise AgentsNotFoundError(_broken(module_name, error)) from error
    if not hasattr(module, attribute):
        msg = f"{module_name} has no {attribute!r}"
        raise AgentsNotFoundError(msg)
    found = getattr(module, attribute)
    try:
        application = found if isinstance(found, Application) else Application(agents=found)
        check_provided(application, settings)
    except (TypeError, ValueError) as error:
        msg = f"{spec}: {error}"
        raise AgentsNotFoundError(msg) from error
    if application is not found and not application.registry:
        msg = f"{spec}: there is no agent in it"
        raise AgentsNotFoundError(msg)
    return application


def _broken(module_name: str, error: BaseException) -> str:
    """What a module's import raised, in a line, and its traceback without our own part of it."""
    told = traceback.TracebackException.from_exception(error)
    own = [
        frame
        for frame in told.stack
        if frame.filename not in {__file__, importlib.__file__}
        and not frame.filename.startswith("<frozen")
    ]
    told.stack[:] = own
    if isinstance(error, SyntaxError) and error.filename:
        where, line, words = error.filename, error.lineno, error.msg
    elif own:
        where, line, words = own[0].filename, own[0].lineno, str(error)
    else:
        where, line, words = module_name, None, str(error)
    place = f"{Path(where).name} line {line}" if line else where
    headline = f"cannot import {module_name}: {type(error).__name__}: {words} ({place})"
    trace = told.format(chain=False) if own else told.format_exception_only()
    return f"{headline}\n{''.join(trace).rstrip()}"
