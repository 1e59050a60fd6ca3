"""The smallest real parts that a test of a run needs: contexts, agents, a store with trouble."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import trio

from creche import (
    Agent,
    Commit,
    CommitInDoubtError,
    Infrastructure,
    Limits,
    MemoryStore,
    Model,
    Run,
    RunContext,
    RunId,
    Store,
    Supervisor,
    ThreadId,
    Tool,
    UserExecutionContext,
    UserId,
    events,
)

ADA = UserId("ada")
BOB = UserId("bob")
THREAD = ThreadId("thread-a")

Body = Callable[[RunContext], Awaitable[Any]]


def context(
    user: str = ADA,
    thread: str = THREAD,
    run: str | None = None,
) -> UserExecutionContext:
    """A valid context, its run id made afresh unless it is given."""
    return UserExecutionContext.from_request(user_id=user, thread_id=thread, run_id=run)


def agent_of(body: Body, tools: tuple[Tool | str, ...] = ()) -> type[Agent]:
    """An agent class whose `run` is that function; it may close over a test's own objects."""

    async def run(self: object, run: RunContext) -> Any:
        return await body(run)

    return type(
        "Made", (), {"run": run, "tools": tools, "shared": (body,), "__doc__": "Made by a test."}
    )


async def say_hello(run: RunContext) -> str:
    await run.emit.text("hello")
    return "done"


async def hang(run: RunContext) -> None:
    await run.emit.text("waiting")
    await trio.sleep_forever()


def infrastructure(
    *,
    store: Store | None = None,
    limits: Limits | None = None,
    tools: Sequence[Tool] = (),
    models: Mapping[str, Model] | None = None,
    **bodies: Body | type[Agent],
) -> Infrastructure:
    """An infrastructure in which each keyword is an agent; `hello` and `hang` are always there."""
    agents = {
        name: body if isinstance(body, type) else agent_of(body, tuple(tools))
        for name, body in {"hello": say_hello, "hang": hang, **bodies}.items()
    }
    return Infrastructure(
        agents=agents,
        tools=tools,
        models=models or {},
        limits=limits or Limits(),
        store=store or MemoryStore(),
    )


class TroubledStore(MemoryStore):
    """A memory store whose commits can be held up, and refused one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: Callable[[Commit], bool] = lambda _: False
        self.cannot_be_read = False
        self.attempts: list[tuple[float, tuple[Commit, ...]]] = []  # (trio time, group)
        self._gate = trio.Event()
        self._gate.set()

    def hold(self) -> None:
        """From now on, commits wait."""
        self._gate = trio.Event()

    def release(self) -> None:
        """Let those go on that wait, and whatever comes later."""
        self._gate.set()

    async def commit(self, commits: Sequence[Commit]) -> None:
        self.attempts.append((trio.current_time(), tuple(commits)))
        await self._gate.wait()
        if any(map(self.refuses, commits)):
            msg = "the disk is gone"
            raise OSError(msg)
        await super().commit(commits)

    async def thread(self, user_id: UserId, thread_id: ThreadId) -> Any:
        if self.cannot_be_read:
            msg = "the disk is gone"
            raise OSError(msg)
        return await super().thread(user_id, thread_id)


class LosingStore(MemoryStore):
    """A memory store that takes a commit and then loses its answer, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.loses: Callable[[Commit], bool] = lambda _: False
        self.lost = 0
        self.cannot_be_read = False

    async def commit(self, commits: Sequence[Commit]) -> None:
        await super().commit(commits)
        if any(map(self.loses, commits)):
            self.lost += 1
            self.loses = lambda _: False
            raise CommitInDoubtError("the line went dead")

    async def thread(self, user_id: UserId, thread_id: ThreadId) -> Any:
        self._check_readable()
        return await super().thread(user_id, thread_id)

    async def run(self, user_id: UserId, run_id: RunId) -> Any:
        self._check_readable()
        return await super().run(user_id, run_id)

    def _check_readable(self) -> None:
        if self.cannot_be_read:
            msg = "the line is dead"
            raise OSError(msg)


async def log_of(store: Store, user: str = ADA, thread: str = THREAD) -> list[dict[str, Any]]:
    """A thread's whole committed log as JSON objects; its `seq` must be 1, 2, 3, ..."""
    found: list[dict[str, Any]] = []
    while chunks := await store.chunks(UserId(user), ThreadId(thread), after=len(found), limit=50):
        for chunk in chunks:
            lines = [msgspec.json.decode(line) for line in chunk.lines()]
            assert [line["seq"] for line in lines] == [*range(chunk.first_seq, chunk.last_seq + 1)]
            assert chunk.first_seq == len(found) + 1
            found.extend(lines)
    return found


def types_of(log: Sequence[Mapping[str, Any]]) -> list[str]:
    return [event["type"] for event in log]


def terminals_of(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    ends = [event for event in log if event["type"] in {"RUN_FINISHED", "RUN_ERROR"}]
    return [event for event in ends if event.get("outcome", {}).get("type") != "interrupt"]


def one_at_a_time(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ids of a thread's runs in their order; each must end before the next one begins."""
    order: list[str] = []
    active: str | None = None
    for event in log:
        if event["type"] == "RUN_STARTED":
            assert active is None, f"{event['runId']} begins within {active}"
            active = event["runId"]
            order.append(event["runId"])
        assert active is not None, f"{event['type']} is of no run"
        if event["type"] in {"RUN_FINISHED", "RUN_ERROR"}:
            assert event.get("runId", active) == active
            active = None
    assert active is None, f"{active} has no end"
    return order


async def watch(
    supervisor: Supervisor,
    run: Run,
    *,
    after: int = 0,
) -> list[events.Event]:
    """What a reader of the run's thread is shown, up to the first terminal event after `after`."""
    seen: list[events.Event] = []
    async with supervisor.journals.attached(run.user_id, run.thread_id) as journal:
        while True:
            for entry in await journal.read(after=after):
                assert entry.seq == after + 1
                after = entry.seq
                seen.append(entry.event)
                if events.ends_run(entry.event):
                    return seen
