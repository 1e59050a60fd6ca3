"""One thread, seen from the terminal: what was said on it, a question, its answer as it comes."""

from __future__ import annotations

import shlex
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from rich.status import Status

from creche_server.cli.answering import respond
from creche_server.cli.api import Api, ClientError
from creche_server.cli.client import Client, open_client
from creche_server.cli.endings import EXIT_FAILED, cleanup, exit_code, why
from creche_server.cli.screen import Screen

_ANSWERS_SHOWN: Final = 20  # of a thread's history; each comes with all that was before it


class Conversation:
    """A thread of a server, and the agent that is asked on it."""

    def __init__(self, api: Api, screen: Screen, *, thread_id: str, agent: str) -> None:
        self.thread_id = thread_id
        self._api = api
        self._agent = agent
        self._screen = screen
        self.begun = False  # a run of ours is on this thread, so it exists

    def note_the_beginning(self) -> None:
        self._screen.note(
            f"thread {self.thread_id} · ^C stops an answer; ^D leaves, or ^C where nothing is typed"
        )

    def note_how_to_go_on(self) -> None:
        self._screen.note(f"go on with: creche chat --thread {shlex.quote(self.thread_id)}")

    async def show_history(self) -> None:
        """What was said on this thread so far. Raises ClientError."""
        states = await self._api.get("threads", self.thread_id, "history", limit=_ANSWERS_SHOWN + 1)
        if not states:
            self._screen.note("this thread is empty so far")
            return
        states.reverse()
        shown = 0
        if len(states) > _ANSWERS_SHOWN:
            shown = len(states[0]["values"]["messages"])
            self._screen.note(f"({shown} earlier messages are not shown)")
            del states[0]
        for state in states:
            messages = state["values"]["messages"]
            self._show_past(messages[shown:], state["metadata"])
            shown = len(messages)

    def _show_past(self, messages: list[dict[str, Any]], run: Mapping[str, Any]) -> None:
        """The messages of one run, and how it ended."""
        names: dict[str, str] = {}  # {tool call id: the tool's name}
        answered = False
        for message in messages:
            content = message.get("content") or ""
            if message["role"] == "user":
                self._screen.question(content)
            elif message["role"] == "tool":
                self._screen.result(names.get(message["toolCallId"], "tool"), content)
            elif content:
                answered = True
                self._screen.answer(content)
                self._screen.end_of_line()
            for call in message.get("toolCalls", ()):
                names[call["id"]] = call["function"]["name"]
                self._screen.call(call["function"]["name"], call["function"]["arguments"])
        receipt: dict[str, Any] = run["receipt"] or {}
        if run["status"] == "cancelled":
            self._screen.problem(f"stopped{why(receipt)}", "yellow", f"({cleanup(receipt)})")
        elif run["status"] in {"failed", "lost"}:
            self._screen.problem(run["status"], "red", f"({run['reason'] or run['status']})")
        elif run["status"] != "success":
            self._screen.note("(not answered yet)")
        elif not answered:
            self._screen.note("(no answer)")

    async def ask(self, question: str, *, goes_on: bool = False) -> int:
        """Send a question and show the answer as it comes; ^C stops the run itself.

        One that `goes_on` is for a thread that is there; if there is none, a line says so.
        Returns an exit code. Raises ClientError.
        """
        position = await self._end_of_the_log()
        if goes_on and "epoch" not in position:  # the server knows no such thread
            self._screen.note(f"thread {self.thread_id} is a new thread")
        async with open_client(self._api.url, self.thread_id, self._api.token) as client:
            await client.ask("subscription.subscribe", position)
            async with _stopped_by_interrupt(client) as asked:
                with self._screen.waiting("asking") as status:
                    started = await client.ask(
                        "run.start",
                        {
                            "assistant_id": self._agent,
                            "input": {"messages": [{"role": "user", "content": question}]},
                        },
                    )
                    self.begun = True
                    asked.accepted(started["run_id"])
                    queued = started.get("queued")
                    status.update("waiting for its turn" if queued else "thinking")
                    return await _Answer(self._screen, status).show(client, started["run_id"])

    async def answer_what_waits(self) -> int:
        """Answer what a run of this thread asked, and show how it goes on.

        Returns an exit code, 0 where nothing waits. Raises ClientError.
        """
        state: dict[str, Any] = (
            await self._api.get("threads", self.thread_id, "state", limit=1) or {}
        )
        code = 0
        for interrupt in state.get("interrupts", ()):
            position = await self._end_of_the_log()
            async with open_client(self._api.url, self.thread_id, self._api.token) as client:
                await client.ask("subscription.subscribe", position)
                run_id = await respond(client, self._screen, interrupt) or state["active_run"]
                if run_id is not None:
                    self.begun = True
                    status = self._screen.waiting("thinking")
                    code = await _Answer(self._screen, status).show(client, run_id)
        return code

    async def _end_of_the_log(self) -> dict[str, Any]:
        """Where a subscription begins that tells nothing of the past."""
        thread = await self._api.get("threads", self.thread_id)
        if thread is None:  # the question will make it
            return {"since": 0}
        return {"since": thread["last_seq"], "epoch": thread["epoch"]}


class _Asked:
    """A question on its way, and the run that it becomes."""

    def __init__(self) -> None:
        self.run_id = ""
        self.taken = trio.Event()

    def accepted(self, run_id: str) -> None:
        self.run_id = run_id
        self.taken.set()


@asynccontextmanager
async def _stopped_by_interrupt(client: Client) -> AsyncIterator[_Asked]:
    """In this block a ^C stops the run that is asked for, as soon as there is one.

    A second ^C is an ordinary one, for who does not want to wait.
    """
    asked = _Asked()

    async def stop(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            await anext(signals)
        await asked.taken.wait()
        try:
            await client.ask("run.cancel", {"run_id": asked.run_id})
        except ClientError:
            return  # it has ended, or the connection has, which the answer's reader finds out

    async with trio.open_nursery() as nursery:
        await nursery.start(stop)
        yield asked
        nursery.cancel_scope.cancel()


class _Answer:
    """What has come of one run's answer."""

    def __init__(self, screen: Screen, status: Status) -> None:
        self._screen = screen
        self._status = status
        self._names: dict[str, str] = {}  # {tool call id: the tool's name}
        self._arguments: dict[str, str] = {}  # {tool call id: their JSON so far}
        self._answered = False

    async def show(self, client: Client, run_id: str) -> int:
        """Show the run's events to its last; returns an exit code. Raises ClientError.

        What the run asks meanwhile is asked at the terminal.
        """
        ours = False
        while True:
            try:
                event = await client.next_event()
            except ClientError as error:
                self._status.stop()
                if self._answered:
                    self._screen.end_of_line()
                msg = f"{error} before the answer was complete"
                raise ClientError(msg) from error
            if event["type"] == "RUN_STARTED":
                ours = run_id in {event["runId"], event.get("parentRunId")}
                self._status.update("thinking" if ours else "waiting for its turn")
            elif ours:
                code = self._take(event)
                if code is not None:
                    return code
                for interrupt in event.get("outcome", {}).get("interrupts", ()):
                    await respond(client, self._screen, interrupt)

    def _take(self, event: Mapping[str, Any]) -> int | None:
        """Show one event of our run; the exit code if it was the last one."""
        if event["type"].startswith("TEXT_MESSAGE_") and "subagentRunId" in event:
            return None  # told to the agent that asked for it, which makes the answer
        match event["type"]:
            case "SUBAGENT_STARTED":
                self._screen.note(f"⤷ {event['name']}")
            case "TEXT_MESSAGE_START":
                self._status.stop()
            case "TEXT_MESSAGE_CONTENT":
                self._answered = True
                self._screen.answer(event["delta"])
            case "TEXT_MESSAGE_END":
                self._screen.end_of_line()
            case "RUN_FINISHED":
                self._status.stop()
                return self._finished(event)
            case "RUN_ERROR":
                self._status.stop()
                self._screen.problem("failed:", "red", event["message"])
                return EXIT_FAILED
            case _:
                self._take_of_tool(event)
        return None

    def _take_of_tool(self, event: Mapping[str, Any]) -> None:
        match event["type"]:
            case "TOOL_CALL_START":
                self._names[event["toolCallId"]] = event["toolCallName"]
                self._arguments[event["toolCallId"]] = ""
            case "TOOL_CALL_ARGS":
                self._arguments[event["toolCallId"]] += event["delta"]
            case "TOOL_CALL_END":
                call_id = event["toolCallId"]
                self._screen.call(self._names[call_id], self._arguments.pop(call_id))
            case "TOOL_CALL_RESULT":
                self._screen.result(self._names[event["toolCallId"]], event["content"])
            case _:
                pass

    def _finished(self, event: Mapping[str, Any]) -> int | None:
        if event.get("outcome", {}).get("type") == "interrupt":
            return None
        if event.get("outcome", {}).get("type") != "cancelled":
            if not self._answered:
                self._screen.note("(no answer)")
            return 0
        receipt = event["metadata"]["creche"]["receipt"]
        self._screen.problem(f"stopped{why(receipt)}", "yellow", f"({cleanup(receipt)})")
        return exit_code(receipt)
