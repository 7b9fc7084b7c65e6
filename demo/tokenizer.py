"""The tokenizer of the demonstration model: a byte-level BPE learned from sentences made of `demo.words`."""

import random
import re
from collections.abc import Iterator

from tokenizers import Tokenizer

from demo import words
from workers.checkpoint import build_tokenizer

VOCAB_SIZE = 1600
_SENTENCES = 40_000

_PATTERNS = (
    *words.STATEMENTS,
    *words.QUESTIONS,
    *words.DOUBLE_QUESTIONS,
    words.ANSWER,
    words.DOUBLE_ANSWER,
    words.ABSENT_ANSWER,
    *words.GREETINGS,
    *words.REQUESTS,
    words.HELP_ANSWER,
    words.TITLE,
    words.SECTION,
    *words.FILLERS,
)


def make_tokenizer() -> Tokenizer:
    """The same one on every machine."""
    return build_tokenizer(VOCAB_SIZE, _sentences(random.Random(0)))


def _sentences(chooser: random.Random) -> Iterator[str]:
    """Words come as often as each other, so that as many as possible become one token, with their space."""
    services = [*words.FIRST_PARTS, *words.SECOND_PARTS]
    everything = [
        *services,
        *(part.lower() for part in services),
        *words.FIRST_NAMES,
        *words.LAST_NAMES,
        *words.CITIES,
        *words.MONTHS,
        *(attribute for group in words.ATTRIBUTES.values() for attribute in group),
        *words.NOUNS,
        *words.VERBS,
        *words.ADJECTIVES,
        *sorted(set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", " ".join(_PATTERNS))))),
    ]
    for _ in range(_SENTENCES):
        pattern = chooser.choice(_PATTERNS)
        yield re.sub(r"\{\w+\}", lambda _: chooser.choice(everything), pattern)
