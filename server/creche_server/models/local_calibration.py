"""What tools score for messages that need none, measured once and kept in a file.

A choice needs these thresholds, and they are a second's work of the model for each set of tools.
They hold for one model and one prompt, and say nothing of any user. Those of the default agent
come with the package.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import trio

Thresholds = Mapping[str, float]  # {tool's name: log-odds that a choice must exceed}

SHIPPED: Final = Path(__file__).with_name("local_calibration.json")
_MOST: Final = 32  # sets of tools


class Calibrations:
    """The thresholds that are known, by what the prompt of a choice begins with."""

    def __init__(self, model: str, file: Path | None = None, shipped: Path = SHIPPED) -> None:
        """`model` tells one model from others; what is measured is kept in `file`, if given."""
        self._model = model
        self._file = file
        self._shipped = shipped
        self._known: dict[str, Thresholds] | None = None  # {digest: thresholds}, once read

    async def get(self, prefix: str) -> Thresholds | None:
        """Those of this prefix, if anybody has measured them."""
        if self._known is None:
            self._known = await trio.to_thread.run_sync(self._read)
        return self._known.get(self._digest(prefix))

    async def put(self, prefix: str, thresholds: Thresholds) -> None:
        """Keep what was measured, also for the next start if the file can be written."""
        known = {} if self._known is None else self._known
        known[self._digest(prefix)] = thresholds
        while len(known) > _MOST:
            del known[next(iter(known))]  # the oldest
        self._known = known
        if self._file is not None:
            await trio.to_thread.run_sync(self._write, self._file, msgspec.json.encode(known))

    def _digest(self, prefix: str) -> str:
        return hashlib.sha256(f"{self._model}\0{prefix}".encode()).hexdigest()

    def _read(self) -> dict[str, Thresholds]:
        known: dict[str, Thresholds] = {}
        for file in filter(None, (self._shipped, self._file)):
            # A file that is not there, or is not as we write it, only costs another measurement.
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                known |= msgspec.json.decode(file.read_bytes(), type=dict[str, dict[str, float]])
        return known

    @staticmethod
    def _write(file: Path, data: bytes) -> None:
        with contextlib.suppress(OSError):
            new = file.with_name(f"{file.name}.{os.getpid()}")
            new.write_bytes(data)
            new.replace(file)
