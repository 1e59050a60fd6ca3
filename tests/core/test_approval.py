"""Approval: one yes, for one call with exactly these arguments, asked before the tool's time."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
from tests.small_world import context
from trio.testing import MockClock

from creche import (
    Approval,
    ApprovalRequest,
    Infrastructure,
    Limits,
    ToolCallId,
    ToolDispatcher,
    tool,
)
from creche._approval import digest_of, objection


def request(arguments: str = '{"amount":5}', name: str = "pay") -> ApprovalRequest:
    return ApprovalRequest(
        context=context(),
        tool_name=name,
        tool_call_id=ToolCallId("call-1"),
        arguments=arguments,
    )


class Asked:
    """An approver that answers as it is told, and keeps what it was asked."""

    def __init__(self, answer: Callable[[ApprovalRequest], Any]) -> None:
        self.answer = answer
        self.requests: list[ApprovalRequest] = []

    async def approve(self, request: ApprovalRequest) -> Approval:
        self.requests.append(request)
        answer: Approval | float = self.answer(request)
        if isinstance(answer, float):
            await trio.sleep(answer)
            return request.approve()
        return answer


async def pay_once(
    approver: Asked | None,
    params: Any = None,
    *,
    times: int = 1,
    limits: Limits | None = None,
) -> tuple[list[str], list[str]]:
    """(what was paid, what the results say) when an `approval=True` tool is called."""
    paid: list[str] = []

    @tool(approval=True, shared=(paid,))
    async def pay(amount: int, to: str = "bob") -> str:
        """Pay."""
        paid.append(f"{amount} to {to}")
        await trio.sleep(1)
        return "paid"

    infrastructure = Infrastructure(
        agents={}, tools=[pay], approver=approver, limits=limits or Limits()
    )
    opened = ToolDispatcher.create_scoped_dispatcher_context(
        context(), infrastructure=infrastructure
    )
    async with opened as dispatcher:
        said = [
            (await dispatcher.dispatch("pay", params or {"amount": 5})).content
            for _ in range(times)
        ]
    return paid, said


class TestAnswers:
    def test_the_digest_is_of_the_name_and_the_arguments_together(self) -> None:
        assert request().digest == hashlib.sha256(b'["pay","{\\"amount\\":5}"]').hexdigest()
        assert digest_of("a", "bc") != digest_of("ab", "c")

    def test_a_yes_to_this_very_request_is_the_only_one(self) -> None:
        asked = request()
        yes = asked.approve()
        assert objection(asked, yes) is None
        change = dataclasses.replace
        for answer in (
            change(yes, request_id=request().id),
            change(yes, tool_name="look"),
            change(yes, digest=request('{"amount":6}').digest),
            change(yes, approved=False),
            change(yes, approved="no"),
            request().approve(),  # the same call asked for at another time: used, or not yet
            request('{"amount":6}').approve(),
            request(name="look").approve(),
            asked.refuse(),
            True,
            None,
            "yes",
        ):
            assert "not approved" in str(objection(asked, answer)), answer

    def test_a_no_may_say_why_and_says_no_secret(self) -> None:
        told = objection(request(), request().refuse())
        assert told == "The call was not approved: the answer was for another call."
        asked = request()
        assert objection(asked, asked.refuse("Too much, password=hunter2.")) == (
            "The call was not approved: Too much, password=[redacted]."
        )


class TestCalls:
    async def test_a_yes_lets_the_call_be_made(self, autojump_clock: MockClock) -> None:
        approver = Asked(lambda request: request.approve())
        assert await pay_once(approver, '{"to": "eve",  "amount": 5}') == (["5 to eve"], ["paid"])
        (asked,) = approver.requests
        assert (asked.tool_name, asked.arguments) == ("pay", '{"amount":5,"to":"eve"}')
        assert asked.context.user_id == "ada"

    async def test_a_no_is_a_result(self, autojump_clock: MockClock) -> None:
        approver = Asked(lambda request: request.refuse("that is too much"))
        assert await pay_once(approver) == (
            [],
            ["Error: The call was not approved: that is too much."],
        )

    async def test_a_yes_serves_once(self, autojump_clock: MockClock) -> None:
        kept: list[Approval] = []

        def the_first_again(request: ApprovalRequest) -> Approval:
            kept.append(request.approve())
            return kept[0]

        paid, said = await pay_once(Asked(the_first_again), times=2)
        assert paid == ["5 to bob"]
        assert "for another call" in said[1]

    async def test_without_an_approver_it_is_refused_in_words(
        self, autojump_clock: MockClock
    ) -> None:
        paid, (said,) = await pay_once(None)
        assert not paid
        assert "nobody here who could approve" in said

    async def test_nobody_is_asked_about_arguments_that_do_not_fit(
        self, autojump_clock: MockClock
    ) -> None:
        approver = Asked(lambda request: request.approve())
        paid, (said,) = await pay_once(approver, {"amount": "5"})
        assert (paid, approver.requests) == ([], [])
        assert "do not fit" in said

    @pytest.mark.parametrize("error", [OSError("boom"), SystemExit(1)], ids=repr)
    async def test_an_approver_that_fails_has_not_approved(
        self,
        error: BaseException,
        autojump_clock: MockClock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fails(request: ApprovalRequest) -> Approval:
            raise error

        paid, (said,) = await pay_once(Asked(fails))
        assert not paid
        assert "could not be asked for" in said
        assert "boom" not in said
        assert [record.levelno for record in caplog.records] == [logging.ERROR]

    async def test_the_tools_time_begins_after_the_yes(self, autojump_clock: MockClock) -> None:
        limits = Limits(tool_timeout=2, approval_timeout=100)
        assert await pay_once(Asked(lambda _: 90.0), limits=limits) == (["5 to bob"], ["paid"])

    async def test_an_answer_that_takes_too_long_is_a_no(self, autojump_clock: MockClock) -> None:
        begun = trio.current_time()
        paid, (said,) = await pay_once(Asked(lambda _: 90.0), limits=Limits(approval_timeout=10))
        assert trio.current_time() - begun == pytest.approx(10)
        assert not paid
        assert "within 10 s" in said

    async def test_a_cancel_ends_the_waiting(self, autojump_clock: MockClock) -> None:
        with trio.move_on_after(3) as scope:
            await pay_once(Asked(lambda _: 90.0))
        assert scope.cancelled_caught
        assert trio.current_time() < 90
