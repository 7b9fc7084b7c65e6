"""Which tokens may come next where an answer must follow a grammar. Knows nothing of schemas, tools or logits.

llguidance reads grammars and walks them; docs/structured_output.md says why. Where a request is in its grammar follows from its
output tokens alone, so that a resumed or preempted request goes on inside it.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import llguidance
import numpy as np

from workers.request import Grammar, Request
from workers.vocabulary import Vocabulary

# Of the grammars whose compiled form is kept. It takes up to about 150 bytes a character.
MAX_CACHED_CHARS = 2**20
# What one grammar may take. A step of 50,000 items or 200,000 units of the lexer is about 15 ms.
LIMITS = llguidance.LLParserLimits(
    max_items_in_row=10_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
# Otherwise a stretch of text that leaves no choice would have to be one certain token.
OPTIONS = '%llguidance {"no_forcing": true}\n'
_DEAD_END = "no token can follow"


class GrammarError(ValueError):
    """A grammar cannot be read, is too complex, or no token can follow."""


class Matcher:
    """Where one request is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, after: int | None, before: np.ndarray) -> None:
        """before: what is allowed before the token `after`."""
        self._matcher = matcher
        self._after = after  # None: the grammar has begun
        self._before = before
        self._num_read = 0

    def allow(self, output: Sequence[int], allowed: np.ndarray) -> None:
        """What may follow the output so far, which only grows from call to call.

        allowed: uint32 [W], one bit for each token, filled here. Raises GrammarError; then the matcher is of no more use.
        """
        self._read(output[self._num_read :])
        self._num_read = len(output)
        if self._after is not None:
            allowed[:] = self._before
            return
        self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        self._check()

    def _read(self, tokens: Sequence[int]) -> None:
        if self._after in tokens:
            tokens = tokens[tokens.index(self._after) + 1 :]
            self._after = None
        if self._after is None:
            self._matcher.consume_tokens(list(tokens))
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_sentence(self._matcher.get_error()))
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            raise GrammarError(_DEAD_END)


class Compiler:
    """Grammars to matchers, over one vocabulary. Any thread may call; the library lets others run meanwhile."""

    def __init__(self, vocabulary: Vocabulary, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """vocab_size: of the logits. Raises ValueError where there is no end-of-sequence token."""
        if not eos_token_ids:
            raise ValueError("a grammar needs an end-of-sequence token")
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(vocabulary, vocab_size, min(eos_token_ids))),
            eos_token=sorted(eos_token_ids),
        )
        self.num_words = -(-vocab_size // 32)
        bits = np.ones(32 * self.num_words, np.uint8)
        bits[list(eos_token_ids)] = 0
        self._all_but_eos = np.packbits(bits, bitorder="little").view(np.uint32)
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the beginning of an answer. Raises GrammarError where the grammar cannot be read or is too complex."""
        return Matcher(self._compile(grammar.text).deep_copy(), grammar.after, self._all_but_eos)

    def check(self, text: str) -> None:
        """Raises GrammarError as `matcher` would, and where not even a first token is found."""
        Matcher(self._compile(text).deep_copy(), None, self._all_but_eos).allow(
            [], np.empty(self.num_words, np.uint32)
        )

    def _compile(self, text: str) -> llguidance.LLMatcher:
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
        compiled = llguidance.LLMatcher(self._tokenizer, OPTIONS + text, log_level=0, limits=LIMITS)
        if compiled.is_error():
            raise GrammarError(_sentence(compiled.get_error()))
        with self._lock:
            self._compiled[text] = compiled
            while sum(map(len, self._compiled)) > MAX_CACHED_CHARS and len(self._compiled) > 1:
                self._compiled.popitem(last=False)
        return compiled


class Masks(NamedTuple):
    """rows: those of the logits that a grammar rules. bits: int32 [len(rows), W], a bit for each token that is allowed."""

    rows: list[int]
    bits: np.ndarray


class Grammars:
    """The grammars of an engine's requests. They are compiled on a thread of their own, while prompts are computed."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "grammars")

    def begin(self, request: Request) -> None:
        """Compiles the request's grammar, if it has one."""
        grammar = request.sampling.grammar
        if grammar is not None and request.matcher is None:
            request.matcher = self._thread.submit(self._compiler.matcher, grammar)

    def masks(self, requests: Sequence[Request]) -> tuple[Masks | None, dict[str, str]]:
        """What the requests' next tokens may be, and request id -> reason for each that cannot go on."""
        ruled = [row for row, request in enumerate(requests) if request.matcher is not None]
        if not ruled:
            return None, {}
        bits = np.empty((len(ruled), self._compiler.num_words), np.uint32)
        failed: dict[str, str] = {}
        for row, allowed in zip(ruled, bits, strict=True):
            request = requests[row]
            try:
                _matcher(request).allow(request.tokens[request.num_prompt_tokens :], allowed)
            except GrammarError as error:
                failed[request.id] = str(error)
                allowed[:] = 2**32 - 1  # what is sampled for it now is thrown away
        return Masks(ruled, bits.view(np.int32)), failed

    def close(self) -> None:
        self._thread.shutdown()


def _matcher(request: Request) -> Matcher:
    """Waits for the compiler. Raises GrammarError."""
    future: Future[Matcher] = request.matcher
    return future.result()


class _Tokens:
    """A vocabulary as the library wants it. Markers are no text: a grammar allows them only by id.

    A model has logits for more tokens than its tokenizer knows; those are never allowed.
    """

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens = vocabulary.spellings + [b""] * (vocab_size - len(vocabulary.spellings))
        self.special_token_ids = sorted(vocabulary.added.values())

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("nothing here turns text into tokens: no_forcing is set")


def load_compiler(folder: Path, *, vocab_size: int, eos_token_ids: Collection[int]) -> Compiler:
    """For the checkpoint in `folder`. Raises ValueError."""
    return Compiler(Vocabulary.load(folder), vocab_size=vocab_size, eos_token_ids=eos_token_ids)


def _sentence(message: str) -> str:
    """What the library says, without the grammar that it repeats and its place in there."""
    first, *others = message.split("\n")
    first = first.rpartition(": failed to compile JSON schema: ")[2]
    if first.startswith("NoExtension"):
        return _DEAD_END
    errors = [line for line in others if line.startswith("error: ")]  # of a regular expression
    return " ".join([first, *errors[:1]])
