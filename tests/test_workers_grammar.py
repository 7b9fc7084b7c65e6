"""Answers inside a grammar: they end, they are what the grammar says, and they depend on the output tokens alone."""

import json
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from grammar_walks import EOS, THINK_END, VOCAB_SIZE, Walk, compiler, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.grammars import json_grammar
from workers import grammar
from workers.grammar import Compiler, Grammar, GrammarError
from workers.vocabulary import Vocabulary

NAMES = st.sampled_from(["a", "b", "long name", 'qu"ote', "ünï", "<｜User｜>"])
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n},
        st.integers(-99, 99),
        st.integers(0, 99),
    ),
    st.builds(lambda low: {"type": "number", "minimum": low, "maximum": low + 1.5}, st.integers(-9, 9)),
    st.builds(
        lambda n, m: {"type": "string", "minLength": n, "maxLength": n + m},
        st.integers(0, 4),
        st.integers(0, 6),
    ),
    st.sampled_from(["^[a-c]{2,5}$", "^(x|yy)+z$", "^\\d{3}-\\w$"]).map(
        lambda p: {"type": "string", "pattern": p, "maxLength": 9}
    ),
    st.sampled_from(["date", "ipv4", "uuid"]).map(lambda name: {"type": "string", "format": name}),
    st.lists(
        st.one_of(st.integers(-5, 5), st.text(max_size=5), st.none(), st.booleans()), min_size=1, max_size=3
    ).map(lambda values: {"enum": values}),
)


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in required if name in properties],
        "additionalProperties": False,
    }


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES, unique=True)),
        st.builds(
            lambda items, n: {"type": "array", "items": items, "minItems": n, "maxItems": n + 2},
            inner,
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas}),
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_random_answers_end_and_validate(schema: dict[str, Any], seed: int) -> None:
    answer = Walk(seed).answer(json_grammar(schema))
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(answer))


SCHEMA = _object(
    {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["one", "other"]},
        "list": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 3},
    },
    ["name", "kind", "list"],
)


@pytest.mark.parametrize("after", [None, THINK_END])
def test_where_a_request_is_follows_from_its_output_alone(after: int | None) -> None:
    """Every cut of an answer allows what the uncut answer allowed there, as after a preemption or on another worker."""
    walk = Walk(3)
    request = walk.request(Grammar(json_grammar(SCHEMA), after))
    reasoning = [20, 30, EOS + 40, THINK_END] if after else []
    request.tokens += reasoning
    allowed = []
    while request.tokens[-1] != EOS:
        allowed.append(walk.allowed(request))
        walk.step(request, torch.zeros(VOCAB_SIZE))
    output = request.tokens[2:-1]
    assert allowed[-1] == [EOS]
    for cut in range(len(reasoning), len(output) + 1):
        resumed = walk.request(Grammar(json_grammar(SCHEMA), after), output[:cut])
        assert walk.allowed(resumed) == allowed[cut - len(reasoning)]


def test_reasoning_is_free_but_cannot_end_the_answer() -> None:
    walk = Walk(4)
    request = walk.request(Grammar(json_grammar(SCHEMA), THINK_END))
    everything = set(range(VOCAB_SIZE)) - {EOS}
    for token in (50, 60, THINK_END):
        assert set(walk.allowed(request)) >= everything
        assert EOS not in walk.allowed(request)
        request.tokens.append(token)
    opening = {vocabulary().spellings[token] for token in walk.allowed(request)}
    assert opening == {spelled for spelled in vocabulary().spellings if spelled in (b"{", b'{"')}
    # A second one is part of the answer, and no JSON.
    assert THINK_END not in walk.allowed(request)


def test_markers_are_no_text() -> None:
    walk = Walk(5)
    request = walk.request(Grammar("start: /(?s:.*)/"))
    assert set(walk.allowed(request)) & set(vocabulary().added.values()) == {EOS}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('start: %json {"not": {}}', 'Unimplemented keys: ["not"]'),
        ('start: %json {"type": "string", "pattern": "("}', "regex parse error: error: unclosed group"),
        ('start: %json {"$ref": "#"}', "no token can follow"),
        ("start: %json {", ""),
        ("nonsense", ""),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler().check(text)
    assert sentence in str(caught.value)
    assert "llguidance" not in str(caught.value)


def test_output_that_does_not_follow_is_an_error() -> None:
    matcher = compiler().matcher(Grammar('start: "abc"'))
    row = np.empty(compiler().num_words, np.uint32)
    matcher.allow([], row)
    with pytest.raises(GrammarError):
        matcher.allow([vocabulary().spellings.index(b"z")], row)


def test_a_step_that_is_too_complex_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lexers grow while text is written: what has no bound at the start may still meet one."""
    monkeypatch.setattr(grammar, "LIMITS", llguidance.LLParserLimits(max_lexer_states=300))
    own = Compiler(vocabulary(), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    text = "start: /(x|y).{1,500}(p|q).{1,500}z/"
    own.check(text)
    matcher, row = own.matcher(Grammar(text)), np.empty(own.num_words, np.uint32)
    x, p = (vocabulary().spellings.index(letter) for letter in (b"x", b"p"))

    def write() -> None:
        for length in range(100):
            matcher.allow([x, p] * length, row)

    with pytest.raises(GrammarError, match="too many states"):
        write()


def test_compiled_grammars_are_kept_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_CACHED_CHARS", 2 * len('start: "a"'))
    own = Compiler(vocabulary(), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    for text in ("a", "b", "a", "c"):
        own.check(f'start: "{text}"')
    assert list(own._compiled) == ['start: "a"', 'start: "c"']


def test_a_grammar_needs_an_end() -> None:
    with pytest.raises(ValueError, match="end-of-sequence"):
        Compiler(vocabulary(), vocab_size=VOCAB_SIZE, eos_token_ids=())


def test_a_vocabulary_with_a_character_that_is_no_byte_is_refused() -> None:
    spec = {
        "model": {"type": "BPE", "vocab": {"a": 0, "▁b": 1}},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"content": "x", "id": 2}],
    }
    with pytest.raises(ValueError, match="▁"):
        Vocabulary.of(spec)
