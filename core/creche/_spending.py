"""Which open budgets a spending belongs to, and what ends when one of them is exceeded.

The tree of tasks decides that, as it decides what a cancel scope cancels: a budget is for the task
that opened it, and for the tasks in nurseries that were opened within its block. No context
variable and no stack says so; each question is answered from where the spending task stands.
"""

# ruff: noqa: SLF001  a budget and those around it are one idea

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import date
from typing import Protocol

import trio

from creche._budget import (
    NO_LIMIT,
    OF_A_MODEL,
    OF_A_TOOL,
    Allowance,
    Kind,
    Price,
    Spending,
    in_words,
    tightest,
)
from creche._errors import BudgetExceededError, RunError
from creche._quotas import DayShare
from creche._task_tree import way_up

_ONE_TOOL_CALL = Spending(tool_calls=1)


class Bounded(Protocol):
    """Something with a limit and a spending: a budget, or a user's day."""

    @property
    def limit(self) -> Allowance: ...
    @property
    def spent(self) -> Spending: ...


class Budget:
    """What a block of a run may spend, and has; see `RunContext.budget`."""

    def __init__(
        self, wanted: Allowance, outer: Budget | None = None, day: DayShare | None = None
    ) -> None:
        """`outer` is the next one around it, of which it can have what is left at most.

        The day of the user is around all of them, but the next may begin while they are open.
        """
        self._outer = outer
        self._day = day
        self.limit = wanted if outer is None else tightest(wanted, outer._left_in_the_run)
        self.spent = Spending()

    @property
    def left(self) -> Allowance:
        """What may yet be spent in it: by those around it, and by its user's day, too."""
        own = self._left_in_the_run
        return own if self._day is None else tightest(own, self._day.left)

    @property
    def _left_in_the_run(self) -> Allowance:
        own = self.limit.less(self.spent)
        return own if self._outer is None else tightest(own, self._outer._left_in_the_run)

    def __repr__(self) -> str:
        return f"<Budget of {self.limit}, {self.spent}>"


class _Open:
    """A budget whose block is open, and where that is."""

    __slots__ = ("before", "budget", "over", "scope", "task")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.over: str | None = None  # why it was ended
        self.scope = trio.CancelScope()
        self.task = trio.lowlevel.current_task()
        self.before = tuple(self.task.child_nurseries)  # what is in these is beside the block


class Budgets:
    """Those of one run, its own outermost; and the day of its user, around that."""

    def __init__(self, end_run: Callable[[], None]) -> None:
        self._end_run = end_run
        self._open: dict[Budget, _Open] = {}  # outer ones first; an entry *is* `opened`
        self._day: DayShare | None = None
        self._prices: Mapping[str, Price] = {}
        self._limited = False  # whether anything but `_open` limits the run
        self.run = Budget(NO_LIMIT)
        self.over: str | None = None  # why the run was ended
        self.unpriced = 0  # answers of models that have no price
        self.by_day: dict[date, Spending] = {}

    def begin(self, limit: Allowance, prices: Mapping[str, Price], day: DayShare) -> None:
        """The run begins: from here on it has its own budget, and its user's day."""
        self._prices, self._day = prices, day
        self.run = Budget(limit, day=day)
        self._limited = not (limit.is_none and day.limit.is_none)

    @contextlib.contextmanager
    def opened(self, wanted: Allowance) -> Iterator[Budget]:
        """See `RunContext.budget`."""
        around = self._around()
        budget = Budget(wanted, around[-1].budget if around else self.run, self._day)
        place = self._open[budget] = _Open(budget)
        try:
            with place.scope:
                yield budget
        finally:
            del self._open[budget]
        if place.over is not None:
            raise BudgetExceededError(place.over, budget=budget)

    async def admit_model(self, model: str) -> None:
        """Let a model be asked, unless what it would spend is used up.

        Then the scope of that budget is cancelled, and so this does not return, but for shielded
        code, which gets a BudgetExceededError. Raises RunError for a model that has no price where
        a budget in money is open.
        """
        if self._limited or self._open:
            if model not in self._prices and self._counts_money():
                msg = f"there is a budget in USD, and no price is known of the model {model!r}"
                raise RunError(msg, code="no_price")
            await self._admit(OF_A_MODEL)

    async def charge_tool_call(self) -> None:
        """Count a tool call, unless those that may be made are; then as `admit_model`."""
        if self._limited or self._open:
            await self._admit(OF_A_TOOL)  # a checkpoint only where it refuses
        self._spend(_ONE_TOOL_CALL)

    def charge_answer(self, model: str, input_tokens: int, output_tokens: int) -> None:
        """Count what an answer cost. What it exceeds ends at its next checkpoint.

        Raises RunError for a model that has no price where a budget in money is open.
        """
        price = self._prices.get(model)
        self.unpriced += price is None
        micro_usd = 0 if price is None else price.micro_usd(input_tokens, output_tokens)
        self._spend(Spending(tokens=input_tokens + output_tokens, micro_usd=micro_usd))
        if price is None and (self._limited or self._open) and self._counts_money():
            msg = f"there is a budget in USD, and no price is known of the model {model!r}"
            raise RunError(msg, code="no_price")

    @property
    def usd(self) -> float | None:
        """What the run's answers cost; None if one of them came from a model without a price."""
        return None if self.unpriced or not self._prices else float(self.run.spent.usd)

    def _counts_money(self) -> bool:
        around = self._around()
        innermost = around[-1].budget if around else self.run
        return innermost.left.micro_usd is not None

    def _spend(self, spending: Spending) -> None:
        if self._day is not None:
            today = self._day.today
            self.by_day[today] = self.by_day.get(today, Spending()) + spending
            self._day.add(spending)
        self.run.spent += spending
        around = self._around()
        for place in around:
            place.budget.spent += spending
        if self._limited or around:
            self._check(around, lambda bound: bound.limit.exceeded_by(bound.spent))

    async def _admit(self, kinds: Collection[Kind]) -> None:
        refusal = self._check(
            self._around(), lambda bound: bound.limit.leaves_nothing(bound.spent, kinds)
        )
        if refusal is not None:
            await trio.lowlevel.checkpoint()
            raise refusal

    def _check(
        self, around: list[_Open], what_of: Callable[[Bounded], Kind | None]
    ) -> BudgetExceededError | None:
        """End the outermost that has too little left; those in it end with it."""
        if self._day is not None and (kind := what_of(self._day)) is not None:
            return self._end(self._day, kind, "this user may spend in a day (UTC)")
        if (kind := what_of(self.run)) is not None:
            return self._end(self.run, kind, "this run may spend")
        for place in around:
            if (kind := what_of(place.budget)) is not None:
                if place.over is None:
                    said = in_words(kind, place.budget.limit, place.budget.spent)
                    place.over = f"spent {said} that this part of the run may spend, so it ended"
                    place.scope.cancel()
                return BudgetExceededError(place.over, budget=place.budget)
        return None

    def _end(self, bound: Bounded, kind: Kind, whose: str) -> BudgetExceededError:
        said = f"spent {in_words(kind, bound.limit, bound.spent)} that {whose}"
        self.over = self.over or said
        self._end_run()
        return BudgetExceededError(f"{said}, so the run was ended", budget=self.run)

    def _around(self) -> list[_Open]:
        """The open budgets that the current task is in, outer ones first.

        What they share a task with is told by nurseries: one that was open before the budget was
        is around it, not in it. Of two such budgets the outer one was opened first, always.
        """
        if not self._open or not trio.lowlevel.in_trio_task():
            return []
        way = way_up(trio.lowlevel.current_task())
        return [
            place
            for place in self._open.values()
            if place.task in way and way[place.task] not in place.before
        ]
