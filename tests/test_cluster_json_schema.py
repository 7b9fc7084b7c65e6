"""Schemas that an answer can be held to, and those that are refused by name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_workers_grammar import SCHEMAS

from cluster.errors import InvalidRequest
from cluster.json_schema import MAX_BYTES, MAX_DEPTH, MAX_REFERENCES, check_schema, references, resolve


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


NODE = {"type": "object", "properties": {"value": {}, "next": {"$ref": "#"}}, "required": ["value"]}
TREE = {
    "$defs": {
        "tree": {
            "anyOf": [
                {"$ref": "#/$defs/leaf"},
                {"type": "array", "items": {"$ref": "#/$defs/tree"}, "minItems": 1},
            ]
        },
        "leaf": {"type": "integer"},
    },
    "$ref": "#/$defs/tree",
}
ENDLESS = {
    "itself": {"$ref": "#"},
    "a required property": NODE | {"required": ["next"]},
    "an item": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "every alternative": {"anyOf": [{"$ref": "#"}, {"allOf": [{"type": "string"}, {"$ref": "#"}]}]},
    "two of each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"oneOf": [{"$ref": "#/$defs/a"}]}},
        "$ref": "#/$defs/a",
    },
}


@given(SCHEMAS)
def test_a_supported_schema_passes(schema: dict[str, Any]) -> None:
    check_schema(schema, "x")


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        NODE,
        TREE,
        {"properties": {"not": {"title": "a name like a keyword", "default": {"not": 1}}}},
        {"enum": [{"not": 1}], "description": "values are no schemas"},
        {"required": ["a", "b"], "minProperties": 3},
        {"allOf": [{"multipleOf": 0.025}, {"multipleOf": 4000}, {"multipleOf": 1e-9}]},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
    ids=str,
)
def test_odd_but_possible(schema: Any) -> None:
    check_schema(schema, "x")


@pytest.mark.parametrize("schema", ENDLESS.values(), ids=ENDLESS)
def test_a_schema_whose_values_never_end_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="no value is ever complete"):
        check_schema(schema, "x")


WRONG: list[tuple[Any, str]] = [
    ({"not": {}}, "the keyword 'not'"),
    (
        {"properties": {"a": {"items": {"uniqueItems": True}}}},
        "properties.a.items: the keyword 'uniqueItems'",
    ),
    ({"anyOf": [{}, {"if": {}}]}, "anyOf[1]: the keyword 'if'"),
    ({"$defs": {"x": {"maxLenght": 3}}}, "$defs.x: the keyword 'maxLenght'"),
    ({"x-guidance": {"lenient": True}}, "the keyword 'x-guidance'"),
    ({"items": [{}]}, "items: a schema must be an object"),
    ({"properties": []}, "properties: must be an object"),
    ({"allOf": {}}, "allOf: must be an array"),
    ({"$ref": "https://example.org/x"}, "only references within"),
    ({"$ref": 3}, "only references within"),
    ({"required": "a"}, "required: must be an array of strings"),
    ({"multipleOf": 0}, "multipleOf: must be a number above 0"),
    ({"multipleOf": True}, "multipleOf: must be a number above 0"),
    ({"multipleOf": 1001}, "more than 1000 as their common multiple"),
    ({"allOf": [{"multipleOf": 9.7}, {"multipleOf": 89}]}, "more than 1000 as their common multiple"),
    ({"patternProperties": {f"^{i}$": {} for i in range(65)}}, "more than 64 patternProperties"),
    ({"required": ["a"], "minProperties": 3}, "minProperties: is supported up to"),
    (3, "a schema must be an object"),
    ({"enum": ["x" * MAX_BYTES]}, f"the limit is {MAX_BYTES}"),
    (nested(MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels"),
    ({"anyOf": [{"$ref": f"#/{i}"} for i in range(MAX_REFERENCES + 1)]}, f"more than {MAX_REFERENCES}"),
]


@pytest.mark.parametrize(("schema", "sentence"), WRONG, ids=lambda value: str(value)[:50])
def test_what_is_not_supported_is_refused_by_name(schema: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_schema(schema, "tools[2].function.parameters")
    assert sentence in caught.value.message
    assert caught.value.message.startswith("tools[2].function.parameters: ")
    assert caught.value.param == "tools[2].function.parameters"


def test_the_limits_themselves_pass() -> None:
    check_schema(nested(MAX_DEPTH - 1), "x")
    empty = {"enum": [""]}
    check_schema({"enum": ["x" * (MAX_BYTES - len(json.dumps(empty, separators=(",", ":"))))]}, "x")


def test_references() -> None:
    root = {"$defs": {"a/b~c": [{"type": "null"}]}, "items": {"$ref": "#/$defs/a~1b~0c/0"}}
    assert resolve("#", root) is root
    assert resolve("#/$defs/a~1b~0c/0", root) == {"type": "null"}
    for nothing in ("#/$defs/x", "#/$defs/a~1b~0c/1", "#/items/$ref/x", "#anchor", "other#"):
        assert resolve(nothing, root) is None
    assert references({"items": {"$ref": "#/x"}, "anyOf": [{"$ref": "#"}]}) == {"#", "#/x"}


@given(st.recursive(st.just({}), lambda inner: st.fixed_dictionaries({"items": inner}), max_leaves=3))
def test_depth_needs_no_stack(schema: dict[str, Any]) -> None:
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="levels deep"):
        check_schema(schema, "x")
