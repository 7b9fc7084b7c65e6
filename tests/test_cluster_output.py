from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cluster.chat_encoding import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    THINK_END,
    Piece,
)
from cluster.output import Delta, Output
from cluster.reply_parser import CallDelta
from cluster.reply_parser_exp import ExpParser
from cluster.tokenizer import Tokenizer
from workers.tiny import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(400).save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def _ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return tokenizer.encode(Piece(text, text in (EOS, THINK_END)) for text in texts)


def _read(output: Output, frames: list[list[int]]) -> Delta:
    deltas = [*map(output.push, frames), output.finish()]
    return Delta.joined(deltas)


def test_reasoning_ends_at_its_token_not_at_its_text(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "I </think> of 1+1", THINK_END, "It is 2.", EOS)
    output = Output(tokenizer, thinking=True)
    assert _read(output, [ids]) == Delta("I </think> of 1+1", "It is 2.")
    assert output.num_reasoning_tokens == ids.index(tokenizer.think_end_id)
    assert output.num_tokens == len(ids)


def test_without_thinking_all_is_the_answer(tokenizer: Tokenizer) -> None:
    output = Output(tokenizer, thinking=False)
    assert _read(output, [_ids(tokenizer, "a", THINK_END, "b")]) == Delta("", f"a{THINK_END}b")
    assert output.num_reasoning_tokens == 0


def test_a_reply_that_ends_within_its_reasoning_loses_nothing(tokenizer: Tokenizer) -> None:
    euro = _ids(tokenizer, "€")
    assert _read(Output(tokenizer, thinking=True), [euro[:-1]]) == Delta("\N{REPLACEMENT CHARACTER}", "")
    both = Output(tokenizer, thinking=True)
    assert both.push([*euro[:-1], tokenizer.think_end_id]) == Delta("\N{REPLACEMENT CHARACTER}", "")


def test_a_stop_string_counts_in_the_answer_only_and_ends_it(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "x. y", THINK_END, "u v", ".", "w")
    output = Output(tokenizer, thinking=True, stop=["."])
    assert _read(output, [ids]) == Delta("x. y", "u v")
    assert output.stopped
    assert output.num_tokens == len(ids) - 1


def test_stop_token_ids_are_no_text(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "a", "b")
    assert _read(Output(tokenizer, thinking=False, stop_token_ids=[ids[1]]), [ids]) == Delta("", "a")


def test_a_parser_sees_tokens_and_not_their_names(tokenizer: Tokenizer) -> None:
    """What a model writes as plain text is text, also where it looks like markup."""
    markup = [CALLS_BEGIN, CALL_BEGIN, "f", CALL_SEPARATOR, "{}", CALL_END, CALLS_END]
    names = [text for text in markup if text.startswith("<")]
    ids = tokenizer.encode(Piece(text, text in names) for text in markup)
    for tokens, expected in (
        (ids, Delta("", "", (CallDelta(0, "id", "f", "{}"),))),
        (_ids(tokenizer, "".join(markup)), Delta("", "".join(markup))),
    ):
        output = Output(tokenizer, thinking=False, parser=ExpParser(new_id=lambda: "id"))
        assert _read(output, [[token] for token in tokens]) == expected
        assert output.has_calls == bool(expected.calls)
    assert _read(Output(tokenizer, thinking=False), [ids]) == Delta("", "".join(markup))


def test_markup_within_the_reasoning_is_reasoning(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode([Piece(CALL_BEGIN, True), Piece(THINK_END, True), Piece("x", False)])
    output = Output(tokenizer, thinking=True, parser=ExpParser())
    assert _read(output, [ids]) == Delta(CALL_BEGIN, "x")


def test_half_a_character_before_a_mark(tokenizer: Tokenizer) -> None:
    first, *_ = _ids(tokenizer, "€")
    ids = [first, *tokenizer.encode([Piece(CALLS_END, True), Piece("x", False)])]
    output = Output(tokenizer, thinking=False, parser=ExpParser())
    assert _read(output, [ids]) == Delta("", f"\N{REPLACEMENT CHARACTER}{CALLS_END}x")


@pytest.mark.parametrize("cut", [False, True])
def test_a_stop_string_within_a_call_ends_the_reply_and_leaves_the_call_open(
    tokenizer: Tokenizer, cut: bool
) -> None:
    ids = tokenizer.encode(
        [Piece(CALL_BEGIN, True), Piece("f", False), Piece(CALL_SEPARATOR, True), Piece('{"a": 1}', False)]
    )
    output = Output(tokenizer, thinking=False, stop=[":"], parser=ExpParser(new_id=lambda: "id"))
    deltas = [output.push(ids), output.finish(cut=cut)]
    assert Delta.joined(deltas) == Delta("", "", (CallDelta(0, "id", "f", '{"a"'),))
    assert output.stopped


@given(st.data(), st.booleans(), st.lists(st.integers(0, 399), max_size=40))
def test_frames_do_not_matter(
    tokenizer: Tokenizer, data: st.DataObject, thinking: bool, ids: list[int]
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    frames = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    split, whole = (Output(tokenizer, thinking=thinking, stop=["a", "the"]) for _ in range(2))
    assert _read(split, frames) == _read(whole, [ids])
    assert (split.num_tokens, split.num_reasoning_tokens) == (whole.num_tokens, whole.num_reasoning_tokens)
