"""Typed functions that an agent may call, and the dispatcher that calls them for one run."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
import threading
import typing
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, overload

import msgspec
import trio

from creche import _events as events
from creche._barrier import leaves, split
from creche._context import MessageId, ToolCallId, UserExecutionContext, new_id
from creche._emitter import EventEmitter, new_tool_call_id, timestamp
from creche._errors import RunError, ToolDefinitionError
from creche._limits import Limits
from creche._models import ToolSpec
from creche._redaction import printable, redact_text

_log: Final = logging.getLogger("creche.tools")


class StopFlag:
    """Tells a sync tool, which Trio cannot interrupt, that nobody waits for its result."""

    __slots__ = ("_flag",)

    def __init__(self) -> None:
        self._flag = threading.Event()

    def __bool__(self) -> bool:
        return self._flag.is_set()

    def set(self) -> None:
        """Ask the tool to stop."""
        self._flag.set()

    def wait(self, timeout: float) -> bool:
        """Sleep for `timeout` seconds, or less if the flag is set; says whether it is."""
        return self._flag.wait(timeout)


@dataclasses.dataclass(frozen=True, slots=True)
class ToolContext:
    """What a tool is handed if its first parameter asks for it by this type."""

    context: UserExecutionContext
    tool_call_id: ToolCallId
    stop: StopFlag


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function with the schema that was made from its type hints. Holds no run's state."""

    name: str
    description: str
    function: Callable[..., Any]
    arguments: type[msgspec.Struct]  # one field a parameter; refuses what is not declared
    parameters: Mapping[str, Any]  # the same as JSON Schema
    context_parameter: str | None  # gets a ToolContext
    is_async: bool

    @property
    def spec(self) -> ToolSpec:
        """What a model is told of it."""
        return ToolSpec(
            name=self.name,
            description=self.description,
            parameters=copy.deepcopy(dict(self.parameters)),  # adapters do edit schemas
        )


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of a function, `async` or not.

    Its name and docstring tell the model what it is for; its type hints become the schema that
    arguments are checked against. A parameter annotated `ToolContext` is not the model's to
    give: it gets the caller's context and a stop flag. A sync function runs in a thread.

    Raises ToolDefinitionError for a parameter without a type hint, `*args` or `**kwargs`.
    """
    if function is None:
        return lambda function: _made(function, name, description)
    return _made(function, name, description)


def _made(function: Callable[..., Any], name: str | None, description: str | None) -> Tool:
    name = name or function.__name__
    hints = typing.get_type_hints(function, include_extras=True)
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    context_parameter: str | None = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            msg = f"tool {name!r}: *args and **kwargs have no schema; name each parameter"
            raise ToolDefinitionError(msg)
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in hints:
            msg = f"tool {name!r}: parameter {parameter.name!r} needs a type hint and a name"
            raise ToolDefinitionError(msg)
        hint = hints[parameter.name]
        if hint is ToolContext:
            context_parameter = parameter.name
        elif parameter.default is parameter.empty:
            fields.append((parameter.name, hint))
        else:
            fields.append((parameter.name, hint, parameter.default))
    try:
        arguments = msgspec.defstruct(name, fields, forbid_unknown_fields=True, kw_only=True)
        schema = _object_schema(arguments)
    except TypeError as error:
        msg = f"tool {name!r}: {error}"
        raise ToolDefinitionError(msg) from error
    return Tool(
        name=name,
        description=description or inspect.cleandoc(function.__doc__ or ""),
        function=function,
        arguments=arguments,
        parameters=MappingProxyType(schema),
        context_parameter=context_parameter,
        is_async=inspect.iscoroutinefunction(function),
    )


def _object_schema(arguments: type[msgspec.Struct]) -> dict[str, Any]:
    """The struct's JSON Schema, with the object itself at the top rather than behind a $ref."""
    (schema,), definitions = msgspec.json.schema_components(
        [arguments],
        ref_template="#/$defs/{name}",
    )
    top = dict(definitions.pop(schema["$ref"].removeprefix("#/$defs/")))
    top.pop("title", None)
    if definitions:
        top["$defs"] = definitions
    return top


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What became of a call. A tool's own failure is a result, too, not a raise."""

    tool_call_id: ToolCallId
    content: str  # what the model reads
    value: Any = None  # what the function returned
    error: str | None = None  # why it failed, or None

    @property
    def ok(self) -> bool:
        return self.error is None


class ToolDispatcher:
    """The tools that one run may call. Made for the run, and gone with it."""

    def __init__(
        self,
        context: UserExecutionContext,
        tools: Iterable[Tool],
        emitter: EventEmitter,
        limits: Limits,
    ) -> None:
        self._context = context
        self._tools = MappingProxyType({tool.name: tool for tool in tools})
        self._emitter = emitter
        self._limits = limits
        self._threads = trio.CapacityLimiter(limits.tool_threads)
        self.stopped: list[str] = []  # names of tools that the run's end interrupted
        self.abandoned: list[str] = []  # names of tools whose threads would not stop
        self._calls = 0  # for the line that is logged at the run's end

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """What a model may be told."""
        return tuple(tool.spec for tool in self._tools.values())

    async def dispatch(
        self,
        name: str,
        params: Mapping[str, Any] | str,
        *,
        tool_call_id: ToolCallId | None = None,
        parent_message_id: MessageId | None = None,
    ) -> ToolResult:
        """Call a tool, saying so in events: start, arguments, end, result.

        `params` is the arguments object or its JSON text. Whatever goes wrong in the call (an
        unknown tool, wrong arguments, the tool's own error, its deadline) is a result that says
        so in words that a model can act on.
        """
        self._calls += 1
        call_id = tool_call_id or new_tool_call_id()
        arguments, faulty = _as_json(params)
        await self._emitter.emit(
            events.ToolCallStart(
                tool_call_id=call_id,
                tool_call_name=name,
                parent_message_id=parent_message_id,
                timestamp=timestamp(),
            ),
        )
        await self._emitter.emit(events.ToolCallArgs(tool_call_id=call_id, delta=arguments))
        await self._emitter.emit(events.ToolCallEnd(tool_call_id=call_id))
        result = faulty(call_id) if faulty else await self._result(call_id, name, arguments)
        await self._emitter.emit(
            events.ToolCallResult(
                message_id=MessageId(new_id()),
                tool_call_id=call_id,
                content=result.content,
                role="tool",
                timestamp=timestamp(),
                metadata=None if result.ok else {"creche": {"error": True}},
            ),
        )
        return result

    async def _result(self, call_id: ToolCallId, name: str, arguments: str) -> ToolResult:
        called = self._tools.get(name)
        if called is None:
            return _failure(call_id, f"There is no tool named {name!r}.")
        try:
            checked = msgspec.json.decode(arguments or "{}", type=called.arguments)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            return _failure(call_id, f"The arguments do not fit the tool's schema: {error}")
        keywords = {field: getattr(checked, field) for field in checked.__struct_fields__}
        stop = StopFlag()
        if called.context_parameter is not None:
            keywords[called.context_parameter] = ToolContext(self._context, call_id, stop)
        call = functools.partial(called.function, **keywords)
        with trio.move_on_after(self._limits.tool_timeout):
            try:
                value = await (call() if called.is_async else self._in_thread(called, call, stop))
                content = _content(value)
                return ToolResult(tool_call_id=call_id, content=content, value=value)
            # Boundary: one tool. SystemExit, GeneratorExit and another library's CancelledError
            # are BaseExceptions, and one tool may end neither its run nor the process.
            except BaseException as error:  # noqa: BLE001
                return self._failed(call_id, name, error)
        self.stopped.remove(name)  # by its own deadline, which is no matter of the run's end
        _log.warning(
            "tool %s took longer than %g s and was stopped",
            name,
            self._limits.tool_timeout,
            extra={**_identity(self._context), "tool_call_id": call_id},
        )
        return _failure(
            call_id,
            f"The tool took longer than {self._limits.tool_timeout:g} s and was stopped.",
        )

    def _failed(self, call_id: ToolCallId, name: str, error: BaseException) -> ToolResult:
        passing, fault = split(error)
        if passing is not None or fault is None:
            self.stopped.append(name)
            if fault is not None:
                _log.warning("tool %s failed while it was stopped", name, exc_info=fault)
            raise passing or error
        # A RunError is an answer in words, which are the user's; any other needs its traceback.
        told = any(isinstance(leaf, RunError) for leaf in leaves(fault))
        _log.log(
            logging.INFO if told else logging.WARNING,
            "tool %s failed",
            name,
            exc_info=None if told else fault,
            extra={**_identity(self._context), "tool_call_id": call_id},
        )
        for leaf in leaves(fault):
            if isinstance(leaf, RunError):
                return _failure(call_id, redact_text(str(leaf.message)))
        return _failure(call_id, redact_text(f"{type(fault).__name__}: {_words_of(fault)}"))

    async def _in_thread(self, called: Tool, call: Callable[[], Any], stop: StopFlag) -> Any:
        """Run a sync tool in a thread that is asked to stop when its run ends.

        Trio's own means do not do: an abandoned thread is left at the instant of the cancel,
        and `from_thread.check_cancelled` never raises under a shield. So the hop is shielded by
        a scope of its own, and on cancel the tool has `stop_timeout` to heed its flag before
        that scope is cancelled, which abandons the thread.
        """
        outcome: list[Callable[[], Any]] = []
        begun = threading.Event()
        done = trio.Event()
        hop = trio.CancelScope(shield=True)

        def guarded() -> Callable[[], Any]:
            begun.set()
            if stop:
                return lambda: None  # nobody waits for it any more
            try:
                value = call()
            except KeyboardInterrupt as error:
                # Signals reach the main thread only, so this one is the tool's own doing.
                return functools.partial(_raise, RuntimeError(repr(error)))
            except BaseException as error:  # noqa: BLE001  boundary: one tool, handed on
                return functools.partial(_raise, error)
            return lambda: value

        async def hopping() -> None:
            with hop:
                outcome.append(
                    await trio.to_thread.run_sync(
                        guarded,
                        abandon_on_cancel=True,
                        limiter=self._threads,
                    ),
                )
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hopping)
            try:
                await done.wait()
            except trio.Cancelled:
                stop.set()
                if begun.is_set():
                    with trio.move_on_after(self._limits.stop_timeout, shield=True):
                        await done.wait()
                    if not done.is_set():
                        self.abandoned.append(called.name)
                hop.cancel()
                raise
        return outcome[0]()


def _raise(error: BaseException) -> typing.NoReturn:
    raise error


def _words_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  boundary: one tool, whose error cannot even be printed
        return "it cannot be printed"


def _as_json(
    params: Mapping[str, Any] | str,
) -> tuple[str, Callable[[ToolCallId], ToolResult] | None]:
    """The arguments as JSON text, or what becomes of a call whose arguments have none."""
    if isinstance(params, str):
        return params, None
    try:
        return msgspec.json.encode(params).decode(), None
    except (TypeError, ValueError) as error:
        return "{}", functools.partial(_failure, message=f"The arguments have no JSON: {error}")


def _failure(call_id: ToolCallId, message: str) -> ToolResult:
    message = printable(message)
    return ToolResult(tool_call_id=call_id, content=f"Error: {message}", error=message)


def _content(value: Any) -> str:
    """What the model reads: words as they are, everything else as JSON."""
    if isinstance(value, str):
        value.encode()  # raises for what is no Unicode, and that is a failure of the tool
        return value
    return msgspec.json.encode(value, enc_hook=str).decode()


def _identity(context: UserExecutionContext) -> dict[str, str]:
    return {
        "user_id": context.user_id,
        "thread_id": context.thread_id,
        "run_id": context.run_id,
        "correlation_id": context.correlation_id,
    }
