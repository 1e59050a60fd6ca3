"""What a process has cost its CPU so far, to the nanosecond, exited threads included."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuReading:
    """CPU time that a process has used since it started, user and system together."""

    total_ns: int  # of the process: every thread it ever had
    live_ns: int  # of the threads that exist now, as schedstat tells it

    def __sub__(self, earlier: CpuReading) -> CpuReading:
        """Return what was used since `earlier`.

        `live_ns` may come out too small, even negative, where threads have ended in between.
        """
        return CpuReading(self.total_ns - earlier.total_ns, self.live_ns - earlier.live_ns)

    def __add__(self, other: CpuReading) -> CpuReading:
        """Return both together; of differences, since a reading alone is no amount."""
        return CpuReading(self.total_ns + other.total_ns, self.live_ns + other.live_ns)


def read_cpu(pid: int) -> CpuReading:
    """Read both clocks of the process `pid`.

    The first field of `/proc/PID/task/TID/schedstat` is a thread's run time in ns, and is gone
    with the thread. The process's CPU clock (clock_getcpuclockid(3)) sums the same counters and
    keeps those of the dead, so it is the figure to use; the other is there to check it by.

    Raises:
        ProcessLookupError: there is no such process.

    """
    live = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            live += int(thread.read_bytes().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # this thread ended while we looked
    # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of the kernel's posix-timers_types.h.
    clock = ~pid << 3 | 2
    try:
        return CpuReading(time.clock_gettime_ns(clock), live)
    except OSError as error:
        raise ProcessLookupError(pid) from error


def pin(core: int | None) -> None:
    """Keep the calling thread, and what it starts from now on, on one core; None does nothing."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def two_cores() -> tuple[int, int]:
    """Return the core for servers and the one for the load; the same twice if there is but one."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]
