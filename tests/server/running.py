"""A real server in this process, and clients for it that share no code with it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx2
import trio
from ag_ui.core.events import Event
from pydantic import BaseModel, TypeAdapter
from tests.agui_rules import StockClient
from tests.small_world import Body, agent_of
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

from creche import Agent, AuditSink, Tool, ToolPolicy, allow_every_tool
from creche_server.application import Application, Approve
from creche_server.auth import Auth
from creche_server.data_directory import load_key
from creche_server.outbox import Outbox
from creche_server.serve import Listening, Stop, serve
from creche_server.settings import Settings

SUBPROTOCOL: Final = "ag-ui.v1"
PATIENCE: Final = 10.0  # seconds; far more than anything here takes
TERMINAL: Final = frozenset({"RUN_FINISHED", "RUN_ERROR"})

_agui: Final = TypeAdapter[Any](Event)

# What makes a log line, or a page that shows it, say something else than is there: the core's
# table (tests/core/test_context.py) has them all, and each door is tried with these.
MISLEADING: Final = tuple(f"a{each}b" for each in "\n\u2028\u2029\u202e\u2066\u200b\u061c\ufeff")


class CommandError(Exception):
    """The server answered a command with an error."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(f"{reply['error']}: {reply['message']}")
        self.code = reply["error"]
        self.reply = reply


async def eventually(condition: Callable[[], bool], what: str, *, seconds: float = 5.0) -> None:
    """Wait for something that only the kernel could tell us of."""
    with trio.move_on_after(seconds):
        while not condition():
            await trio.sleep(0.002)
        return
    raise AssertionError(f"{what}, still not after {seconds:g} s")


class Chat:
    """A chat client: a stock WebSocket, whatever arrived on it, and ways to wait for more."""

    def __init__(self, socket: WebSocketConnection, stream: trio.SocketStream) -> None:
        self.socket = socket
        self.stream = stream
        self.frames: list[str] = []  # all that came, as it came
        self.events: list[dict[str, Any]] = []  # those with a seq
        self.raw_events: list[str] = []  # the same, as they came
        self.replies: dict[int | None, dict[str, Any]] = {}  # {id: the last reply to it}
        self.order: list[int | None] = []  # ids, in the order of their replies
        self.closed: tuple[int, str | None] | None = None
        self._runs: dict[str, list[dict[str, Any]]] = {}  # {run id: its events}
        self._last_run: list[dict[str, Any]] = []
        self._ids = itertools.count(1)
        self._changed = trio.Event()

    async def read(self) -> None:
        """Take in what comes, until the connection ends."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._take(str(await self.socket.get_message()))
        reason = self.socket.closed
        self.closed = (1006, None) if reason is None else (reason.code, reason.reason)
        self._notify()
        await self.stream.aclose()

    def _take(self, frame: str) -> None:
        self.frames.append(frame)
        message = json.loads(frame)
        if "seq" in message:
            self.events.append(message)
            self.raw_events.append(frame)
            if message["type"] == "RUN_STARTED":
                self._last_run = self._runs[message["runId"]] = []
            self._last_run.append(message)
        else:
            self.replies[message["id"]] = message
            self.order.append(message["id"])
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], Any], what: str = "it came to that") -> None:
        """Wait until what has arrived fulfils a condition. Fails when the connection ends."""
        try:
            with trio.fail_after(PATIENCE):
                while not condition():
                    if self.closed is not None:
                        raise AssertionError(f"closed with {self.closed} before {what}")
                    await self._changed.wait()
        except trio.TooSlowError:
            raise AssertionError(f"not {what}; got {self.frames[-20:]}") from None

    async def end(self) -> tuple[int, str | None]:
        """Wait until the server has closed; its close code, and its reason."""
        with trio.fail_after(PATIENCE):
            while self.closed is None:
                await self._changed.wait()
        return self.closed

    async def send(self, method: str, params: Mapping[str, Any] | None = None) -> int:
        """Send a command without waiting for the reply; returns its id."""
        number = next(self._ids)
        command = {"id": number, "method": method, "params": params or {}}
        await self.socket.send_message(json.dumps(command, ensure_ascii=False))
        return number

    async def reply(self, number: int | None) -> dict[str, Any]:
        """The reply to a command, as it came."""
        await self.until(lambda: number in self.replies, f"a reply to {number}")
        return self.replies[number]

    async def result(self, number: int) -> dict[str, Any]:
        """The result of a command. Raises CommandError."""
        reply = await self.reply(number)
        if reply["type"] == "error":
            raise CommandError(reply)
        result: dict[str, Any] = reply["result"]
        return result

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result. Raises CommandError."""
        return await self.result(await self.send(method, params))

    async def subscribe(self, **params: Any) -> dict[str, Any]:
        return await self.ask("subscription.subscribe", **params)

    async def start(self, words: str, agent: str = "assistant") -> str:
        """Start a run; returns its id once it is committed."""
        started = await self.ask("run.start", **asking(words, agent))
        run_id: str = started["run_id"]
        return run_id

    async def run(self, words: str, agent: str = "assistant") -> list[dict[str, Any]]:
        """Start a run and wait for its end; returns its events. Needs a subscription."""
        run_id = await self.start(words, agent)
        await self.finished(run_id)
        return self.run_events(run_id)

    async def finished(self, run_id: str) -> dict[str, Any]:
        """Wait for a run's terminal event."""
        await self.until(lambda: self.terminal(run_id) is not None, f"{run_id} ended")
        terminal = self.terminal(run_id)
        assert terminal is not None
        return terminal

    def terminal(self, run_id: str) -> dict[str, Any] | None:
        last = self.run_events(run_id)[-1:]
        return last[0] if last and last[0]["type"] in TERMINAL else None

    def run_events(self, run_id: str) -> list[dict[str, Any]]:
        """What came of one run."""
        return self._runs.get(run_id, [])

    def seen(self, kind: str) -> bool:
        return any(event["type"] == kind for event in self.events)


@dataclasses.dataclass(slots=True, eq=False)
class Server:
    """A server that listens."""

    settings: Settings
    stop: Stop
    listening: Listening
    ended: trio.Event  # serve() has returned

    @property
    def url(self) -> str:
        return self.listening.url

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def auth(self) -> Auth:
        """As another process would make it, from the data directory."""
        return Auth(load_key(self.settings.data))

    def token(self, user: str = "ada", *, seconds: float = 600) -> str:
        return self.auth.mint_token(user, seconds=seconds)

    async def connect(self) -> trio.SocketStream:
        """A bare connection."""
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    @contextlib.asynccontextmanager
    async def chat(
        self,
        thread: str = "thread-a",
        user: str = "ada",
        *,
        headers: Sequence[tuple[bytes, bytes]] | None = None,
        path: str | None = None,
    ) -> AsyncIterator[Chat]:
        """A chat client on a thread; `headers` replace the bearer token."""
        if headers is None:
            headers = [(b"Authorization", f"Bearer {self.token(user)}".encode())]
        async with trio.open_nursery() as nursery:
            async with await self.connect() as stream:
                with trio.fail_after(PATIENCE):
                    socket = await wrap_client_stream(
                        nursery,
                        stream,
                        f"127.0.0.1:{self.port}",
                        path or f"/threads/{quote(thread, safe='')}/stream/events",
                        subprotocols=[SUBPROTOCOL],
                        extra_headers=list(headers),
                    )
                chat = Chat(socket, stream)
                nursery.start_soon(chat.read)
                yield chat
                nursery.cancel_scope.cancel()

    def http(self, user: str | None = "ada", **more: Any) -> httpx2.AsyncClient:
        """An HTTP client that speaks for a user, or for nobody."""
        headers = {} if user is None else {"Authorization": f"Bearer {self.token(user)}"}
        return httpx2.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=PATIENCE,
            trust_env=False,
            **more,
        )

    async def shut_down(self, *, within: float | None = None) -> None:
        """Ask it to stop, and wait until it has."""
        self.stop.soon.set()
        with trio.fail_after(within or self.settings.shutdown_timeout):
            await self.ended.wait()


def settings_for(data: Path, **more: Any) -> Settings:
    return Settings(**{"model": "scripted", "data": data, "port": 0, **more})


@contextlib.asynccontextmanager
async def open_server(
    data: Path,
    agents: Mapping[str, Body | type[Agent]] | None = None,
    tools: tuple[Tool | str, ...] = (),
    *,
    audit_sink: AuditSink | None = None,
    tool_policy: ToolPolicy = allow_every_tool,
    approve: Approve | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """A server on a free port. Leaving the block stops it, in its own time or as a failure."""
    chosen = settings_for(data, **settings)
    stop = Stop()
    said: list[Listening] = []
    ready, ended = trio.Event(), trio.Event()
    made = {
        name: body if isinstance(body, type) else agent_of(body, tools)
        for name, body in (agents or {}).items()
    }
    application = Application(agents=made, tool_policy=tool_policy, approve=approve)

    def announce(listening: Listening) -> None:
        said.append(listening)
        ready.set()

    async def run() -> None:
        try:
            await serve(chosen, application, stop=stop, announce=announce, audit_sink=audit_sink)
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        with trio.fail_after(PATIENCE):
            await ready.wait()
        yield Server(chosen, stop, said[0], ended)
        stop.now.set()
        stop.soon.set()
        try:
            with trio.fail_after(chosen.shutdown_timeout):
                await ended.wait()
        except trio.TooSlowError:
            raise AssertionError("the server did not stop in its time") from None


def unsent() -> int:
    """Bytes that wait in the server's outboxes."""
    return sum(
        outbox._queued_bytes
        for outbox in gc.get_objects()
        if type(outbox) is Outbox and not outbox._closed
    )


def asking(words: str, agent: str = "assistant") -> dict[str, Any]:
    """What `run.start` is told."""
    message = {"role": "user", "content": words}
    return {"assistant_id": agent, "input": {"messages": [message]}}


def by_run(events: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """A thread's events, cut where runs start. What precedes the first start is left out.

    A run that goes on after a question is the same one.
    """
    runs: list[list[dict[str, Any]]] = []
    for event in events:
        if event["type"] == "RUN_STARTED" and "parentRunId" not in event:
            runs.append([event])
        elif runs:
            runs[-1].append(event)
    return runs


def types_of(events: Sequence[Mapping[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def words_of(events: Sequence[Mapping[str, Any]]) -> str:
    """What the agent said."""
    return "".join(event.get("delta", "") for event in events if "TEXT" in event["type"])


def check_agui(events: Sequence[dict[str, Any]]) -> None:
    """Fail unless AG-UI's own models know all of this, and a stock client takes it."""
    for event in events:
        model = _agui.validate_python(event)
        unknown = set(_strangers(model))
        assert unknown == {"seq"}, f"{event['type']} has keys that AG-UI does not know: {unknown}"
    for run in by_run(events):
        client = StockClient()
        client.take_all(run)


def _strangers(value: Any) -> list[str]:
    """Keys, at any depth of the models, that the models do not declare, or that hold a null."""
    if isinstance(value, BaseModel):
        own = list(value.model_extra or ())
        for name in value.model_fields_set:
            if name in type(value).model_fields:
                inner = getattr(value, name)
                if inner is None and name not in {"result", "raw_event"}:
                    own.append(f"{name}=null")
                own.extend(_strangers(inner))
        return own
    if isinstance(value, (list, tuple)):
        return [key for item in value for key in _strangers(item)]
    return []
