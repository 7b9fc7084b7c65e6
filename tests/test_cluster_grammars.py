"""Answers with calls, in both chat formats: sampled at random they are what was asked for; written by hand they are allowed."""

import itertools
import json
import re
from typing import Any

import jsonschema
import pytest
from grammar_walks import Walk, follows, vocabulary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_workers_grammar import SCHEMAS

from cluster.chat_encoding import ChatFormat
from cluster.errors import InvalidRequest
from cluster.grammars import Draft, draft
from cluster.reply_parser import joined
from cluster.reply_parser_exp import ExpParser
from cluster.reply_parser_v32 import V32Parser
from cluster.tools import (
    FunctionName,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    NamedTool,
    TextFormat,
    Tool,
)

FORMATS: tuple[ChatFormat, ...] = ("v3.2", "v3.2-exp")
BOTH = list(itertools.product(FORMATS, (True, False)))


def tool(name: str, parameters: dict[str, Any] | None = None, *, strict: bool = True) -> Tool:
    return Tool(type="function", function={"name": name, "parameters": parameters, "strict": strict})


def named(name: str) -> NamedTool:
    return NamedTool(type="function", function=FunctionName(name=name))


def made(chat_format: ChatFormat, *, markers: bool = True, **wanted: Any) -> Draft:
    found = draft(chat_format=chat_format, markers=vocabulary(markers=markers).added, **wanted)
    assert found is not None
    return found


def read(chat_format: ChatFormat, answer: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Content and calls, strictly."""
    if chat_format == "v3.2":
        content, *calls = answer.split("\n\n<｜DSML｜function_calls>\n")
        if not calls:
            return content, []
        (block,) = calls
        block = block.removesuffix("</｜DSML｜function_calls>")
        pattern = r'<｜DSML｜invoke name="([^"]*)">\n(.*?)</｜DSML｜invoke>\n'
        assert re.fullmatch(f"({pattern})+", block, re.S)
        return content, [(name, _arguments(text)) for name, text in re.findall(pattern, block, re.S)]
    content, *calls = answer.split("<｜tool▁calls▁begin｜>")
    if not calls:
        return content, []
    (block,) = calls
    block = block.removesuffix("<｜tool▁calls▁end｜>")
    pattern = "<｜tool▁call▁begin｜>([^<]*)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>"
    assert re.fullmatch(f"({pattern})+", block, re.S)
    return content, [(name, json.loads(text)) for name, text in re.findall(pattern, block, re.S)]


def _arguments(text: str) -> dict[str, Any]:
    if text == "\n":
        return {}
    pattern = r'<｜DSML｜parameter name="([^"]*)" string="(true|false)">(.*?)</｜DSML｜parameter>\n'
    assert re.fullmatch(f"({pattern})+", text, re.S)
    found = re.findall(pattern, text, re.S)
    return {name: value if raw == "true" else json.loads(value) for name, raw, value in found}


def parsed(
    chat_format: ChatFormat, answer: str, markers: bool
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """As the gateway reads it, character by character."""
    parser = V32Parser(marked=markers) if chat_format == "v3.2" else ExpParser()
    for name, mark in parser.marks.items():
        answer = answer.replace(name, mark)
    parts = [parser.push(character) for character in answer] + [parser.finish(cut=False)]
    calls = joined(call for part in parts for call in part.calls)
    return "".join(part.content for part in parts), [
        (call.name, json.loads(call.arguments)) for call in calls
    ]


PARAMETER_NAMES = st.sampled_from(["city", "days", "what else?"])
PARAMETERS = st.builds(
    lambda properties, required: {
        "type": "object",
        "properties": properties,
        "required": [name for name in required if name in properties],
        "additionalProperties": False,
    },
    st.dictionaries(PARAMETER_NAMES, SCHEMAS, max_size=3),
    st.lists(PARAMETER_NAMES, unique=True),
)


@settings(max_examples=60)
@given(schema=PARAMETERS, kind=st.sampled_from(BOTH), seed=st.integers(0, 2**32))
def test_random_calls_of_a_strict_tool_validate(
    schema: dict[str, Any], kind: tuple[ChatFormat, bool], seed: int
) -> None:
    chat_format, markers = kind
    wanted = made(
        chat_format,
        markers=markers,
        tools=[tool("look_up", schema), tool("get")],
        choice="required",
        parallel=False,
    )
    answer = Walk(seed, markers=markers).answer(wanted.text)
    content, ((name, arguments),) = read(chat_format, answer)
    assert content == ""
    if chat_format == "v3.2" or markers:  # V3.2-Exp always has tokens for its markers
        assert parsed(chat_format, answer, markers) == ("", [(name, arguments)])
    if name == "get":
        assert arguments == {}
        return
    assert name == "look_up"
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(arguments)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=4,
)
OPEN = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "any": {}, "some": {"type": ["string", "null", "integer"]}},
    "required": ["text"],
}
ORDER = ["text", "any", "some", "a", "b c"].index


def written(chat_format: ChatFormat, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """As the model's makers encode them."""
    if chat_format == "v3.2-exp":
        inner = "".join(
            f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments, ensure_ascii=False)}<｜tool▁call▁end｜>"
            for name, arguments in calls
        )
        return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"
    blocks = []
    for name, arguments in calls:
        lines = []
        for key, value in arguments.items():
            raw = isinstance(value, str)
            text = value if raw else json.dumps(value, ensure_ascii=False)
            lines.append(
                f'<｜DSML｜parameter name="{key}" string="{"true" if raw else "false"}">{text}</｜DSML｜parameter>'
            )
        joined = "\n".join(lines)
        blocks.append(f'<｜DSML｜invoke name="{name}">\n{joined}\n</｜DSML｜invoke>')
    joined = "\n".join(blocks)
    return f"\n\n<｜DSML｜function_calls>\n{joined}\n</｜DSML｜function_calls>"


@settings(max_examples=60)
@given(
    kind=st.sampled_from(BOTH),
    content=TEXTS,
    calls=st.lists(
        st.tuples(
            st.just("strict"),
            st.fixed_dictionaries(
                {"text": TEXTS}, optional={"any": JSON, "some": st.one_of(TEXTS, st.none())}
            ),
        )
        | st.tuples(st.just("loose"), st.dictionaries(st.sampled_from(["a", "b c"]), JSON, max_size=2))
        | st.tuples(st.just("empty"), st.just({})),
        max_size=3,
    ),
)
@example(kind=("v3.2", True), content="a\n\n<", calls=[("strict", {"text": "</", "any": "<"})])
@example(kind=("v3.2", False), content="<｜DSML", calls=[("strict", {"text": "</｜DSML", "any": "x"})])
def test_what_a_model_was_trained_to_write_is_allowed(
    kind: tuple[ChatFormat, bool], content: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    chat_format, markers = kind
    calls = [
        (name, {key: _plain(arguments[key]) for key in sorted(arguments, key=ORDER)})
        for name, arguments in calls
    ]
    tools = [tool("strict", OPEN), tool("loose", {"not": {}}, strict=False), tool("empty")]
    text = made(chat_format, markers=markers, tools=tools).text
    answer = content + (written(chat_format, calls) if calls else "")
    assert follows(text, answer, markers=markers)
    required = made(chat_format, markers=markers, tools=tools, choice="required").text
    assert follows(required, answer, markers=markers) == (bool(calls) and not content)
    single = made(chat_format, markers=markers, tools=tools, choice="required", parallel=False).text
    assert follows(single, answer, markers=markers) == (len(calls) == 1 and not content)
    for name in ("strict", "empty"):
        only = made(chat_format, markers=markers, tools=tools, choice=named(name)).text
        assert follows(only, answer, markers=markers) == ([n for n, _ in calls] == [name] and not content)


def _plain(value: Any) -> Any:
    """Without control characters in JSON strings, which would need an escape that is not allowed."""
    if isinstance(value, str):
        return re.sub(r"[\x00-\x1f\x7f]", "", value)
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return value


@pytest.mark.parametrize(("chat_format", "markers"), BOTH)
def test_markup_is_in_its_place_or_nowhere(chat_format: ChatFormat, markers: bool) -> None:
    text = made(chat_format, markers=markers, tools=[tool("get")]).text
    call = written(chat_format, [("get", {})])
    assert follows(text, f"So:{call}", markers=markers)
    for wrong in (
        call[:-1],
        f"{call} ",
        f"{call}{call}",
        call.replace("get", "got"),
        call.replace("\n\n<", "\n<"),
    ):
        if wrong != call:
            assert not follows(text, wrong, markers=markers)


@pytest.mark.parametrize("chat_format", FORMATS)
def test_only_what_needs_a_grammar_gets_one(chat_format: ChatFormat) -> None:
    loose = [tool("get", strict=False)]
    free: list[dict[str, Any]] = [
        {},
        {"tools": loose},
        {"tools": loose, "choice": "auto", "response_format": TextFormat()},
        {"tools": [tool("get")], "choice": "none"},
        {"parallel": False},
        {"tools": loose, "choice": "none", "parallel": False},
    ]
    for wanted in free:
        assert draft(chat_format=chat_format, markers={}, **wanted) is None
    ruled: list[dict[str, Any]] = [
        {"tools": [tool("get")]},
        {"tools": loose, "choice": "required"},
        {"tools": loose, "choice": named("get")},
        {"tools": loose, "parallel": False},
        {"response_format": JsonObjectFormat()},
        {"tools": loose, "choice": "none", "response_format": JsonObjectFormat()},
    ]
    for wanted in ruled:
        assert draft(chat_format=chat_format, markers={}, **wanted) is not None


@pytest.mark.parametrize("chat_format", FORMATS)
def test_a_reply_in_a_format_may_be_calls_instead(chat_format: ChatFormat) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = JsonSchemaFormat(json_schema=JsonSchema(name="answer", schema=schema, strict=True))
    call = written(chat_format, [("get", {})])
    text = made(chat_format, tools=[tool("get")], response_format=wanted).text
    assert [follows(text, answer) for answer in ('{"a": 1}', call, "text", f'{{"a": 1}}{call}')] == [
        True,
        True,
        False,
        False,
    ]
    forced = made(chat_format, tools=[tool("get")], choice="required", response_format=wanted).text
    assert [follows(forced, answer) for answer in ('{"a": 1}', call)] == [False, True]
    none = made(chat_format, tools=[tool("get")], choice="none", response_format=wanted).text
    assert [follows(none, answer) for answer in ('{"a": 1}', call)] == [True, False]


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        ('{"a": {"b": [1, 2.5e3, "x\\n\\"", null]}}', True),
        ('{\n  "a": 1\n}', True),
        ('{\n\t"a":\n1\n }', True),
        ("{}", True),
        ("[]", False),
        ('{"a": 1}\n', False),
        ('{"a": 1,}', False),
        ('{"a": "\\u0041"}', False),
        ('{"a": "\x01"}', False),
        ('{"a":  1}', False),
        ('{"a":\n\n1}', False),
        ('{"a":\n' + 33 * " " + "1}", False),
    ],
)
def test_a_json_object(answer: str, allowed: bool) -> None:
    assert follows(made("v3.2", response_format=JsonObjectFormat()).text, answer) == allowed


WRONG = [
    ({"anyOf": []}, "anyOf is not supported at the top"),
    ({"type": "string"}, "type: must be object"),
    ({"properties": {}, "required": ["x"]}, "'x' is not among the properties"),
    ({"properties": {'a"b': {}}}, "the name of a parameter"),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, "only references to definitions"),
    ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "leads nowhere"),
    ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"$ref": "#/$defs/x"}}}, "leads nowhere"),
    ({"properties": {"a": False}}, "no value is allowed"),
    ({"properties": {"a": {"type": "string", "enum": [1]}}}, "no value is allowed"),
    ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}}, "maxLength is less"),
    ({"properties": {"a": {"type": "string", "minLength": -1}}}, "minLength: must be a whole number"),
    ({"properties": {"a": {"enum": ["x｜DSML｜"]}}}, "must not contain ｜DSML｜"),
]


@pytest.mark.parametrize(("schema", "sentence"), WRONG, ids=str)
def test_parameters_that_dsml_cannot_hold_are_refused(schema: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        made("v3.2", tools=[tool("loose", schema, strict=False), tool("get", schema)])
    assert sentence in caught.value.message
    assert caught.value.param == "tools[1].function.parameters"
    assert made("v3.2", tools=[tool("get", schema, strict=False)], choice="required")
