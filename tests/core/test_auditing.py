"""What the core tells the audit of a run: each mix-up once, whoever swallows it, and each limit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from tests.core.test_audit import TroubledSink
from tests.small_world import ADA, BOB, THREAD, agent_of, context
from tests.store_contract import record as run_record

from creche import (
    Agent,
    Approval,
    ApprovalRequest,
    AuditKind,
    AuditRecord,
    AuditUnavailableError,
    ConnectionId,
    ConnectionMismatchError,
    EventEmitter,
    ExecutionEngine,
    Infrastructure,
    InvalidContextError,
    IsolationError,
    Limits,
    MemorySink,
    RunContext,
    RunOutcome,
    Tool,
    ToolContext,
    ToolDispatcher,
    UserExecutionContext,
    is_connection_of,
    new_connection_id,
    open_audit,
    open_supervisor,
    tool,
)
from creche._audit_sinks import EVERYTHING

Mix = Callable[[RunContext], Any]
Body = Callable[[RunContext], Awaitable[Any]]


class World:
    """One run of `main` for ada, and what the audit has when it is closed."""

    def __init__(self, main: Body | type[Agent], **more: Any) -> None:
        self.sink: MemorySink = more.pop("sink", None) or MemorySink()
        self.tools: tuple[Tool, ...] = more.pop("tools", ())
        self.agents: dict[str, type[Agent]] = more.pop("agents", {})
        self.main = main if isinstance(main, type) else agent_of(main, self.tools)
        self.more = more
        self.context = context()

    async def run(self) -> tuple[RunOutcome, list[AuditRecord]]:
        async with open_audit(self.sink) as audit:
            made = Infrastructure(
                agents={"main": self.main, **self.agents}, audit=audit, **self.more
            )
            async with open_supervisor(made) as supervisor:
                run = await supervisor.start(self.context, "main", "go")
                outcome = await run.ended()
        return outcome, await self.sink.find(EVERYTHING)


def told(record: AuditRecord) -> tuple[AuditKind, str | None, str | None, str, str]:
    return (
        record.kind,
        record.user,
        record.claimed_owner,
        record.resource,
        record.operation,
    )


# --- mix-ups


def speaks_as_bob(run: RunContext) -> None:
    EventEmitter(context(BOB), run.emit._journal, run.limits)


def calls_as_bob(run: RunContext) -> None:
    run.tools._for_subagent(context(BOB), (), run.emit, run.spans)


def calls_in_another_thread(run: RunContext) -> None:
    elsewhere = dataclasses.replace(run.context, thread_id=context(thread="elsewhere").thread_id)
    run.tools._for_subagent(elsewhere, (), run.emit, run.spans)


def calls_in_another_run(run: RunContext) -> None:
    another = dataclasses.replace(run.context, run_id=context().run_id)
    run.tools._for_subagent(another, (), run.emit, run.spans)


def says_a_word_as_bob(run: RunContext) -> None:
    run.emit._journal.append_encoded(b'{"type":"CUSTOM"}', speaker=context(BOB))


def writes_bobs_run(run: RunContext) -> None:
    run.emit._journal.check_owned((run_record(user=BOB),), run.context)


def writes_into_another_thread(run: RunContext) -> None:
    elsewhere = run_record(thread=context(thread="elsewhere").thread_id)
    run.emit._journal.check_owned((elsewhere,), run.context)


def takes_bobs_connection(run: RunContext) -> None:
    run.context.with_connection(new_connection_id(BOB))


def shares(run: RunContext) -> None:
    shared: list[int] = []
    one, other = (context().with_database(shared.copy) for _ in range(2))
    one.verify_isolation(other)


THREAD_A = f"thread {THREAD}"
MIX_UPS: tuple[tuple[Mix, AuditKind, str, str | None, str, str | None], ...] = (
    # what the agent does, kind, user, owner, resource, operation where it is noted at once
    (speaks_as_bob, "event_injection", BOB, ADA, THREAD_A, "make an emitter"),
    (calls_as_bob, "user_mismatch", BOB, ADA, THREAD_A, "make a dispatcher"),
    (calls_in_another_thread, "thread_mismatch", ADA, ADA, THREAD_A, "make a dispatcher"),
    (calls_in_another_run, "run_mismatch", ADA, ADA, THREAD_A, "make a dispatcher"),
    (says_a_word_as_bob, "event_injection", BOB, ADA, THREAD_A, "speak"),
    (writes_bobs_run, "user_mismatch", ADA, BOB, THREAD_A, "write a run's row"),
    (writes_into_another_thread, "thread_mismatch", ADA, ADA, THREAD_A, "write a run's row"),
    (takes_bobs_connection, "connection_mismatch", ADA, None, "connection", None),
    (shares, "user_mismatch", ADA, None, "isolation", None),
)


def a_tool(mix: Mix) -> tuple[Tool, Callable[[RunContext], None]]:
    """A tool that does it in the run that was last handed over."""
    handed: list[RunContext] = []

    @tool(shared=(handed,))
    async def mixes() -> None:
        """Mix up."""
        mix(handed[-1])

    return mixes, handed.append


@pytest.mark.parametrize(("mix", "kind", "user", "owner", "resource", "at_once"), MIX_UPS)
class TestAMixUpIsRecordedOnce:
    async def test_where_it_ends_the_run(
        self,
        mix: Mix,
        kind: AuditKind,
        user: str,
        owner: str | None,
        resource: str,
        at_once: str | None,
    ) -> None:
        async def main(run: RunContext) -> None:
            mix(run)

        world = World(main)
        outcome, [record] = await world.run()
        assert outcome.status == "failed"
        assert told(record) == (kind, user, owner, resource, at_once or "run")
        assert (record.outcome, record.count) == ("stopped", 1)
        if user == ADA:
            assert record.correlation_id == world.context.correlation_id

    async def test_where_it_is_a_tools(
        self,
        mix: Mix,
        kind: AuditKind,
        user: str,
        owner: str | None,
        resource: str,
        at_once: str | None,
    ) -> None:
        mixes, hand_over = a_tool(mix)

        async def main(run: RunContext) -> str | None:
            hand_over(run)
            return (await run.call_tool("mixes", {})).error

        world = World(main, tools=(mixes,))
        outcome, [record] = await world.run()
        assert outcome.status == "success"
        assert outcome.result, "the call failed"
        assert told(record) == (kind, user, owner, resource, at_once or "tool mixes")
        assert record.count == 1
        if user == ADA:
            assert record.correlation_id == world.context.correlation_id

    async def test_where_it_is_a_sub_agents(
        self,
        mix: Mix,
        kind: AuditKind,
        user: str,
        owner: str | None,
        resource: str,
        at_once: str | None,
    ) -> None:
        async def sub(run: RunContext) -> None:
            mix(run)

        async def main(run: RunContext) -> str:
            return (await run.spawn("sub", "go")).status

        outcome, [record] = await World(main, agents={"sub": agent_of(sub)}).run()
        assert (outcome.status, outcome.result) == ("success", "failed")
        assert told(record) == (kind, user, owner, resource, at_once or "agent sub")
        assert record.count == 1
        assert record.correlation_id

    async def test_where_it_passes_several_boundaries(
        self,
        mix: Mix,
        kind: AuditKind,
        user: str,
        owner: str | None,
        resource: str,
        at_once: str | None,
    ) -> None:
        """The same error in a tool, in a sub-agent and, in a group, at the run's end."""
        kept: list[IsolationError] = []
        mixes, hand_over = a_tool(mix)

        @tool(shared=(kept,))
        async def keeps(caller: ToolContext) -> None:
            """Mix up, and keep the error."""
            try:
                await mixes.function()
            except IsolationError as error:
                kept.append(error)
                raise

        async def sub(run: RunContext) -> None:
            raise kept[0]

        async def main(run: RunContext) -> None:
            hand_over(run)
            assert not (await run.call_tool("keeps", {})).ok
            assert not (await run.spawn("sub", "go")).ok
            raise BaseExceptionGroup("both", [kept[0], ValueError()])

        world = World(main, tools=(keeps,), agents={"sub": agent_of(sub)})
        outcome, [record] = await world.run()
        assert outcome.status == "failed"
        assert told(record) == (kind, user, owner, resource, at_once or "tool keeps")
        assert record.count == 1


@pytest.mark.parametrize(
    ("mix", "kind", "user", "owner", "resource", "at_once"),
    [case for case in MIX_UPS if case[-1] is not None],
)
async def test_a_mix_up_that_the_agent_swallows_is_recorded_once(
    mix: Mix, kind: AuditKind, user: str, owner: str, resource: str, at_once: str
) -> None:
    """Whatever touches a journal: what is a check of data alone has no audit to tell."""

    async def main(run: RunContext) -> str:
        with contextlib.suppress(Exception):
            mix(run)
        return "as if nothing had been"

    outcome, [record] = await World(main).run()
    assert (outcome.status, outcome.result) == ("success", "as if nothing had been")
    assert told(record) == (kind, user, owner, resource, at_once)
    assert record.count == 1


@pytest.mark.parametrize("named", [True, False])
async def test_a_mix_up_that_is_raised_again_under_another_name_is_recorded_once(
    named: bool,
) -> None:
    """What checks data alone has no audit to tell, so the boundary must see what is behind."""

    async def main(run: RunContext) -> None:
        try:
            takes_bobs_connection(run)
        except IsolationError as error:
            if named:
                raise RuntimeError("something went wrong") from error
            raise RuntimeError("something went wrong")  # noqa: B904  what the test is about

    outcome, [record] = await World(main).run()
    assert outcome.status == "failed"
    assert (record.kind, record.count) == ("connection_mismatch", 1)


async def test_a_thousand_swallowed_mix_ups_are_two_records() -> None:
    async def main(run: RunContext) -> None:
        for _ in range(1000):
            with contextlib.suppress(IsolationError):
                speaks_as_bob(run)
            await trio.lowlevel.checkpoint()

    _, records = await World(main).run()
    assert len(records) <= 2
    assert sum(record.count for record in records) == 1000


async def test_a_mix_up_of_a_policy_or_an_approver_is_recorded() -> None:
    @tool(approval=True)
    async def pay() -> None:
        """Pay."""

    @tool
    async def look() -> None:
        """Look."""

    class Confused:
        async def approve(self, request: ApprovalRequest) -> Approval:
            request.context.with_connection(new_connection_id(BOB))
            return request.approve()

    def policy(asked: UserExecutionContext, tool: Tool) -> bool:
        if tool.name == "look":
            asked.with_connection(new_connection_id(BOB))
        return True

    async def main(run: RunContext) -> list[bool]:
        return [(await run.call_tool(name, {})).ok for name in ("pay",)]

    world = World(main, tools=(pay, look), tool_policy=policy, approver=Confused())
    outcome, records = await world.run()
    assert outcome.result == [False]
    assert [(r.kind, r.user, r.operation) for r in records] == [
        ("connection_mismatch", ADA, "tool policy on look"),
        ("connection_mismatch", ADA, "approval of pay"),
    ]


async def test_an_engine_and_a_dispatcher_of_ones_own_audit_as_well() -> None:
    async def swallows(run: RunContext) -> None:
        with contextlib.suppress(IsolationError):
            speaks_as_bob(run)

    @tool
    async def denied() -> None:
        """Never."""

    sink = MemorySink()
    async with open_audit(sink) as audit:
        made = Infrastructure(
            agents={"swallows": agent_of(swallows)},
            tools=[denied],
            tool_policy=lambda *_: False,
            audit=audit,
        )
        async with ExecutionEngine.create_user_engine(context(), infrastructure=made) as engine:
            assert (await engine.execute_agent("swallows", "go")).status == "success"
        opened = ToolDispatcher.create_scoped_dispatcher_context
        async with opened(context(), infrastructure=made) as dispatcher:
            assert not (await dispatcher.dispatch("denied", {})).ok
            with pytest.raises(IsolationError):
                EventEmitter(context(BOB), dispatcher.journal, Limits())
    counts = await sink.counts(EVERYTHING)
    assert counts == {"event_injection": 2, "privilege_escalation": 1}


async def test_a_mix_up_without_an_audit_is_stopped_all_the_same() -> None:
    async def main(run: RunContext) -> None:
        speaks_as_bob(run)

    async with open_supervisor(Infrastructure(agents={"main": agent_of(main)})) as supervisor:
        run = await supervisor.start(context(), "main", "go")
        assert (await run.ended()).status == "failed"


class TestAConnectionsId:
    def test_of_another_user_is_a_mismatch(self) -> None:
        with pytest.raises(ConnectionMismatchError) as caught:
            context().with_connection(new_connection_id(BOB))
        assert isinstance(caught.value, InvalidContextError)
        assert (caught.value.kind, caught.value.user) == ("connection_mismatch", ADA)
        assert is_connection_of(new_connection_id(BOB), BOB)

    @pytest.mark.parametrize("id_", ["x", "-", "a" * 32, "a" * 32 + "-", "a" * 49])
    def test_that_is_none_is_no_more_than_invalid(self, id_: str) -> None:
        with pytest.raises(InvalidContextError) as caught:
            context().with_connection(ConnectionId(id_))
        assert not isinstance(caught.value, IsolationError)


# --- writes to a class


class TestAWriteToAClass:
    @staticmethod
    def writer(*, sleep: float | None = None) -> type[Agent]:
        class Base:
            kept: Any = None

        class Writer(Base):
            async def run(self, run: RunContext) -> None:
                Base.kept = "what ada said"
                if sleep is not None:
                    await trio.sleep(sleep)

        return Writer

    async def test_is_recorded_as_more_power_than_a_run_has(self) -> None:
        world = World(self.writer())
        outcome, [record] = await world.run()
        assert outcome.status == "failed"
        assert told(record) == (
            "privilege_escalation",
            ADA,
            None,
            "class Base",
            "write to what runs share",
        )
        assert (record.outcome, record.count) == ("put back; the run failed", 1)
        assert record.correlation_id == world.context.correlation_id

    async def test_is_recorded_once_where_a_sub_agent_did_it(self) -> None:
        async def main(run: RunContext) -> None:
            for _ in range(2):
                await run.spawn("sub", "go")

        _, [record] = await World(main, agents={"sub": self.writer()}).run()
        assert (record.kind, record.count) == ("privilege_escalation", 1)

    async def test_is_recorded_of_each_run_that_may_have_written(
        self, autojump_clock: object
    ) -> None:
        sink = MemorySink()
        async with open_audit(sink) as audit:
            made = Infrastructure(agents={"writer": self.writer(sleep=1)}, audit=audit)
            async with open_supervisor(made) as supervisor:
                runs = [
                    await supervisor.start(context(user), "writer", "go") for user in (ADA, BOB)
                ]
                assert [(await run.ended()).status for run in runs] == ["failed"] * 2
        records = await sink.find(EVERYTHING)
        assert sorted((r.kind, r.user or "") for r in records) == [
            ("privilege_escalation", ADA),
            ("privilege_escalation", BOB),
        ]


# --- limits, and tools that a user may not call


@tool
async def look() -> str:
    """Look."""
    return "seen"


async def looks_three_times(run: RunContext) -> list[str]:
    return [(await run.call_tool("look", {})).content for _ in range(3)]


async def spawns_two(run: RunContext) -> None:
    await run.spawn("main", "deeper")


async def spawns_at_once(run: RunContext) -> None:
    async def spawn() -> None:
        await run.spawn("hang", "go")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(spawn)
        nursery.start_soon(spawn)


async def hang(run: RunContext) -> None:
    await trio.sleep_forever()


async def talks(run: RunContext) -> None:
    while True:
        await run.emit.text("x" * 100)


LIMITS: tuple[tuple[Body, Limits, str, str, int], ...] = (
    # what the agent does, the limits, resource, operation, how often it hits
    (looks_three_times, Limits(tool_calls=1), "tool calls of a run", "call a tool", 2),
    (looks_three_times, Limits(tool_calls_per_minute=1), "tool calls a minute", "call a tool", 2),
    (spawns_two, Limits(subagent_depth=0), "sub-agents", "spawn", 1),
    (spawns_at_once, Limits(subagents_at_once=1), "sub-agents", "spawn", 1),
    (talks, Limits(run_bytes=2000), "bytes of a run", "speak", 1),
)


@pytest.mark.parametrize(("main", "limits", "resource", "operation", "count"), LIMITS)
async def test_a_limit_within_a_run_that_was_hit_is_recorded(
    main: Body, limits: Limits, resource: str, operation: str, count: int
) -> None:
    world = World(main, tools=(look,), agents={"hang": agent_of(hang)}, limits=limits)
    _, records = await world.run()
    assert {told(record) for record in records} == {("limit_hit", ADA, None, resource, operation)}
    assert sum(record.count for record in records) == count
    assert {record.correlation_id for record in records} == {world.context.correlation_id}


async def test_a_flood_of_calls_over_the_budget_is_two_records() -> None:
    async def main(run: RunContext) -> None:
        for _ in range(200):
            await run.call_tool("look", {})

    _, records = await World(main, tools=(look,), limits=Limits(tool_calls=0)).run()
    assert len(records) <= 2
    assert sum(record.count for record in records) == 200


@pytest.mark.parametrize(("main", "limits"), [case[:2] for case in LIMITS[:2]])
async def test_a_call_over_a_limit_that_cannot_be_audited_says_that(
    main: Body, limits: Limits
) -> None:
    sink = TroubledSink()
    world = World(full(sink, main), tools=(look,), limits=limits, sink=sink)
    outcome, _ = await world.run()
    first, second, third = outcome.result
    assert first == "seen"
    assert second == third
    assert "the audit cannot be written" in second


async def test_a_sub_agent_too_many_that_cannot_be_audited_fails_the_run() -> None:
    sink = TroubledSink()
    caught: list[Exception] = []

    async def main(run: RunContext) -> None:
        sink.full = True
        try:
            await run.spawn("main", "deeper")
        except AuditUnavailableError as error:
            caught.append(error)
            raise

    outcome, _ = await World(main, limits=Limits(subagent_depth=0), sink=sink).run()
    assert outcome.status == "failed"
    assert len(caught) == 1


def full(sink: TroubledSink, main: Body) -> Body:
    async def body(run: RunContext) -> Any:
        sink.full = True
        return await main(run)

    return body


class TestAToolThatAUserMayNotCall:
    async def test_is_recorded_when_it_is_called_and_not_when_it_is_hidden(self) -> None:
        async def main(run: RunContext) -> list[str]:
            assert run.tools.specs == ()
            names = [*["look"] * 3, "l00k"]
            return [(await run.call_tool(name, {})).content for name in names]

        world = World(main, tools=(look,), tool_policy=lambda *_: False)
        outcome, records = await world.run()
        denied, absent = outcome.result[0], outcome.result[-1]
        assert denied.replace("look", "N") == absent.replace("l00k", "N")
        assert {told(record) for record in records} == {
            ("privilege_escalation", ADA, None, "tool look", "call")
        }
        assert sum(record.count for record in records) == 3
        assert {record.correlation_id for record in records} == {world.context.correlation_id}

    async def test_is_answered_without_waiting_for_the_audit(self, autojump_clock: object) -> None:
        """Else the time that it takes would tell which tools there are."""
        sink = TroubledSink()
        took: list[float] = []

        async def main(run: RunContext) -> None:
            sink.hold()
            before = trio.current_time()
            await run.call_tool("look", {})
            took.append(trio.current_time() - before)
            sink.release()

        world = World(main, tools=(look,), tool_policy=lambda *_: False, sink=sink)
        with trio.fail_after(60):
            _, [record] = await world.run()
        assert took == [0]
        assert record.kind == "privilege_escalation"

    async def test_is_recorded_of_a_sub_agent_too(self) -> None:
        async def sub(run: RunContext) -> None:
            await run.call_tool("look", {})

        async def main(run: RunContext) -> None:
            await run.spawn("sub", "go")

        world = World(main, agents={"sub": agent_of(sub, (look,))}, tool_policy=lambda *_: False)
        _, [record] = await world.run()
        assert (record.kind, record.resource) == ("privilege_escalation", "tool look")
