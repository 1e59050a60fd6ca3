"""What MCP says of a tool and of its results, as creche has them. No I/O."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, cast

import mcp_types
import msgspec
from jsonschema import exceptions, validators
from referencing import Registry
from referencing.exceptions import Unresolvable

from creche import Tool, ToolDefinitionError, schema_tool

_LONGEST_NAME: Final = 64  # what endpoints take of a tool's name
_LONGEST_COMPLAINT: Final = 300  # characters
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_-]")
# Where one of these stands, whether an object may have more is not told by `properties` alone.
_OPEN_ENDED: Final = frozenset(
    {
        *("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref"),
        *("$dynamicRef", "allOf", "anyOf", "oneOf", "if", "not"),
    }
)

Call = Callable[[dict[str, Any]], Awaitable[Any]]


def tool_name(server: str, name: str) -> str:
    """What agents and models call it: SERVER__NAME, of letters that every endpoint takes.

    One that is too long, or has others, is mended and gets a mark made from the whole name, so
    that it stays the only one.
    """
    whole = f"{server}__{name}"
    mended = _NOT_IN_NAMES.sub("_", whole)
    if mended == whole and len(whole) <= _LONGEST_NAME:
        return whole
    mark = hashlib.sha256(whole.encode(errors="replace")).hexdigest()[:8]
    return f"{mended[: _LONGEST_NAME - len(mark) - 1]}_{mark}"


def tool_of(server: str, described: mcp_types.Tool, call: Call) -> Tool:
    """The tool; `call` is handed arguments that fit its schema.

    Raises ToolDefinitionError if what the server tells of it cannot be used.
    """
    name = tool_name(server, described.name)
    schema = closed(described.input_schema)

    async def function(arguments: dict[str, Any]) -> Any:
        return await call(arguments)

    return schema_tool(
        function,
        name=name,
        description=described.description or described.title or described.name,
        parameters=schema,
        check=checker(name, schema),
    )


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object, which has no properties but those that it names.

    JSON Schema takes others where it does not say otherwise, and models then make them up.
    """
    made: dict[str, Any] = {"type": "object", "properties": {}, **schema}
    if not _OPEN_ENDED & made.keys():
        made["additionalProperties"] = False
    return made


def checker(name: str, schema: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str | None]:
    """What says in words what is wrong with arguments. Raises ToolDefinitionError."""
    made: Any = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        made.check_schema(schema)
    except exceptions.SchemaError as error:
        msg = f"tool {name!r}: its schema is none: {str(error.message)[:_LONGEST_COMPLAINT]}"
        raise ToolDefinitionError(msg) from None
    # An empty registry: a schema may refer to its own parts, and to nothing over the network.
    nothing_else: Registry[Any] = Registry()
    validator = made(schema, registry=nothing_else)
    best_match = cast("Any", exceptions).best_match

    def check(arguments: Mapping[str, Any]) -> str | None:
        try:
            found = best_match(validator.iter_errors(arguments))
        except Unresolvable:
            return "the schema refers to something that is not in it"
        if found is None:
            return None
        return f"{str(found.message)[:_LONGEST_COMPLAINT]} - at `{found.json_path}`"

    return check


def result_of(result: mcp_types.CallToolResult) -> Any:
    """What a model reads of it: its texts; where there is none, its structured content."""
    words = [_words(block) for block in result.content]
    if result.structured_content is not None and not _has_text(result.content):
        words.append(msgspec.json.encode(result.structured_content).decode())
    return "\n".join(words)


def _has_text(blocks: Iterable[mcp_types.ContentBlock]) -> bool:
    return any(isinstance(block, mcp_types.TextContent) for block in blocks)


def _words(block: mcp_types.ContentBlock) -> str:
    """A block as text; what is none is named."""
    if isinstance(block, mcp_types.TextContent):
        return block.text
    if isinstance(block, mcp_types.ResourceLink):
        return f"[resource {block.name}: {block.uri}]"
    if isinstance(block, mcp_types.EmbeddedResource):
        resource = block.resource
        if isinstance(resource, mcp_types.TextResourceContents):
            return resource.text
        return f"[resource {resource.uri}, {resource.mime_type or 'binary'}, not shown]"
    kind = "image" if isinstance(block, mcp_types.ImageContent) else "audio"
    return f"[{kind} of type {block.mime_type}, not shown]"
