"""Arguments are held strictly to the schema: no extras, no coercion, no key twice."""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import pytest

from creche import tool
from creche._arguments import ArgumentsError, canonical_json, parse_arguments


class Colour(enum.Enum):
    RED = "red"


class Point(msgspec.Struct):
    x: float
    y: float = 0.0


class Cat(msgspec.Struct, tag=True):
    name: str = "tom"


class Dog(msgspec.Struct, tag=True):
    name: str = "rex"
    trained: bool = False


class Pair(msgspec.Struct, array_like=True):
    left: Point
    right: int = 0


class Renamed(msgspec.Struct, rename="camel"):
    first_name: str


class Node(msgspec.Struct):
    value: int
    following: Node | None = None


class Spot(NamedTuple):
    x: int
    y: int


class Options(TypedDict, total=False):
    deep: bool
    at: Point


@dataclasses.dataclass
class Box:
    corner: Point
    size: int = 1


Small = Annotated[int, msgspec.Meta(ge=1, le=9)]
Word = Annotated[str, msgspec.Meta(pattern="^[a-z]+$", max_length=3)]


def judged(hint: Any, text: str) -> str:
    """ "" if a parameter of that type takes this JSON, otherwise why not."""

    def function(a: Any) -> None: ...

    function.__annotations__["a"] = hint
    made = tool(function)
    try:
        parse_arguments(f'{{"a": {text}}}', made.arguments, made.shape)
    except ArgumentsError as error:
        return str(error)
    return ""


TAKEN = [
    (int, "1"),
    (int, "-1"),
    (int, "123456789012345678901234567890"),
    (float, "1"),
    (float, "1.5"),
    (bool, "true"),
    (str, '"1"'),
    (int | None, "null"),
    (int | str, '"1"'),
    (int | float, "1.0"),
    (Literal["a", "b"], '"a"'),
    (Literal[1, 2], "2"),
    (Colour, '"red"'),
    (Small, "9"),
    (Word, '"abc"'),
    (Point, '{"x": 1}'),
    (Point | None, "null"),
    (Point | str, '{"x": 1}'),
    (Renamed, '{"firstName": "ada"}'),
    (Node, '{"value": 1, "following": {"value": 2}}'),
    (Cat | Dog, '{"type": "Dog", "trained": true}'),
    (Box, '{"corner": {"x": 1}}'),
    (Options, "{}"),
    (Options, '{"deep": true, "at": {"x": 1}}'),
    (list[Point], '[{"x": 1}]'),
    (list[int] | Point, "[1]"),
    (dict[str, Point], '{"any": {"x": 1}, "key": {"x": 2}}'),
    (dict[int, str], '{"1": "a"}'),
    (Pair, '[{"x": 1}, 2]'),
    (Pair, '[{"x": 1}]'),
    (Spot, "[1, 2]"),
    (tuple[int, str], '[1, "a"]'),
    (tuple[Point, ...], '[{"x": 1}, {"x": 2}]'),
    (set[int], "[1, 1]"),
    (Any, '{"whatever": [{"x": 1}]}'),
]

REFUSED = [
    (int, '"1"', "int"),
    (int, "true", "int"),
    (int, "1.0", "int"),
    (int, "1e2", "int"),
    (int, "null", "int"),
    (float, '"1.5"', "float"),
    (float, "true", "float"),
    (bool, "1", "bool"),
    (bool, '"true"', "bool"),
    (str, "1", "str"),
    (int | None, '"1"', "int"),
    (int | str, "1.5", "int"),
    (Literal["a", "b"], '"c"', "enum"),
    (Literal[1, 2], '"1"', "int"),
    (Colour, '"RED"', "enum"),
    (Small, "0", ">= 1"),
    (Small, "10", "<= 9"),
    (Word, '"ABC"', "regex"),
    (Word, '"abcd"', "length"),
    (list[int], '["1"]', "int"),
    (list[int], '{"0": 1}', "array"),
    (Point, '{"y": 1}', "x"),
    (Point, '{"x": 1, "z": 1}', "`z` - at `$.a`"),
    (Point | None, '{"x": 1, "z": 1}', "`z`"),
    (Point | str, '{"x": 1, "z": 1}', "`z`"),
    (Renamed, '{"firstName": "ada", "first_name": "eve"}', "`first_name`"),
    (Node, '{"value": 1, "following": {"value": 2, "z": 3}}', "`z` - at `$.a.following`"),
    (Cat | Dog, '{"type": "Cat", "trained": true}', "`trained`"),
    (Cat | Dog, '{"type": "Cow"}', "Cow"),
    (Box, '{"corner": {"x": 1}, "colour": 1}', "`colour`"),
    (Box, '{"corner": {"x": 1, "z": 1}}', "`z` - at `$.a.corner`"),
    (Options, '{"deeper": true}', "`deeper`"),
    (Options, '{"at": {"x": 1, "z": 1}}', "`z`"),
    (list[Point], '[{"x": 1}, {"x": 1, "z": 1}]', "`z` - at `$.a[...]`"),
    (list[int] | Point, '{"x": 1, "z": 1}', "`z`"),
    (dict[str, Point], '{"key": {"x": 1, "z": 1}}', "`z`"),
    (Pair, '[{"x": 1, "z": 1}]', "`z` - at `$.a[0]`"),
    (Pair, '[{"x": 1}, 2, 3]', "at most length 2"),
    (Pair | dict[str, int], '[{"x": 1}, 2, 3]', "at most length 2"),
    (Spot, "[1, 2, 3]", "2"),
    (tuple[int, str], '[1, "a", 2]', "length 2"),
    (tuple[Point, ...], '[{"x": 1, "z": 1}]', "`z`"),
    (Annotated[Point, msgspec.Meta(title="at")], '{"x": 1, "z": 1}', "`z`"),
    (int, '1, "a": 2', "'a' is given twice"),
    (Point, '{"x": 1, "x": 1}', "'x' is given twice"),
    (Any, '{"deep": [{"k": 1, "k": 2}]}', "'k' is given twice"),
    (Any, "[" * 100_000 + "]" * 100_000, "deeply"),
    (float, "NaN", "malformed"),
]


def named(case: tuple[Any, ...]) -> str:
    return f"{case[0]}-{case[1]:.40}"


@pytest.mark.parametrize(("hint", "text"), TAKEN, ids=map(named, TAKEN))
def test_what_fits_the_schema_is_taken(hint: Any, text: str) -> None:
    assert not judged(hint, text)


@pytest.mark.parametrize(("hint", "text", "word"), REFUSED, ids=map(named, REFUSED))
def test_what_does_not_fit_is_refused_and_told_why(hint: Any, text: str, word: str) -> None:
    assert word in judged(hint, text)


def test_defaults_fill_what_is_left_out() -> None:
    @tool
    def draw(at: Point, width: int = 3, how: Literal["thin", "thick"] = "thin") -> None: ...

    checked: Any = parse_arguments('{"at": {"x": 1}}', draw.arguments, draw.shape)
    assert (checked.at, checked.width, checked.how) == (Point(1.0, 0.0), 3, "thin")


def test_a_model_is_told_that_nested_objects_take_no_extras() -> None:
    @tool
    def draw(at: Point, box: Box, options: Options) -> None: ...

    definitions = draw.spec.parameters["$defs"]
    assert {name: one["additionalProperties"] for name, one in definitions.items()} == {
        "Point": False,
        "Box": False,
        "Options": False,
    }


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ('{"b": 1, "a": [1, {"d": 1, "c": 2}]}', '{"a":[1,{"c":2,"d":1}],"b":1}'),
        ('{ "a" : "\\u00e9" }', '{"a":"é"}'),
        ("{}", "{}"),
    ],
)
def test_equal_arguments_have_one_canonical_form(text: str, canonical: str) -> None:
    assert canonical_json(text) == canonical
