"""Hugging Face's `deepseek_v32` as an independent oracle: same checkpoint, dequantised by this file, same logits.

It has no Hadamard, no FP8 and no paged caches, so our model runs in precision "fp32". Its top-k leaves ties to chance (heads that
all score below zero make exact zeros): here it takes the lowest position, as Lightship does. The prompts are such that
no other selection is close enough for the rounding of two programs to tip it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kernels.rows import Rows
from workers import attention
from workers.config import EngineConfig
from workers.model import Model, load_model
from workers.paged_cache import PagedCache
from workers.rope import rotate_halves, rotate_neighbours
from workers.tiny import write_tiny

TOPK = 64
TOLERANCE = 1e-4
SMALLEST_GAP = 4e-6  # between the scores of the last token selected and the first one left out
PAGES_EACH = 9


def prompt(seed: int, count: int) -> list[int]:
    return torch.randint(15, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SHORT, MIDDLE, LONG = prompt(0, 40), prompt(2, 300), prompt(8, 500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, EngineConfig(precision="fp32"))


# The oracle


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in fp32, without the MTP layer, which is layer 4."""
    stored = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    result = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv") or name.startswith("model.layers.4."):
            continue
        result[name] = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = tensor.shape
            blocks = stored[f"{name}_scale_inv"]
            result[name] *= blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return result


class Oracle:
    """Full forwards only: with a cache of its own it may tip a borderline selection against itself."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._gaps: list[float] = []

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """fp32 [T, V]."""
        key = tuple(tokens)
        if key not in self._known:
            with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "topk", lambda scores, k, dim: self._topk(scores, k, dim))
                self._known[key] = self._model(torch.tensor([tokens]), use_cache=False).logits[0]
            assert min(self._gaps, default=1.0) > SMALLEST_GAP, "a borderline selection: take another prompt"
        return self._known[key]

    def _topk(self, scores: torch.Tensor, k: int, dim: int) -> Any:
        values, indices = scores.sort(dim=dim, descending=True, stable=True)
        if values.shape[dim] > k:
            gap = values.select(dim, k - 1) - values.select(dim, k)
            self._gaps += gap[gap.isfinite() & (gap > 0)].amin().unsqueeze(0).tolist()
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


@pytest.fixture(scope="module")
def oracle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    plain = tmp_path_factory.mktemp("dequantised")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    save_file(dequantised(folder), plain / "model.safetensors", metadata={"format": "pt"})
    transformers_logging.disable_progress_bar()
    yield Oracle(plain)
    transformers_logging.enable_progress_bar()


# Our side


def run(
    model: Model, prompts: list[list[int]], steps: list[dict[int, int]] | None = None
) -> list[torch.Tensor]:
    """fp32 [T, V] of each prompt. A step says how many tokens of which prompt; pages of the prompts alternate."""
    num_pages = PAGES_EACH * len(prompts)
    cache = PagedCache(model.layout, num_layers=4, num_pages=num_pages, device="cpu")
    table = torch.arange(num_pages, dtype=torch.int32).view(PAGES_EACH, len(prompts)).T.contiguous()
    done = [0] * len(prompts)
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    for counts in steps or [{index: len(tokens) for index, tokens in enumerate(prompts)}]:
        starts, tokens, positions, slots = [0], list[int](), [], []
        for index, count in counts.items():
            position = torch.arange(done[index], done[index] + count)
            tokens += prompts[index][done[index] : done[index] + count]
            starts.append(len(tokens))
            positions.append(position)
            slots.append(table[index, position // 64].long() * 64 + position % 64)
            done[index] += count
        rows = Rows(tuple(starts), torch.cat(positions), table[list(counts)])
        logits = model.forward(torch.tensor(tokens), rows, torch.cat(slots), cache, torch.arange(len(tokens)))
        for index, part in zip(counts, logits.split([*counts.values()]), strict=True):
            parts[index].append(part)
    return [torch.cat(part) for part in parts]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("tokens", [SHORT, MIDDLE, LONG], ids=len)
def test_a_whole_prompt(model: Model, oracle: Oracle, tokens: list[int]) -> None:
    assert_same(run(model, [tokens])[0], oracle.logits(tokens))


def test_a_prompt_in_odd_chunks(model: Model, oracle: Oracle) -> None:
    steps = [{0: count} for count in (1, 62, 2, 127, 9, 1, 98)]
    assert_same(run(model, [MIDDLE], steps)[0], oracle.logits(MIDDLE))


def test_two_prompts_side_by_side(model: Model, oracle: Oracle) -> None:
    steps = [{0: 17, 1: 100}, {1: 1, 0: 1}, {0: 22, 1: 190}, {1: 9}]
    for ours, tokens in zip(run(model, [SHORT, MIDDLE], steps), (SHORT, MIDDLE), strict=True):
        assert_same(ours, oracle.logits(tokens))


@pytest.mark.parametrize("tokens", [SHORT, LONG], ids=len)
def test_unabsorbed(folder: Path, oracle: Oracle, tokens: list[int]) -> None:
    unabsorbed = load_model(folder, EngineConfig(precision="fp32", attention="unabsorbed"))
    assert_same(run(unabsorbed, [tokens])[0], oracle.logits(tokens))


@pytest.mark.parametrize("tokens", [prompt(0, 55), MIDDLE], ids=len)
def test_greedy_decoding(model: Model, oracle: Oracle, tokens: list[int]) -> None:
    """Twenty tokens one at a time, the shorter prompt growing past the top-k. The oracle reads the result at once."""
    tokens = list(tokens)
    cache = PagedCache(model.layout, num_layers=4, num_pages=PAGES_EACH, device="cpu")
    table = torch.arange(PAGES_EACH, dtype=torch.int32).flip(0).unsqueeze(0)
    logits, done = [], 0
    for _ in range(20):
        position = torch.arange(done, len(tokens))
        slots = table[0, position // 64].long() * 64 + position % 64
        rows, last = Rows((0, len(position)), position, table), torch.tensor([len(position) - 1])
        logits.append(model.forward(torch.tensor(tokens[done:]), rows, slots, cache, last))
        done = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    assert len(set(tokens[-20:])) > 10
    assert_same(torch.cat(logits), oracle.logits(tokens[:-1])[-20:])


# The comparison must be able to fail


def test_a_short_prompt_cannot_see_a_wrong_indexer_rope_but_a_long_one_can(
    model: Model, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "rotate_halves", rotate_neighbours)
    assert_same(run(model, [SHORT])[0], oracle.logits(SHORT))
    wrong = (run(model, [MIDDLE])[0] - oracle.logits(MIDDLE)).abs().amax(-1)
    assert wrong[:TOPK].max() < TOLERANCE
    assert wrong[TOPK:].median() > 0.1


def test_a_wrong_attention_rope_shows_at_once(
    model: Model, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "rotate_neighbours", rotate_halves)
    assert (run(model, [SHORT])[0] - oracle.logits(SHORT)).abs().amax(-1)[1:].median() > 0.1
