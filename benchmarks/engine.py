"""Engine: what a run costs that does nothing, from `supervisor.start` to its end, in µs.

    .venv/bin/python benchmarks/engine.py [--runs 2000] [--rounds 5]

One run after another, each on a thread of its own, on a `MemoryStore`: so the time is creche's
own, for the nursery, the events, the journal and its writer, and no disk's. Beside the whole it
shows what parts of it take, each by itself. Medians over the rounds' runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import platform
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.metadata import version
from statistics import median, quantiles

import trio
from rich import box
from rich.console import Console
from rich.table import Table

from creche import (
    AgentClassRegistry,
    EventEmitter,
    ExecutionEngine,
    Infrastructure,
    Limits,
    MemoryStore,
    Message,
    Model,
    ModelAgent,
    ModelPart,
    RunContext,
    Supervisor,
    TextDelta,
    ToolSpec,
    UserExecutionContext,
    open_journals,
    open_supervisor,
)
from creche._activities import Activities
from creche._class_guard import ClassWatch
from creche._messages import as_messages
from creche._run_life import RunLife
from creche._run_rows import propose_run
from creche._silence import Silences
from creche._spending import Budgets
from creche._statistics import Tally
from creche._tracing import Spans
from creche._turns import TurnModel


class Nothing:
    """Does nothing."""

    async def run(self, run: RunContext) -> None:
        """Return."""


class Spawns:
    """Has another do nothing."""

    async def run(self, run: RunContext) -> None:
        """Spawn, once."""
        await run.spawn("nothing", "x")


class Speaks:
    """A model that says so many parts, and waits for nothing."""

    name = "speaks"

    def __init__(self, parts: int) -> None:
        """Say `parts` of them."""
        self._count = parts

    @contextlib.asynccontextmanager
    async def open_stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        """Return the parts."""
        del messages, tools

        async def parts() -> AsyncIterator[ModelPart]:
            part = TextDelta("word ")
            for _ in range(self._count):
                yield part

        yield parts()


class Ordinary(ModelAgent):
    """An agent as most are, for its class."""

    instructions = "Be brief."


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    samples: Sequence[float]  # µs


def asked(number: int) -> UserExecutionContext:
    """Return the context of the run of that number."""
    return UserExecutionContext.from_request(user_id="ann", thread_id=f"thread-{number}")


def infrastructure() -> Infrastructure:
    """Return an infrastructure on a store of its own, which no commit has to wait for."""
    return Infrastructure(
        agents={"nothing": Nothing, "spawns": Spawns, "ordinary": Ordinary},
        limits=Limits(commit_interval=0.0),
        store=MemoryStore(),
    )


async def timed(count: int, body: Callable[[int], Awaitable[object]]) -> list[float]:
    """Await `body` so often; returns the µs of each."""
    samples: list[float] = []
    for number in range(count):
        begun = time.perf_counter_ns()
        await body(number)
        samples.append((time.perf_counter_ns() - begun) / 1000)
    return samples


async def through_a_supervisor(count: int, agent: str) -> tuple[list[float], list[float]]:
    """Return the µs from `start` to the end, and of them those until `start` returned."""
    starting: list[float] = []

    async def once(supervisor: Supervisor, number: int) -> None:
        begun = time.perf_counter_ns()
        run = await supervisor.start(asked(number), agent, "x")
        starting.append((time.perf_counter_ns() - begun) / 1000)
        await run.ended()

    async with open_supervisor(infrastructure()) as supervisor:
        whole = await timed(count, lambda number: once(supervisor, number))
    return whole, starting


async def through_an_engine(count: int) -> list[float]:
    """Return the µs of `ExecutionEngine.execute` alone, its rows being committed."""
    made = infrastructure()
    samples: list[float] = []
    messages = as_messages("x")

    async def history() -> Sequence[Message]:
        return messages

    async with open_journals(made.store, made.limits) as journals:
        for number in range(count):
            context = asked(number)
            async with journals.attached(context.user_id, context.thread_id) as journal:
                life = RunLife(context, "nothing")
                await propose_run(journal, life, messages)
                engine = ExecutionEngine(life, made, journal)
                begun = time.perf_counter_ns()
                await engine.execute(messages, history)
                samples.append((time.perf_counter_ns() - begun) / 1000)
    return samples


async def of_parts(count: int, *, in_time: bool) -> list[float]:
    """Return the µs of hearing a part of a model's answer, in hundreds; or by itself."""
    limits, model = Limits(), Speaks(count * 100)
    if not in_time:
        heard: Model = model
    else:
        heard = TurnModel(
            model,
            Tally(),
            Activities(),
            Budgets(lambda: None),
            Silences(),
            limits=limits,
            spans=Spans.of_run(None, asked(0)),
            asking=[],
        )
    async with heard.open_stream([], []) as parts:

        async def hundred(_: int) -> None:
            for _ in range(100):
                await anext(parts)

        return [sample / 100 for sample in await timed(count, hundred)]


async def guarded(count: int) -> list[float]:
    """Return the µs of watching an ordinary agent's class, at a run's beginning and its end."""
    registry = AgentClassRegistry({"ordinary": Ordinary})

    async def once(_: int) -> None:
        watch = ClassWatch()
        watch.begin(registry.guards_of("ordinary"))
        watch.end()

    return await timed(count, once)


async def of_a_context(count: int) -> list[float]:
    """Return the µs of validating a request's ids."""

    async def once(number: int) -> None:
        asked(number)

    return await timed(count, once)


async def of_an_emitter(count: int) -> list[float]:
    """Return the µs of making an emitter."""
    made = infrastructure()
    context = asked(0)
    async with open_journals(made.store, made.limits) as journals:
        async with journals.attached(context.user_id, context.thread_id) as journal:

            async def once(_: int) -> None:
                EventEmitter(context, journal, made.limits)

            return await timed(count, once)


async def of_a_nursery(count: int) -> list[float]:
    """Return the µs of a nursery with one task that returns, which no run can do without."""

    async def once(_: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)

    return await timed(count, once)


async def measure(count: int, rounds: int) -> list[Row]:
    """Take all samples, round by round, so that no row has the machine's good moments alone."""
    found: dict[str, list[float]] = {}
    await through_a_supervisor(count // 4, "spawns")  # to warm up
    for _ in range(rounds):
        gc.collect()
        whole, starting = await through_a_supervisor(count, "nothing")
        spawning, _ = await through_a_supervisor(count, "spawns")
        for what, samples in (
            ("supervisor.start to the run's end", whole),
            ("  of it until `start` returned, its rows committed", starting),
            ("the same with a sub-agent that does nothing", spawning),
            ("an engine's execution alone, with its end committed", await through_an_engine(count)),
            ("watching an ordinary agent's class", await guarded(count)),
            ("validating a context", await of_a_context(count)),
            ("making an emitter", await of_an_emitter(count)),
            ("a nursery with one task, by itself", await of_a_nursery(count)),
            ("a part of a model's answer, by itself", await of_parts(count, in_time=False)),
            ("the same within the model's deadlines", await of_parts(count, in_time=True)),
        ):
            found.setdefault(what, []).extend(samples)
    return [Row(what, samples) for what, samples in found.items()]


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title="Engine: µs a run", box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("what")
    for heading in ("median", "p99"):
        table.add_column(heading, justify="right")
    for row in rows:
        p99 = quantiles(row.samples, n=100)[98]
        table.add_row(row.what, f"{median(row.samples):.2f}", f"{p99:.2f}")
    console.print(table)
    console.print(
        f"{len(rows[0].samples):,} samples a row. Python {platform.python_version()}, "
        f"trio {version('trio')}, msgspec {version('msgspec')}.",
        highlight=False,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000, help="of a round (2000)")
    parser.add_argument("--rounds", type=int, default=5, help="how often all is measured (5)")
    options = parser.parse_args()
    show(trio.run(measure, options.runs, options.rounds), Console())


if __name__ == "__main__":
    main()
