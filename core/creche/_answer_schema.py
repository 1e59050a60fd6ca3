"""What an answer must look like: a type's schema or a given one, and whether a value fits it.

JSON Schema is checked as far as forms for people need it: `KEYWORDS` is all that there is. What a
schema says beyond that is refused before anybody is asked, so nothing goes unchecked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, cast

import msgspec

from creche._arguments import ArgumentsError, parse_arguments

Schema = Mapping[str, Any]

_MOST_DEEP: Final = 64  # schemas within schemas, references followed included
_ANNOTATIONS: Final = frozenset(
    {
        "$schema",
        "$id",
        "$comment",
        "$defs",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "format",
        "contentEncoding",
        "contentMediaType",
        "discriminator",
    }
)


class AnswerForm:
    """What is expected of one answer. Immutable; it holds no answer."""

    def __init__(self, wanted: object = None) -> None:
        """`wanted` is a type that msgspec knows, a JSON Schema, or None for words.

        Raises ValueError for a schema that says what we cannot check, and TypeError for what is
        neither.
        """
        self._type: Any = None
        if wanted is None:
            self.schema: dict[str, Any] = {"type": "string"}
            return
        if isinstance(wanted, Mapping):
            given = cast("Schema", wanted)
            self.schema = cast("dict[str, Any]", msgspec.to_builtins(dict(given), enc_hook=dict))
        else:
            self._type = wanted
            self.schema = _schema_of(wanted)
        check_schema(self.schema)

    def read(self, value: Any) -> Any:
        """The answer as the asker gets it: of the type that was asked for, or as plain data.

        Raises ValueError, in words for whoever answers.
        """
        if self._type is None:
            check_value(value, self.schema)
            return value
        try:
            shape = msgspec.inspect.type_info(self._type)
            return parse_arguments(msgspec.json.encode(value).decode(), self._type, shape)
        except ArgumentsError as error:
            raise ValueError(str(error)) from None


def _schema_of(wanted: Any) -> dict[str, Any]:
    try:
        (schema,), definitions = msgspec.json.schema_components(
            [wanted], ref_template="#/$defs/{name}"
        )
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"an answer's form is a type with a JSON Schema, or one itself: {error}"
        raise TypeError(msg) from None
    for definition in definitions.values():
        if "properties" in definition:
            definition.setdefault("additionalProperties", False)
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    refers_to_itself = f'"#/$defs/{name}"'.encode() in msgspec.json.encode(definitions)
    if name in definitions and not refers_to_itself:
        schema = definitions.pop(name)
    return {**schema, **({"$defs": definitions} if definitions else {})}


def check_schema(schema: Any, *, depth: int = 0) -> None:
    """Raise ValueError for a schema that says what `check_value` would not look at."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict) or depth > _MOST_DEEP:
        msg = "an answer's schema is an object, and no deeper than 64 schemas"
        raise ValueError(msg)
    given = cast("dict[str, Any]", schema)
    unknown = [key for key in given if key not in KEYWORDS and key not in _ANNOTATIONS]
    if unknown:
        msg = f"an answer's schema may not say {', '.join(map(repr, unknown))}: it goes unchecked"
        raise ValueError(msg)
    for key, value in given.items():
        if key == "type" and not set(_as_list(value)) <= set(_TYPES):
            msg = f"an answer's schema has a type that there is not: {value!r}"
            raise ValueError(msg)
        if key == "$ref" and not str(value).startswith("#/$defs/"):
            msg = f"an answer's schema refers to its own `$defs` only, not to {value!r}"
            raise ValueError(msg)
        if key == "pattern":
            _check_pattern(value)
        for inner in _schemas_in(key, value):
            check_schema(inner, depth=depth + 1)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        msg = f"an answer's schema has a pattern that is none: {error}"
        raise ValueError(msg) from None


def _schemas_in(key: str, value: Any) -> Iterator[Any]:
    if key in {"$defs", "properties"}:
        yield from value.values()
    elif key in {"anyOf", "oneOf", "allOf", "prefixItems"}:
        yield from value
    elif key in {"items", "additionalProperties", "propertyNames", "not"}:
        yield value


def check_value(value: Any, schema: Schema) -> None:
    """Raise ValueError, which says where and why, unless the value fits the schema."""
    problem = _problem(value, schema, "$", _Rules(schema.get("$defs", {})))
    if problem is not None:
        raise ValueError(problem)


class _Rules:
    """Where references lead, and how deep we are."""

    def __init__(self, definitions: Mapping[str, Any], depth: int = 0) -> None:
        self.definitions = definitions
        self.depth = depth

    def deeper(self) -> _Rules:
        if self.depth > _MOST_DEEP:
            msg = "this is nested too deeply"
            raise ValueError(msg)
        return _Rules(self.definitions, self.depth + 1)


def _problem(value: Any, schema: Any, path: str, rules: _Rules) -> str | None:
    """What is wrong with the value, and where; None if it fits."""
    if isinstance(schema, bool):
        return None if schema else f"nothing is expected at `{path}`"
    for key, wanted in schema.items():
        check = KEYWORDS.get(key)
        problem = None if check is None else check(value, wanted, path, rules.deeper(), schema)
        if problem is not None:
            return problem
    return None


Check = Callable[[Any, Any, str, _Rules, Schema], str | None]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TYPES: Final[Mapping[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "string": lambda value: isinstance(value, str),
        "boolean": lambda value: isinstance(value, bool),
        "integer": lambda value: (
            _is_number(value) and math.isfinite(value) and float(value).is_integer()
        ),
        "number": _is_number,
        "object": lambda value: isinstance(value, dict),
        "array": lambda value: isinstance(value, list),
        "null": lambda value: value is None,
    }
)


def _as_list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def _type(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del rules, schema
    names = _as_list(wanted)
    if any(_TYPES[name](value) for name in names):
        return None
    return f"expected {' or '.join(names)} at `{path}`"


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON is: true is not 1."""
    return msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")


def _enum(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del rules, schema
    if any(_same(value, each) for each in wanted):
        return None
    return f"expected one of {msgspec.json.encode(wanted).decode()} at `{path}`"


def _const(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    return _enum(value, [wanted], path, rules, schema)


def _any_of(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del schema
    problems = [_problem(value, each, path, rules) for each in wanted]
    return None if None in problems else f"expected one of several forms at `{path}`"


def _one_of(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del schema
    fitting = [_problem(value, each, path, rules) for each in wanted].count(None)
    return None if fitting == 1 else f"expected exactly one of several forms at `{path}`"


def _all_of(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del schema
    problems = (_problem(value, each, path, rules) for each in wanted)
    return next((problem for problem in problems if problem is not None), None)


def _not(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del schema
    refused = _problem(value, wanted, path, rules) is None
    return f"this is what is not wanted at `{path}`" if refused else None


def _ref(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del schema
    name = str(wanted).removeprefix("#/$defs/")
    return _problem(value, rules.definitions.get(name, False), path, rules)


def _properties(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del schema
    if not isinstance(value, dict):
        return None
    given = cast("dict[str, Any]", value)
    problems = (
        _problem(given[name], inner, f"{path}.{name}", rules)
        for name, inner in wanted.items()
        if name in given
    )
    return next((problem for problem in problems if problem is not None), None)


def _extra(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    if not isinstance(value, dict):
        return None
    for name, inner in cast("dict[str, Any]", value).items():
        if name not in schema.get("properties", {}):
            if wanted is False:
                return f"`{name}` is not expected at `{path}`"
            problem = _problem(inner, wanted, f"{path}.{name}", rules)
            if problem is not None:
                return problem
    return None


def _required(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del rules, schema
    if not isinstance(value, dict):
        return None
    missing = [name for name in wanted if name not in value]
    return f"`{missing[0]}` is missing at `{path}`" if missing else None


def _names(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del schema
    if not isinstance(value, dict):
        return None
    problems = (_problem(name, wanted, path, rules) for name in cast("dict[str, Any]", value))
    return next((problem for problem in problems if problem is not None), None)


def _items(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    if not isinstance(value, list):
        return None
    rest = cast("list[Any]", value)[len(schema.get("prefixItems", ())) :]
    if wanted is False:
        return f"there are too many items at `{path}`" if rest else None
    problems = (_problem(each, wanted, f"{path}[...]", rules) for each in rest)
    return next((problem for problem in problems if problem is not None), None)


def _first_items(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del schema
    if not isinstance(value, list):
        return None
    pairs = zip(cast("list[Any]", value), wanted, strict=False)
    problems = (
        _problem(each, inner, f"{path}[{at}]", rules) for at, (each, inner) in enumerate(pairs)
    )
    return next((problem for problem in problems if problem is not None), None)


def _pattern(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
    del rules, schema
    if not isinstance(value, str) or re.search(wanted, value):
        return None
    return f"expected text that matches {wanted!r} at `{path}`"


def _bound(
    kinds: Callable[[Any], bool],
    measure: Callable[[Any], float],
    holds: Callable[[Any, Any], bool],
    words: str,
) -> Check:
    def check(value: Any, wanted: Any, path: str, rules: _Rules, schema: Schema) -> str | None:
        del rules, schema
        if not kinds(value) or holds(measure(value), wanted):
            return None
        return f"expected {words} {wanted} at `{path}`"

    return check


def _sized(kind: type[Sequence[Any] | dict[str, Any]], words: str, *, most: bool) -> Check:
    return _bound(
        lambda value: isinstance(value, kind),
        len,
        (lambda size, wanted: size <= wanted) if most else (lambda size, wanted: size >= wanted),
        words,
    )


def _itself(value: Any) -> float:
    return cast("float", value)


KEYWORDS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "type": _type,
        "enum": _enum,
        "const": _const,
        "anyOf": _any_of,
        "oneOf": _one_of,
        "allOf": _all_of,
        "not": _not,
        "$ref": _ref,
        "properties": _properties,
        "required": _required,
        "additionalProperties": _extra,
        "propertyNames": _names,
        "items": _items,
        "prefixItems": _first_items,
        "pattern": _pattern,
        "minimum": _bound(_is_number, _itself, lambda a, b: a >= b, "at least"),
        "maximum": _bound(_is_number, _itself, lambda a, b: a <= b, "at most"),
        "exclusiveMinimum": _bound(_is_number, _itself, lambda a, b: a > b, "more than"),
        "exclusiveMaximum": _bound(_is_number, _itself, lambda a, b: a < b, "less than"),
        "multipleOf": _bound(
            _is_number, _itself, lambda a, b: math.isclose(a / b, round(a / b)), "a multiple of"
        ),
        "minLength": _sized(str, "characters, at least", most=False),
        "maxLength": _sized(str, "characters, at most", most=True),
        "minItems": _sized(list, "items, at least", most=False),
        "maxItems": _sized(list, "items, at most", most=True),
        "minProperties": _sized(dict, "keys, at least", most=False),
        "maxProperties": _sized(dict, "keys, at most", most=True),
    }
)
