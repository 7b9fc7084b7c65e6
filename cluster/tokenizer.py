"""Text to token ids and back, over a byte-level tokenizer.json. Knows nothing of chats, HTTP or requests.

Special tokens are never seen in plain text, only where a piece of a prompt is marked as one. The way back is incremental: a
`Detokenizer` gives out text that is final, whatever the tokens' boundaries cut through.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers

from cluster.chat_encoding import BOS, DSML, EOS, THINK, THINK_END, Piece
from workers.vocabulary import Vocabulary


class Tokenizer:
    """Reads `folder`/tokenizer.json. Raises ValueError where it is not a byte-level BPE with DeepSeek's special tokens."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / "tokenizer.json"
        spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        added = [token["content"] for token in spec["added_tokens"]]
        for name in (BOS, EOS, THINK, THINK_END):
            if name not in added:
                raise ValueError(f"{path}: added_tokens has no {name}")
        try:
            self._bytes, self._special_ids = Vocabulary.of(spec)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.bos_id = self._special_ids[BOS]
        self.eos_id = self._special_ids[EOS]
        self.think_id = self._special_ids[THINK]
        self.think_end_id = self._special_ids[THINK_END]
        self._specials = re.compile("(" + "|".join(map(re.escape, self._special_ids)) + ")")
        self._hidden = frozenset(token["id"] for token in spec["added_tokens"] if token["special"])
        # Without its added tokens the library sees plain text everywhere; `encode` puts the special ones in.
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self._bytes)

    @property
    def special_ids(self) -> dict[str, int]:
        """Of the tokens that stand apart from plain text, by name."""
        return self._special_ids

    def encode(self, pieces: Iterable[Piece]) -> list[int]:
        """Token ids. Raises KeyError for a special piece that is no special token."""
        ids: list[int] = []
        for special, run in groupby(pieces, key=self._is_token):
            names = [piece.text for piece in run]
            if special:
                ids += [self._special_ids[name] for name in names]
            else:
                ids += self._plain.encode("".join(names), add_special_tokens=False).ids
        return ids

    def _is_token(self, piece: Piece) -> bool:
        """`｜DSML｜` is plain text to a tokenizer that has no such token."""
        return piece.special and (piece.text != DSML or DSML in self._special_ids)

    def encode_prompt(self, text: str) -> list[int]:
        """A raw prompt, in which special tokens are what their names say; it begins with BOS in any case."""
        parts = self._specials.split(text)  # plain and special in turns
        ids = self.encode(Piece(part, index % 2 == 1) for index, part in enumerate(parts))
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def text(self, tokens: Sequence[int]) -> str:
        """All of it at once; bytes that are no character come as U+FFFD."""
        return b"".join(map(self.text_bytes, tokens)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, special ones by name; empty for an id that the tokenizer does not use."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def mark_ids(self, marks: Mapping[str, str]) -> dict[int, str]:
        """The same characters by the ids of the tokens that they stand for. Raises KeyError for a name of none."""
        return {self._special_ids[name]: character for name, character in marks.items()}

    def text_bytes(self, token: int) -> bytes:
        """As `token_bytes`, but tokens that the file calls special (BOS, EOS) are no text and give nothing."""
        return b"" if token in self._hidden else self.token_bytes(token)


class Detokenizer:
    """Token ids to text, one token at a time, in constant time per byte.

    Half a character is held back until the rest comes, and so is what may become a stop string. All the text together is
    that of decoding all the tokens at once, up to the first stop string to be complete.

    marks: what comes out for some special tokens in place of their names (see `cluster.reply_parser`).
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), marks: Mapping[int, str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = marks or {}
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [_StopString(text) for text in stop]
        self._held = ""  # a beginning of a stop string
        self.stopped = False  # a stop string was found; nothing more comes out

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that is final now. may_stop False: it is no part of a stop string."""
        if token in self._marks:
            text = self._characters.decode(b"", final=True) + self._marks[token]
        else:
            text = self._characters.decode(self._tokenizer.text_bytes(token))
        return self._release(text) if may_stop else text

    def finish(self) -> str:
        """What was held back; bytes that never became a character come as U+FFFD."""
        text = self._release(self._characters.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text, start = self._held + text, len(self._held)
        for end in range(start + 1, len(text) + 1):
            found = [len(stop.text) for stop in self._stops if stop.advance(text[end - 1])]
            if found:
                self.stopped, self._held = True, ""
                return text[: end - max(found)]
        final = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[final:]
        return text[:final]


class _StopString:
    """Finds one string in a stream of characters (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # how much of `text` the stream ends with
        self._shorter = [0] * (len(text) + 1)  # the next shorter beginning that a beginning ends with
        for end in range(1, len(text)):
            self._shorter[end + 1] = self._next(self._shorter[end], text[end])

    def advance(self, character: str) -> bool:
        """Whether the string is complete with this character."""
        self.matched = self._next(self.matched, character)
        return self.matched == len(self.text)

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)
