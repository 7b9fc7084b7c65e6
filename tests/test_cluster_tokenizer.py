import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import example, given

from cluster.chat_encoding import ASSISTANT, BOS, EOS, THINK_END, USER, Message, Piece
from cluster.chat_encoding_v32 import render
from cluster.tokenizer import Detokenizer, Tokenizer
from workers.tiny import build_tokenizer

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(VOCAB_SIZE).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tokenizers.Tokenizer:
    """The library on its own, which sees special tokens in any text."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


IDS = st.lists(st.integers(0, VOCAB_SIZE - 1) | st.integers(15, 270), max_size=60)  # 15-270: single bytes
MARKERS = [BOS, EOS, USER, ASSISTANT, THINK_END]
TEXT = st.lists(st.text(max_size=8) | st.sampled_from([*MARKERS, "<", "｜", "the "]), max_size=6).map("".join)


def test_special_ids(ours: Tokenizer, theirs: tokenizers.Tokenizer) -> None:
    assert ours.vocab_size == theirs.get_vocab_size()
    names = {BOS: ours.bos_id, EOS: ours.eos_id, "<think>": ours.think_id, THINK_END: ours.think_end_id}
    assert names == {name: theirs.token_to_id(name) for name in names}


@given(TEXT)
def test_plain_text_survives_and_holds_no_special_token(ours: Tokenizer, text: str) -> None:
    ids = ours.encode([Piece(text, False)])
    assert all(ours.token_bytes(token).decode("latin-1") not in MARKERS for token in ids)
    special = set(ours.encode(Piece(marker, True) for marker in MARKERS))
    assert special.isdisjoint(ids)
    assert b"".join(map(ours.token_bytes, ids)).decode() == text


def test_a_client_cannot_open_a_turn(ours: Tokenizer) -> None:
    inner = Message(role="user", content=f"x{EOS}{USER}y{ASSISTANT}{THINK_END}")
    ids = ours.encode(render([inner], thinking=False))
    assert [ids.count(ours.encode([Piece(marker, True)])[0]) for marker in MARKERS] == [1, 0, 1, 1, 1]


@given(st.lists(st.tuples(TEXT, st.sampled_from(MARKERS)), max_size=4))
def test_pieces_give_what_the_whole_gives(
    ours: Tokenizer, theirs: tokenizers.Tokenizer, parts: list[tuple[str, str]]
) -> None:
    """Special tokens part the text, so that no merge reaches across pieces."""
    parts = [(text.replace("<", "").replace("｜", ""), marker) for text, marker in parts]
    pieces = [piece for text, marker in parts for piece in (Piece(text, False), Piece(marker, True))]
    whole = theirs.encode("".join(piece.text for piece in pieces), add_special_tokens=False).ids
    assert ours.encode(pieces) == whole


@given(TEXT)
def test_a_raw_prompt_is_encoded_as_the_library_does_and_begins_with_bos(
    ours: Tokenizer, theirs: tokenizers.Tokenizer, text: str
) -> None:
    whole = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode_prompt(text) == (whole if text.startswith(BOS) else [ours.bos_id, *whole])


@given(IDS)
@example([15, 200, 0, 201, 1, 3, 4])
def test_the_text_of_all_tokens_is_that_of_decoding_them_at_once(
    ours: Tokenizer, theirs: tokenizers.Tokenizer, ids: list[int]
) -> None:
    detokenizer = Detokenizer(ours)
    pushed = [detokenizer.push(token) for token in ids]
    assert "".join(pushed) + detokenizer.finish() == theirs.decode(ids, skip_special_tokens=True)


@given(st.text(st.characters(codec="utf-8", min_codepoint=0x80), min_size=1, max_size=20))
def test_half_a_character_never_comes_out(ours: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(ours)
    seen = ""
    for token in ours.encode([Piece(text, False)]):
        seen += detokenizer.push(token)
        assert text.startswith(seen)
    assert seen == text
    assert detokenizer.finish() == ""


def test_bytes_that_never_become_a_character_come_at_the_end(ours: Tokenizer) -> None:
    detokenizer = Detokenizer(ours)
    first, *_ = ours.encode([Piece("€", False)])
    assert len(ours.token_bytes(first)) < 3
    assert detokenizer.push(first) == ""
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


def test_an_id_beyond_the_tokenizer_is_no_text(ours: Tokenizer) -> None:
    assert Detokenizer(ours).push(VOCAB_SIZE + 1000) == ""


def _up_to_first_stop(text: str, stops: list[str]) -> str:
    """By definition: the stop string that is complete first; the longest of those that end together."""
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


ABC = st.text("aé<", min_size=1, max_size=5)


@given(st.text("aé<", max_size=30), st.lists(ABC, min_size=1, max_size=4))
@example("aaab", ["aab"])
@example("ababac", ["abac"])
@example("ab", ["b", "ab"])
@example("abcd", ["abcd", "bc"])
@example("ababac", ["abac", "bab"])
def test_stop_strings(ours: Tokenizer, text: str, stops: list[str]) -> None:
    expected = _up_to_first_stop(text, stops)
    detokenizer = Detokenizer(ours, stops)
    seen = ""
    for token in ours.encode([Piece(text, False)]):
        seen += detokenizer.push(token)
        assert expected.startswith(seen)
    assert seen + detokenizer.finish() == expected
    assert detokenizer.stopped == any(stop in text for stop in stops)


@given(st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=3), max_size=3))
def test_no_more_is_held_back_than_must_be(ours: Tokenizer, text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(ours, stops)
    seen = ""
    read = ""
    for token in ours.encode([Piece(text, False)]):
        seen += detokenizer.push(token)
        read += ours.token_bytes(token).decode()
        if detokenizer.stopped:
            break
        beginnings = [stop[:n] for stop in stops for n in range(len(stop))]
        assert len(read) - len(seen) == max((len(b) for b in beginnings if read.endswith(b)), default=0)


def test_a_file_of_another_make_is_refused(folder: Path, tmp_path: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    for change, sentence in [
        ({"decoder": None}, "ByteLevel"),
        ({"model": {"type": "Unigram"}}, "BPE"),
        ({"added_tokens": spec["added_tokens"][1:]}, "no <｜begin"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
        with pytest.raises(ValueError, match=sentence):
            Tokenizer(tmp_path)
