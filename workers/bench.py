"""Measures the engine on a slice of the true model: `python -m workers.bench`. Tables, then one line of JSON.

Dense attention is our own, in the same engine, on the same weights. `--small` runs all of it on the CPU with a tiny model: that
shows that it works, not how fast anything is.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workers import bench_pair, bench_parts
from workers.bench_bed import SEED, Bed, make_bed
from workers.bench_fidelity import fidelity
from workers.bench_plot import plot
from workers.config import EngineConfig

PARTS = ("ship", "ranks", "prefill", "decode", "room", "host", "fidelity")
BED_PARTS = PARTS[2:]  # those that run in this process
FORMULA = "T(61) = rest + 3 x dense layer + 58 x MoE layer"


def main() -> None:
    arguments = _arguments()
    if arguments.read is not None:
        results = json.loads(arguments.read.read_text().splitlines()[-1])
    else:
        results = measure(arguments)
    if arguments.plot is not None:
        arguments.plot.mkdir(parents=True, exist_ok=True)
        for path in plot(results, arguments.plot):
            print(f"drawn: {path}")
    print(json.dumps(results))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    results: dict[str, Any] = {"layers": arguments.layers, "formula": FORMULA}
    for part, run in _pair_runs(arguments).items():
        results[part] = run()
        print(f"\n{part}\n{table(results[part])}", flush=True)
    if set(BED_PARTS) & set(arguments.part):
        results |= _measure_on_bed(arguments)
    print(f"\n{FORMULA}; {time.perf_counter() - started:.1f} s in all")
    return results


def _pair_runs(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """They come first, while the GPUs are empty: their workers are processes of their own."""
    small = arguments.small
    config = EngineConfig(
        random_weights=SEED,
        device="cpu" if small else "cuda",
        max_batched_tokens=arguments.chunk,
        max_running=max(arguments.batches),
        threads=1 if small else None,
    )
    runs: dict[str, Callable[[], Any]] = {
        "ship": lambda: bench_pair.shipped(
            config, layers=arguments.layers, small=small, lengths=arguments.lengths
        ),
        "ranks": lambda: bench_pair.ranks(
            config,
            layers=arguments.layers,
            small=small,
            length=max(arguments.lengths),
            contexts=arguments.contexts,
            batch=max(arguments.batches),
        ),
    }
    return {part: run for part, run in runs.items() if part in arguments.part}


def _measure_on_bed(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    pairs = [(c, b) for c in arguments.contexts for b in arguments.batches]
    decoding = {"decode", "host"} & set(arguments.part)
    tokens = max(
        [max(arguments.lengths) if "prefill" in arguments.part else 0]
        + [b * (c + 4 * 64) for c, b in pairs if decoding and b * c <= arguments.cache_tokens]
    )
    bed = make_bed(
        layers=arguments.layers,
        small=arguments.small,
        device="cpu" if arguments.small else "cuda",
        tokens=tokens,
        max_rows=max(arguments.batches),
        batched_tokens=arguments.chunk,
    )
    weight_bytes = _weight_bytes(bed)
    print(f"{arguments.layers} layers ready after {time.perf_counter() - started:.1f} s")
    runs: dict[str, Callable[[], Any]] = {
        "prefill": lambda: bench_parts.prefill(bed, arguments.lengths, arguments.chunk, arguments.measured),
        "decode": lambda: bench_parts.decode(bed, arguments.contexts, arguments.batches),
        "room": lambda: bench_parts.room(bed, arguments.contexts, _device_bytes(bed), weight_bytes),
        "host": lambda: bench_parts.host(bed, arguments.contexts, arguments.batches),
        "fidelity": lambda: fidelity(bed, arguments.prompt),
    }
    results: dict[str, Any] = {"device": _device_name(bed)}
    for part in (part for part in BED_PARTS if part in arguments.part):
        results[part] = runs[part]()
        rows = results[part] if isinstance(results[part], list) else [results[part]]
        print(f"\n{part}\n{table(rows)}", flush=True)
    return results


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; what is nested stays in the JSON."""
    if not rows:
        return "nothing fits"
    names = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    lines = [names] + [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _weight_bytes(bed: Bed) -> int:
    """On a GPU what is allocated beside the caches, dense attention's own matrices included."""
    if not bed.on_gpu:
        return 0
    return torch.cuda.memory_allocated() - bed.cache.latent.nbytes - bed.cache.index.nbytes


def _device_bytes(bed: Bed) -> int:
    return torch.cuda.get_device_properties(0).total_memory if bed.on_gpu else 2**34


def _device_name(bed: Bed) -> str:
    return torch.cuda.get_device_name() if bed.on_gpu else "CPU"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="ranks takes two GPUs")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--layers", type=int, default=4, help="3 dense ones, then mixtures of experts")
    parser.add_argument("--lengths", type=int, nargs="+", help="prefill: tokens of a prompt")
    parser.add_argument("--chunk", type=int, help="prefill: tokens of a step")
    parser.add_argument("--measured", type=int, default=5, help="prefill: chunks that are timed")
    parser.add_argument("--contexts", type=int, nargs="+", help="decode: tokens of each request")
    parser.add_argument("--batches", type=int, nargs="+", help="decode: requests")
    parser.add_argument("--cache-tokens", type=int, help="decode: the most that batch x context may be")
    parser.add_argument("--prompt", type=int, help="fidelity: tokens of the prompt")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="a picture for each question")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="draw an earlier run's output; measure nothing"
    )
    arguments = parser.parse_args()
    for name, value in (SMALL if arguments.small else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


FULL = {
    "lengths": [4096, 8192, 32768, 65536, 131072],
    "chunk": 8192,
    "contexts": [4096, 32768, 131072],
    "batches": [1, 8, 32, 64],
    "cache_tokens": 64 * 131072,
    "prompt": 3072,
}
SMALL = {
    "lengths": [64, 128, 256],
    "chunk": 128,
    "contexts": [128, 256],
    "batches": [1, 2],
    "cache_tokens": 1024,
    "prompt": 192,
}


if __name__ == "__main__":
    main()
