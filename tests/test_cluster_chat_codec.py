"""Messages to tokens and tokens to messages, in both formats, with tokenizers that know the DSML marker and that do not."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
import tokenizers
from hypothesis import given, settings

from cluster.chat_codec import ChatCodec, chat_format_of
from cluster.chat_encoding import (
    ASSISTANT,
    BOS,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    DSML,
    EOS,
    THINK,
    THINK_END,
    USER,
    ChatFormat,
    Message,
    Piece,
    check_fields,
)
from cluster.errors import InvalidRequest
from cluster.output import Delta, Output
from cluster.tokenizer import Tokenizer
from cluster.tools import Tool
from workers.tiny import build_tokenizer

FORMATS: list[ChatFormat] = ["v3.2", "v3.2-exp"]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("marked")
    build_tokenizer(400).save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """To which the DSML marker is plain text."""
    folder: Path = tmp_path_factory.mktemp("unmarked")
    return _without(folder, DSML)


def _without(folder: Path, name: str) -> Tokenizer:
    spec = json.loads(build_tokenizer(400).to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != name]
    del spec["model"]["vocab"][name]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer(folder)


def test_the_published_ids(tmp_path: Path) -> None:
    """From the model card of DeepSeek-V3.2, with a vocabulary of those tokens at their places."""
    words = {
        "hello": 33310, "Hello": 19923, "!": 3, "ĠI": 342, "Ġam": 1030, "ĠDeep": 22651, "Se": 4374, "ek": 1465,
        ".": 16, "1": 19, "+": 13, "=?": 127252,
    }  # fmt: skip
    special = {BOS: 0, EOS: 1, THINK: 128798, THINK_END: 128799, USER: 128803, ASSISTANT: 128804}
    _vocabulary(words, special).save(str(tmp_path / "tokenizer.json"))
    history = [
        Message(role="user", content="hello"),
        Message(role="assistant", content="Hello! I am DeepSeek.", reasoning_content="A greeting."),
        Message(role="user", content="1+1=?"),
    ]
    codec = ChatCodec(Tokenizer(tmp_path), "v3.2")
    assert codec.encode(history, thinking=True) == (
        [0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465, 16, 1]
        + [128803, 19, 13, 19, 127252, 128804, 128798],
        True,
    )


def _vocabulary(words: dict[str, int], special: dict[str, int]) -> tokenizers.Tokenizer:
    """Each word grows from its first character, through tokens with ids that are free."""
    vocab, merges = dict(words), []
    free = iter(range(50_000, 60_000))
    for character in sorted({character for word in words for character in word}):
        vocab.setdefault(character, next(free))
    for word in words:
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            vocab.setdefault(word[: end + 1], next(free))
            if merge not in merges:
                merges.append(merge)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab | special, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.Split("Se", "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in special])
    return tokenizer


def test_the_marker_is_a_token_where_there_is_one(marked: Tokenizer, unmarked: Tokenizer) -> None:
    tool = Tool(type="function", function={"name": "f", "description": DSML})
    tokens, _ = ChatCodec(marked, "v3.2").encode(
        [Message(role="user", content=DSML)], thinking=False, tools=[tool]
    )
    (marker,) = marked.encode([Piece(DSML, True)])
    assert tokens.count(marker) == 11
    as_text, _ = ChatCodec(unmarked, "v3.2").encode(
        [Message(role="user", content=DSML)], thinking=False, tools=[tool]
    )
    assert unmarked.text(as_text) == marked.text(tokens)
    whole = unmarked.encode([Piece(f"a<{DSML}b", False)])
    assert unmarked.encode([Piece("a<", False), Piece(DSML, True), Piece("b", False)]) == whole


TEXT = st.lists(
    st.text(st.characters(codec="utf-8"), max_size=6)
    | st.sampled_from(
        [DSML, f"</{DSML}parameter>", f"\n\n<{DSML}function_calls>", THINK_END, EOS, CALLS_BEGIN, "\n"]
    ),
    max_size=4,
).map("".join)
JSON_VALUES = st.recursive(
    TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters='"'), min_size=1, max_size=8)
CALLS = st.lists(
    st.tuples(NAMES.map(str.strip).filter(bool), st.dictionaries(NAMES, JSON_VALUES, max_size=3)), max_size=3
)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokenizer_name", ["marked", "unmarked"])
@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT, CALLS, st.booleans(), st.data())
def test_what_is_written_is_read(
    request: pytest.FixtureRequest,
    name: ChatFormat,
    tokenizer_name: str,
    reasoning: str,
    content: str,
    calls: list[tuple[str, dict[str, Any]]],
    thinking: bool,
    data: st.DataObject,
) -> None:
    """An assistant's message in a prompt, taken out and read as if the model had just written it, is that message."""
    if tokenizer_name == "unmarked":
        clean = str.maketrans("", "", "｜")  # where the marker is text, its characters are markup
        content = content.translate(clean)
        calls = json.loads(json.dumps(calls).replace(json.dumps("｜")[1:-1], ""))
    thinking = thinking and name == "v3.2"  # the other keeps no reasoning
    written = [(called, json.dumps(arguments, ensure_ascii=False)) for called, arguments in calls]
    if not written:
        content = content.split(THINK_END)[-1]  # V3.2-Exp takes the rest for reasoning
    tokenizer = request.getfixturevalue(tokenizer_name)
    codec = ChatCodec(tokenizer, name)
    tokens = _turn(codec, reasoning or "x", content, written, thinking)
    if tokenizer.eos_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_id)]
    output = Output(tokenizer, thinking=thinking, parser=codec.parser())
    cut = data.draw(st.integers(0, len(tokens)))
    read = Delta.joined([output.push(tokens[:cut]), output.push(tokens[cut:]), output.finish()])
    assert read.reasoning == (reasoning or "x" if thinking else "")
    assert read.content == content
    assert [(call.name, call.arguments) for call in read.calls] == written


def _turn(
    codec: ChatCodec, reasoning: str, content: str, calls: list[tuple[str, str]], thinking: bool
) -> list[int]:
    """The tokens of one assistant's message, with what comes after it."""
    asked = {"role": "user", "content": "?"}
    said: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    said["tool_calls"] = [
        {"id": str(i), "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    results = [{"role": "tool", "tool_call_id": str(i), "content": ""} for i in range(len(calls))]
    if not calls:  # an answer that a user's message follows would lose its reasoning
        said["prefix"] = True
    before = codec.encode(msgspec.convert([asked], list[Message]), thinking=thinking).tokens
    tokens = codec.encode(msgspec.convert([asked, said, *results], list[Message]), thinking=thinking).tokens
    assert tokens[: len(before)] == before
    return tokens[len(before) :]


def test_a_model_that_goes_on_after_a_result_thinks_in_v32_only(marked: Tokenizer) -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    messages = msgspec.convert(
        [
            {"role": "user", "content": "?"},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "!"},
        ],
        list[Message],
    )
    assert [ChatCodec(marked, name).encode(messages, thinking=True).thinking for name in FORMATS] == [
        True,
        False,
    ]
    assert not ChatCodec(marked, "v3.2").encode(messages, thinking=False).thinking


def _checkpoint(folder: Path, template: object = None) -> Path:
    config = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_format_of_a_checkpoint(tmp_path: Path) -> None:
    assert chat_format_of(Path("demo/checkpoint")) == "v3.2"
    assert chat_format_of(_checkpoint(tmp_path)) == "v3.2"
    assert chat_format_of(_checkpoint(tmp_path, f"... {CALLS_BEGIN} ...")) == "v3.2-exp"
    assert chat_format_of(_checkpoint(tmp_path, [{"name": "default", "template": CALLS_BEGIN}])) == "v3.2-exp"
    assert chat_format_of(_checkpoint(tmp_path, f"{CALLS_BEGIN} {DSML}")) == "v3.2", (
        "someone's template for V3.2"
    )
    with pytest.raises(ValueError, match="neither V3.2's nor V3.2-Exp's; set chat_encoding"):
        chat_format_of(_checkpoint(tmp_path, "<|im_start|>"))
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv32.py").touch()
    assert chat_format_of(tmp_path) == "v3.2"


def test_a_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CALLS_BEGIN)
    assert chat_format_of(tmp_path) == "v3.2-exp"


def test_a_folder_that_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        chat_format_of(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="set chat_encoding"):
        chat_format_of(tmp_path)


def test_the_setting_wins(tmp_path: Path, marked: Tokenizer) -> None:
    assert ChatCodec.load(_checkpoint(tmp_path), marked, "v3.2-exp").name == "v3.2-exp"
    assert ChatCodec.load(_checkpoint(tmp_path), marked).name == "v3.2"


def test_a_tokenizer_without_the_format_s_tokens(tmp_path: Path) -> None:
    tokenizer = _without(tmp_path, CALL_SEPARATOR)
    assert ChatCodec(tokenizer, "v3.2")
    with pytest.raises(ValueError, match=f"v3.2-exp needs a token {CALL_SEPARATOR}"):
        ChatCodec(tokenizer, "v3.2-exp")


ANY_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "user", "assistant", "tool"])},
        optional={
            "content": TEXT,
            "reasoning_content": TEXT,
            "prefix": st.booleans(),
            "tool_call_id": st.sampled_from("ab"),
            "tool_calls": st.lists(
                st.builds(
                    lambda id, arguments: {"id": id, "function": {"name": "f", "arguments": arguments}},
                    st.sampled_from("ab"),
                    st.sampled_from(["{}", '{"x": 1}', "[]", ""]),
                ),
                max_size=2,
            ),
        },
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", FORMATS)
@given(ANY_MESSAGES, st.booleans())
def test_any_messages_are_written_or_refused(
    marked: Tokenizer, name: ChatFormat, messages: list[dict[str, Any]], thinking: bool
) -> None:
    conversation = msgspec.convert(messages, list[Message])
    refused = None
    try:
        check_fields(conversation)
        prompt = ChatCodec(marked, name).encode(conversation, thinking=thinking)
    except InvalidRequest as error:
        refused = error
    if refused is None:
        assert prompt.tokens[0] == marked.bos_id
        assert prompt.thinking == (prompt.tokens[-1] == marked.think_id)
    else:
        assert (refused.param or "").startswith("messages[")
