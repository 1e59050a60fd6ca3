"""Questions to a person, over real sockets: asked, answered from anywhere, kept over a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import trio
from tests.server.running import Chat, CommandError, Server, check_agui, open_server, words_of
from tests.server.test_audit import audited

from creche import RunContext, new_id, tool


class Trip(msgspec.Struct, forbid_unknown_fields=True):
    to: Literal["Paris", "Rome"]
    days: int = 3


async def asks(run: RunContext) -> None:
    trip = await run.ask(Trip, "Where to?")
    await run.emit.text(f"{trip.days} days in {trip.to}")


async def hears(run: RunContext) -> None:
    """Says what it was told last; asks if it was not told."""
    if len(run.messages) < 3:
        await run.ask(None, "Your name?")
    else:
        await run.emit.text(" / ".join(str(message.content) for message in run.messages[-2:]))


@tool(approval=True)
async def pay(amount: int) -> str:
    """Pay."""
    return f"paid {amount}"


AGENTS = {"asks": asks, "hears": hears}


@pytest.fixture
def server(asking_server: Server) -> Server:
    return asking_server


@pytest.fixture
async def asking_server(tmp_path: Path) -> Any:
    async with open_server(tmp_path / "data", AGENTS) as running:
        yield running


async def interrupt_of(chat: Chat) -> dict[str, Any]:
    """The latest question that was told; waits for one."""

    def told() -> list[dict[str, Any]]:
        outcomes = [e.get("outcome", {}) for e in chat.events if e["type"] == "RUN_FINISHED"]
        return [one for outcome in outcomes for one in outcome.get("interrupts", ())]

    await chat.until(told, "a question came")
    return told()[-1]


async def refused(chat: Chat, method: str, **params: Any) -> str:
    with pytest.raises(CommandError) as info:
        await chat.ask(method, **params)
    return str(info.value)


async def test_input_respond_answers_and_the_run_goes_on(server: Server) -> None:
    async with server.chat() as chat:
        await chat.subscribe()
        run_id = await chat.start("Plan.", "asks")
        question = await interrupt_of(chat)
        assert question["message"] == "Where to?"
        assert question["responseSchema"]["properties"]["days"]["default"] == 3
        reply = await chat.ask(
            "input.respond",
            interrupt_id=question["id"],
            response={"to": "Rome"},
            namespace=[],
        )
        assert reply["parent_run_id"] == run_id
        terminal = await chat.finished(reply["run_id"])
        assert terminal["outcome"] == {"type": "success"}
        assert words_of(chat.events) == "3 days in Rome"
        check_agui(chat.events)


async def test_an_ag_ui_resume_is_routed_to_the_parked_run(server: Server) -> None:
    async with server.chat() as chat:
        await chat.subscribe()
        run_id = await chat.start("Plan.", "asks")
        question = await interrupt_of(chat)
        waits = await chat.ask(
            "run.start",
            assistant_id="hears",
            input={"messages": [{"role": "user", "content": "behind it"}]},
        )
        assert waits["queued"] == 1
        mine = new_id()
        entry = {
            "interruptId": question["id"],
            "status": "resolved",
            "payload": {"to": "Paris", "days": 1},
        }
        reply = await chat.ask("run.start", run_id=mine, resume=[entry])
        assert reply == {"run_id": mine, "parent_run_id": run_id}
        await chat.finished(mine)
        (start,) = [e for e in chat.events if e.get("runId") == mine and e["type"] == "RUN_STARTED"]
        assert start["input"]["resume"] == [entry]
        assert words_of(chat.run_events(mine)) == "1 days in Paris"


async def test_who_declines_says_cancelled(server: Server) -> None:
    async with server.chat() as chat:
        await chat.subscribe()
        await chat.start("Plan.", "asks")
        question = await interrupt_of(chat)
        reply = await chat.ask(
            "run.start", resume=[{"interruptId": question["id"], "status": "cancelled"}]
        )
        terminal = await chat.finished(reply["run_id"])
        assert (terminal["type"], terminal["code"]) == ("RUN_ERROR", "declined")
        check_agui(chat.events)


async def test_the_answer_may_come_from_another_socket_after_a_reconnect(server: Server) -> None:
    async with server.chat() as chat:
        await chat.subscribe()
        await chat.start("Plan.", "asks")
        question = await interrupt_of(chat)
        last = chat.events[-1]["seq"]
    async with server.chat() as other, server.chat() as third:
        subscribed = await other.subscribe(since=last)
        assert subscribed["replayed_events"] == 0
        state = await other.ask("state.get")
        assert state["interrupts"] == [question]
        async with server.http() as http:
            over_http = (await http.get("/threads/thread-a/state")).json()
            assert over_http["interrupts"] == [question]
            assert over_http["thread"]["status"] == "busy"
        reply = await third.ask(
            "input.respond", interrupt_id=question["id"], response={"to": "Rome"}
        )
        await other.finished(reply["run_id"])
        assert other.events[0]["seq"] == last + 1
        assert "interrupts" not in await other.ask("state.get")


async def test_wrong_second_and_unknown_answers_get_clear_errors(server: Server) -> None:
    async with server.chat() as chat:
        await chat.subscribe()
        await chat.start("Plan.", "asks")
        asked = (await interrupt_of(chat))["id"]
        for wrong in ("Rome", {"to": "Oslo"}, {"to": "Rome", "x": 1}, None):
            told = await refused(chat, "input.respond", interrupt_id=asked, response=wrong)
            assert told.startswith("invalid_argument: the answer does not fit"), told
        told = await refused(chat, "input.respond", interrupt_id="no-such", response="x")
        assert told == "no_such_interrupt: there is no such question on this thread"
        for params in ({}, {"interrupt_id": 5}, {"interrupt_id": asked, "status": "maybe"}):
            assert (await refused(chat, "input.respond", **params)).startswith("invalid_argument")
        twice = [{"interruptId": asked, "status": "cancelled"}] * 2
        assert "one entry" in await refused(chat, "run.start", resume=twice)
        bad = await refused(
            chat, "input.respond", interrupt_id=asked, response={"to": "Rome"}, run_id="none"
        )
        assert bad.startswith("invalid_argument")
        reply = await chat.ask("input.respond", interrupt_id=asked, response={"to": "Rome"})
        told = await refused(chat, "input.respond", interrupt_id=asked, response={"to": "Rome"})
        assert told.startswith("interrupt_closed")
        await chat.finished(reply["run_id"])


async def test_anothers_question_does_not_exist_and_asking_for_it_is_audited(
    server: Server,
) -> None:
    async with server.chat() as chat, server.chat(user="bob") as eve:
        await chat.subscribe()
        await chat.start("Plan.", "asks")
        asked = (await interrupt_of(chat))["id"]
        told = {
            await refused(eve, "input.respond", interrupt_id=wanted, response={"to": "Rome"})
            for wanted in (asked, "no-such")
        }
        assert told == {"no_such_interrupt: there is no such question on this thread"}
        with trio.fail_after(5):
            while not (found := [r for r in await audited(server) if r.kind == "run_mismatch"]):
                await trio.sleep(0.005)
        assert [(r.user, r.resource, r.operation) for r in found] == [
            ("bob", f"question {asked}", "input.respond")
        ]


async def test_a_parked_run_is_cancelled_by_the_id_of_a_segment(server: Server) -> None:
    async def twice(run: RunContext) -> None:
        await run.ask(None, "One?")
        await run.ask(None, "Two?")

    async with open_server(server.settings.data.parent / "other", {"twice": twice}) as other:
        async with other.chat() as chat:
            await chat.subscribe()
            run_id = await chat.start("x", "twice")
            first = await interrupt_of(chat)
            reply = await chat.ask("input.respond", interrupt_id=first["id"], response="1")
            await chat.finished(reply["run_id"])  # parked again
            receipt = await chat.ask("run.cancel", run_id=reply["run_id"], wait=True)
            assert (receipt["run_id"], receipt["status"]) == (run_id, "cancelled")
            check_agui(chat.events)


async def test_an_approval_is_a_question(tmp_path: Path) -> None:
    async def buys(run: RunContext) -> None:
        await run.emit.text((await run.call_tool("pay", {"amount": 5})).content)

    async with open_server(tmp_path / "data", {"buys": buys}, (pay,)) as server:
        async with server.chat() as chat:
            await chat.subscribe()
            await chat.start("Buy.", "buys")
            question = await interrupt_of(chat)
            told = question["metadata"]["creche"]
            assert (question["reason"], told["tool_name"]) == ("tool_call", "pay")
            assert told["arguments"] == '{"amount":5}'
            other = {"approved": True, "digest": "0" * 64}
            assert "does not fit" in await refused(
                chat, "input.respond", interrupt_id=question["id"], response=other
            )
            reply = await chat.ask(
                "input.respond",
                interrupt_id=question["id"],
                response={"approved": True, "digest": told["digest"]},
            )
            await chat.finished(reply["run_id"])
            assert words_of(chat.events) == "paid 5"
            check_agui(chat.events)


async def test_over_a_restart_the_question_stays_and_its_answer_starts_a_run(
    tmp_path: Path,
) -> None:
    async with open_server(tmp_path / "data", AGENTS) as server:
        async with server.chat() as chat:
            await chat.subscribe()
            run_id = await chat.start("Who am I?", "hears")
            question = await interrupt_of(chat)
            await server.shut_down()
            await chat.end()
            terminal = chat.events[-1]
            assert terminal["metadata"]["creche"]["receipt"]["reason"] == "shutdown"
            last = terminal["seq"]
            check_agui(chat.events)
    async with open_server(tmp_path / "data", AGENTS) as server:
        async with server.chat() as chat:
            await chat.subscribe(since=last)
            assert (await chat.ask("state.get"))["interrupts"] == [question]
            reply = await chat.ask("input.respond", interrupt_id=question["id"], response="Ada")
            assert "parent_run_id" not in reply
            assert reply["run_id"] != run_id
            await chat.finished(reply["run_id"])
            assert words_of(chat.events) == "Your name? / Ada"
            told = await refused(chat, "input.respond", interrupt_id=question["id"], response="Eve")
            assert told == "interrupt_closed: the question has been answered"
