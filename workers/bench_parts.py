"""The questions of the benchmark that are about time and room: prefill, decode, memory, the host's share of a step.

A slice has a few layers, DeepSeek-V3.2 has 61: 3 dense ones and 58 with experts. What a layer of a kind takes is its mean over the
slice, and the whole is T(61) = rest + 3 x dense layer + 58 x MoE layer.
"""

import itertools
import statistics
from typing import Any

import numpy as np

from kernels.layout import PAGE_SIZE
from workers import memory
from workers.bench_bed import Bed, Split, chunk_rows, cut, decode_rows, time_graph, time_layers
from workers.bench_pair import land
from workers.engine import Engine
from workers.graphs import DecodeGraphs
from workers.request import Request
from workers.runner import Runner

WHOLE_DENSE, WHOLE_MOE = 3, 58
REPLAYS, CPU_REPLAYS = 20, 2  # of a step of which the median counts
HOST_STEPS, CPU_HOST_STEPS = 30, 3
Result = dict[str, Any]


def whole(bed: Bed, split: Split) -> float:
    """Milliseconds of all 61 layers."""
    layers = len(bed.models["sparse"].layers)
    dense = min(bed.config.first_k_dense_replace, layers)
    moe = split.moe_layers / (layers - dense) if layers > dense else 0.0
    return split.rest + WHOLE_DENSE * split.dense_layers / max(dense, 1) + WHOLE_MOE * moe


def prefill(bed: Bed, lengths: list[int], chunk: int, measured: int) -> list[Result]:
    """A prompt's chunks are the first ones of every longer prompt, so each is timed once.

    measured: how many chunks of the longest prompt; those between are interpolated, because a chunk's time is affine in what lies
    before it
    """
    wrong = [length for length in lengths if length > chunk and length % chunk]
    if wrong:
        raise ValueError(f"lengths {wrong} are not multiples of the chunk, {chunk} tokens")
    count = max(lengths) // chunk
    numbers = sorted({round(i) for i in np.linspace(0, count - 1, min(measured, count))})
    results: list[Result] = [{"tokens": length} for length in sorted(lengths)]
    for kind, model in bed.models.items():
        times = [time_layers(bed, model, chunk_rows(bed, number * chunk, chunk)) for number in numbers]
        for result in results:
            length = result["tokens"]
            if length < chunk:
                split = time_layers(bed, model, chunk_rows(bed, 0, length))
            else:
                split = _sum(times, numbers, length // chunk)
            result[f"{kind}_ms"] = split.total
            result[f"{kind}_61_layers_ms"] = whole(bed, split)
            result[f"{kind}_layer_ms"] = _per_layer(bed, split)
    for result in results:
        _add_ratios(result)
    return results


def _sum(times: list[Split], numbers: list[int], count: int) -> Split:
    def total(values: list[float]) -> float:
        return float(np.interp(range(count), numbers, values).sum())

    return Split(
        total([t.dense_layers for t in times]),
        total([t.moe_layers for t in times]),
        total([t.rest for t in times]),
    )


def _per_layer(bed: Bed, split: Split) -> dict[str, float]:
    layers = len(bed.models["sparse"].layers)
    dense = min(bed.config.first_k_dense_replace, layers)
    found = {"dense": split.dense_layers / dense} if dense else {}
    return found | ({"moe": split.moe_layers / (layers - dense)} if layers > dense else {})


def _add_ratios(result: Result) -> None:
    if "dense_ms" in result and "sparse_ms" in result:
        result["ratio"] = result["dense_ms"] / result["sparse_ms"]
        result["ratio_61_layers"] = result["dense_61_layers_ms"] / result["sparse_61_layers_ms"]


def decode(bed: Bed, contexts: list[int], batches: list[int]) -> list[Result]:
    """Layers are told apart by graphs of models that are cut short: none, the dense ones, all."""
    results: list[Result] = []
    for context, batch in itertools.product(contexts, batches):
        if batch * context > (bed.cache.num_pages - 1) * PAGE_SIZE:
            continue
        result: Result = {"context": context, "batch": batch}
        for kind in bed.models:
            split = _time_decode(bed, kind, batch, context)
            result[f"{kind}_ms"] = split.total
            result[f"{kind}_61_layers_ms"] = whole(bed, split)
            result[f"{kind}_layer_ms"] = _per_layer(bed, split)
        _add_ratios(result)
        results.append(result)
    return results


def _time_decode(bed: Bed, kind: str, batch: int, context: int) -> Split:
    rows, layers = decode_rows(bed, batch, context), len(bed.models[kind].layers)
    cuts = [0, min(bed.config.first_k_dense_replace, layers), layers]
    rest, first, total = (
        time_graph(*cut(bed, bed.models[kind], count), rows, repeats=_replays(bed)) for count in cuts
    )
    return Split(first - rest, total - first, rest)


def _replays(bed: Bed) -> int:
    return REPLAYS if bed.on_gpu else CPU_REPLAYS


def room(bed: Bed, contexts: list[int], device_bytes: int, weight_bytes: int) -> Result:
    """How many requests fit beside the weights and the workspace, in a slice of as many layers as there are here."""
    layout, layers = bed.cache.layout, len(bed.models["sparse"].layers)
    workspace = memory.workspace(bed.config, bed.engine_config)
    page_bytes = layout.page_bytes * layers
    left = device_bytes - weight_bytes - memory.RESERVE_BYTES - workspace.total
    pages = max(0, left // page_bytes)
    return {
        "layers": layers,
        "bytes_per_cached_token": page_bytes // PAGE_SIZE,
        "weight_bytes": weight_bytes,
        "workspace_bytes": workspace.total,
        "pages": pages,
        "requests_that_fit": {str(context): pages * PAGE_SIZE // context for context in contexts},
    }


def host(bed: Bed, contexts: list[int], batches: list[int]) -> list[Result]:
    """Steps of the real engine over requests that have landed: wall time, and how much of it the device does not work."""
    results: list[Result] = []
    for context, batch in itertools.product(contexts, batches):
        pages = batch * (-(-(context + HOST_STEPS) // PAGE_SIZE) + 1)
        if pages >= bed.cache.num_pages:
            continue
        engine, requests = _landed(bed, context, batch)
        walls = [engine.step().seconds * 1e3 for _ in range(HOST_STEPS if bed.on_gpu else CPU_HOST_STEPS)]
        device = time_graph(
            bed, bed.models["sparse"], decode_rows(bed, batch, context), repeats=_replays(bed)
        )
        wall = statistics.median(walls)
        for request in requests:
            engine.abort(request.id)
        results.append(
            {
                "context": context,
                "batch": batch,
                "step_ms": wall,
                "device_ms": device,
                "host_ms": wall - device,
            }
        )
    return results


def _landed(bed: Bed, context: int, batch: int) -> tuple[Engine, list[Request]]:
    model = bed.models["sparse"]
    max_context = context + 2 * PAGE_SIZE
    graphs = DecodeGraphs(model, bed.cache, max_rows=batch, max_context=max_context) if bed.on_gpu else None
    if graphs is not None:
        graphs.capture()
    engine = Engine(
        Runner(model, bed.cache, graphs),
        num_pages=bed.cache.num_pages - 1,
        config=bed.engine_config,
        eos_token_ids=(),
        max_context=max_context,
    )
    return engine, land(engine, context, batch)
