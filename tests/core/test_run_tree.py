"""A run's tree: what it does right now, and nothing of what is said in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import trio
from tests.small_world import ADA, BOB, TroubledStore, context, infrastructure
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    ActivityNode,
    Limits,
    RunContext,
    RunTree,
    Supervisor,
    open_supervisor,
    tool,
)
from creche.testing import ScriptedModel, open_pacer

CANARY = "canary-of-ada"


def shape(nodes: tuple[ActivityNode, ...]) -> list[Any]:
    """Kinds and names, nested as they are."""
    return [(node.kind, node.name, shape(node.doing)) for node in nodes]


@tool
async def search(words: str) -> str:
    """Search for ever."""
    del words
    await trio.sleep_forever()
    return CANARY


async def searching(run: RunContext) -> None:
    await run.call_tool("search", {"words": CANARY})


async def held(run: RunContext) -> None:
    """Does several things at once, one of them through a sub-agent."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.spawn, "searching", CANARY)
        nursery.start_soon(run.call_tool, "search", {"words": CANARY})
        await run.spawn("searching", CANARY)


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    async with open_pacer() as pacer:
        made = infrastructure(
            tools=(search,),
            models={"default": ScriptedModel(pacer)},
            limits=Limits(tool_timeout=1000, cleanup_timeout=1),
            searching=searching,
            held=held,
        )
        async with open_supervisor(made) as opened:
            yield opened


async def test_a_tool_is_shown_with_since_when_it_runs(
    autojump_clock: MockClock, supervisor: Supervisor
) -> None:
    run = await supervisor.start(context(), "searching", CANARY)
    await wait_all_tasks_blocked()
    await trio.sleep(5)
    tree = run.tree()
    assert shape(tree.doing) == [("tool", "search", [])]
    assert timedelta(seconds=5) <= tree.at - tree.doing[0].since < timedelta(seconds=5.1)
    assert (tree.status, tree.run_id, tree.agent) == ("running", run.run_id, "searching")
    assert tree.task_count == 1
    [task] = tree.tasks
    assert task.name == "creche._engine.ExecutionEngine._answer"
    module, _, line = task.at.partition(":")
    assert module == f"{__name__}.search"
    assert line.isdigit()


async def test_what_is_under_way_nests_in_the_sub_agent_that_does_it(
    autojump_clock: MockClock, supervisor: Supervisor
) -> None:
    run = await supervisor.start(context(), "held", "go")
    await wait_all_tasks_blocked()
    one: Any = ("subagent", "searching", [("tool", "search", [])])
    assert sorted(shape(run.tree().doing)) == sorted([one, one, ("tool", "search", [])])


async def test_tasks_nest_as_trio_nests_them(
    autojump_clock: MockClock, supervisor: Supervisor
) -> None:
    run = await supervisor.start(context(), "held", "go")
    await wait_all_tasks_blocked()
    tree = run.tree()
    assert tree.task_count == 3
    [answering] = tree.tasks
    assert [task.name.rpartition(".")[2] for task in answering.tasks] == ["call_tool", "spawn"]
    assert [task.tasks for task in answering.tasks] == [(), ()]


async def test_a_model_stream_is_shown_by_the_models_name(autojump_clock: MockClock) -> None:
    async def thinking(run: RunContext) -> None:
        async with run.model("default").open_stream(run.messages, ()) as parts:
            async for _ in parts:
                pass

    async with open_pacer() as pacer:
        made = infrastructure(models={"default": ScriptedModel(pacer)}, thinking=thinking)
        async with open_supervisor(made) as supervisor:
            run = await supervisor.start(context(), "thinking", f"{CANARY} hang")
            await wait_all_tasks_blocked()
            assert shape(run.tree().doing) == [("model", "scripted", [])]


async def test_a_queued_run_does_nothing_and_says_for_how_long(
    autojump_clock: MockClock, supervisor: Supervisor
) -> None:
    first = await supervisor.start(context(), "hang", "go")
    second = await supervisor.start(context(), "hang", "go")
    await trio.sleep(3)
    tree = second.tree()
    assert tree.status == "queued"
    assert tree.queued_ms is not None
    assert 3000 <= tree.queued_ms < 3100
    assert (tree.doing, tree.tasks, tree.task_count, tree.started_at) == ((), (), 0, None)
    first.cancel()
    await first.ended()
    await wait_all_tasks_blocked()
    assert second.tree().task_count == 1


@pytest.mark.parametrize("agent", ["hello", "held", "searching"])
async def test_after_a_run_its_tree_is_empty(
    autojump_clock: MockClock, supervisor: Supervisor, agent: str
) -> None:
    run = await supervisor.start(context(), agent, CANARY)
    await wait_all_tasks_blocked()
    run.cancel()
    outcome = await run.ended()
    tree = run.tree()
    assert (tree.doing, tree.tasks, tree.task_count) == ((), (), 0)
    assert tree.status == outcome.status
    assert tree.reason == (None if outcome.status == "success" else "user")


async def test_a_cleanup_that_overruns_is_still_in_the_tree(autojump_clock: MockClock) -> None:
    async def stubborn(run: RunContext) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(100)

    made = infrastructure(limits=Limits(cleanup_timeout=1), stubborn=stubborn)
    async with open_supervisor(made) as supervisor:
        run = await supervisor.start(context(), "stubborn", "go")
        await wait_all_tasks_blocked()
        run.cancel()
        assert (await run.concluded()).receipt.overran
        assert run.tree().task_count == 1
        await run.ended()
        assert run.tree().task_count == 0


async def test_nothing_that_was_said_is_in_a_tree(
    autojump_clock: MockClock, supervisor: Supervisor
) -> None:
    async def make_up(run: RunContext) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever, name=CANARY)
            nursery.start_soon(run.call_tool, "search", {"words": CANARY})
            await run.emit.text(CANARY)
            await trio.sleep_forever()

    made = infrastructure(tools=(search,), make_up=make_up)
    async with open_supervisor(made) as other:
        run = await other.start(context(), "make_up", CANARY)
        await wait_all_tasks_blocked()
        tree = run.tree()
        assert tree.task_count == 3
        told = json.dumps(tree.to_dict()) + repr(tree)
    assert "search" in told
    assert CANARY not in told
    assert __file__ not in told
    assert "/" not in json.dumps(tree.to_dict()["tasks"])


async def test_a_tool_that_the_model_made_up_is_not_shown_by_its_name(
    autojump_clock: MockClock,
) -> None:
    store = TroubledStore()

    async def ask_for(run: RunContext) -> None:
        store.hold()  # so that what is said of the call waits, and the call with it
        await run.call_tool(CANARY, {"words": CANARY * 50_000})

    limits = Limits(uncommitted_bytes=0)
    async with open_supervisor(infrastructure(store=store, limits=limits, ask_for=ask_for)) as made:
        run = await made.start(context(), "ask_for", "go")
        await wait_all_tasks_blocked()
        assert shape(run.tree().doing) == [("tool", "_OTHER", [])]
        store.release()


async def test_a_flood_of_tasks_is_counted_and_the_first_ones_named(
    autojump_clock: MockClock,
) -> None:
    async def flood(run: RunContext) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(trio.sleep_forever)

    async with open_supervisor(infrastructure(flood=flood)) as supervisor:
        run = await supervisor.start(context(), "flood", "go")
        await wait_all_tasks_blocked()
        tree = run.tree()
        assert tree.task_count == 1001
        assert len(tree.tasks) == 1
        assert len(tree.tasks[0].tasks) == 199


async def test_tasks_however_deep_are_counted_and_can_be_told(autojump_clock: MockClock) -> None:
    async def dig(depth: int) -> None:
        async with trio.open_nursery() as nursery:
            if depth:
                nursery.start_soon(dig, depth - 1)
            else:
                await trio.sleep_forever()

    async def deep(run: RunContext) -> None:
        await dig(200)

    async with open_supervisor(infrastructure(deep=deep)) as supervisor:
        run = await supervisor.start(context(), "deep", "go")
        await wait_all_tasks_blocked()
        tree = run.tree()
        assert tree.task_count == 201
        assert msgspec.json.encode(tree.to_dict()).count(b'"name"') == 50


async def test_a_tree_is_frozen_and_a_record_has_an_empty_one(
    autojump_clock: MockClock, supervisor: Supervisor
) -> None:
    run = await supervisor.start(context(), "hello", "go")
    await run.ended()
    record = await supervisor.journals.store.run(ADA, run.run_id)
    assert record is not None
    past = RunTree.of_record(record)
    assert (past.status, past.tasks, past.doing) == ("success", (), ())
    assert past.created_at == run.created_at
    with pytest.raises(dataclasses.FrozenInstanceError):
        past.status = "lost"  # type: ignore[misc]
    assert set(past.to_dict()) <= set(run.tree().to_dict())


async def test_all_runs_are_everybodys_the_oldest_first(
    autojump_clock: MockClock, supervisor: Supervisor
) -> None:
    first = await supervisor.start(context(BOB), "hang", "go")
    second = await supervisor.start(context(ADA), "hang", "go")
    third = await supervisor.start(context(BOB, "other"), "hang", "go")
    assert supervisor.all_runs() == (first, second, third)
    assert supervisor.runs(ADA) == (second,)
