"""What the older design got wrong, each as a test of the name of what it prevents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.isolation.scheduler import run_each
from tests.server.running import PATIENCE, Chat, Server, open_server
from tests.small_world import (
    ADA,
    BOB,
    THREAD,
    TroubledStore,
    context,
    infrastructure,
    log_of,
    terminals_of,
    types_of,
)
from trio.testing import MockClock, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed

from creche import (
    AgentClassRegistry,
    EmitterClosedError,
    EventEmitter,
    GrammarError,
    Infrastructure,
    Limits,
    RunContext,
    StoreUnavailableError,
    ToolResult,
    UserMessage,
    events,
    open_journals,
    open_supervisor,
    text_of,
    tool,
)

# --- an agent that died silently while a heartbeat in another task said "processing"


async def test_a_heartbeat_cannot_speak_for_a_dead_agent(autojump_clock: MockClock):
    """It dies with its run; and one that was smuggled out of the run has nothing to speak with."""
    smuggled: list[EventEmitter] = []

    async def beat(emit: EventEmitter) -> None:
        while True:
            await emit.custom("status", "processing")
            await trio.sleep(1)

    async def dies(run: RunContext) -> None:
        smuggled.append(run.emit)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat, run.emit)
            await trio.sleep(5)
            raise ValueError("silently")

    shared = infrastructure(dies=dies)
    async with open_supervisor(shared) as supervisor:
        run = await supervisor.start(context(), "dies", "hi")
        outcome = await run.ended()
        with pytest.raises(EmitterClosedError):
            await smuggled[0].custom("status", "processing")
        await trio.sleep(60)
    log = await log_of(shared.store)
    assert outcome.status == "failed"
    assert types_of(log)[-2:] == ["CUSTOM", "RUN_ERROR"]
    assert len(log) < 10, "nothing came after the end"


async def test_only_the_runs_own_task_can_say_how_it_ended(autojump_clock: MockClock):
    refused: list[type[Exception]] = []

    async def impatient(run: RunContext) -> None:
        try:
            await run.emit.emit(
                events.RunFinished(thread_id=run.context.thread_id, run_id=run.context.run_id)
            )
        except GrammarError as error:
            refused.append(type(error))
        assert run._life.outcome is None
        raise ValueError("after all")

    shared = infrastructure(impatient=impatient)
    async with open_supervisor(shared) as supervisor:
        run = await supervisor.start(context(), "impatient", "hi")
        assert (await run.ended()).status == "failed"
    assert refused == [GrammarError]
    assert len(terminals_of(await log_of(shared.store))) == 1


# --- a stop that answered "stopped" and stopped nothing


async def test_stopped_is_answered_when_it_has_stopped(tmp_path: Path):
    """Over a real socket: once the reply is there, the agent does nothing any more."""
    ticks: list[int] = []
    tidied = trio.Event()

    async def ticking(run: RunContext) -> None:
        try:
            while True:
                ticks.append(len(ticks))
                await trio.sleep(0.001)
        finally:
            async with run.cleanup():
                await trio.sleep(0.05)
                tidied.set()

    async with open_server(tmp_path / "data", {"ticking": ticking}) as server:
        async with server.chat() as chat:
            await chat.subscribe()
            run_id = await chat.start("go", "ticking")
            await chat.until(lambda: ticks)
            reply = await chat.ask("run.cancel", run_id=run_id, wait=True)
            assert tidied.is_set()
            had = len(ticks)
            assert reply["status"] == "cancelled"
            assert reply["receipt"]["tasks_ended"] == 1
            assert (await chat.finished(run_id))["outcome"] == {"type": "cancelled"}
            await trio.sleep(0.05)
            assert len(ticks) == had
            again = await chat.ask("run.cancel", run_id=run_id, wait=True)
            assert again["receipt"] == reply["receipt"], "nothing is made up the second time"


# --- an isolated agent made, then the shared one run


async def test_the_agent_that_was_made_is_the_one_that_runs(autojump_clock: MockClock):
    made: list[object] = []
    ran: list[object] = []

    class Agent:
        shared = (made, ran)

        def __init__(self) -> None:
            made.append(self)

        async def run(self, run: RunContext) -> None:
            ran.append(self)
            await trio.sleep(1)

    async with open_supervisor(infrastructure(one=Agent)) as supervisor:
        runs = [
            await supervisor.start(context(user, f"thread-{number}"), "one", "hi")
            for user in (ADA, BOB)
            for number in range(5)
        ]
        for run in runs:
            await run.ended()
    assert len({id(agent) for agent in made}) == len(made) == 10
    assert {id(agent) for agent in made} == {id(agent) for agent in ran}


def test_an_instance_cannot_be_registered_in_the_place_of_a_class():
    class Agent:
        async def run(self, run: RunContext) -> None:
            """Do nothing."""

    with pytest.raises(TypeError, match="must be a class"):
        AgentClassRegistry().register("one", Agent())  # type: ignore[arg-type]


# --- "delivered" for events nobody queued


async def test_what_was_said_is_in_the_log_when_saying_it_returns(autojump_clock: MockClock):
    """There is no queue to be full, closed or missing: a reader who comes later finds it."""
    positions: list[tuple[int, int]] = []

    async def talks(run: RunContext) -> None:
        for _ in range(100):
            before = run.emit._journal.last_seq
            await run.emit.custom("word", "x" * 100)
            positions.append((before, run.emit._journal.last_seq))

    shared = infrastructure(talks=talks, limits=Limits(journal_bytes=512, read_entries=3))
    async with open_supervisor(shared) as supervisor:
        run = await supervisor.start(context(), "talks", "hi")
        await run.ended()
        assert all(after == before + 1 for before, after in positions)
        seen: list[int] = []
        async with supervisor.open_events(ADA, THREAD) as entries:
            async for entry in entries:
                seen.append(entry.seq)
                if entry.seq == positions[-1][1] + 1:
                    break
    assert seen == [*range(1, 103)]


async def test_a_run_is_accepted_only_once_its_rows_are_there(autojump_clock: MockClock):
    store = TroubledStore()
    store.refuses = lambda _: True
    async with open_supervisor(infrastructure(store=store)) as supervisor:
        with pytest.raises(StoreUnavailableError):
            await supervisor.start(context(), "hello", "hi")
        assert await store.runs(ADA, THREAD) == []


# --- two contradictory terminal events


def test_a_cancel_at_the_moment_of_the_end_gives_one_end():
    """In every order of steps: the event, the row and the answer to who waits agree."""
    orders = set()

    async def race(seed: int) -> None:
        async def quick(run: RunContext) -> str:
            for _ in range(seed % 4):
                await trio.lowlevel.checkpoint()
            return "done"

        shared = infrastructure(quick=quick)
        async with open_supervisor(shared) as supervisor, trio.open_nursery() as nursery:
            run = await supervisor.start(context(), "quick", "hi")

            async def stop() -> None:
                for _ in range(seed % 7):
                    await trio.lowlevel.checkpoint()
                run.cancel()

            nursery.start_soon(stop)
            nursery.start_soon(stop)
            outcome = await run.ended()
        (terminal,) = terminals_of(await log_of(shared.store))
        row = await shared.store.run(ADA, run.run_id)
        assert row is not None
        told = {"success": {"type": "success"}, "cancelled": {"type": "cancelled"}}
        assert terminal["outcome"] == told[outcome.status]
        assert row.status == outcome.status
        orders.add(outcome.status)

    run_each(range(300), race)
    assert orders == {"success", "cancelled"}, "the race went both ways"


# --- factories that could not build and whose errors were swallowed


async def test_an_agent_that_cannot_be_made_fails_its_run_aloud(
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
):
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no configuration")

        async def run(self, run: RunContext) -> None:
            """Never called."""

    shared = infrastructure(broken=Broken)
    async with open_supervisor(shared) as supervisor:
        run = await supervisor.start(context(), "broken", "hi")
        outcome = await run.ended()
        assert (
            await (await supervisor.start(context(), "hello", "hi")).ended()
        ).status == "success"
    assert outcome.status == "failed"
    assert "RUN_ERROR" in types_of(await log_of(shared.store))
    assert any(record.levelname == "ERROR" and record.exc_info for record in caplog.records)


def test_infrastructure_that_lacks_a_part_is_refused_before_anything_runs():
    class Wants:
        tools = ("not_provided",)

        async def run(self, run: RunContext) -> None:
            """Do nothing."""

    with pytest.raises(ValueError, match="not_provided"):
        Infrastructure(agents={"wants": Wants})


# --- a pool that deadlocked on its own lock


async def test_a_look_up_that_fails_locks_nobody_out(autojump_clock: MockClock):
    """Many ask for one thread while the store is away, some give up; then all get it."""
    store = TroubledStore()
    store.cannot_be_read = True
    failures: list[Exception] = []
    async with open_journals(store) as journals:

        async def ask() -> None:
            try:
                async with journals.attached(ADA, THREAD):
                    await trio.sleep(1)
            except OSError as error:
                failures.append(error)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(ask)
            assert len(failures) == 10
            store.cannot_be_read = False
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(ask)
                # A holder may ask for what it holds, and for its deletion.
                async with journals.attached(ADA, THREAD):
                    async with journals.attached(ADA, THREAD):
                        assert await journals.delete(ADA, THREAD) is False
        assert len(failures) == 10
        assert len(journals) == 0


# --- user limits that counted dead sockets


async def test_dead_sockets_do_not_count(tmp_path: Path):
    """Twenty connections break without a word; the user can connect as if they had never been."""
    async with open_server(tmp_path / "data", max_connections_per_user=2) as server:
        for _ in range(10):
            async with server.chat() as one, server.chat() as two:
                await one.subscribe()
                await two.subscribe()
                for chat in (one, two):
                    await chat.stream.aclose()
            await until_connected(server)


async def until_connected(server: Server) -> None:
    """The kernel tells the server of a broken connection when it likes, but soon."""
    with trio.fail_after(PATIENCE):
        while True:
            async with server.chat() as one, server.chat() as two:
                if await answers(one) and await answers(two):
                    return
            await trio.sleep(0.01)


async def answers(chat: Chat) -> bool:
    try:
        await chat.subscribe()
    except (AssertionError, ConnectionClosed):
        return False
    return True


# --- identity overwritten on a shared object, one user's reply saved under another


async def test_each_reply_is_saved_under_whoever_asked(autojump_clock: MockClock):
    """Two users, one thread id, one run id, in lockstep: each step between two of the other."""
    turn = {ADA: trio.Semaphore(1), BOB: trio.Semaphore(0)}

    async def slowly(run: RunContext) -> str:
        mine, other = run.context.user_id, BOB if run.context.user_id == ADA else ADA
        said = [text_of(m) for m in run.messages if isinstance(m, UserMessage)]
        for word in ("a", "b", "c"):
            await turn[mine].acquire()
            await run.emit.text(f"{word} for {said[-1]} ")
            turn[other].release()
        return said[-1]

    shared = infrastructure(slowly=slowly)
    async with open_supervisor(shared) as supervisor:
        runs = {
            user: await supervisor.start(context(user, run="run-1"), "slowly", f"secret of {user}")
            for user in (ADA, BOB)
        }
        for user, run in runs.items():
            assert (await run.ended()).result == f"secret of {user}"
    for user, other in ((ADA, BOB), (BOB, ADA)):
        words = " ".join(text_of(m.message) for m in await shared.store.messages(user, THREAD))
        assert words.count(f"secret of {user}") == 4
        assert other not in words


def test_an_identity_cannot_be_overwritten():
    mine = context()
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.user_id = BOB  # type: ignore[misc]
    with pytest.raises(TypeError):
        mine.metadata["user"] = BOB  # type: ignore[index]


# --- success fabricated on timeout


async def sleeps(run: RunContext) -> str:
    await trio.sleep_forever()
    return "done"


async def swallows(run: RunContext) -> str:
    try:
        await trio.sleep_forever()
    except trio.Cancelled:
        return "done all the same"
    return "done"


@pytest.mark.parametrize("body", [sleeps, swallows])
async def test_a_run_that_ran_out_of_time_is_no_success(
    body: Callable[[RunContext], Any],
    autojump_clock: MockClock,
):
    shared = infrastructure(late=body, limits=Limits(run_timeout=5))
    async with open_supervisor(shared) as supervisor:
        outcome = await (await supervisor.start(context(), "late", "hi")).ended()
    assert (outcome.status, outcome.receipt.reason) == ("cancelled", "deadline")
    assert outcome.result is None
    (terminal,) = terminals_of(await log_of(shared.store))
    assert terminal["outcome"] == {"type": "cancelled"}
    assert "result" not in terminal


async def test_a_tool_that_ran_out_of_time_is_an_error(autojump_clock: MockClock):
    results: list[ToolResult] = []

    @tool
    async def stuck() -> str:
        """Never return."""
        await trio.sleep_forever()
        return "done"

    async def calls(run: RunContext) -> None:
        results.append(await run.call_tool("stuck", {}))

    shared = infrastructure(calls=calls, tools=[stuck], limits=Limits(tool_timeout=3))
    async with open_supervisor(shared) as supervisor:
        await (await supervisor.start(context(), "calls", "hi")).ended()
    assert not results[0].ok
    assert "3 s" in results[0].content
    (said,) = [e for e in await log_of(shared.store) if e["type"] == "TOOL_CALL_RESULT"]
    assert said["metadata"] == {"creche": {"error": True}}


async def test_a_shutdown_does_not_report_what_it_cut_off_as_done(autojump_clock: MockClock):
    shared = infrastructure()
    async with open_supervisor(shared) as supervisor:
        run = await supervisor.start(context(), "hang", "hi")
        await wait_all_tasks_blocked()
    assert (await run.ended()).receipt.reason == "shutdown"
    (terminal,) = terminals_of(await log_of(shared.store))
    assert terminal["outcome"] == {"type": "cancelled"}
