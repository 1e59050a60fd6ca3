"""The older design's names: each works, says what to write instead, and keeps users apart."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from tests.core import coming_over
from tests.small_world import ADA, BOB, THREAD, context, infrastructure, log_of, one_at_a_time
from trio.testing import MockClock, wait_all_tasks_blocked

import creche
import creche.testing
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
from creche._isolation import mutables

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


async def by_class_method_of_the_engine(ctx: UserExecutionContext, said: str) -> object:
    async with compat.ExecutionEngine.create_user_engine(ctx) as engine:
        return await engine.execute_agent("echo", said)


async def by_class_method_of_the_dispatcher(ctx: UserExecutionContext, said: str) -> object:
    async with compat.ToolDispatcher.create_scoped_dispatcher_context(ctx) as dispatcher:
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
    ("AgentInstanceFactory", by_instance_factory, "registry.make(name)"),
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
    ("compat.ExecutionEngine.create_user_engine", by_class_method_of_the_engine, ENGINE),
    (
        "compat.ToolDispatcher.create_scoped_dispatcher_context",
        by_class_method_of_the_dispatcher,
        DISPATCHER,
    ),
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
    told = [warning for warning in caught if str(warning.message).startswith(name)]
    assert len(told) == 1
    assert instead in str(told[0].message)
    assert all(warning.category is DeprecationWarning for warning in caught)
    where = [(warning.filename, warning.lineno) for warning in told]
    assert where == [(__file__, line_of(use, name))], "it names what must change"


def line_of(function: Callable[..., object], name: str) -> int:
    """The one line of a function that uses this older name."""
    lines, first = inspect.getsourcelines(function)
    called = f"compat.{name.removeprefix('compat.').removesuffix('(...)')}("
    (found,) = [first + place for place, line in enumerate(lines) if called in line]
    return found


def test_a_class_below_an_older_one_is_told_at_the_line_that_makes_it() -> None:
    class Below(compat.ToolDispatcher):
        """Has no constructor of its own."""

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Below(context())  # compat.Below()
    (told,) = caught
    here = line_of(
        test_a_class_below_an_older_one_is_told_at_the_line_that_makes_it, "compat.Below"
    )
    assert (told.filename, told.lineno) == (__file__, here)


def test_every_older_name_is_tried() -> None:
    tried = {name.removeprefix("compat.").replace("(", ".").split(".")[0] for name, _, _ in DOORS}
    assert tried == set(compat.__all__) - {"open_infrastructure"}


@pytest.mark.parametrize("use", [door[1] for door in DOORS], ids=[door[0] for door in DOORS])
async def test_two_users_at_once_stay_apart_through_it(use: Use) -> None:
    came: dict[str, list[str]] = {ADA: [], BOB: []}

    async def one(user: str, number: int) -> None:
        said = f"canary-of-{user}-{number}"
        came[user].append(repr(await use(context(user, f"thread-{number}"), said)))

    async with opened() as made:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                for user in came:
                    nursery.start_soon(one, user, number)
        await check_the_store(made)
    check_the_canaries(came)


def check_the_canaries(came: dict[str, list[str]]) -> None:
    """Each of both users got five times what is theirs, and nothing of the other's."""
    for user, other in ((ADA, BOB), (BOB, ADA)):
        assert len(came[user]) == 5
        for said in came[user]:
            assert f"canary-of-{user}" in said
            assert f"canary-of-{other}" not in said


async def check_the_store(made: creche.Infrastructure) -> None:
    """No journal of one user's has anything of the other's."""
    for user, other in ((ADA, BOB), (BOB, ADA)):
        for number in range(5):
            log = await log_of(made.store, user, f"thread-{number}")
            assert f"canary-of-{other}" not in repr(log)
            one_at_a_time(log)


# --- one object that all users share, as the older design's singletons were


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """One of each."""

    instances: compat.AgentInstanceFactory
    engines: compat.ExecutionContextManager
    tools: compat.ToolExecutorFactory
    pool: compat.WebSocketConnectionPool
    audit: creche.SecurityAudit
    notes: compat.WebSocketSecurityAudit
    bridge: compat.AgentWebSocketBridge


@contextlib.asynccontextmanager
async def shared_doors(made: creche.Infrastructure) -> AsyncIterator[Shared]:
    async with creche.open_audit(creche.MemorySink()) as audit:
        async with open_supervisor(made) as supervisor:
            yield Shared(
                instances=compat.AgentInstanceFactory(compat.AgentRegistry({"echo": Echo})),
                engines=compat.ExecutionContextManager(),
                tools=compat.ToolExecutorFactory([my_tool]),
                pool=compat.WebSocketConnectionPool(),
                audit=audit,
                notes=compat.WebSocketSecurityAudit(audit),
                bridge=compat.AgentWebSocketBridge(supervisor),
            )


async def by_shared_instances(shared: Shared, ctx: UserExecutionContext, said: str) -> object:
    agent: Any = shared.instances.create_agent_instance("echo", ctx)
    agent.kept.append(said)
    await trio.lowlevel.checkpoint()
    return agent.kept


async def by_shared_engines(shared: Shared, ctx: UserExecutionContext, said: str) -> object:
    async with shared.engines.execution_context(ctx) as engine:
        return await engine.execute_agent("echo", said)


async def by_shared_tools(shared: Shared, ctx: UserExecutionContext, said: str) -> object:
    async with shared.tools.create_tool_executor(ctx) as dispatcher:
        return await dispatcher.dispatch("my_tool", {"text": said})


async def by_shared_pool(shared: Shared, ctx: UserExecutionContext, said: str) -> object:
    frames: list[bytes] = []

    async def send(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        frames.append(data)

    with shared.pool.connection(ctx, send) as attached:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            await shared.pool.send_to_user(attached, said.encode())
    return frames


async def by_shared_audit(shared: Shared, ctx: UserExecutionContext, said: str) -> object:
    await shared.notes.log_violation(ctx, "run_mismatch", resource=said, operation="cancel")
    return await shared.audit.find(creche.AuditQuery(user=ctx.user_id))


async def by_shared_bridge(shared: Shared, ctx: UserExecutionContext, said: str) -> object:
    frames: list[bytes] = []

    async def send(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        frames.append(data)

    outcome = await shared.bridge.run_agent(ctx, "echo", said, send)
    assert outcome.result == said
    return frames


SHARED = [
    by_shared_instances,
    by_shared_engines,
    by_shared_tools,
    by_shared_pool,
    by_shared_audit,
    by_shared_bridge,
]


@pytest.mark.parametrize("use", SHARED)
async def test_two_users_at_once_stay_apart_through_one_that_they_share(
    use: Callable[[Shared, UserExecutionContext, str], Awaitable[object]],
) -> None:
    came: dict[str, list[str]] = {ADA: [], BOB: []}

    async def one(shared: Shared, user: str, number: int) -> None:
        said = f"canary-of-{user}-{number}"
        came[user].append(repr(await use(shared, context(user, f"thread-{number}"), said)))

    async with opened() as made:
        async with shared_doors(made) as shared, trio.open_nursery() as nursery:
            for number in range(5):
                for user in came:
                    nursery.start_soon(one, shared, user, number)
        await check_the_store(made)
    check_the_canaries(came)


async def test_an_engine_that_was_constructed_executes_as_often_as_it_is_asked() -> None:
    async with opened() as made:
        engine = compat.ExecutionEngine(context(ADA))
        for words in ("one", "two"):
            assert (await engine.execute_agent("echo", words)).result == words
        assert len(await made.store.runs(ADA, creche.ThreadId("thread-a"))) == 2


async def test_a_run_id_that_has_been_is_told_as_that(caplog: pytest.LogCaptureFixture) -> None:
    """And not as a failure of the store's: nothing is logged that an operator should look into."""
    caplog.set_level("WARNING", logger="creche")
    async with opened():
        same = context(ADA, run="run-1")
        for expected in ("success", None):
            async with creche.ExecutionEngine.create_user_engine(same) as engine:
                if expected is not None:
                    assert (await engine.execute_agent("echo", "hi")).status == expected
                    continue
                with pytest.raises(CrecheError, match="'run-1' has been"):
                    await engine.execute_agent("echo", "hi")
    assert caplog.records == []


async def test_engines_at_once_on_one_thread_share_its_journal_and_take_turns_in_it() -> None:
    """Of each user: what one run says is never amid another's, and is in no other journal."""
    async with opened() as made:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                for user in (ADA, BOB):
                    ctx = context(user, run=f"run-{user}-{number}")
                    engine = compat.ExecutionEngine(ctx)
                    nursery.start_soon(engine.execute_agent, "echo", f"said in {ctx.run_id}")
        for user, other in ((ADA, BOB), (BOB, ADA)):
            runs = await made.store.runs(user, THREAD)
            assert [run.status for run in runs] == ["success"] * 5
            log = await log_of(made.store, user)
            assert sorted(one_at_a_time(log)) == [f"run-{user}-{number}" for number in range(5)]
            assert f"-{other}-" not in repr(log)
            speaking = None
            for event in log:
                speaking = event.get("runId", speaking)
                if "delta" in event:
                    assert f"said in {speaking}" in event["delta"]


def core_engine(ctx: UserExecutionContext, made: creche.Infrastructure) -> Any:
    return creche.ExecutionEngine.create_user_engine(ctx, infrastructure=made)


def engine_of_the_manager(ctx: UserExecutionContext, made: creche.Infrastructure) -> Any:
    return compat.ExecutionContextManager(made).execution_context(ctx)


@contextlib.asynccontextmanager
async def constructed_engine(
    ctx: UserExecutionContext, made: creche.Infrastructure
) -> AsyncIterator[compat.ExecutionEngine]:
    yield compat.ExecutionEngine(ctx, made)


@pytest.mark.parametrize("around", [False, True], ids=["passed", "passed, and around"])
@pytest.mark.parametrize(
    "opener",
    [
        core_engine,
        engine_of_the_manager,
        compat.RequestScopedExecutionEngine,
        constructed_engine,
    ],
)
async def test_engines_at_once_on_one_thread_of_an_infrastructure_that_is_passed_take_turns(
    opener: Callable[[UserExecutionContext, creche.Infrastructure], Any],
    around: bool,
    autojump_clock: MockClock,
) -> None:
    alive: list[int] = []

    class Slow:
        shared = (alive,)

        async def run(self, run: RunContext) -> int:
            alive.append(1)
            await trio.sleep(1)
            at_once = len(alive)
            alive.pop()
            return at_once

    async def execute(made: creche.Infrastructure, number: int) -> None:
        async with opener(context(ADA, run=f"run-{number}"), made) as engine:
            assert (await engine.execute_agent("slow", "hi")).result == 1

    async with compat.open_infrastructure(agents={"slow": Slow}) as opened_around:
        made = opened_around if around else infrastructure(slow=Slow)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(execute, made, number)
        assert len(one_at_a_time(await log_of(made.store))) == 3


async def test_an_infrastructure_that_is_around_is_the_same_where_it_is_passed() -> None:
    """Its journals and its count of calls, too."""
    limits = creche.Limits(tool_calls_per_minute=2)
    async with compat.open_infrastructure(
        agents={"echo": Echo}, tools=[my_tool], limits=limits
    ) as made:
        results: list[object] = []
        for passed in (None, made, made, None):
            async with creche.ToolDispatcher.create_scoped_dispatcher_context(
                context(), infrastructure=passed
            ) as dispatcher:
                results.append((await dispatcher.dispatch("my_tool", {"text": ""})).ok)
        assert results == [True, True, False, False]
        async with (
            creche.ExecutionEngine.create_user_engine(context(run="run-a")) as one,
            creche.ExecutionEngine.create_user_engine(
                context(run="run-b"), infrastructure=made
            ) as two,
        ):
            await one.execute_agent("echo", "hi")
            await two.execute_agent("echo", "hi")
        assert one_at_a_time(await log_of(made.store)) == ["run-a", "run-b"]


async def test_an_agent_that_is_made_by_hand_is_of_a_class_that_is_as_it_was() -> None:
    class Plain:
        async def run(self, run: RunContext) -> None:
            """Do nothing."""

    registry = compat.AgentRegistry({"plain": Plain})
    factory = compat.AgentInstanceFactory(registry)
    one: Any = factory.create_agent_instance("plain", context())
    type(one).secret = "of ada"
    two: Any = factory.create_agent_instance("plain", context(BOB))
    assert one is not two
    assert not hasattr(two, "secret")
    with pytest.raises(UnknownAgentError):
        factory.create_agent_instance("nobody", context())


async def test_an_emitter_tells_the_audit_that_is_around() -> None:
    async def send(_: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async with creche.open_audit(creche.MemorySink()) as audit:
        async with compat.open_infrastructure(audit=audit):
            async with compat.WebSocketEventEmitter(context(ADA), send) as emitter:
                with pytest.raises(creche.IsolationError):
                    creche.SubagentEmitter(emitter, context(BOB))
        (record,) = await audit.find(creche.AuditQuery(kind="event_injection"))
    assert (record.user, record.claimed_owner) == (BOB, ADA)


@pytest.mark.parametrize("around", [False, True], ids=["alone", "around"])
class TestADispatcherThatWasConstructed:
    async def test_it_has_one_budget_for_all_its_calls(
        self, around: bool, autojump_clock: MockClock
    ) -> None:
        most = creche.Limits().tool_calls
        async with contextlib.AsyncExitStack() as stack:
            if around:
                await stack.enter_async_context(opened())
            one = compat.ToolDispatcher(context(), [my_tool])
            told = [await one.dispatch("my_tool", {"text": ""}) for _ in range(most + 3)]
            assert [result.ok for result in told] == [True] * most + [False] * 3
            assert told[-1].code == "limit_exceeded"
            other = compat.ToolDispatcher(context(), [my_tool])
            assert (await other.dispatch("my_tool", {"text": ""})).ok, "another run's is its own"

    async def test_a_factory_counts_what_a_user_calls_in_a_minute(
        self, around: bool, autojump_clock: MockClock
    ) -> None:
        limits = creche.Limits()
        granted = {ADA: 0, BOB: 0}
        async with contextlib.AsyncExitStack() as stack:
            if around:
                await stack.enter_async_context(opened())
            factory = compat.ToolExecutorFactory([my_tool])
            for user in (*[ADA] * 4, BOB):
                async with factory.create_tool_executor(context(user)) as dispatcher:
                    for _ in range(limits.tool_calls):
                        result = await dispatcher.dispatch("my_tool", {"text": ""})
                        granted[user] += result.ok
        assert granted == {ADA: limits.tool_calls_per_minute, BOB: limits.tool_calls}


# --- what is around


def test_what_an_infrastructure_takes_can_be_opened_around() -> None:
    taken = {field.name for field in dataclasses.fields(creche.Infrastructure) if field.init}
    assert {*inspect.signature(compat.open_infrastructure).parameters} == taken


async def test_what_is_opened_around_gets_all_that_it_was_given() -> None:
    class Nobody:
        async def approve(self, request: creche.ApprovalRequest) -> creche.Approval:
            return request.refuse()

    def deny(_: UserExecutionContext, __: creche.Tool) -> bool:
        return False

    async with creche.open_audit(creche.MemorySink()) as audit:
        given: dict[str, Any] = {
            "models": {"default": creche.testing.ScriptedModel(creche.testing.Pacer())},
            "tool_policy": deny,
            "approver": Nobody(),
            "limits": creche.Limits(runs=7),
            "store": creche.MemoryStore(),
            "audit": audit,
        }
        async with compat.open_infrastructure(**given) as made:
            assert {name: getattr(made, name) for name in given} == given


@tool(approval=True)
async def pay() -> str:
    """Pay."""
    await trio.lowlevel.checkpoint()
    return "paid"


class Approves:
    def __init__(self) -> None:
        self.asked: list[str] = []

    async def approve(self, request: creche.ApprovalRequest) -> creche.Approval:
        self.asked.append(request.tool_name)
        return request.approve()


class TestADispatcherThatIsGivenTools:
    """Keeps what is around it all the same."""

    @pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
    async def test_it_keeps_the_policy(self, older: bool) -> None:
        def not_bob(caller: UserExecutionContext, _: creche.Tool) -> bool:
            return caller.user_id != BOB

        doors: Any = compat.ToolDispatcher if older else creche.ToolDispatcher
        async with compat.open_infrastructure(tool_policy=not_bob):
            for user, allowed in ((ADA, True), (BOB, False)):
                async with doors.create_scoped_dispatcher_context(
                    context(user), tools=[my_tool]
                ) as dispatcher:
                    assert (await dispatcher.dispatch("my_tool", {"text": "hi"})).ok is allowed

    async def test_it_keeps_the_approver(self) -> None:
        approver = Approves()
        async with compat.open_infrastructure(approver=approver):
            async with creche.ToolDispatcher.create_scoped_dispatcher_context(
                context(), tools=[pay]
            ) as dispatcher:
                assert (await dispatcher.dispatch("pay", {})).value == "paid"
        assert approver.asked == ["pay"]

    async def test_it_keeps_the_limits_but_for_those_that_it_is_given(self) -> None:
        async with compat.open_infrastructure(limits=creche.Limits(tool_calls=1)):
            for limits, most in ((None, 1), (creche.Limits(tool_calls=2), 2)):
                async with creche.ToolDispatcher.create_scoped_dispatcher_context(
                    context(), tools=[my_tool], limits=limits
                ) as dispatcher:
                    told = [await dispatcher.dispatch("my_tool", {"text": ""}) for _ in range(3)]
                assert [result.ok for result in told].count(True) == most

    async def test_it_counts_with_the_others_of_its_user_and_of_no_other(self) -> None:
        counted: list[tuple[str, bool]] = []
        async with compat.open_infrastructure(limits=creche.Limits(tool_calls_per_minute=2)):
            for user in (ADA, ADA, ADA, BOB):
                async with creche.ToolDispatcher.create_scoped_dispatcher_context(
                    context(user), tools=[my_tool]
                ) as dispatcher:
                    counted.append((user, (await dispatcher.dispatch("my_tool", {"text": ""})).ok))
        assert counted == [(ADA, True), (ADA, True), (ADA, False), (BOB, True)]

    async def test_an_infrastructure_of_its_own_goes_before_what_is_around(self) -> None:
        def deny(_: UserExecutionContext, __: creche.Tool) -> bool:
            return False

        async with compat.open_infrastructure(tool_policy=deny):
            async with creche.ToolDispatcher.create_scoped_dispatcher_context(
                context(), tools=[my_tool], infrastructure=infrastructure()
            ) as dispatcher:
                assert (await dispatcher.dispatch("my_tool", {"text": ""})).ok


async def test_an_engine_with_journals_of_its_own_keeps_to_them() -> None:
    own = creche.MemoryStore()
    async with opened() as made, creche.open_journals(own) as journals:
        async with creche.ExecutionEngine.create_user_engine(
            context(), journals=journals
        ) as engine:
            assert (await engine.execute_agent("echo", "hi")).status == "success"
        assert await log_of(made.store) == []
    assert one_at_a_time(await log_of(own))


# --- the pool


class Wire:
    """A socket that keeps what it is sent, until it breaks."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.broken = False

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise trio.BrokenResourceError
        self.got.append(data)


async def held(
    pool: compat.WebSocketConnectionPool,
    wire: Wire,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """A connection's task; notes that its block raised."""
    try:
        with pool.connection(context(ADA), wire.send):
            task_status.started()
            await trio.sleep_forever()
    except trio.BrokenResourceError:
        wire.got.append(b"(told)")


class TestAPool:
    async def test_a_socket_that_is_dead_keeps_it_from_no_other_and_is_not_counted(
        self, autojump_clock: MockClock
    ) -> None:
        pool = compat.WebSocketConnectionPool()
        wires = [Wire() for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for wire in wires:
                await nursery.start(functools.partial(held, pool, wire))
            wires[0].broken = True
            assert await pool.send_to_user(context(ADA), b"one") == 2
            await wait_all_tasks_blocked()
            assert [wire.got for wire in wires] == [[b"(told)"], [b"one"], [b"one"]]
            wires[0].broken = False
            assert await pool.send_to_user(context(ADA), b"two") == 2
            assert wires[0].got == [b"(told)"], "whose block has ended"
            nursery.cancel_scope.cancel()

    async def test_who_sends_from_within_a_dead_sockets_block_reaches_the_others_all_the_same(
        self,
    ) -> None:
        class Slow(Wire):
            async def send(self, data: bytes) -> None:
                for _ in range(10):
                    await trio.lowlevel.checkpoint()
                await super().send(data)

        pool = compat.WebSocketConnectionPool()
        dead, other = Wire(), Slow()
        dead.broken = True
        took = 0
        with pool.connection(context(ADA), other.send):
            with pytest.raises(trio.BrokenResourceError):
                with pool.connection(context(ADA), dead.send) as attached:
                    took = await pool.send_to_user(attached, b"one")
                    await trio.lowlevel.checkpoint()
                    pytest.fail("its block has ended")
        assert (took, other.got) == (1, [b"one"])

    async def test_a_dead_socket_takes_no_place(self) -> None:
        """The user is not locked out by what nobody can be reached through."""
        pool = compat.WebSocketConnectionPool(most_per_user=1)
        dead = Wire()
        dead.broken = True
        with pytest.raises(trio.BrokenResourceError):
            with pool.connection(context(ADA), dead.send):
                assert await pool.send_to_user(context(ADA), b"one") == 0
                with pool.connection(context(ADA), Wire().send):
                    assert await pool.send_to_user(context(ADA), b"two") == 1

    async def test_a_context_that_has_a_connection_is_refused_and_leaves_nothing(self) -> None:
        pool = compat.WebSocketConnectionPool()
        with pool.connection(context(ADA), Wire().send) as attached:
            pass
        for _ in range(2):
            with pytest.raises(InvalidContextError, match="already"):
                with pool.connection(attached, Wire().send):
                    pytest.fail("a request comes through one connection")
        assert mutables_named(pool, ADA) == []

    async def test_what_was_held_is_forgotten(self) -> None:
        pool = compat.WebSocketConnectionPool()
        with pool.connection(context(ADA), Wire().send):
            assert mutables_named(pool, ADA) != []
        assert mutables_named(pool, ADA) == []

    async def test_it_has_a_cap_for_each_user_and_one_for_all(self) -> None:
        pool = compat.WebSocketConnectionPool(most_per_user=1, most=2)
        with pool.connection(context(ADA), Wire().send):
            with pytest.raises(LimitExceededError, match="a user may have 1"):
                with pool.connection(context(ADA), Wire().send):
                    pytest.fail("two of one user")
            with pool.connection(context(BOB), Wire().send):
                with pytest.raises(LimitExceededError, match="all users together may have 2"):
                    with pool.connection(context("cy"), Wire().send):
                        pytest.fail("three in all")
        with pool.connection(context(ADA), Wire().send):
            pass

    @pytest.mark.parametrize("passed", [True, False], ids=["passed", "around"])
    async def test_a_refusal_by_its_cap_is_audited(self, passed: bool) -> None:
        async with creche.open_audit(creche.MemorySink()) as audit:
            async with compat.open_infrastructure(audit=None if passed else audit):
                pool = compat.WebSocketConnectionPool(
                    most_per_user=1, audit=audit if passed else None
                )
                with pool.connection(context(ADA), Wire().send):
                    with pytest.raises(LimitExceededError):
                        with pool.connection(context(ADA), Wire().send):
                            pytest.fail("two of one user")
            await audit.flush()
            (record,) = await audit.find(creche.AuditQuery(user=ADA))
            assert (record.kind, record.resource) == ("limit_hit", "connections")
            assert await audit.find(creche.AuditQuery(user=BOB)) == []


def mutables_named(root: object, word: str) -> list[str]:
    """Where in an object a word is found."""
    return [path for path, _ in mutables(root) if word in path]


def test_an_instance_is_made_for_a_context_and_of_a_known_class() -> None:
    factory = compat.AgentInstanceFactory(compat.AgentRegistry({"echo": Echo}))
    with pytest.raises(InvalidContextError):
        factory.create_agent_instance("echo", "registry")  # type: ignore[arg-type]
    with pytest.raises(UnknownAgentError):
        factory.create_agent_instance("nobody", context())
    one, other = (factory.create_agent_instance("echo", context()) for _ in "12")
    assert one is not other
