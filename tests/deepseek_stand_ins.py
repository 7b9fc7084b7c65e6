"""The public functions of `flash_mla` and `deep_gemm` that Lightship calls, in plain PyTorch: so that a CPU can test the adapters.

They take what the packages take and refuse what they refuse. Where those leave garbage, so do these.
"""

import sys
from types import ModuleType

import pytest
import torch

from kernels import reference
from kernels.testing import LAYOUTS

ROW_BLOCK = 128
LAYOUT = LAYOUTS["fp8"]
Quantized = tuple[torch.Tensor, torch.Tensor]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, functions in (("flash_mla", FLASH_MLA), ("deep_gemm", DEEP_GEMM)):
        module = ModuleType(name)
        module.__dict__.update({function.__name__: function for function in functions})
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def get_mla_metadata() -> tuple[dict[str, object], None]:
    return {}, None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: None,
    cache_seqlens: None,
    head_dim_v: int,
    tile_scheduler_metadata: dict[str, object],
    *,
    softmax_scale: float,
    is_fp8_kvcache: bool,
    indices: torch.Tensor,
) -> Quantized:
    assert is_fp8_kvcache
    assert q.dtype == torch.bfloat16
    assert k_cache.shape[2:] == (1, LAYOUT.latent_row_bytes)
    shape = tile_scheduler_metadata.setdefault("shape", (q.shape, indices.shape))
    assert shape == (q.shape, indices.shape)
    assert torch.all(
        (indices >= -1) & (indices < k_cache.shape[0] * k_cache.shape[1])
    )  # it would read anything else
    pages, slots = k_cache.squeeze(2), indices.squeeze(1)
    out, lse = reference.sparse_mla(q.squeeze(1), pages, slots, softmax_scale, LAYOUT)
    return out.unsqueeze(1), lse.unsqueeze(2)


def flash_mla_sparse_fwd(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sm_scale: float, d_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert q.dtype == kv.dtype == torch.bfloat16
    hidden = (indices < 0) | (indices >= len(kv))
    rows = kv.squeeze(1)[indices.masked_fill(hidden, 0).squeeze(1)].float().masked_fill(hidden.mT, 0)
    scores = (q.float() @ rows.mT * sm_scale).masked_fill(hidden, -torch.inf)
    out = scores.softmax(-1).nan_to_num() @ rows[..., :d_v]
    lse = scores.logsumexp(-1)
    return out.bfloat16(), scores.amax(-1), torch.where(lse == -torch.inf, torch.inf, lse)


def get_num_sms() -> int:
    return 132


def get_paged_mqa_logits_metadata(context_lens: torch.Tensor, block_kv: int, num_sms: int) -> torch.Tensor:
    assert context_lens.ndim == 2
    assert context_lens.dtype == torch.int32
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32)


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor,
    max_context_len: int,
) -> torch.Tensor:
    assert q.dtype == torch.float8_e4m3fn
    assert q.shape[1] == context_lens.shape[1] == 1
    pages = kv_cache.view(len(kv_cache), -1)
    logits = torch.full((len(q), max_context_len), torch.nan)
    for row, (length, table) in enumerate(zip(context_lens[:, 0].tolist(), block_table, strict=True)):
        positions = torch.arange(length)
        keys = reference.read_index_keys(pages, table[positions // 64].long() * 64 + positions % 64, LAYOUT)
        logits[row, :length] = _logits(q[row, 0], keys, weights[row])
    return logits


def fp8_mqa_logits(
    q: torch.Tensor,
    kv: Quantized,
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool,
    max_seqlen_k: int,
) -> torch.Tensor:
    assert q.dtype == kv[0].dtype == torch.float8_e4m3fn
    assert cu_seq_len_k_start.dtype == cu_seq_len_k_end.dtype == torch.int32
    assert not clean_logits  # as compressed columns want it
    keys = kv[0].float() * kv[1].unsqueeze(1)
    logits = torch.full((len(q), max_seqlen_k), torch.nan)
    for row, (start, end) in enumerate(zip(cu_seq_len_k_start, cu_seq_len_k_end, strict=True)):
        logits[row, : end - start] = _logits(q[row], keys[start:end], weights[row])
    return logits


def _logits(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return weights @ (q.float() @ keys.T).relu()


def fp8_gemm_nt(a: Quantized, b: Quantized, d: torch.Tensor) -> None:
    d.copy_(reference.dequantize_blocks(*a) @ reference.dequantize_weight(*b).T)


def get_mk_alignment_for_contiguous_layout() -> int:
    return ROW_BLOCK


def m_grouped_fp8_gemm_nt_contiguous(
    a: Quantized, b: Quantized, d: torch.Tensor, m_indices: torch.Tensor
) -> None:
    assert len(d) % ROW_BLOCK == 0
    for start in range(0, len(d), ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        (expert,) = m_indices[block].unique().tolist()
        if expert >= 0:
            fp8_gemm_nt((a[0][block], a[1][block]), (b[0][expert], b[1][expert]), d[block])


def m_grouped_fp8_gemm_nt_masked(
    a: Quantized, b: Quantized, d: torch.Tensor, masked_m: torch.Tensor, expected_m: int
) -> None:
    assert expected_m > 0
    for expert, count in enumerate(masked_m.tolist()):
        rows = a[0][expert, :count], a[1][expert, :count]
        fp8_gemm_nt(rows, (b[0][expert], b[1][expert]), d[expert, :count])


FLASH_MLA = (get_mla_metadata, flash_mla_with_kvcache, flash_mla_sparse_fwd)
DEEP_GEMM = (
    get_num_sms,
    get_paged_mqa_logits_metadata,
    fp8_paged_mqa_logits,
    fp8_mqa_logits,
    fp8_gemm_nt,
    get_mk_alignment_for_contiguous_layout,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
