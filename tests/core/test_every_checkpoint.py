"""A run that does all that a run can do, ended at every single checkpoint, in every way.

The same interleaving is played again and again (see `tests.isolation.scheduler`), each time ended
one step later: a step is what a task does from one checkpoint to the next, be it a task of the
run, of its supervisor or the one that commits. Whatever the instant, the log must be one that a
stock client takes, the rows must agree with it, and the next run on the thread must be handed a
history that a model provider accepts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, get_args

import pytest
import trio
from tests.agui_rules import StockClient, check_history
from tests.isolation.scheduler import StillClock, run_each
from tests.small_world import ADA, THREAD, agent_of, context, log_of, terminals_of

from creche import (
    AgentClassRegistry,
    Commit,
    ExecutionEngine,
    Infrastructure,
    Limits,
    MemoryStore,
    Message,
    MessageId,
    ModelAgent,
    ModelPart,
    Run,
    RunContext,
    RunOutcome,
    Step,
    Supervisor,
    TextDelta,
    ThreadDeletedError,
    ToolCallId,
    ToolCallRequest,
    ToolMessage,
    ToolSpec,
    Usage,
    events,
    open_journals,
    open_supervisor,
    tool,
)
from creche._task_tree import count_tasks

CHUNKS: Final = 4
SEED: Final = 1
RUN: Final = "the-run"
RUN_TIMEOUT: Final = 0.9  # seconds: far more than it takes, and less than any other deadline

pause = trio.lowlevel.checkpoint


# --- a run that does all that a run can do


@tool
async def works(n: int) -> int:
    """Take a moment, and tidy up in another."""
    try:
        await trio.sleep(0.001)
    finally:
        with trio.CancelScope(shield=True):
            await pause()
    return n + 1


@tool
async def fails() -> None:
    """Fail, after a moment."""
    await pause()
    raise ValueError("no")


class ExactingModel:
    """Refuses, as a provider does, messages that make no sense; else calls two tools, and ends."""

    name = "exacting"

    @contextlib.asynccontextmanager
    async def open_stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        check_history(messages)
        called = isinstance(messages[-1], ToolMessage)

        async def parts() -> AsyncGenerator[ModelPart]:
            await pause()
            yield TextDelta("let me ")
            await pause()
            yield TextDelta("see")
            if not called and tools:
                yield ToolCallRequest("works", '{"n": 1}', "same-id")
                await pause()
                yield ToolCallRequest("fails", "{}", "same-id")
            yield Usage(3, 4)

        async with contextlib.aclosing(parts()) as stream:
            try:
                yield stream
            finally:
                with trio.CancelScope(shield=True):
                    await pause()  # as a connection that is closed


class Asks(ModelAgent):
    """The model-and-tools loop."""

    tools = (works, fails)


async def _deeper(run: RunContext) -> str:
    await run.emit.text("deep ")
    await pause()
    await run.call_tool("works", {"n": 2})
    await run.emit.text("down")
    return "deeper"


async def _middle(run: RunContext) -> None:
    with run.emit.step("of the middle"):
        await run.emit.text("in the mid")
        await run.spawn("deeper", "dig")
        await run.emit.text("dle")


async def _gives_up(run: RunContext) -> None:
    await run.emit.text("I shall")
    await pause()
    raise ValueError("not")


class Everything(ModelAgent):
    """Reasons, speaks, calls tools in every way, has sub-agents, and cleans up."""

    tools = (works, fails)

    async def run(self, run: RunContext) -> None:
        """Do it all."""
        try:
            await self._think(run)
            await self._call_by_hand(run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.call_tool, "fails", {})
                nursery.start_soon(run.call_tool, "works", {"n": 5})
                nursery.start_soon(run.call_tool, "absent", {})
            await run.sequence(
                [Step(agent="gives_up", input="1", continue_on_error=True), _MIDDLE],
            )
            await run.parallel([_MIDDLE, _MIDDLE])
            await super().run(run)
        finally:
            async with run.cleanup():
                await run.emit.custom("cleaning", {"up": True})
                await trio.sleep(0.001)
                await run.emit.text("tidy")
                await pause()
        await run.emit.emit(events.StateSnapshot(snapshot={"a": 1}))
        await run.emit.emit(events.StateDelta(delta=({"op": "remove", "path": "/a"},)))
        await run.emit.emit(_PLANNING)
        await run.emit.text("the end")
        await pause()

    async def _think(self, run: RunContext) -> None:
        thought = MessageId("thought")
        for event in (
            events.ReasoningStart(message_id=thought),
            events.ReasoningMessageStart(message_id=thought, role="reasoning"),
            events.ReasoningMessageContent(message_id=thought, delta="hm"),
            events.ReasoningMessageEnd(message_id=thought),
            events.ReasoningEnd(message_id=thought),
            events.StepStarted(step_name="plan"),
        ):
            await run.emit.emit(event)
            await pause()
        await run.emit.text("a ")
        await pause()
        await run.emit.text("plan")
        await pause()
        await run.emit.emit(events.StepFinished(step_name="plan"))

    async def _call_by_hand(self, run: RunContext) -> None:
        """A tool of somebody else's, whose arguments come in pieces."""
        call = ToolCallId("by-hand")
        for event in (
            events.ToolCallStart(tool_call_id=call, tool_call_name="elsewhere"),
            events.ToolCallArgs(tool_call_id=call, delta='{"a":'),
            events.ToolCallArgs(tool_call_id=call, delta=" 1}"),
            events.ToolCallEnd(tool_call_id=call),
            events.ToolCallResult(message_id=MessageId("r"), tool_call_id=call, content="1"),
        ):
            await run.emit.emit(event)
            await pause()


_PLANNING: Final = events.ActivitySnapshot(
    message_id=MessageId("activity"), activity_type="PLAN", content={"at": 1}
)
_MIDDLE: Final = Step(agent="middle", input="2")
# Made once: to look through an agent's class takes longer than to run it here.
AGENTS: Final = AgentClassRegistry(
    {
        "everything": Everything,
        "asks": Asks,
        "middle": agent_of(_middle),
        "deeper": agent_of(_deeper, (works,)),
        "gives_up": agent_of(_gives_up),
    }
)


class SlowStore(MemoryStore):
    """Takes a moment for each commit, so that there are instants before, amid and after it."""

    async def commit(self, commits: Sequence[Commit]) -> None:
        await trio.sleep(0.001)
        await super().commit(commits)
        await pause()


def everything_on(store: MemoryStore) -> Infrastructure:
    return Infrastructure(
        agents=AGENTS,
        models={"default": ExactingModel()},
        limits=Limits(run_timeout=RUN_TIMEOUT),
        store=store,
    )


# --- ending it at a step


class AtStep(trio.abc.Instrument):
    """Acts when so many steps have been taken by tasks other than the one that it is made in.

    All of them then stand at a checkpoint.
    """

    def __init__(self, acts: Mapping[int, Callable[[], None]]) -> None:
        self.steps = 0
        self.fault: BaseException | None = None
        self._acts = acts
        self._maker = trio.lowlevel.current_task()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._maker:
            return
        self.steps += 1
        if self.steps in self._acts:
            try:
                self._acts[self.steps]()
            except BaseException as error:  # noqa: BLE001  Trio would log it and go on
                self.fault = error


@contextlib.contextmanager
def at_step(
    step: int, act: Callable[[], None], more: Mapping[int, Callable[[], None]] | None = None
) -> Iterator[AtStep]:
    """Act at that step of the tasks that are alive in this block."""
    instrument = AtStep({step: act, **(more or {})})
    trio.lowlevel.add_instrument(instrument)
    try:
        yield instrument
    finally:
        trio.lowlevel.remove_instrument(instrument)
        if instrument.fault is not None:
            raise instrument.fault


@dataclasses.dataclass
class Played:
    """What came of one run."""

    steps: int
    outcome: RunOutcome | None
    store: MemoryStore
    seen: list[dict[str, Any]]  # by a reader that was there from the start


async def _read(supervisor: Supervisor, seen: list[dict[str, Any]]) -> None:
    with contextlib.suppress(ThreadDeletedError):
        async with supervisor.open_events(ADA, THREAD) as entries:
            async for entry in entries:
                seen.append(json.loads(entry.data))  # noqa: PERF401  what was seen until it ends


async def by_the_user(step: int) -> Played:
    """`run.cancel`, as soon as there is a run."""
    store, seen = SlowStore(), list[dict[str, Any]]()

    def cancel() -> None:
        for run in supervisor.runs(ADA):
            run.cancel()

    async with open_supervisor(everything_on(store)) as supervisor, trio.open_nursery() as nursery:
        nursery.start_soon(_read, supervisor, seen)
        with at_step(step, cancel) as counted:
            run = await supervisor.submit(context(run=RUN), "everything", "go")
            outcome = await run.ended()
        assert supervisor.count == 0
        assert run._life.activities.now() == ()
        nursery.cancel_scope.cancel()
    return Played(counted.steps, outcome, store, seen)


async def by_its_deadline(step: int) -> Played:
    """The run's whole time passes at that instant."""
    store = SlowStore()
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, StillClock)

    def pass_time() -> None:
        clock.now += RUN_TIMEOUT

    async with open_supervisor(everything_on(store)) as supervisor:
        with at_step(step, pass_time) as counted:
            run = await supervisor.submit(context(run=RUN), "everything", "go")
            outcome = await run.ended()
    return Played(counted.steps, outcome, store, [])


async def by_shutdown(step: int) -> Played:
    """The supervisor's block is left."""
    store, leaving = SlowStore(), trio.Event()
    with at_step(step, leaving.set) as counted:
        async with open_supervisor(everything_on(store)) as supervisor:
            run = await supervisor.submit(context(run=RUN), "everything", "go")
            async with trio.open_nursery() as nursery:

                async def end() -> None:
                    await run.ended()
                    leaving.set()

                nursery.start_soon(end)
                await leaving.wait()
                nursery.cancel_scope.cancel()
    return Played(counted.steps, run.outcome, store, [])


async def by_a_cancel_around_the_supervisor(step: int) -> Played:
    """Trio's own cancel, without a word, of all that is around."""
    return await _cancelled_around(step, twice=False)


async def by_the_user_and_a_cancel_around(step: int) -> Played:
    """That, while the run ends already because it was told to."""
    return await _cancelled_around(step, twice=True)


async def _cancelled_around(step: int, *, twice: bool) -> Played:
    store, runs = SlowStore(), list[Run]()
    supervisors: list[Supervisor] = []

    def cancel() -> None:
        for run in supervisors[0].runs(ADA) if supervisors else ():
            run.cancel()

    with trio.CancelScope() as outer:
        act, more = (cancel, {step + 3: outer.cancel}) if twice else (outer.cancel, {})
        with at_step(step, act, more) as counted:
            async with open_supervisor(everything_on(store)) as supervisor:
                supervisors.append(supervisor)
                runs.append(await supervisor.submit(context(run=RUN), "everything", "go"))
                await runs[0].ended()
    return Played(counted.steps, runs[0].outcome if runs else None, store, [])


async def by_a_cancel_around_an_engine(step: int) -> Played:
    """The same for a run that has no supervisor."""
    store, outcomes = SlowStore(), list[RunOutcome]()
    async with open_journals(store) as journals, trio.open_nursery() as nursery:

        async def execute() -> None:
            async with ExecutionEngine.create_user_engine(
                context(run=RUN), infrastructure=everything_on(store), journals=journals
            ) as engine:
                try:
                    await engine.execute_agent("everything", "go")
                finally:
                    if engine._life.outcome is not None:
                        outcomes.append(engine._life.outcome)

        with at_step(step, nursery.cancel_scope.cancel) as counted:
            async with trio.open_nursery() as executing:
                executing.start_soon(execute)
    return Played(counted.steps, outcomes[0] if outcomes else None, store, [])


async def by_deletion(step: int) -> Played:
    """Its thread is deleted."""
    store, asked, seen = SlowStore(), trio.Event(), list[dict[str, Any]]()
    async with open_supervisor(everything_on(store)) as supervisor, trio.open_nursery() as nursery:
        nursery.start_soon(_read, supervisor, seen)
        with at_step(step, asked.set) as counted:
            run = await supervisor.submit(context(run=RUN), "everything", "go")

            async def end() -> None:
                await run.ended()
                asked.set()

            nursery.start_soon(end)
            await asked.wait()
            await supervisor.delete_thread(ADA, THREAD)
        assert supervisor.count == 0
        nursery.cancel_scope.cancel()
    assert await store.thread(ADA, THREAD) is None
    assert list(await store.messages(ADA, THREAD)) == []
    return Played(counted.steps, run.outcome, store, seen)


Way = Callable[[int], Any]
# {way: the reason that its runs end with}
WAYS: Final[dict[Way, str]] = {
    by_the_user: "user",
    by_the_user_and_a_cancel_around: "user",
    by_its_deadline: "deadline",
    by_shutdown: "shutdown",
    by_a_cancel_around_the_supervisor: "shutdown",
    by_a_cancel_around_an_engine: "shutdown",
    by_deletion: "superseded",
}
NEVER: Final = 1_000_000  # steps


# --- judging it


async def judge(way: Way, played: Played) -> str:
    """How it ended, if all is well with it; else AssertionError or RefusedError."""
    store = played.store
    StockClient().take_all(played.seen)
    assert len(terminals_of(played.seen)) <= 1
    log = await log_of(store)
    if log:
        reason = await _judge_the_log(store, log, played.outcome)
    else:
        assert await store.thread(ADA, THREAD) is None
        assert list(await store.messages(ADA, THREAD)) == []
        assert (played.outcome is None) == (way is not by_deletion)
        reason = "never begun" if played.outcome is None else played.outcome.receipt.reason
    await _judge_the_next(store, log)
    return reason


async def _judge_the_log(
    store: MemoryStore, log: list[dict[str, Any]], outcome: RunOutcome | None
) -> str:
    client = StockClient()
    client.take_all(log)
    assert client.is_tidy
    (terminal,) = terminals_of(log)
    assert terminal is log[-1]
    (record,) = await store.runs(ADA, THREAD)
    receipt = terminal["metadata"]["creche"]["receipt"]
    assert (record.first_seq, record.last_seq) == (1, len(log))
    assert record.ended_at is not None
    assert json.loads(json.dumps(record.receipt)) == receipt
    assert record.reason == receipt["reason"]
    assert outcome is not None
    assert outcome.status == record.status
    assert json.loads(json.dumps(outcome.receipt.to_dict())) == receipt
    assert "overran" not in receipt
    check_history([item.message for item in await store.messages(ADA, THREAD)])
    return str(record.reason)


async def _judge_the_next(store: MemoryStore, log: list[dict[str, Any]]) -> None:
    """The model of the next run refuses what a provider would; the run must succeed."""
    async with open_supervisor(everything_on(store)) as supervisor:
        run = await supervisor.start(context(), "asks", "and now?")
        outcome = await run.ended()
    assert outcome.status == "success", outcome.message
    whole = await log_of(store)
    assert whole[: len(log)] == log
    client = StockClient()
    client.take_all(whole[len(log) :])
    assert client.is_tidy


def steps_of(way: Way) -> int:
    """How many steps a run takes, undisturbed, that is to be ended this way."""

    async def undisturbed(_: int) -> Played:
        played: Played = await way(NEVER)
        return played

    (played,) = run_each([SEED], undisturbed)
    assert played.outcome is not None
    assert played.outcome.receipt.reason == "success"
    return played.steps


def play_each(way: Way, steps: Sequence[int]) -> list[str]:
    """How the runs ended that were ended at these steps; a failure names its step."""
    left = iter(steps)

    async def one(_: int) -> str:
        step = next(left)
        try:
            return await judge(way, await way(step))
        except BaseException as error:
            error.add_note(f"{way.__name__}, at step {step}")
            raise

    return run_each([SEED] * len(steps), one)


@pytest.fixture(autouse=True)
def _at_every_event(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever says something stands at a checkpoint afterwards, not at every 32nd event."""
    monkeypatch.setattr("creche._emitter._EVENTS_PER_YIELD", 1)
    caplog.set_level(logging.CRITICAL)  # tracebacks of what is meant to fail take the most time


def test_the_run_does_all_that_a_run_can_do() -> None:
    """Undisturbed. What it leaves out would be ended nowhere."""

    async def undisturbed(_: int) -> Played:
        return await by_the_user(NEVER)

    (played,) = run_each([SEED], undisturbed)
    kinds = {event["type"] for event in played.seen}
    every = {each.__struct_config__.tag for each in get_args(events.Event)}
    assert every - kinds == {"RUN_ERROR"}
    assert played.outcome is not None
    done = played.outcome.statistics
    assert (done.model_calls, done.tool_calls, done.tool_failures, done.subagents) == (2, 8, 3, 7)


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_run_that_is_ended_at_any_checkpoint_leaves_a_valid_history(way: Way, chunk: int) -> None:
    steps = range(1 + chunk, steps_of(way) + 1, CHUNKS)
    ends = Counter(play_each(way, steps))
    print(f"{way.__name__}: ended at {len(steps)} checkpoints, {dict(ends)}")  # noqa: T201
    # Ended before it was listed, and after its agent's own end, it ends otherwise.
    expected = {WAYS[way], "success", "never begun"}
    if way is by_the_user_and_a_cancel_around:
        expected.add("shutdown")
    assert ends.keys() <= expected
    assert ends[WAYS[way]] > 0.8 * len(steps)


RUNS_AT_ONCE: Final = 10


def test_runs_that_are_cancelled_at_random_instants_leave_nothing() -> None:
    """Many at once, each in its own order of steps; `benchmarks/cancel.py` does so for 1,000."""

    async def play(seed: int) -> Counter[str]:
        chance, store = random.Random(seed), SlowStore()
        outcomes: list[RunOutcome] = []

        async def one(supervisor: Supervisor, number: int) -> None:
            about = context(thread=f"thread-{number % 7}")
            run = await supervisor.submit(about, "everything", "go")
            await trio.sleep(chance.uniform(0, 0.006))
            run.cancel()
            outcomes.append(await run.ended())

        async with open_supervisor(everything_on(store)) as supervisor:
            root = trio.lowlevel.current_task()
            before = _tasks_below(root)
            async with trio.open_nursery() as nursery:
                for number in range(RUNS_AT_ONCE):
                    nursery.start_soon(one, supervisor, number)
            assert (supervisor.count, _tasks_below(root)) == (0, before)
        assert list(await store.unfinished_runs()) == []
        return Counter(outcome.status for outcome in outcomes)

    ends = sum(run_each(range(20), play), Counter[str]())
    assert ends.keys() <= {"cancelled", "success"}
    assert ends.total() == 20 * RUNS_AT_ONCE
    assert ends["cancelled"] > 10 * RUNS_AT_ONCE


def _tasks_below(task: trio.lowlevel.Task) -> int:
    return sum(count_tasks(nursery) for nursery in task.child_nurseries)
