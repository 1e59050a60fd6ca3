"""The default agent's tools."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
import trio
from sqlalchemy import text
from tests.server.running import PATIENCE
from tests.small_world import agent_of, context, infrastructure
from trio.testing import wait_all_tasks_blocked

from creche import MemoryStore, RunContext, RunError, open_supervisor
from creche_server.assistant import TOOL_NAMES, calculator, clock, history_tool
from creche_server.database import open_database


def test_the_tools_that_a_server_provides_are_those_that_it_names() -> None:
    provided = (calculator, clock, history_tool(MemoryStore()))
    assert tuple(each.name for each in provided) == TOOL_NAMES


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37 * 91", "3367"),
        ("sqrt(2)", "1.4142135623730951"),
        ("2 ^ 10", "1024"),
        ("6 / 3", "2"),
        ("7 // 2", "3"),
        ("round(2.5)", "2"),
        ("max(1, 2, 3) - min(4, 5)", "-1"),
        ("factorial(20)", "2432902008176640000"),
        ("pi", "3.141592653589793"),
        ("1e300 * 10", "1e+301"),
        ("0.1 + 0.2", "0.30000000000000004"),
        ("-7 % 3", "2"),
        ("round(2.345, 1)", "2.3"),
        ("round(1234, -2)", "1200"),
        ("2 ** 13999 // 2 ** 13990", "512"),
        ("(-1) ** 10 ** 9", "1"),
        ("2 ** -2", "0.25"),
        ("2.5 ** -20000", "0"),
        ("1 << 10", "1024"),
        ("1 if 2 > 1 else 0", "1"),
    ],
)
def test_the_calculator_is_right(expression: str, value: str) -> None:
    assert calculator.function(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1 +",
        "1 / 0",
        "import os",
        "__import__('os')",
        "().__class__.__mro__",
        "[].append(1)",
        "(lambda: 1)()",
        "open('/etc/passwd')",
        "factorial(10 ** 9)",
        "factorial(-1)",
        "factorial(1.5)",
        "10 ** 10 ** 10",
        "'x' * 10 ** 9",
        "[0] * 10 ** 9",
        "1 << 10 ** 9",
        "sqrt(-1)",
        "log(0)",
        "(" * 500 + "1" + ")" * 500,
        "1" * 5000,
        "factorial(1000) * factorial(1000) * factorial(1000)",
        "'a' + 'b'",
        "True + 'b'",
        "f'{1:>9}'",
        "x = 1",
        "1; 2",
        "sqrt",
        "max(sqrt, 1)",
        "round(1.5, ndigits=1)",
        "1j * 1j",
        "(-8) ** 0.5",
        "None",
    ],
)
def test_the_calculator_says_what_it_will_not_do(expression: str) -> None:
    with pytest.raises(RunError, match="cannot be calculated"):
        calculator.function(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "3999999 ** 1000000",
        "2 ** 3999999",
        "2 ** 14000",
        "(-3) ** 100000",
        "2 ** 2 ** 2 ** 2 ** 2 ** 2",
        "10 ** 10 ** 10",
        "10 ** 4200 * 10 ** 4200 % 7",
        "9 ** 999 ** 9 % 7",
        "1 << 30000000",
        "1 << 10 ** 4000",
        "'%30000000d' % 1",
        "'%*d' % (30000000, 1)",
        "f'{1:>30000000}'",
        "'x' * 99999 * 99999",
        "round(1, -30000000)",
        "round(1, -10 ** 4000)",
        "*".join(["factorial(1000)"] * 60),
        "+".join(["factorial(999) ** 1 % 7"] * 41),
        "(" * 190 + "9**9**9" + ")" * 190,
        "-" * 990 + "1",
        "9" * 1000 + "**9",
        "9" * 100_000,
        "1+" * 100_000 + "1",
        "max(" + "9" * 900 + "**9, 1) ** 9",
    ],
    ids=lambda expression: f"{expression[:30]} {len(expression)}",
)
def test_no_expression_stalls_the_process(expression: str) -> None:
    """Arithmetic on long integers holds the interpreter's lock: every other run would wait."""
    began = time.thread_time()
    try:
        told = str(calculator.function(expression))
    except RunError as error:
        told = str(error)
    assert time.thread_time() - began < 0.05
    assert len(told) < 4300


async def test_the_clock_knows_where() -> None:
    assert (await clock.function("UTC")).endswith("UTC")
    assert "Tokyo" not in await clock.function("Asia/Tokyo")
    for zone in ("Mars/Olympus", "", "../../etc/passwd", "/etc/passwd", "\0", "x" * 9999):
        with pytest.raises(RunError, match="no time zone"):
            await clock.function(zone)


async def test_a_search_that_fails_tells_nothing_of_the_inside(tmp_path: Path) -> None:
    """A tool's failure is read by the model and by the client."""
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as broken:
        with broken._writing.begin() as connection:
            connection.execute(text("ALTER TABLE messages RENAME TO gone"))
        told: list[str] = []

        async def ask(run: RunContext) -> None:
            told.append((await run.call_tool("search_history", {"query": "canary"})).content)

        tools = (history_tool(broken),)
        async with open_supervisor(
            infrastructure(tools=tools, ask=agent_of(ask, tools)),
        ) as supervisor:
            with trio.fail_after(PATIENCE):
                await (await supervisor.start(context(), "ask", "x")).ended()
    assert told[0].startswith("Error")
    assert "SELECT" not in told[0]
    assert "sqlite" not in told[0].lower()


async def test_a_search_finds_nothing_of_anybody_else(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as store:
        found: dict[str, list[str]] = {}
        tools = (history_tool(store),)

        async def ask(run: RunContext) -> None:
            await run.emit.text(f"the answer for {run.context.user_id}")
            result = await run.call_tool("search_history", {"query": "answer"})
            found.setdefault(run.context.user_id, []).append(result.content)

        made = infrastructure(store=store, tools=tools, ask=agent_of(ask, tools))
        async with open_supervisor(made) as supervisor, trio.open_nursery() as nursery:
            for user in ("ada", "bob"):

                async def use(user: str = user) -> None:
                    for _ in range(2):
                        run = await supervisor.start(context(user), "ask", "what is the answer?")
                        await run.ended()

                nursery.start_soon(use)
            await wait_all_tasks_blocked()
    for user, other in (("ada", "bob"), ("bob", "ada")):
        assert found[user][0] == "[]"
        assert f"the answer for {user}" in found[user][1]
        assert other not in "".join(found[user])


async def test_a_search_for_nothing_in_particular_finds_the_latest_conversations(
    tmp_path: Path,
) -> None:
    """The page suggests to ask: what have we talked about before?"""
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as store:
        found: list[list[dict[str, str]]] = []
        tools = (history_tool(store),)

        async def ask(run: RunContext) -> None:
            result = await run.call_tool("search_history", {"query": "what have we talked about?"})
            found.append(msgspec.json.decode(result.content))

        made = infrastructure(store=store, tools=tools, ask=agent_of(ask, tools))
        async with open_supervisor(made) as supervisor:
            with trio.fail_after(PATIENCE):
                for user, thread, said in [
                    ("bob", "b", "Bob's secret"),
                    ("ada", "a", "Cats\nand dogs"),
                    ("ada", "b", "The sea"),
                    ("ada", "b", "What else?"),
                    *(("ada", f"t{i}", f"No. {i}") for i in range(6)),
                ]:
                    run = await supervisor.start(context(user, thread), "ask", said)
                    await run.ended()
    titles = [[item["title"] for item in items] for items in found]
    assert titles[:4] == [
        [],
        [],  # but for the conversation that the question began
        ["Cats\nand dogs"],
        ["The sea", "Cats\nand dogs"],
    ]
    assert titles[-1] == ["No. 4", "No. 3", "No. 2", "No. 1", "No. 0"]
    assert found[2][0].keys() == {"thread_id", "when", "title"}


async def test_a_search_leaves_out_the_words_of_every_sentence(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as store:
        found: list[list[dict[str, str]]] = []
        tools = (history_tool(store),)

        async def ask(run: RunContext) -> None:
            result = await run.call_tool("search_history", {"query": "what about my garden?"})
            found.append(msgspec.json.decode(result.content))

        made = infrastructure(store=store, tools=tools, ask=agent_of(ask, tools))
        async with open_supervisor(made) as supervisor:
            with trio.fail_after(PATIENCE):
                for said in ("The garden is wet", "Well?"):
                    await (await supervisor.start(context("ada"), "ask", said)).ended()
    assert [item["text"] for item in found[1]] == ["The garden is wet"]
