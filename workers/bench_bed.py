"""What every part of the benchmark stands on: a slice of the model, caches full of random tokens, and clocks.

The caches are filled directly: what a token's cache holds does not change how long it takes to read it.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from kernels.layout import PAGE_SIZE
from kernels.rows import Rows
from workers.bench_dense import dense_model
from workers.config import EngineConfig
from workers.graphs import record
from workers.model import Layer, Model, load_model
from workers.paged_cache import PagedCache
from workers.slice import RandomWeights, slice_config
from workers.tiny import write_tiny
from workers.weights import Weights

SEED = 0
FILLED_AT_ONCE = 2**18  # tokens


@dataclasses.dataclass
class Bed:
    """models: "sparse" is what is served, "dense" the same with attention to every token."""

    models: dict[str, Model]
    cache: PagedCache
    engine_config: EngineConfig
    small: bool

    @property
    def config(self) -> Any:
        return self.models["sparse"].config

    @property
    def device(self) -> str:
        return self.engine_config.device

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def page_table(self, num_requests: int, context: int) -> torch.Tensor:
        """int32 [R, pages], in random order; no page twice."""
        pages = context // PAGE_SIZE
        order = torch.randperm(self.cache.num_pages, generator=torch.Generator().manual_seed(SEED))
        return order[: num_requests * pages].view(num_requests, pages).int().to(self.device)


def make_bed(
    *, layers: int, small: bool, device: str, tokens: int, max_rows: int, batched_tokens: int
) -> Bed:
    """tokens: that the caches hold."""
    engine_config = EngineConfig(
        random_weights=SEED,
        device=device,
        max_running=max_rows,
        max_batched_tokens=batched_tokens,
        cache_bytes=None if device.startswith("cuda") else 2**30,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_slice(folder, small=small, layers=layers)
        sparse = load_model(folder, engine_config)
    again = Weights(
        RandomWeights("slice", seed=SEED, device=device), sparse.ops, "fp8", sparse.dtype, quantized=True
    )
    pages = -(-tokens // PAGE_SIZE) + 1  # the last for surplus rows of graphs
    cache = PagedCache(sparse.layout, num_layers=layers, num_pages=pages, device=device)
    fill(cache, sparse)
    return Bed({"sparse": sparse, "dense": dense_model(sparse, again)}, cache, engine_config, small)


def write_slice(folder: str, *, small: bool, layers: int) -> None:
    """small: of the tiny model."""
    tiny = {"num_hidden_layers": layers, "num_nextn_predict_layers": 0}
    write_tiny(folder, weights=False, **(tiny if small else slice_config(layers)))


def fill(cache: PagedCache, model: Model) -> None:
    """Random tokens everywhere, the same in every layer."""
    generator = torch.Generator(model.device).manual_seed(SEED)
    layout, total = cache.layout, cache.num_pages * PAGE_SIZE

    def normal(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator, device=model.device, dtype=model.dtype)

    for start in range(0, total, FILLED_AT_ONCE):
        slots = torch.arange(start, min(start + FILLED_AT_ONCE, total), device=model.device)
        latent, k_pe = normal(len(slots), layout.latent_dim), normal(len(slots), layout.rope_dim)
        model.ops.write_latents(cache.latent[0], slots, latent, k_pe, layout)
        model.ops.write_index_keys(cache.index[0], slots, normal(len(slots), layout.index_dim), layout)
    cache.latent[1:] = cache.latent[0]
    cache.index[1:] = cache.index[0]


def forward(bed: Bed, model: Model, rows: Rows) -> Callable[[], torch.Tensor]:
    """A step of these rows, with random tokens, ready to be run; each request's last row has logits."""
    generator = torch.Generator().manual_seed(SEED)
    num_rows = rows.query_starts[-1]
    tokens = torch.randint(model.config.vocab_size, (num_rows,), generator=generator).to(bed.device)
    pages = rows.page_table[rows.owners.long(), rows.positions // PAGE_SIZE].long()
    slots = pages * PAGE_SIZE + rows.positions % PAGE_SIZE
    last = torch.tensor(rows.query_starts[1:], device=bed.device) - 1
    return lambda: model.forward(tokens, rows, slots, bed.cache, last)


def chunk_rows(bed: Bed, start: int, count: int) -> Rows:
    """The rows start .. start + count - 1 of one prompt."""
    positions = torch.arange(start, start + count, device=bed.device)
    return Rows.of((0, count), positions, bed.page_table(1, start + count))


def decode_rows(bed: Bed, batch: int, context: int) -> Rows:
    """One row of each request, its last token."""
    positions = torch.full((batch,), context - 1, device=bed.device)
    return Rows.of(tuple(range(batch + 1)), positions, bed.page_table(batch, context))


def cut(bed: Bed, model: Model, layers: int) -> tuple[Bed, Model]:
    """The first layers of it alone."""
    shorter = dataclasses.replace(bed, cache=bed.cache.first_layers(layers))
    return shorter, model.with_layers(model.layers[:layers])


class Clock:
    """Marks in the order of the work; times between them in ms, once it is done."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: list[Any] = []

    def mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def restart(self) -> None:
        self._marks.clear()
        self.mark()

    def laps(self) -> list[float]:
        if self._on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in itertools.pairwise(self._marks)]
        return [1e3 * (b - a) for a, b in itertools.pairwise(self._marks)]


@dataclasses.dataclass(frozen=True)
class Split:
    """Milliseconds of one step: of all layers of a kind together, and of what is not in a layer."""

    dense_layers: float
    moe_layers: float
    rest: float

    @property
    def total(self) -> float:
        return self.dense_layers + self.moe_layers + self.rest


def time_layers(bed: Bed, model: Model, rows: Rows) -> Split:
    """One step, run as the engine runs a prefill chunk, with a mark before and after each layer."""
    clock = Clock(bed.on_gpu)
    step = forward(bed, model.with_layers([_marked(layer, clock) for layer in model.layers]), rows)
    step()
    clock.restart()
    step()
    clock.mark()
    laps = clock.laps()
    num_dense = min(model.config.first_k_dense_replace, len(model.layers))
    layers = laps[1:-1:2]
    rest = laps[0] + laps[-1] + sum(laps[2:-2:2])
    return Split(sum(layers[:num_dense]), sum(layers[num_dense:]), rest)


def _marked(layer: Layer, clock: Clock) -> Any:
    def run(*arguments: Any) -> Any:
        clock.mark()
        result = layer(*arguments)
        clock.mark()
        return result

    return run


def time_graph(bed: Bed, model: Model, rows: Rows, *, repeats: int) -> float:
    """Median ms of a decode step, replayed as the engine replays it; on a CPU, run."""
    step = forward(bed, model, rows)
    graph = record(step, torch.cuda.graph_pool_handle())[0] if bed.on_gpu else None
    clock = Clock(bed.on_gpu)
    for _ in range(repeats):
        clock.mark()
        graph.replay() if graph else step()
    clock.mark()
    return statistics.median(clock.laps())
