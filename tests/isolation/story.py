"""One interleaving: a few users do everything at once, as their seed has it, on real parts.

`planned` makes of a seed what each user will do; `play` does it and brings back the evidence,
which `checks` judges. Nothing in here decides by anything but the seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, get_args

import msgspec
import trio
from tests.isolation.canaries import canary
from tests.isolation.cast import (
    ENDS,
    REGISTRY,
    STAGE,
    STEPS,
    TOOLS,
    CanaryModel,
    Script,
    Stage,
    WatchedStore,
)
from tests.tracing import RecordingTracer

from creche import (
    AuditQuery,
    AuditRecord,
    CrecheError,
    Entry,
    Flaw,
    Infrastructure,
    Journals,
    Limits,
    MemorySink,
    MultitaskStrategy,
    Run,
    RunError,
    RunId,
    Supervisor,
    ThreadDeletedError,
    ThreadId,
    UserExecutionContext,
    UserId,
    open_audit,
    open_journals,
    open_supervisor,
)

LIMITS: Final = Limits(
    run_timeout=30.0,
    tool_timeout=1.0,
    cleanup_timeout=1.0,
    runs_per_thread=2,
    runs_per_user=3,
    journal_bytes=1024,  # so that readers come upon what only the store has
    read_entries=4,
)
STRATEGIES: Final = get_args(MultitaskStrategy)
PATIENCE: Final = 3_600.0  # seconds of fake time, after which a story hangs
SHARED_THREAD: Final = "everybody's"  # ids are scoped to their user, so all may use this one


@dataclasses.dataclass(frozen=True, slots=True)
class Act:
    """Something that a user does; the kind says which of the other fields matter."""

    kind: str  # starts, reuses, cancels, deletes, reads, pries, waits
    thread: str = ""
    agent: str = ""
    run_id: str = ""
    script: Script | None = None
    strategy: MultitaskStrategy = "enqueue"
    since: float = 0.0  # of what the user has read so far, where a reader begins: 0 to 1
    stay: int = 0  # entries after which a reader's connection is lost
    pauses: int = 0  # checkpoints before it


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A whole story."""

    seed: int
    acts: dict[str, tuple[Act, ...]]  # {user: what they do}
    ending: str  # at rest, in the middle, cancelled
    pauses: int  # checkpoints until the ending, where it is in the middle
    refused: frozenset[int]  # commits that the store refuses, by number

    @property
    def mark(self) -> str:
        """What makes this story's canaries unlike any other's."""
        return str(self.seed)


def planned(seed: int) -> Plan:
    """The story of a seed."""
    chance = random.Random(seed)
    mark = str(seed)
    users = 2 if chance.random() < 0.9 else 3
    # Most stories are small: there are more of them then in a second, and the few steps of each
    # are taken in more of their orders.
    most_acts = 2 if chance.random() < 0.8 else 5
    ending = chance.choices(["at rest", "in the middle", "cancelled"], [7, 2, 1])[0]
    refused = frozenset(chance.sample(range(1, 9), 2)) if chance.random() < 0.15 else frozenset()
    return Plan(
        seed=seed,
        acts={f"user-{n}": tuple(_acts(chance, str(n), mark, most_acts)) for n in range(users)},
        ending=ending,
        pauses=chance.randrange(3, 40),
        refused=refused,
    )


def _acts(chance: random.Random, owner: str, mark: str, most: int) -> Iterator[Act]:
    threads = [SHARED_THREAD, canary(owner, "thread", mark)]
    manners = random.Random(f"{mark} {owner}")  # apart, so that the rest is as it was without
    runs = 0
    for number in range(chance.randrange(1, most + 1)):
        kind = (
            "starts"
            if number == 0
            else chance.choices(
                ["starts", "cancels", "deletes", "reads", "pries", "waits"],
                [6, 3, 1, 5, 1, 1],
            )[0]
        )
        thread, pauses = chance.choice(threads), chance.randrange(4)
        if kind == "starts":
            # Double-texting now and then: the next begins while this one runs.
            for _ in range(1 if chance.random() < 0.85 else 2):
                runs += 1
                yield Act(
                    "starts",
                    thread=thread,
                    agent=chance.choice(["actor", "actor", "asker"]),
                    # The same ids at all users: run ids are scoped to their user, too.
                    run_id=f"run-{runs}" if chance.random() < 0.7 else canary(owner, "run", mark),
                    script=_script(chance, canary(owner, "message", mark)),
                    strategy=manners.choices(STRATEGIES, [6, 1, 2, 2])[0],
                    pauses=pauses,
                )
            if number and chance.random() < 0.1:
                # Once its owner's first run is over, somebody gives its id to another.
                yield Act(
                    "reuses",
                    thread=chance.choice(threads),
                    agent="actor",
                    run_id="run-1",
                    script=_script(chance, canary(owner, "message", mark)),
                )
        else:
            yield Act(
                kind,
                thread=thread,
                run_id=f"run-{max(runs, 1)}",
                since=chance.choice([0.0, 0.5, 1.0]),
                stay=chance.randrange(1, 30),
                pauses=pauses,
            )
        if number == 0:
            yield Act("reads", thread=thread, stay=chance.randrange(1, 30))


def _script(chance: random.Random, secret: str) -> Script:
    steps = tuple(chance.choices(STEPS, k=chance.choice([1, 1, 2, 3])))
    if chance.random() < 0.05:
        steps = (*steps, "waits")
    return Script(secret=secret, steps=steps, end=chance.choice(ENDS))


@dataclasses.dataclass(slots=True, eq=False)
class Asked:
    """A run that a user started, and what became of it."""

    user: str
    thread: str
    run_id: str
    agent: str
    script: Script
    handle: Run
    may_be_cancelled: set[str] = dataclasses.field(default_factory=set[str])  # for these reasons
    refused: bool = False
    deleted: bool = False  # with its thread


@dataclasses.dataclass(slots=True, eq=False)
class Session:
    """What one reader was sent before its connection went."""

    user: str
    thread: str
    epoch: str
    after: int
    entries: list[Entry] = dataclasses.field(default_factory=list[Entry])


@dataclasses.dataclass(slots=True, eq=False)
class Evidence:
    """All that a story left behind, everywhere."""

    plan: Plan
    stage: Stage
    store: WatchedStore
    runs: list[Asked] = dataclasses.field(default_factory=list[Asked])
    sessions: list[Session] = dataclasses.field(default_factory=list[Session])
    returned: list[tuple[str, Any]] = dataclasses.field(default_factory=list[tuple[str, Any]])
    errors: list[tuple[str, BaseException]] = dataclasses.field(
        default_factory=list[tuple[str, BaseException]],
    )
    pried: list[str] = dataclasses.field(default_factory=list[str])  # what should not have worked
    logs: list[logging.LogRecord] = dataclasses.field(default_factory=list[logging.LogRecord])
    tracer: RecordingTracer = dataclasses.field(default_factory=RecordingTracer)
    audited: list[AuditRecord] = dataclasses.field(default_factory=list[AuditRecord])
    audit_flaws: tuple[Flaw, ...] = ()
    runs_left: int = 0
    journals_left: int = 0
    tasks_more: int = 0  # than there were before
    hung: bool = False
    crash: BaseException | None = None


class _Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextlib.contextmanager
def captured_logs() -> Iterator[list[logging.LogRecord]]:
    """Every line that anybody logs in this block, and nobody else gets."""
    root = logging.getLogger()
    keeper = _Keeper()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [keeper]
    root.setLevel(logging.DEBUG)
    try:
        yield keeper.records
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def count_tasks() -> int:
    """How many tasks there are in this Trio run."""

    def below(task: trio.lowlevel.Task) -> int:
        return 1 + sum(
            below(child) for nursery in task.child_nurseries for child in nursery.child_tasks
        )

    root = trio.lowlevel.current_root_task()
    assert root is not None
    return below(root)


async def play(seed: int, plan: Plan | None = None) -> Evidence:
    """Play the story of a seed to its end; returns what it left behind."""
    plan = plan or planned(seed)
    stage = Stage()
    store = WatchedStore(stage, plan.refused)
    evidence = Evidence(plan, stage, store)
    tasks = count_tasks()
    entered = STAGE.set(stage)
    with captured_logs() as evidence.logs, trio.move_on_after(PATIENCE) as patience:
        try:
            async with _opened(evidence) as (infrastructure, journals):
                supervisor = await _perform(evidence, infrastructure, journals)
                evidence.runs_left = supervisor.count
            evidence.journals_left = len(journals)
        # Whatever comes out of here is evidence, too.
        except Exception as error:  # noqa: BLE001
            evidence.crash = error
    STAGE.reset(entered)
    evidence.hung = patience.cancelled_caught
    evidence.tasks_more = count_tasks() - tasks
    return evidence


@contextlib.asynccontextmanager
async def _opened(evidence: Evidence) -> AsyncIterator[tuple[Infrastructure, Journals]]:
    """What all users of a story share; its audit is read once it is closed."""
    sink = MemorySink()
    async with (
        open_audit(sink) as audit,
        open_journals(evidence.store, LIMITS, audit=audit) as journals,
    ):
        yield (
            Infrastructure(
                agents=REGISTRY,
                tools=TOOLS,
                models={"default": CanaryModel()},
                limits=LIMITS,
                store=evidence.store,
                audit=audit,
                tracer=evidence.tracer,
            ),
            journals,
        )
    evidence.audited = await sink.find(AuditQuery())
    evidence.audit_flaws = (await sink.check(None)).flaws


async def _perform(
    evidence: Evidence,
    infrastructure: Infrastructure,
    journals: Journals,
) -> Supervisor:
    plan = evidence.plan
    grace = 60.0 if plan.ending == "at rest" else 0.0
    with trio.CancelScope() as everything:
        async with open_supervisor(infrastructure, journals, grace=grace) as supervisor:
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as people:
                    for user, acts in plan.acts.items():
                        people.start_soon(Person(evidence, supervisor, nursery, user).live, acts)
                    if plan.ending != "at rest":
                        people.start_soon(_end_early, evidence, everything, nursery)
                await _see_the_runs_end(evidence)
                nursery.cancel_scope.cancel()
    return supervisor


async def _end_early(
    evidence: Evidence, everything: trio.CancelScope, nursery: trio.Nursery
) -> None:
    for _ in range(evidence.plan.pauses):
        await trio.lowlevel.checkpoint()
    for asked in evidence.runs:
        asked.may_be_cancelled.add("shutdown")
    (everything if evidence.plan.ending == "cancelled" else nursery.cancel_scope).cancel()


async def _see_the_runs_end(evidence: Evidence) -> None:
    for asked in evidence.runs:
        if asked.script.end == "hangs":
            asked.may_be_cancelled.add("user")
            asked.handle.cancel()
    for asked in evidence.runs:
        with contextlib.suppress(CrecheError):
            evidence.returned.append((asked.user, await asked.handle.ended()))


class Person:
    """One user with all of their clients."""

    def __init__(
        self,
        evidence: Evidence,
        supervisor: Supervisor,
        nursery: trio.Nursery,
        user: str,
    ) -> None:
        self.evidence = evidence
        self.supervisor = supervisor
        self.nursery = nursery  # where connections live
        self.user = UserId(user)
        self.position: dict[tuple[str, str], int] = {}  # {(thread, epoch): seq that was read last}

    @property
    def owner(self) -> str:
        return self.user.removeprefix("user-")

    async def live(self, acts: tuple[Act, ...]) -> None:
        for act in acts:
            for _ in range(act.pauses):
                await trio.lowlevel.checkpoint()
            self.evidence.stage.trace.append(f"{self.user} {act.kind} {act.thread}")
            try:
                await self._do(act)
            except CrecheError as error:
                self.evidence.errors.append((self.user, error))

    async def _do(self, act: Act) -> None:
        if act.kind == "starts":
            await self._start(act)
        elif act.kind == "cancels":
            self._cancel(act)
        elif act.kind == "deletes":
            await self._delete(act)
        elif act.kind == "reuses":
            run = self.supervisor.find(self.user, RunId(act.run_id))
            if run is not None:
                with trio.move_on_after(0.2), contextlib.suppress(RunError):
                    await run.ended()
            await self._start(act)
        elif act.kind == "reads":
            self.nursery.start_soon(self._read, act)
        elif act.kind == "pries":
            await self._pry(act)
        elif act.kind == "waits":
            await trio.sleep(0.05)

    async def _start(self, act: Act) -> None:
        assert act.script is not None
        plan = self.evidence.plan
        context = UserExecutionContext.from_request(
            user_id=self.user,
            thread_id=act.thread,
            run_id=act.run_id,
            metadata={
                "owner": self.owner,
                "mark": plan.mark,
                "note": canary(self.owner, "metadata", plan.mark),
            },
        )
        words = msgspec.json.encode(act.script).decode()
        # Marked before it is asked for: whether it comes to that is for the supervisor.
        if act.strategy in {"interrupt", "rollback"}:
            for earlier in self._asked():
                if earlier.thread == act.thread:
                    earlier.may_be_cancelled.add("superseded")
        run = await self.supervisor.submit(
            context, act.agent, words, multitask_strategy=act.strategy
        )
        asked = Asked(self.user, act.thread, act.run_id, act.agent, act.script, run)
        self.evidence.runs.append(asked)
        self.evidence.returned.append((self.user, run))
        asked.refused = True
        await run.accepted()
        asked.refused = False

    def _cancel(self, act: Act) -> None:
        """Stop a run by its id, as a command does it."""
        run = self.supervisor.find(self.user, RunId(act.run_id))
        if run is None:
            return
        if run.user_id != self.user:
            self.evidence.pried.append(f"{self.user} finds {run.user_id}'s run {run.run_id}")
        for asked in self._asked():
            if asked.run_id == act.run_id:
                asked.may_be_cancelled.add("user")
        run.cancel("user")

    async def _delete(self, act: Act) -> None:
        for asked in self._asked():
            if asked.thread == act.thread:
                asked.may_be_cancelled.add("superseded")
                asked.deleted = True
        await self.supervisor.delete_thread(self.user, ThreadId(act.thread))

    def _asked(self) -> Iterator[Asked]:
        return (asked for asked in self.evidence.runs if asked.user == self.user)

    async def _read(self, act: Act) -> None:
        """Read as a WebSocket's sender does, until the connection is lost."""
        with contextlib.suppress(ThreadDeletedError):
            async with self._attached(act) as session:
                with trio.move_on_after(20.0):
                    await self._follow(session, act.stay)
        # It comes back for the rest, from where it was.
        if act.since == 1.0:
            with contextlib.suppress(ThreadDeletedError):
                async with self._attached(act) as session:
                    with trio.move_on_after(20.0):
                        await self._follow(session, 10_000)

    @contextlib.asynccontextmanager
    async def _attached(self, act: Act) -> AsyncIterator[Session]:
        thread = ThreadId(act.thread)
        async with self.supervisor.journals.attached(self.user, thread) as journal:
            if (journal.user_id, journal.thread_id) != (self.user, thread):
                self.evidence.pried.append(
                    f"{self.user} is attached to {journal.user_id}'s journal"
                )
            read = self.position.get((act.thread, journal.epoch), 0)
            session = Session(self.user, act.thread, journal.epoch, int(read * act.since))
            self.evidence.sessions.append(session)
            yield session

    async def _follow(self, session: Session, stay: int) -> None:
        opened = self.supervisor.open_events(
            self.user,
            ThreadId(session.thread),
            after=session.after,
        )
        async with opened as entries:
            async for entry in entries:
                session.entries.append(entry)
                key = (session.thread, session.epoch)
                self.position[key] = max(self.position.get(key, 0), entry.seq)
                if len(session.entries) >= stay:
                    return

    async def _pry(self, act: Act) -> None:
        """Ask for what is somebody else's: it must be as if it did not exist."""
        evidence = self.evidence
        evidence.returned.append((self.user, self.supervisor.runs(self.user)))
        for other in (*evidence.runs,):
            if other.user == self.user:
                continue
            own_ids = {asked.run_id for asked in self._asked()}
            own_threads = {asked.thread for asked in self._asked()}
            if other.run_id not in own_ids:
                if self.supervisor.find(self.user, RunId(other.run_id)) is not None:
                    evidence.pried.append(f"{self.user} finds {other.user}'s {other.run_id}")
                row = await evidence.store.run(self.user, RunId(other.run_id))
                if row is not None:
                    evidence.pried.append(f"{self.user} reads the row of {other.run_id}")
            if other.thread not in own_threads:
                thread = ThreadId(other.thread)
                evidence.returned.append(
                    (self.user, await self.supervisor.journals.store.messages(self.user, thread))
                )
        store = evidence.store
        evidence.returned.append((self.user, await store.threads(self.user)))
        found = await store.search_messages(self.user, "secret", limit=50)
        evidence.returned.append((self.user, found))
