"""The arguments of a call: JSON text, held strictly to the schema that the model was told.

msgspec checks types without coercion: "1", true and 1.0 are no int. What it lets pass, and a
schema without extras does not, is found here: keys that a nested object does not declare, items
behind the end of a fixed array, and a key that is given twice (parsers differ on which one
counts, so an approval could be asked for one call and another be made).
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec
from msgspec import inspect

_T = TypeVar("_T")

_FIELDS: Final = (inspect.StructType, inspect.DataclassType, inspect.TypedDictType)


# Says in words what is wrong with an arguments object, or None.
ArgumentsCheck = Callable[[Mapping[str, Any]], str | None]


class ArgumentsError(ValueError):
    """The arguments do not fit; the message says where and how, for the model to mend."""


def parse_arguments(text: str, arguments: type[_T], shape: inspect.Type) -> _T:
    """The arguments as an `arguments`, whose `msgspec.inspect.type_info` is `shape`.

    Empty text is an empty object. Raises ArgumentsError.
    """
    text = text or "{}"
    try:
        checked = msgspec.json.decode(text, type=arguments)
        extra = _extra(plain_arguments(text), shape, "$")
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ArgumentsError(str(error)) from None
    except RecursionError:
        msg = "they are nested too deeply"
        raise ArgumentsError(msg) from None
    if extra is not None:
        raise ArgumentsError(extra)
    return checked


def parse_object(text: str, check: ArgumentsCheck) -> dict[str, Any]:
    """The arguments as plain data that `check` has nothing to say against.

    Empty text is an empty object. Raises ArgumentsError.
    """
    text = text or "{}"
    try:
        # Twice: msgspec knows no NaN and no Infinity, which are no JSON; the other no key twice.
        made = msgspec.json.decode(text, type=dict[str, Any])
        plain_arguments(text)
        wrong = check(made)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ArgumentsError(str(error)) from None
    except RecursionError:
        msg = "they are nested too deeply"
        raise ArgumentsError(msg) from None
    if wrong is not None:
        raise ArgumentsError(wrong)
    return made


def plain_arguments(text: str) -> Any:
    """JSON text as plain data. Raises ArgumentsError for a key that is given twice."""
    return _PLAIN.decode(text)


def canonical_json(text: str) -> str:
    """The same JSON in the one form that equal arguments have: keys sorted, no blanks."""
    return msgspec.json.encode(plain_arguments(text), order="deterministic").decode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice, _ = counts.most_common(1)[0]
        msg = f"the key {twice!r} is given twice"
        raise ArgumentsError(msg)
    return made


def _extra(value: Any, shape: inspect.Type, path: str) -> str | None:
    """What `value`, whose types are right, has more than its shape; None when nothing."""
    if isinstance(shape, inspect.Metadata):
        return _extra(value, shape.type, path)
    if isinstance(shape, inspect.UnionType):
        return _extra_in_union(value, shape, path)
    if isinstance(value, dict):
        return _extra_in_object(cast("dict[str, Any]", value), shape, path)
    if isinstance(value, list):
        return _extra_in_array(cast("list[Any]", value), shape, path)
    return None


def _extra_in_union(value: Any, shape: inspect.UnionType, path: str) -> str | None:
    """A union has at most one member for arrays and one for objects, or structs with tags."""
    found: str | None = None
    for member in shape.types:
        kind = member.type if isinstance(member, inspect.Metadata) else member
        if isinstance(kind, inspect.StructType) and kind.tag_field is not None:
            if _tag_of(value, kind.tag_field) != kind.tag:
                continue
        elif isinstance(value, dict) != _takes_objects(kind):
            continue
        found = found or _extra(value, kind, path)
    return found


def _extra_in_object(value: Mapping[str, Any], shape: inspect.Type, path: str) -> str | None:
    if isinstance(shape, inspect.DictType):
        return _first_extra((item, shape.value_type, path + "[...]") for item in value.values())
    if not isinstance(shape, _FIELDS):
        return None
    fields = {field.encode_name: field.type for field in shape.fields}
    tag_field = shape.tag_field if isinstance(shape, inspect.StructType) else None
    for key in value:
        if key not in fields and key != tag_field:
            return f"Object contains unknown field `{key}` - at `{path}`"
    return _first_extra(
        (item, fields[key], f"{path}.{key}") for key, item in value.items() if key in fields
    )


def _extra_in_array(value: Sequence[Any], shape: inspect.Type, path: str) -> str | None:
    if isinstance(shape, inspect.CollectionType):  # list, set, frozenset, tuple[X, ...]
        return _first_extra((item, shape.item_type, path + "[...]") for item in value)
    kinds: Sequence[inspect.Type]
    if isinstance(shape, inspect.TupleType):
        kinds = shape.item_types
    elif isinstance(shape, (inspect.NamedTupleType, inspect.StructType)):
        kinds = [field.type for field in shape.fields]
        if isinstance(shape, inspect.StructType) and shape.tag_field is not None:
            value = value[1:]
    else:
        return None
    if len(value) > len(kinds):
        return f"Expected `array` of at most length {len(kinds)} - at `{path}`"
    return _first_extra(
        (item, kind, f"{path}[{at}]")
        for at, (item, kind) in enumerate(zip(value, kinds, strict=False))
    )


def _takes_objects(shape: inspect.Type) -> bool:
    if isinstance(shape, inspect.StructType):
        return not shape.array_like
    return isinstance(shape, (*_FIELDS, inspect.DictType))


def _first_extra(parts: Iterable[tuple[Any, inspect.Type, str]]) -> str | None:
    found = (_extra(*part) for part in parts)
    return next((extra for extra in found if extra is not None), None)


def _tag_of(value: Any, tag_field: str) -> Any:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).get(tag_field)
    return cast("list[Any]", value)[0] if isinstance(value, list) and value else None


_PLAIN: Final = json.JSONDecoder(object_pairs_hook=_object)  # making one costs as much as a call
