"""Sentences with fields, filled in by the million: every text is a row of token ids with holes. Knows nothing of what they say."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

HOLE = -1  # no token here
_FIELD = re.compile(r" ?\{(\w+)\}")  # a field is filled with a text that begins with a space


def _rows(rows: list[list[int]], device: str) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [HOLE] * (width - len(row)) for row in rows], device=device)


@dataclass(frozen=True)
class Table:
    """Texts as token ids: int64 [N, width], HOLE after the last of each."""

    ids: torch.Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer, texts: Sequence[str], device: str) -> "Table":
        return cls(_rows([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], device))

    @property
    def width(self) -> int:
        return self.ids.shape[1]


class Fields:
    """Which columns of a tensor [..., F] hold which field."""

    def __init__(self, widths: dict[str, int]) -> None:
        self._columns: dict[str, slice] = {}
        self._width = 0
        for name, width in widths.items():
            self._columns[name] = slice(self._width, self._width + width)
            self._width += width

    def empty(self, *shape: int, device: str) -> torch.Tensor:
        return torch.full((*shape, self._width), HOLE, device=device)

    def put(self, fields: torch.Tensor, name: str, ids: torch.Tensor) -> None:
        fields[..., self._columns[name]] = ids

    def columns(self, name: str) -> range:
        return range(self._width)[self._columns[name]]


class Patterns:
    """Texts with {fields}. Inside, token id HOLE - 1 - c stands for column c of the fields."""

    def __init__(self, tokenizer: Tokenizer, patterns: Sequence[str], fields: Fields, device: str) -> None:
        self._fields = fields
        rows = []
        for pattern in patterns:
            row: list[int] = []
            for number, part in enumerate(_FIELD.split(pattern)):  # literal, field, literal, field, ...
                if number % 2:
                    row += [HOLE - 1 - column for column in fields.columns(part)]
                else:
                    row += tokenizer.encode(part, add_special_tokens=False).ids
            rows.append(row)
        self._codes = _rows(rows, device)

    def __len__(self) -> int:
        return len(self._codes)

    def fill(self, choice: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
        """choice [...] of a pattern, fields [..., F] -> token ids [..., W]."""
        codes = self._codes[choice]
        return torch.where(codes < HOLE, fields.gather(-1, (HOLE - 1 - codes).clamp(min=0)), codes)

    def filled_by(self, choice: torch.Tensor, *names: str) -> torch.Tensor:
        """bool [..., W]: the columns of `fill` that these fields fill."""
        columns = [column for name in names for column in self._fields.columns(name)]
        return torch.isin(HOLE - 1 - self._codes[choice], torch.tensor(columns, device=choice.device))


def widen(ids: torch.Tensor, width: int) -> torch.Tensor:
    """[..., W] -> [..., width >= W]: holes at the end."""
    return torch.nn.functional.pad(ids, (0, width - ids.shape[-1]), value=HOLE)


def token_id(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_to_id(name)
    if found is None:
        raise ValueError(f"the tokenizer has no token {name}")
    return int(found)
