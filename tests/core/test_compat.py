"""The older design's names: each works, says what to write instead, and keeps users apart."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from tests.core import coming_over
from tests.small_world import ADA, BOB, context, infrastructure

import creche
from creche import (
    CrecheError,
    InvalidContextError,
    LimitExceededError,
    RunContext,
    ToolContext,
    UnknownAgentError,
    UserExecutionContext,
    compat,
    open_supervisor,
    tool,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is of the older design:DeprecationWarning")


@tool
async def my_tool(caller: ToolContext, text: str) -> str:
    """Say who called, and what."""
    await trio.lowlevel.checkpoint()
    return f"{text} of {caller.context.user_id}"


class Echo:
    """Says back what it was told, by way of a tool, and keeps it for itself."""

    tools = (my_tool,)

    def __init__(self) -> None:
        self.kept: list[str] = []

    async def run(self, run: RunContext) -> str:
        self.kept.append(str(run.messages[-1].content))
        result = await run.call_tool("my_tool", {"text": self.kept[-1]})
        await run.emit.text(result.content)
        return " ".join(self.kept)


@dataclasses.dataclass
class AgentContext:
    """What the older design named an agent with."""

    agent_name: str


def opened() -> Any:
    return compat.open_infrastructure(agents={"echo": Echo}, tools=[my_tool])


@pytest.mark.parametrize(
    "agent_context", ["echo", AgentContext("echo")], ids=["a name", "an object"]
)
async def test_the_snippet_runs_as_it_was_written(agent_context: Any) -> None:
    async with opened():
        answered, called = await coming_over.handle(agent_context, "hello", {"text": "hi"})
    assert (answered.status, answered.result) == ("success", "hello")
    assert (called.error, called.value) == (None, "hi of user_123")


def test_the_file_has_the_snippet_word_for_word() -> None:
    snippet = """
    user_context = UserExecutionContext.from_request(user_id="user_123", thread_id="thread_456", run_id="run_789")
    async with ExecutionEngine.create_user_engine(user_context) as engine:
        result = await engine.execute_agent(agent_context, state)
    async with ToolDispatcher.create_scoped_dispatcher_context(user_context) as dispatcher:
        result = await dispatcher.dispatch("my_tool", params)
"""  # noqa: E501
    written = Path(coming_over.__file__).read_text()
    for line in snippet.strip().splitlines():
        assert line in written


async def test_without_anything_around_it_says_what_to_pass() -> None:
    with pytest.raises(CrecheError, match=r"pass infrastructure=, or open creche\.compat"):
        async with creche.ExecutionEngine.create_user_engine(context()):
            pytest.fail("there is nothing to run on")
    with pytest.raises(CrecheError, match=r"pass tools= or infrastructure="):
        async with creche.ToolDispatcher.create_scoped_dispatcher_context(context()):
            pytest.fail("there is nothing to call")


async def test_what_is_around_ends_with_its_block_and_is_not_seen_beside_it() -> None:
    inside, looked = trio.Event(), trio.Event()

    async def look() -> None:
        await inside.wait()
        with pytest.raises(CrecheError):
            async with creche.ExecutionEngine.create_user_engine(context()):
                pytest.fail("it is not around this task")
        looked.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        async with opened():
            inside.set()
            await looked.wait()
            async with creche.ExecutionEngine.create_user_engine(context(ADA)) as engine:
                assert (await engine.execute_agent("echo", "hi")).status == "success"
    with pytest.raises(CrecheError):
        async with creche.ToolDispatcher.create_scoped_dispatcher_context(context()):
            pytest.fail("it is over")


# --- each older name, used as it was: (user's context, what they said) -> what came of it

Use = Callable[[UserExecutionContext, str], Awaitable[object]]


async def by_engine(ctx: UserExecutionContext, said: str) -> object:
    return await compat.ExecutionEngine(ctx).execute_agent("echo", said)


async def by_scoped_engine(ctx: UserExecutionContext, said: str) -> object:
    async with compat.RequestScopedExecutionEngine(ctx) as engine:
        return await engine.execute_agent(AgentContext("echo"), said)


async def by_context_manager(ctx: UserExecutionContext, said: str) -> object:
    async with compat.ExecutionContextManager().execution_context(ctx) as engine:
        return await engine.execute_agent("echo", said)


async def by_dispatcher(ctx: UserExecutionContext, said: str) -> object:
    return await compat.ToolDispatcher(ctx).dispatch("my_tool", {"text": said})


async def by_scoped_dispatcher(ctx: UserExecutionContext, said: str) -> object:
    async with compat.RequestScopedToolDispatcher(ctx, [my_tool]) as dispatcher:
        return await dispatcher.dispatch("my_tool", {"text": said})


async def by_factory(ctx: UserExecutionContext, said: str) -> object:
    async with compat.ToolExecutorFactory().create_tool_executor(ctx) as dispatcher:
        return await dispatcher.dispatch("my_tool", {"text": said})


async def by_instance_factory(ctx: UserExecutionContext, said: str) -> object:
    registry = compat.AgentRegistry({"echo": Echo})
    agent: Any = compat.AgentInstanceFactory(registry).create_agent_instance("echo", ctx)
    agent.kept.append(said)
    await trio.lowlevel.checkpoint()
    return agent.kept


async def by_emitter(ctx: UserExecutionContext, said: str) -> object:
    frames: list[bytes] = []

    async def send(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        frames.append(data)

    async with compat.WebSocketEventEmitter(ctx, send) as emitter:
        await emitter.text(said)
    types = [msgspec.json.decode(frame)["type"] for frame in frames]
    assert types[0] == "RUN_STARTED"
    assert types[-1] == "RUN_FINISHED"
    return frames


async def by_bridge(ctx: UserExecutionContext, said: str) -> object:
    frames: list[bytes] = []

    async def send(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        frames.append(data)

    made = infrastructure(tools=[my_tool], echo=Echo)
    async with open_supervisor(made) as supervisor:
        outcome = await compat.AgentWebSocketBridge(supervisor).run_agent(ctx, "echo", said, send)
    assert outcome.status == "success"
    assert [msgspec.json.decode(frame)["seq"] for frame in frames] == [*range(1, len(frames) + 1)]
    assert msgspec.json.decode(frames[-1])["type"] == "RUN_FINISHED"
    return frames


async def by_pool(ctx: UserExecutionContext, said: str) -> object:
    frames: list[bytes] = []

    async def send(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        frames.append(data)

    pool = compat.WebSocketConnectionPool()
    other = context(BOB if ctx.user_id == ADA else ADA)

    async def others(data: bytes) -> None:
        raise AssertionError(f"another user's socket was sent {data!r}")

    with pool.connection(ctx, send) as attached, pool.connection(other, others):
        assert attached.connection_id is not None
        assert await pool.send_to_user(attached, said.encode()) == 1
    assert await pool.send_to_user(ctx, b"nobody is there") == 0
    return frames


async def by_audit(ctx: UserExecutionContext, said: str) -> object:
    async with creche.open_audit(creche.MemorySink()) as audit:
        door = compat.WebSocketSecurityAudit(audit)
        await door.log_violation(ctx, "run_mismatch", resource=said, operation="cancel")
        (record,) = await audit.find(creche.AuditQuery(user=ctx.user_id))
        return record


ENGINE = "create_user_engine(context, infrastructure=...)"
DISPATCHER = "create_scoped_dispatcher_context(context, tools=...)"

# (the older name, what uses it, what its warning must say to write)
DOORS: list[tuple[str, Use, str]] = [
    ("AgentRegistry", by_instance_factory, "creche.AgentClassRegistry()"),
    ("AgentInstanceFactory", by_instance_factory, "registry.describe(name).agent_class()"),
    ("ExecutionEngine(...)", by_engine, ENGINE),
    (
        "RequestScopedExecutionEngine",
        by_scoped_engine,
        ENGINE,
    ),
    (
        "ExecutionContextManager",
        by_context_manager,
        ENGINE,
    ),
    ("ToolDispatcher(...)", by_dispatcher, DISPATCHER),
    (
        "RequestScopedToolDispatcher",
        by_scoped_dispatcher,
        DISPATCHER,
    ),
    ("ToolExecutorFactory", by_factory, DISPATCHER),
    ("WebSocketEventEmitter", by_emitter, "await run.emit.text(...)"),
    ("WebSocketSecurityAudit", by_audit, "await audit.record(kind"),
    ("AgentWebSocketBridge", by_bridge, "await supervisor.start(context, agent, input)"),
    ("WebSocketConnectionPool", by_pool, "supervisor.open_events(user_id, thread_id)"),
]


@pytest.mark.parametrize(("name", "use", "instead"), DOORS, ids=[door[0] for door in DOORS])
async def test_an_older_name_works_and_says_what_to_write(
    name: str, use: Use, instead: str
) -> None:
    async with opened():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await use(context(ADA), "hello")
    told = [str(warning.message) for warning in caught if str(warning.message).startswith(name)]
    assert len(told) == 1
    assert instead in told[0]
    assert all(warning.category is DeprecationWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught), "it names who must change"


def test_every_older_name_is_tried() -> None:
    tried = {name.removesuffix("(...)") for name, _, _ in DOORS}
    assert tried == set(compat.__all__) - {"open_infrastructure"}


@pytest.mark.parametrize("use", [door[1] for door in DOORS], ids=[door[0] for door in DOORS])
async def test_two_users_at_once_stay_apart_through_it(use: Use) -> None:
    came: dict[str, list[str]] = {ADA: [], BOB: []}

    async def one(user: str, number: int) -> None:
        said = f"canary-of-{user}-{number}"
        came[user].append(repr(await use(context(user, f"thread-{number}"), said)))

    async with opened(), trio.open_nursery() as nursery:
        for number in range(5):
            for user in came:
                nursery.start_soon(one, user, number)
    for user, other in ((ADA, BOB), (BOB, ADA)):
        assert len(came[user]) == 5
        for said in came[user]:
            assert f"canary-of-{user}" in said
            assert f"canary-of-{other}" not in said


async def test_an_engine_that_was_constructed_executes_as_often_as_it_is_asked() -> None:
    async with opened() as made:
        engine = compat.ExecutionEngine(context(ADA))
        for words in ("one", "two"):
            assert (await engine.execute_agent("echo", words)).result == words
        assert len(await made.store.runs(ADA, creche.ThreadId("thread-a"))) == 2


async def test_a_run_id_that_has_been_is_told_as_that() -> None:
    async with opened():
        same = context(ADA, run="run-1")
        for expected in ("success", None):
            async with creche.ExecutionEngine.create_user_engine(same) as engine:
                if expected is not None:
                    assert (await engine.execute_agent("echo", "hi")).status == expected
                    continue
                with pytest.raises(CrecheError, match="'run-1' has been"):
                    await engine.execute_agent("echo", "hi")


async def test_engines_at_once_on_one_thread_share_its_journal() -> None:
    async with opened() as made:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                engine = compat.ExecutionEngine(context(ADA))
                nursery.start_soon(engine.execute_agent, "echo", f"{number}")
        runs = await made.store.runs(ADA, creche.ThreadId("thread-a"))
        assert [run.status for run in runs] == ["success"] * 5


async def test_a_pool_has_a_cap_for_each_user() -> None:
    async def send(data: bytes) -> None: ...

    pool = compat.WebSocketConnectionPool(most_per_user=1)
    with pool.connection(context(ADA), send):
        with pytest.raises(LimitExceededError), pool.connection(context(ADA), send):
            pytest.fail("two of one user")
        with pool.connection(context(BOB), send):
            pass
    with pool.connection(context(ADA), send):
        pass


def test_an_instance_is_made_for_a_context_and_of_a_known_class() -> None:
    factory = compat.AgentInstanceFactory(compat.AgentRegistry({"echo": Echo}))
    with pytest.raises(InvalidContextError):
        factory.create_agent_instance("echo", "registry")  # type: ignore[arg-type]
    with pytest.raises(UnknownAgentError):
        factory.create_agent_instance("nobody", context())
    one, other = (factory.create_agent_instance("echo", context()) for _ in "12")
    assert one is not other
