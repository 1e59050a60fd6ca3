"""What may be spent, what was, and what that costs: pure arithmetic, in whole micro-dollars.

A price in USD for a million tokens is one in micro-dollars for each, so nothing is ever a float:
each answer's cost is exact, and then rounded up to the next micro-dollar.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from datetime import date
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, InvalidOperation
from types import MappingProxyType
from typing import Final, Literal

MICRO: Final = 1_000_000

Kind = Literal["tokens", "usd", "tool_calls"]
Usd = Decimal | int | float | str  # a float is taken as it is written: 0.1 is a tenth

_WORDS: Final[Mapping[Kind, str]] = MappingProxyType(
    {"tokens": "tokens", "usd": "USD", "tool_calls": "tool calls"}
)
KINDS: Final[tuple[Kind, ...]] = ("tokens", "usd", "tool_calls")
OF_A_MODEL: Final[frozenset[Kind]] = frozenset({"tokens", "usd"})
OF_A_TOOL: Final[frozenset[Kind]] = frozenset({"tool_calls"})


def as_usd(name: str, value: Usd) -> Decimal:
    """That many dollars, exactly. Raises ValueError for what is no amount of money."""
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0:
        msg = f"{name} must be an amount in USD, 0 or more, not {value!r}"
        raise ValueError(msg)
    return amount


def as_count(name: str, value: int) -> int:
    """That number. Raises ValueError for what is no number of things."""
    if type(value) is not int or value < 0:
        msg = f"{name} must be a whole number, 0 or more, not {value!r}"
        raise ValueError(msg)
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """What a model costs: USD for a million tokens that it reads, and for a million it writes.

    Raises ValueError for what is no amount of money.
    """

    input: Usd
    output: Usd

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            object.__setattr__(self, name, as_usd(f"Price.{name}", getattr(self, name)))

    def micro_usd(self, input_tokens: int, output_tokens: int) -> int:
        """What that many tokens cost, in micro-dollars; a part of one counts as one."""
        exact = Decimal(self.input) * input_tokens + Decimal(self.output) * output_tokens
        return int(exact.to_integral_value(ROUND_CEILING))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What was spent."""

    tokens: int = 0  # read and written
    micro_usd: int = 0
    tool_calls: int = 0

    @property
    def usd(self) -> Decimal:
        return Decimal(self.micro_usd) / MICRO

    def __bool__(self) -> bool:
        return bool(self.tokens or self.micro_usd or self.tool_calls)

    def __add__(self, other: Spending) -> Spending:
        return Spending(
            tokens=self.tokens + other.tokens,
            micro_usd=self.micro_usd + other.micro_usd,
            tool_calls=self.tool_calls + other.tool_calls,
        )

    def of(self, kind: Kind) -> int:
        """That part of it, in its smallest unit."""
        return self.micro_usd if kind == "usd" else getattr(self, kind)

    def at_least(self, other: Spending) -> Spending:
        """The greater of the two, part by part."""
        return Spending(
            tokens=max(self.tokens, other.tokens),
            micro_usd=max(self.micro_usd, other.micro_usd),
            tool_calls=max(self.tool_calls, other.tool_calls),
        )


DaySpending = tuple[date, Spending]  # what was spent on a day, in UTC


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What may be spent, or what is left of that; None is no limit."""

    tokens: int | None = None
    micro_usd: int | None = None
    tool_calls: int | None = None

    @classmethod
    def of_numbers(
        cls,
        tokens: int | None = None,
        usd: Usd | None = None,
        tool_calls: int | None = None,
    ) -> Allowance:
        """As people write it. Raises ValueError for what is no number or no amount of money."""
        micro = None if usd is None else (as_usd("usd", usd) * MICRO).to_integral_value(ROUND_FLOOR)
        return cls(
            tokens=None if tokens is None else as_count("tokens", tokens),
            micro_usd=None if micro is None else int(micro),
            tool_calls=None if tool_calls is None else as_count("tool_calls", tool_calls),
        )

    @property
    def usd(self) -> Decimal | None:
        return None if self.micro_usd is None else Decimal(self.micro_usd) / MICRO

    @property
    def is_none(self) -> bool:
        """Whether it limits nothing."""
        return self.tokens is self.micro_usd is self.tool_calls is None

    def of(self, kind: Kind) -> int | None:
        """That part of it, in its smallest unit."""
        return self.micro_usd if kind == "usd" else getattr(self, kind)

    def less(self, spent: Spending) -> Allowance:
        """What is left of it; never less than nothing."""
        return Allowance(
            tokens=_less(self.tokens, spent.tokens),
            micro_usd=_less(self.micro_usd, spent.micro_usd),
            tool_calls=_less(self.tool_calls, spent.tool_calls),
        )

    def exceeded_by(self, spent: Spending) -> Kind | None:
        """What there is too much of, if anything."""
        for kind in KINDS:
            if _over(self.of(kind), spent.of(kind)):
                return kind
        return None

    def leaves_nothing(self, spent: Spending, kinds: Collection[Kind]) -> Kind | None:
        """What is used up, so that a call that spends of these kinds may not begin, if anything.

        A budget that is exceeded, in whatever, lets nothing begin.
        """
        exceeded = self.exceeded_by(spent)
        if exceeded is not None:
            return exceeded
        for kind in KINDS:
            if kind in kinds and _over(self.of(kind), spent.of(kind) + 1):
                return kind
        return None


NO_LIMIT: Final = Allowance()


def _less(limit: int | None, spent: int) -> int | None:
    return None if limit is None else max(0, limit - spent)


def _over(limit: int | None, spent: int) -> bool:
    return limit is not None and spent > limit


def tightest(*allowances: Allowance) -> Allowance:
    """What all of them allow."""
    return Allowance(
        tokens=_least(each.tokens for each in allowances),
        micro_usd=_least(each.micro_usd for each in allowances),
        tool_calls=_least(each.tool_calls for each in allowances),
    )


def _least(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def in_words(kind: Kind, allowed: Allowance, spent: Spending) -> str:
    """How much of how much: `120 of 100 tokens`."""
    unit = _WORDS[kind]
    if kind == "usd":
        return f"{money(spent.usd)} of {money(allowed.usd or Decimal(0))} {unit}"
    return f"{spent.of(kind):,} of {allowed.of(kind) or 0:,} {unit}"


def money(usd: Decimal) -> str:
    """Dollars as people write them, to the micro-dollar: `0.25`, `0.000012`, `3`."""
    return f"{usd.normalize():f}"
