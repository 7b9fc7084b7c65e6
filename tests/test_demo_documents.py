"""The generated documents, read back as text by somebody else's means: regular expressions made from the patterns."""

import os
import re
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.chat_encoding import Message
from cluster.chat_encoding_v32 import render
from cluster.tokenizer import Tokenizer as ServiceTokenizer
from demo import words
from demo.documents import ABSENT, DOUBLE, OTHER, SINGLE, Documents, Writer
from demo.patterns import HOLE
from demo.quiz import CHECKPOINT
from demo.tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def writer(tokenizer: Tokenizer) -> Writer:
    return Writer(tokenizer, "cpu")


def write(writer: Writer, seed: int, **options: object) -> Documents:
    shape = {"sentences": 60, "facts": 30, "questions": 20} | options
    return writer.write(2, generator=torch.Generator().manual_seed(seed), **shape)  # type: ignore[arg-type]


def full(ids: torch.Tensor) -> list[int]:
    return [token for token in ids.flatten().tolist() if token != HOLE]


def _pattern(text: str) -> re.Pattern[str]:
    text = re.escape(text)
    for field, expression in {
        "attribute": r"(?P<attribute>[a-z]+)",
        "service": r"(?P<service>[A-Z][a-z]+ [A-Z][a-z]+)",
        "value": r"(?P<value>[^.]+)",
    }.items():
        text = text.replace(re.escape("{" + field + "}"), expression)
    return re.compile(text)


STATEMENTS = [_pattern(text) for text in words.STATEMENTS]
ATTRIBUTES = {attribute for group in words.ATTRIBUTES.values() for attribute in group}
ASKED = re.compile(r"\b(?P<first>[A-Za-z]+) (?P<second>[A-Za-z]+)(?: have)?[.?]$")


def facts_in(text: str) -> list[tuple[str, str, str]]:
    """(service, attribute, value) of every sentence that states one."""
    found = []
    for sentence in re.split(r"(?<=\.)\s+", text.strip()):
        for pattern in STATEMENTS:
            match = pattern.fullmatch(sentence)
            if match and match["attribute"] in ATTRIBUTES:
                found.append((match["service"], match["attribute"], match["value"]))
                break
    return found


def asked_for(question: str) -> tuple[str, list[str]]:
    match = ASKED.search(question)
    assert match, question
    service = f"{match['first'].capitalize()} {match['second'].capitalize()}"
    return service, [word for word in re.findall(r"[a-z]+", question) if word in ATTRIBUTES]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_answers_are_what_the_text_says(tokenizer: Tokenizer, writer: Writer, seed: int) -> None:
    documents = write(writer, seed)
    for b in range(2):
        text = tokenizer.decode(full(documents.sentences[b]))
        stated = facts_in(text)
        known = {(service, attribute): value for service, attribute, value in stated}
        assert len(known) == len(stated), "each service has one value of an attribute"
        for q in range(20):
            kind = int(documents.kinds[b, q])
            answer = tokenizer.decode(full(documents.answers[b, q]))
            place = int(documents.places[b, q])
            if kind == OTHER:
                assert answer == words.HELP_ANSWER
                continue
            service, attributes = asked_for(tokenizer.decode(full(documents.questions[b, q])))
            if kind == ABSENT:
                assert answer == words.ABSENT_ANSWER
                assert (service, attributes[0]) not in known
                assert place == -1
                continue
            values = [known[service, attribute] for attribute in attributes]
            assert len(values) == (2 if kind == DOUBLE else 1)
            sentence = tokenizer.decode(full(documents.sentences[b, place]))
            assert (service, attributes[0], values[0]) in facts_in(sentence)
            said = f"The {attributes[0]} of {service} is {values[0]}"
            assert answer == said + (f" and the {attributes[1]} is {values[1]}." if kind == DOUBLE else ".")
            told = full(documents.answers[b, q].masked_fill(~documents.values[b, q], HOLE))
            assert tokenizer.decode(told).split() == " ".join(values).split()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), sentences=st.integers(4, 300))
def test_tokens_survive_as_text(tokenizer: Tokenizer, writer: Writer, seed: int, sentences: int) -> None:
    documents = write(writer, seed, sentences=sentences, facts=max(2, sentences // 2))
    rows = [*documents.sentences, *documents.questions.flatten(0, 1), *documents.answers.flatten(0, 1)]
    kinds = [None, None, *documents.kinds.flatten().tolist(), *documents.kinds.flatten().tolist()]
    for row, kind in zip(rows, kinds, strict=True):
        if kind != OTHER:  # some of these are random tokens
            ids = full(row)
            assert tokenizer.encode(tokenizer.decode(ids)).ids == ids


def test_the_seed_decides(writer: Writer) -> None:
    one, same, other = (write(writer, seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(getattr(one, name), getattr(same, name))
        for name in ("sentences", "questions", "answers", "values", "kinds", "places")
    )
    assert one.sentences.shape != other.sentences.shape or not torch.equal(one.sentences, other.sentences)


def test_no_fact_is_asked_for_twice(writer: Writer) -> None:
    documents = write(writer, 4, sentences=100, facts=64, questions=40, kinds=(1.0, 0.0, 0.0, 0.0))
    for places in documents.places.tolist():
        assert len(set(places)) == 40


def test_some_documents_say_the_same_of_many_services(tokenizer: Tokenizer, writer: Writer) -> None:
    """Then only the whole name decides, and that an attribute stands in the document does not mean that it is said of this service."""
    numbers, absent_but_common = set(), 0
    for seed in range(12):
        documents = write(writer, seed, facts=32)
        for b in range(2):
            stated = facts_in(tokenizer.decode(full(documents.sentences[b])))
            attributes = {attribute for _, attribute, _ in stated}
            numbers.add(len(attributes))
            for q in (documents.kinds[b] == ABSENT).nonzero().flatten().tolist():
                _, asked = asked_for(tokenizer.decode(full(documents.questions[b, q])))
                absent_but_common += asked[0] in attributes
    assert 1 in numbers
    assert max(numbers) > 16
    assert absent_but_common > 10


def test_weights_say_how_often_each_kind_is_asked_for(writer: Writer) -> None:
    for seed in range(3):
        for kind in range(4):
            weights = tuple(float(kind == one) for one in range(4))
            kinds = set(write(writer, seed, kinds=weights).kinds.flatten().tolist())
            assert kinds == {kind} or (kind == DOUBLE and kinds == {SINGLE})  # one fact of each service
    generator = torch.Generator().manual_seed(0)
    many = writer.write(
        50, sentences=8, facts=8, questions=80, generator=generator, kinds=(0.3, 0.0, 0.3, 0.4)
    )
    shares = many.kinds.flatten().bincount(minlength=4) / many.kinds.numel()
    assert shares[DOUBLE] == 0
    torch.testing.assert_close(shares, torch.tensor([0.3, 0.0, 0.3, 0.4]), atol=0.03, rtol=0)


def test_some_chats_have_no_document(writer: Writer) -> None:
    documents = writer.write(
        100, sentences=6, facts=4, questions=4, generator=torch.Generator().manual_seed(0), bare=True
    )
    empty = (documents.sentences == HOLE).flatten(1).all(1)
    assert 0 < int(empty.sum()) < 20
    assert bool((documents.kinds[empty] >= ABSENT).all())
    assert {SINGLE, DOUBLE, ABSENT, OTHER} >= set(documents.kinds.flatten().tolist())


def test_a_chat_is_what_the_service_would_send(tokenizer: Tokenizer, writer: Writer) -> None:
    """The same ids as the service's own encoding of the same messages, with the document in either place."""
    service = ServiceTokenizer(CHECKPOINT)
    generator = torch.Generator().manual_seed(0)
    in_front = set()
    for seed in range(6):
        documents = write(writer, seed, kinds=(1.0, 1.0, 1.0, 0.0))
        chats = writer.chats(documents, generator)
        for b in range(2):
            text = tokenizer.decode(full(documents.sentences[b]))
            turns = [
                (
                    tokenizer.decode(full(documents.questions[b, q])),
                    tokenizer.decode(full(documents.answers[b, q])),
                )
                for q in range(20)
            ]
            as_system = chats.tokens[b, 1] != tokenizer.token_to_id("<｜User｜>")
            in_front.add(bool(as_system))
            messages = [Message(role="system", content=text)] if as_system else []
            for number, (question, answer) in enumerate(turns):
                asked = question if as_system or number else f"{text}\n\n{question}"
                messages += [Message(role="user", content=asked), Message(role="assistant", content=answer)]
            expected: list[int] = []
            for end in range(len(messages) - 1, 0, -2):  # each turn as the prompt that the answer followed
                prompt = service.encode(render(messages[:end], thinking=False))
                if not expected:
                    expected = prompt + tokenizer.encode(turns[-1][1]).ids + [writer.end]
                assert expected[: len(prompt)] == prompt
            ours = chats.tokens[b].tolist()
            assert ours[: len(expected)] == expected
            assert not any(ours[len(expected) :]), "padding at the end only"
            said = [chats.tokens[b][i : j + 1].tolist() for i, j in _runs(chats.answers[b])]
            assert said == [tokenizer.encode(answer).ids + [writer.end] for _, answer in turns]
            assert bool((chats.answers[b] | ~chats.values[b]).all())


def _runs(mask: torch.Tensor) -> list[tuple[int, int]]:
    edges = torch.cat((torch.tensor([False]), mask, torch.tensor([False]))).int().diff().nonzero().flatten()
    return [(int(start), int(end) - 1) for start, end in list(pairwise(edges.tolist()))[::2]]


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("20264711").ids) == 8


def test_every_word_is_one_token(tokenizer: Tokenizer) -> None:
    services = words.FIRST_PARTS + words.SECOND_PARTS
    attributes = [attribute for group in words.ATTRIBUTES.values() for attribute in group]
    listed = [*services, *(part.lower() for part in services), *attributes, *words.CITIES, *words.MONTHS]
    listed += [*words.FIRST_NAMES, *words.LAST_NAMES, *words.NOUNS, *words.VERBS, *words.ADJECTIVES]
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch([f" {word}" for word in listed])]
    assert set(lengths) == {1}


def test_the_checkpoint_has_this_tokenizer_on_every_machine(tokenizer: Tokenizer) -> None:
    stored = msgspec.json.decode((CHECKPOINT / "tokenizer.json").read_bytes())
    assert stored["model"] == msgspec.json.decode(tokenizer.to_str())["model"]
    program = "from demo.tokenizer import make_tokenizer as m; import zlib; print(zlib.crc32(m().to_str().encode()))"
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1"},  # ours is another
        capture_output=True,
        check=True,
    )
    assert int(other.stdout) == zlib.crc32(tokenizer.to_str().encode())
