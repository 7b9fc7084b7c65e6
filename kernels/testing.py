"""Cases for tests and benchmarks of back ends, and one number for how far two results are apart. Knows nothing of pytest.

Cases are nasty on purpose: pages lie in random order, and whatever a row must not see, unused pages and the tails of last
pages, is NaN in every format.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import kernels.reference as reference
from kernels.dispatch import Ops
from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows

REFERENCE: Ops = reference  # the type checker holds the back end to the interface here
LAYOUTS = {
    "fp8": CacheLayout(latent_dim=512, rope_dim=64, index_dim=128),
    "fp32": CacheLayout(latent_dim=512, rope_dim=64, index_dim=128, quantized=False),
}
SOFTMAX_SCALE = 0.13523378  # of DeepSeek-V3.2
_NAN_BYTE = 0xFF  # e4m3, bf16 and fp32 made of it are NaN


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
) -> Case:
    """contexts: tokens of each request, query rows included; num_queries: how many query rows it has, its last tokens.

    The same seed gives the same numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    page_table, num_pages = _random_page_table(contexts, generator)
    starts = itertools.accumulate(num_queries, initial=0)
    positions = [
        torch.arange(context - queries, context)
        for context, queries in zip(contexts, num_queries, strict=True)
    ]
    total = sum(num_queries)
    case = Case(
        layout=layout,
        latent_pages=_nan_bytes(num_pages, PAGE_SIZE, layout.latent_row_bytes, device=device),
        index_pages=_nan_bytes(num_pages, layout.index_page_bytes, device=device),
        rows=Rows.of(tuple(starts), torch.cat(positions).to(device), page_table.to(device)),
        q=normal(total, heads, layout.latent_dim + layout.rope_dim),
        index_q=normal(total, index_heads, layout.index_dim),
        index_weights=normal(total, index_heads).float(),
    )
    for request, context in enumerate(contexts):
        slots = case.slots_of(request, context)
        latent, k_pe = normal(context, layout.latent_dim), normal(context, layout.rope_dim)
        reference.write_latents(case.latent_pages, slots, latent, k_pe, layout)
        reference.write_index_keys(case.index_pages, slots, normal(context, layout.index_dim), layout)
    return case


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in fp64: 0 for equal tensors, about half the squared relative error for close ones."""
    x, y = actual.double().flatten(), expected.double().flatten()
    energy = float(x @ x + y @ y)
    return 1 - 2 * float(x @ y) / energy if energy else 0.0


def _random_page_table(contexts: Sequence[int], generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """int32 [R, max_pages], -1 after each request's last page, and the number of pages there are: some belong to nobody."""
    counts = [-(-context // PAGE_SIZE) for context in contexts]
    num_pages = sum(counts) + 3
    ids = torch.randperm(num_pages, generator=generator)[: sum(counts)].int()
    table = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    for request, pages in enumerate(ids.split(counts)):
        table[request, : len(pages)] = pages
    return table, num_pages


def _nan_bytes(*shape: int, device: str) -> torch.Tensor:
    return torch.full(shape, _NAN_BYTE, dtype=torch.uint8, device=device)
