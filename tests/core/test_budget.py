"""What may be spent, what was, and what it costs: arithmetic alone."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creche import Allowance, Limits, Price, Spending
from creche._budget import Kind, as_usd, in_words, tightest

COUNTS = st.integers(0, 10**9)
LIMITS = st.none() | COUNTS
SPENDINGS = st.builds(Spending, tokens=COUNTS, micro_usd=COUNTS, tool_calls=COUNTS)
ALLOWANCES = st.builds(Allowance, tokens=LIMITS, micro_usd=LIMITS, tool_calls=LIMITS)
KINDS: tuple[Kind, ...] = ("tokens", "usd", "tool_calls")


class TestPrices:
    @pytest.mark.parametrize(
        ("price", "tokens", "micro_usd"),
        [
            (Price("3", "15"), (1_000_000, 0), 3_000_000),
            (Price("3", "15"), (0, 1_000_000), 15_000_000),
            (Price(0.15, 0.6), (1000, 1000), 750),
            (Price(0.1, 0.2), (3, 0), 1),  # 0.3 of one: a part counts as one
            (Price("0.1", "0.2"), (10, 0), 1),  # and exactly one is one, not two
            (Price(0, 0), (10**9, 10**9), 0),
            (Price(Decimal("2.5"), 10), (4, 1), 20),
            (Price(1, 1), (0, 0), 0),
        ],
    )
    def test_of_answers_are_exact(
        self, price: Price, tokens: tuple[int, int], micro_usd: int
    ) -> None:
        assert price.micro_usd(*tokens) == micro_usd

    @given(
        st.decimals(0, 1000, places=4),
        st.decimals(0, 1000, places=4),
        st.integers(0, 10**8),
        st.integers(0, 10**8),
    )
    def test_are_never_rounded_down_nor_by_more_than_a_micro_dollar(
        self, reading: Decimal, writing: Decimal, inputs: int, outputs: int
    ) -> None:
        exact = Fraction(reading) * inputs + Fraction(writing) * outputs
        assert 0 <= Price(reading, writing).micro_usd(inputs, outputs) - exact < 1

    @pytest.mark.parametrize("value", [-1, "free", float("nan"), "inf", "", "-0.01"])
    def test_that_are_none_are_refused_by_name(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"Price\.output must be an amount in USD"):
            Price(1, value)


class TestAllowances:
    @pytest.mark.parametrize(
        ("given", "micro_usd"),
        [("0.25", 250_000), (0.1, 100_000), (3, 3_000_000), ("0.0000019", 1), (0, 0), (None, None)],
    )
    def test_in_dollars_are_whole_micro_dollars_and_never_more(
        self, given: Any, micro_usd: int | None
    ) -> None:
        assert Allowance.of_numbers(usd=given).micro_usd == micro_usd

    @pytest.mark.parametrize(
        "wrong", [{"tokens": -1}, {"tokens": 1.5}, {"tool_calls": True}, {"usd": -1}]
    )
    def test_that_are_none_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Allowance.of_numbers(**wrong)

    @pytest.mark.parametrize(
        ("allowed", "spent", "exceeded", "for_a_model", "for_a_tool"),
        [
            (Allowance(), Spending(tokens=10**9), None, None, None),
            (Allowance(tokens=10), Spending(tokens=9), None, None, None),
            (Allowance(tokens=10), Spending(tokens=10), None, "tokens", None),
            (Allowance(tokens=10), Spending(tokens=11), "tokens", "tokens", "tokens"),
            (Allowance(tokens=0), Spending(), None, "tokens", None),
            (Allowance(micro_usd=5), Spending(micro_usd=5), None, "usd", None),
            (Allowance(micro_usd=5), Spending(micro_usd=6), "usd", "usd", "usd"),
            (Allowance(tool_calls=2), Spending(tool_calls=2), None, None, "tool_calls"),
            (Allowance(tool_calls=2), Spending(tool_calls=3), *["tool_calls"] * 3),
        ],
    )
    def test_say_what_is_over_and_what_may_not_begin(
        self,
        allowed: Allowance,
        spent: Spending,
        exceeded: str | None,
        for_a_model: str | None,
        for_a_tool: str | None,
    ) -> None:
        assert allowed.exceeded_by(spent) == exceeded
        assert allowed.leaves_nothing(spent, {"tokens", "usd"}) == for_a_model
        assert allowed.leaves_nothing(spent, {"tool_calls"}) == for_a_tool

    @given(ALLOWANCES, ALLOWANCES, SPENDINGS)
    def test_of_two_the_tightest_is_over_as_soon_as_one_of_them_is(
        self, one: Allowance, other: Allowance, spent: Spending
    ) -> None:
        both = tightest(one, other)
        is_over = one.exceeded_by(spent) or other.exceeded_by(spent)
        assert (both.exceeded_by(spent) is None) == (is_over is None)

    @given(ALLOWANCES, SPENDINGS, SPENDINGS)
    def test_have_left_what_may_yet_be_spent(
        self, allowed: Allowance, spent: Spending, more: Spending
    ) -> None:
        if allowed.exceeded_by(spent) is None:
            still = allowed.less(spent).exceeded_by(more) is None
            assert still == (allowed.exceeded_by(spent + more) is None)
        for kind in KINDS:
            assert (left := allowed.less(spent).of(kind)) is None or left >= 0

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("tokens", "1,200 of 1,000 tokens"),
            ("usd", "0.25 of 0.2 USD"),
            ("tool_calls", "3 of 2 tool calls"),
        ],
    )
    def test_are_told_as_how_much_of_how_much(self, kind: Kind, words: str) -> None:
        allowed = Allowance(tokens=1000, micro_usd=200_000, tool_calls=2)
        spent = Spending(tokens=1200, micro_usd=250_000, tool_calls=3)
        assert in_words(kind, allowed, spent) == words

    def test_of_round_sums_are_told_without_an_exponent(self) -> None:
        allowed = Allowance(micro_usd=100_000_000)
        assert in_words("usd", allowed, Spending(micro_usd=1)) == "0.000001 of 100 USD"


class TestLimits:
    def test_in_money_are_kept_exactly(self) -> None:
        limits = Limits(run_usd=0.1, usd_per_user_per_day="2.50", run_tokens=5)
        assert limits.run_usd == as_usd("", "0.1")
        assert limits.of_a_run == Allowance(tokens=5, micro_usd=100_000)
        assert limits.of_a_day == Allowance(micro_usd=2_500_000)

    def test_are_none_unless_they_are_said(self) -> None:
        assert Limits().of_a_run.is_none
        assert Limits().of_a_day.is_none
        assert not Limits(tool_calls_per_user_per_day=0).of_a_day.is_none

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("run_tokens", -1),
            ("run_tokens", 0.5),
            ("run_usd", "much"),
            ("tokens_per_user_per_day", float("nan")),
            ("usd_per_user_per_day", -0.01),
            ("tool_calls_per_user_per_day", "3"),
        ],
    )
    def test_that_are_none_are_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"Limits.{name} must be"):
            Limits(**{name: value})
