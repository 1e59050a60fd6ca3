"""Budgets of runs and users, over real sockets and a database that outlives the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.server.running import CommandError, open_server

LIMITS: dict[str, Any] = {
    "tokens_per_user_per_day": 100,
    "prices": {"scripted": {"input": 1, "output": 2.5}},
}


async def test_who_has_used_up_the_day_is_told_until_when_also_by_the_next_server(
    tmp_path: Path,
) -> None:
    async with open_server(tmp_path, **LIMITS) as server:
        async with server.chat() as chat:
            await chat.subscribe()
            run_id = await chat.start("tokens=10")
            end = await chat.finished(run_id)
            assert end["outcome"] == {"type": "success"}
            spent = end["metadata"]["creche"]["statistics"]
            assert spent["usd"] == (spent["input_tokens"] + 10 * 2.5) / 1e6
            run_id = await chat.start("tokens=200")
            end = await chat.finished(run_id)
            assert end["outcome"] == {"type": "cancelled"}
            receipt = end["metadata"]["creche"]["receipt"]
            assert receipt["reason"] == "budget"
            assert receipt["budget"].endswith(
                "of 100 tokens that this user may spend in a day (UTC)"
            )
    async with open_server(tmp_path, **LIMITS) as server:
        async with server.chat() as chat:
            with pytest.raises(CommandError) as caught:
                await chat.start("tokens=1")
            assert caught.value.code == "limit_exceeded"
            assert 0 < caught.value.reply["retry_after"] <= 24 * 60 * 60
        async with server.chat(user="bob") as chat:
            await chat.subscribe()
            end = await chat.finished(await chat.start("tokens=1"))
            assert end["outcome"] == {"type": "success"}


async def test_a_run_that_spends_more_than_it_may_ends_with_that_reason(tmp_path: Path) -> None:
    async with open_server(tmp_path, run_tokens=20) as server:
        async with server.chat() as chat:
            await chat.subscribe()
            end = await chat.finished(await chat.start("tokens=30"))
            assert end["metadata"]["creche"]["receipt"]["reason"] == "budget"
            end = await chat.finished(await chat.start("tokens=5"))
            assert end["outcome"] == {"type": "success"}
