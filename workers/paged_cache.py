"""Device memory of the two paged caches: MLA latents and indexer keys. Knows nothing of who owns a page."""

import copy

import torch

from kernels.dispatch import Ops, select
from kernels.layout import PAGE_SIZE, CacheLayout


class PagedCache:
    """A page is a page in every layer: page p of a request means row p of every layer below.

    latent: uint8 [L, P, 64, latent_row_bytes]
    index:  uint8 [L, P, index_page_bytes]
    ops:    packs its pages for shipping; the reference does it anywhere, but slowly on a GPU
    """

    def __init__(
        self,
        layout: CacheLayout,
        *,
        num_layers: int,
        num_pages: int,
        device: str | torch.device,
        ops: Ops | None = None,
    ) -> None:
        self.layout = layout
        self.ops = ops or select()
        # Zeros: a kernel may read, and mask, rows of a page that were never written; they must not decode to NaN.
        self.latent = torch.zeros(
            num_layers, num_pages, PAGE_SIZE, layout.latent_row_bytes, dtype=torch.uint8, device=device
        )
        self.index = torch.zeros(
            num_layers, num_pages, layout.index_page_bytes, dtype=torch.uint8, device=device
        )

    @property
    def num_pages(self) -> int:
        return self.latent.shape[1]

    def first_layers(self, count: int) -> "PagedCache":
        """The same memory, seen by a model that is cut short."""
        other = copy.copy(self)
        other.latent, other.index = self.latent[:count], self.index[:count]
        return other
