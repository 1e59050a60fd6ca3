"""Tools in processes of their own, on the real clock: each end is a result, and none is left."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import trio
from tests.process_tools import (
    daemonise,
    echo,
    end,
    hang,
    leave_behind,
    made_by_hand,
    where,
)
from tests.small_world import context, infrastructure, log_of, terminals_of

from creche import (
    Limits,
    MemoryStore,
    RunContext,
    StoppedTool,
    ToolContext,
    ToolDefinitionError,
    ToolDispatcher,
    open_supervisor,
    tool,
)

opened = ToolDispatcher.create_scoped_dispatcher_context


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    """The file into which a tool writes whom it started."""
    return tmp_path / "pids"


@pytest.fixture
def bystander() -> Iterator[int]:
    """A process of ours that no tool started."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.kill()


async def written(pids: Path) -> list[int]:
    with trio.fail_after(20):
        while not (text := _text_of(pids)):
            await trio.sleep(0.005)
    return [int(pid) for pid in text.split()]


def _text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def is_alive(pid: int) -> bool:
    """Whether it is there and no zombie (one that nobody in this container has reaped yet)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc/self").exists()
    return state not in "ZX"


async def all_gone(pids: list[int]) -> bool:
    """A killed process takes the kernel a moment."""
    with trio.move_on_after(5):
        while any(map(is_alive, pids)):
            await trio.sleep(0.005)
    return not any(map(is_alive, pids))


async def test_it_works_in_another_process_with_arguments_and_defaults() -> None:
    async with opened(context(), tools=[where]) as dispatcher:
        result = await dispatcher.dispatch("where", {"at": {"x": 1}, "extra": [1]})
    assert result.error is None
    pid = result.value.pop("pid")
    assert result.value == {"x": 1, "y": 7, "extra": [1]}
    assert pid != os.getpid()
    assert not is_alive(pid)
    assert dispatcher.killed == []


async def test_its_arguments_are_checked_before_anything_is_started() -> None:
    async with opened(context(), tools=[where]) as dispatcher:
        for params in ({"at": {"x": "1"}}, {"at": {"x": 1, "z": 1}}):
            assert "do not fit" in (await dispatcher.dispatch("where", params)).content


async def test_what_it_prints_is_no_answer_and_its_input_is_empty(
    capfd: pytest.CaptureFixture[str],
) -> None:
    long = "é" * 100_000
    async with opened(context(), tools=[echo]) as dispatcher:
        result = await dispatcher.dispatch("echo", {"words": long})
    assert result.error is None
    assert (result.content, result.value) == (long, long)
    assert capfd.readouterr().err.split() == ["printed", "written"]


async def test_a_function_that_was_made_a_tool_under_another_name_is_found() -> None:
    async with opened(context(), tools=[made_by_hand]) as dispatcher:
        assert (await dispatcher.dispatch("doubled", {"a": 4})).value == 8


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("os._exit", "its process ended without a result (exit code 3)"),
        ("exit 0", "its process ended without a result (exit code 0)"),
        ("SystemExit", "SystemExit: 4"),
        ("KeyboardInterrupt", "KeyboardInterrupt: "),
        ("segfault", "its process ended by SIGSEGV"),
        ("SIGKILL", "its process ended by SIGKILL"),
        ("raises", "ValueError: password=[redacted]"),
        ("RunError", "The shop is closed."),
        ("group", "ExceptionGroup: two (2 sub-exceptions)"),
        ("no JSON", "RuntimeError: "),
        ("no Unicode", "UnicodeEncodeError: "),
        ("unprintable", "Unprintable: it cannot be printed"),
        ("huge", "its result is larger than 1000000 bytes"),
        ("closes all", "its process ended by SIGKILL"),
    ],
)
async def test_however_it_ends_it_is_a_failure_of_the_tool_only(
    how: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(run_bytes=1_000_000)
    async with opened(context(), tools=[end], limits=limits) as dispatcher:
        with trio.fail_after(20):
            result = await dispatcher.dispatch("end", {"how": how})
            assert result.error is not None
            assert words in result.error
    assert (dispatcher.stopped, dispatcher.killed) == ([], [])
    assert len(caplog.records) == 1
    if how == "raises":
        assert "process_tools.py" in caplog.text, "the log has the traceback of the other side"


async def test_a_cancelled_run_kills_it_with_all_that_it_started(pids: Path) -> None:
    async def calls(run: RunContext) -> None:
        await run.call_tool("hang", {"pids": str(pids)})

    store = MemoryStore()
    made = infrastructure(store=store, tools=[hang], calls=calls)
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "calls", "hi")
        started = await written(pids)
        assert len(started) == 2
        assert all(map(is_alive, started))
        run.cancel()
        with trio.fail_after(5):
            receipt = (await run.ended()).receipt
        assert await all_gone(started)
    assert receipt.processes_killed == ("hang",)
    assert receipt.tools_stopped == (StoppedTool(name="hang", how="killed"),)
    assert receipt.threads_abandoned == ()
    (terminal,) = terminals_of(await log_of(store))
    assert terminal["metadata"]["creche"]["receipt"]["processes_killed"] == ["hang"]


async def test_one_past_its_time_is_killed_and_the_run_goes_on(pids: Path) -> None:
    limits = Limits(tool_timeout=3)
    async with opened(context(), tools=[hang, where], limits=limits) as dispatcher:
        result = await dispatcher.dispatch("hang", {"pids": str(pids)})
        assert "longer than 3 s" in result.content
        assert await all_gone(await written(pids))
        assert (await dispatcher.dispatch("where", {"at": {"x": 1}})).ok
    assert (dispatcher.killed, dispatcher.stopped) == (["hang"], [])


@pytest.mark.parametrize("how", ["returns", "raises", "deadline"])
async def test_whatever_ends_the_run_no_process_is_left(how: str, pids: Path) -> None:
    async def calls(run: RunContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.call_tool, "hang", {"pids": str(pids)})
            await written(pids)
            if how == "raises":
                raise ValueError("boom")
            if how == "deadline":
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()

    limits = Limits(run_timeout=3 if how == "deadline" else 600)
    made = infrastructure(tools=[hang], calls=calls, limits=limits)
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "calls", "hi")
        with trio.fail_after(20):
            outcome = await run.ended()
        assert await all_gone(await written(pids))
    assert outcome.receipt.processes_killed == ("hang",)
    assert (
        outcome.status == {"returns": "success", "raises": "failed", "deadline": "cancelled"}[how]
    )


async def test_one_that_ends_well_leaves_nothing_behind_either(pids: Path) -> None:
    async with opened(context(), tools=[leave_behind]) as dispatcher:
        with trio.fail_after(20):
            result = await dispatcher.dispatch("leave_behind", {"pids": str(pids)})
        assert result.content == "done"
        started = await written(pids)
        assert len(started) == 3
        assert await all_gone(started)
    assert dispatcher.killed == []


@pytest.mark.skipif(sys.platform != "linux", reason="what has left its group is found on Linux")
@pytest.mark.parametrize("ends", [True, False], ids=["that ended well", "that is cancelled"])
async def test_one_leaves_no_daemon_behind(pids: Path, ends: bool, bystander: int) -> None:
    async with opened(context(), tools=[daemonise]) as dispatcher:
        async with trio.open_nursery() as nursery:
            params = {"pids": str(pids), "ends": ends}
            nursery.start_soon(dispatcher.dispatch, "daemonise", params)
            started = await written(pids)
            assert len(started) == 4
            if not ends:
                assert all(map(is_alive, started))
                assert len({os.getsid(pid) for pid in started}) == 4
                nursery.cancel_scope.cancel()
        assert not any(map(is_alive, started)), "they were gone when the call ended"
    assert dispatcher.abandoned == []
    assert is_alive(bystander), "what is another's is left alone"


@pytest.mark.parametrize(
    "call",
    [
        "'hang', {'pids': PIDS}",
        pytest.param(
            "'daemonise', {'pids': PIDS, 'ends': False}",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="likewise"),
        ),
    ],
    ids=["programs", "daemons"],
)
async def test_it_ends_when_the_process_that_wants_its_answer_dies(pids: Path, call: str) -> None:
    """Nobody kills it then: it notices by itself."""
    program = (
        "import sys, trio, creche, tests.process_tools as tools\n"
        "async def main():\n"
        "    who = creche.UserExecutionContext.from_request(user_id='a', thread_id='t')\n"
        "    opened = creche.ToolDispatcher.create_scoped_dispatcher_context\n"
        "    async with opened(who, tools=[tools.hang, tools.daemonise]) as dispatcher:\n"
        f"        await dispatcher.dispatch({call.replace('PIDS', repr(str(pids)))})\n"
        "trio.run(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    async with trio.open_nursery() as nursery:
        parent = await nursery.start(
            functools.partial(
                trio.run_process, [sys.executable, "-c", program], env=environment, check=False
            )
        )
        try:
            started = await written(pids)
        finally:
            parent.kill()
    assert await all_gone(started)


async def test_only_so_many_of_one_users_work_at_once(pids: Path) -> None:
    """They take the places of threads: what a user may use of the machine is one number."""
    limits = Limits(tool_threads=1)
    async with opened(context(), tools=[hang, where], limits=limits) as dispatcher:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dispatcher.dispatch, "hang", {"pids": str(pids)})
            await written(pids)
            with trio.move_on_after(1) as waiting:
                await dispatcher.dispatch("where", {"at": {"x": 1}})
            nursery.cancel_scope.cancel()
    assert waiting.cancelled_caught
    assert dispatcher.stopped == ["where", "hang"]
    assert dispatcher.killed == ["hang"], "the other one had not begun"


def test_what_cannot_run_in_a_process_says_so_when_it_is_defined() -> None:
    def inner(a: int) -> None: ...
    async def waits(a: int) -> None: ...
    def asks(a: int, ctx: ToolContext) -> None: ...

    waits.__qualname__ = asks.__qualname__ = "top"
    in_main = FunctionType(inner.__code__, {"__name__": "__main__"}, "top")
    in_main.__annotations__ = {"a": "int"}
    in_main.__qualname__ = "top"
    cases: list[tuple[Any, str]] = [
        (inner, "<locals>"),
        (lambda: None, "<lambda>"),
        (waits, "async"),
        (asks, "ToolContext"),
        (in_main, "__main__"),
    ]
    for function, word in cases:
        with pytest.raises(ToolDefinitionError, match=word):
            tool(process=True)(function)
