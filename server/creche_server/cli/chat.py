"""`creche chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from creche import CrecheError, leaves, new_id
from creche_server.cli.access import own_token
from creche_server.cli.client import Client, ClientError, open_client
from creche_server.data_directory import DataDirectoryError, read_address

EXIT_FAILED = 1
EXIT_CANCELLED = 130

_LONGEST_SHOWN = 400  # characters of a tool's arguments or result


def chat(
    data: Path,
    question: str | None,
    *,
    thread: str | None,
    agent: str | None,
    user: str | None,
) -> int:
    """Ask once, or talk until the input ends. Returns the exit code."""
    address = read_address(data)
    if address is None:
        sys.stderr.write(f"creche: no server is at work in {data}; start one: creche serve\n")
        return EXIT_FAILED
    return_code = EXIT_FAILED
    try:
        conversation = Conversation(
            url=address.url,
            token=own_token(data, user or address.user),
            thread_id=thread or new_id(),
            agent=agent or address.agents[0],
        )
        if thread is not None:
            trio.run(conversation.show_history)
        if question is not None:
            return_code = trio.run(conversation.ask, question)
        else:
            return_code = _talk(conversation)
    except* (CrecheError, DataDirectoryError, OSError) as errors:
        for error in leaves(errors):
            sys.stderr.write(f"creche: {error}\n")
    except* KeyboardInterrupt:
        return_code = EXIT_CANCELLED
    return return_code


def _talk(conversation: Conversation) -> int:
    """Question and answer, until ^D or a ^C at the prompt.

    Between questions no connection is held: the prompt may wait for hours.
    """
    if sys.stdin.isatty():
        import readline as _  # noqa: F401, PLC0415  gives `input` editing and recall
    code = 0
    conversation.note(f"thread {conversation.thread_id} · ^C stops an answer, ^D leaves")
    while True:
        try:
            question = input("\nyou> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if question:
            code = trio.run(conversation.ask, question)
    conversation.note(f"go on with: creche chat --thread {conversation.thread_id}")
    return code


class Conversation:
    """One thread, seen from the terminal.

    The answer's words go to stdout; everything about them goes there, too, if that is a
    terminal, and to stderr otherwise.
    """

    def __init__(self, *, url: str, token: str, thread_id: str, agent: str) -> None:
        self.thread_id = thread_id
        self._open = partial(open_client, url, thread_id, token)
        self._agent = agent
        self._out = Console(soft_wrap=True, highlight=False)
        self._aside = self._out if self._out.is_terminal else Console(stderr=True, highlight=False)
        self._position: dict[str, Any] = {"since": 0}  # what the next subscription begins with
        self._calls: dict[str, str] = {}  # {tool call id: the tool's name}

    def note(self, words: str) -> None:
        """Something about the conversation, not of it."""
        self._aside.print(f"[dim]{escape(words)}[/dim]")

    async def show_history(self) -> None:
        """What was said on this thread so far."""
        async with self._open() as client:
            state = await client.ask("state.get", {})
        messages = state["values"]["messages"]
        if not messages:
            self.note("this thread is empty so far")
        names = {
            tool_call["id"]: tool_call["function"]["name"]
            for message in messages
            for tool_call in message.get("toolCalls", ())
        }
        for message in messages:
            content = message.get("content") or ""
            if message["role"] == "user":
                self._out.print(f"\n[bold]you>[/bold] {escape(content)}")
            elif message["role"] == "tool":
                self._show_result(names.get(message["toolCallId"], "tool"), content)
            elif content:
                self._out.print(escape(content))

    async def ask(self, question: str) -> int:
        """Send a question and show the answer as it comes; ^C stops the run itself."""
        async with self._open() as client:
            subscribed = await client.ask("subscription.subscribe", self._position)
            started = await client.ask(
                "run.start",
                {
                    "assistant_id": self._agent,
                    "input": {"messages": [{"role": "user", "content": question}]},
                },
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_interrupt, client, started["run_id"])
                code = await self._show_run(client, started)
                nursery.cancel_scope.cancel()
        self._position["epoch"] = subscribed["epoch"]
        return code

    async def _stop_on_interrupt(self, client: Client, run_id: str) -> None:
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            async for _ in signals:
                break
        # From here on a second ^C is an ordinary one, for who does not want to wait.
        await client.ask("run.cancel", {"run_id": run_id})

    async def _show_run(self, client: Client, started: Mapping[str, Any]) -> int:
        waiting = "waiting for its turn" if started.get("queued") else "thinking"
        ours = False
        with self._aside.status(waiting) as status:
            async for event in client.events:
                self._position["since"] = event["seq"]
                if event["type"] == "RUN_STARTED":
                    ours = event["runId"] == started["run_id"]
                elif ours:
                    code = self._show(event, status)
                    if code is not None:
                        return code
        msg = "the server closed the connection before the answer was complete"
        raise ClientError(msg)

    def _show(self, event: Mapping[str, Any], status: Status) -> int | None:
        """Show one event of our run; the exit code if it was the last one."""
        match event["type"]:
            case "TEXT_MESSAGE_START":
                status.stop()
            case "TEXT_MESSAGE_CONTENT":
                self._out.print(event["delta"], end="", markup=False)
            case "TEXT_MESSAGE_END":
                self._out.print()
            case "TOOL_CALL_START":
                self._calls[event["toolCallId"]] = event["toolCallName"]
            case "TOOL_CALL_ARGS":
                name = self._calls[event["toolCallId"]]
                self._aside.print(f"[cyan]→ {name}[/cyan] [dim]{_shown(event['delta'])}[/dim]")
            case "TOOL_CALL_RESULT":
                self._show_result(self._calls[event["toolCallId"]], event["content"])
            case "RUN_FINISHED":
                status.stop()
                return self._show_end(event)
            case "RUN_ERROR":
                status.stop()
                self._aside.print(f"\n[red]failed:[/red] {escape(event['message'])}")
                return EXIT_FAILED
            case _:
                pass
        return None

    def _show_result(self, name: str, content: str) -> None:
        self._aside.print(f"[cyan]← {escape(name)}[/cyan] [dim]{_shown(content)}[/dim]")

    def _show_end(self, event: Mapping[str, Any]) -> int:
        if event.get("outcome", {}).get("type") != "cancelled":
            return 0
        receipt = event["metadata"]["creche"]["receipt"]
        tools = ", ".join(receipt["tools_stopped"])
        self._aside.print(
            f"\n[yellow]stopped[/yellow] [dim]({receipt['reason']}; everything of it had ended "
            f"after {receipt['elapsed_ms']} ms{tools and f'; tools stopped: {tools}'})[/dim]",
        )
        return EXIT_CANCELLED


def _shown(text: str) -> str:
    return escape(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")
