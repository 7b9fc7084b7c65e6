"""What every rank of a worker has: its share of the model, its caches, and a runner. Knows nothing of requests."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from kernels.dispatch import Ops
from workers.config import EngineConfig
from workers.group import ALONE, Group
from workers.model import Model, load_model
from workers.paged_cache import PagedCache, num_pages_for
from workers.runner import Runner


@dataclass(frozen=True)
class Shard:
    """num_pages: of the cache, for requests. One rank of several has one page more, `spare_page`, for rows that are nobody's."""

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
    layout, num_layers = loaded.layout, loaded.config.num_hidden_layers
    num_spare = int(group.size > 1)
    num_pages = num_pages_for(config.cache_bytes, layout, num_layers)
    cache = PagedCache(layout, num_layers=num_layers, num_pages=num_pages + num_spare, device=config.device)
    return Shard(loaded, cache, Runner(loaded, cache), num_pages)
