"""What an answer must look like: JSON Schema as far as we go, held to its own rules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creche._answer_schema import KEYWORDS, AnswerForm, check_schema, check_value

# (schema, values that fit, values that do not)
CASES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "words": ({"type": "string"}, ["", "a"], [1, None, True, [], {}]),
    "an integer": ({"type": "integer"}, [1, -1, 2.0], [1.5, True, "1", None]),
    "a number": ({"type": "number"}, [1, 1.5], [True, "1"]),
    "a yes or a no": ({"type": "boolean"}, [True, False], [0, 1, "yes"]),
    "nothing": ({"type": "null"}, [None], [0, ""]),
    "one of several types": ({"type": ["string", "null"]}, ["a", None], [1]),
    "one of several values": ({"enum": ["a", 1, None]}, ["a", 1, None], [True, "b", "1"]),
    "one value": ({"const": {"a": [1]}}, [{"a": [1]}], [{"a": [True]}, {"a": [1, 2]}]),
    "an object": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
        [{"a": 1}],
        [{}, {"a": "1"}, {"a": 1, "b": 2}, [], "a"],
    ),
    "other keys of a kind": (
        {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        [{}, {"a": 1, "b": "x"}, 5],
        [{"b": 1}],
    ),
    "names of keys": ({"propertyNames": {"maxLength": 1}}, [{"a": 1}, 5], [{"ab": 1}]),
    "items": ({"items": {"type": "integer"}}, [[], [1], "x"], [["a"], [1, "a"]]),
    "first items": (
        {"prefixItems": [{"type": "integer"}], "items": False},
        [[], [1], 5],
        [["a"], [1, 2]],
    ),
    "any of": ({"anyOf": [{"type": "integer"}, {"minLength": 2}]}, [1, "ab"], ["a"]),
    "exactly one of": ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, [1, 2.5], [3, 1.5]),
    "all of": ({"allOf": [{"type": "integer"}, {"minimum": 2}]}, [2], [1, 2.5]),
    "not": ({"not": {"type": "string"}}, [1], ["a"]),
    "a pattern": ({"pattern": "^a+$"}, ["aa", 5], ["b", "aab"]),
    "bounds": ({"minimum": 1, "maximum": 2}, [1, 2, "x", True], [0, 3]),
    "open bounds": ({"exclusiveMinimum": 1, "exclusiveMaximum": 3}, [2], [1, 3]),
    "a multiple": ({"multipleOf": 0.5}, [1.5, 1, "x"], [0.35]),
    "lengths": ({"minLength": 1, "maxLength": 2}, ["a", "ab", []], ["", "abc"]),
    "numbers of items": ({"minItems": 1, "maxItems": 2}, [[1], "x"], [[], [1, 2, 3]]),
    "numbers of keys": (
        {"minProperties": 1, "maxProperties": 1},
        [{"a": 1}],
        [{}, {"a": 1, "b": 2}],
    ),
    "a reference": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}, "type": "array"}}},
        [[], [[], [[]]]],
        [1, [1]],
    ),
    "anything": (True, [1, None], []),
}


@pytest.mark.parametrize(("schema", "fitting", "others"), CASES.values(), ids=CASES)
def test_values_are_held_to_it_as_the_standard_has_it(
    schema: Any, fitting: list[Any], others: list[Any]
) -> None:
    check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    whole = schema if isinstance(schema, dict) else {"allOf": [schema]}
    for value in fitting:
        check_value(value, whole)
        assert judge.is_valid(value), value
    for value in others:
        with pytest.raises(ValueError, match=r"`\$"):
            check_value(value, whole)
        assert not judge.is_valid(value), value


def test_every_keyword_has_a_case() -> None:
    said = str([case[0] for case in CASES.values()])
    assert [keyword for keyword in KEYWORDS if f"'{keyword}'" not in said] == []


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 2.0, "", "a", "ab"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "ab"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.sampled_from([case[0] for case in CASES.values() if isinstance(case[0], dict)]), values)
def test_any_value_is_judged_as_another_judge_does(schema: dict[str, Any], value: Any) -> None:
    try:
        check_value(value, schema)
        fits = True
    except ValueError:
        fits = False
    assert fits == jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize(
    "schema",
    [
        {"if": {}},
        {"type": "date"},
        {"properties": {"a": {"dependentRequired": {}}}},
        {"anyOf": [{"contains": {}}]},
        {"$defs": {"a": {"unevaluatedItems": False}}},
        {"$ref": "http://example.com/a"},
        {"pattern": "("},
        {"items": 5},
    ],
    ids=str,
)
def test_what_would_go_unchecked_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match="schema"):
        AnswerForm(schema)


class Leaf(msgspec.Struct):
    name: str


class Tree(msgspec.Struct):
    kind: Literal["a", "b"]
    size: Annotated[int, msgspec.Meta(ge=1)] = 1
    leaf: Leaf | None = None
    trees: list[Tree] = []


@pytest.mark.parametrize(
    "wanted",
    [int, str, bool, float, list[int], dict[str, int], Leaf, Tree, Leaf | None, Literal["a"]],
)
def test_a_types_schema_is_one_that_we_can_check(wanted: Any) -> None:
    check_schema(AnswerForm(wanted).schema)
    jsonschema.Draft202012Validator.check_schema(AnswerForm(wanted).schema)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ({"kind": "a"}, True),
        ({"kind": "a", "leaf": {"name": "x"}, "trees": [{"kind": "b"}]}, True),
        ({"kind": "c"}, False),
        ({"kind": "a", "size": 0}, False),
        ({"kind": "a", "extra": 1}, False),
        ({"kind": "a", "leaf": {"name": "x", "extra": 1}}, False),
        ({"kind": "a", "trees": [{"kind": "x"}]}, False),
        ("a", False),
    ],
)
def test_a_late_answer_is_judged_by_the_schema_as_by_the_type(value: Any, fits: bool) -> None:
    by_type = AnswerForm(Tree)
    by_schema = AnswerForm(msgspec.json.decode(msgspec.json.encode(by_type.schema)))
    for form in (by_type, by_schema):
        if fits:
            form.read(value)
        else:
            with pytest.raises(ValueError, match=r"."):
                form.read(value)


def test_an_answer_that_is_nested_too_deeply_is_refused_in_words() -> None:
    schema = CASES["a reference"][0]
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(ValueError, match="too deeply"):
        check_value(deep, schema)


@pytest.mark.parametrize("wanted", [object(), 5, "words"])
def test_what_is_no_form_is_a_type_error(wanted: Any) -> None:
    with pytest.raises(TypeError, match="form"):
        AnswerForm(wanted)
