"""What both chat formats hold to."""

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from cluster import chat_encoding_exp, chat_encoding_v32
from cluster.chat_encoding import ASSISTANT, BOS, EOS, THINK, THINK_END, USER, Message, check_fields
from cluster.errors import InvalidRequest

RENDER = {"v3.2": chat_encoding_v32.render, "v3.2-exp": chat_encoding_exp.render}
ROLES = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}


def conversation(shape: str) -> list[Message]:
    """Roles by their first letters: `c` is an assistant with a call, and with the digits after it so many; `t` answers the next
    one; `p` is an assistant's prefix."""
    messages: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for letter in shape:
        if letter.isdigit():
            for number in range(1, int(letter)):
                messages[-1]["tool_calls"].append(call(f"{len(messages)}.{number}"))
                open_calls.append(f"{len(messages)}.{number}")
        elif letter == "c":
            open_calls = [f"{len(messages) + 1}.0"]
            messages.append({"role": "assistant", "tool_calls": [call(open_calls[0])]})
        elif letter == "t":
            id = open_calls.pop(0) if open_calls else "none"
            messages.append({"role": "tool", "content": "x", "tool_call_id": id})
        elif letter == "p":
            messages.append({"role": "assistant", "content": "x", "prefix": True})
        else:
            messages.append({"role": ROLES[letter], "content": "x"})
    return msgspec.convert(messages, list[Message])


def call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "shape", ["u", "su", "ssu", "uu", "uau", "suctu", "uc2tt", "uctct", "uctau", "up", "uctp"]
)
@pytest.mark.parametrize("name", RENDER)
def test_orders_that_both_formats_write(name: str, shape: str) -> None:
    assert RENDER[name](conversation(shape), thinking=False)


@pytest.mark.parametrize(
    ("shape", "param", "rule"),
    [
        ("s", "messages[0]", "last message"),
        ("a", "messages[0]", "follow a user"),
        ("sa", "messages[1]", "follow a user"),
        ("uaau", "messages[2]", "follow a user"),
        ("ua", "messages[1]", "last message"),
        ("upu", "messages[1].prefix", "last message only"),
        ("ut", "messages[1].tool_call_id", "no unanswered call"),
        ("uctt", "messages[3].tool_call_id", "no unanswered call"),
        ("uctut", "messages[4].tool_call_id", "no unanswered call"),
        ("uc", "messages[1]", "'2.0' must be answered"),
        ("ucu", "messages[2]", "'2.0' must be answered"),
        ("ucst", "messages[2]", "'2.0' must be answered"),
        ("uc2t", "messages[2]", "'2.1' must be answered"),
        ("uc2tu", "messages[3]", "'2.1' must be answered"),
    ],
)
@pytest.mark.parametrize("name", RENDER)
def test_an_order_that_no_format_can_write_is_refused(name: str, shape: str, param: str, rule: str) -> None:
    with pytest.raises(InvalidRequest, match=rule) as caught:
        RENDER[name](conversation(shape), thinking=False)
    assert caught.value.param == param


def test_a_call_is_answered_once() -> None:
    messages = conversation("uc2tt")
    twice = [*messages[:3], messages[2]]
    with pytest.raises(InvalidRequest, match="no unanswered call"):
        RENDER["v3.2"](twice, thinking=False)
    same = msgspec.convert({"role": "assistant", "tool_calls": [call("a"), call("a")]}, Message)
    with pytest.raises(InvalidRequest, match="there twice") as caught:
        RENDER["v3.2"]([messages[0], same], thinking=False)
    assert caught.value.param == "messages[1].tool_calls[1].id"


@pytest.mark.parametrize("name", RENDER)
def test_results_are_written_in_the_order_of_the_calls(name: str) -> None:
    messages = conversation("uc3ttt")
    results = [msgspec.structs.replace(m, content=f"result {m.tool_call_id}") for m in messages[2:]]
    in_order = RENDER[name]([*messages[:2], *results], thinking=False)
    assert RENDER[name]([*messages[:2], *reversed(results)], thinking=False) == in_order


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "content"),
        ({"role": "tool", "tool_call_id": "a"}, "content"),
        ({"role": "tool", "content": ""}, "tool_call_id"),
        ({"role": "user", "content": "", "tool_call_id": "a"}, "tool_call_id"),
        ({"role": "user", "content": "", "reasoning_content": "a"}, "reasoning_content"),
        ({"role": "tool", "content": "", "tool_call_id": "a", "tool_calls": [call("a")]}, "tool_calls"),
        ({"role": "system", "content": "", "prefix": True}, "prefix"),
        ({"role": "assistant", "content": "", "prefix": True, "tool_calls": [call("a")]}, "prefix"),
        ({"role": "developer", "content": ""}, "content"),
    ],
)
def test_fields_that_a_role_must_or_must_not_have(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_fields([*conversation("u"), msgspec.convert(message, Message)])
    assert caught.value.param == f"messages[1].{param}"


@pytest.mark.parametrize("name", RENDER)
@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4), st.text(), st.booleans())
def test_only_the_template_s_own_tokens_are_special(
    name: str, turns: list[tuple[str, str]], last: str, thinking: bool
) -> None:
    history = [Message(role="system", content=f"{BOS}{USER}")]
    for question, answer in turns:
        history.append(Message(role="user", content=f"{ASSISTANT}{question}"))
        history.append(Message(role="assistant", content=f"{answer}{EOS}", reasoning_content=THINK))
    history.append(Message(role="user", content=last + THINK))
    pieces = RENDER[name](history, thinking=thinking)
    turn = [USER, ASSISTANT, THINK_END, EOS]
    assert [piece.text for piece in pieces if piece.special] == [
        BOS,
        *turn * len(turns),
        USER,
        ASSISTANT,
        THINK if thinking else THINK_END,
    ]
    assert [piece.text for piece in pieces if not piece.special] == [message.text for message in history]
