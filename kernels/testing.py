"""Cases for tests and benchmarks of back ends, and one number for how far two results are apart. Knows nothing of pytest.

Cases are nasty on purpose: pages lie in random order, and whatever a row must not see, unused pages and the tails of last
pages, is NaN in every format.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import kernels.reference as reference
from kernels.dispatch import Ops
from kernels.layout import PAGE_SIZE, QUANT_BLOCK, CacheLayout
from kernels.rows import Rows

REFERENCE: Ops = reference  # the type checker holds the back end to the interface here
LAYOUTS = {
    "fp8": CacheLayout(latent_dim=512, rope_dim=64, index_dim=128),
    "fp32": CacheLayout(latent_dim=512, rope_dim=64, index_dim=128, quantized=False),
}
SOFTMAX_SCALE = 0.13523378  # of DeepSeek-V3.2
TOKENS_AT_ONCE = 2**17  # cached tokens and random numbers made at a time
NUMBERS_AT_ONCE = 2**26
_NAN_BYTE = 0xFF  # e4m3, bf16 and fp32 made of it are NaN


class Numbers:
    """About normally distributed numbers, made where they are used: the same on every device, in any portions.

    A number is the sum of the four 16-bit halves of a hash of its place, which is exact in fp32.
    """

    def __init__(self, seed: int, device: str | torch.device) -> None:
        self._seed = seed
        self._device = device
        self._next = seed * 0x9E3779B97F4A7C15 % 2**62  # far from the places of other seeds
        self._streams = 0

    def stream(self) -> "Numbers":
        """Further numbers, independent of these."""
        self._streams += 1
        other = Numbers(self._seed, self._device)
        other._next += self._streams << 40
        return other

    def normal(self, *shape: int) -> torch.Tensor:
        """fp32, mean 0, standard deviation 1, at most 3.5 from 0."""
        out = torch.empty(shape, device=self._device)
        for part in out.view(-1).split(NUMBERS_AT_ONCE):
            part.copy_(_four_halves(self._hashes(len(part)))).sub_(131070).mul_(3**0.5 / 65536)
        return out

    def integers(self, *shape: int, below: int) -> torch.Tensor:
        """int64 in 0 .. below - 1."""
        return (self._hashes(math.prod(shape)) & 0x7FFFFFFFFFFFFFFF).remainder_(below).view(shape)

    def codes(self, *shape: int) -> torch.Tensor:
        """e4m3, every code of magnitude below 2 equally often."""
        out = torch.empty(math.prod(shape), dtype=torch.uint8, device=self._device)
        for part in out.split(8 * NUMBERS_AT_ONCE):
            part.copy_(self._hashes(-(-len(part) // 8)).view(torch.uint8)[: len(part)].bitwise_and_(0xBF))
        return out.view(torch.float8_e4m3fn).view(shape)

    def scales(self, *shape: int) -> torch.Tensor:
        """fp32, one of four powers of two as those of weights."""
        return torch.exp2(self.integers(*shape, below=4).float() - 8)

    def _hashes(self, count: int) -> torch.Tensor:
        """int64 [count]: splitmix64 of the next places of this stream."""
        z = torch.arange(self._next, self._next + count, device=self._device)
        self._next += count
        z.mul_(-0x61C8864680B583EB)
        z.bitwise_xor_((z >> 30).bitwise_and_(2**34 - 1)).mul_(-0x40A7B892E31B1A47)
        z.bitwise_xor_((z >> 27).bitwise_and_(2**37 - 1)).mul_(-0x6B2FB644ECCEEE15)
        return z.bitwise_xor_((z >> 31).bitwise_and_(2**33 - 1))


def _four_halves(hashes: torch.Tensor) -> torch.Tensor:
    total = hashes & 0xFFFF
    for shift in (16, 32, 48):
        total += (hashes >> shift).bitwise_and_(0xFFFF)
    return total


@dataclass(frozen=True)
class Case:
    """One layer of a batch: caches that hold every token already, and query rows.

    q: [T, H, latent_dim + rope_dim]; index_q: [T, Hi, index_dim]; index_weights: fp32 [T, Hi], of both signs
    """

    layout: CacheLayout
    latent_pages: torch.Tensor
    index_pages: torch.Tensor
    rows: Rows
    q: torch.Tensor
    index_q: torch.Tensor
    index_weights: torch.Tensor

    def slots_of(self, request: int, length: int) -> torch.Tensor:
        """int64 [length]: where the request's tokens 0 .. length - 1 are, one by one."""
        positions = torch.arange(length, device=self.q.device)
        pages = self.rows.page_table[request, positions // PAGE_SIZE].long()
        return pages * PAGE_SIZE + positions % PAGE_SIZE

    def latents(self) -> torch.Tensor:
        """fp32 [L, latent_dim + rope_dim], the tokens of the only request in their order."""
        length = int(self.rows.positions.max()) + 1
        return reference.read_latents(self.latent_pages, self.slots_of(0, length), self.layout)

    def places(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots of the only request -> positions, same shape and dtype; -1 for none."""
        length = int(self.rows.positions.max()) + 1
        positions = torch.full(
            (len(self.latent_pages) * PAGE_SIZE,), -1, device=slots.device, dtype=slots.dtype
        )
        positions[self.slots_of(0, length)] = torch.arange(length, device=slots.device, dtype=slots.dtype)
        return positions[slots.clamp(min=0)].masked_fill_(slots < 0, -1)

    def only(self, row_numbers: Sequence[int]) -> "Case":
        """The case with these query rows alone, in ascending order, and with their requests alone."""
        starts = self.rows.query_starts
        counts = [sum(start <= row < end for row in row_numbers) for start, end in itertools.pairwise(starts)]
        requests = [request for request, count in enumerate(counts) if count]
        kept = torch.tensor(row_numbers, device=self.q.device)
        return replace(
            self,
            rows=Rows.of(
                tuple(itertools.accumulate((counts[request] for request in requests), initial=0)),
                self.rows.positions[kept],
                self.rows.page_table[requests],
            ),
            q=self.q[kept],
            index_q=self.index_q[kept],
            index_weights=self.index_weights[kept],
        )


def make_case(
    contexts: Sequence[int],
    num_queries: Sequence[int],
    *,
    layout: CacheLayout = LAYOUTS["fp8"],
    heads: int = 4,
    index_heads: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    kinds: Sequence[str] = ("latent", "index"),
) -> Case:
    """contexts: tokens of each request, query rows included; num_queries: how many query rows it has, its last tokens.

    kinds: which caches are filled; of the other there is no page. The same seed gives the same numbers on every device.
    """
    numbers = Numbers(seed, device)
    page_table, num_pages = _random_page_table(contexts, seed)
    starts = tuple(itertools.accumulate(num_queries, initial=0))
    positions = [torch.arange(end - count, end) for end, count in zip(contexts, num_queries, strict=True)]
    num_latent_pages, num_index_pages = (num_pages if kind in kinds else 0 for kind in ("latent", "index"))
    case = Case(
        layout=layout,
        latent_pages=_nan_bytes(num_latent_pages, PAGE_SIZE, layout.latent_row_bytes, device=device),
        index_pages=_nan_bytes(num_index_pages, layout.index_page_bytes, device=device),
        rows=Rows.of(starts, torch.cat(positions).to(device), page_table.to(device)),
        q=numbers.normal(starts[-1], heads, layout.latent_dim + layout.rope_dim).to(dtype),
        index_q=numbers.normal(starts[-1], index_heads, layout.index_dim).to(dtype),
        index_weights=numbers.normal(starts[-1], index_heads).to(dtype).float(),
    )
    _fill_caches(case, contexts, numbers, dtype)
    return case


@dataclass(frozen=True)
class LinearCase:
    """x [T, K], weight e4m3 [N, K], scale_inv fp32 [ceil(N / 128), ceil(K / 128)]."""

    x: torch.Tensor
    weight: torch.Tensor
    scale_inv: torch.Tensor


def make_linear_case(
    rows: int,
    outputs: int,
    inputs: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> LinearCase:
    numbers = Numbers(seed, device)
    return LinearCase(
        x=numbers.normal(rows, inputs).to(dtype),
        weight=numbers.codes(outputs, inputs),
        scale_inv=numbers.scales(-(-outputs // QUANT_BLOCK), -(-inputs // QUANT_BLOCK)),
    )


@dataclass(frozen=True)
class ExpertsCase:
    """T tokens of D channels, k experts each out of E that are I wide; shapes and dtypes as kernels.reference.prepare_experts has.

    experts: int32 [T, k], all of a token different; weights: fp32 [T, k]
    """

    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor


def make_experts_case(
    tokens: int,
    experts: int,
    picks: int,
    channels: int,
    inner: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ExpertsCase:
    numbers = Numbers(seed, device)
    wide, narrow = -(-channels // QUANT_BLOCK), -(-inner // QUANT_BLOCK)
    return ExpertsCase(
        x=numbers.normal(tokens, channels).to(dtype),
        experts=numbers.normal(tokens, experts).topk(picks).indices.int(),
        weights=numbers.normal(tokens, picks).abs(),
        gate_up=numbers.codes(experts, 2, inner, channels),
        gate_up_scale=numbers.scales(experts, 2, narrow, wide),
        down=numbers.codes(experts, channels, inner),
        down_scale=numbers.scales(experts, wide, narrow),
    )


def spread_slots(case: Case, topk: int, seed: int) -> torch.Tensor:
    """int32 [T, topk]: of every row's visible tokens, one out of each of topk equal stretches, at random; it must see as many."""
    visible = (case.rows.positions + 1).unsqueeze(1)
    number = torch.arange(topk, device=visible.device)
    first, end = visible * number // topk, visible * (number + 1) // topk
    places = Numbers(seed, visible.device).integers(len(visible), topk, below=2**40)
    positions = first + places % (end - first)
    pages = case.rows.page_table[case.rows.owners.unsqueeze(1), positions // PAGE_SIZE]
    return (pages * PAGE_SIZE + positions % PAGE_SIZE).int()


def random_slots(case: Case, topk: int, seed: int) -> torch.Tensor:
    """int32 [T, topk]: topk of every row's visible tokens at random, or all of them, by position; then -1."""
    rows = case.rows
    generator = torch.Generator(rows.positions.device).manual_seed(seed)
    shape = len(rows.positions), rows.page_table.shape[1] * PAGE_SIZE
    scores = torch.rand(shape, generator=generator, device=rows.positions.device)
    positions = reference.top_k(scores, rows.positions + 1, topk)
    pages = rows.page_table[rows.owners.unsqueeze(1), positions.clamp(min=0) // PAGE_SIZE]
    return (pages * PAGE_SIZE + positions % PAGE_SIZE).masked_fill(positions < 0, -1)


def _fill_caches(case: Case, contexts: Sequence[int], numbers: Numbers, dtype: torch.dtype) -> None:
    """Writes every token of every request, many at a time, however many requests there are."""
    layout, device = case.layout, case.q.device
    counts = torch.tensor(contexts, device=device)
    firsts = counts.cumsum(0) - counts
    latents, rotary, keys = numbers.stream(), numbers.stream(), numbers.stream()
    for start in range(0, sum(contexts), TOKENS_AT_ONCE):
        tokens = torch.arange(start, min(start + TOKENS_AT_ONCE, sum(contexts)), device=device)
        owners = torch.searchsorted(firsts, tokens, right=True) - 1
        positions = tokens - firsts[owners]
        slots = (
            case.rows.page_table[owners, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        )
        count = len(tokens)
        if len(case.latent_pages):
            latent = latents.normal(count, layout.latent_dim).to(dtype)
            reference.write_latents(
                case.latent_pages, slots, latent, rotary.normal(count, layout.rope_dim).to(dtype), layout
            )
        if len(case.index_pages):
            reference.write_index_keys(
                case.index_pages, slots, keys.normal(count, layout.index_dim).to(dtype), layout
            )


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in fp64: 0 for equal tensors, about half the squared relative error for close ones."""
    x, y = actual.double().flatten(), expected.double().flatten()
    energy = float(x @ x + y @ y)
    return 1 - 2 * float(x @ y) / energy if energy else 0.0


def _random_page_table(contexts: Sequence[int], seed: int) -> tuple[torch.Tensor, int]:
    """int32 [R, max_pages], -1 after each request's last page, and the number of pages there are: some belong to nobody."""
    counts = torch.tensor([-(-context // PAGE_SIZE) for context in contexts])
    used = int(counts.sum())
    ids = torch.randperm(used + 3, generator=torch.Generator().manual_seed(seed))[:used].int()
    table = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int32)
    table[torch.arange(table.shape[1]) < counts.unsqueeze(1)] = ids
    return table, used + 3


def _nan_bytes(*shape: int, device: str) -> torch.Tensor:
    return torch.full(shape, _NAN_BYTE, dtype=torch.uint8, device=device)
