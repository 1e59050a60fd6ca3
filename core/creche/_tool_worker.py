"""What runs in the process of a `process=True` tool: one call, its answer, the end.

The other end is `_tool_processes`, which kills this process once it has the answer.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Final

import msgspec

from creche._descendants import BETWEEN_LOOKS, adopt_orphans, kill_children
from creche._tool_processes import Answer
from creche._tools import Tool, content_of, failure_words, tool

_ENOUGH: Final = 1024
_KILL_TIMEOUT: Final = 5.0  # seconds


def work(job: Mapping[str, str]) -> None:
    """Make the call that `job` describes, and write its answer where our output went.

    Never returns: who has the answer kills us, and finds what the tool has left behind below us.
    """
    adopt_orphans()
    output, lifeline = os.dup(1), os.dup(0)
    os.dup2(2, 1)  # what the tool prints is no answer
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123  bootstrap: one import fewer
        os.dup2(nothing.fileno(), 0)
    # A process that the tool forks must not keep the answer's pipe open.
    os.register_at_fork(after_in_child=functools.partial(os.close, output))
    threading.Thread(  # creche: shared ends with this process, which is one call
        target=_end_with, args=(lifeline,), daemon=True
    ).start()
    answer = msgspec.json.encode(_answer(job))
    sys.stdout.flush()
    with os.fdopen(output, "wb") as stream:
        stream.write(answer)
    while True:
        signal.pause()


def _end_with(lifeline: int) -> None:
    """Whoever started us holds the other end; when it is gone, so are we and what we started."""
    while os.read(lifeline, _ENOUGH):
        pass
    ends = time.monotonic() + _KILL_TIMEOUT
    while kill_children(os.getpid()) and time.monotonic() < ends:
        time.sleep(BETWEEN_LOOKS)
    os.killpg(0, signal.SIGKILL)


def _answer(job: Mapping[str, str]) -> Answer:
    try:
        called = getattr(importlib.import_module(job["module"]), job["name"])
        if not isinstance(called, Tool):  # the decorator was called by hand
            called = tool(called)
        checked = msgspec.json.decode(job["arguments"], type=called.arguments)
        value = called.function(
            **{field: getattr(checked, field) for field in checked.__struct_fields__}
        )
        plain = msgspec.json.decode(msgspec.json.encode(value, enc_hook=str))
        return Answer(content=content_of(value), value=plain)
    except BaseException as error:  # noqa: BLE001  boundary: one tool, told to who waits
        return Answer(
            failure=failure_words(error),
            traceback="".join(traceback.format_exception(error)),
        )
