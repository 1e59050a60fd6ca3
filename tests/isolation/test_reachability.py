"""After a run nothing of it is alive: by reference counts alone, but for what a failure needs."""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from tests.isolation.reachability import OF_A_RUN, alive
from tests.isolation.scheduler import StillClock
from tests.isolation.story import captured_logs, count_tasks
from tests.small_world import agent_of, context, infrastructure
from trio.testing import MockClock

from creche import (
    Infrastructure,
    Limits,
    MemoryStore,
    ModelAgent,
    RunContext,
    RunError,
    Supervisor,
    ToolContext,
    open_journals,
    open_supervisor,
    tool,
)
from creche.testing import ScriptedModel, open_pacer

RUNS = 10_000
TRACED = 1_000  # of them, the last
MOST_BYTES_PER_RUN = 8.0
MOST_BLOCKS_PER_RUN = 0.1  # an object that stays is one at least


class ForgetfulStore(MemoryStore):
    """Keeps nothing but that a thread exists: what grows beside it is a leak."""

    async def commit(self, commits: Any) -> None:
        await super().commit(commits)
        for thread in self._threads.values():
            thread.messages.clear()
            thread.chunks.clear()
            thread.runs.clear()


@tool
async def touch(number: int, call: ToolContext) -> int:
    """Be called."""
    await trio.lowlevel.checkpoint()
    return number


@pytest.fixture
def _quiet() -> Iterator[None]:
    """No collection but those that we ask for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Marks:
    """Weak references to what a run is made of, taken by its agent."""

    def __init__(self) -> None:
        self.references: dict[str, weakref.ref[Any]] = {}

    def add(self, **things: Any) -> None:
        self.references.update({name: weakref.ref(thing) for name, thing in things.items()})

    def dead(self) -> dict[str, bool]:
        return {name: reference() is None for name, reference in self.references.items()}


def bodies(marks: Marks) -> dict[str, type[Any]]:
    class Base:
        shared = (marks,)

        def mark(self, run: RunContext) -> None:
            def closure() -> RunContext:
                return run

            self.closure = closure
            marks.add(
                agent=self,
                run_context=run,
                emitter=run.emit,
                dispatcher=run.tools,
                closure=closure,
            )

    class Succeeds(Base):
        tools = (touch,)

        async def run(self, run: RunContext) -> str:
            self.mark(run)
            await run.emit.text("hello")
            await run.call_tool("touch", {"number": 1})
            return "done"

    class Fails(Base):
        tools = (touch,)

        async def run(self, run: RunContext) -> None:
            self.mark(run)
            raise ValueError("on purpose")

    class Told(Base):
        async def run(self, run: RunContext) -> None:
            self.mark(run)
            raise RunError("in words")

    class Hangs(Base):
        tools = (touch,)

        async def run(self, run: RunContext) -> None:
            self.mark(run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.call_tool, "touch", {"number": 1})
                nursery.start_soon(trio.sleep_forever)

    class Breaks(Base):
        tools = (touch,)

        async def run(self, run: RunContext) -> None:
            self.mark(run)
            await run.call_tool("touch", {"number": "none"})
            await run.call_tool("nothing", {})

    return {"succeeds": Succeeds, "fails": Fails, "told": Told, "hangs": Hangs, "breaks": Breaks}


async def one_run(supervisor: Supervisor, agent: str) -> None:
    run = await supervisor.start(context(), agent, "hi")
    if agent == "hangs":
        await trio.sleep(1)
        run.cancel()
    await run.ended()


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("agent", ["succeeds", "fails", "told", "hangs", "breaks"])
async def test_what_a_run_was_made_of_is_dead_when_it_has_ended(
    agent: str,
    autojump_clock: MockClock,
):
    """Weak references by its own agent; and by class, whatever the collector knows of."""
    marks = Marks()
    async with open_supervisor(Infrastructure(agents=bodies(marks))) as supervisor:
        before, tasks = alive(), count_tasks()
        with captured_logs():  # pytest would keep the tracebacks, and with them the frames
            await one_run(supervisor, agent)
        await trio.sleep(1)
        by_count = marks.dead()
        assert set(by_count) == {"agent", "run_context", "emitter", "dispatcher", "closure"}
        gc.collect()
        assert all(marks.dead().values()), marks.dead()
        assert alive() == before
        assert count_tasks() == tasks
        assert all(by_count.values()), f"only the collector ended {by_count}"


async def test_a_store_and_a_supervisor_hold_nothing_of_runs_that_ended(autojump_clock: MockClock):
    """Walks from the infrastructure that all runs share: no object of a run is to be found."""
    shared = Infrastructure(agents=bodies(Marks()))
    async with open_supervisor(shared) as supervisor:
        with captured_logs():
            for agent in ("succeeds", "fails", "told", "hangs", "breaks"):
                await one_run(supervisor, agent)
        await trio.sleep(1)
        found = [type(thing).__name__ for thing in reachable_from(shared, supervisor.journals)]
        assert set(found) & {kind.__name__ for kind in OF_A_RUN} == set()
        assert len(found) > 100


def reachable_from(*roots: object) -> list[object]:
    """All that can be reached, up to modules, classes, functions and Trio's own objects."""
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        module = type(thing).__module__
        if id(thing) in seen or isinstance(thing, type) or module.startswith(("trio", "builtins.")):
            continue
        if type(thing).__name__ in {"module", "function", "frame", "coroutine", "async_generator"}:
            continue
        seen[id(thing)] = thing
        waiting.extend(gc.get_referents(thing))
    return list(seen.values())


def test_ten_thousand_runs_leave_memory_flat():
    """One after the other, with a tool call each, on one thread of a store that keeps nothing.

    Counted in blocks all the way, since that costs nothing, and in bytes over the last runs.
    """
    blocks: dict[int, int] = {}
    traced: dict[int, int] = {}

    async def runs() -> None:
        shared = Infrastructure(
            agents={"one": agent_of(uses_a_tool, (touch,))},
            store=ForgetfulStore(),
            limits=Limits(journal_bytes=4096, conversation_bytes=4096),
        )
        async with open_journals(shared.store, shared.limits) as journals:
            async with open_supervisor(shared, journals) as supervisor:
                for number in range(1, RUNS + 1):
                    run = await supervisor.start(context(run=f"run-{number}"), "one", "hi")
                    await run.ended()
                    del run
                    if number % 100 == 0:
                        # Trio keeps the scopes of deadlines that were cancelled until they pass,
                        # a thousand of them at most.
                        await trio.sleep(10_000)
                        gc.collect()
                        blocks[number] = sys.getallocatedblocks()
                        traced[number] = tracemalloc.get_traced_memory()[0]
                        if number == RUNS - TRACED:
                            tracemalloc.start()
            assert (supervisor.count, len(journals)) == (0, 0)

    gc.freeze()  # a hundred collections need not look at all of pytest
    try:
        trio.run(runs, clock=StillClock())
    finally:
        gc.unfreeze()
        tracemalloc.stop()
    by_blocks = (blocks[RUNS - TRACED] - blocks[1_000]) / (RUNS - TRACED - 1_000)
    by_bytes = (traced[RUNS] - traced[RUNS - TRACED + 100]) / (TRACED - 100)
    print(f"memory grows by {by_blocks:.4f} blocks a run, and {by_bytes:.2f} bytes")  # noqa: T201  the figure, with -s
    assert by_blocks < MOST_BLOCKS_PER_RUN, blocks
    assert by_bytes < MOST_BYTES_PER_RUN, traced


async def uses_a_tool(run: RunContext) -> None:
    await run.emit.text("hello")
    await run.call_tool("touch", {"number": 1})


async def test_a_model_agents_run_is_dead_when_it_has_ended(autojump_clock: MockClock):
    async with open_pacer() as pacer:
        shared = infrastructure(models={"default": ScriptedModel(pacer)}, asks=ModelAgent)
        async with open_supervisor(shared) as supervisor:
            before = alive()
            for words in ("tokens=3", "fail=now", "tool=none:{}"):
                await (await supervisor.start(context(), "asks", words)).ended()
            await trio.sleep(1)
            assert alive() == before


def test_the_engine_is_set_up_and_torn_down_in_well_under_a_millisecond():
    """What a run costs beside its agent: measured, and bounded so that a slip is seen."""

    async def nothing(run: RunContext) -> None:
        """Say nothing, do nothing."""

    took: list[float] = []

    async def runs() -> None:
        shared = Infrastructure(agents={"one": agent_of(nothing)}, store=ForgetfulStore())
        async with open_supervisor(shared) as supervisor:
            for number in range(600):
                began = time.perf_counter()
                run = await supervisor.start(context(run=f"run-{number}"), "one", "hi")
                await run.ended()
                took.append(time.perf_counter() - began)

    trio.run(runs)
    median = sorted(took)[len(took) // 2] * 1e6
    print(f"a run of nothing takes {median:.0f} µs from its start to its committed end")  # noqa: T201  the figure, with -s
    assert median < 5_000
