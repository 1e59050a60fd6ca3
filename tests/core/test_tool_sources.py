"""Tool sources: opened within a run, closed with it, and nobody else's."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest
import trio
from tests.small_world import ADA, BOB, agent_of, context, log_of, terminals_of
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    Infrastructure,
    Limits,
    MemoryStore,
    RunContext,
    RunError,
    RunOutcome,
    Step,
    Tool,
    ToolDispatcher,
    ToolSourceContext,
    ToolSourceError,
    assert_isolated,
    open_supervisor,
    schema_tool,
    tool,
)

LIMITS = Limits(cleanup_timeout=5, tool_source_timeout=30, run_timeout=600, tool_timeout=1000)


class Session:
    """What a source opens: it knows whose it is, and can die."""

    def __init__(self, opening: ToolSourceContext) -> None:
        self.opening = opening
        self.died = trio.Event()
        self.closed_at: float | None = None

    @property
    def user(self) -> str:
        return self.opening.context.user_id


class Source:
    """A source with one tool, `NAME_whose`, and one that never returns, `NAME_stuck`."""

    def __init__(
        self,
        name: str = "desk",
        *,
        opens_after: float = 0,
        closes_after: float = 0,
        refuses: BaseException | None = None,
        fails_closing: BaseException | None = None,
    ) -> None:
        self.name = name
        self.opens_after = opens_after
        self.closes_after = closes_after
        self.refuses = refuses
        self.fails_closing = fails_closing
        self.sessions: list[Session] = []
        self.live = 0

    @contextlib.asynccontextmanager
    async def open_tools(self, opening: ToolSourceContext) -> AsyncIterator[Sequence[Tool]]:
        await trio.sleep(self.opens_after)
        if self.refuses is not None:
            raise self.refuses
        session = Session(opening)
        self.sessions.append(session)
        self.live += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._work, session)
                yield self._tools(session)
                await trio.sleep(self.closes_after)
                nursery.cancel_scope.cancel()
            if self.fails_closing is not None:
                raise self.fails_closing
        finally:
            session.closed_at = trio.current_time()
            self.live -= 1

    def _tools(self, session: Session) -> list[Tool]:
        @tool(name=f"{self.name}_whose")
        async def whose() -> str:
            await trio.lowlevel.checkpoint()
            return session.user

        @tool(name=f"{self.name}_stuck")
        async def stuck() -> None:
            await trio.sleep_forever()

        return [whose, stuck]

    async def _work(self, session: Session) -> None:
        await session.died.wait()
        raise ConnectionError("password=hunter2")


def made(
    sources: Mapping[str, Any],
    store: MemoryStore | None = None,
    limits: Limits = LIMITS,
    **bodies: Any,
) -> Infrastructure:
    """Each keyword is an agent that asks for all of the sources; `plain` asks for none."""
    agents = {}
    for name, body in bodies.items():
        agents[name] = agent_of(body)
        if name != "plain":
            agents[name].tool_sources = tuple(sources)  # type: ignore[attr-defined]
    return Infrastructure(
        agents=agents, tool_sources=sources, limits=limits, store=store or MemoryStore()
    )


async def executed(
    infrastructure: Infrastructure, agent: str = "asks", *, cancel_after: float | None = None
) -> RunOutcome:
    async with open_supervisor(infrastructure) as supervisor:
        with trio.fail_after(2000):
            run = await supervisor.start(context(), agent, "hi")
            if cancel_after is not None:
                await trio.sleep(cancel_after)
                run.cancel()
            outcome = await run.ended()
    (terminal,) = terminals_of(await log_of(infrastructure.store))
    assert terminal["metadata"]["creche"]["receipt"]["reason"] == outcome.receipt.reason
    return outcome


async def asks(run: RunContext) -> str:
    return (await run.call_tool("desk_whose", {})).content


async def hangs(run: RunContext) -> None:
    await run.call_tool("desk_stuck", {})


async def fails(run: RunContext) -> None:
    raise ValueError("on purpose")


class TestARun:
    async def test_gets_a_session_of_its_own_and_its_tools(self, autojump_clock: MockClock) -> None:
        desk = Source()

        async def asks(run: RunContext) -> str:
            assert [spec.name for spec in run.tools.specs] == ["desk_whose", "desk_stuck"]
            await trio.sleep(1)
            return (await run.call_tool("desk_whose", {})).content

        infrastructure = made({"desk": desk}, asks=asks)
        async with open_supervisor(infrastructure) as supervisor:
            ada = await supervisor.start(context(ADA), "asks", "hi")
            bob = await supervisor.start(context(BOB), "asks", "hi")
            assert (await ada.ended()).result == ADA
            assert (await bob.ended()).result == BOB
        assert sorted(session.user for session in desk.sessions) == [ADA, BOB]
        assert desk.live == 0

    async def test_that_asks_for_no_source_opens_none(self, autojump_clock: MockClock) -> None:
        desk = Source()

        async def plain(run: RunContext) -> tuple[Any, str]:
            return run.tools.specs, (await run.call_tool("desk_whose", {})).content

        outcome = await executed(made({"desk": desk}, plain=plain, asks=asks), "plain")
        assert outcome.result == ((), "Error: There is no tool named 'desk_whose'.")
        assert desk.sessions == []

    @pytest.mark.parametrize(
        ("body", "cancel_after", "status", "reason"),
        [
            (asks, None, "success", "success"),
            (fails, None, "failed", "agent_failed"),
            (hangs, 1.0, "cancelled", "user"),
            (hangs, None, "cancelled", "deadline"),
        ],
    )
    async def test_closes_its_sources_before_its_end_is_told(
        self,
        autojump_clock: MockClock,
        body: Any,
        cancel_after: float | None,
        status: str,
        reason: str,
    ) -> None:
        desk = Source(closes_after=2)
        store = MemoryStore()
        infrastructure = made({"desk": desk}, store, asks=body)
        outcome = await executed(infrastructure, cancel_after=cancel_after)
        assert (outcome.status, outcome.receipt.reason) == (status, reason)
        assert desk.live == 0
        assert 2000 <= outcome.receipt.elapsed_ms <= 2100
        stopped = [tool.name for tool in outcome.receipt.tools_stopped]
        assert stopped == (["desk_stuck"] if body is hangs else [])

    async def test_closes_them_when_its_whole_process_is_cancelled(
        self, autojump_clock: MockClock
    ) -> None:
        desk = Source(closes_after=2)
        with trio.move_on_after(5):
            async with open_supervisor(made({"desk": desk}, asks=hangs)) as supervisor:
                await supervisor.start(context(), "asks", "hi")
                await trio.sleep_forever()
        assert desk.live == 0
        assert desk.sessions[0].closed_at == trio.current_time() == 7

    @pytest.mark.parametrize("cancelled", [True, False])
    async def test_waits_for_a_source_to_close_no_longer_than_the_cleanup_allowance(
        self, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, cancelled: bool
    ) -> None:
        desk = Source(closes_after=1000)
        outcome = await executed(
            made({"desk": desk}, asks=hangs if cancelled else asks),
            cancel_after=3 if cancelled else None,
        )
        assert outcome.status == ("cancelled" if cancelled else "success")
        assert outcome.receipt.elapsed_ms == 5000
        assert desk.live == 0
        assert "the tool source desk did not close in time" in caplog.text

    async def test_shares_one_allowance_between_the_agents_cleanup_and_its_sources(
        self, autojump_clock: MockClock
    ) -> None:
        desk = Source(closes_after=1000)

        async def asks(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    await trio.sleep(4)

        outcome = await executed(made({"desk": desk}, asks=asks), cancel_after=3)
        assert outcome.receipt.elapsed_ms == 5000

    async def test_can_use_its_sources_in_its_cleanup(self, autojump_clock: MockClock) -> None:
        said: list[str] = []

        async def asks(run: RunContext) -> None:
            try:
                await trio.sleep_forever()
            finally:
                async with run.cleanup():
                    await trio.sleep(1)
                    said.append((await run.call_tool("desk_whose", {})).content)

        await executed(made({"desk": Source()}, asks=asks), cancel_after=3)
        assert said == [ADA]

    async def test_succeeds_although_its_source_fails_as_it_closes(
        self, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        desk = Source(fails_closing=OSError("disk"))
        outcome = await executed(made({"desk": desk}, asks=asks))
        assert (outcome.status, outcome.result) == ("success", ADA)
        assert "the tool source desk failed as it closed" in caplog.text

    async def test_names_in_its_receipt_what_its_sources_had_to_kill(
        self, autojump_clock: MockClock
    ) -> None:
        class Killing(Source):
            @contextlib.asynccontextmanager
            async def open_tools(self, opening: ToolSourceContext) -> AsyncIterator[Sequence[Tool]]:
                async with super().open_tools(opening) as tools:
                    yield tools
                opening.killed()
                opening.outlived()

        outcome = await executed(made({"desk": Killing()}, asks=asks))
        assert outcome.receipt.processes_killed == ("desk",)
        assert [each.name for each in outcome.receipt.threads_abandoned] == ["desk"]

    async def test_that_leaves_a_nursery_open_still_closes_its_sources(
        self, autojump_clock: MockClock
    ) -> None:
        desk = Source(closes_after=1)

        async def asks(run: RunContext) -> None:
            await trio.open_nursery().__aenter__()

        outcome = await executed(made({"desk": desk}, asks=asks))
        assert outcome.status == "failed"
        assert desk.live == 0

    async def test_shares_nothing_of_its_sources_with_another(
        self, autojump_clock: MockClock
    ) -> None:
        desk = Source()
        handed: list[RunContext] = []

        async def asks(run: RunContext) -> None:
            handed.append(run)
            await trio.sleep(1)
            assert_isolated([each.tools._calls for each in handed], infrastructure=ours)

        infrastructure = made({"desk": desk}, asks=asks)
        ours = [infrastructure, infrastructure.limits, desk]
        async with open_supervisor(infrastructure) as supervisor:
            runs = [await supervisor.start(context(user), "asks", "hi") for user in (ADA, BOB)]
            for run in runs:
                assert (await run.ended()).status == "success"
        assert len(handed) == 2

    async def test_leaves_nothing_of_its_sources_behind(self, autojump_clock: MockClock) -> None:
        desk = Source()
        before = _tasks()
        async with open_supervisor(made({"desk": desk}, asks=asks)) as supervisor:
            during = _tasks()
            run = await supervisor.start(context(), "asks", "hi")
            await run.ended()
            await wait_all_tasks_blocked()
            assert _tasks() == during
            session = weakref.ref(desk.sessions.pop())
            gc.collect()
            assert session() is None
        assert _tasks() == before


class TestASourceThatDoesNotOpen:
    @pytest.mark.parametrize(
        ("refuses", "message"),
        [
            (RunError("The desk is closed."), "could not be opened: The desk is closed."),
            (OSError("password=hunter2"), "could not be opened."),
            (SystemExit(3), "could not be opened."),
            (
                ExceptionGroup("two", [OSError("a"), RunError("It is.")]),
                "could not be opened: It is.",
            ),
        ],
    )
    async def test_fails_its_run_in_words_that_name_it(
        self, autojump_clock: MockClock, refuses: BaseException, message: str
    ) -> None:
        other = Source("other")
        sources = {"other": other, "desk": Source(refuses=refuses)}
        outcome = await executed(made(sources, asks=asks))
        assert outcome.status == "failed"
        assert outcome.receipt.reason == "tool_source_unavailable"
        assert outcome.message == f"The tool source 'desk' {message}"
        assert other.live == 0

    async def test_is_told_at_once_even_if_another_takes_its_time(
        self, autojump_clock: MockClock
    ) -> None:
        slow = Source("slow", opens_after=20)
        outcome = await executed(
            made({"slow": slow, "desk": Source(opens_after=1, refuses=OSError())}, asks=asks)
        )
        assert outcome.message == "The tool source 'desk' could not be opened."
        assert outcome.receipt.run_ms == 1000

    async def test_in_time_fails_its_run_and_only_that(self, autojump_clock: MockClock) -> None:
        slow = Source(opens_after=31)
        quick = Source("quick")
        infrastructure = made({"quick": quick, "slow": slow}, asks=asks, plain=fails)
        outcome = await executed(infrastructure)
        assert outcome.message == "The tool source 'slow' did not open within 30 s."
        assert outcome.receipt.reason == "tool_source_unavailable"
        assert outcome.receipt.run_ms == 30_000
        assert quick.live == slow.live == 0

    async def test_yet_is_given_up_when_its_run_is_cancelled(
        self, autojump_clock: MockClock
    ) -> None:
        slow = Source(opens_after=20)
        outcome = await executed(made({"slow": slow}, asks=asks), cancel_after=3)
        assert outcome.status == "cancelled"
        assert (outcome.receipt.run_ms, outcome.receipt.elapsed_ms) == (3000, 0)

    async def test_because_of_its_tools_names_says_which(self, autojump_clock: MockClock) -> None:
        outcome = await executed(made({"desk": Source(), "desk2": Source()}, asks=asks))
        assert outcome.message == "The tool source 'desk2' has a second tool named 'desk_whose'."
        assert outcome.receipt.reason == "tool_source_unavailable"

    def test_because_nobody_provides_it_is_found_at_start_up(self) -> None:
        agent = agent_of(asks)
        agent.tool_sources = ("desk", "shelf")  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"'a' wants .* 'shelf', .* \(there is desk\)"):
            Infrastructure(agents={"a": agent}, tool_sources={"desk": Source()})


class TestASourceThatDiesMidway:
    async def test_makes_its_calls_results_that_say_so_and_not_the_runs_end(
        self, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        desk, other = Source(), Source("other")
        caplog.set_level(logging.INFO)

        async def asks(run: RunContext) -> list[str]:
            found = []

            async def call(name: str) -> None:
                found.append((await run.call_tool(name, {})).content)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, "desk_stuck")
                await wait_all_tasks_blocked()
                desk.sessions[0].died.set()
            await call("desk_whose")
            await call("other_whose")
            return found

        outcome = await executed(made({"desk": desk, "other": other}, asks=asks))
        gone = "Error: The tool source 'desk' has ended, and its tools with it."
        assert outcome.status == "success"
        assert outcome.result == [gone, gone, ADA]
        assert outcome.receipt.tools_stopped == ()
        assert "the tool source desk ended before its run" in caplog.text

    async def test_and_cannot_end_is_bounded_all_the_same(self, autojump_clock: MockClock) -> None:
        class Lingering(Source):
            @contextlib.asynccontextmanager
            async def open_tools(self, opening: ToolSourceContext) -> AsyncIterator[Sequence[Tool]]:
                try:
                    async with super().open_tools(opening) as tools:
                        yield tools
                finally:
                    await trio.sleep(1000)

        desk = Lingering()

        async def asks(run: RunContext) -> str:
            desk.sessions[0].died.set()
            await wait_all_tasks_blocked()
            return (await run.call_tool("desk_whose", {})).content

        outcome = await executed(made({"desk": desk}, asks=asks))
        assert outcome.status == "success"
        assert outcome.receipt.run_ms == 5000


class TestASubagent:
    async def test_has_sources_of_its_own_which_close_with_it(
        self, autojump_clock: MockClock
    ) -> None:
        desk = Source(closes_after=1)

        async def plain(run: RunContext) -> list[Any]:
            results = await run.parallel([_step("asks"), _step("asks")])
            assert desk.live == 0
            return [result.result for result in results]

        outcome = await executed(made({"desk": desk}, asks=asks, plain=plain), "plain")
        assert outcome.result == [ADA, ADA]
        assert len(desk.sessions) == 2
        assert {session.opening.context.depth for session in desk.sessions} == {1}

    async def test_whose_source_does_not_open_is_a_result(self, autojump_clock: MockClock) -> None:
        desk = Source(refuses=RunError("closed"))

        async def plain(run: RunContext) -> Any:
            result = await run.spawn("asks", "hi")
            return result.status, result.code, result.error

        outcome = await executed(made({"desk": desk}, asks=asks, plain=plain), "plain")
        assert outcome.result == (
            "failed",
            "tool_source_unavailable",
            "The tool source 'desk' could not be opened: closed",
        )

    async def test_that_is_cancelled_closes_its_sources(self, autojump_clock: MockClock) -> None:
        desk = Source(closes_after=2)

        async def plain(run: RunContext) -> None:
            await run.spawn("asks", "hi")

        infrastructure = made({"desk": desk}, asks=hangs, plain=plain)
        outcome = await executed(infrastructure, "plain", cancel_after=3)
        assert outcome.receipt.elapsed_ms == 2000
        assert desk.live == 0


class TestADispatcherWithoutAnEngine:
    async def test_opens_the_sources_that_it_is_given_for_its_block(
        self, autojump_clock: MockClock
    ) -> None:
        desk = Source()
        async with ToolDispatcher.create_scoped_dispatcher_context(
            context(), tools=[], tool_sources={"desk": desk}
        ) as dispatcher:
            assert (await dispatcher.dispatch("desk_whose", {})).value == ADA
            assert desk.live == 1
        assert desk.live == 0

    async def test_opens_none_of_an_infrastructure_by_itself(
        self, autojump_clock: MockClock
    ) -> None:
        desk = Source()
        async with ToolDispatcher.create_scoped_dispatcher_context(
            context(), infrastructure=made({"desk": desk})
        ) as dispatcher:
            assert dispatcher.specs == ()
        assert desk.sessions == []

    async def test_raises_what_its_body_raises_as_it_is(self, autojump_clock: MockClock) -> None:
        desk = Source()
        with pytest.raises(ValueError, match="mine"):
            async with ToolDispatcher.create_scoped_dispatcher_context(
                context(), tools=[], tool_sources={"desk": desk}
            ):
                raise ValueError("mine")
        assert desk.live == 0

    async def test_raises_when_a_source_does_not_open(self, autojump_clock: MockClock) -> None:
        with pytest.raises(ToolSourceError, match="closed"):
            async with ToolDispatcher.create_scoped_dispatcher_context(
                context(), tools=[], tool_sources={"desk": Source(refuses=RunError("closed"))}
            ):
                pass


class TestAToolWithASchemaOfItsOwn:
    async def test_is_held_to_its_own_check(self, autojump_clock: MockClock) -> None:
        async def function(arguments: dict[str, Any]) -> Any:
            return arguments

        made = schema_tool(
            function,
            name="echo",
            description="Echo.",
            parameters={"type": "object"},
            check=lambda given: None if "a" in given else "a is missing",
        )
        assert made.spec.parameters == {"type": "object"}
        async with ToolDispatcher.create_scoped_dispatcher_context(
            context(), tools=[made]
        ) as dispatcher:
            assert (await dispatcher.dispatch("echo", {"a": 1, "self": [2]})).value == {
                "a": 1,
                "self": [2],
            }
            for arguments, words in (
                ("", "a is missing"),
                ('{"b": 1}', "a is missing"),
                ("[1]", "Expected `object`"),
                ('{"a": NaN}', "malformed"),
                ('{"a": 1, "a": 2}', "'a' is given twice"),
                ('{"a": ' * 5000, "nested too deeply"),
            ):
                result = await dispatcher.dispatch("echo", arguments)
                assert result.error is not None
                assert words in result.error

    def test_takes_the_arguments_whole(self) -> None:
        async def function(a: int) -> None: ...

        with pytest.raises(TypeError, match="its function takes `arguments`, not a"):
            schema_tool(function, name="x", description="", parameters={}, check=lambda _: None)


def _step(agent: str) -> Any:

    return Step(agent=agent, input="hi")


def _tasks() -> int:
    def below(task: trio.lowlevel.Task) -> int:
        return 1 + sum(
            below(each) for nursery in task.child_nurseries for each in nursery.child_tasks
        )

    root = trio.lowlevel.current_root_task()
    assert root is not None
    return below(root)
