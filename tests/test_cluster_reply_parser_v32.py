"""DSML read out of a stream. `§` stands for the marker, be it a token or text."""

import itertools
import json
import re
from collections.abc import Iterable
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from cluster.chat_encoding import DSML
from cluster.reply_parser import Parsed, joined
from cluster.reply_parser_v32 import MAX_TAG_CHARS, V32Parser

BEGIN, END = "\n\n<§function_calls>\n", "</§function_calls>"
INVOKE = '<§invoke name="f">\n'
STRING, JSON = '<§parameter name="s" string="true">', '<§parameter name="j" string="false">'
P_END, I_END = "</§parameter>\n", "</§invoke>\n"


class Call(NamedTuple):
    name: str
    arguments: str


def named(text: str) -> str:
    return text.replace("§", DSML)


def read(pieces: Iterable[str], *, marked: bool, cut: bool = False) -> tuple[str, list[Call]]:
    parsed = list(deltas(pieces, marked=marked, cut=cut))
    calls = joined(call for part in parsed for call in part.calls)
    assert [call.number for call in calls] == list(range(len(calls)))
    assert [call.id for call in calls] == [f"id{number}" for number in range(len(calls))]
    return "".join(part.content for part in parsed), [Call(call.name, call.arguments) for call in calls]


def deltas(pieces: Iterable[str], *, marked: bool, cut: bool = False) -> Iterable[Parsed]:
    ids = itertools.count()
    parser = V32Parser(marked=marked, new_id=lambda: f"id{next(ids)}")
    mark = parser.marks.get(DSML, DSML)
    for piece in pieces:
        yield parser.push(piece.replace("§", mark))
    yield parser.finish(cut=cut)


def both(text: str, *, cut: bool = False) -> tuple[str, list[Call]]:
    """Read with the marker as a token and as text, in one piece and by character; all must agree."""
    ways = [
        read(pieces, marked=marked, cut=cut)
        for marked in (True, False)
        for pieces in ([text], list(text), re.split("(?<=[<>\n])", text))
    ]
    assert all(way == ways[0] for way in ways)
    return ways[0]


def test_a_whole_answer() -> None:
    content, calls = both(
        f"One moment.{BEGIN}"
        f'{INVOKE}{STRING}Kiel "Ost"\n\té</§parameter>\n<§parameter name="n" string="false">[1, {{"a": null}}]{P_END}{I_END}'
        f'<§invoke name="clock">\n\n</§invoke>\n{END}'
    )
    assert content == "One moment."
    arguments = r'{"s": "Kiel \"Ost\"\n\té", "n": [1, {"a": null}]}'
    assert calls == [Call("f", arguments), Call("clock", "{}")]
    assert json.loads(arguments) == {"s": 'Kiel "Ost"\n\té', "n": [1, {"a": None}]}


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a\n\n\n", "a\n\n\n"),
        ("a < b <｜ c <｜DSML｜function", "a < b <｜ c <｜DSML｜function"),
        ("</§function_calls>", named("</§function_calls>")),
        ('<§invoke name="f">', named('<§invoke name="f">')),
    ],
)
def test_what_is_no_call_is_content(text: str, content: str) -> None:
    assert both(text) == (content, [])


@pytest.mark.parametrize(
    ("before", "content"),
    [
        ("", ""),
        ("\n", ""),
        ("\n\n", ""),
        ("\n\n\n", "\n"),
        ("a\n", "a"),
        ("a\n\n \n\n", "a\n\n "),
        ("a", "a"),
    ],
)
def test_two_line_breaks_belong_to_the_block(before: str, content: str) -> None:
    assert both(before + BEGIN.lstrip() + INVOKE + I_END + END) == (content, [Call("f", "{}")])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (f"{JSON}1e3{P_END}", '{"j": 1e3}'),
        (f'{JSON} {{"a":\n1}} {P_END}', '{"j":  {"a":\n1} }'),
        (f"{JSON}hello{P_END}", '{"j": "hello"}'),
        (f"{JSON}{P_END}", '{"j": ""}'),
        (f"{JSON}NaN{P_END}", '{"j": "NaN"}'),
        (f'<§parameter name="x">12{P_END}', '{"x": 12}'),
        (f'<§parameter name="x">twelve{P_END}', '{"x": "twelve"}'),
        (f'<§parameter  name="a\\b>c"\nstring="true" >v{P_END}', r'{"a\\b>c": "v"}'),
        (f"{STRING}a </b> </｜DSML｜x> <§invoke>{P_END}", '{"s": "a </b> </｜DSML｜x> <｜DSML｜invoke>"}'),
        (f'{JSON}"a<§invoke"{P_END}', '{"j": "a<｜DSML｜invoke"}'),
        (f"{STRING}a{P_END}{STRING}b{P_END}", '{"s": "a", "s": "b"}'),
    ],
)
def test_values(text: str, arguments: str) -> None:
    assert both(BEGIN + INVOKE + text + I_END + END) == ("", [Call("f", arguments)])


def test_too_deep_a_value_is_a_string() -> None:
    deep = "[" * 100_000
    parser = V32Parser(marked=False)
    parsed = parser.push(named(BEGIN + INVOKE + JSON + deep + P_END + I_END + END))
    assert parsed.calls[0].arguments == f'{{"j": "{deep}"}}'


@pytest.mark.parametrize(
    "text",
    [
        f"{INVOKE}{STRING}v{P_END}{INVOKE}{I_END}{END}",
        f"{INVOKE}{STRING}v{P_END}{INVOKE}{END}",
        f"{INVOKE}{STRING}v{P_END}{I_END}{INVOKE}{I_END}",
        f"{INVOKE}{STRING}v{P_END}{INVOKE}",
        f"{INVOKE}{STRING}v{P_END}{I_END}{END}\n\n<§function_calls>{INVOKE}{I_END}{END}\n \n",
    ],
)
def test_a_missing_end_is_read_as_if_it_were_there(text: str) -> None:
    assert both(BEGIN + text) == ("", [Call("f", '{"s": "v"}'), Call("f", "{}")])


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f" so {INVOKE}{I_END}{END}", "\n so "),
        (f"{INVOKE}{I_END}{END}\n\nDone. ", "\n\nDone. "),
        (f"{INVOKE}so{I_END}{END}", "\nso"),
        (f'<§invoke nome="f">{INVOKE}{I_END}{END}', '\n<｜DSML｜invoke nome="f">'),
        (f"{STRING}v{P_END}{INVOKE}{I_END}{END}", named(f"\n{STRING}v{P_END}")),
        (f"{INVOKE}{P_END}{I_END}{END}", named(f"\n{P_END}")),
        (
            f'<§invoke name="{"x" * MAX_TAG_CHARS}">{INVOKE}{I_END}{END}',
            f'\n<｜DSML｜invoke name="{"x" * MAX_TAG_CHARS}">',
        ),
        (f"{INVOKE}{I_END}{END}{END}", named(END)),
    ],
)
def test_what_cannot_be_understood_is_content(text: str, content: str) -> None:
    assert both(BEGIN + text) == (content, [Call("f", "{}")])


def test_a_call_of_an_unknown_tool_is_a_call() -> None:
    """The client knows its tools; the parser does not."""
    assert both(f'{BEGIN}<§invoke name="no such">{I_END}{END}') == ("", [Call("no such", "{}")])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("a\n\n<", "a\n\n<", []),
        ("a\n\n<§function_ca", "a", []),
        (f"a{BEGIN}", "a", []),
        (f"{BEGIN}<§invoke na", "", []),
        (f"{BEGIN}{INVOKE}", "", [Call("f", "")]),
        (f"{BEGIN}{INVOKE}<§param", "", [Call("f", "")]),
        (f"{BEGIN}{INVOKE}{STRING}half", "", [Call("f", '{"s": "half')]),
        (f"{BEGIN}{INVOKE}{STRING}half</§param", "", [Call("f", '{"s": "half')]),
        (f"{BEGIN}{INVOKE}{JSON}[1, 2", "", [Call("f", '{"j": [1, 2')]),
        (f"{BEGIN}{INVOKE}{STRING}v{P_END}", "", [Call("f", '{"s": "v"')]),
        (f"{BEGIN}{INVOKE}{I_END}</§func", "", [Call("f", "{}")]),
    ],
)
def test_an_answer_that_was_cut_is_not_completed(text: str, content: str, calls: list[Call]) -> None:
    """Half a call must not look like a whole one."""
    assert both(text, cut=True) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{BEGIN}{INVOKE}{STRING}half", "", [Call("f", '{"s": "half')]),
        (f"{BEGIN}{INVOKE}{JSON}[1, 2", "", [Call("f", '{"j": [1, 2')]),
        (f"{BEGIN}{INVOKE}{STRING}v{P_END}", "", [Call("f", '{"s": "v"}')]),
        ("a\n\n<§function_calls", named("a\n\n<§function_calls"), []),
    ],
)
def test_a_model_that_ends_within_a_call(text: str, content: str, calls: list[Call]) -> None:
    """Where all its values are complete, so is the call; half a value stays half a value."""
    assert both(text) == (content, calls)


def test_the_marker_s_characters_are_no_markup_where_it_is_a_token() -> None:
    text = named(f"{BEGIN}{INVOKE}{I_END}{END}")
    assert read([text], marked=True) == (text, [])


FRAGMENTS = [
    BEGIN,
    END,
    INVOKE,
    STRING,
    JSON,
    P_END,
    I_END,
    '<§invoke name="',
    "<§parameter ",
    "</",
    "\n",
    "\n\n",
    " ",
    '"',
    ">",
]
STREAMS = st.lists(st.sampled_from(FRAGMENTS) | st.text('ab<>"\n/', max_size=4), max_size=8).map("".join)


@settings(max_examples=60)
@given(STREAMS, st.booleans(), st.booleans())
@example(f"a{BEGIN}{INVOKE}{STRING}b{P_END}{I_END}{END}c", True, False)
@example(f"a{BEGIN}so{INVOKE}{JSON}b{P_END} {I_END} {END}\n\n{BEGIN}{END}", False, False)
def test_the_cuts_of_a_stream_do_not_matter(text: str, marked: bool, cut: bool) -> None:
    whole = read([text], marked=marked, cut=cut)
    assert read(list(text), marked=marked, cut=cut) == whole
    for place in range(len(text)):
        assert read([text[:place], text[place:]], marked=marked, cut=cut) == whole


@settings(max_examples=30)
@given(
    STREAMS.map(named), st.lists(st.tuples(STREAMS.map(named), STREAMS.map(named)), min_size=1, max_size=2)
)
def test_markup_never_leaks(content: str, values: list[tuple[str, str]]) -> None:
    """Also not for a while: what came out is final. The same characters as plain text are text, and arguments are JSON."""
    calls = "".join(f"{INVOKE}{STRING}{a}{P_END}{JSON}{b}{P_END}{I_END}" for a, b in values)
    text = content + BEGIN + calls + END
    for pieces in [list(text), *([text[:place], text[place:]] for place in range(len(text)))]:
        seen = ""
        for part in deltas(pieces, marked=True):
            seen += part.content
            assert content.startswith(seen)
        assert seen == content
    _, found = read([text], marked=True)
    assert [json.loads(call.arguments)["s"] for call in found] == [string for string, _ in values]


def test_arguments_are_streamed_as_they_come() -> None:
    stream = f"{BEGIN}{INVOKE}{STRING}abc{P_END}{I_END}{END}"
    parts = [call for part in deltas(list(stream), marked=True) for call in part.calls]
    assert parts[0] == (0, "id0", "f", "")
    assert [part.arguments for part in parts[1:]] == ['{"s": "', "a", "b", "c", '"', "}"]
    assert all(not part.id and not part.name for part in parts[1:])
