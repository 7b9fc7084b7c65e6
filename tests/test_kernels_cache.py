"""The two caches byte by byte, built by hand from the layout, and what reading gives for slots that are not there."""

import struct

import pytest
import torch

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.reference import (
    quantize_blocks,
    read_index_keys,
    read_latents,
    write_index_keys,
    write_latents,
)
from kernels.reference.cache import LATENTS_AT_ONCE
from kernels.testing import LAYOUTS

NUM_PAGES = 3
SLOTS = torch.tensor([2 * 64 + 63, 0, 64 + 5])
FP8, FP32 = LAYOUTS["fp8"], LAYOUTS["fp32"]


def latent_pages(layout: CacheLayout) -> torch.Tensor:
    return torch.full((NUM_PAGES, PAGE_SIZE, layout.latent_row_bytes), 0xFF, dtype=torch.uint8)


def index_pages(layout: CacheLayout) -> torch.Tensor:
    return torch.full((NUM_PAGES, layout.index_page_bytes), 0xFF, dtype=torch.uint8)


def e4m3_bytes(values: torch.Tensor) -> bytes:
    return bytes(values.view(torch.uint8).tolist())


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_latent_row_is_656_bytes_in_flash_mla_order() -> None:
    latent, k_pe = torch.randn(3, 512), torch.randn(3, 64)
    latent[:, 128:256] *= 300
    pages = latent_pages(FP8)
    write_latents(pages, SLOTS, latent, k_pe, FP8)
    stored = pages.numpy().tobytes()
    for row, slot in enumerate(SLOTS.tolist()):
        values, scales = quantize_blocks(latent[row])
        bf16 = b"".join(
            floats(value)[2:] for value in k_pe[row].bfloat16().tolist()
        )  # the upper half of an fp32
        expected = e4m3_bytes(values) + floats(*scales.tolist()) + bf16
        assert len(expected) == 656
        assert stored[656 * slot : 656 * (slot + 1)] == expected


def test_index_page_is_64_keys_then_64_scales() -> None:
    keys = torch.randn(3, 128) * torch.tensor([[1.0], [1000.0], [0.001]])
    pages = index_pages(FP8)
    write_index_keys(pages, SLOTS, keys, FP8)
    for row, slot in enumerate(SLOTS.tolist()):
        page = pages[slot // 64].numpy().tobytes()
        values, scales = quantize_blocks(keys[row])
        assert len(page) == 8448
        offset = slot % 64
        assert page[128 * offset : 128 * (offset + 1)] == e4m3_bytes(values)
        assert page[64 * 128 + 4 * offset : 64 * 128 + 4 * (offset + 1)] == floats(float(scales))


def test_unquantised_rows_are_plain_fp32() -> None:
    latent, k_pe, keys = torch.randn(3, 512), torch.randn(3, 64), torch.randn(3, 128)
    pages, keys_pages = latent_pages(FP32), index_pages(FP32)
    write_latents(pages, SLOTS, latent, k_pe, FP32)
    write_index_keys(keys_pages, SLOTS, keys, FP32)
    for row, slot in enumerate(SLOTS.tolist()):
        stored = pages.numpy().tobytes()[2304 * slot : 2304 * (slot + 1)]
        assert stored == floats(*latent[row].tolist(), *k_pe[row].tolist())
        stored = keys_pages.numpy().tobytes()[512 * slot : 512 * (slot + 1)]
        assert stored == floats(*keys[row].tolist())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_writing_leaves_every_other_byte_alone(layout: CacheLayout) -> None:
    pages, keys_pages = latent_pages(layout), index_pages(layout)
    write_latents(pages, SLOTS, torch.zeros(3, 512), torch.zeros(3, 64), layout)
    write_index_keys(keys_pages, SLOTS, torch.zeros(3, 128), layout)
    changed = (pages.view(-1, layout.latent_row_bytes) != 0xFF).any(1).nonzero().flatten()
    assert changed.tolist() == sorted(SLOTS.tolist())
    assert int((keys_pages != 0xFF).sum()) == 3 * (layout.index_key_bytes + layout.index_scale_bytes)


def test_layers_of_one_tensor_are_written_through_views() -> None:
    layers = torch.zeros(2, NUM_PAGES, FP8.index_page_bytes, dtype=torch.uint8)
    write_index_keys(layers[1], SLOTS, torch.ones(3, 128), FP8)
    assert not layers[0].any()
    assert read_index_keys(layers[1], SLOTS, FP8).unique().tolist() == [1.0]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_many_latents_are_read_as_one_by_one(layout: CacheLayout) -> None:
    count = 2 * LATENTS_AT_ONCE + 5
    pages = latent_pages(layout)
    write_latents(pages, torch.arange(64), torch.randn(64, 512), torch.randn(64, 64), layout)
    slots = torch.randint(-1, 64, (count,))
    one_by_one = torch.cat([read_latents(pages, slot, layout) for slot in slots.split(1)])
    assert torch.equal(read_latents(pages, slots, layout), one_by_one)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reading_gives_back_what_was_written(layout: CacheLayout) -> None:
    latent, k_pe, keys = torch.randn(3, 512), torch.randn(3, 64), torch.randn(3, 128)
    pages, keys_pages = latent_pages(layout), index_pages(layout)
    write_latents(pages, SLOTS, latent, k_pe, layout)
    write_index_keys(keys_pages, SLOTS, keys, layout)
    read, read_keys = read_latents(pages, SLOTS, layout), read_index_keys(keys_pages, SLOTS, layout)
    if layout.quantized:
        torch.testing.assert_close(read[:, :512], latent, rtol=2**-4, atol=2**-8)
        assert torch.equal(read[:, 512:], k_pe.bfloat16().float())
        torch.testing.assert_close(read_keys, keys, rtol=2**-4, atol=2**-8)
    else:
        assert torch.equal(read, torch.cat((latent, k_pe), dim=1))
        assert torch.equal(read_keys, keys)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_that_are_not_there_read_as_zeros(layout: CacheLayout, dtype: torch.dtype) -> None:
    pages, keys_pages = latent_pages(layout), index_pages(layout)
    write_latents(pages, SLOTS, torch.ones(3, 512), torch.ones(3, 64), layout)
    write_index_keys(keys_pages, SLOTS, torch.ones(3, 128), layout)
    nowhere = [-1, -64, -(2**31), NUM_PAGES * 64, 2**31 - 1]
    slots = torch.tensor([[nowhere[0], 0, nowhere[1]], [nowhere[2], nowhere[3], nowhere[4]]], dtype=dtype)
    latents, keys = read_latents(pages, slots, layout), read_index_keys(keys_pages, slots, layout)
    assert latents.shape == (2, 3, 576)
    assert keys.shape == (2, 3, 128)
    for read in (latents, keys):
        assert read[0, 1].unique().tolist() == [1.0]
        read[0, 1] = 0
        assert not read.any()


def test_a_row_that_holds_nan_stays_nan() -> None:
    pages = latent_pages(FP8)
    latent = torch.randn(3, 512)
    latent[1, 200] = torch.nan
    write_latents(pages, SLOTS, latent, torch.zeros(3, 64), FP8)
    read = read_latents(pages, SLOTS, FP8)
    assert read[1, 128:256].isnan().all()
    assert int(read.isnan().sum()) == 128


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reading_nothing(layout: CacheLayout) -> None:
    none = torch.empty(0, 4, dtype=torch.int64)
    assert read_latents(latent_pages(layout), none, layout).shape == (0, 4, 576)
    assert read_index_keys(index_pages(layout), none, layout).shape == (0, 4, 128)
