"""Programs that a run starts, real ones on the real clock: none of them outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.core.test_tool_processes import all_gone, is_alive, written
from tests.small_world import ADA, BOB, Body, context, infrastructure, log_of, terminals_of

from creche import (
    LimitExceededError,
    Limits,
    MemoryStore,
    RunContext,
    RunError,
    RunOutcome,
    ToolContext,
    open_supervisor,
    tool,
)

TELL = """
import os, sys
def tell(path, *pids):
    with open(path + ".part", "w") as file:
        file.write(" ".join(map(str, pids)))
    os.rename(path + ".part", path)
"""
STUBBORN = (
    TELL
    + """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tell(sys.argv[1], os.getpid())
time.sleep(60)
"""
)
# Itself, a child in its group, one in a session of its own with a child, and an orphan of its own
# session; with an argument more it ignores SIGTERM.
FAMILY = (
    TELL
    + """
import signal, subprocess, time
if len(sys.argv) > 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleeping)
r, w = os.pipe()
if not os.fork():
    os.setsid()
    below = subprocess.Popen(sleeping, start_new_session=True)
    if not os.fork():
        os.setsid()
        os.write(w, f"{os.getppid()} {below.pid} {os.getpid()}".encode())
        time.sleep(60)
    time.sleep(60)
others = os.read(r, 99).split()
if not os.fork():
    if not os.fork():
        os.setsid()
        os.write(w, str(os.getpid()).encode())
        time.sleep(60)
    os._exit(0)
tell(sys.argv[1], os.getpid(), child.pid, *map(int, others), int(os.read(r, 99)))
time.sleep(60)
"""
)
LIMITS = Limits(stop_timeout=0.3)


def python(source: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", source, *map(str, arguments)]


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    """The file into which a program writes who it is and whom it started."""
    return tmp_path / "pids"


@pytest.fixture
def bystander() -> Iterator[int]:
    """A process of ours that no run started."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.kill()


async def executed(body: Body, *, limits: Limits = LIMITS, tools: Any = ()) -> RunOutcome:
    made = infrastructure(made=body, limits=limits, tools=tools)
    with trio.fail_after(30):
        async with open_supervisor(made) as supervisor:
            return await (await supervisor.start(context(), "made", "go")).ended()


async def cancelled(body: Body, pids: Path, *, tools: Any = ()) -> tuple[RunOutcome, list[int]]:
    """Cancel a run once its program has told who it is."""
    made = infrastructure(made=body, limits=LIMITS, tools=tools)
    with trio.fail_after(30):
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "made", "go")
            started = await written(pids)
            assert all(map(is_alive, started))
            run.cancel()
            return await run.ended(), started


@pytest.mark.parametrize(
    ("source", "arguments"),
    [(STUBBORN, ()), (FAMILY, ()), (FAMILY, ("stubborn",))],
    ids=["ignores SIGTERM", "has a family", "has a family and ignores SIGTERM"],
)
async def test_a_cancel_ends_it_with_all_below_it(
    pids: Path, bystander: int, source: str, arguments: tuple[str, ...]
) -> None:
    async def body(run: RunContext) -> None:
        command = python(source, pids, *arguments)
        async with run.open_process(command):
            await trio.sleep_forever()

    outcome, started = await cancelled(body, pids)
    assert await all_gone(started)
    assert outcome.receipt.reason == "user"
    assert outcome.receipt.processes_killed == (Path(sys.executable).name,)
    assert outcome.receipt.threads_abandoned == ()
    assert outcome.receipt.elapsed_ms < 3000
    assert is_alive(bystander)


async def test_the_runs_deadline_ends_it(pids: Path) -> None:
    async def body(run: RunContext) -> None:
        await run.run_process(python(STUBBORN, pids))

    outcome = await executed(body, limits=Limits(run_timeout=1, stop_timeout=0.1))
    assert outcome.receipt.reason == "deadline"
    assert outcome.receipt.processes_killed == (Path(sys.executable).name,)
    assert await all_gone(await written(pids))


async def test_a_programs_name_in_the_receipt_is_in_the_terminal_event(pids: Path) -> None:
    store = MemoryStore()

    async def body(run: RunContext) -> None:
        async with run.open_process(["sleep", "60"]):
            pids.write_text("1")
            await trio.sleep_forever()

    made = infrastructure(made=body, limits=LIMITS, store=store)
    with trio.fail_after(30):
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "made", "go")
            await written(pids)
            under_way = run._life.activities.now("program")
            assert [each.name for each in under_way] == ["sleep"]
            run.cancel()
            await run.ended()
            assert run._life.activities.now() == ()
    (terminal,) = terminals_of(await log_of(store))
    assert terminal["metadata"]["creche"]["receipt"]["processes_killed"] == ["sleep"]


async def test_one_that_heeds_a_sigterm_may_tidy_up(tmp_path: Path, pids: Path) -> None:
    tidied = tmp_path / "tidied"
    source = (
        TELL
        + """
import signal, time
def tidy(*_):
    open(sys.argv[2], "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, tidy)
tell(sys.argv[1], os.getpid())
time.sleep(60)
"""
    )

    async def body(run: RunContext) -> None:
        async with run.open_process(python(source, pids, tidied)):
            await trio.sleep_forever()

    _, started = await cancelled(body, pids)
    assert tidied.exists()
    assert await all_gone(started)


async def test_what_it_starts_while_it_is_told_to_terminate_is_killed_too(
    pids: Path, tmp_path: Path
) -> None:
    last = tmp_path / "last"
    source = (
        TELL
        + """
import signal, subprocess, time
def start_another(*_):
    another = subprocess.Popen(["sleep", "60"], start_new_session=True)
    tell(sys.argv[2], another.pid)
signal.signal(signal.SIGTERM, start_another)
tell(sys.argv[1], os.getpid())
while True:
    time.sleep(60)
"""
    )

    async def body(run: RunContext) -> None:
        async with run.open_process(python(source, pids, last)):
            await trio.sleep_forever()

    _, started = await cancelled(body, pids)
    assert await all_gone([*started, *await written(last)])


async def test_leaving_its_block_ends_it_without_a_word_in_the_receipt(pids: Path) -> None:
    async def body(run: RunContext) -> None:
        async with run.open_process(python(FAMILY, pids, "stubborn")) as process:
            started = await written(pids)
            assert process.pid == started[0]
        assert process.returncode == -signal.SIGKILL
        assert await all_gone(started)

    outcome = await executed(body)
    assert (outcome.status, outcome.message) == ("success", None)
    assert outcome.receipt.processes_killed == ()


async def test_what_is_left_of_its_group_when_it_has_ended_is_killed(pids: Path) -> None:
    source = (
        TELL
        + """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
tell(sys.argv[1], child.pid)
"""
    )

    async def body(run: RunContext) -> None:
        done = await run.run_process(python(source, pids))
        assert done.returncode == 0
        assert await all_gone(await written(pids))

    outcome = await executed(body)
    assert (outcome.status, outcome.message) == ("success", None)


async def test_its_streams_are_those_that_were_asked_for() -> None:
    async def body(run: RunContext) -> str:
        pipe = subprocess.PIPE
        async with run.open_process(["cat"], stdin=pipe, stdout=pipe) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is None
            await process.stdin.send_all(b"hello")
            return (await process.stdout.receive_some()).decode()

    assert (await executed(body)).result == "hello"


async def test_its_output_and_its_code_are_a_result() -> None:
    source = "import sys; print(sys.stdin.read() * 2); sys.stderr.write('oh'); sys.exit(3)"
    seen: list[subprocess.CompletedProcess[bytes]] = []

    async def body(run: RunContext) -> None:
        seen.append(await run.run_process(python(source), stdin=b"ab" * 100_000))
        seen.append(await run.run_process(["true"], stdin=b"x" * 1_000_000))  # never read

    assert (await executed(body)).status == "success"
    assert (seen[0].stdout, seen[0].stderr) == (b"ab" * 200_000 + b"\n", b"oh")
    assert (seen[0].returncode, seen[1].returncode) == (3, 0)


async def test_one_that_says_too_much_or_takes_too_long_is_stopped_and_told() -> None:
    codes: list[str] = []

    async def body(run: RunContext) -> None:
        for command, timeout in ((["yes"], None), (["sleep", "60"], 0.2)):
            with pytest.raises(RunError) as caught:
                await run.run_process(command, timeout=timeout)
            codes.append(caught.value.code)

    outcome = await executed(body)
    assert (outcome.status, codes) == ("success", ["program_output", "program_timeout"])


async def test_it_is_told_nothing_of_our_environment_but_where_things_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CRECHE_SECRET", "hunter2")
    told: list[bytes] = []

    async def body(run: RunContext) -> None:
        told.append((await run.run_process(["env"], env={"MINE": "yes"})).stdout)

    await executed(body)
    names = {line.partition(b"=")[0] for line in told[0].splitlines()}
    assert {b"PATH", b"MINE"} <= names
    passed_on = {b"PATH", b"HOME", b"LANG", b"LC_ALL", b"LC_CTYPE", b"TZ", b"TMPDIR"}
    assert names <= {*passed_on, b"MINE"}


async def test_one_that_is_not_there_or_is_in_one_string_is_refused(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "here").chmod(0o700)
    (tmp_path / "broken").write_text("#!/no/such/interpreter\n")
    (tmp_path / "broken").chmod(0o700)

    async def body(run: RunContext) -> bytes:
        with pytest.raises(FileNotFoundError, match="no such program"):
            await run.run_process(["no-such-program"])
        with pytest.raises(TypeError, match="no shell"):
            await run.run_process("echo hi")
        broken = await run.run_process(["./broken"], cwd=tmp_path)
        assert broken.returncode != 0
        assert b"No such file" in broken.stderr
        return (await run.run_process(["./here"], cwd=tmp_path)).stdout

    assert (await executed(body)).result == b"here\n"


async def test_a_user_may_have_so_many_and_anothers_are_not_counted(pids: Path) -> None:
    refused: list[str] = []

    async def body(run: RunContext) -> None:
        async with run.open_process(["sleep", "60"]), run.open_process(["sleep", "60"]):
            if run.context.user_id == ADA:
                with pytest.raises(LimitExceededError) as caught:
                    await run.run_process(["true"])
                refused.append(caught.value.message)
                pids.write_text("1")
                await trio.sleep_forever()
        assert (await run.run_process(["true"])).returncode == 0

    made = infrastructure(made=body, limits=Limits(programs=2, stop_timeout=0.3))
    with trio.fail_after(30):
        async with open_supervisor(made) as supervisor:
            adas = await supervisor.start(context(ADA), "made", "go")
            await written(pids)
            bobs = await supervisor.start(context(BOB), "made", "go")
            assert (await bobs.ended()).status == "success"
            adas.cancel()
            await adas.ended()
    assert refused == ["a user may have at most 2 programs at once"]


async def test_an_async_tool_starts_them_too_and_they_die_with_its_call(pids: Path) -> None:
    @tool
    async def build(caller: ToolContext, path: str) -> str:
        """Start something."""
        assert (await caller.run_process(["true"])).returncode == 0
        async with caller.open_process(python(FAMILY, path)):
            return str(await trio.sleep_forever())

    async def body(run: RunContext) -> None:
        await run.call_tool("build", {"path": str(pids)})

    outcome, started = await cancelled(body, pids, tools=[build])
    assert await all_gone(started)
    assert outcome.receipt.processes_killed == (Path(sys.executable).name,)
    assert [stopped.name for stopped in outcome.receipt.tools_stopped] == ["build"]


async def test_a_sync_tool_is_told_that_it_cannot() -> None:
    contents: list[str] = []

    @tool
    def build(caller: ToolContext) -> None:
        """Try to start something."""
        caller.open_process(["true"])

    async def body(run: RunContext) -> None:
        contents.append((await run.call_tool("build", {})).content)

    await executed(body, tools=[build])
    assert "make it `async def`" in contents[0]


async def test_a_hundred_that_are_cancelled_at_random_leave_nothing(pids: Path) -> None:
    """Also while they are being started."""
    before = _children()

    async def body(run: RunContext) -> None:
        while True:
            await run.run_process(["sh", "-c", "sleep 60 & sleep 0.01"])

    made = infrastructure(made=body, limits=LIMITS)
    with trio.fail_after(60):
        async with open_supervisor(made) as supervisor:
            for number in range(25):
                runs = [
                    await supervisor.start(context(thread=f"thread-{each}"), "made", "go")
                    for each in range(4)
                ]
                await trio.sleep(0.002 * number)
                for run in runs:
                    run.cancel()
                for run in runs:
                    assert (await run.ended()).receipt.threads_abandoned == ()
    assert _children() == before


def _children() -> set[int]:
    """Ours, by /proc."""
    found = set[int]()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        found.update(map(int, (task / "children").read_text().split()))
    return found
