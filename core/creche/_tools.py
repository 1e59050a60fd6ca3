"""Typed functions that an agent may call, their schemas made from type hints; a call's result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import subprocess
import threading
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast, overload

import msgspec
import trio

from creche._arguments import ArgumentsCheck, parse_arguments, parse_object
from creche._barrier import leaves
from creche._context import ToolCallId, UserExecutionContext, frozen
from creche._errors import RunError, ToolDefinitionError
from creche._models import ToolSpec
from creche._owned import OwnedWalk, advice, faults
from creche._programs import Programs
from creche._redaction import printable


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
    programs: Programs | None = None  # of an async tool: what it may start

    def open_process(
        self, command: Sequence[str], **options: Any
    ) -> contextlib.AbstractAsyncContextManager[trio.Process]:
        """Start a program in a block of this tool's; see `RunContext.open_process`.

        Raises ToolDefinitionError in a sync tool, which has no block that a cancel could end.
        """
        return self._starting().open_process(command, **options)

    async def run_process(
        self, command: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program to its end; see `RunContext.run_process`. Raises as `open_process`."""
        return await self._starting().run_process(command, **options)

    def _starting(self) -> Programs:
        if self.programs is None:
            msg = "a sync tool starts no programs through its context; make it `async def`"
            raise ToolDefinitionError(msg)
        return self.programs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function with the schema that was made from its type hints. Holds no run's state."""

    name: str
    description: str
    function: Callable[..., Any]
    arguments: type[msgspec.Struct]  # one field a parameter; refuses what is not declared
    parameters: Mapping[str, Any]  # the same as JSON Schema
    shape: msgspec.inspect.Type  # the same as msgspec tells of it
    context_parameter: str | None  # gets a ToolContext
    is_async: bool
    process: bool = False  # runs in a process that can be killed
    approval: bool = False  # somebody must approve each call
    # Of a tool that brings its own schema: what is wrong with an arguments object, or None.
    check: ArgumentsCheck | None = None

    def keywords(self, arguments: str) -> dict[str, Any]:
        """What its function is to be called with, of arguments in JSON. Raises ArgumentsError."""
        if self.check is not None:
            return {"arguments": parse_object(arguments, self.check)}
        checked = parse_arguments(arguments, self.arguments, self.shape)
        return {field: getattr(checked, field) for field in checked.__struct_fields__}

    @property
    def spec(self) -> ToolSpec:
        """What a model is told of it."""
        # A copy, since adapters do edit schemas; by way of its JSON, which is far quicker than
        # `deepcopy`, and this is done for each tool at each turn.
        copied = msgspec.json.decode(msgspec.json.encode(self.parameters, enc_hook=dict))
        return ToolSpec(name=self.name, description=self.description, parameters=copied)


def tools_in(found: object, where: str) -> tuple[Tool, ...]:
    """What `where` was given as its tools. Raises TypeError, which says what to write instead."""
    listed = tools_or_names_in(found, where)
    for item in listed:
        if isinstance(item, str):
            msg = f"{where}: {item!r} is a name, and no tool: give the tool itself"
            raise TypeError(msg)
    return cast("tuple[Tool, ...]", listed)


def tools_or_names_in(found: object, where: str) -> tuple[Tool | str, ...]:
    """The same where a tool may be named. Raises TypeError."""
    what: str | None = None
    if isinstance(found, (Tool, str)):
        what = "a tool" if isinstance(found, Tool) else "a name"
    elif callable(found):
        what = "a function"
    listed = _listed(found, where, "tools", what, f"({_called(found)},)")
    for item in listed:
        if not isinstance(item, (Tool, str)):
            name = _called(item)
            if inspect.isfunction(item):
                msg = f"{where}: {name} is no tool: put @creche.tool above it"
            else:
                msg = f"{where}: {name} is no tool: @creche.tool makes one of a function"
            raise TypeError(msg)
    return cast("tuple[Tool | str, ...]", listed)


def names_in(found: object, where: str, attribute: str) -> tuple[str, ...]:
    """The names that an attribute lists. Raises TypeError, which says what to write instead."""
    what = "a name" if isinstance(found, str) else None
    listed = _listed(found, where, attribute, what, f"({found!r},)")
    for item in listed:
        if not isinstance(item, str):
            msg = f"{where}: `{attribute}` lists names, and {_called(item)} is none"
            raise TypeError(msg)
    return cast("tuple[str, ...]", listed)


def _listed(
    found: object, where: str, attribute: str, what: str | None, instead: str
) -> tuple[object, ...]:
    """What is listed; `what` is told where something stands there that ought to be in a list."""
    if what is not None:
        msg = f"{where}: `{attribute}` is {what}, not a tuple of them: write {instead}"
        raise TypeError(msg)
    if not isinstance(found, Iterable):
        msg = f"{where}: `{attribute}` must be a tuple, not {_called(found)}"
        raise TypeError(msg)
    return tuple(cast("Iterable[object]", found))


def _called(item: object) -> str:
    """What somebody calls it in their code, or its type: a value may be a secret."""
    if isinstance(item, str):
        return repr(item)
    name = item.name if isinstance(item, Tool) else getattr(item, "__name__", None)
    return name if isinstance(name, str) else f"something of type {type(item).__name__}"


def check_names(names: Iterable[str], where: str) -> None:
    """Raise ValueError if one list of tools, `where`, has a name twice: which would be called?"""
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        msg = f"{where} may have one tool of a name, and has more of {', '.join(map(repr, twice))}"
        raise ValueError(msg)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    process: bool = False,
    approval: bool = False,
    shared: Sequence[object] = (),
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    process: bool = False,
    approval: bool = False,
    shared: Sequence[object] = (),
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of a function, `async` or not.

    Its name and docstring tell the model what it is for; its type hints become the schema that
    arguments are checked against. A parameter annotated `ToolContext` is not the model's to
    give: it gets the caller's context and a stop flag. A sync function runs in a thread.

    `process=True` runs a sync function in a process of its own, which is killed, with whatever
    it started, when the call is cancelled or takes too long. Such a function stands at the top
    of a module that a fresh interpreter can import, takes no ToolContext, and its result comes
    back as plain data.

    `approval=True` asks the infrastructure's approver before every call, or the run's user.

    A tool is shared by all runs, so what it closes over may be a service (a client, a pool; any
    object that does more than hold things), but no container, cache, generator or memory channel,
    nor a variable that it rebinds; nor may its default values and its function's attributes be
    such. What is meant to be shared is named in `shared`. The globals that it names are not
    looked at here: they are `creche scan`'s.

    Raises ToolDefinitionError for these, a parameter without a type hint, `*args`, `**kwargs`,
    and a function that a process could not find.
    """
    made = functools.partial(
        _made,
        name=name,
        description=description,
        process=process,
        approval=approval,
        shared=shared,
    )
    return made if function is None else made(function)


def _made(
    function: Callable[..., Any],
    *,
    name: str | None,
    description: str | None,
    process: bool,
    approval: bool,
    shared: Sequence[object],
) -> Tool:
    name = name or function.__name__
    _check_keeps_nothing(name, function, shared)
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
    if process:
        _check_can_be_found(name, function, context_parameter)
    return Tool(
        name=name,
        description=description or inspect.cleandoc(function.__doc__ or ""),
        function=function,
        arguments=arguments,
        parameters=frozen(schema),
        shape=msgspec.inspect.type_info(arguments),
        context_parameter=context_parameter,
        is_async=inspect.iscoroutinefunction(function),
        process=process,
        approval=approval,
    )


def schema_tool(
    function: Callable[..., Any],
    *,
    name: str,
    description: str,
    parameters: Mapping[str, Any],
    check: ArgumentsCheck,
    approval: bool = False,
) -> Tool:
    """Make a tool whose arguments are described by a JSON Schema, as another server tells it.

    `function(arguments)` gets the arguments object whole; a further parameter that is annotated
    `ToolContext` gets that. `parameters` is what a model is told, `check` what holds calls to it:
    it says in words what is wrong with an object, or None. Both must mean the same.

    Raises ToolDefinitionError for a function that cannot be called so.
    """
    made = tool(name=name, description=description, approval=approval)(function)
    fields = made.arguments.__struct_fields__
    if fields != ("arguments",):
        msg = f"tool {name!r}: its function takes `arguments`, not {', '.join(fields) or 'nothing'}"
        raise ToolDefinitionError(msg)
    return dataclasses.replace(made, parameters=frozen(parameters), check=check)


def _check_keeps_nothing(name: str, function: Callable[..., Any], shared: Sequence[object]) -> None:
    """Raise ToolDefinitionError if one call could leave something for another's, but services."""
    walk = OwnedWalk(shared=shared, services=True)
    for path, found in faults(walk, walk.over(function, name)):
        msg = f"tool {name!r}: {advice(path, found, place='in the call')}; or name it in `shared`"
        raise ToolDefinitionError(msg)


def _check_can_be_found(
    name: str, function: Callable[..., Any], context_parameter: str | None
) -> None:
    """Raise ToolDefinitionError unless a fresh interpreter can import the function and run it."""
    why: str | None = None
    if inspect.iscoroutinefunction(function):
        why = "it is async; write `def`, since it has the process to itself"
    elif context_parameter is not None:
        why = "a ToolContext cannot follow it there; take what it needs as arguments"
    elif not function.__qualname__.isidentifier():
        why = f"{function.__qualname__} cannot be imported; put it at the top of its module"
    elif function.__module__ == "__main__":
        why = "__main__ cannot be imported again; put it into a module of its own"
    if why is not None:
        msg = f"tool {name!r} cannot run in a process: {why}"
        raise ToolDefinitionError(msg)


def _object_schema(arguments: type[msgspec.Struct]) -> dict[str, Any]:
    """The struct's JSON Schema, with the object itself at the top rather than behind a $ref."""
    (schema,), definitions = msgspec.json.schema_components(
        [arguments],
        ref_template="#/$defs/{name}",
    )
    top = dict(definitions.pop(schema["$ref"].removeprefix("#/$defs/")))
    top.pop("title", None)
    for definition in definitions.values():
        if "properties" in definition:
            definition.setdefault("additionalProperties", False)  # see `_arguments`
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
    retry_after: float | None = None  # seconds until another try has a chance, where waiting helps
    code: str | None = None  # why it failed, in a word for programs, or the type of what was raised

    @property
    def ok(self) -> bool:
        return self.error is None


def failure(
    call_id: ToolCallId,
    message: str,
    *,
    code: str = "tool_failed",
    retry_after: float | None = None,
) -> ToolResult:
    """The result of a call that came to nothing, in words that a model can act on."""
    message = printable(message)
    return ToolResult(
        tool_call_id=call_id,
        content=f"Error: {message}",
        error=message,
        retry_after=retry_after,
        code=code,
    )


def content_of(value: Any) -> str:
    """What the model reads: words as they are, everything else as JSON."""
    if isinstance(value, str):
        value.encode()  # raises for what is no Unicode, and that is a failure of the tool
        return value
    return msgspec.json.encode(value, enc_hook=str).decode()


def failure_words(error: BaseException) -> str:
    """What an error says of itself: a RunError's own words, of any other its type, too."""
    for leaf in leaves(error):
        if isinstance(leaf, RunError):
            return str(leaf.message)
    try:
        words = str(error)
    except Exception:  # noqa: BLE001  boundary: one tool, whose error cannot even be printed
        words = "it cannot be printed"
    return f"{type(error).__name__}: {words}"
