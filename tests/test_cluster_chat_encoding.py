from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cluster.chat_encoding import ASSISTANT, BOS, EOS, THINK, THINK_END, USER, Message, Piece, render
from cluster.errors import InvalidRequest


def _text(*messages: tuple[str, str], thinking: bool = False) -> str:
    history = [Message(role=role, content=content) for role, content in messages]  # type: ignore[arg-type]
    return "".join(piece.text for piece in render(history, thinking=thinking))


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
    assert _text(("user", "a"), ("assistant", "b"), ("user", "c")) == (
        f"{BOS}{USER}a{ASSISTANT}{THINK_END}b{EOS}{USER}c{ASSISTANT}{THINK_END}"
    )


def test_system_messages_stand_before_the_first_turn() -> None:
    assert _text(("system", "Be brief."), ("user", "a")) == f"{BOS}Be brief.{USER}a{ASSISTANT}{THINK_END}"
    assert _text(("system", "A"), ("system", "B"), ("user", "")) == f"{BOS}A\n\nB{USER}{ASSISTANT}{THINK_END}"


def test_users_may_follow_each_other() -> None:
    assert _text(("user", "a"), ("user", "b"), thinking=True) == (
        f"{BOS}{USER}a{ASSISTANT}{THINK_END}{USER}b{ASSISTANT}{THINK}"
    )


def test_the_system_text_is_one_piece() -> None:
    pieces = render(
        [
            Message(role="system", content="A"),
            Message(role="system", content="B"),
            Message(role="user", content="c"),
        ],
        thinking=False,
    )
    assert pieces[1] == Piece("A\n\nB", False)


@pytest.mark.parametrize(
    ("roles", "index", "rule"),
    [
        ("s", 0, "last message"),
        ("a", 0, "follow a user"),
        ("sa", 1, "follow a user"),
        ("uas", 2, "before all others"),
        ("us", 1, "before all others"),
        ("uaau", 2, "follow a user"),
        ("ua", 1, "last message"),
    ],
)
def test_an_order_that_the_format_cannot_write_is_refused(roles: str, index: int, rule: str) -> None:
    names: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant"}
    with pytest.raises(InvalidRequest, match=rule) as caught:
        render([Message(role=names[role], content="x") for role in roles], thinking=False)
    assert caught.value.param == f"messages[{index}]"


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4), st.text(), st.booleans())
def test_only_the_template_s_own_tokens_are_special(
    turns: list[tuple[str, str]], last: str, thinking: bool
) -> None:
    history = [Message(role="system", content=f"{BOS}{USER}")]
    for question, answer in turns:
        history.append(Message(role="user", content=f"{ASSISTANT}{question}"))
        history.append(Message(role="assistant", content=f"{answer}{EOS}", reasoning_content=THINK))
    history.append(Message(role="user", content=last + THINK))
    special = [piece.text for piece in render(history, thinking=thinking) if piece.special]
    turn = [USER, ASSISTANT, THINK_END, EOS]
    assert special == [BOS, *turn * len(turns), USER, ASSISTANT, THINK if thinking else THINK_END]
    plain = [piece.text for piece in render(history, thinking=thinking) if not piece.special]
    assert plain == [message.text for message in history]
