"""How many bytes a cached token takes, and where. Knows nothing of tensors, requests or devices.

Source: FlashMLA's FP8 latent row and DeepGEMM's paged indexer keys (656 and 132 bytes a token at the V3.2 sizes).
"""

from dataclasses import dataclass

PAGE_SIZE = 64  # tokens in a page; also the unit of prefix hashing and of cache-hit billing
QUANT_BLOCK = 128  # channels that share one scale
CHECKSUM_BYTES = 8  # of one page of one layer of one cache, when it travels


@dataclass(frozen=True)
class CacheLayout:
    """Bytes of the two caches of one layer.

    quantized=True:  latent row = latent e4m3 | one fp32 scale per 128 channels | roped key as bf16;
                     indexer page = 64 rows of e4m3 keys, then 64 rows of fp32 scales.
    quantized=False: latent row = latent and roped key as fp32; indexer page = 64 rows of fp32 keys.
                     It exists so that the model can be compared with an unquantised oracle.
    """

    latent_dim: int
    rope_dim: int
    index_dim: int
    quantized: bool = True

    def __post_init__(self) -> None:
        if self.latent_dim % QUANT_BLOCK or self.index_dim % QUANT_BLOCK:
            raise ValueError(
                f"latent_dim {self.latent_dim} and index_dim {self.index_dim} must be multiples of {QUANT_BLOCK}"
            )

    @property
    def latent_scale_bytes(self) -> int:
        return 4 * (self.latent_dim // QUANT_BLOCK)

    @property
    def latent_row_bytes(self) -> int:
        if self.quantized:
            return self.latent_dim + self.latent_scale_bytes + 2 * self.rope_dim
        return 4 * (self.latent_dim + self.rope_dim)

    @property
    def latent_page_bytes(self) -> int:
        return PAGE_SIZE * self.latent_row_bytes

    @property
    def index_key_bytes(self) -> int:
        """Bytes of the keys of one token, without the scales."""
        return self.index_dim if self.quantized else 4 * self.index_dim

    @property
    def index_scale_bytes(self) -> int:
        return 4 * (self.index_dim // QUANT_BLOCK) if self.quantized else 0

    @property
    def index_page_bytes(self) -> int:
        return PAGE_SIZE * (self.index_key_bytes + self.index_scale_bytes)

    @property
    def page_bytes(self) -> int:
        """Both caches of one layer for one page."""
        return self.latent_page_bytes + self.index_page_bytes

    @property
    def token_bytes(self) -> int:
        """Both caches of one layer for one token: 788 at the V3.2 sizes, quantised."""
        return self.page_bytes // PAGE_SIZE


def num_pages_for(cache_bytes: int, layout: CacheLayout, num_layers: int) -> int:
    """How many pages, over all layers and both caches, fit into `cache_bytes`. ValueError if not even one does."""
    page_bytes = num_layers * layout.page_bytes
    if cache_bytes < page_bytes:
        raise ValueError(
            f"cache_bytes is {cache_bytes}, but one page of {PAGE_SIZE} tokens takes {page_bytes} bytes "
            f"in the {num_layers} layers of this model"
        )
    return cache_bytes // page_bytes
