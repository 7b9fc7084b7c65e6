"""Sharing out a GPU's memory: everything is counted once, and what does not fit is said with what would."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import memory
from workers.config import EngineConfig
from workers.model_config import ModelConfig
from workers.slice import slice_config
from workers.tiny import CONFIG

GB = 10**9


def slice_of(layers: int) -> ModelConfig:
    return ModelConfig.from_json(CONFIG | slice_config(layers))


def pages(free: int, layers: int, **settings: Any) -> int:
    model = slice_of(layers)
    config = EngineConfig(**({"cache_bytes": None} | settings))
    return memory.num_pages(free, model, config, model.cache_layout(quantized=True), weight_bytes=GB)


@pytest.mark.parametrize("layers", [1, 4, 61])
def test_bytes_per_cached_token(layers: int) -> None:
    model = slice_of(layers)
    assert model.cache_layout(quantized=True).token_bytes * layers == 788 * layers
    cache_bytes = 788 * layers * 64 * 1000
    assert pages(200 * GB, layers, cache_bytes=cache_bytes) == 1000
    assert pages(200 * GB, layers, cache_bytes=cache_bytes - 1) == 999


@given(free=st.integers(20 * GB, 140 * GB), batched=st.integers(1, 16384), running=st.integers(1, 128))
def test_nothing_is_left_over_and_nothing_is_counted_twice(free: int, batched: int, running: int) -> None:
    settings = {"max_batched_tokens": batched, "max_running": running}
    found = pages(free, 4, **settings)
    needed = memory.workspace(slice_of(4), EngineConfig(**settings)).total
    rest = free - needed - memory.RESERVE_BYTES - found * 788 * 4 * 64
    assert 0 <= rest < 788 * 4 * 64


def test_more_rows_need_more() -> None:
    model = slice_of(4)
    small, large = (
        memory.workspace(model, EngineConfig(max_batched_tokens=n, max_running=n)) for n in (8, 64)
    )
    assert large.activations == 8 * small.activations
    assert large.logits == 8 * small.logits
    assert large.scores == small.scores


def test_an_error_says_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"max_batched_tokens (\d+) would fit") as error:
        pages(8 * GB, 4, max_batched_tokens=16384)
    fits = int(re.search(r"max_batched_tokens (\d+) would", str(error.value))[1])  # type: ignore[index]
    assert pages(8 * GB, 4, max_batched_tokens=fits) >= 1
    with pytest.raises(ValueError, match="would fit"):
        pages(8 * GB, 4, max_batched_tokens=fits + 1)


def test_caches_that_are_too_large_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"cache_bytes is 30000000000, but .* has room for (\d+): \d+ tokens"
    ) as error:
        pages(20 * GB, 4, cache_bytes=30 * GB)
    room = int(re.search(r"room for (\d+)", str(error.value))[1])  # type: ignore[index]
    assert pages(20 * GB, 4, cache_bytes=room)
    with pytest.raises(ValueError, match="no max_batched_tokens is small enough"):
        pages(2 * GB, 4)
