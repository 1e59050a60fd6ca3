"""A dispatcher: whom it lets call what, how often, and what it says without an engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import trio
from tests.agui_rules import StockClient
from tests.small_world import ADA, BOB, context, infrastructure, log_of
from trio.testing import MockClock

from creche import (
    CrecheError,
    EmitterClosedError,
    Infrastructure,
    Limits,
    MemoryStore,
    RunContext,
    Tool,
    ToolDispatcher,
    ToolPolicy,
    ToolQuotas,
    UserExecutionContext,
    logged_context,
    open_supervisor,
    tool,
)

opened = ToolDispatcher.create_scoped_dispatcher_context


@tool
async def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@tool
async def slow() -> None:
    """Never return."""
    await trio.sleep_forever()


class Exits(msgspec.Struct):
    a: int

    def __post_init__(self) -> None:
        raise SystemExit(3)


async def said_by(dispatcher: ToolDispatcher) -> list[dict[str, Any]]:
    """The whole log of a dispatcher whose block has ended."""
    found: list[dict[str, Any]] = []
    while len(found) < dispatcher.journal.last_seq:
        entries = await dispatcher.journal.read(after=len(found))
        found.extend(msgspec.json.decode(entry.data) for entry in entries)
    return found


def check(log: Sequence[dict[str, Any]]) -> None:
    """A stock client takes it, and it is one whole run."""
    client = StockClient()
    client.take_all(log)
    assert client.is_tidy
    assert client.state in {"finished", "failed"}
    assert [event["seq"] for event in log] == [*range(1, len(log) + 1)]


def types(log: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in log]


class TestWithoutAnEngine:
    async def test_its_log_is_a_whole_and_valid_run(self, autojump_clock: MockClock) -> None:
        async with opened(context(run="r-1"), tools=[add]) as dispatcher:
            assert (await dispatcher.dispatch("add", {"a": 1})).value == 3
            assert not (await dispatcher.dispatch("add", {"a": "1"})).ok
        log = await said_by(dispatcher)
        call = ["TOOL_CALL_START", "TOOL_CALL_ARGS", "TOOL_CALL_END", "TOOL_CALL_RESULT"]
        assert types(log) == ["RUN_STARTED", *call, *call, "RUN_FINISHED"]
        assert {event["runId"] for event in (log[0], log[-1])} == {"r-1"}
        assert log[-1]["metadata"]["creche"]["receipt"] == {
            "reason": "success",
            "tools_stopped": [],
            "threads_abandoned": [],
            "processes_killed": [],
        }
        check(log)

    async def test_an_infrastructure_gives_tools_limits_and_policy(
        self, autojump_clock: MockClock
    ) -> None:
        made = Infrastructure(
            agents={},
            tools=[add, slow],
            limits=Limits(tool_timeout=3),
            tool_policy=lambda _, tool: tool.name == "slow",
        )
        async with opened(context(), infrastructure=made) as dispatcher:
            assert [spec.name for spec in dispatcher.specs] == ["slow"]
            assert "3 s" in (await dispatcher.dispatch("slow", {})).content
        async with opened(context(), tools=[add], infrastructure=made) as dispatcher:
            assert dispatcher.specs == (), "tools that are given are held to the policy, too"

    async def test_without_tools_and_infrastructure_it_says_what_to_pass(self) -> None:
        with pytest.raises(CrecheError, match=r"pass tools= or infrastructure="):
            async with opened(context()):
                pass

    async def test_leaving_the_block_ends_the_calls_of_other_tasks(
        self, autojump_clock: MockClock
    ) -> None:
        results: list[Any] = []

        async def call() -> None:
            results.append(await dispatcher.dispatch("slow", {}))

        async with trio.open_nursery() as nursery:
            async with opened(context(), tools=[slow]) as dispatcher:
                nursery.start_soon(call)
                await trio.sleep(1)
            assert trio.current_time() < 2
            assert dispatcher.stopped == ["slow"]
            assert types(await said_by(dispatcher))[-2:] == ["TOOL_CALL_RESULT", "RUN_FINISHED"]
        assert "its dispatcher's block ended" in results[0].error
        check(await said_by(dispatcher))

    async def test_it_does_not_wait_for_ever_and_names_what_is_left(
        self, autojump_clock: MockClock
    ) -> None:
        @tool
        async def stubborn() -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(100)

        async with trio.open_nursery() as nursery:
            async with opened(
                context(), tools=[stubborn], limits=Limits(cleanup_timeout=4)
            ) as dispatcher:
                nursery.start_soon(dispatcher.dispatch, "stubborn", {})
                await trio.sleep(1)
                left = trio.current_time()
            assert trio.current_time() - left == pytest.approx(4)
            assert dispatcher.abandoned == ["stubborn"]
            check(await said_by(dispatcher))

    async def test_after_its_block_it_calls_nothing(self, autojump_clock: MockClock) -> None:
        async with opened(context(), tools=[add]) as dispatcher:
            pass
        with pytest.raises(EmitterClosedError, match="block has ended"):
            await dispatcher.dispatch("add", {"a": 1})

    async def test_an_error_in_the_block_comes_out_as_it_is_and_ends_the_log_so(
        self, autojump_clock: MockClock
    ) -> None:
        with pytest.raises(ValueError, match="hunter2"):
            async with opened(context(), tools=[add]) as dispatcher:
                raise ValueError("hunter2")
        log = await said_by(dispatcher)
        assert (log[-1]["type"], log[-1]["code"]) == ("RUN_ERROR", "failed")
        assert "hunter2" not in repr(log)
        check(log)

    async def test_a_cancelled_block_says_so_and_its_call_has_a_result(
        self, autojump_clock: MockClock
    ) -> None:
        with trio.move_on_after(1) as scope:
            async with opened(context(), tools=[slow]) as dispatcher:
                await dispatcher.dispatch("slow", {})
        assert scope.cancelled_caught
        log = await said_by(dispatcher)
        assert types(log)[-2:] == ["TOOL_CALL_RESULT", "RUN_FINISHED"]
        assert log[-1]["outcome"] == {"type": "cancelled"}
        assert log[-1]["metadata"]["creche"]["receipt"]["tools_stopped"] == [
            {"name": "slow", "how": "cancelled"}
        ]
        check(log)

    async def test_two_users_dispatchers_share_nothing(self, autojump_clock: MockClock) -> None:
        async with opened(context(ADA), tools=[add]) as adas:
            async with opened(context(BOB), tools=[add]) as bobs:
                await adas.dispatch("add", {"a": 41})
        assert len(await said_by(adas)) == 6
        assert types(await said_by(bobs)) == ["RUN_STARTED", "RUN_FINISHED"]


async def test_two_tools_of_one_name_are_refused() -> None:
    @tool(name="add")
    async def other() -> None: ...

    for tools in ([add, other], [add, slow, add]):
        with pytest.raises(ValueError, match="dispatcher may have one tool .* of 'add'"):
            async with ToolDispatcher.create_scoped_dispatcher_context(context(), tools=tools):
                pytest.fail("it was opened")


def _only_ada(asking: UserExecutionContext, tool: Tool) -> bool:
    return asking.user_id == ADA or tool.name != "add"


def _fails(asking: UserExecutionContext, tool: Tool) -> bool:
    if tool.name == "add":
        raise KeyError("hunter2")
    return True


def _exits(asking: UserExecutionContext, tool: Tool) -> bool:
    if tool.name == "add":
        raise SystemExit
    return True


def _vague(asking: UserExecutionContext, tool: Tool) -> Any:
    return "yes" if tool.name == "add" else True


class TestAllowList:
    @pytest.mark.parametrize("policy", [_only_ada, _fails, _exits, _vague])
    async def test_a_tool_that_is_denied_is_as_one_that_does_not_exist(
        self, policy: ToolPolicy, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Same words, same events: only the name differs."""
        told: list[Any] = []
        for tools, name in (([add, slow], "add"), ([slow], "nil")):
            made = Infrastructure(agents={}, tools=tools, tool_policy=policy)
            asking = context(BOB, run="r")
            async with opened(asking, infrastructure=made) as dispatcher:
                assert [spec.name for spec in dispatcher.specs] == ["slow"]
                for params in ({"a": 1}, {"a": "1"}, "nonsense"):
                    result = await dispatcher.dispatch(name, params)
                    assert not result.ok
                    assert "slow" not in result.content
            log = [
                {key: event[key] for key in event if key not in _OF_THE_MOMENT}
                for event in await said_by(dispatcher)
            ]
            told.append(msgspec.json.encode(log).replace(name.encode(), b"it"))
        assert told[0] == told[1]
        denied = policy is not _only_ada
        assert [record.levelno for record in caplog.records] == [logging.ERROR] * denied

    async def test_another_user_may_call_it(self, autojump_clock: MockClock) -> None:
        made = Infrastructure(agents={}, tools=[add], tool_policy=_only_ada)
        async with opened(context(ADA), infrastructure=made) as dispatcher:
            assert (await dispatcher.dispatch("add", {"a": 1})).ok

    async def test_it_holds_in_runs_of_a_supervisor(self, autojump_clock: MockClock) -> None:
        told: dict[str, str] = {}

        async def calls(run: RunContext) -> None:
            told[run.context.user_id] = (await run.call_tool("add", {"a": 1})).content

        made = Infrastructure(
            agents=infrastructure(tools=[add], calls=calls).agents,
            tools=[add],
            tool_policy=_only_ada,
        )
        async with open_supervisor(made) as supervisor:
            for user in (ADA, BOB):
                run = await supervisor.start(context(user), "calls", "hi")
                await run.ended()
        assert told == {ADA: "3", BOB: "Error: There is no tool named 'add'."}


_OF_THE_MOMENT = {"timestamp", "messageId", "toolCallId", "seq"}


class TestBudgetAndRate:
    async def test_past_its_budget_a_run_is_told_so_and_goes_on(
        self, autojump_clock: MockClock
    ) -> None:
        async with opened(context(), tools=[add], limits=Limits(tool_calls=2)) as dispatcher:
            results = [await dispatcher.dispatch("add", {"a": 1}) for _ in range(4)]
        assert [result.ok for result in results] == [True, True, False, False]
        assert "all of the 2 tool calls" in results[2].content
        assert results[2].retry_after is None, "waiting does not help"
        check(await said_by(dispatcher))

    async def test_calls_that_come_to_nothing_count_too(self, autojump_clock: MockClock) -> None:
        """Otherwise a model could guess at names for ever."""
        async with opened(context(), tools=[add], limits=Limits(tool_calls=2)) as dispatcher:
            await dispatcher.dispatch("guess", {})
            await dispatcher.dispatch("add", "nonsense")
            assert "tool calls" in (await dispatcher.dispatch("add", {"a": 1})).content

    async def test_past_the_rate_a_call_is_told_when_to_try_again(
        self, autojump_clock: MockClock
    ) -> None:
        limits = Limits(tool_calls_per_minute=2)
        async with opened(context(), tools=[add], limits=limits) as dispatcher:
            results = [await dispatcher.dispatch("add", {"a": 1}) for _ in range(3)]
            refused = results.pop()
            assert all(result.ok for result in results)
            assert not refused.ok
            assert refused.retry_after == pytest.approx(30)
            assert "Try again in 30.0 s" in refused.content
            await trio.sleep(refused.retry_after or 0)
            assert (await dispatcher.dispatch("add", {"a": 1})).ok
        (answer,) = [event for event in await said_by(dispatcher) if event.get("metadata")][:1]
        assert answer["metadata"]["creche"] == {"error": True, "retry_after": 30.0}

    async def test_one_users_flood_in_many_runs_does_not_touch_anothers_rate(
        self, autojump_clock: MockClock
    ) -> None:
        """And the user's own next run does not begin afresh."""
        passed: dict[str, int] = {}

        async def calls(run: RunContext) -> None:
            for _ in range(20):
                ok = (await run.call_tool("add", {"a": 1})).ok
                passed[run.context.user_id] = passed.get(run.context.user_id, 0) + ok

        limits = Limits(tool_calls_per_minute=30)
        made = infrastructure(tools=[add], calls=calls, limits=limits)
        async with open_supervisor(made) as supervisor:
            runs = [
                await supervisor.start(context(ADA, thread=f"t-{number}"), "calls", "hi")
                for number in range(5)
            ]
            runs.append(await supervisor.start(context(BOB), "calls", "hi"))
            for run in runs:
                assert (await run.ended()).status == "success"
            assert passed == {ADA: 30, BOB: 20}
            run = await supervisor.start(context(ADA), "calls", "hi")
            await run.ended()
        assert passed == {ADA: 30, BOB: 20}

    async def test_dispatchers_without_engines_can_share_a_rate(
        self, autojump_clock: MockClock
    ) -> None:
        quotas = ToolQuotas(Limits(tool_calls_per_minute=1))
        for expected in (True, False):
            async with opened(context(), tools=[add], quotas=quotas) as dispatcher:
                assert (await dispatcher.dispatch("add", {"a": 1})).ok is expected


async def test_a_type_whose_code_fails_is_a_failure_of_its_tool(autojump_clock: MockClock) -> None:
    @tool
    async def take(it: Exits) -> None: ...

    async with opened(context(), tools=[take]) as dispatcher:
        result = await dispatcher.dispatch("take", {"it": {"a": 1}})
        assert result.error == "SystemExit: 3"


async def test_a_runs_own_store_gets_nothing_of_a_dispatcher_without_an_engine(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    made = Infrastructure(agents={}, tools=[add], store=store)
    async with opened(context(), infrastructure=made) as dispatcher:
        await dispatcher.dispatch("add", {"a": 1})
    assert await log_of(store) == []


# --- whose a log line is


def whose() -> str | None:
    found = logged_context.get()
    return found.user_id if found else None


@tool
async def tell_whose() -> list[str | None]:
    """Whose a log line would be: from here, from a task of the tool's own, and from a thread."""
    told: list[str | None] = [whose()]

    async def below() -> None:
        told.append(whose())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(below)
    return [*told, await trio.to_thread.run_sync(whose)]


@tool
def tell_whose_in_a_thread() -> list[str | None]:
    """The same, from a sync tool."""
    return [whose()]


class TestLogLines:
    @pytest.mark.parametrize("name", ["tell_whose", "tell_whose_in_a_thread"])
    async def test_of_a_tool_say_whose_they_are_without_an_engine(self, name: str) -> None:
        assert whose() is None
        async with opened(context(), tools=[tell_whose, tell_whose_in_a_thread]) as dispatcher:
            assert whose() == ADA
            assert {*(await dispatcher.dispatch(name, {})).value} == {ADA}
            assert whose() == ADA
        assert whose() is None

    async def test_of_a_tool_that_another_task_calls_say_it_too(self) -> None:
        told: list[str | None] = []
        is_open, called = trio.Event(), trio.Event()

        async def call() -> None:
            await is_open.wait()
            told.extend((await dispatcher.dispatch("tell_whose", {})).value)
            told.append(whose())
            called.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)  # before the block, so it inherits nothing of it
            async with opened(context(), tools=[tell_whose]) as dispatcher:
                is_open.set()
                await called.wait()
        assert told == [ADA, ADA, ADA, None]

    async def test_of_two_users_in_one_task_are_not_mixed_up(self) -> None:
        async with opened(context(ADA), tools=[tell_whose]) as adas:
            async with opened(context(BOB), tools=[tell_whose]) as bobs:
                for _ in range(2):
                    assert {*(await adas.dispatch("tell_whose", {})).value} == {ADA}
                    assert {*(await bobs.dispatch("tell_whose", {})).value} == {BOB}
                assert whose() == BOB
            assert whose() == ADA

    async def test_of_two_users_at_once_are_not_mixed_up(self) -> None:
        async def call(user: str) -> None:
            async with opened(context(user), tools=[tell_whose]) as dispatcher:
                for _ in range(10):
                    assert {*(await dispatcher.dispatch("tell_whose", {})).value} == {user}
                    assert whose() == user

        async with trio.open_nursery() as nursery:
            for user in (ADA, BOB, "cy"):
                nursery.start_soon(call, user)
        assert whose() is None

    async def test_after_a_block_that_failed_are_nobodys(self) -> None:
        with pytest.raises(KeyError):
            async with opened(context(), tools=[]):
                raise KeyError
        assert whose() is None
