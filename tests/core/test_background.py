"""Our blocks hide their nurseries: what their bodies raise comes out as it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from tests.small_world import ADA, context, infrastructure

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
