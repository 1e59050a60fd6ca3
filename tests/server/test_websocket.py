"""The chat over WebSocket, as a client that knows only docs/wire.md sees it."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import random
import sqlite3
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tests.server import bare
from tests.server.running import (
    PATIENCE,
    Chat,
    CommandError,
    Server,
    asking,
    by_run,
    check_agui,
    eventually,
    open_server,
    types_of,
    unsent,
    words_of,
)

from creche import (
    Entry,
    Journals,
    RunContext,
    Step,
    ThreadId,
    ToolContext,
    UserId,
    events,
    new_id,
    tool,
)
from creche_server.outbox import HIGH_WATER
from creche_server.resuming import in_parts
from creche_server.telemetry import configure_logging
from creche_server.wire.frames import text_frame

MIXED = 'tokens=9 tool=calculator:{"expression":"6*7"}'


# (a frame, the error's code, the id that it is answered with)
WRONG_COMMANDS: Final[list[tuple[str, str, int | None]]] = [
    ("", "invalid_argument", None),
    ("{", "invalid_argument", None),
    ("null", "invalid_argument", None),
    ("[]", "invalid_argument", None),
    ('"run.start"', "invalid_argument", None),
    ('{"id":7}', "invalid_argument", 7),
    ('{"method":"state.get"}', "invalid_argument", None),
    ('{"id":"7","method":"state.get"}', "invalid_argument", None),
    ('{"id":7,"method":5}', "invalid_argument", 7),
    ('{"id":7,"method":"run.fly"}', "unknown_command", 7),
    ('{"id":7,"method":"run.start"}', "invalid_argument", 7),
    ('{"id":7,"method":"run.start","params":[]}', "invalid_argument", 7),
    ('{"id":7,"method":"run.start","params":{"input":5}}', "invalid_argument", 7),
    (
        '{"id":7,"method":"run.start","params":{"input":{"messages":[]}}}',
        "invalid_argument",
        7,
    ),
    (
        '{"id":7,"method":"run.start","params":'
        '{"input":{"messages":[{"role":"system","content":"obey"}]}}}',
        "invalid_argument",
        7,
    ),
    (
        '{"id":7,"method":"run.start","params":'
        '{"input":{"messages":[{"role":"assistant","content":"I said"}]}}}',
        "invalid_argument",
        7,
    ),
    (
        '{"id":7,"method":"run.start","params":'
        '{"input":{"messages":[{"content":[{"type":"image","url":"x"}]}]}}}',
        "invalid_argument",
        7,
    ),
    (
        '{"id":7,"method":"run.start","params":'
        '{"assistant_id":"nobody","input":{"messages":[{"content":"x"}]}}}',
        "invalid_argument",
        7,
    ),
    (
        '{"id":7,"method":"run.start","params":'
        '{"metadata":{"user_id":"bob"},"input":{"messages":[{"content":"x"}]}}}',
        "invalid_argument",
        7,
    ),
    (
        '{"id":7,"method":"run.start","params":'
        '{"multitask_strategy":"queue","input":{"messages":[{"content":"x"}]}}}',
        "invalid_argument",
        7,
    ),
    ('{"id":7,"method":"state.get","params":{"limit":0}}', "invalid_argument", 7),
    ('{"id":7,"method":"state.get","params":{"limit":1001}}', "invalid_argument", 7),
    ('{"id":7,"method":"run.cancel","params":{}}', "invalid_argument", 7),
    ('{"id":7,"method":"run.cancel","params":{"run_id":5}}', "invalid_argument", 7),
    (
        '{"id":7,"method":"subscription.subscribe","params":{"since":-1}}',
        "invalid_argument",
        7,
    ),
    (
        '{"id":7,"method":"subscription.subscribe","params":{"since":"1"}}',
        "invalid_argument",
        7,
    ),
    (
        '{"id":7,"method":"subscription.unsubscribe","params":{}}',
        "invalid_argument",
        7,
    ),
]


async def refused(chat: Chat, method: str, **params: Any) -> str:
    """Send a command that must fail; returns the error's code."""
    with pytest.raises(CommandError) as info:
        await chat.ask(method, **params)
    assert info.value.reply["message"]
    return str(info.value.code)


class TestARun:
    async def test_is_told_in_events_that_stock_clients_take(self, server: Server) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            run = await chat.run(MIXED)
            failed = await chat.run("tokens=4 fail=out of order")
            check_agui(chat.events)
        assert types_of(run)[:5] == [
            "RUN_STARTED",
            "TOOL_CALL_START",
            "TOOL_CALL_ARGS",
            "TOOL_CALL_END",
            "TOOL_CALL_RESULT",
        ]
        assert words_of(run) == "42 " + "".join(f"tok{number} " for number in range(9))
        assert run[-1]["outcome"] == {"type": "success"}
        assert (failed[-1]["type"], failed[-1]["message"]) == ("RUN_ERROR", "out of order")

    async def test_can_say_everything_that_agui_knows(self, tmp_path: Path) -> None:
        async def say_everything(run: RunContext) -> dict[str, Any]:
            ids = {name: new_id() for name in ("thought", "message", "call")}
            for event in (
                events.StepStarted(step_name="one"),
                events.ReasoningStart(message_id=ids["thought"]),  # type: ignore[arg-type]
                events.ReasoningMessageStart(
                    message_id=ids["thought"],  # type: ignore[arg-type]
                    role="reasoning",
                ),
                events.ReasoningMessageContent(
                    message_id=ids["thought"],  # type: ignore[arg-type]
                    delta="hm",
                ),
                events.ReasoningMessageEnd(message_id=ids["thought"]),  # type: ignore[arg-type]
                events.ReasoningEnd(message_id=ids["thought"]),  # type: ignore[arg-type]
                events.StateSnapshot(snapshot={"a": None}),
                events.StateDelta(delta=({"op": "replace", "path": "/a", "value": 1},)),
                events.ActivitySnapshot(
                    message_id=ids["message"],  # type: ignore[arg-type]
                    activity_type="PLAN",
                    content={"steps": []},
                ),
                events.SubagentStarted(subagent_run_id="sub", name="helper"),
                events.TextMessageStart(
                    message_id=ids["call"],  # type: ignore[arg-type]
                    subagent_run_id="sub",
                ),
                events.SubagentError(subagent_run_id="sub", message="gone"),
                events.Custom(name="ünï", value=[None, {"x": "\u2028"}]),
                events.StepFinished(step_name="one"),
            ):
                with contextlib.suppress(Exception):
                    await run.emit.emit(event)
            return {"answer": 42}

        async with open_server(tmp_path, {"all": say_everything}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run = await chat.run("go", "all")
                check_agui(chat.events)
        assert run[-1]["result"] == {"answer": 42}
        assert {"STATE_DELTA", "REASONING_MESSAGE_CONTENT", "CUSTOM"} <= set(types_of(run))

    async def test_is_committed_when_it_is_answered(self, server: Server) -> None:
        path = server.settings.data / "creche.db"
        async with server.chat() as chat:
            for number in range(20):
                words = f"hang number {number}"
                run_id = await chat.start(words)
                # No await between the reply and this: what is not there yet, is missed.
                with contextlib.closing(sqlite3.connect(path)) as other:
                    (status,) = other.execute(
                        "SELECT status FROM runs WHERE user_id = 'ada' AND run_id = ?",
                        [run_id],
                    ).fetchone()
                    (asked,) = other.execute(
                        "SELECT words FROM messages WHERE run_id = ?",
                        [run_id],
                    ).fetchone()
                assert status in {"queued", "running"}
                assert asked == words

    async def test_is_committed_before_its_end_is_seen(self, server: Server) -> None:
        path = server.settings.data / "creche.db"
        async with server.chat() as chat:
            await chat.subscribe()
            for _ in range(10):
                run_id = await chat.start("tokens=1")
                await chat.finished(run_id)
                with contextlib.closing(sqlite3.connect(path)) as other:
                    row = other.execute(
                        "SELECT status, last_seq FROM runs WHERE run_id = ?",
                        [run_id],
                    ).fetchone()
                assert row == ("success", chat.events[-1]["seq"])

    async def test_on_a_busy_thread_waits_for_its_turn(self, tmp_path: Path) -> None:
        go = trio.Event()

        async def wait(run: RunContext) -> None:
            await go.wait()
            await run.emit.text(str(run.messages[-1].content))

        async with open_server(tmp_path, {"wait": wait}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                first = await chat.ask("run.start", **asking("one", "wait"))
                second = await chat.ask("run.start", **asking("two", "wait"))
                third = await chat.ask("run.start", **asking("three", "wait"))
                assert "queued" not in first
                assert (second["queued"], third["queued"]) == (1, 2)
                go.set()
                await chat.finished(third["run_id"])
                check_agui(chat.events)
                runs = by_run(chat.events)
        assert [run[0]["runId"] for run in runs] == [
            started["run_id"] for started in (first, second, third)
        ]
        assert [words_of(run) for run in runs] == ["one", "two", "three"]

    async def test_goes_on_without_the_socket_that_began_it(self, tmp_path: Path) -> None:
        go = trio.Event()

        async def wait(run: RunContext) -> None:
            await go.wait()
            await run.emit.text("still here")

        async with open_server(tmp_path, {"wait": wait}) as server:
            async with server.chat() as chat:
                run_id = await chat.start("hello", "wait")
            go.set()
            async with server.chat() as chat:
                await chat.subscribe()
                await chat.finished(run_id)
                assert words_of(chat.run_events(run_id)) == "still here"

    async def test_of_a_failing_agent_tells_nothing_of_the_inside(self, tmp_path: Path) -> None:
        async def fail(run: RunContext) -> None:
            await run.emit.text("half a ")
            raise ValueError("canary-of-the-inside")

        async with open_server(tmp_path, {"fail": fail}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run = await chat.run("go", "fail")
                check_agui(chat.events)
                assert "canary-of-the-inside" not in "".join(chat.frames)
        assert run[-1]["type"] == "RUN_ERROR"
        assert run[-1]["metadata"]["creche"]["correlation_id"] in run[-1]["message"]

    @pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, BaseException, KeyboardInterrupt])
    async def test_survives_a_tool_that_wants_to_end_the_process(
        self,
        tmp_path: Path,
        kind: type[BaseException],
    ) -> None:
        @tool
        def leave() -> str:
            """Leave."""
            raise kind("bye")

        async def call_it(run: RunContext) -> None:
            result = await run.call_tool("leave", {})
            await run.emit.text(f"ok={result.ok}")

        async with open_server(tmp_path, {"exit": call_it}, (leave,)) as server:
            async with server.chat(user="bob") as witness, server.chat() as chat:
                await witness.subscribe()
                running = await witness.start("hang")
                await chat.subscribe()
                run = await chat.run("go", "exit")
                assert words_of(run) == "ok=False"
                assert run[-1]["type"] == "RUN_FINISHED"
                await witness.ask("run.cancel", run_id=running, wait=True)

    async def test_survives_an_agent_that_wants_to_end_the_process(self, tmp_path: Path) -> None:
        async def leave(run: RunContext) -> None:
            raise SystemExit(3)

        async with open_server(tmp_path, {"exit": leave}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                assert (await chat.run("go", "exit"))[-1]["type"] == "RUN_ERROR"
                assert (await chat.run("tokens=1"))[-1]["type"] == "RUN_FINISHED"


class TestASubscription:
    async def test_at_every_position_gives_what_follows_to_the_byte(self, tmp_path: Path) -> None:
        """From memory while the thread is live, from the database afterwards and when restarted."""

        async def check(server: Server, seen: list[str]) -> None:
            async with server.chat() as chat:
                for since in range(len(seen) + 1):
                    told = await chat.subscribe(since=since)
                    assert told["since"] == since
                    assert told["replayed_events"] == len(seen) - since
                    assert "reset" not in told
                    await chat.until(
                        lambda n=since: len(chat.raw_events) >= len(seen) - n,  # type: ignore[misc]
                        f"all after {since}",
                    )
                    await chat.ask(
                        "subscription.unsubscribe",
                        subscription_id=told["subscription_id"],
                    )
                    assert chat.raw_events == seen[since:], since
                    chat.raw_events.clear()

        async with open_server(tmp_path) as server:
            async with server.chat() as chat:
                epoch = (await chat.subscribe())["epoch"]
                await chat.run(MIXED)
                await chat.run("tokens=2 fail=now")
                seen = chat.raw_events
                assert [json.loads(event)["seq"] for event in seen] == [*range(1, len(seen) + 1)]
                await check(server, seen)
            await check(server, seen)
        async with open_server(tmp_path) as server:
            await check(server, seen)
            async with server.chat() as chat:
                assert (await chat.subscribe())["epoch"] == epoch

    async def test_is_cut_after_each_event_by_many_at_once_and_loses_nothing(
        self, tmp_path: Path
    ) -> None:
        """With tools, sub-agents and a second run in the queue; each cut goes on where it was.

        A reader that is cut at n reads n events, leaves, and comes back with `since=n`, while the
        runs go on: n is each position of the uncut stream, and all are there at once. So it is in
        memory; after a restart all of it comes from the database.
        """
        go = trio.Event()

        @tool
        async def look(what: str) -> str:
            """Look."""
            return what * 2

        async def below(run: RunContext) -> str:
            await run.emit.text("below")
            await run.call_tool("look", {"what": "ab"})
            return "done"

        async def above(run: RunContext) -> None:
            await run.emit.text("above")
            await run.call_tool("look", {"what": "é"})
            await run.parallel([Step(agent="below", input="1"), Step(agent="below", input="2")])
            await go.wait()
            await run.call_tool("absent", {})
            await run.emit.text("end")

        seen: list[str] = []
        cut: list[list[str]] = []

        async def cut_at(server: Server, position: int, total: int) -> None:
            async with server.chat() as first:
                await first.subscribe()
                await first.until(lambda: len(first.raw_events) >= position, f"{position}")
                got = first.raw_events[:position]
            go.set()
            async with server.chat() as again:
                await again.subscribe(since=position)
                await again.until(lambda: len(got) + len(again.raw_events) >= total, "the rest")
                cut.append(got + again.raw_events)

        async def cut_everywhere(server: Server, positions: range, more: int | None) -> None:
            async with trio.open_nursery() as nursery:
                for position in positions:
                    total = len(seen) if more is None else position + more
                    nursery.start_soon(cut_at, server, position, total)

        agents = {"above": above, "below": below}
        many: dict[str, Any] = {"max_connections_per_user": 1000}
        async with open_server(tmp_path, agents, (look,), **many) as server:
            async with server.chat() as whole:
                await whole.subscribe()
                running = await whole.start("go", "above")
                queued = await whole.start("tokens=5")
                await whole.until(lambda: len(whole.raw_events) > 20, "it waits")
                await cut_everywhere(server, range(1, len(whole.raw_events) + 1), 5)
                await whole.finished(running)
                await whole.finished(queued)
                seen.extend(whole.raw_events)
                check_agui(whole.events)
            await cut_everywhere(server, range(len(seen) + 1), None)
        async with open_server(tmp_path, agents, (look,), **many) as server:
            await cut_everywhere(server, range(len(seen) + 1), None)
        assert len(cut) > 20 + 2 * len(seen)
        assert [got for got in cut if got != seen[: len(got)]] == []

    async def test_of_a_log_larger_than_memory_has_no_gap(self, tmp_path: Path) -> None:
        """A journal keeps 256 KiB; the rest comes from the database while the run goes on."""
        half, go = trio.Event(), trio.Event()

        async def say_much(run: RunContext) -> None:
            for number in range(4000):
                if number == 2000:
                    half.set()
                    await go.wait()
                await run.emit.text(f"{number} " + "x" * 300)

        async with open_server(tmp_path, {"much": say_much}) as server:
            async with server.chat() as first, server.chat() as late:
                await first.subscribe()
                run_id = await first.start("go", "much")
                await half.wait()
                await late.subscribe(since=7)
                await late.until(lambda: len(late.events) > 1000, "it caught up")
                go.set()
                await first.finished(run_id)
                last = first.events[-1]["seq"]
                await late.until(lambda: late.events[-1]["seq"] == last, "the end")
                assert late.raw_events == first.raw_events[7:]
                assert len(late.events) > 4000 - 7

    async def test_is_resumed_in_the_middle_of_a_run(self, tmp_path: Path) -> None:
        steps = [trio.Event() for _ in range(6)]

        async def stepwise(run: RunContext) -> None:
            for number, step in enumerate(steps):
                await step.wait()
                await run.emit.text(f"{number} ")

        async with open_server(tmp_path, {"step": stepwise}) as server:
            async with server.chat() as watcher:
                epoch = (await watcher.subscribe())["epoch"]
                run_id = await watcher.start("go", "step")
                got: list[str] = []
                for number, step in enumerate(steps):
                    async with server.chat() as chat:
                        told = await chat.subscribe(since=len(got), epoch=epoch)
                        assert "reset" not in told
                        step.set()
                        wanted = f'"{number} "'
                        await chat.until(
                            lambda c=chat, w=wanted: any(w in raw for raw in c.raw_events),  # type: ignore[misc]
                            f"delta {number}",
                        )
                        got += chat.raw_events
                        with contextlib.suppress(trio.BrokenResourceError):
                            # An abortive close, as when a laptop's lid is shut.
                            chat.stream.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
                            await chat.stream.aclose()
                await watcher.finished(run_id)
                assert got == watcher.raw_events[: len(got)]
                assert len(got) >= len(steps)

    async def test_with_a_stale_epoch_starts_over(self, server: Server) -> None:
        async with server.chat() as chat, server.chat() as other:
            await chat.subscribe()
            await chat.run("tokens=3")
            told = await other.subscribe(since=2, epoch="another0")
            assert (told["reset"], told["since"]) == (True, 0)
            await other.until(lambda: len(other.events) == len(chat.events), "everything")
            assert other.raw_events == chat.raw_events

    async def test_from_beyond_the_end_starts_over(self, server: Server) -> None:
        async with server.chat() as chat, server.chat() as other:
            told = await chat.subscribe()
            await chat.run("tokens=3")
            last = chat.events[-1]["seq"]
            again = await other.subscribe(since=last + 1, epoch=told["epoch"])
            assert (again["reset"], again["since"]) == (True, 0)
            await other.until(lambda: len(other.events) == last, "everything")

    async def test_from_the_very_end_waits_for_what_comes(self, server: Server) -> None:
        async with server.chat() as chat, server.chat() as other:
            told = await chat.subscribe()
            await chat.run("tokens=3")
            last = chat.events[-1]["seq"]
            again = await other.subscribe(since=last, epoch=told["epoch"])
            assert "reset" not in again
            await chat.run("tokens=1")
            await other.until(lambda: other.seen("RUN_FINISHED"), "the next run")
            assert other.events[0]["seq"] == last + 1

    async def test_of_an_idle_thread_sees_the_next_run(self, server: Server) -> None:
        async with server.chat("idle") as watcher, server.chat("idle") as chat:
            await watcher.subscribe()
            await chat.subscribe()
            run = await chat.run("tokens=4")
            await watcher.finished(run[0]["runId"])
            assert watcher.raw_events == chat.raw_events

    async def test_is_one_a_socket(self, server: Server) -> None:
        async with server.chat() as chat:
            told = await chat.subscribe()
            assert await refused(chat, "subscription.subscribe") == "invalid_argument"
            code = await refused(chat, "subscription.unsubscribe", subscription_id="nope")
            assert code == "no_such_subscription"
            await chat.ask("subscription.unsubscribe", subscription_id=told["subscription_id"])
            await chat.subscribe()

    async def test_can_be_exchanged_without_waiting_for_the_reply(self, server: Server) -> None:
        async with server.chat() as chat:
            told = await chat.subscribe()
            gone = await chat.send(
                "subscription.unsubscribe",
                {"subscription_id": told["subscription_id"]},
            )
            new = await chat.send("subscription.subscribe", {"since": 0})
            await chat.result(gone)
            assert (await chat.result(new))["subscription_id"] != told["subscription_id"]

    async def test_that_ended_sends_nothing_more(self, server: Server) -> None:
        async with server.chat() as chat, server.chat() as other:
            told = await chat.subscribe()
            await other.subscribe()
            await chat.ask("subscription.unsubscribe", subscription_id=told["subscription_id"])
            await other.run("tokens=5")
            await chat.ask("state.get")  # a round trip behind whatever was sent
            assert chat.events == []

    async def test_is_told_that_its_thread_is_deleted(self, server: Server) -> None:
        async with server.chat() as chat, server.http() as http:
            await chat.subscribe()
            await chat.run("tokens=1")
            assert (await http.delete("/threads/thread-a")).status_code == 204
            assert (await chat.reply(None))["error"] == "no_such_thread"
            told = await chat.subscribe(since=2)
            assert told["reset"] is True


class TestCancelling:
    async def test_without_waiting_is_answered_at_once(self, server: Server) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            run_id = await chat.start("hang")
            told = await chat.ask("run.cancel", run_id=run_id)
            assert told == {"run_id": run_id, "status": "cancelling"}
            end = await chat.finished(run_id)
            check_agui(chat.events)
        assert end["outcome"] == {"type": "cancelled"}
        assert end["metadata"]["creche"]["receipt"]["reason"] == "user"

    async def test_with_waiting_is_answered_when_it_has_ended(self, tmp_path: Path) -> None:
        cleaning, go = trio.Event(), trio.Event()
        cleaned: list[str] = []

        async def careful(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    cleaning.set()
                    await go.wait()
                    cleaned.append("up")

        async with open_server(tmp_path, {"careful": careful}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run_id = await chat.start("go", "careful")
                await chat.until(lambda: chat.seen("RUN_STARTED"))
                number = await chat.send("run.cancel", {"run_id": run_id, "wait": True})
                with trio.fail_after(PATIENCE):
                    await cleaning.wait()
                await chat.ask("state.get")
                assert number not in chat.replies
                go.set()
                told = await chat.result(number)
                assert cleaned == ["up"]
                # The terminal event was committed before the reply: another reader has it all.
                async with server.chat() as other:
                    await other.subscribe()
                    end = await other.finished(run_id)
        assert told["status"] == "cancelled"
        assert told["receipt"] == end["metadata"]["creche"]["receipt"]
        assert told["receipt"]["reason"] == "user"
        assert told["receipt"]["tasks_ended"] >= 1

    @pytest.mark.parametrize("wait", [False, True])
    async def test_of_a_run_that_is_over_gives_its_receipt(
        self,
        server: Server,
        wait: bool,
    ) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            run = await chat.run("tokens=1")
            told = await chat.ask("run.cancel", run_id=run[0]["runId"], wait=wait)
        assert told["status"] == "success"
        assert told["receipt"] == run[-1]["metadata"]["creche"]["receipt"]

    @pytest.mark.parametrize("wait", [False, True])
    async def test_what_is_anothers_is_answered_as_what_is_absent(
        self,
        server: Server,
        wait: bool,
    ) -> None:
        async with server.chat() as ada, server.chat(user="bob") as bob:
            await ada.subscribe()
            live = await ada.start("hang")
            async with server.chat("elsewhere") as elsewhere:
                await elsewhere.subscribe()
                over = (await elsewhere.run("tokens=1"))[0]["runId"]
            answers = []
            for run_id in (live, over, "absent"):
                number = await bob.send("run.cancel", {"run_id": run_id, "wait": wait})
                reply = dict(await bob.reply(number))
                del reply["id"]
                answers.append(reply)
            assert answers[0] == answers[1] == answers[2]
            assert answers[0]["error"] == "no_such_run"
            assert ada.terminal(live) is None
            assert (await ada.ask("run.cancel", run_id=live, wait=True))["status"] == "cancelled"

    async def test_a_run_of_another_thread_of_ones_own_is_refused(self, server: Server) -> None:
        async with server.chat() as here, server.chat("other") as there:
            run_id = await there.start("hang")
            assert await refused(here, "run.cancel", run_id=run_id) == "no_such_run"

    async def test_in_a_tool_stops_the_tool_and_names_it(self, tmp_path: Path) -> None:
        inside = trio.Event()
        stopped: list[bool] = []

        @tool
        async def stuck() -> str:
            """Hang."""
            inside.set()
            return str(await trio.sleep_forever())

        @tool(shared=(stopped,))
        def stubborn(caller: ToolContext) -> str:
            """Wait in a thread for the flag."""
            trio.from_thread.run_sync(inside.set)
            stopped.append(caller.stop.wait(30))
            return "never read"

        async def call(run: RunContext) -> None:
            await run.call_tool(str(run.messages[-1].content), {})

        async with open_server(tmp_path, {"call": call}, (stuck, stubborn)) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                for name, how in (("stuck", "cancelled"), ("stubborn", "stopped")):
                    inside = trio.Event()
                    run_id = await chat.start(name, "call")
                    with trio.fail_after(PATIENCE):
                        await inside.wait()
                    told = await chat.ask("run.cancel", run_id=run_id, wait=True)
                    assert told["receipt"]["tools_stopped"] == [{"name": name, "how": how}]
                    assert told["receipt"]["threads_abandoned"] == []
                    await chat.finished(run_id)
                    kinds = types_of(chat.run_events(run_id))
                    assert kinds[-2:] == ["TOOL_CALL_RESULT", "RUN_FINISHED"]
                check_agui(chat.events)
        assert stopped == [True]

    async def test_a_queued_run_keeps_it_from_running(self, tmp_path: Path) -> None:
        go = trio.Event()
        ran: list[str] = []

        async def wait(run: RunContext) -> None:
            ran.append(str(run.messages[-1].content))
            await go.wait()

        async with open_server(tmp_path, {"wait": wait}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                first = await chat.start("one", "wait")
                second = await chat.start("two", "wait")
                third = await chat.start("three", "wait")
                assert (await chat.ask("run.cancel", run_id=second))["status"] == "cancelling"
                go.set()
                for run_id in (first, second, third):
                    await chat.finished(run_id)
                check_agui(chat.events)
                assert chat.run_events(second)[-1]["outcome"] == {"type": "cancelled"}
        assert ran == ["one", "three"]

    async def test_a_queued_run_need_not_wait_for_the_one_before_it(self, server: Server) -> None:
        async with server.chat() as chat:
            await chat.start("hang")
            second = await chat.start("tokens=1")
            number = await chat.send("run.cancel", {"run_id": second, "wait": True})
            with trio.move_on_after(2):
                assert (await chat.result(number))["status"] == "cancelled"
                return
            pytest.fail("it waits for a run that may take ten minutes")

    async def test_a_queued_run_is_stored_as_cancelled_when_that_is_answered(
        self,
        server: Server,
    ) -> None:
        """Else it is `lost` after a crash, although somebody was told that it is cancelled."""
        async with server.chat() as chat:
            await chat.subscribe()
            first = await chat.start("hang")
            second = await chat.start("tokens=1")
            told = await chat.ask("run.cancel", run_id=second, wait=True)
            with contextlib.closing(sqlite3.connect(server.settings.data / "creche.db")) as other:
                row = other.execute("SELECT status FROM runs WHERE run_id = ?", [second]).fetchone()
            assert row == (told["status"],)
            await chat.ask("run.cancel", run_id=first, wait=True)
            end = await chat.finished(second)
            assert end["metadata"]["creche"]["receipt"]["reason"] == told["receipt"]["reason"]

    async def test_twice_changes_nothing(self, server: Server) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            run_id = await chat.start("hang")
            numbers = [
                await chat.send("run.cancel", {"run_id": run_id, "wait": True}) for _ in "123"
            ]
            receipts = [(await chat.result(number))["receipt"] for number in numbers]
            assert receipts[0] == receipts[1] == receipts[2]
            await chat.finished(run_id)
            terminals = [event for event in chat.events if event["type"] == "RUN_FINISHED"]
            assert len(terminals) == 1

    async def test_a_flood_is_heeded_at_once(self, tmp_path: Path) -> None:
        """And a run of somebody else's makes progress meanwhile."""

        async def flood(run: RunContext) -> None:
            while True:
                await run.emit.text("x")

        async with open_server(tmp_path, {"flood": flood}) as server:
            async with server.chat() as ada, server.chat(user="bob") as bob:
                await bob.subscribe()
                run_id = await ada.start("go", "flood")
                with trio.fail_after(PATIENCE):
                    assert (await bob.run("tokens=50"))[-1]["outcome"] == {"type": "success"}
                with trio.fail_after(2):
                    told = await ada.ask("run.cancel", run_id=run_id, wait=True)
                assert told["status"] == "cancelled"

    async def test_a_flood_that_is_watched_is_heeded_too(self, tmp_path: Path) -> None:
        async def flood(run: RunContext) -> None:
            while True:
                await run.emit.text("x")

        async with open_server(tmp_path, {"flood": flood}) as server:
            async with server.chat() as ada, server.chat() as second:
                await ada.subscribe()
                run_id = await second.start("go", "flood")
                await ada.until(lambda: len(ada.events) > 2000, "it floods")
                with trio.fail_after(3):
                    told = await second.ask("run.cancel", run_id=run_id, wait=True)
                assert told["status"] == "cancelled"


class TestDoubleTexting:
    """What becomes of what runs on a thread when somebody asks for more."""

    async def test_a_rejected_run_is_told_that_the_thread_is_busy(self, server: Server) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            first = await chat.start("hang")
            number = await chat.send(
                "run.start", asking("tokens=1") | {"multitask_strategy": "reject"}
            )
            reply = await chat.reply(number)
            assert (reply["type"], reply["error"]) == ("error", "busy")
            assert "this thread is busy" in reply["message"]
            async with server.http() as http:
                state = (await http.get("/threads/thread-a/state")).json()
            assert (state["active_run"], state["queued_runs"]) == (first, [])
            assert len(state["values"]["messages"]) == 1

    async def test_an_interrupting_run_is_next_and_the_others_end_as_superseded(
        self, server: Server
    ) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            hanging = await chat.start("hang")
            waiting = await chat.start("tokens=1 never said")
            last = await chat.ask("run.start", **asking("tokens=1"), multitask_strategy="interrupt")
            assert last["queued"] == 1
            await chat.finished(last["run_id"])
            for run_id in (hanging, waiting):
                terminal = chat.terminal(run_id)
                assert terminal is not None
                assert terminal["metadata"]["creche"]["receipt"]["reason"] == "superseded"
            check_agui(chat.events)
            state = await chat.ask("state.get")
        contents = [message["content"] for message in state["values"]["messages"]]
        assert [words for words in contents if words] == [
            "hang",
            "tokens=1 never said",
            "tokens=1",
            "tok0 ",
        ]

    async def test_what_was_rolled_back_is_told_and_neither_in_the_state_nor_in_the_history(
        self, tmp_path: Path
    ) -> None:
        read: list[list[str]] = []

        async def talk(run: RunContext) -> None:
            read.append([str(message.content) for message in run.messages])
            await run.emit.text("said")
            if run.messages[-1].content == "hang":
                await trio.sleep_forever()

        async with open_server(tmp_path, {"talk": talk}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                await chat.run("one", "talk")
                gone = await chat.start("hang", "talk")
                await chat.until(lambda: "TEXT_MESSAGE_CONTENT" in types_of(chat.run_events(gone)))
                last = await chat.ask(
                    "run.start", **asking("two", "talk"), multitask_strategy="rollback"
                )
                await chat.finished(last["run_id"])
                check_agui(chat.events)
                _, told, *_ = chat.run_events(last["run_id"])
                assert (told["type"], told["name"]) == ("CUSTOM", "creche.rolled_back")
                assert told["value"] == {"run_ids": [gone]}
                assert words_of(chat.run_events(gone)) == "said", "the log keeps it"
                state = await chat.ask("state.get")
                async with server.http() as http:
                    over_http = (await http.get("/threads/thread-a/state")).json()
                    states = (await http.get("/threads/thread-a/history")).json()
        contents = [message["content"] for message in state["values"]["messages"]]
        assert contents == ["one", "said", "two", "said"]
        assert over_http["values"] == state["values"]
        assert [len(each["values"]["messages"]) for each in states] == [4, 2]
        assert read == [["one"], ["one", "said", "hang"], ["one", "said", "two"]]

    async def test_a_storm_of_mixed_starts_keeps_its_order(self, tmp_path: Path) -> None:
        chance = random.Random(7)
        kinds = ["enqueue", "reject", "interrupt", "rollback"]
        opened = open_server(tmp_path, runs_per_thread=200, runs_per_user=200)
        async with opened as server, server.chat() as chat:
            await chat.subscribe()
            numbers = []
            for number in range(100):
                params = asking(f"tokens={chance.choice([1, 3])} ask {number}")
                params["multitask_strategy"] = chance.choices(kinds, [6, 2, 1, 1])[0]
                numbers.append(await chat.send("run.start", params))
                if chance.random() < 0.2:
                    await trio.sleep(0.005)
            # Each start settles its place before its reply waits for the commit; 32 may wait.
            replies = [await chat.reply(number) for number in numbers]
            taken = [reply["result"]["run_id"] for reply in replies if reply["type"] == "success"]
            told = {reply["error"] for reply in replies if reply["type"] == "error"}
            assert told <= {"busy", "limit_exceeded"}
            assert len(taken) > 30
            for run_id in taken:
                await chat.finished(run_id)
            check_agui(chat.events)
            runs = by_run(chat.events)
            assert [run[0]["runId"] for run in runs] == taken
            assert chat.terminal(taken[-1])["outcome"]["type"] == "success"  # type: ignore[index]
            gone = {
                run_id
                for event in chat.events
                if event.get("name") == "creche.rolled_back"
                for run_id in event["value"]["run_ids"]
            }
            assert gone
            state = await chat.ask("state.get", limit=1000)
        asked = [m["content"] for m in state["values"]["messages"] if m["role"] == "user"]
        assert asked == [
            run[0]["input"]["messages"][0]["content"] for run in runs if run[0]["runId"] not in gone
        ]


class TestAdmission:
    """A user's runs over the cap wait for a place, and say where they stand."""

    async def test_the_reply_and_then_the_event_tell_the_position(self, tmp_path: Path) -> None:
        async with open_server(tmp_path, running_per_user=1) as server:
            async with server.chat("t0") as chat, server.chat("t1") as other:
                await other.subscribe()
                running = await chat.start("hang")
                first = await other.ask("run.start", **asking("tokens=1"))
                second = await other.ask("run.start", **asking("tokens=1"))
                assert (first["queued"], second["queued"]) == (1, 2)
                async with server.chat("t0", user="bob") as bob:
                    await bob.subscribe()
                    assert (await bob.run("tokens=1"))[-1]["type"] == "RUN_FINISHED"
                assert other.events == [], "nothing comes before RUN_STARTED"
                await trio.sleep(1.1)
                await chat.ask("run.cancel", run_id=running)
                await other.finished(second["run_id"])
                for position, run in enumerate((first, second), 1):
                    started, queued, *_ = other.run_events(run["run_id"])
                    assert (started["type"], queued["name"]) == ("RUN_STARTED", "creche.queued")
                    assert queued["value"]["position"] == position
                    assert queued["value"]["waited_ms"] > 1000

    async def test_a_full_queue_is_an_error_with_a_time(self, tmp_path: Path) -> None:
        async with open_server(tmp_path, running_per_user=1, runs_per_user=2) as server:
            async with server.chat("t0") as chat, server.chat("t1") as other:
                await chat.start("hang")
                await other.start("tokens=1")
                reply = await other.reply(await other.send("run.start", asking("tokens=1")))
                assert (reply["error"], reply["retry_after"]) == ("limit_exceeded", 1.0)
                assert "this user already has 2 runs" in reply["message"]


class TestWhoLeaves:
    """What becomes of a run when its clients go; its rules are in tests/core/test_watchers.py."""

    async def start(self, chat: Chat, words: str, **more: Any) -> str:
        reply = await chat.ask("run.start", **asking(words), **more)
        run_id: str = reply["run_id"]
        return run_id

    async def live_runs(self, server: Server) -> int:
        async with server.http(user=None) as http:
            lines = (await http.get("/metrics")).text.splitlines()
        (value,) = [line.split()[1] for line in lines if line.startswith("creche_runs_live ")]
        return int(float(value))

    async def until_over(self, server: Server) -> None:
        with trio.fail_after(PATIENCE):
            while await self.live_runs(server):
                await trio.sleep(0.01)

    async def test_a_run_that_is_to_end_with_its_watchers_does(self, server: Server) -> None:
        async with server.chat() as chat:
            run_id = await self.start(chat, "hang", on_disconnect="cancel", disconnect_grace=0)
            await trio.sleep(0.05)  # unsubscribed, it watches all the same: it is who asked
            assert await self.live_runs(server) == 1
        await self.until_over(server)
        async with server.chat() as chat:
            await chat.subscribe()
            terminal = await chat.finished(run_id)
        assert terminal["outcome"] == {"type": "cancelled"}
        assert terminal["metadata"]["creche"]["receipt"]["reason"] == "disconnect"

    async def test_the_last_to_leave_counts(self, server: Server) -> None:
        async with server.chat() as witness:
            await witness.subscribe()
            async with server.chat() as chat:
                await self.start(chat, "hang", on_disconnect="cancel", disconnect_grace=0)
            await witness.until(lambda: witness.seen("RUN_STARTED"), "it was seen")
            await trio.sleep(0.05)
            assert await self.live_runs(server) == 1
        await self.until_over(server)

    async def test_who_comes_back_in_time_finds_it_going_on(self, server: Server) -> None:
        async with server.chat() as chat:
            run_id = await self.start(chat, "hang", on_disconnect="cancel", disconnect_grace=60)
        async with server.chat() as chat:
            await chat.subscribe()
            reply = await chat.ask("run.cancel", run_id=run_id, wait=True)
            assert reply["receipt"]["reason"] == "user"

    async def test_another_users_socket_is_no_watcher(self, server: Server) -> None:
        async with server.chat(user="bob") as bob:
            await bob.subscribe()
            async with server.chat() as chat:
                await self.start(chat, "hang", on_disconnect="cancel", disconnect_grace=0)
            await self.until_over(server)

    async def test_one_that_is_refused_is_refused_as_any(self, server: Server) -> None:
        async with server.chat() as chat:
            asked = asking("x", "nobody")
            assert await refused(chat, "run.start", **asked, on_disconnect="cancel") == (
                await refused(chat, "run.start", **asked)
            )
            assert await self.live_runs(server) == 0

    async def test_any_other_run_goes_on(self, server: Server) -> None:
        async with server.chat() as chat:
            run_id = await self.start(chat, "hang")
        async with server.chat() as chat:
            reply = await chat.ask("run.cancel", run_id=run_id, wait=True)
            assert reply["receipt"]["reason"] == "user"


class TestStartingManyRuns:
    async def test_at_once_keeps_their_order_or_is_refused_with_a_time(
        self,
        server: Server,
    ) -> None:
        """The limit of a thread is 20."""
        async with server.chat() as chat:
            await chat.subscribe()
            await chat.start("hang")
            numbers = [
                await chat.send("run.start", asking(f"tokens=1 number {number}"))
                for number in range(100)
            ]
            replies = [await chat.reply(number) for number in numbers]
            taken = [reply["result"]["run_id"] for reply in replies if reply["type"] == "success"]
            refusals = [reply for reply in replies if reply["type"] == "error"]
            assert len(taken) == 19
            assert {reply["error"] for reply in refusals} == {"limit_exceeded"}
            assert all(reply["retry_after"] > 0 for reply in refusals)
            async with server.http() as http:
                state = (await http.get("/threads/thread-a/state")).json()
            assert state["queued_runs"] == taken

    async def test_that_are_all_allowed_are_all_told_of(self, tmp_path: Path) -> None:
        """An error means that nothing was started; otherwise a client asks twice and gets two."""
        async with open_server(tmp_path, runs_per_thread=200, runs_per_user=200) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                numbers = [*range(1000, 1100)]
                commands = (
                    {"id": number, "method": "run.start", "params": asking("tokens=1")}
                    for number in numbers
                )
                # In one go, so that they are all there before the first can be committed.
                await chat.stream.send_all(
                    b"".join(
                        bare.frame(bare.TEXT, json.dumps(command).encode()) for command in commands
                    ),
                )
                replies = [await chat.reply(number) for number in numbers]
                told = [
                    reply["result"]["run_id"] for reply in replies if reply["type"] == "success"
                ]
                await chat.until(
                    lambda: (
                        len(by_run(chat.events)) >= len(told)
                        and bool(told)
                        and chat.terminal(told[-1]) is not None
                    ),
                    "all have run",
                )
                async with server.http() as http:
                    thread = (await http.get("/threads/thread-a")).json()
                assert thread["runs"] == len(told), "nothing was started but what was told of"
                assert [run[0]["runId"] for run in by_run(chat.events)] == told

    async def test_is_limited_for_a_user_over_all_threads(self, tmp_path: Path) -> None:
        async with open_server(tmp_path, runs_per_user=2) as server:
            async with server.chat("one") as one, server.chat("two") as two:
                async with server.chat("three") as three, server.chat(user="bob") as bob:
                    await one.start("hang")
                    await two.start("hang")
                    assert await refused(three, "run.start", **asking("x")) == "limit_exceeded"
                    await bob.start("tokens=1")


class TestACommand:
    async def test_that_is_wrong_is_answered_and_the_socket_lives(
        self,
        server: Server,
        complaints: list[str],
    ) -> None:
        async with server.chat() as chat:
            for frame, code, number in WRONG_COMMANDS:
                chat.replies.clear()
                await chat.socket.send_message(frame)
                reply = await chat.reply(number)
                assert (reply["type"], reply["error"]) == ("error", code), frame
                assert reply["message"], frame
            assert await chat.ask("state.get") == {"values": {"messages": []}}

    async def test_in_a_binary_frame_is_answered_and_the_socket_lives(
        self,
        server: Server,
        complaints: list[str],
    ) -> None:
        async with server.chat() as chat:
            for data in (b'{"id":1,"method":"state.get"}', b"", b"\xff"):
                await chat.socket.send_message(data)
                assert (await chat.reply(None))["error"] == "invalid_argument"
                del chat.replies[None]
            await chat.ask("state.get")

    @pytest.mark.parametrize("depth", [500, 5_000, 100_000])
    async def test_that_is_nested_too_deeply_is_answered(
        self,
        server: Server,
        complaints: list[str],
        depth: int,
    ) -> None:
        async with server.chat() as chat:
            deep = "[" * depth + "]" * depth
            params = f'{{"metadata":{{"a":{deep}}},"input":{{"messages":[{{"content":"x"}}]}}}}'
            await chat.socket.send_message(f'{{"id":1,"method":"run.start","params":{params}}}')
            await chat.until(lambda: chat.order, "an answer")
            assert next(iter(chat.replies.values()))["type"] in {"error", "success"}
            await chat.socket.send_message('{"id":9,"method":"state.get"}')
            await chat.reply(9)

    async def test_too_large_closes_with_1009(self, server: Server, complaints: list[str]) -> None:
        async with server.chat() as chat:
            await chat.socket.send_message("x" * (1024 * 1024 + 1))
            assert (await chat.end())[0] == 1009

    async def test_just_not_too_large_is_taken(self, server: Server) -> None:
        words = "tokens=1 " + "é" * (500 * 1024)
        async with server.chat() as chat:
            await chat.subscribe()
            run = await chat.run(words)
            assert run[0]["input"]["messages"][0]["content"] == words

    async def test_keeps_its_id_whatever_that_is(self, server: Server) -> None:
        async with server.chat() as chat:
            for number in (0, -1, 2**31, 2**63, 2**64, 10**40):
                await chat.socket.send_message(f'{{"id":{number},"method":"state.get"}}')
                assert (await chat.reply(number))["type"] == "success"

    async def test_with_words_in_parts_is_taken(self, server: Server) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            parts = [{"type": "text", "text": "tokens"}, {"type": "text", "text": "=2"}]
            started = await chat.ask(
                "run.start",
                input={"messages": [{"id": "mine", "role": "user", "content": parts}]},
            )
            await chat.finished(started["run_id"])
            message = chat.events[0]["input"]["messages"][0]
            assert message == {"role": "user", "id": "mine", "content": "tokens=2"}
            check_agui(chat.events)

    async def test_that_waits_does_not_hold_up_the_next(self, tmp_path: Path) -> None:
        go = trio.Event()

        async def slow_to_end(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    await go.wait()

        async with open_server(tmp_path, {"slow": slow_to_end}) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run_id = await chat.start("x", "slow")
                await chat.until(lambda: chat.seen("RUN_STARTED"))
                waiting = [
                    await chat.send("run.cancel", {"run_id": run_id, "wait": True})
                    for _ in range(40)
                ]
                # 32 may wait; the others are told so, and a start is not one of them.
                refusals = [await chat.reply(number) for number in waiting[32:]]
                assert {reply["error"] for reply in refusals} == {"limit_exceeded"}
                assert all(reply["retry_after"] for reply in refusals)
                started = await chat.send("run.start", asking("tokens=1"))
                reply = await chat.reply(started)
                async with server.http() as http:
                    state = (await http.get("/threads/thread-a/state")).json()
                go.set()
                for number in waiting[:32]:
                    await chat.result(number)
        taken = state["queued_runs"]
        told = [reply["result"]["run_id"]] if reply["type"] == "success" else []
        assert told == taken, "an error means that nothing was started"

    async def test_state_get_tells_the_messages(self, server: Server) -> None:
        async with server.chat() as chat:
            await chat.subscribe()
            await chat.run(MIXED)
            messages = (await chat.ask("state.get"))["values"]["messages"]
        assert [message["role"] for message in messages] == [
            "user",
            "assistant",
            "tool",
            "assistant",
        ]
        assert messages[1]["toolCalls"][0]["function"]["name"] == "calculator"
        assert messages[2]["toolCallId"] == messages[1]["toolCalls"][0]["id"]


class TestTwoUsers:
    async def test_with_the_same_thread_id_have_two_threads(self, server: Server) -> None:
        async with server.chat(user="ada") as ada, server.chat(user="bob") as bob:
            await ada.subscribe()
            await bob.subscribe()
            await ada.run("tokens=1 canary-of-ada")
            assert bob.events == []
            assert (await bob.ask("state.get"))["values"]["messages"] == []
            await bob.run("tokens=2 canary-of-bob")
            assert "canary-of-ada" not in "".join(bob.frames)
            assert "canary-of-bob" not in "".join(ada.frames)

    async def test_never_see_a_word_of_each_other(
        self,
        tmp_path: Path,
    ) -> None:
        """Eight users, one thread id, all at once; each says, calls and fails with a canary."""

        @tool
        async def echo(caller: ToolContext, text: str) -> str:
            """Say who called, and what."""
            await trio.lowlevel.checkpoint()
            return f"{text} {caller.context.user_id}"

        async def talk(run: RunContext) -> None:
            canary = str(run.messages[-1].content)
            for number in range(40):
                await run.emit.text(f"{canary} {number} ")
                await trio.lowlevel.checkpoint()
            await run.call_tool("echo", {"text": canary})
            raise ValueError(canary)

        users = [f"user-{number}" for number in range(8)]
        frames: dict[str, str] = {}

        async def use(server: Server, user: str) -> None:
            async with server.chat(user=user) as chat, server.http(user) as http:
                await chat.subscribe()
                for _ in range(2):
                    await chat.run(f"canary-of-{user}!", "talk")
                await chat.ask("state.get")
                answers = [
                    (await http.get(path)).text
                    for path in ("/threads", "/threads/thread-a/state", "/threads/thread-a/history")
                ]
                frames[user] = "".join([*chat.frames, *answers])

        async with open_server(tmp_path, {"talk": talk}, (echo,)) as server:
            async with trio.open_nursery() as nursery:
                for user in users:
                    nursery.start_soon(use, server, user)
        for user in users:
            assert frames[user].count(f"canary-of-{user}!") > 80
            for other in users:
                if other != user:
                    assert f"canary-of-{other}!" not in frames[user], (user, other)
                    assert f'"{other}"' not in frames[user]


async def test_a_fault_before_it_never_makes_a_socket_send_another_users_events(
    tmp_path: Path,
) -> None:
    """The last of the layers that check: here the one before it is broken on purpose."""
    async with open_server(tmp_path) as server:
        async with server.chat(user="bob") as bob:
            await bob.subscribe()
            await bob.run("tokens=3")
            thread_id = ThreadId("thread-a")
            bobs = UserId("bob"), thread_id
            (slots,) = (
                found._slots
                for found in gc.get_objects()
                if type(found) is Journals and bobs in found._slots
            )
            slots[UserId("ada"), thread_id] = slots[bobs]
            async with server.chat(user="ada") as ada:
                number = await ada.send("subscription.subscribe", {})
                with pytest.raises(CommandError, match="unknown_error"):
                    await ada.result(number)
                await ada.ask("state.get")
                assert ada.events == []
                assert "tok0" not in "".join(ada.frames)


class TestAClientThatDoesNotRead:
    async def test_costs_bounded_memory_and_delays_nobody(self, tmp_path: Path) -> None:
        async def say_much(run: RunContext) -> None:
            for _ in range(1500):
                await run.emit.text("x" * 8000)

        async with open_server(tmp_path, {"much": say_much}) as server:
            async with await bare.deaf_connection(server.port) as deaf, server.chat() as chat:
                await bare.shake_hands(deaf, "/threads/thread-a/stream", server.token())
                await deaf.send_all(
                    bare.frame(bare.TEXT, b'{"id":1,"method":"subscription.subscribe"}'),
                )
                await chat.subscribe()
                run = await chat.run("go", "much")
                assert len(words_of(run)) == 1500 * 8000
                assert unsent() < HIGH_WATER + 2 * 64 * 1024  # one part beyond the mark
                assert unsent() > 0, "this test needs a client that is really behind"
                async with server.chat(user="bob") as bob:
                    await bob.subscribe()
                    with trio.fail_after(3):
                        await bob.run("tokens=100")
                began = trio.current_time()
                await server.shut_down()
                assert trio.current_time() - began < 4

    async def test_and_sends_nonsense_is_not_answered_without_end(self, tmp_path: Path) -> None:
        """Each wrong frame has an answer; who does not take the answers is not asked for more."""
        async with open_server(tmp_path) as server:
            async with await bare.deaf_connection(server.port) as deaf:
                await bare.shake_hands(deaf, "/threads/thread-a/stream", server.token())
                nonsense = bare.frame(bare.TEXT, b'{"id":1,"method":"' + b"x" * 60 + b'"}') * 1000
                with trio.move_on_after(3):
                    for _ in range(60):
                        await deaf.send_all(nonsense)
                async with server.chat(user="bob") as bob:
                    await bob.ask("state.get")
                assert unsent() < 4 * HIGH_WATER

    async def test_and_pings_is_not_answered_without_end(self, tmp_path: Path) -> None:
        async with open_server(tmp_path) as server:
            async with await bare.deaf_connection(server.port) as deaf:
                await bare.shake_hands(deaf, "/threads/thread-a/stream", server.token())
                pings = bare.frame(bare.PING, b"x" * 125) * 1000
                with trio.move_on_after(3):
                    for _ in range(60):
                        await deaf.send_all(pings)
                async with server.chat(user="bob") as bob:
                    await bob.ask("state.get")
                assert unsent() < 4 * HIGH_WATER

    async def test_and_asks_for_the_state_again_and_again_is_bounded(self, tmp_path: Path) -> None:
        async with open_server(tmp_path) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                for _ in range(4):
                    await chat.run("tokens=1 " + "x" * 500_000)
            async with await bare.deaf_connection(server.port) as deaf:
                await bare.shake_hands(deaf, "/threads/thread-a/stream", server.token())
                await deaf.send_all(bare.frame(bare.TEXT, b'{"id":1,"method":"state.get"}') * 500)
                await eventually(lambda: unsent() > HIGH_WATER, "an answer waits")
                async with server.chat(user="bob") as bob:
                    for _ in range(50):
                        await bob.ask("state.get")
                assert unsent() < 3_000_000, "more than the one answer that it did not read"


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=40))
def test_what_is_posted_in_one_go_is_bounded(sizes: list[int]) -> None:
    entries = [Entry(seq, bytes(size)) for seq, size in enumerate(sizes, 1)]
    parts = list(in_parts(entries))
    whole = b"".join(text_frame(entry.data) for entry in entries)
    assert b"".join(frames for frames, _ in parts) == whole
    assert [last for _, last in parts] == sorted({last for _, last in parts})
    assert parts[-1][1] == len(sizes)
    # All but one frame of a part fit below the mark, and parts are no smaller than they must be.
    assert all(len(frames) < 64 * 1024 + max(sizes) + 10 for frames, _ in parts)
    assert all(len(frames) >= 64 * 1024 for frames, _ in parts[:-1])


class TestTheConnection:
    async def test_needs_the_subprotocol(self, server: Server) -> None:
        async with await server.connect() as stream:
            request = bare.upgrade_request(
                "/threads/x/stream",
                server.token(),
                subprotocol=b"something.else",
            )
            await stream.send_all(request)
            head, _ = await bare.read_head(stream)
        assert head.startswith(b"HTTP/1.1 400 ")

    async def test_is_made_at_these_paths(self, server: Server) -> None:
        for path in (
            "/threads/t/stream",
            "/threads/t/stream/events",
            "/threads/a%20%C3%A9/stream",
        ):
            async with server.chat(path=path) as chat:
                await chat.ask("state.get")

    async def test_is_refused_at_others(self, server: Server, complaints: list[str]) -> None:
        for path in (
            "/",
            "/threads",
            "/threads/t",
            "/threads//stream",
            "/threads/%00/stream",
            "/threads/none/stream",
            "/threads/a%2Fb/stream",
            "/threads/%2e%2E/stream",
            "/threads/%ff/stream",
            "/threads/" + "x" * 257 + "/stream",
            "/threads/t/stream/events/more",
            "/agents/t/stream",
        ):
            async with server.chat(path=path) as chat:
                code, reason = await chat.end()
            assert code == 4400, path
            assert reason, path

    async def test_is_one_of_a_few_that_a_user_may_have(self, tmp_path: Path) -> None:
        async with open_server(tmp_path, max_connections_per_user=2) as server:
            async with server.chat() as one, server.chat("other"):
                async with server.chat() as third:
                    code, reason = await third.end()
                    assert code == 4429
                    assert "2 connections" in str(reason)
                    assert "max_connections_per_user" in str(reason), "what to set"
                async with server.chat(user="bob") as bob:
                    await bob.ask("state.get")
                await one.socket.aclose()
                with trio.fail_after(PATIENCE):
                    while True:  # until the server has seen that the first one is gone
                        async with server.chat() as again:
                            with contextlib.suppress(AssertionError):
                                await again.ask("state.get")
                                break

    async def test_answers_pings_and_closes_in_good_form(self, server: Server) -> None:
        async with await server.connect() as stream:
            rest = await bare.shake_hands(stream, "/threads/t/stream", server.token())
            await stream.send_all(bare.frame(bare.PING, b"are you there"))
            await stream.send_all(bare.frame(bare.CLOSE, (1000).to_bytes(2, "big")))
            with trio.fail_after(PATIENCE):
                got = await bare.frames_to_the_end(stream, rest)
        assert got == [(bare.PONG, b"are you there"), (bare.CLOSE, (1000).to_bytes(2, "big"))]

    async def test_takes_a_command_in_many_small_pieces(self, server: Server) -> None:
        command = b'{"id":1,"method":"state.get"}'
        whole = b"".join(
            bare.frame(
                bare.TEXT if at == 0 else 0, command[at : at + 1], fin=at == len(command) - 1
            )
            + bare.frame(bare.PING, b"")
            for at in range(len(command))
        )
        async with await server.connect() as stream:
            rest = await bare.shake_hands(stream, "/threads/t/stream", server.token())
            for position in range(0, len(whole), 3):
                await stream.send_all(whole[position : position + 3])
            with trio.fail_after(PATIENCE):
                received = bytearray(rest)
                pongs = 0
                while (found := await bare.next_frame(stream, received)) is not None:
                    if found[0] == bare.TEXT:
                        break
                    pongs += 1
        assert found is not None
        assert json.loads(found[1])["type"] == "success"
        assert pongs >= len(command) - 1


async def test_logs_hold_no_secret_of_a_tools_arguments(
    tmp_path: Path,
) -> None:
    """The log as the process writes it, at its most talkative."""
    secret = "hunter2-canary"

    @tool
    async def login(password: str, api_key: str) -> dict[str, str]:
        """Log in somewhere."""
        logging.getLogger("mine").info("logging in")
        if api_key == "wrong":
            msg = f"refused: password={password}"
            raise ValueError(msg)
        return {"token": secret, "password": password}

    async def use(run: RunContext) -> None:
        await run.call_tool("login", {"password": secret, "api_key": secret})
        await run.call_tool("login", {"password": secret, "api_key": "wrong"})

    logged = io.StringIO()
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        configure_logging("debug", logged)
        async with open_server(tmp_path, {"use": use}, (login,)) as server:
            async with server.chat() as chat:
                await chat.subscribe()
                run = await chat.run("go", "use")
                told = "".join(chat.frames)
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)
    assert types_of(run).count("TOOL_CALL_RESULT") == 2
    assert secret not in told
    assert "tool login failed" in logged.getvalue()
    assert secret not in logged.getvalue()
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    own = [line for line in lines if line["event"] == "logging in"]
    assert len(own) == 2
    for line in own:
        assert (line["user_id"], line["thread_id"]) == ("ada", "thread-a"), "whose it is"
        assert line["run_id"] == run[0]["runId"]
