"""The format of V3.2-Exp, character by character: the expected texts are spelled out, as the published template writes them."""

from typing import Any

import msgspec
import pytest

from cluster.chat_encoding import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_SEPARATOR,
    EOS,
    THINK,
    THINK_END,
    USER,
    Message,
)
from cluster.chat_encoding_exp import render
from cluster.errors import InvalidRequest
from cluster.tools import JsonSchema, JsonSchemaFormat, Tool

TOOLS = [
    Tool(
        type="function",
        function={
            "name": "tide",
            "description": "Höhe der Flut",
            "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}},
        },
    ),
    Tool(type="function", function={"name": "clock"}),
]
TOOLS_TEXT = (
    "## Tools\n"
    "You have access to the following tools:\n\n"
    "### tide\n"
    "Description: Höhe der Flut\n\n"
    'Parameters: {"type": "object", "properties": {"harbour": {"type": "string"}}}\n\n'
    "### clock\n"
    "Description: \n\n"
    'Parameters: {"type": "object", "properties": {}}\n\n'
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
    "{additional_tool_calls}<｜tool▁calls▁end｜>\n\n"
    "Where:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)


def text(messages: list[dict[str, Any]], *, thinking: bool = False, **options: Any) -> str:
    history = msgspec.convert(messages, list[Message])
    return "".join(piece.text for piece in render(history, thinking=thinking, **options))


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_turns() -> None:
    messages = [user("a"), assistant("b", reasoning_content="r"), user("c")]
    turns = f"{BOS}{USER}a{ASSISTANT}{THINK_END}b{EOS}{USER}c{ASSISTANT}"
    assert text(messages) == turns + THINK_END
    assert text(messages, thinking=True) == turns + THINK
    assert text([user("a"), user("b")]) == f"{BOS}{USER}a{USER}b{ASSISTANT}{THINK_END}"


def test_system_messages_are_gathered_at_the_beginning() -> None:
    a, b = {"role": "system", "content": "A"}, {"role": "system", "content": "B"}
    expected = f"{BOS}A\n\nB{USER}x{ASSISTANT}{THINK_END}"
    assert text([a, b, user("x")]) == text([a, user("x"), b]) == expected


def test_reasoning_within_an_old_content_is_dropped() -> None:
    messages = [user("a"), assistant(f"r{THINK_END}b{THINK_END}c"), user("d")]
    assert (
        text(messages) == f"{BOS}{USER}a{ASSISTANT}{THINK_END}b{THINK_END}c{EOS}{USER}d{ASSISTANT}{THINK_END}"
    )


def test_the_tools_text() -> None:
    after = f"{USER}x{ASSISTANT}{THINK_END}"
    system = {"role": "system", "content": "S"}
    assert text([system, user("x")], tools=TOOLS) == f"{BOS}S\n\n{TOOLS_TEXT}{after}"
    assert text([user("x")], tools=TOOLS) == f"{BOS}\n\n{TOOLS_TEXT}{after}"


def test_the_markup_in_the_tools_text_is_special_and_a_client_s_is_not() -> None:
    tool = Tool(type="function", function={"name": "f", "description": f"{CALL_BEGIN}{EOS}"})
    pieces = render([Message(role="user", content="x")], thinking=False, tools=[tool])
    special = [piece.text for piece in pieces if piece.special]
    assert special.count(CALL_BEGIN) == special.count(CALL_SEPARATOR) == 1
    assert EOS not in special


def test_calls_and_results() -> None:
    calls = [
        {"id": "1", "function": {"name": "tide", "arguments": '{"harbour":"Kiel"}'}},
        {"id": "2", "function": {"name": "clock", "arguments": "{}"}},
    ]
    messages = [
        user("When?"),
        assistant("One moment.", tool_calls=calls),
        {"role": "tool", "tool_call_id": "1", "content": "2 m"},
        {"role": "tool", "tool_call_id": "2", "content": "noon"},
    ]
    expected = (
        f"{BOS}{USER}When?{ASSISTANT}{THINK_END}One moment."
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tide<｜tool▁sep｜>{"harbour":"Kiel"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        f"{EOS}"
        "<｜tool▁output▁begin｜>2 m<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>"
    )
    assert text(messages) == text(messages, thinking=True) == expected
    answered = [*messages, assistant(f"At{THINK_END}noon."), user("Thanks.")]
    assert text(answered) == f"{expected}At{THINK_END}noon.{EOS}{USER}Thanks.{ASSISTANT}{THINK_END}"


def test_there_are_no_words_for_the_reply_s_schema() -> None:
    schema = JsonSchemaFormat(json_schema=JsonSchema(name="n", schema={"type": "object"}))
    assert text([user("x")], response_format=schema) == text([user("x")])


def test_a_prefix_is_gone_on_with() -> None:
    messages = [user("x"), assistant("It is", prefix=True)]
    assert text(messages) == f"{BOS}{USER}x{ASSISTANT}{THINK_END}It is"
    with pytest.raises(InvalidRequest, match="where it thinks") as caught:
        text(messages, thinking=True)
    assert caught.value.param == "messages[1].prefix"


def test_developers_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="use system") as caught:
        text([{"role": "developer", "content": "x"}])
    assert caught.value.param == "messages[0].role"
