"""What an embedder brings to a server: over real sockets, in this process and in one of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.server.processes import open_creche
from tests.server.running import Server, open_server, types_of
from tests.server.test_readme import block

from creche import (
    Approval,
    ApprovalRequest,
    RunContext,
    Tool,
    ToolContext,
    UserExecutionContext,
    tool,
)
from creche_server.application import Application


@tool(approval=True)
async def pay(caller: ToolContext, amount: int) -> str:
    """Pay."""
    return f"{caller.context.user_id} paid {amount}"


class Pays:
    tools = (pay,)

    async def run(self, run: RunContext) -> None:
        await run.call_tool("pay", {"amount": 5})


def but_for_bob(context: UserExecutionContext, tool: Tool) -> bool:
    return context.user_id != "bob"


async def result_for(server: Server, user: str, words: str = "go", agent: str = "pays") -> str:
    """What the one tool call came to, as that user's socket shows it."""
    async with server.chat(f"of-{user}", user) as chat:
        await chat.subscribe()
        events = await chat.run(words, agent)
    assert types_of(events)[-1] == "RUN_FINISHED"
    [result] = [event["content"] for event in events if event["type"] == "TOOL_CALL_RESULT"]
    return str(result)


async def test_a_policy_and_an_approver_decide_over_the_socket(tmp_path: Path) -> None:
    asked: list[tuple[str, str, str]] = []

    async def approve(request: ApprovalRequest) -> Approval:
        asked.append((request.context.user_id, request.tool_name, request.arguments))
        await trio.lowlevel.checkpoint()
        if request.context.user_id == "eve":
            return request.refuse("eve pays nothing")
        return request.approve()

    async with open_server(
        tmp_path, {"pays": Pays}, tool_policy=but_for_bob, approve=approve
    ) as server:
        results = {user: await result_for(server, user) for user in ("ann", "bob", "eve")}
    assert results == {
        "ann": "ann paid 5",
        "bob": "Error: There is no tool named 'pay'.",
        "eve": "Error: The call was not approved: eve pays nothing.",
    }
    assert asked == [(user, "pay", '{"amount":5}') for user in ("ann", "eve")]


async def test_without_an_approver_the_person_is_asked(tmp_path: Path) -> None:
    async with open_server(tmp_path, {"pays": Pays}) as server:
        async with server.chat(user="bob") as chat:
            await chat.subscribe()
            await chat.start("go", "pays")
            await chat.until(lambda: chat.seen("RUN_FINISHED"), "it asks")
            [question] = chat.events[-1]["outcome"]["interrupts"]
            assert question["reason"] == "tool_call"
            assert not chat.seen("TOOL_CALL_RESULT")
            await chat.ask(
                "input.respond", interrupt_id=question["id"], response={"approved": False}
            )
            await chat.until(lambda: chat.seen("TOOL_CALL_RESULT"), "it was refused")
            [result] = [each for each in chat.events if each["type"] == "TOOL_CALL_RESULT"]
            assert "not approved" in result["content"]


async def test_the_readmes_application_is_served_with_its_policy_and_its_approver(
    tmp_path: Path,
) -> None:
    (tmp_path / "till.py").write_text(block("file", "till.py"))
    async with open_creche(tmp_path / "data", "till:application", cwd=tmp_path) as creche:
        said = {
            (user, amount): await result_for(
                creche.server,
                user,
                f'tool=pay:{{"amount":{amount},"to":"zoe"}} tokens=0',
                "till",
            )
            for user, amount in (("ann", 5), ("ann", 5000), ("bob", 5))
        }
    assert said == {
        ("ann", 5): "Paid 5 to zoe.",
        ("ann", 5000): "Error: The call was not approved: that is too much.",
        ("bob", 5): "Error: There is no tool named 'pay'.",
    }


class Deaf:
    def __call__(self, request: ApprovalRequest) -> Approval:
        return request.approve()


class Listening:
    async def __call__(self, request: ApprovalRequest, more: str = "") -> Approval:
        return request.approve()


async def always(*_: object) -> bool:
    return True


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_policy": always}, "tool_policy must be a function, and not an async one"),
        ({"approve": but_for_bob}, "approve must be an `async def`"),
        ({"approve": Deaf()}, "approve must be an `async def`"),
        ({"approve": 7}, "approve must be an `async def`"),
        ({"agents": 7}, "agents must be a mapping"),
        ({"agents": {1: Pays}}, "an agent's name must be a word"),
    ],
    ids=str,
)
def test_what_could_never_work_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Application(**fields)


@pytest.mark.parametrize(
    "approve",
    [Listening(), Listening().__call__, functools.partial(Listening().__call__, more="x")],
)
async def test_whatever_can_be_awaited_may_approve(approve: Callable[..., Any]) -> None:
    approver = Application(approve=approve).approver
    assert approver is not None
    asked: Any = ApprovalRequest(context=None, tool_name="pay", tool_call_id="c", arguments="{}")  # type: ignore[arg-type]
    assert (await approver.approve(asked)).approved


def test_an_agent_may_be_given_alone_as_a_mapping_or_not_at_all() -> None:
    agents: list[Any] = [Pays, {"pays": Pays}]
    assert [Application(agents=each).registry.names() for each in agents] == [("pays",)] * 2
    assert Application(tool_policy=but_for_bob).registry.names() == ()
