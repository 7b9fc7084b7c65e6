"""What each token stands for, from a byte-level tokenizer.json. Knows nothing of texts, prompts or grammars."""

import json
from pathlib import Path
from typing import Any, NamedTuple, Self


class Vocabulary(NamedTuple):
    """Added tokens are markers of the chat format and the like: they stand for their own names."""

    spellings: list[bytes]  # by id; empty for an id that the tokenizer does not use
    added: dict[str, int]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `folder`/tokenizer.json. Raises ValueError where it is not a byte-level BPE."""
        path = folder / "tokenizer.json"
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Self:
        """From the values of a tokenizer.json. Raises ValueError where it is not a byte-level BPE."""
        if spec["model"]["type"] != "BPE" or (spec["decoder"] or {}).get("type") != "ByteLevel":
            raise ValueError("model and decoder must be BPE and ByteLevel")
        vocab: dict[str, int] = spec["model"]["vocab"]
        added: dict[str, int] = {token["content"]: token["id"] for token in spec["added_tokens"]}
        spellings = [b""] * (max(*vocab.values(), *added.values()) + 1)
        for token, index in vocab.items():
            if token not in added:
                spellings[index] = bytes(map(_byte, token))
        for token, index in added.items():
            spellings[index] = token.encode()
        return cls(spellings, added)


def _byte(character: str) -> int:
    if character not in _BYTE_OF_CHARACTER:
        raise ValueError(f"the character {character!r} stands for no byte")
    return _BYTE_OF_CHARACTER[character]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: visible Latin-1 characters stand for themselves, the other bytes follow from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_of_character()
