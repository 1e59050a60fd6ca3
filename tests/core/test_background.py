"""Our blocks hide their nurseries: what their bodies raise comes out as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from tests.small_world import ADA, context, infrastructure

import creche
from creche import ExecutionEngine, MemoryStore, open_journals, open_supervisor
from creche._background import open_background
from creche.testing import open_pacer

BLOCKS: dict[str, Callable[[], AbstractAsyncContextManager[Any]]] = {
    "open_background": open_background,
    "open_journals": lambda: open_journals(MemoryStore()),
    "open_supervisor": lambda: open_supervisor(infrastructure()),
    "open_pacer": open_pacer,
    "create_user_engine": lambda: ExecutionEngine.create_user_engine(
        context(ADA), infrastructure=infrastructure()
    ),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
async def test_a_bodys_error_comes_out_of_it_as_it_is(
    block: Callable[[], AbstractAsyncContextManager[Any]],
) -> None:
    error = ValueError("of the body")
    with pytest.raises(ValueError, match="of the body") as info:
        async with block():
            raise error
    assert info.value is error


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
async def test_a_cancellation_is_passed_on(
    block: Callable[[], AbstractAsyncContextManager[Any]],
) -> None:
    with trio.move_on_after(0) as scope:
        async with block():
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_what_fails_in_the_background_is_told_beside_it() -> None:
    async def fail() -> None:
        msg = "of the background"
        raise KeyError(msg)

    with pytest.RaisesGroup(ValueError, KeyError):
        async with open_background() as nursery:
            nursery.start_soon(fail)
            msg = "of the body"
            raise ValueError(msg)
    with pytest.RaisesGroup(KeyError):
        async with open_background() as nursery:
            nursery.start_soon(fail)


@pytest.mark.parametrize("door", ["supervisor", "engine", "dispatcher", "journals", "audit"])
def test_under_asyncio_each_door_says_that_it_needs_trio(door: str) -> None:
    asked = creche.UserExecutionContext.from_request(user_id="ann", thread_id="one")
    made = creche.Infrastructure(agents={})

    def opened() -> AbstractAsyncContextManager[object]:
        match door:
            case "supervisor":
                return creche.open_supervisor(made)
            case "engine":
                return creche.ExecutionEngine.create_user_engine(asked, infrastructure=made)
            case "dispatcher":
                return creche.ToolDispatcher.create_scoped_dispatcher_context(asked, tools=())
            case "journals":
                return creche.open_journals(made.store)
            case _:
                return creche.open_audit(creche.MemorySink())

    async def main() -> None:
        async with opened():
            pass

    with pytest.raises(creche.CrecheError, match=r"creche needs Trio: run it by trio\.run"):
        asyncio.run(main())
