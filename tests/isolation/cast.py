"""Who acts in a story: agents, tools, a model and a store, each of which handles secrets.

Classes and tools are shared by all runs, as in a real process; whatever belongs to one story is
in its `Stage`, which agents look up in `STAGE`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Final

import msgspec
import trio
from tests.isolation.canaries import FAULT, HIDDEN, canary, owner_of

from creche import (
    AgentClassRegistry,
    Commit,
    MemoryStore,
    Message,
    ModelAgent,
    ModelError,
    ModelPart,
    RunContext,
    RunError,
    Step,
    StoreUnavailableError,
    SubagentResult,
    TextDelta,
    Tool,
    ToolCallRequest,
    ToolContext,
    ToolMessage,
    ToolSpec,
    Usage,
    UserExecutionContext,
    UserMessage,
    text_of,
    tool,
)


class Script(msgspec.Struct, frozen=True):
    """What a run is told to do; travels as the words of the user's message."""

    secret: str
    steps: tuple[str, ...]
    end: str  # done, fails, told, hangs


def script_in(messages: Sequence[Message]) -> Script:
    """The script in the last thing that a user said."""
    said = next(message for message in reversed(messages) if isinstance(message, UserMessage))
    return msgspec.json.decode(text_of(said), type=Script)


def own(context: UserExecutionContext, place: str) -> str:
    """A canary of the user whose context this is, as its metadata has it where there is any."""
    owner = context.metadata.get("owner") or owner_of(context.user_id)
    return canary(owner, place, context.metadata.get("mark", "0"))


class Stage:
    """What one story's agents share with the test, which looks at it later."""

    def __init__(self) -> None:
        self.trace: list[str] = []  # who did what, in the order of doing
        self.seen: list[tuple[str, str, str]] = []  # (user, run, what its agent was given)
        self.mixed_up: list[str] = []  # agents and tools that found what they did not leave there

    def note(self, context: UserExecutionContext, what: str) -> None:
        self.trace.append(f"{context.user_id} {context.run_id}: {what}")

    def witness(self, run: RunContext) -> None:
        """Write down what an agent was given, as the agent could."""
        said = [f"{m!r}" for m in run.messages]
        identity = f"{run.context.user_id} {run.context.run_id} {dict(run.context.metadata)}"
        self.seen.append((run.context.user_id, run.context.run_id, f"{identity} {said}"))
        self.note(run.context, f"begins after {len(said)} messages")


# Set before a story's tasks begin. No agent's class could have it: classes are shared by stories.
STAGE: Final = ContextVar[Stage]("stage")


# --- tools


@tool
async def echo(secret: str, password: str, call: ToolContext) -> Any:
    """Say a secret back, and whom it was called for."""
    await trio.lowlevel.checkpoint()
    result = own(call.context, "result")
    return {"echo": secret, "owner": call.context.user_id, "result": result, "api_key": password}


@tool
async def breaks(secret: str, call: ToolContext) -> None:
    """Fail with words that should have been kept."""
    await trio.lowlevel.checkpoint()
    raise ValueError(f"{secret} password={own(call.context, HIDDEN)}")


@tool
async def waits(secret: str) -> str:
    """Wait for as long as the tool may."""
    await trio.sleep_forever()
    return secret


TOOLS: Final[tuple[Tool, ...]] = (echo, breaks, waits)


# --- agents


class Actor:
    """Does what its script says, step by step, with something in its hands all the while."""

    tools: ClassVar[tuple[Tool, ...]] = TOOLS

    def __init__(self) -> None:
        self.secret = ""
        self.memory = begin_memory(self)

    async def run(self, run: RunContext) -> dict[str, str]:
        stage, context = STAGE.get(), run.context
        stage.witness(run)
        script = script_in(run.messages)
        self.secret = script.secret
        for number, step in enumerate(script.steps, 1):
            stage.note(context, step)
            self.memory.append(f"{own(context, 'state')} {step}")
            rest = msgspec.structs.replace(script, steps=script.steps[number:])
            await self._take(step, run, rest)
            if self.secret != script.secret:
                stage.mixed_up.append(f"{context.user_id}'s agent has the state of another run")
        await self._end(run, script)
        return {"secret": self.secret}

    async def _take(self, step: str, run: RunContext, rest: Script) -> None:
        context = run.context
        if step == "says":
            await run.emit.text(f"{self.secret} ")
            await trio.lowlevel.checkpoint()
            await run.emit.text(own(context, "text"))
        elif step == "calls":
            result = await run.call_tool(
                "echo",
                {"secret": own(context, "argument"), "password": own(context, HIDDEN)},
            )
            if result.value["owner"] != context.user_id:
                STAGE.get().mixed_up.append(f"{context.user_id}'s tool works for another")
        elif step == "breaks":
            await run.call_tool("breaks", {"secret": own(context, "error")})
        elif step == "waits":
            await run.call_tool("waits", {"secret": own(context, "argument")})
        elif step == "sleeps":
            await trio.sleep(0.01)
        elif step == "splits":
            async with trio.open_nursery() as nursery:
                for name in ("calls", "remembers"):
                    nursery.start_soon(self._take, name, run, rest)
        elif step == "remembers":
            await run.emit.custom("memory", list(self.memory))
            await trio.lowlevel.checkpoint()
        elif step == "cleans up":
            async with run.cleanup():
                await trio.sleep(0.001)
        else:
            await self._hand_on(step, run, rest)

    async def _hand_on(self, step: str, run: RunContext, rest: Script) -> None:
        """Have sub-agents do what is left of the script."""
        told = msgspec.json.encode(rest).decode()
        if step == "delegates":
            self._check(run, rest, await run.spawn("actor", told))
        elif step == "asks":
            self._check(run, rest, await run.spawn("asker", told))
        elif step == "divides":
            # The one whose failure matters may stop the other.
            steps = [
                Step(agent="actor", input=told, continue_on_error=True),
                Step(agent="actor", input=told),
            ]
            for part in await run.parallel(steps):
                self._check(run, rest, part)

    def _check(self, run: RunContext, rest: Script, result: SubagentResult) -> None:
        """A sub-agent ended as its own script has it, and came back with its own user's words."""
        stage, context = STAGE.get(), run.context
        stage.seen.append((context.user_id, context.run_id, f"{result!r}"))
        stage.note(context, f"its {result.agent} is {result.status}")
        wanted = {"secret": self.secret} if result.agent == "actor" else None
        if result.ok and (result.result != wanted or rest.end != "done"):
            stage.mixed_up.append(f"{context.user_id}'s sub-agent ended as another's: {result}")
        if result.status == "failed" and rest.end not in {"fails", "told"}:
            stage.mixed_up.append(f"{context.user_id}'s sub-agent failed: {result}")

    async def _end(self, run: RunContext, script: Script) -> None:
        if script.end == "fails":
            # Nobody but its own log may read this.
            raise ValueError(own(run.context, FAULT))
        if script.end == "told":
            raise RunError(f"{own(run.context, 'error')} password={own(run.context, HIDDEN)}")
        if script.end == "hangs":
            await trio.sleep_forever()


def begin_memory(actor: Actor) -> list[str]:
    """What an instance keeps; mutants put something else here, as the class is guarded."""
    del actor
    return []


STEPS: Final = (
    *("says", "calls", "breaks", "sleeps", "splits", "remembers", "cleans up"),
    *("delegates", "asks", "divides"),
)
ENDS: Final = ("done", "done", "done", "fails", "told", "hangs")


class Asker(ModelAgent):
    """The model-and-tools loop, as most agents are."""

    tools: ClassVar[tuple[Tool, ...]] = TOOLS

    async def run(self, run: RunContext) -> None:
        STAGE.get().witness(run)
        await super().run(run)


REGISTRY: Final = AgentClassRegistry({"actor": Actor, "asker": Asker})


class CanaryModel:
    """Calls a tool once per `calls` step, then says the secret, and what the tools said."""

    name = "canary"

    @contextlib.asynccontextmanager
    async def open_stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> AsyncIterator[AsyncIterator[ModelPart]]:
        del tools
        async with contextlib.aclosing(self._parts(messages)) as parts:
            yield parts

    async def _parts(self, messages: Sequence[Message]) -> AsyncGenerator[ModelPart]:
        script = script_in(messages)
        turn = 0
        for message in reversed(messages):
            if isinstance(message, UserMessage):
                break
            turn += isinstance(message, ToolMessage)
        _, owner, _, mark = script.secret.split("-")
        if turn < script.steps.count("calls"):
            arguments = {"secret": canary(owner, "argument", mark), "password": "x"}
            yield ToolCallRequest("echo", msgspec.json.encode(arguments).decode())
            return
        for word in (script.secret, canary(owner, "text", mark)):
            yield TextDelta(f"{word} ")
            await trio.lowlevel.checkpoint()
        if script.end in {"fails", "told"}:
            raise ModelError(f"{canary(owner, 'error', mark)} token={canary(owner, HIDDEN, mark)}")
        if script.end == "hangs":
            await trio.sleep_forever()
        yield Usage(len(messages), 2)


class WatchedStore(MemoryStore):
    """A memory store that notes the order of commits, and may refuse one in words of its data."""

    def __init__(self, stage: Stage, refused: frozenset[int]) -> None:
        super().__init__()
        self._stage = stage
        self._refused = refused
        self._commits = 0

    async def commit(self, commits: Sequence[Commit]) -> None:
        self._commits += 1
        for commit in commits:
            upto = commit.chunk.last_seq if commit.chunk else None
            self._stage.trace.append(f"commit {commit.user_id} {commit.thread_id} {upto}")
        if self._commits in self._refused and len(commits) == 1:
            # A driver prints the statement's parameters: the thread's own, here.
            raise StoreUnavailableError(f"not taken: {commits[0].thread_id}")
        if self._commits % 3 == 0:
            await trio.lowlevel.checkpoint()
        await super().commit(commits)
