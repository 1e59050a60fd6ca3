"""A sync tool in a thread, which Trio cannot interrupt: flag, bounded wait, abandon, name it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import trio

from creche._tools import StopFlag


async def call_in_thread(
    call: Callable[[], Any],
    stop: StopFlag,
    *,
    limiter: trio.CapacityLimiter,
    stop_timeout: float,
    abandon: Callable[[], None],
) -> Any:
    """Run `call` in a thread that is asked to stop when it is cancelled.

    Trio's own means do not do: an abandoned thread is left at the instant of the cancel, and
    `from_thread.check_cancelled` never raises under a shield. So the hop is shielded by a scope
    of its own, and on cancel the call has `stop_timeout` seconds to heed its flag before that
    scope is cancelled, which abandons the thread, and `abandon` is called to say so. The
    abandoned thread keeps its place in the limiter until it really ends.
    """
    outcome: list[Callable[[], Any]] = []
    begun = threading.Event()
    done = trio.Event()
    hop = trio.CancelScope(shield=True)

    def guarded() -> Callable[[], Any]:
        begun.set()
        if stop:
            return lambda: None  # nobody waits for it any more
        try:
            value = call()
        except KeyboardInterrupt as error:
            # Signals reach the main thread only, so this one is the tool's own doing.
            return functools.partial(_raise, RuntimeError(repr(error)))
        except BaseException as error:  # noqa: BLE001  boundary: one tool, handed on
            return functools.partial(_raise, error)
        return lambda: value

    async def hopping() -> None:
        with hop:
            outcome.append(
                await trio.to_thread.run_sync(guarded, abandon_on_cancel=True, limiter=limiter),
            )
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hopping)
        try:
            await done.wait()
        except trio.Cancelled:
            stop.set()
            if begun.is_set():
                with trio.move_on_after(stop_timeout, shield=True):
                    await done.wait()
                if not done.is_set():
                    abandon()
            hop.cancel()
            raise
    return outcome[0]()


def _raise(error: BaseException) -> NoReturn:
    raise error
