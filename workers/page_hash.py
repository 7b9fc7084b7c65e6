"""Names for cached pages: chained hashes of full pages of token ids.

Workers, gateways and the prefix directory use this one function. Knows nothing of pools, models or routing.
"""

import hashlib
import struct
from collections.abc import Sequence

from kernels.layout import PAGE_SIZE

_PAGE = struct.Struct(f"<{PAGE_SIZE}i")


_PUBLIC = hashlib.blake2b(b"", digest_size=16, person=b"public").digest()


def page_hashes(
    namespace: bytes, tokens: Sequence[int], known: Sequence[bytes] = (), num_public_pages: int = 0
) -> list[bytes]:
    """16-byte hashes of the full pages of `tokens`: h_i = blake2b(h_(i-1) || 64 tokens as int32 little-endian).

    The chain starts at blake2b(namespace), so that no page of one namespace is ever found from another. The leading
    `num_public_pages` are a chain of their own that all namespaces share; behind them that of the namespace starts at
    blake2b(h || namespace), h being the last public one. `known` are the hashes of the leading pages, where they are known
    already; only the rest is computed.
    """
    hashes = list(known)
    parent = hashes[-1] if hashes else _PUBLIC
    for start in range(PAGE_SIZE * len(hashes), len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        if len(hashes) == num_public_pages:
            behind = parent if hashes else b""
            parent = hashlib.blake2b(behind + namespace, digest_size=16).digest()
        page = _PAGE.pack(*tokens[start : start + PAGE_SIZE])
        parent = hashlib.blake2b(parent + page, digest_size=16).digest()
        hashes.append(parent)
    return hashes
