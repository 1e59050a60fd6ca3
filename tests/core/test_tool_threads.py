"""Threads that would not stop: one user's leave another's calls undelayed. On the real clock."""

from __future__ import annotations

import threading

import trio
from tests.small_world import ADA, BOB, context, infrastructure

from creche import Limits, RunContext, open_supervisor, tool

MANY = 40


async def test_forty_stuck_threads_of_one_user_do_not_delay_anothers_calls() -> None:
    """And they go on counting against that user, whose own next call finds no place."""
    let_go, begun, ended = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)
    answers: dict[str, list[str]] = {ADA: [], BOB: []}
    slowest = 0.0

    @tool
    def stuck() -> None:
        begun.release()
        let_go.wait(60)
        ended.release()

    @tool
    def quick() -> str:
        return "done"

    async def gets_stuck(run: RunContext) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(MANY):
                nursery.start_soon(run.call_tool, "stuck", {})

    async def asks(run: RunContext) -> None:
        nonlocal slowest
        for _ in range(1 if run.context.user_id == ADA else 50):
            asked = trio.current_time()
            answers[run.context.user_id].append((await run.call_tool("quick", {})).content)
            if run.context.user_id == BOB:
                slowest = max(slowest, trio.current_time() - asked)

    made = infrastructure(
        tools=[stuck, quick],
        limits=Limits(tool_threads=MANY, stop_timeout=0.1, tool_timeout=1),
        gets_stuck=gets_stuck,
        asks=asks,
    )
    abandoned: list[str] = []
    try:
        with trio.fail_after(30):
            async with open_supervisor(made) as supervisor:
                run = await supervisor.start(context(ADA), "gets_stuck", "hi")
                for _ in range(MANY):
                    await trio.to_thread.run_sync(begun.acquire, True, 10)
                # While they still run, and again when no run of hers is left.
                await (await supervisor.start(context(BOB), "asks", "hi")).ended()
                run.cancel()
                receipt = (await run.ended()).receipt
                abandoned.extend(thread.name for thread in receipt.threads_abandoned)
                await (await supervisor.start(context(BOB), "asks", "hi")).ended()
                await (await supervisor.start(context(ADA), "asks", "hi")).ended()
                let_go.set()
                for _ in range(MANY):
                    assert await trio.to_thread.run_sync(ended.acquire, True, 10)
                await (await supervisor.start(context(ADA), "asks", "hi")).ended()
    finally:
        let_go.set()
    assert abandoned == ["stuck"] * MANY
    assert answers[BOB] == ["done"] * 100
    assert slowest < 0.5
    assert answers[ADA] == [
        "Error: The tool took longer than 1 s and was stopped.",
        "done",
    ]
