"""`assert_no_orphans`: what an agent leaves behind is named, with where it stands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from tests.small_world import context, infrastructure
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import Limits, RunContext, ToolContext, open_supervisor, tool
from creche.testing import assert_no_orphans

HAS_PROC = Path("/proc/self/task").is_dir()


async def linger() -> None:
    """What stays behind."""
    await trio.sleep_forever()


async def test_a_clean_agent_leaves_nothing() -> None:
    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers, in a thread."""
        return a + b

    async def clean(run: RunContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
        await run.call_tool("add", {"a": 1, "b": 2})
        await trio.run_process([sys.executable, "-c", ""])
        await run.spawn("hello", "go")

    async with open_supervisor(infrastructure(tools=(add,), clean=clean)) as supervisor:
        async with assert_no_orphans(supervisor=supervisor):
            run = await supervisor.start(context(), "clean", "go")
            assert (await run.ended()).status == "success"


@pytest.mark.parametrize("whole", [True, False], ids=["the process", "a nursery"])
async def test_a_task_in_a_nursery_that_outlives_the_run_is_named(
    autojump_clock: MockClock, whole: bool
) -> None:
    async with trio.open_nursery() as outside:

        async def leave_a_task(run: RunContext) -> None:
            outside.start_soon(linger, name="who knows what")

        async with open_supervisor(infrastructure(leaving=leave_a_task)) as supervisor:
            with pytest.raises(AssertionError) as caught:
                async with assert_no_orphans(None if whole else outside):
                    await (await supervisor.start(context(), "leaving", "go")).ended()
        outside.cancel_scope.cancel()
    left = str(caught.value).splitlines()
    assert left[0] == "left behind:"
    # Whether it had its first turn yet or not.
    assert left[1].startswith(f"- task {__name__}.linger at {__name__}.linger")
    assert len(left) == 2


async def test_a_system_task_is_named(autojump_clock: MockClock) -> None:
    scope = trio.CancelScope()
    gone = trio.Event()

    async def system() -> None:
        with scope:
            await linger()
        gone.set()

    async def leave_a_system_task(run: RunContext) -> None:
        trio.lowlevel.spawn_system_task(system)
        await wait_all_tasks_blocked()

    async with open_supervisor(infrastructure(leaving=leave_a_system_task)) as supervisor:
        with pytest.raises(AssertionError, match=rf"system at {__name__}.linger:\d+$"):
            async with assert_no_orphans():
                await (await supervisor.start(context(), "leaving", "go")).ended()
        scope.cancel()
        await gone.wait()


async def test_a_thread_that_was_abandoned_is_named_with_where_it_stands() -> None:
    free = threading.Event()

    def be_stuck() -> None:
        free.wait()

    @tool
    def stuck(context: ToolContext) -> str:
        """Heed nothing."""
        be_stuck()
        return ""

    async def leave_a_thread(run: RunContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.call_tool, "stuck", {})
            await trio.sleep(0.05)
            nursery.cancel_scope.cancel()

    limits = Limits(stop_timeout=0.01)
    made = infrastructure(tools=(stuck,), limits=limits, leaving=leave_a_thread)
    async with open_supervisor(made) as supervisor:
        with pytest.raises(AssertionError) as caught:
            async with assert_no_orphans():
                await (await supervisor.start(context(), "leaving", "go")).ended()
        assert f"be_stuck:{be_stuck.__code__.co_firstlineno + 1}" in str(caught.value)
        assert "- thread " in str(caught.value)
        async with assert_no_orphans():  # what was there before is not minded
            pass
        free.set()


@pytest.mark.skipif(not HAS_PROC, reason="there is no /proc to ask")
async def test_a_process_is_named_and_one_below_it_too() -> None:
    children: list[subprocess.Popen[bytes]] = []

    async def leave_a_process(run: RunContext) -> None:
        inner = "import subprocess, sys; subprocess.run(['sleep', '600'])"
        command = [sys.executable, "-c", inner]
        child = subprocess.Popen(command, start_new_session=True)  # noqa: ASYNC220  quick, and no task
        children.append(child)

    async with open_supervisor(infrastructure(leaving=leave_a_process)) as supervisor:
        try:
            with pytest.raises(AssertionError) as caught:
                async with assert_no_orphans():
                    await (await supervisor.start(context(), "leaving", "go")).ended()
                    await trio.to_thread.run_sync(wait_for_child, children[0].pid)
        finally:
            os.killpg(children[0].pid, signal.SIGKILL)
            children[0].wait()
    said = str(caught.value)
    assert f"process {children[0].pid} (python" in said
    assert " (sleep)" in said


def wait_for_child(pid: int) -> None:
    """Return once that process has started `sleep`."""
    while True:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "sleep":
                return
        threading.Event().wait(0.005)


async def test_a_run_that_goes_on_is_named_with_what_it_does(autojump_clock: MockClock) -> None:
    @tool
    async def search() -> str:
        """Search for ever."""
        await linger()
        return ""

    async def searching(run: RunContext) -> None:
        await run.call_tool("search", {})

    made = infrastructure(tools=(search,), searching=searching)
    async with open_supervisor(made) as supervisor:
        with pytest.raises(AssertionError) as caught:
            async with assert_no_orphans(supervisor=supervisor):
                run = await supervisor.start(context(), "searching", "go")
                await wait_all_tasks_blocked()
        assert f"<Run {run.run_id} of 'searching', running>, at work on tool search" in str(
            caught.value
        )


async def test_what_goes_within_its_time_is_no_orphan(autojump_clock: MockClock) -> None:
    async def leave_soon(seconds: float) -> None:
        await trio.sleep(seconds)

    async with trio.open_nursery() as nursery:
        async with assert_no_orphans(nursery, within=2):
            nursery.start_soon(leave_soon, 1)
        assert trio.current_time() < 1.1
        with pytest.raises(AssertionError, match="leave_soon"):
            async with assert_no_orphans(nursery, within=2):
                nursery.start_soon(leave_soon, 10)


def failing() -> None:
    msg = "its own"
    raise ValueError(msg)


@pytest.mark.parametrize("body", [failing])
async def test_the_blocks_own_error_comes_first(
    autojump_clock: MockClock, body: Callable[[], None]
) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(ValueError, match="its own"):
            async with assert_no_orphans(nursery):
                nursery.start_soon(linger)
                body()
        nursery.cancel_scope.cancel()
