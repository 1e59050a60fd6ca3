"""What makes an agent's instances makes them anew for each run."""

from __future__ import annotations

import abc
import functools
import re
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import attrs
import msgspec
import pydantic
import pytest
from tests.small_world import agent_of, context, infrastructure

from creche import AgentClassRegistry, RunContext, open_supervisor
from creche._agent_instances import make_instance

T = TypeVar("T")


class Plain:
    """Answers nothing."""

    async def run(self, run: RunContext) -> None: ...


class Single(Plain):
    """There is one."""

    kept: ClassVar[Any] = None

    def __new__(cls) -> Self:
        return super().__new__(cls)


class OneOf(type):
    """Makes one."""

    def __call__(cls, *given: Any) -> Any:
        return super().__call__(*given)


@functools.cache
def cached_new(cls: type) -> Any:
    return object.__new__(cls)


def plain_new(cls: type) -> Any:
    return object.__new__(cls)


def wrapped_new() -> Any:
    @functools.wraps(cached_new)
    def wrapper(cls: type) -> Any:
        return cached_new(cls)

    return wrapper


def built(*bases: type, **names: Any) -> type[Any]:
    return type("Odd", (*bases, Plain), names)


class WithParameter(Plain, Generic[T]):
    """Of a kind."""


class Pair(NamedTuple):
    one: int = 1


class TestInstancesAreMadeAnew:
    @pytest.mark.parametrize(
        ("agent", "told"),
        [
            (Single, "Single.__new__"),
            (built(Single), "Single.__new__"),
            (built(__new__=plain_new), "Odd.__new__"),
            (built(__new__=staticmethod(cached_new)), "Odd.__new__"),
            (built(__new__=functools.partial(object.__new__)), "Odd.__new__"),
            (
                built(__new__=wrapped_new()),
                "Odd.__new__",
            ),
            (OneOf("Odd", (Plain,), {}), "OneOf.__call__"),
            (type("Below", (OneOf,), {})("Odd", (Plain,), {}), "OneOf.__call__"),
        ],
        ids=[
            *("its own", "a base's", "a function", "a cache", "a partial", "what wraps one"),
            *("a metaclass's", "that of a metaclass's base"),
        ],
    )
    def test_a_class_that_could_hand_one_to_two_runs_is_refused(
        self, agent: type[Any], told: str
    ) -> None:
        with pytest.raises(TypeError, match=re.escape(f"agent 'one': {told} could hand")) as info:
            AgentClassRegistry().register("one", agent)
        assert "`__init__`" in str(info.value)

    @pytest.mark.parametrize(
        "agent",
        [
            built(),
            built(Pair),
            WithParameter,
            built(__new__=object.__new__),
            type("Strict", (msgspec.Struct,), {"run": Plain.run}),
            type("Model", (pydantic.BaseModel,), {"run": Plain.run}),
            attrs.define(type("Attrs", (), {"run": Plain.run})),
            abc.ABCMeta("Abstract", (Plain,), {}),
        ],
        ids=["plain", "tuple", "generic", "object's", "msgspec", "pydantic", "attrs", "abc"],
    )
    def test_one_that_python_or_a_library_makes_is_taken(self, agent: type[Any]) -> None:
        AgentClassRegistry().register("one", agent)
        assert make_instance(agent) is not make_instance(agent)

    def test_one_that_becomes_another_classs_is_not_used(self) -> None:
        class Turns(Plain):
            def __init__(self) -> None:
                self.__class__ = Plain  # type: ignore[assignment]

        with pytest.raises(TypeError, match="calling Turns made a Plain"):
            make_instance(Turns)

    async def test_nor_by_a_run_or_a_sub_agent(self) -> None:
        class Turns(Plain):
            def __init__(self) -> None:
                self.__class__ = Plain  # type: ignore[assignment]

        async def asks(run: RunContext) -> str:
            return (await run.spawn("turns", "x")).status

        made = infrastructure(turns=Turns, asks=agent_of(asks))
        async with open_supervisor(made) as supervisor:
            for agent, told in (("turns", ("failed", None)), ("asks", ("success", "failed"))):
                run = await supervisor.start(context(), agent, "x")
                outcome = await run.ended()
                assert (outcome.status, outcome.result) == told
