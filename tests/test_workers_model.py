"""The layers against plain formulas, and the promise of the CPU back end: a token's bits depend only on its own request."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layout import CacheLayout, num_pages_for
from kernels.reference.norm import layer_norm, sigmoid
from kernels.reference.rope import rotate_halves, rotate_neighbours
from kernels.rows import Rows
from kernels.testing import REFERENCE
from workers.attention import expands, masked_attention
from workers.config import EngineConfig
from workers.layers import RMSNorm
from workers.model import Model, load_model
from workers.model_config import ModelConfig
from workers.paged_cache import PagedCache
from workers.rope import RopeTable, frequencies
from workers.tiny import write_tiny

NUM_PAGES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, num_hidden_layers=3, max_position_embeddings=4096)
    return folder


# Batch invariance


class Session:
    """Requests on one model and one cache; each request's pages are scattered over the cache."""

    def __init__(self, model: Model, prompts: list[list[int]], *, seed: int) -> None:
        self._model = model
        self._prompts = prompts
        self._done = [0] * len(prompts)
        self.cache = PagedCache(
            model.layout, num_layers=model.config.num_hidden_layers, num_pages=NUM_PAGES, device="cpu"
        )
        order = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(seed)).int()
        self.table = order[: 8 * len(prompts)].view(len(prompts), 8)
        self.logits: list[list[torch.Tensor]] = [[] for _ in prompts]

    def slots(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        return self.table[request, positions // 64].long() * 64 + positions % 64

    def step(self, counts: dict[int, int]) -> None:
        """Computes the next `count` tokens of each request."""
        spans = {
            request: (self._done[request], self._done[request] + count) for request, count in counts.items()
        }
        positions = [torch.arange(*span) for span in spans.values()]
        starts = [0]
        for span in positions:
            starts.append(starts[-1] + len(span))
        tokens = [token for request, span in spans.items() for token in self._prompts[request][slice(*span)]]
        logits = self._model.forward(
            torch.tensor(tokens),
            Rows.of(tuple(starts), torch.cat(positions), self.table[list(spans)]),
            torch.cat([self.slots(request, span) for request, span in zip(spans, positions, strict=True)]),
            self.cache,
            torch.arange(len(tokens)),
        )
        for request, start, end in zip(spans, starts, starts[1:], strict=False):
            self.logits[request].append(logits[start:end])
            self._done[request] = spans[request][1]

    def caches(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.slots(request, torch.arange(self._done[request]))
        layers = self.cache.latent.shape[0]
        pages = self.table[request, : -(-self._done[request] // 64)].long()
        return self.cache.latent.view(layers, NUM_PAGES * 64, -1)[:, slots], self.cache.index[:, pages]


def alone(model: Model, prompt: list[int]) -> Session:
    session = Session(model, [prompt], seed=99)
    session.step({0: len(prompt)})
    return session


SCHEDULES: dict[str, list[dict[int, int]]] = {
    "odd chunks": [{0: 1}, {0: 63}, {0: 66}, {0: 7}, {0: 13}, {1: 3}, {1: 94}],
    "together": [{0: 150, 1: 97}],
    "prefill beside decode": [{0: 80}, {1: 90, 0: 1}, {0: 1, 1: 1}, {1: 1, 0: 65}, {0: 1, 1: 5}, {0: 2}],
    "decode": [{0: 145, 1: 93}, {0: 1, 1: 1}, {1: 1, 0: 1}, {0: 1, 1: 1}, {0: 1}, {0: 1, 1: 1}],
}


@pytest.mark.parametrize("attention", ["absorbed", "unabsorbed"])
@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_bits_depend_only_on_the_own_request(folder: Path, precision: str, attention: str) -> None:
    model = load_model(folder, EngineConfig(precision=precision, attention=attention))
    prompts = [torch.randint(15, 512, (count,)).tolist() for count in (150, 97)]
    expected = [alone(model, prompt) for prompt in prompts]
    for name, schedule in SCHEDULES.items():
        session = Session(model, prompts, seed=len(name))
        for counts in schedule:
            session.step(counts)
        for request, reference in enumerate(expected):
            assert torch.equal(torch.cat(session.logits[request]), reference.logits[0][0]), (name, request)
            for ours, theirs in zip(session.caches(request), reference.caches(0), strict=True):
                assert torch.equal(ours, theirs), (name, request)


def test_only_the_wanted_rows_have_logits(folder: Path) -> None:
    model = load_model(folder, EngineConfig())
    prompt = torch.randint(15, 512, (20,))
    cache = PagedCache(model.layout, num_layers=3, num_pages=1, device="cpu")
    rows = Rows.of((0, 20), torch.arange(20), torch.zeros(1, 1, dtype=torch.int32))

    def logits(*wanted: int) -> torch.Tensor:
        return model.forward(prompt, rows, torch.arange(20), cache, torch.tensor(wanted, dtype=torch.int64))

    assert logits().shape == (0, 512)
    assert torch.equal(logits(19, 4), logits(*range(20))[[19, 4]])


def test_selection_matters_as_soon_as_there_is_a_choice(folder: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path, num_hidden_layers=3, max_position_embeddings=4096, index_topk=32)
    prompt = torch.randint(15, 512, (150,)).tolist()
    some, more = (alone(load_model(path, EngineConfig()), prompt).logits[0][0] for path in (tmp_path, folder))
    assert torch.equal(some[:32], more[:32])
    assert (some - more)[40:].abs().amax(-1).min() > 0.1


def test_absorbed_and_unabsorbed_agree(folder: Path) -> None:
    prompt = torch.randint(15, 512, (180,)).tolist()
    both = [
        alone(load_model(folder, EngineConfig(precision="fp32", attention=attention)), prompt).logits[0][0]
        for attention in ("absorbed", "unabsorbed")
    ]
    assert not torch.equal(both[0], both[1])
    torch.testing.assert_close(both[0], both[1], atol=2e-4, rtol=0)


# Attention


@settings(max_examples=15)
@given(num_rows=st.integers(1, 130), extra=st.integers(0, 1100), hidden=st.integers(0, 600), data=st.data())
def test_masked_attention(num_rows: int, extra: int, hidden: int, data: st.DataObject) -> None:
    num_keys = num_rows + extra
    query, key, value = (
        torch.randn(num_rows, 2, 24),
        torch.randn(num_keys, 2, 24),
        torch.randn(num_keys, 2, 16),
    )
    mask = torch.rand(num_rows, num_keys) < 0.1
    mask[torch.arange(num_rows), torch.randint(num_keys, (num_rows,))] = True
    out = masked_attention(query, key, value, mask, 0.3)
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("hqk,khv->qhv", weights, value), atol=1e-5, rtol=1e-5)

    start = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(start + 1, num_rows))
    more_keys, more_values = torch.randn(hidden, 2, 24), torch.randn(hidden, 2, 16)
    part = masked_attention(
        query[start:end],
        torch.cat([key, more_keys]),
        torch.cat([value, more_values]),
        torch.cat([mask[start:end], torch.zeros(end - start, hidden, dtype=torch.bool)], dim=1),
        0.3,
    )
    assert torch.equal(part, out[start:end])


# Norms and rope


def test_rms_norm_reads_the_unrounded_sum() -> None:
    norm = RMSNorm(torch.rand(256) + 0.5, 1e-6, REFERENCE)
    x, residual = torch.randn(5, 256).bfloat16(), (50 * torch.randn(5, 256)).bfloat16()
    total = x.float() + residual.float()
    expected = (total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight).bfloat16()
    out, carried = norm.add(x, residual)
    assert torch.equal(carried, total.bfloat16())
    torch.testing.assert_close(out, expected, atol=0, rtol=2**-8)
    rounded_first = norm(carried)
    assert (out.float() - expected.float()).norm() < 0.2 * (rounded_first.float() - expected.float()).norm()


def test_layer_norm() -> None:
    weight, bias = torch.rand(128) + 0.5, torch.randn(128)
    x = 1e-3 * torch.randn(7, 128) + 2e-3  # small enough to feel the 1e-6
    centred = x.double() - x.double().mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = (centred * scale * weight + bias).float()
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-6), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sigmoid_has_no_scalar_tail(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x = 5 * torch.randn(5000, 40)
    whole = sigmoid(x)
    try:
        assert all(
            torch.equal(sigmoid(x[i : i + n].clone()), whole[i : i + n])
            for n in (1, 3, 999)
            for i in (0, 777)
        )
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(whole, torch.sigmoid(x))
    assert sigmoid(torch.tensor([-200.0, 200.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "norm",
    [
        RMSNorm(torch.ones(256), 1e-6, REFERENCE),
        lambda x: layer_norm(x, torch.ones(256), torch.zeros(256), 1e-6),
    ],
)
def test_norms_see_one_row_at_a_time(norm: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(1500, 256)
    whole = norm(x)
    assert all(
        torch.equal(norm(x[i : i + n].clone()), whole[i : i + n]) for n in (1, 3, 499) for i in (0, 77, 1001)
    )


def test_yarn_frequencies(folder: Path) -> None:
    plain = frequencies(64, 10000.0, None)
    scaled = frequencies(64, 10000.0, ModelConfig.load(folder).rope_scaling)
    torch.testing.assert_close(plain, 10000.0 ** (-torch.arange(32) / 32))
    torch.testing.assert_close(scaled[:11], plain[:11])  # the ramp runs from 10 to 23
    torch.testing.assert_close(scaled[23:], plain[23:] / 40)
    for i in range(11, 23):
        smooth = 1 - (i - 10) / 13
        assert scaled[i].item() == pytest.approx((plain[i] / 40 * (1 - smooth) + plain[i] * smooth).item())


def test_both_rotations_turn_their_own_pairs() -> None:
    table = RopeTable(64, theta=10000.0, scaling=None, max_positions=600, device="cpu")
    positions = torch.tensor([0, 3, 599])
    turn = torch.polar(torch.ones(3, 32), torch.outer(positions.float(), frequencies(64, 10000.0, None)))[
        :, None
    ]
    x = torch.randn(3, 5, 64)
    neighbours = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(rotate_neighbours(x, *table.at(positions)), neighbours)
    halves = torch.view_as_complex(x.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous()) * turn
    expected = torch.view_as_real(halves).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotate_halves(x, *table.at(positions)), expected)


@given(base=st.integers(0, 500), distance=st.integers(0, 99))
@pytest.mark.parametrize("rotate", [rotate_neighbours, rotate_halves])
def test_rotated_products_depend_on_distance_only(
    rotate: Callable[..., torch.Tensor], base: int, distance: int
) -> None:
    table = RopeTable(64, theta=10000.0, scaling=None, max_positions=600, device="cpu")
    query, key = torch.randn(2, 1, 1, 64)

    def product(at: int) -> torch.Tensor:
        rotated = [rotate(x, *table.at(torch.tensor([p]))) for x, p in ((query, at + distance), (key, at))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(product(base), product(0), atol=1e-3, rtol=1e-3)


# Caches


def test_cache_shapes_and_size() -> None:
    layout = CacheLayout(512, 64, 128)
    cache = PagedCache(layout, num_layers=3, num_pages=5, device="cpu")
    assert cache.num_pages == 5
    assert cache.latent.shape == (3, 5, 64, 656)
    assert cache.index.shape == (3, 5, 64 * 132)
    page = 3 * 64 * 788
    assert num_pages_for(5 * page, layout, 3) == num_pages_for(6 * page - 1, layout, 3) == 5
    assert cache.latent.nbytes + cache.index.nbytes == 5 * page
    with pytest.raises(
        ValueError, match=f"cache_bytes is {page - 1}, but one page of 64 tokens takes {page} bytes"
    ):
        num_pages_for(page - 1, layout, 3)


@pytest.mark.parametrize(
    ("rows", "requests", "pages", "expected"),
    [
        (8192, 1, 128, True),
        (8192, 1, 129, False),  # of too many tokens
        (4096, 16, 8, True),
        (2048, 1, 64, True),
        (2048, 1, 128, False),  # most rows see more than would be selected
        (512, 1, 8, True),
        (511, 1, 8, False),
    ],
)
def test_many_rows_of_short_contexts_have_keys_of_each_head(
    rows: int, requests: int, pages: int, expected: bool
) -> None:
    assert expands(rows, requests, pages) == expected
