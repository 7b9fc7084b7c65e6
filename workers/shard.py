"""What every rank of a worker has: its share of the model, its caches, and a runner. Knows nothing of requests."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from kernels import dispatch
from kernels.dispatch import Ops
from kernels.layout import PAGE_SIZE, num_pages_for
from kernels.rows import Rows
from workers import memory
from workers.config import EngineConfig
from workers.graphs import DecodeGraphs
from workers.group import ALONE, Group
from workers.model import Model, load_model
from workers.model_config import ModelConfig
from workers.paged_cache import PagedCache
from workers.runner import Runner


@dataclass(frozen=True)
class Shard:
    """num_pages: of the cache, for requests. On a GPU, and beside other ranks, there is one more for rows that are nobody's."""

    model: Model
    cache: PagedCache
    runner: Runner
    num_pages: int

    @property
    def spare_page(self) -> int:
        return self.num_pages


def config_of(config: EngineConfig, rank: int) -> EngineConfig:
    """What one rank goes by: the ranks of a worker have neighbouring GPUs, rank 0 the configured one."""
    device = torch.device(config.device)
    if device.type == "cpu":
        return config
    return msgspec.structs.replace(config, device=f"{device.type}:{(device.index or 0) + rank}")


def load_shard(model: Path, config: EngineConfig, group: Group = ALONE, *, ops: Ops | None = None) -> Shard:
    """config: of this rank. Raises CheckpointError or ValueError."""
    loaded = load_model(model, config, ops=ops, group=group)
    on_gpu = config.device.startswith("cuda")
    num_layers = loaded.config.num_hidden_layers
    num_pages = _fewest(_num_pages(loaded, config), group, config.device)
    spare = int(on_gpu or group.size > 1)
    cache = PagedCache(
        loaded.layout,
        num_layers=num_layers,
        num_pages=num_pages + spare,
        device=config.device,
        ops=loaded.ops,
    )
    context = max_context(loaded.config, config, num_pages)
    if on_gpu:
        warm_selection(loaded, cache, max_rows=config.max_batched_tokens, max_context=context)
    graphs = None
    if on_gpu and not group.shares_rows and _can_be_recorded(loaded.ops):
        graphs = DecodeGraphs(loaded, cache, max_rows=config.max_running, max_context=context)
    return Shard(loaded, cache, Runner(loaded, cache, graphs), num_pages)


def warm_selection(model: Model, cache: PagedCache, *, max_rows: int, max_context: int) -> None:
    """Selects once for every order of magnitude of rows and context. Few rows of a long context are divided otherwise than many
    of a short one, by kernels of their own, and the first request that needs one would wait until it is compiled."""
    config, device = model.config, model.device
    for width, count in itertools.product(doublings(max_context // PAGE_SIZE), doublings(max_rows)):
        if width * PAGE_SIZE < count:
            continue
        positions = torch.arange(width * PAGE_SIZE - count, width * PAGE_SIZE, device=device)
        rows = Rows.of((0, count), positions, torch.zeros(1, width, dtype=torch.int32, device=device))
        queries = torch.zeros(
            count, config.index_n_heads, config.index_head_dim, dtype=model.dtype, device=device
        )
        weights = torch.zeros(count, config.index_n_heads, device=device)
        model.ops.select_tokens(queries, weights, cache.index[0], rows, config.index_topk, model.layout)


def doublings(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return [1 << i for i in range(largest.bit_length()) if 1 << i < largest] + [largest]


def _can_be_recorded(ops: Ops) -> bool:
    """The reference lets the host look at positions before it selects, which no graph can hold."""
    return ops.select_tokens is not dispatch.select("reference").select_tokens


def max_context(model: ModelConfig, config: EngineConfig, num_pages: int) -> int:
    """Tokens of prompt and output that a request may have."""
    return min(config.max_context or model.max_position_embeddings, num_pages * PAGE_SIZE)


def _fewest(num_pages: int, group: Group, device: str) -> int:
    """Ranks have equally many pages: one page table serves all that share rows, one limit those that do not."""
    return int(group.all_gather(torch.tensor([num_pages], device=device)).wait().min())


def _num_pages(model: Model, config: EngineConfig) -> int:
    """ValueError if there is no room for them."""
    if config.device.startswith("cuda"):
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(config.device)
        weight_bytes = torch.cuda.memory_allocated(config.device)
        return memory.num_pages(free_bytes, model.config, config, model.layout, weight_bytes)
    if config.cache_bytes is None:
        raise ValueError("cache_bytes is null, all the memory that a GPU has left: on a CPU it must be set")
    return num_pages_for(config.cache_bytes, model.layout, model.config.num_hidden_layers)
