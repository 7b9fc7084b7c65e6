"""The format of V3.2, character by character: the expected texts are spelled out, as the official encoder writes them."""

import json
from typing import Any

import msgspec
import pytest

from cluster.chat_encoding import ASSISTANT, BOS, DSML, EOS, THINK, THINK_END, USER, Message, Piece
from cluster.chat_encoding_v32 import render
from cluster.errors import InvalidRequest
from cluster.tools import JsonObjectFormat, JsonSchema, JsonSchemaFormat, Tool

TIDE: dict[str, Any] = {
    "name": "tide",
    "description": "Höhe der Flut",
    "parameters": {
        "type": "object",
        "properties": {"harbour": {"type": "string"}, "hours": {"type": "number", "default": 1.0}},
        "required": ["harbour"],
    },
    "strict": None,
}
CLOCK = {"name": "clock"}
TOOLS = [Tool(type="function", function=TIDE), Tool(type="function", function=CLOCK)]
TOOLS_TEXT = (
    "## Tools\n\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    'You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the '
    "user:\n"
    "<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="$FUNCTION_NAME">\n'
    '<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>\n'
    "...\n"
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="$FUNCTION_NAME2">\n'
    "...\n"
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls>\n\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use "
    'JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types '
    "(numbers, booleans, arrays, objects).\n\n"
    "If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. "
    "Here is an example:\n\n"
    "<｜DSML｜function_calls>\n"
    "...\n"
    "</｜DSML｜function_calls>\n\n"
    "<function_results>\n"
    "...\n"
    "</function_results>\n\n"
    "<think>...thinking about results</think>\n\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n"
    '{"name": "tide", "description": "Höhe der Flut", "parameters": {"type": "object", "properties": '
    '{"harbour": {"type": "string"}, "hours": {"type": "number", "default": 1.0}}, "required": ["harbour"]}, "strict": null}\n'
    '{"name": "clock"}\n'
    "</functions>\n"
)


def text(messages: list[dict[str, Any]], *, thinking: bool = False, **options: Any) -> str:
    history = msgspec.convert(messages, list[Message])
    return "".join(piece.text for piece in render(history, thinking=thinking, **options))


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def call(id: str, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "function": {"name": name, "arguments": json.dumps(arguments)}}


def result(id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def test_the_published_example() -> None:
    """From the model card of DeepSeek-V3.2."""
    history = [
        Message(role="user", content="hello"),
        Message(role="assistant", content="Hello! I am DeepSeek.", reasoning_content="A greeting."),
        Message(role="user", content="1+1=?"),
    ]
    assert render(history, thinking=True) == [
        Piece(BOS, True),
        Piece(USER, True),
        Piece("hello", False),
        Piece(ASSISTANT, True),
        Piece(THINK_END, True),
        Piece("Hello! I am DeepSeek.", False),
        Piece(EOS, True),
        Piece(USER, True),
        Piece("1+1=?", False),
        Piece(ASSISTANT, True),
        Piece(THINK, True),
    ]


def test_without_thinking_every_turn_begins_with_its_end() -> None:
    messages = [user("a"), {"role": "assistant", "content": "b", "reasoning_content": "r"}, user("c")]
    assert text(messages) == f"{BOS}{USER}a{ASSISTANT}{THINK_END}b{EOS}{USER}c{ASSISTANT}{THINK_END}"


def test_system_messages_stand_where_they_are_and_are_not_parted() -> None:
    a, b = {"role": "system", "content": "A"}, {"role": "system", "content": "B"}
    assert text([a, b, user("")]) == f"{BOS}AB{USER}{ASSISTANT}{THINK_END}"
    turn = {"role": "assistant", "content": "y"}
    assert text([user("x"), turn, a, user("z")]) == (
        f"{BOS}{USER}x{ASSISTANT}{THINK_END}y{EOS}A{USER}z{ASSISTANT}{THINK_END}"
    )


def test_users_may_follow_each_other() -> None:
    assert text([user("a"), user("b")], thinking=True) == (
        f"{BOS}{USER}a{ASSISTANT}{THINK_END}{USER}b{ASSISTANT}{THINK}"
    )


def test_the_tools_text() -> None:
    system = {"role": "system", "content": "Be brief."}
    expected = f"{BOS}Be brief.\n\n{TOOLS_TEXT}{USER}x{ASSISTANT}{THINK_END}"
    assert text([system, user("x")], tools=TOOLS) == expected
    assert text([user("x")], tools=TOOLS) == f"{BOS}\n\n{TOOLS_TEXT}{USER}x{ASSISTANT}{THINK_END}"
    split = [{"role": "system", "content": "Be "}, {"role": "system", "content": "brief."}, user("x")]
    assert text(split, tools=TOOLS) == expected


def test_the_markup_in_the_tools_text_is_special_and_a_client_s_is_not() -> None:
    tool = Tool(type="function", function={"name": "f", "description": f"{DSML}{THINK}{EOS}"})
    pieces = render([Message(role="user", content="x")], thinking=False, tools=[tool])
    special = [piece.text for piece in pieces if piece.special]
    assert special == [BOS, *[DSML] * 11, THINK, THINK_END, USER, ASSISTANT, THINK_END]


def test_the_reply_s_schema() -> None:
    schema = JsonSchemaFormat(json_schema=JsonSchema(name="n", schema={"type": "object", "title": "é"}))
    block = (
        "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "title": "é"}'
    )
    system = {"role": "system", "content": "S"}
    after = f"{USER}x{ASSISTANT}{THINK_END}"
    assert text([system, user("x")], response_format=schema) == f"{BOS}S\n\n{block}{after}"
    assert text([user("x")], response_format=schema) == f"{BOS}\n\n{block}{after}"
    both = text([system, user("x")], tools=TOOLS, response_format=schema)
    assert both == f"{BOS}S\n\n{TOOLS_TEXT}\n\n{block}{after}"
    assert text([system, user("x")], response_format=JsonObjectFormat()) == f"{BOS}S{after}"


def test_a_developer_asks_as_a_user_does() -> None:
    developer = {"role": "developer", "content": "find it"}
    asked = "\n\n# The user's message is: find it"
    assert text([developer], thinking=True) == f"{BOS}{USER}{asked}{ASSISTANT}{THINK}"
    assert text([developer], thinking=True, tools=TOOLS) == (
        f"{BOS}{USER}\n\n{TOOLS_TEXT}{asked}{ASSISTANT}{THINK}"
    )
    system = {"role": "system", "content": "S"}
    assert text([system, developer], tools=TOOLS) == (
        f"{BOS}S\n\n{TOOLS_TEXT}{USER}{asked}{ASSISTANT}{THINK_END}"
    )


def test_a_developer_s_message_that_the_format_would_lose_is_refused() -> None:
    messages = [{"role": "developer", "content": "x"}, user("y")]
    assert "x" in text(messages)
    with pytest.raises(InvalidRequest, match="must be the last") as caught:
        text(messages, thinking=True)
    assert caught.value.param == "messages[0].role"


CALLS: list[dict[str, Any]] = [
    user("When?"),
    {
        "role": "assistant",
        "reasoning_content": "Ask both.",
        "content": "One moment.",
        "tool_calls": [
            call("1", "tide", harbour='Kiel "Ost"\n', hours=2.50, deep=[1, {"é": None}], now=True),
            call("2", "clock"),
        ],
    },
    result("1", "2 m"),
    result("2", "noon"),
]
CALLS_TEXT = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="tide">\n'
    '<｜DSML｜parameter name="harbour" string="true">Kiel "Ost"\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="hours" string="false">2.5</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="deep" string="false">[1, {"é": null}]</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="now" string="false">true</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="clock">\n'
    "\n"
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls>"
)
RESULTS_TEXT = "\n\n<function_results>\n<result>2 m</result>\n<result>noon</result>\n</function_results>\n\n"


def test_calls_and_results() -> None:
    asked = f"{BOS}{USER}When?{ASSISTANT}"
    assert text(CALLS, thinking=True) == (
        f"{asked}{THINK}Ask both.{THINK_END}One moment.{CALLS_TEXT}{EOS}{RESULTS_TEXT}{THINK}"
    )
    assert text(CALLS) == f"{asked}{THINK_END}One moment.{CALLS_TEXT}{EOS}{RESULTS_TEXT}{THINK_END}"


def test_reasoning_is_kept_from_the_last_user_message_on() -> None:
    answered = [*CALLS, {"role": "assistant", "content": "At noon.", "reasoning_content": "Clear."}]
    assert text([*answered, user("Thanks.")], thinking=True) == (
        f"{BOS}{USER}When?{ASSISTANT}{THINK_END}One moment.{CALLS_TEXT}{EOS}{RESULTS_TEXT}{THINK_END}At noon.{EOS}"
        f"{USER}Thanks.{ASSISTANT}{THINK}"
    )
    again = {"role": "assistant", "reasoning_content": "Once more.", "tool_calls": [call("3", "clock")]}
    more = text([*CALLS, again, result("3", "one")], thinking=True)
    assert f"{THINK}Ask both.{THINK_END}" in more
    assert f"{THINK}Once more.{THINK_END}\n\n<" in more


def test_a_call_without_reasoning() -> None:
    silent = [user("x"), {"role": "assistant", "tool_calls": [call("1", "clock")]}, result("1", "")]
    assert f"{ASSISTANT}{THINK}{THINK_END}\n\n<{DSML}function_calls>" in text(silent, thinking=True)


def test_a_prefix_is_gone_on_with() -> None:
    prefix = {"role": "assistant", "content": "It is", "prefix": True}
    assert text([user("x"), prefix]) == f"{BOS}{USER}x{ASSISTANT}{THINK_END}It is"
    reasoned = {**prefix, "reasoning_content": "r"}
    assert text([user("x"), reasoned], thinking=True) == f"{BOS}{USER}x{ASSISTANT}{THINK}r{THINK_END}It is"
    with pytest.raises(InvalidRequest, match="required where the model thinks"):
        text([user("x"), prefix], thinking=True)


@pytest.mark.parametrize("arguments", ["", "[]", "{", "null", '{"a": "\\ud800"}', "[" * 100_000])
def test_arguments_must_be_an_object(arguments: str) -> None:
    wrong = {
        "role": "assistant",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}],
    }
    with pytest.raises(InvalidRequest, match="must be a JSON object") as caught:
        text([user("x"), wrong, result("1", "")])
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"
