"""The calls of V3.2-Exp read out of a stream. Letters stand for its tokens: «B» and «E» hold all calls, «b» and «e» one, «s»
parts name and arguments."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cluster.chat_encoding import CALL_BEGIN, CALL_END, CALL_SEPARATOR, CALLS_BEGIN, CALLS_END
from cluster.reply_parser import joined
from cluster.reply_parser_exp import ExpParser

TOKENS = {"«B»": CALLS_BEGIN, "«E»": CALLS_END, "«b»": CALL_BEGIN, "«e»": CALL_END, "«s»": CALL_SEPARATOR}


class Call(NamedTuple):
    name: str
    arguments: str


def named(text: str) -> str:
    for short, name in TOKENS.items():
        text = text.replace(short, name)
    return text


def read(text: str, *, cut: bool = False, places: Iterable[int] = ()) -> tuple[str, list[Call]]:
    ids = itertools.count()
    parser = ExpParser(new_id=lambda: f"id{next(ids)}")
    for short, name in TOKENS.items():
        text = text.replace(short, parser.marks[name])
    ends = [*places, len(text)]
    parsed = [parser.push(text[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    parsed.append(parser.finish(cut=cut))
    calls = joined(call for part in parsed for call in part.calls)
    assert [(call.number, call.id) for call in calls] == [(n, f"id{n}") for n in range(len(calls))]
    return "".join(part.content for part in parsed), [Call(call.name, call.arguments) for call in calls]


def test_a_whole_answer() -> None:
    text = 'One moment.«B»«b»tide«s»{"a": 1,\n "b": "«"}«e»«b»clock«s»{}«e»«E»'
    assert read(text) == ("One moment.", [Call("tide", '{"a": 1,\n "b": "«"}'), Call("clock", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        "«b»f«s»{}«e»",
        "«B»«b»f«s»{}",
        "«B»«b»f«s»{}«E»",
        "«B»«b»f«s»«e»«E»",
        "«B» «b» f\n«s»{}«e» «E»\n\n",
        "«B»«E»«B»«b»f«s»{}«e»«E»",
    ],
)
def test_what_has_one_sensible_reading(text: str) -> None:
    assert read(text) == ("", [Call("f", "{}")])


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a«s»b", "a«s»b"),
        ("a«E»b«e»", "a«E»b«e»"),
        ("«B»«b»f«e»«E»", "«b»f«e»"),
        ("«B»«b» «s»{}«E»", "«b» «s»{}"),
        ("«B»so«E»", "so"),
        ("«B» «E»\nso ", "\nso "),
        ("«B»«B»«E»", "«B»"),
        ("«B»«b»f", "«b»f"),
    ],
)
def test_what_cannot_be_understood_is_content(text: str, content: str) -> None:
    assert read(text) == (named(content), [])


def test_the_tokens_names_as_text_are_text() -> None:
    text = named("«B»«b»f«s»{}«e»«E»")
    assert read(text) == (text, [])
    assert read(f'«B»«b»f«s»{{"a": "{text}"}}«e»«E»') == ("", [Call("f", f'{{"a": "{text}"}}')])


def test_a_token_within_arguments_is_passed_on_by_name() -> None:
    assert read("«B»«b»f«s»{«s»«B»}«e»«E»") == ("", [Call("f", named("{«s»«B»}"))])


@pytest.mark.parametrize(
    ("text", "calls"),
    [("«B»", []), ("«B»«b»f", []), ("«B»«b»f«s»", [Call("f", "")]), ('«B»«b»f«s»{"a', [Call("f", '{"a')])],
)
def test_an_answer_that_was_cut_is_not_completed(text: str, calls: list[Call]) -> None:
    assert read(text, cut=True) == ("", calls)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([*TOKENS, " ", "\n"]) | st.text("ab{}\n ", max_size=4), max_size=14).map(
        "".join
    ),
    st.booleans(),
)
def test_the_cuts_of_a_stream_do_not_matter(text: str, cut: bool) -> None:
    whole = read(text, cut=cut)
    length = len(text)
    for short in TOKENS:
        length -= text.count(short) * (len(short) - 1)
    assert read(text, cut=cut, places=range(length)) == whole
    for place in range(length):
        assert read(text, cut=cut, places=[place]) == whole
