"""What we give to those who test agents: a model that does what it is told, and its pacer."""

from __future__ import annotations

import json

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    Message,
    MessageId,
    ModelError,
    ModelPart,
    TextDelta,
    ToolCallId,
    ToolCallRequest,
    ToolMessage,
    Usage,
    UserMessage,
)
from creche.testing import Directives, Pacer, ScriptedModel, open_pacer


def user(text: str) -> UserMessage:
    return UserMessage(id=MessageId("m"), content=text)


async def answer(*messages: Message) -> list[ModelPart]:
    async with open_pacer() as pacer:
        async with ScriptedModel(pacer).open_stream(messages, ()) as parts:
            return [part async for part in parts]


def text_in(parts: list[ModelPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, TextDelta))


class TestDirectives:
    @pytest.mark.parametrize(
        ("text", "tokens", "delay", "failure", "hangs"),
        [
            ("hi", 20, 0.0, None, False),
            ("", 20, 0.0, None, False),
            ("tokens=3", 3, 0.0, None, False),
            ("say tokens=0 please", 0, 0.0, None, False),
            ("tokens=3 delay_ms=2.5", 3, 0.0025, None, False),
            ("fail=no more tokens=3", 20, 0.0, "no more tokens=3", False),
            ("tokens=4 fail=", 4, 0.0, "the script says so", False),
            ("hang", 20, 0.0, None, True),
            ("hangar mytokens=7 xhang", 20, 0.0, None, False),
        ],
    )
    def test_a_message_is_read_so(
        self,
        text: str,
        tokens: int,
        delay: float,
        failure: str | None,
        hangs: bool,
    ) -> None:
        read = Directives(text)
        assert (read.tokens, read.delay, read.failure, read.hang) == (
            tokens,
            delay,
            failure,
            hangs,
        )
        assert read.tool is None

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("tokens=abc", "tokens=abc"),
            ("say tokens= please", "tokens="),
            ("tokens=-1", "tokens=-1"),
            ("tokens=1e9", "tokens=1e9"),
            ("tokens=99999999999999999999", "tokens=9999"),
            ("tokens=2 delay_ms=soon", "delay_ms=soon"),
            ("delay_ms=nan", "delay_ms=nan"),
            ("tool=add", "tool=add"),
            ("tool=add: {}", "tool=add"),
            ("tool=add {}", "tool=add"),
            ("tool=:{}", "tool="),
            ("tool=", "tool="),
        ],
    )
    def test_one_that_cannot_be_read_is_a_failure_that_names_it(
        self,
        text: str,
        word: str,
    ) -> None:
        with pytest.raises(ModelError, match="script") as info:
            Directives(text)
        assert word in str(info.value)

    @settings(max_examples=50)
    @given(st.dictionaries(st.text(), st.none() | st.text() | st.lists(st.text(), max_size=3)))
    def test_a_tools_arguments_are_any_json_object(self, arguments: dict[str, object]) -> None:
        given_text = json.dumps(arguments)
        read = Directives(f"please tool=add:{given_text} tokens=5")
        assert read.tool == ("add", given_text)
        assert read.tokens == 5


class TestScriptedModel:
    async def test_it_answers_with_so_many_deltas_and_what_they_cost(self) -> None:
        parts = await answer(user("tokens=3"))
        assert parts == [
            TextDelta("tok0 "),
            TextDelta("tok1 "),
            TextDelta("tok2 "),
            Usage(1, 3),
        ]

    async def test_only_the_last_user_message_counts(self) -> None:
        assert len(await answer(user("tokens=9"), user("tokens=1"))) == 2

    async def test_it_calls_a_tool_first_and_then_tells_its_result(self) -> None:
        asked = user('tool=add:{"a": 1} tokens=1')
        assert await answer(asked) == [ToolCallRequest("add", '{"a": 1}')]
        result = ToolMessage(id=MessageId("r"), tool_call_id=ToolCallId("c"), content="3")
        assert text_in(await answer(asked, result)) == "3 tok0 "

    async def test_a_result_from_an_earlier_question_is_not_this_ones(self) -> None:
        result = ToolMessage(id=MessageId("r"), tool_call_id=ToolCallId("c"), content="3")
        asked = user("tool=add:{} tokens=1")
        assert await answer(asked, result, asked) == [ToolCallRequest("add", "{}")]

    async def test_it_fails_in_mid_stream(self) -> None:
        said: list[ModelPart] = []

        async def listen(pacer: Pacer) -> None:
            asked = [user("tokens=4 fail=enough")]
            async with ScriptedModel(pacer).open_stream(asked, ()) as parts:
                async for part in parts:
                    said.append(part)  # noqa: PERF401  what came before the failure counts

        async with open_pacer() as pacer:
            with pytest.raises(ModelError, match="enough"):
                await listen(pacer)
        assert text_in(said) == "tok0 tok1 "

    async def test_it_takes_its_time(self, autojump_clock: MockClock) -> None:
        begun = trio.current_time()
        await answer(user("tokens=5 delay_ms=100"))
        assert 0.5 <= trio.current_time() - begun < 0.51

    async def test_it_hangs_until_it_is_cancelled(self, autojump_clock: MockClock) -> None:
        with trio.move_on_after(3600) as scope:
            await answer(user("hang"))
        assert scope.cancelled_caught


class TestPacer:
    async def test_nobody_is_woken_early_and_all_in_their_order(
        self,
        autojump_clock: MockClock,
    ) -> None:
        woken: list[tuple[float, float]] = []

        async def sleeper(pacer: Pacer, milliseconds: float) -> None:
            begun = trio.current_time()
            await pacer.sleep(milliseconds / 1000)
            woken.append((milliseconds, trio.current_time() - begun))

        plan = [50, 3, 1000, 1, 3, 999, 20, 4.4, 7.9]
        async with open_pacer() as pacer:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for milliseconds in plan:
                        nursery.start_soon(sleeper, pacer, milliseconds)
        assert [milliseconds for milliseconds, _ in woken] == sorted(plan)
        for milliseconds, slept in woken:
            assert milliseconds <= slept * 1000 + 1e-6 < milliseconds + 1.001

    async def test_a_sleeper_who_is_cancelled_leaves_the_others_asleep(
        self,
        autojump_clock: MockClock,
    ) -> None:
        async with open_pacer() as pacer:
            begun = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pacer.sleep, 0.5)
                with trio.move_on_after(0.1):
                    await pacer.sleep(0.5)
                assert trio.current_time() - begun == pytest.approx(0.1)
            assert trio.current_time() - begun == pytest.approx(0.5)

    @pytest.mark.parametrize("slot", [1, 2, 1000, 2001, 2005, 4001, 8193])
    async def test_a_moment_that_has_come_is_not_waited_for_in_a_spin(
        self,
        mock_clock: MockClock,
        slot: int,
    ) -> None:
        """2001 * 0.001 / 0.001 is less than 2001; and a fake clock stands while anybody spins."""
        woken = False

        async def sleeper(pacer: Pacer) -> None:
            nonlocal woken
            await pacer.sleep(slot * 0.001)
            woken = True

        async with open_pacer() as pacer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sleeper, pacer)
                await wait_all_tasks_blocked()
                mock_clock.jump(slot * 0.001)
                for _ in range(50):
                    await trio.lowlevel.checkpoint()
                if not woken:
                    turn = pacer._earlier  # made anew at each turn of its loop
                    for _ in range(5):
                        await trio.lowlevel.checkpoint()
                    assert pacer._earlier is turn, "it spins"
                    mock_clock.jump(0.001)
                    for _ in range(50):
                        await trio.lowlevel.checkpoint()
                assert woken
