"""A process that dies without a word, and the one that comes after it."""

from __future__ import annotations

import signal
from pathlib import Path

import msgspec
import trio
from tests.agui_rules import check_history
from tests.server.processes import open_creche
from tests.server.running import Chat, asking, by_run, check_agui, types_of
from tests.small_world import log_of
from trio_websocket import ConnectionClosed

from creche import RunId, UserId, decode_message
from creche_server.database import open_database

AGENTS = '''
import trio
from creche import tool

@tool
async def stuck() -> str:
    """Never answer."""
    return str(await trio.sleep_forever())

class Calls:
    """Says something, and calls a tool that hangs."""

    tools = (stuck,)

    async def run(self, run):
        await run.emit.text("Let me look. ")
        await run.emit.end_text()
        await run.call_tool("stuck", {})

class Talks:
    """Talks for ever."""

    async def run(self, run):
        number = 0
        while True:
            await run.emit.text(f"{number} ")
            number += 1
            await trio.sleep(0.001)

agents = {"calls": Calls, "talks": Talks}
'''


async def test_runs_of_a_killed_process_are_lost_and_their_threads_usable(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(AGENTS)
    data = tmp_path / "data"
    async with open_creche(data, "mine:agents") as creche:
        async with creche.server.chat("calls") as calls, creche.server.chat("talks") as talks:
            told = {}
            for chat in (calls, talks):
                told[chat] = await chat.subscribe()
            tool_run = await calls.start("go", "calls")
            queued_run = await calls.start("tokens=1")
            text_run = await talks.start("go", "talks")
            await calls.until(lambda: calls.seen("TOOL_CALL_END"))
            await talks.until(lambda: len(talks.events) > 100)
            creche.send(signal.SIGKILL)
            assert await creche.ended() == -9
            await talks.end()
    seen = talks.events
    async with open_creche(data, "mine:agents") as again:
        assert "3 runs" in again.errors()
        async with again.server.chat("calls") as chat:
            now = await chat.subscribe()
            assert now["epoch"] != told[calls]["epoch"]
            await chat.finished(queued_run)
            check_agui(chat.events)
            runs = by_run(chat.events)
            assert [run[0]["runId"] for run in runs] == [tool_run, queued_run]
            for run in runs:
                assert (run[-1]["type"], run[-1]["code"]) == ("RUN_ERROR", "lost")
                assert types_of(run).count("RUN_ERROR") == 1
            assert types_of(runs[0])[-2:] == ["TOOL_CALL_RESULT", "RUN_ERROR"]
            await chat.run("tokens=2")
        async with again.server.chat("talks") as chat:
            # Who goes on where it was is told to begin anew: what it saw may not be stored.
            last = seen[-1]["seq"]
            told_now = await chat.subscribe(since=last, epoch=told[talks]["epoch"])
            assert (told_now["reset"], told_now["since"]) == (True, 0)
            end = await chat.finished(text_run)
            check_agui(chat.events)
            assert end["code"] == "lost"
            # What was told is there as it was told, but for the newest drafts.
            both = min(len(seen), len(chat.events) - 2)
            assert both > 50
            assert chat.events[:both] == seen[:both]
        async with again.server.http() as http:
            history = (await http.get("/threads/calls/history")).json()
            assert [state["metadata"]["status"] for state in history] == ["success", "lost", "lost"]
            state = (await http.get("/threads/calls/state")).json()
        messages = [
            decode_message(msgspec.json.encode(message)) for message in state["values"]["messages"]
        ]
        check_history(messages)
        again.send(signal.SIGTERM)
        assert await again.ended() == 0


async def test_nothing_that_was_acknowledged_is_ever_lost(tmp_path: Path) -> None:
    """Killed again and again in the middle of many runs; what a client was told stays so."""
    data = tmp_path / "data"
    acknowledged: dict[str, str] = {}  # {run id: its thread}
    finished: dict[str, str] = {}

    async def use(chat: Chat, thread: str) -> None:
        while chat.closed is None:
            try:
                started = await chat.ask("run.start", **asking("tokens=5"))
                acknowledged[started["run_id"]] = thread
                await chat.finished(started["run_id"])
                finished[started["run_id"]] = thread
            except (AssertionError, ConnectionClosed):
                return  # it was killed

    for round_ in range(3):
        async with open_creche(data) as creche, trio.open_nursery() as nursery:
            for number in range(5):  # as many sockets as a user may have
                thread = f"{round_}-{number}"

                async def one(thread: str = thread) -> None:
                    async with creche.server.chat(thread) as chat:
                        await chat.subscribe()
                        await use(chat, thread)

                nursery.start_soon(one)
            before = len(finished)
            with trio.fail_after(20):
                while len(finished) < before + 25:
                    await trio.sleep(0.01)
            creche.send(signal.SIGKILL)
            await creche.ended()
            nursery.cancel_scope.cancel()
    async with open_creche(data) as last:
        last.send(signal.SIGTERM)
        await last.ended()
    async with open_database(f"sqlite:///{data / 'creche.db'}") as store:
        assert await store.unfinished_runs() == []
        for run_id, thread in acknowledged.items():
            run = await store.run(UserId("ada"), RunId(run_id))
            assert run is not None, "it was acknowledged, and is gone"
            assert run.thread_id == thread
            assert run.status == "success" if run_id in finished else run.status != "running"
        for thread in set(acknowledged.values()):
            log = await log_of(store, "ada", thread)
            for events in by_run(log):
                terminals = [e for e in events if e["type"] in {"RUN_FINISHED", "RUN_ERROR"}]
                assert len(terminals) == 1
    assert len(finished) >= 75
