"""Grammars are compiled before a worker sees them, and what is wrong is refused by the name of its field."""

import asyncio
import contextlib
from typing import Any

import pytest
from grammar_walks import CHECKPOINT, THINK_END, compiler, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import structured
from cluster.chat_encoding import ChatFormat
from cluster.errors import InvalidRequest
from cluster.json_schema import KEYWORDS
from cluster.structured import StructuredOutput
from cluster.tools import JsonObjectFormat, JsonSchema, JsonSchemaFormat, Tool
from workers.request import Grammar


@pytest.fixture(scope="module")
def output() -> StructuredOutput:
    return StructuredOutput.load(CHECKPOINT, tokenizer(), "v3.2")


def ask(output: StructuredOutput, *, thinking: bool = False, **wanted: Any) -> Grammar | None:
    return asyncio.run(output.grammar(thinking=thinking, **wanted))


def schema_format(schema: dict[str, Any]) -> JsonSchemaFormat:
    return JsonSchemaFormat(json_schema=JsonSchema(name="answer", schema=schema))


def strict(name: str, schema: dict[str, Any]) -> Tool:
    return Tool(type="function", function={"name": name, "strict": True, "parameters": schema})


def test_a_grammar_begins_behind_the_reasoning(output: StructuredOutput) -> None:
    at_once, later = (
        ask(output, thinking=thinking, response_format=JsonObjectFormat()) for thinking in (False, True)
    )
    assert at_once is not None
    assert later is not None
    assert (at_once.after, later.after) == (None, THINK_END)
    assert at_once.text == later.text
    compiler().check(at_once.text)
    assert ask(output) is None


FIELD = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        (
            {"type": "object", "properties": {"a": False}, "required": ["a"]},
            "required property 'a' is unsatisfiable",
        ),
        ({"type": "string", "format": "poem"}, "Unknown format: poem"),
        ({"type": "string", "pattern": "(?!a)"}, "look-around"),
        ({"type": "strng"}, "Invalid type: strng"),
        ({"$ref": "#/$defs/x"}, "does not exist"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf is supported only where"),
        (
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"{i}": {"const": j}}} for i in range(6)]} for j in range(7)
                ]
            },
            "too large",
        ),
    ],
)
def test_impossible_and_too_complex_schemas_are_named(
    output: StructuredOutput, schema: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(output, response_format=schema_format(schema))
    assert caught.value.message.startswith(f"{FIELD}: ")
    assert sentence in caught.value.message
    assert caught.value.param == FIELD


def test_the_tool_at_fault_is_named(output: StructuredOutput) -> None:
    good, bad = {"type": "object"}, {"properties": {"a": {"type": "string", "format": "poem"}}}
    for tools, index in (([strict("a", good), strict("b", bad)], 1), ([strict("b", bad)], 0)):
        with pytest.raises(InvalidRequest) as caught:
            ask(output, tools=tools, response_format=schema_format(good))
        assert caught.value.param == f"tools[{index}].function.parameters"
        assert "poem" in caught.value.message
    assert ask(output, tools=[strict("a", good)]) is not None


def test_many_tools_may_be_too_much_together(
    output: StructuredOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "MAX_CHARS", 2000)
    with pytest.raises(InvalidRequest, match="the limit is 2000") as caught:
        ask(output, tools=[strict(f"f{i}", {"properties": {f"p{i}": {}}}) for i in range(20)])
    assert caught.value.param == "tools"


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(
            [0, -1, 3, 2**40, 10**25, 0.5, 1e300, "", "a", "#", "#/$defs/a", "string", "object", "date", "("]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.sampled_from(sorted(KEYWORDS)), st.sampled_from(["a", "not", 'q"'])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "type": st.one_of(st.sampled_from(["object", "string", "array", ["string", "null"]]), ANYTHING),
        "properties": st.one_of(st.dictionaries(st.sampled_from("abc"), ANYTHING, max_size=2), ANYTHING),
        "required": st.one_of(st.lists(st.sampled_from("abc"), max_size=2), ANYTHING),
        "$defs": st.one_of(st.fixed_dictionaries({"a": ANYTHING}), ANYTHING),
        "items": ANYTHING,
        "enum": ANYTHING,
        "format": ANYTHING,
        "multipleOf": ANYTHING,
        "pattern": ANYTHING,
        "maxLength": ANYTHING,
        "anyOf": st.one_of(st.lists(ANYTHING, max_size=2), ANYTHING),
    },
)


@settings(max_examples=400)
@given(schema=SHAPED, chat_format=st.sampled_from(["v3.2", "v3.2-exp"]))
def test_whatever_the_schema_it_is_taken_or_refused(schema: dict[str, Any], chat_format: ChatFormat) -> None:
    wanted = StructuredOutput(compiler(), tokenizer(), chat_format)
    with contextlib.suppress(InvalidRequest):
        wanted._checked([], None, True, schema_format(schema))
    with contextlib.suppress(InvalidRequest):
        wanted._checked([strict("a", schema)], "required", True, None)
