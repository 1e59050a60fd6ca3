"""Planted leaks, each of another kind, which the checks must find: proof that they can fail.

A mutant replaces one thing of creche for as long as a block lasts. This is the only place where
tests reach into creche to change it; nothing outside the tests can turn these on.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from types import MappingProxyType
from typing import Any, Final

import trio
from tests.isolation import cast

from creche import (
    CrecheError,
    EventEmitter,
    ExecutionEngine,
    Journal,
    Journals,
    MemoryStore,
    Run,
    RunContext,
    SecurityAudit,
    Supervisor,
    ToolDispatcher,
    UserExecutionContext,
    _agents,
    _emitter,
    _ending,
    _engine,
    _journal,
    _supervisor,
    events,
    leaves,
)
from creche._emitter import EngineVoice, SubagentEmitter
from creche._ending import Ending
from creche._messages import AgentInput
from creche._run_life import RunLife
from creche._subagents import Subagents
from creche._tool_calls import ToolCalls
from creche._tracing import SpanBlock, Spans


@contextlib.contextmanager
def replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """In this block, `owner.name` is what `change` makes of it."""
    original = vars(owner)[name]
    setattr(owner, name, change(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


Planting = Callable[[], contextlib.AbstractContextManager[None]]

_planted: Final[dict[str, Planting]] = {}


def mutant(planting: Planting) -> Planting:
    """List this leak. Its name is the function's; its docstring says what is wrong."""
    _planted[planting.__name__.replace("_", " ")] = planting
    return planting


# --- caches and other things that live in a module


@mutant
def history_cached_without_the_user() -> Any:
    """A module-level cache whose key is the thread alone."""
    cache: dict[Any, Any] = {}

    def change(original: Any) -> Any:
        async def history(self: Journal, last_runs: int) -> Any:
            if self.thread_id not in cache:
                cache[self.thread_id] = await original(self, last_runs)
            return cache[self.thread_id]

        return history

    return replaced(Journal, "history", change)


@mutant
def mutable_default_argument() -> Any:
    """A list as a default, to which each call adds."""

    def change(original: Any) -> Any:
        def init(self: Any, run: Any, *, messages: Any, _all: list[Any] = [], **more: Any) -> None:  # noqa: B006
            _all.extend(messages)
            original(self, run, messages=tuple(_all), **more)

        return init

    return replaced(RunContext, "__init__", change)


@mutant
def global_slot_for_the_journal() -> Any:
    """One slot for "the current journal": the last run to begin has it."""
    slot: dict[str, Any] = {}

    def change(original: Any) -> Any:
        def say(self: EventEmitter, event: Any, **more: Any) -> Any:
            if isinstance(event, events.RunStarted):
                slot["journal"] = self._journal
            elif isinstance(event, events.TextMessageContent):
                # `text` has been told who speaks, and asks the slot where to.
                return slot["journal"].append(event)
            return original(self, event, **more)

        return say

    return replaced(EventEmitter, "_say", change)


@mutant
def function_of_a_context_cached() -> Any:
    """`functools.cache` on a function that takes a context: it is never let go."""

    @functools.cache
    def trail(context: UserExecutionContext) -> Any:
        return context.audit_trail()

    def change(original: Any) -> Any:
        def init(self: Any, context: Any, *rest: Any, **more: Any) -> None:
            trail(context)
            original(self, context, *rest, **more)

        return init

    return replaced(EventEmitter, "__init__", change)


@mutant
def emitters_listed_for_ever() -> Any:
    """A registry of what is live that nobody tidies."""
    listed: list[Any] = []

    def change(original: Any) -> Any:
        def init(self: Any, *rest: Any, **more: Any) -> None:
            listed.append(self)
            original(self, *rest, **more)

        return init

    return replaced(EventEmitter, "__init__", change)


@mutant
def conversation_shared_by_thread_id() -> Any:
    """The kept conversation belongs to a thread id, whoever's thread it is."""
    kept: dict[Any, Any] = {}

    def change(original: Any) -> Any:
        def fresh(self: Journal) -> Any:
            return kept.setdefault(self.thread_id, original(self))

        return fresh

    return replaced(Journal, "_new_conversation", change)


# --- one object for several runs


@mutant
def emitter_shared_by_thread_id() -> Any:
    """An emitter is looked up before one is made."""
    pool: dict[Any, Any] = {}

    def change(original: Any) -> Any:
        def pooled(context: Any, *rest: Any, **more: Any) -> Any:
            if context.thread_id not in pool:
                pool[context.thread_id] = original(context, *rest, **more)
            return pool[context.thread_id]

        return pooled

    return replaced(_engine, "EventEmitter", change)


@mutant
def dispatcher_shared() -> Any:
    """One dispatcher for all runs of the process."""
    pool: list[Any] = []

    def change(original: Any) -> Any:
        def pooled(*rest: Any, **more: Any) -> Any:
            pool.append(original(*rest, **more))
            return pool[0]

        return pooled

    return replaced(_engine, "ToolDispatcher", change)


@mutant
def dispatcher_bound_to_the_last_run() -> Any:
    """A dispatcher of each run's own, but its context sits on the class."""

    def change(original: Any) -> Any:
        async def result(self: ToolCalls, *rest: Any, **more: Any) -> Any:
            Shared.context = self._context
            await trio.lowlevel.checkpoint()
            self._context = Shared.context
            return await original(self, *rest, **more)

        return result

    class Shared:
        context: Any = None

    return replaced(ToolCalls, "result", change)


@mutant
def agent_instance_shared() -> Any:
    """The isolated agent is made, and then the shared one is run."""
    instances: dict[type, Any] = {}

    def change(original: Any) -> Any:
        def make(agent_class: type) -> Any:
            original(agent_class)
            return instances.setdefault(agent_class, agent_class())

        return make

    return replaced(_agents, "make_instance", change)


@mutant
def agent_class_attribute_written_by_runs() -> Any:
    """An agent's memory is the class's."""
    memory: list[str] = []
    return replaced(cast, "begin_memory", lambda _: lambda actor: memory)


@mutant
def class_written_by_its_instances() -> Any:
    """An agent keeps what it knows on its class, under a name that was not there."""

    def change(_: Any) -> Any:
        def begin_memory(actor: Any) -> Any:
            kind = type(actor)
            kind.kept = getattr(kind, "kept", [])
            return kind.kept

        return begin_memory

    return replaced(cast, "begin_memory", change)


@mutant
def run_context_pooled() -> Any:
    """A context object is used again for the next run, which fills it in anew."""
    pool: list[RunContext] = []

    def change(original: Any) -> Any:
        def pooled(*rest: Any, **more: Any) -> Any:
            if not pool:
                pool.append(original(*rest, **more))
            pool[0].__init__(*rest, **more)  # type: ignore[misc]
            return pool[0]

        return pooled

    return replaced(_engine, "RunContext", change)


@mutant
def buffer_recycled() -> Any:
    """All entries are encoded into one buffer."""
    buffer = bytearray()

    def change(original: Any) -> Any:
        def numbered(*rest: Any) -> Any:
            buffer[:] = original(*rest)
            return buffer

        return numbered

    return replaced(_journal, "numbered", change)


@mutant
def identity_overwritten_on_a_shared_object() -> Any:
    """Who commits is written on something shared before, and read from it after."""
    shared: dict[str, Any] = {}

    def change_append(original: Any) -> Any:
        def append(self: Journal, *rest: Any, **more: Any) -> Any:
            shared[self.thread_id] = self.user_id
            return original(self, *rest, **more)

        return append

    def change_take(original: Any) -> Any:
        def take(self: Journal) -> Any:
            commit = original(self)
            if commit is None or commit.chunk is None:
                return commit
            return dataclasses.replace(commit, user_id=shared[self.thread_id])

        return take

    stack = contextlib.ExitStack()
    stack.enter_context(replaced(Journal, "append_encoded", change_append))
    stack.enter_context(replaced(Journal, "take", change_take))
    return stack


# --- identity from elsewhere than the argument


@mutant
def context_var_with_a_mutable_default() -> Any:
    """A ContextVar whose default is one dict for all tasks."""
    variable: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("v", default={})  # noqa: B039

    def change(original: Any) -> Any:
        async def result(self: ToolCalls, *rest: Any, **more: Any) -> Any:
            variable.get()["context"] = self._context
            await trio.lowlevel.checkpoint()
            self._context = variable.get()["context"]
            return await original(self, *rest, **more)

        return result

    return replaced(ToolCalls, "result", change)


@mutant
def context_var_of_a_shared_task() -> Any:
    """Tools are called in the context of the task that was there first."""
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("v")
    first: list[contextvars.Context] = []

    def change(original: Any) -> Any:
        async def result(self: ToolCalls, *rest: Any, **more: Any) -> Any:
            variable.set(self._context)
            if not first:
                first.append(contextvars.copy_context())
            self._context = first[0][variable]
            return await original(self, *rest, **more)

        return result

    return replaced(ToolCalls, "result", change)


@mutant
def callbacks_over_a_loop_variable() -> Any:
    """Callbacks made in a loop, all of which see the loop's last turn."""
    contexts: list[Any] = []

    def change(original: Any) -> Any:
        async def result(self: ToolCalls, *rest: Any, **more: Any) -> Any:
            contexts.append(self._context)
            await trio.lowlevel.checkpoint()
            callbacks = {}
            for context in contexts:
                callbacks[id(context)] = lambda: context  # noqa: B023
            self._context = callbacks[id(self._context)]()
            return await original(self, *rest, **more)

        return result

    return replaced(ToolCalls, "result", change)


# --- look-ups that forget the owner


@mutant
def journals_keyed_by_thread_only() -> Any:
    """A thread id is taken for one thread, whoever asks."""

    def change(original: Any) -> Any:
        def attached(self: Journals, user_id: Any, thread_id: Any) -> Any:
            for owner, thread in self._slots:
                if thread == thread_id:
                    user_id = owner
            return original(self, user_id, thread_id)

        return attached

    return replaced(Journals, "attached", change)


@mutant
def messages_queried_without_the_owner() -> Any:
    """A store's query for messages has no `user_id` in it."""

    def change(original: Any) -> Any:
        async def messages(self: MemoryStore, user_id: Any, thread_id: Any, **more: Any) -> Any:
            for owner, thread in self._threads:
                if thread == thread_id:
                    user_id = owner
            return await original(self, user_id, thread_id, **more)

        return messages

    return replaced(MemoryStore, "messages", change)


@mutant
def chunks_queried_without_the_owner() -> Any:
    """A store's query for old entries has no `user_id` in it."""

    def change(original: Any) -> Any:
        async def chunks(self: MemoryStore, user_id: Any, thread_id: Any, **more: Any) -> Any:
            for owner, thread in self._threads:
                if thread == thread_id:
                    user_id = owner
            return await original(self, user_id, thread_id, **more)

        return chunks

    return replaced(MemoryStore, "chunks", change)


@mutant
def search_of_everybodys_messages() -> Any:
    """Search looks through all users' messages."""

    def change(original: Any) -> Any:
        async def search(self: MemoryStore, user_id: Any, query: str, *, limit: int) -> Any:
            users = dict.fromkeys(owner for owner, _ in self._threads)
            return [hit for user in users for hit in await original(self, user, query, limit=limit)]

        return search

    return replaced(MemoryStore, "search_messages", change)


@mutant
def runs_found_without_the_owner() -> Any:
    """`find` goes by the run's id alone."""

    def change(_: Any) -> Any:
        def find(self: Supervisor, user_id: Any, run_id: Any) -> Any:
            del user_id
            lives = (lives.get(run_id) for lives in self._runs.values())
            return next((Run(life) for life in lives if life is not None), None)

        return find

    return replaced(Supervisor, "find", change)


@mutant
def cancel_by_run_id_alone() -> Any:
    """A cancel reaches all runs that are called so."""
    all_runs: dict[str, list[RunLife]] = {}

    def change_init(original: Any) -> Any:
        def init(self: RunLife, context: Any, *rest: Any) -> None:
            original(self, context, *rest)
            all_runs.setdefault(context.run_id, []).append(self)

        return init

    def change_cancel(original: Any) -> Any:
        def cancel(self: RunLife, *rest: Any) -> None:
            for life in all_runs[self.context.run_id]:
                original(life, *rest)

        return cancel

    stack = contextlib.ExitStack()
    stack.enter_context(replaced(RunLife, "__init__", change_init))
    stack.enter_context(replaced(RunLife, "cancel", change_cancel))
    return stack


@mutant
def deletion_by_thread_id_alone() -> Any:
    """Deleting a thread ends whatever runs on a thread of that name."""

    def change(original: Any) -> Any:
        async def cancel(self: Supervisor, user_id: Any, thread_id: Any, *rest: Any) -> None:
            for user in (user_id, *self._runs):
                await original(self, user, thread_id, *rest)

        return cancel

    return replaced(Supervisor, "cancel_thread", change)


@mutant
def interruption_by_thread_id_alone() -> Any:
    """A run that takes others' place ends whatever runs on a thread of that name."""

    def change(original: Any) -> Any:
        def supersede(self: Supervisor, life: RunLife) -> None:
            original(self, life)
            for lives in self._runs.values():
                for other in lives.values():
                    if other is not life and other.context.thread_id == life.context.thread_id:
                        other.cancel("superseded")

        return supersede

    return replaced(Supervisor, "_supersede", change)


@mutant
def run_ids_used_again() -> Any:
    """Nobody looks whether a run of that id has been."""

    def change(_: Any) -> Any:
        return lambda self, user_id, run_id: None

    return replaced(MemoryStore, "_find_run", change)


# --- readers


@mutant
def reader_on_the_journal_that_comes_first() -> Any:
    """A reader gets the first live journal of that thread's name."""

    def change(original: Any) -> Any:
        def open_events(self: Supervisor, user_id: Any, thread_id: Any, **more: Any) -> Any:
            keys = [key for key in self.journals._slots if key[1] == thread_id]
            return original(self, *(keys or [(user_id, thread_id)])[0], **more)

        return open_events

    return replaced(Supervisor, "open_events", change)


@mutant
def index_read_twice_with_an_await_between() -> Any:
    """A rare race: what was asked for is written down, and read again after a checkpoint."""
    asked: dict[str, Any] = {}

    def change(original: Any) -> Any:
        @contextlib.asynccontextmanager
        async def attached(self: Journals, user_id: Any, thread_id: Any) -> AsyncIterator[Any]:
            asked["key"] = (user_id, thread_id)
            await trio.lowlevel.checkpoint()
            async with original(self, *asked["key"]) as journal:
                yield journal

        return attached

    return replaced(Journals, "attached", change)


@mutant
def subscription_that_survives() -> Any:
    """A reader that has gone is still counted among those who hold the journal."""

    def change(original: Any) -> Any:
        @contextlib.asynccontextmanager
        async def attached(self: Journals, *key: Any) -> AsyncIterator[Any]:
            async with original(self, *key) as journal:
                try:
                    yield journal
                except trio.Cancelled:
                    self._slots[key].holders += 1
                    raise

        return attached

    return replaced(Journals, "attached", change)


@mutant
def resumed_one_too_far() -> Any:
    """Who comes back to a thread misses an entry if it is in the store only."""

    def change(original: Any) -> Any:
        async def read_stored(self: Journal, after: int) -> Any:
            entries = await original(self, after)
            return entries[1:] if len(entries) > 1 else entries

        return read_stored

    return replaced(Journal, "_read_stored", change)


# --- what gets out


@mutant
def payload_logged() -> Any:
    """Every event is logged whole."""

    def change(original: Any) -> Any:
        def say(self: EventEmitter, event: Any, **more: Any) -> Any:
            logging.getLogger("creche.emitter").debug("says %s", event)
            return original(self, event, **more)

        return say

    return replaced(EventEmitter, "_say", change)


@mutant
def span_carries_the_tools_arguments() -> Any:
    """Whoever looks at spans can read what a tool was called with."""
    called: contextvars.ContextVar[Any] = contextvars.ContextVar("called")

    def change_dispatch(original: Any) -> Any:
        async def dispatch(self: ToolDispatcher, name: str, params: Any, **more: Any) -> Any:
            called.set(params)
            return await original(self, name, params, **more)

        return dispatch

    def change_block(original: Any) -> Any:
        def block(self: Spans, kind: Any, name: str, **more: Any) -> Any:
            told = f"{name} {called.get()}" if kind == "tool" else name
            return original(self, kind, told, **more)

        return block

    stack = contextlib.ExitStack()
    stack.enter_context(replaced(ToolDispatcher, "dispatch", change_dispatch))
    stack.enter_context(replaced(Spans, "block", change_block))
    return stack


@mutant
def span_within_the_one_that_began_last() -> Any:
    """What a span is within is looked up in a slot that all runs share."""
    slot: dict[str, Any] = {}

    def change(original: Any) -> Any:
        def enter(self: SpanBlock) -> Any:
            if self._above is not None:
                self._above = slot.get("last", self._above)
            original(self)
            slot["last"] = self._span
            return self

        return enter

    return replaced(SpanBlock, "__enter__", change)


@mutant
def failure_told_with_the_one_before() -> Any:
    """An error's words have another's data in them."""
    last = [""]

    def change(original: Any) -> Any:
        def public(failure: BaseException, *rest: Any) -> Any:
            code, message = original(failure, *rest)
            before, last[0] = last[0], " ".join(map(str, leaves(failure)))
            return code, f"{message} (after {before})"

        return public

    return replaced(_ending, "public", change)


@mutant
def failure_told_as_it_is() -> Any:
    """A client is told the words of an agent's exception."""

    def change(original: Any) -> Any:
        def public(failure: BaseException, *rest: Any) -> Any:
            code, message = original(failure, *rest)
            return code, " ".join([message, *map(str, leaves(failure))])

        return public

    return replaced(_ending, "public", change)


@mutant
def redaction_off() -> Any:
    """Events go out as agents and tools made them."""
    return replaced(_emitter, "REDACTIONS", lambda _: MappingProxyType({}))


@mutant
def metadata_sent_to_the_client() -> Any:
    """What a request carried for the server's own use is said in an event."""

    def change(original: Any) -> Any:
        def begin(self: EngineVoice, *rest: Any) -> Any:
            entry = original(self, *rest)
            value = dict(self._emitter._context.metadata)
            self._emitter._journal.append(events.Custom(name="context", value=value))
            return entry

        return begin

    return replaced(EngineVoice, "begin", change)


# --- ends


@mutant
def terminal_said_twice() -> Any:
    """The end is said once more, in case somebody missed it."""

    def change(original: Any) -> Any:
        def end(self: EngineVoice, terminal: Any, *rest: Any, **more: Any) -> Any:
            entry = original(self, terminal, *rest, **more)
            self._emitter._journal.append(terminal)
            return entry

        return end

    return replaced(EngineVoice, "end", change)


@mutant
def terminal_from_another_task() -> Any:
    """Who cancels says at once that the run has been cancelled; its own task says it again."""
    journals: dict[int, Journal] = {}

    def change_execute(original: Any) -> Any:
        async def execute(self: ExecutionEngine, *rest: Any) -> Any:
            journals[id(self._life)] = self._journal
            return await original(self, *rest)

        return execute

    def change_cancel(original: Any) -> Any:
        def cancel(self: RunLife, *rest: Any) -> None:
            original(self, *rest)
            if id(self) in journals and self.outcome is None:
                terminal = events.RunFinished(
                    thread_id=self.context.thread_id,
                    run_id=self.context.run_id,
                    outcome=events.Cancelled(),
                )
                journals[id(self)].append(terminal)

        return cancel

    stack = contextlib.ExitStack()
    stack.enter_context(replaced(ExecutionEngine, "execute", change_execute))
    stack.enter_context(replaced(RunLife, "cancel", change_cancel))
    return stack


@mutant
def success_made_up() -> Any:
    """Whatever stopped a run, it is reported as having gone well."""

    def change(original: Any) -> Any:
        def decide(self: Ending, *rest: Any) -> Any:
            return dataclasses.replace(original(self, *rest), status="success")

        return decide

    return replaced(Ending, "outcome", change)


@mutant
def stop_that_stops_nothing() -> Any:
    """A cancel is noted, and nothing is cancelled until the deadline."""

    def change(_: Any) -> Any:
        def cancel(self: RunLife, reason: Any) -> None:
            self.reason = self.reason or reason

        return cancel

    return replaced(RunLife, "cancel", change)


@mutant
def result_of_the_run_before() -> Any:
    """What an agent returned is kept where the next run's engine finds it."""
    kept: list[Any] = []

    def change(original: Any) -> Any:
        def decide(self: ExecutionEngine, finish: Any, *rest: Any) -> Any:
            if finish.result is not None:
                kept.append(finish.result)
                finish.result = kept[-2:][0]
            return original(self, finish, *rest)

        return decide

    return replaced(Ending, "outcome", change)


# --- sub-agents and the audit


@mutant
def child_context_cached_by_operation() -> Any:
    """A sub-agent's context is looked up by what it is for."""
    cache: dict[str, Any] = {}

    def change(original: Any) -> Any:
        def child(self: UserExecutionContext, operation: str, **extra: Any) -> Any:
            if operation not in cache:
                cache[operation] = original(self, operation, **extra)
            return cache[operation]

        return child

    return replaced(UserExecutionContext, "child", change)


@mutant
def subagents_told_what_others_were() -> Any:
    """What sub-agents are asked is collected in one list."""
    asked_before: list[Any] = []

    def change(original: Any) -> Any:
        def handed(self: Subagents, parent: Any, context: Any, asked: Any, *rest: Any) -> Any:
            asked_before.extend(asked)
            return original(self, parent, context, tuple(asked_before), *rest)

        return handed

    return replaced(Subagents, "_handed", change)


@mutant
def subagents_result_kept_by_name() -> Any:
    """Who asks the same agent once more gets the answer that there is."""
    kept: dict[str, Any] = {}

    def change(original: Any) -> Any:
        async def spawn(self: Subagents, parent: Any, agent: str, state: Any) -> Any:
            if agent not in kept:
                kept[agent] = await original(self, parent, agent, state)
            await trio.lowlevel.checkpoint()
            return kept[agent]

        return spawn

    return replaced(Subagents, "spawn", change)


@mutant
def subagent_speaks_in_another_run() -> Any:
    """A sub-agent's voice is that of whichever run had one last."""
    slot: dict[str, Any] = {}

    def change(original: Any) -> Any:
        def say(self: SubagentEmitter, event: Any) -> Any:
            before = slot.setdefault("parent", self._parent)
            self._parent, slot["parent"] = before, self._parent
            return original(self, event)

        return say

    return replaced(SubagentEmitter, "_say_within_limits", change)


@mutant
def audited_with_the_payload() -> Any:
    """The audit is told all that is known of a request."""

    def change(_: Any) -> Any:
        async def record_limit(
            audit: SecurityAudit, context: Any, error: CrecheError, operation: str
        ) -> None:
            await audit.record(
                "limit_hit",
                user=context.user_id,
                resource=f"runs of {dict(context.metadata)}",
                operation=operation,
                outcome=str(error),
            )

        return record_limit

    return replaced(_supervisor, "record_limit", change)


# --- what outlives its run


@mutant
def task_that_outlives_the_run() -> Any:
    """A tool call leaves a task behind in no run's nursery."""

    def change(original: Any) -> Any:
        async def dispatch(self: ToolDispatcher, *rest: Any, **more: Any) -> Any:
            trio.lowlevel.spawn_system_task(trio.sleep, 10_000.0)
            return await original(self, *rest, **more)

        return dispatch

    return replaced(ToolDispatcher, "dispatch", change)


@mutant
def runs_never_unlisted() -> Any:
    """A user's table of runs keeps one that has ended."""

    def change(original: Any) -> Any:
        async def submit(self: Supervisor, context: Any, agent: str, state: AgentInput) -> Any:
            run = await original(self, context, agent, state)
            self._runs.setdefault(context.user_id, {})[f"{context.run_id}'"] = run._life  # type: ignore[index]
            return run

        return submit

    return replaced(Supervisor, "submit", change)


MUTANTS: Final = MappingProxyType(_planted)
