"""Who asks goes first; what is done ahead waits, and loses nothing but time."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from creche_server.models.precedence import Precedence


async def test_work_ahead_is_broken_off_by_who_asks_and_begun_again_when_all_are_answered():
    precedence = Precedence()
    told: list[str] = []
    finish = trio.Event()

    async def step() -> None:
        told.append("begun")
        try:
            await finish.wait()
        except trio.Cancelled:
            told.append("broken off")
            raise
        told.append("done")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(precedence.work_ahead, step)
            await wait_all_tasks_blocked()
            with precedence.asking():
                await wait_all_tasks_blocked()
                assert told == ["begun", "broken off"]
                with precedence.asking():
                    pass
                await wait_all_tasks_blocked()
                assert told == ["begun", "broken off"]  # somebody is still waiting
            await wait_all_tasks_blocked()
            assert told == ["begun", "broken off", "begun"]
            finish.set()
    assert told[-1] == "done"


async def test_work_ahead_does_not_begin_while_somebody_waits_and_can_be_cancelled():
    precedence = Precedence()

    async def step() -> None:
        raise AssertionError

    with trio.fail_after(10):
        with precedence.asking():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(precedence.work_ahead, step)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
