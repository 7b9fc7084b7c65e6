"""Our model against Hugging Face's: same checkpoint, same logits (see oracle.py).

The prompts are such that no other selection is close enough for the rounding of two programs to tip it.
"""

from pathlib import Path

import pytest
import torch
from oracle import Oracle

import kernels.reference.cache
import kernels.reference.indexer
from kernels.reference.rope import rotate_halves, rotate_neighbours
from kernels.rows import Rows
from workers.config import EngineConfig
from workers.model import Model, load_model
from workers.paged_cache import PagedCache
from workers.tiny import write_tiny

TOPK = 64
TOLERANCE = 1e-4
PAGES_EACH = 9


def prompt(seed: int, count: int) -> list[int]:
    return torch.randint(15, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SHORT, MIDDLE, LONG = prompt(0, 40), prompt(4, 300), prompt(35, 500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, EngineConfig(precision="fp32"))


@pytest.fixture(scope="module")
def oracle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(folder, tmp_path_factory.mktemp("dequantised"))


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
        rows = Rows.of(tuple(starts), torch.cat(positions), table[list(counts)])
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
        rows, last = Rows.of((0, len(position)), position, table), torch.tensor([len(position) - 1])
        logits.append(model.forward(torch.tensor(tokens[done:]), rows, slots, cache, last))
        done = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    assert len(set(tokens[-20:])) > 10
    assert_same(torch.cat(logits), oracle.logits(tokens[:-1])[-20:])


# The comparison must be able to fail


def test_a_short_prompt_cannot_see_a_wrong_indexer_rope_but_a_long_one_can(
    model: Model, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.reference.indexer, "rotate_halves", rotate_neighbours)
    assert_same(run(model, [SHORT])[0], oracle.logits(SHORT))
    wrong = (run(model, [MIDDLE])[0] - oracle.logits(MIDDLE)).abs().amax(-1)
    assert wrong[:TOPK].max() < TOLERANCE
    assert wrong[TOPK:].median() > 0.1


def test_a_wrong_attention_rope_shows_at_once(
    model: Model, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.reference.cache, "rotate_neighbours", rotate_halves)
    assert (run(model, [SHORT])[0] - oracle.logits(SHORT)).abs().amax(-1)[1:].median() > 0.1
