"""When a model is asked again, how soon and how often; a fake endpoint, over a real socket."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Sequence

import pytest
import trio
from tests.server.models import fake_openai as fake
from tests.server.models.fake_openai import FakeEndpoint, Reply
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import Message, MessageId, ModelError, ModelPart, TextDelta, ToolSpec, UserMessage
from creche_server.models import open_models
from creche_server.models.openai import open_openai_model
from creche_server.models.openai_wire import retry_after
from creche_server.models.retrying import PassingModelError, RetryingModel

HELLO = (UserMessage(id=MessageId("m"), content="Hello!"),)
ANSWER = Reply([fake.text("Hi"), fake.finish()])
SOON = {"retry-after-ms": "1"}


@contextlib.asynccontextmanager
async def opened(endpoint: FakeEndpoint, *, attempts: int = 3) -> AsyncIterator[RetryingModel]:
    """The model `tiny` of this endpoint, asked as often as that."""
    async with open_openai_model("tiny", base_url=endpoint.url, api_key="sk-x") as model:
        yield RetryingModel(model, attempts=attempts)


async def answer(model: RetryingModel) -> list[ModelPart]:
    """All parts of the answer to HELLO."""
    async with model.open_stream(HELLO, ()) as parts:
        return [part async for part in parts]


# --- over a real socket


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
async def test_an_endpoint_that_is_busy_for_a_moment_is_asked_again(
    endpoint: FakeEndpoint, status: int
):
    busy = Reply(status=status, error={}, headers=SOON)
    endpoint.replies = [busy, busy, ANSWER]
    with trio.fail_after(10):
        async with opened(endpoint) as model:
            assert await answer(model) == [TextDelta("Hi")]
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("status", "code"),
    [(status, "") for status in (400, 401, 403, 404, 408, 409, 413, 422)]
    + [(429, "insufficient_quota")],
)
async def test_what_was_refused_for_good_is_not_asked_again(
    endpoint: FakeEndpoint, status: int, code: str
):
    refusal = Reply(status=status, error={"error": {"code": code}}, headers=SOON)
    endpoint.replies = [refusal, ANSWER]
    with trio.fail_after(10):
        async with opened(endpoint) as model:
            with pytest.raises(ModelError, match=str(status)):
                await answer(model)
    assert len(endpoint.requests) == 1


async def test_an_endpoint_that_stays_busy_is_asked_three_times_and_its_word_told(
    endpoint: FakeEndpoint, caplog: pytest.LogCaptureFixture
):
    endpoint.replies = [Reply(status=503, error={}, headers=SOON) for _ in range(4)]
    with trio.fail_after(10):
        async with opened(endpoint) as model:
            with pytest.raises(ModelError, match="out of order") as caught:
                await answer(model)
    assert caught.value.code == "model_unavailable"
    assert len(endpoint.requests) == 3
    told = [record.message for record in caplog.records if record.name == "creche.models"]
    assert [line.split("for the ")[1] for line in told] == ["2. time of 3", "3. time of 3"]
    assert all("(503)" in line for line in told)


async def test_one_attempt_is_one(endpoint: FakeEndpoint):
    endpoint.replies = [Reply(status=503, error={}, headers=SOON), ANSWER]
    with trio.fail_after(10):
        async with opened(endpoint, attempts=1) as model:
            with pytest.raises(ModelError):
                await answer(model)
    assert len(endpoint.requests) == 1


async def test_a_connection_that_breaks_before_the_answer_begins_is_made_again(
    endpoint: FakeEndpoint, mock_clock: MockClock
):
    """On a fast clock: the first pause is half a second or more."""
    mock_clock.rate = 100
    endpoint.replies = [Reply([], then="break"), ANSWER]
    with trio.fail_after(1000):
        async with opened(endpoint) as model:
            assert await answer(model) == [TextDelta("Hi")]
    assert len(endpoint.requests) == 2


async def test_an_address_that_nobody_listens_at_is_tried_as_often_as_that(
    mock_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    mock_clock.rate = 100
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    with trio.fail_after(1000):
        async with opened(FakeEndpoint(f"http://127.0.0.1:{port}/v1")) as model:
            with pytest.raises(ModelError) as caught:
                await answer(model)
    assert caught.value.code == "model_unreachable"
    assert len([record for record in caplog.records if record.name == "creche.models"]) == 2


async def test_an_answer_that_has_begun_is_never_begun_again(endpoint: FakeEndpoint):
    """What was said can't be unsaid: the words would come twice."""
    endpoint.replies = [Reply([fake.text("Hel")], then="break"), ANSWER]
    with trio.fail_after(10):
        async with opened(endpoint) as model:
            async with model.open_stream(HELLO, ()) as parts:
                assert await anext(parts) == TextDelta("Hel")
                with pytest.raises(ModelError) as caught:
                    await anext(parts)
    assert caught.value.code == "model_broke_off"
    assert len(endpoint.requests) == 1


async def test_leaving_the_block_closes_the_connection(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([fake.text("a"), fake.text("b")], then="hold")]
    with trio.fail_after(10):
        async with opened(endpoint) as model:
            with pytest.raises(ZeroDivisionError):
                async with model.open_stream(HELLO, ()) as parts:
                    assert await anext(parts) == TextDelta("a")
                    raise ZeroDivisionError
            await endpoint.hung_up.wait()


async def test_a_cancel_before_the_first_part_ends_it_at_once(endpoint: FakeEndpoint):
    endpoint.replies = [Reply([], then="hold"), ANSWER]
    with trio.fail_after(10):
        async with opened(endpoint) as model:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(answer, model)
                    while not endpoint.requests:
                        await trio.sleep(0.001)
                    scope.cancel()
            assert scope.cancelled_caught
            await endpoint.hung_up.wait()
    assert len(endpoint.requests) == 1


# --- pauses, on a fake clock


class Failing:
    """A model whose answers fail, each after `delay` seconds, with what is next in a list."""

    name = "failing"

    def __init__(self, *errors: ModelError, delay: float = 0.0) -> None:
        self._errors = list(errors)
        self._delay = delay
        self.asked_at: list[float] = []  # trio time

    @contextlib.asynccontextmanager
    async def open_stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        self.asked_at.append(trio.current_time())
        await trio.sleep(self._delay)
        if self._errors:
            raise self._errors.pop(0)

        async def parts() -> AsyncIterator[ModelPart]:
            yield TextDelta("Hi")

        yield parts()

    @property
    def pauses(self) -> list[float]:
        """Seconds from each failure to the next attempt."""
        pairs = itertools.pairwise(self.asked_at)
        return [after - before - self._delay for before, after in pairs]


def passing(pause: float | None = None) -> PassingModelError:
    return PassingModelError("busy", code="model_unavailable", retry_after=pause)


async def test_pauses_grow_and_are_never_the_same_for_all(autojump_clock: MockClock):
    models = [Failing(*[passing()] * 6) for _ in range(5)]
    for model in models:
        await answer(RetryingModel(model, attempts=7))
        for pause, least in zip(model.pauses, [0.5, 1, 2, 4, 8, 8], strict=True):
            assert least - 1e-6 <= pause <= min(least + 0.5, 8) + 1e-6
    assert len({model.pauses[0] for model in models}) == 5


async def test_the_endpoints_own_pause_is_kept_to(autojump_clock: MockClock):
    model = Failing(passing(7), passing(30), passing(0))
    assert await answer(RetryingModel(model, attempts=4)) == [TextDelta("Hi")]
    assert model.pauses == pytest.approx([7, 30, 0])


@pytest.mark.parametrize(
    ("model", "attempts"),
    [
        (Failing(passing(61)), 1),
        (Failing(passing(50), passing(11)), 2),
        (Failing(*[passing()] * 20, delay=25), 3),
        (Failing(*[passing()] * 20), 11),
    ],
    ids=["too long a pause", "pauses that add up", "slow failures", "many failures"],
)
async def test_nobody_is_kept_waiting_for_more_than_a_minute(
    model: Failing, attempts: int, autojump_clock: MockClock
):
    begun = trio.current_time()
    with pytest.raises(PassingModelError):
        await answer(RetryingModel(model, attempts=100))
    assert len(model.asked_at) == attempts
    assert model.asked_at[-1] - begun <= 60


async def test_a_cancel_during_a_pause_ends_it_at_once(autojump_clock: MockClock):
    model = Failing(passing(50))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer, RetryingModel(model, attempts=3))
        await wait_all_tasks_blocked()
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert trio.current_time() - model.asked_at[0] == pytest.approx(10)
    assert len(model.asked_at) == 1


async def test_a_failure_that_will_not_pass_is_not_asked_again(autojump_clock: MockClock):
    model = Failing(ModelError("no"))
    with pytest.raises(ModelError, match="no"):
        await answer(RetryingModel(model, attempts=3))
    assert len(model.asked_at) == 1


async def test_runs_that_wait_do_not_wait_for_each_other(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.ERROR)
    model = Failing(*[passing(20)] * 30)
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(answer, RetryingModel(model, attempts=2))
    assert trio.current_time() - begun == pytest.approx(20)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
    ],
    ids=str,
)
def test_what_an_endpoint_says_of_its_pause_is_understood(
    headers: dict[str, str], seconds: float | None
):
    assert retry_after(headers, now=60.0) == seconds


async def test_the_model_that_the_settings_name_is_asked_as_often_as_they_say(
    endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    endpoint.replies = [Reply(status=503, error={}, headers=SOON) for _ in range(5)]
    with trio.fail_after(10):
        async with open_models("openai:tiny", attempts=4) as models:
            with pytest.raises(ModelError):
                async with models["default"].open_stream(HELLO, ()):
                    pytest.fail("it is busy")
    assert len(endpoint.requests) == 4
