"""What a user's runs share: a rate and threads, untouched by any other user's."""

from __future__ import annotations

import threading

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tests.small_world import ADA, BOB
from trio.testing import MockClock

from creche import Limits, ToolQuotas, UserId
from creche._quotas import Rate


class TestRate:
    def test_a_minutes_worth_may_come_at_once_and_then_one_as_time_passes(self) -> None:
        rate = Rate(60)
        assert [rate.take(100.0) for _ in range(60)] == [0.0] * 60
        assert rate.take(100.0) == pytest.approx(1.0)
        assert rate.take(100.25) == pytest.approx(0.75)
        assert rate.take(101.0) == 0.0
        assert rate.take(101.0) == pytest.approx(1.0)

    @pytest.mark.parametrize("now", [0.0, 0.1, 123456.789])
    def test_a_full_minutes_worth_is_not_one_less_by_rounding(self, now: float) -> None:
        for per_minute in range(1, 200):
            rate = Rate(per_minute)
            assert [rate.take(now) for _ in range(per_minute)] == [0.0] * per_minute
            assert rate.take(now) > 0

    def test_who_was_refused_is_not_pushed_further_back_by_asking(self) -> None:
        rate = Rate(1)
        assert rate.take(0.0) == 0.0
        assert [rate.take(30.0) for _ in range(100)] == [30.0] * 100
        assert rate.take(60.0) == 0.0

    @given(
        per_minute=st.integers(1, 1000),
        gaps=st.lists(st.floats(0, 120), max_size=200),
    )
    def test_never_more_than_two_minutes_worth_in_any_minute_and_the_wait_is_true(
        self, per_minute: int, gaps: list[float]
    ) -> None:
        """A minute that begins full and refills: the bound of every bucket of that size."""
        rate, now, taken = Rate(per_minute), 1e6, []
        for gap in gaps:
            now += gap
            wait = rate.take(now)
            if wait:
                assert 0 < wait <= 60
                now += wait
                assert not rate.take(now), "who waits as long as told is let through"
            taken.append(now)
            recent = [moment for moment in taken if moment > now - 60]
            assert len(recent) <= 2 * per_minute


class TestShares:
    async def test_a_users_runs_share_and_others_have_their_own(self) -> None:
        quotas = ToolQuotas(Limits())
        with quotas.share(ADA) as one, quotas.share(ADA) as same, quotas.share(BOB) as other:
            assert one is same
            assert one is not other
            assert one.rate is not other.rate
            assert one.workers is not other.workers
            assert quotas.count == 2
        assert quotas.count == 0

    async def test_one_users_flood_does_not_touch_anothers_rate(
        self, autojump_clock: MockClock
    ) -> None:
        quotas = ToolQuotas(Limits(tool_calls_per_minute=10))
        with quotas.share(ADA) as adas, quotas.share(BOB) as bobs:
            while not adas.take():
                pass
            assert [bobs.take() for _ in range(10)] == [0.0] * 10

    async def test_the_rate_outlives_the_runs(self, autojump_clock: MockClock) -> None:
        quotas = ToolQuotas(Limits(tool_calls_per_minute=1))
        for refused in (False, True, True):
            with quotas.share(ADA) as share:
                assert (share.take() > 0) is refused
        await trio.sleep(60)
        with quotas.share(ADA) as share:
            assert share.take() == 0

    async def test_what_a_user_took_is_forgotten_with_its_minute(
        self, autojump_clock: MockClock
    ) -> None:
        """A hundred users a second for a while, each with one second to pay: few are kept."""
        quotas = ToolQuotas(Limits(tool_calls_per_minute=60))
        for number in range(20_000):
            with quotas.share(UserId(f"user-{number}")) as share:
                share.take()
            if number % 100 == 0:
                await trio.sleep(1)
            assert len(quotas._paid_at) <= 1025

    async def test_an_abandoned_thread_counts_until_it_really_ends(self) -> None:
        """On the real clock, because of the thread."""
        quotas = ToolQuotas(Limits(tool_threads=1))
        begun, let_go = threading.Event(), threading.Event()

        def stuck() -> None:
            begun.set()
            let_go.wait(30)

        try:
            with quotas.share(ADA) as share:
                first = share
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        lambda: trio.to_thread.run_sync(
                            stuck, abandon_on_cancel=True, limiter=share.workers
                        )
                    )
                    await trio.to_thread.run_sync(begun.wait, 10)
                    nursery.cancel_scope.cancel()
            assert quotas.count == 1, "it is at work, though no run holds the share"
            with quotas.share(ADA) as share:
                assert share is first
                with pytest.raises(trio.WouldBlock):
                    share.workers.acquire_on_behalf_of_nowait(object())
        finally:
            let_go.set()
        with trio.fail_after(10):
            while first.workers.borrowed_tokens:
                await trio.sleep(0.001)
        with quotas.share(BOB):
            pass
        assert quotas.count == 0
