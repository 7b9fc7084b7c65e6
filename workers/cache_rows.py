"""Ranks that share a prompt's rows tell each other the cache rows they have written. Knows nothing of attention.

What travels are the bytes of the caches, after rotation and quantisation, and each row's slot with them, so that every rank
ends up with the same pages.
"""

import torch

from kernels.layout import PAGE_SIZE, CacheLayout
from workers.group import Exchange, Group

_WORD = 4  # bytes; rows and their parts are whole words, and indexing moves an element at a time
_SLOT_WORDS = 2  # an int64


class CacheRows:
    """`share` is called once both caches of a layer have been written, and `finish` before any of them is read."""

    def __init__(self, layout: CacheLayout, group: Group) -> None:
        self._group = group
        self._latent_words = layout.latent_row_bytes // _WORD
        self._key_words = layout.index_key_bytes // _WORD
        self._scale_words = layout.index_scale_bytes // _WORD

    def share(
        self, latent_pages: torch.Tensor, index_pages: torch.Tensor, slots: torch.Tensor
    ) -> Exchange | None:
        """slots: int64 [T], the rows that this rank has written. None if there is nobody to tell."""
        if not self._group.shares_rows:
            return None
        latents, keys, scales = self._views(latent_pages, index_pages)
        page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
        parts = (
            slots.unsqueeze(1).view(torch.int32),
            latents[slots],
            keys[page, offset],
            scales[page, offset],
        )
        return self._group.all_gather(torch.cat(parts, dim=1))

    def finish(
        self, exchange: Exchange | None, latent_pages: torch.Tensor, index_pages: torch.Tensor
    ) -> None:
        """Writes the rows of all ranks; this rank's own are there already and get the same bytes."""
        if exchange is None:
            return
        sizes = (_SLOT_WORDS, self._latent_words, self._key_words, self._scale_words)
        slot_words, *rows = exchange.wait().split(sizes, dim=1)
        slots = slot_words.contiguous().view(torch.int64).squeeze(1)
        page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
        latents, keys, scales = self._views(latent_pages, index_pages)
        latents[slots], keys[page, offset], scales[page, offset] = rows

    def _views(
        self, latent_pages: torch.Tensor, index_pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int32 [slots, words of a latent row], [P, 64, words of a key], [P, 64, words of its scales]."""
        index = index_pages.view(torch.int32)
        keys = index[:, : PAGE_SIZE * self._key_words].unflatten(1, (PAGE_SIZE, self._key_words))
        scales = index[:, PAGE_SIZE * self._key_words :].unflatten(1, (PAGE_SIZE, self._scale_words))
        return latent_pages.view(torch.int32).view(-1, self._latent_words), keys, scales
