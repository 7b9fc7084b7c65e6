"""Benchmark of every operator at the model's true shapes, with DeepSeek's kernels and torch beside ours in the same run.

    python -m kernels.bench [--peers DIR] [--only OPERATOR ...] [--small]

Prints a table: time, TFLOP/s or GB/s (whichever has the lower ceiling), per cent of that ceiling as measured in this run, and for
others how fast ours is against them (1.00: equally fast, 0.50: half as fast). `error` is the distance from the reference. The last
line is JSON.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from kernels import bench_attention, bench_indexer, bench_linear, bench_pages
from kernels.bench_cases import Maker, Problem, Setting
from kernels.bench_peers import add_peers
from kernels.bench_timing import Call, Ceilings, measure_ceilings, microseconds
from kernels.dispatch import OPTIONAL_PACKAGES, Ops, select

PARTS = {
    "sparse_mla": bench_attention,
    "select_tokens": bench_indexer,
    "linear": bench_linear,
    "pages": bench_pages,
}
HEADER = f"{'operator':<22} {'shape':<34} {'by':<22} {'us':>9} {'rate':>15} {'ceiling':>8} {'ours':>6} {'error':>8}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--peers", metavar="DIR", help="folder with vllm/_flashmla_C.abi3.so and vllm/third_party"
    )
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.peers:
        add_peers(options.peers)
    setting = make_setting("cuda" if torch.cuda.is_available() else "cpu", small=options.small)
    if setting.device.type == "cpu" and not options.small:
        parser.error("there is no CUDA device; --small runs tiny shapes on the CPU")
    ceilings = measure_ceilings(setting.device)
    print(
        f"{_device_name(setting.device)}: bf16 {ceilings.bf16 / 1e12:.0f} TFLOP/s, fp8 {ceilings.fp8 / 1e12:.0f} TFLOP/s, "
        f"copy {ceilings.copy / 1e9:.0f} GB/s\n{HEADER}"
    )
    records = []
    for part in options.only:
        for maker in PARTS[part].problems(setting):
            for record in measure(maker, setting, ceilings):
                print(_line(record), flush=True)
                records.append(record)
    print(
        json.dumps({"device": _device_name(setting.device), "ceilings": vars(ceilings), "results": records})
    )


def make_setting(device: str, *, small: bool) -> Setting:
    """All back ends and packages that are installed, ours first."""
    names = ("triton", "flash_mla") if device == "cuda" else ("reference",)
    back_ends = dict[str, Ops]()
    for name in names:
        try:
            back_ends[name] = select(name)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL_PACKAGES:
                raise
            print(f"without {name}: {error.name} is not installed", file=sys.stderr)
    packages = {}
    if "flash_mla" in back_ends:
        packages = {name: importlib.import_module(name) for name in ("flash_mla", "deep_gemm")}
    return Setting(torch.device(device), small, back_ends, **packages)


def measure(maker: Maker, setting: Setting, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One record for each implementation; one that fails says so in its record and does not stop the others."""
    problem = maker()
    ours: float | None = None
    for name, call in problem.calls.items():
        record: dict[str, Any] = {"operator": problem.operator, "shape": problem.shape, "by": name}
        try:
            record |= _measured(problem, call, setting, ceilings)
        except Exception as error:  # noqa: BLE001  the outermost loop
            record["failed"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        else:
            ours = record["us"] if ours is None else ours
            record["ours"] = record["us"] / ours
        yield record


def _measured(problem: Problem, call: Call, setting: Setting, ceilings: Ceilings) -> dict[str, Any]:
    error = problem.error(call(0))
    time = microseconds(call, problem.sets, setting.device, replayed=problem.replayed)
    least, by_arithmetic = ceilings.seconds(problem.flop, problem.flop_kind, problem.bytes)
    return {
        "us": time,
        "tflops": problem.flop / time / 1e6,
        "gbps": problem.bytes / time / 1e3,
        "bound": "arithmetic" if by_arithmetic else "memory",
        "of_ceiling": least * 1e6 / time,
        "error": error,
    }


def _line(record: dict[str, Any]) -> str:
    start = f"{record['operator']:<22} {record['shape']:<34} {record['by']:<22}"
    if "failed" in record:
        return f"{start} {record['failed']}"
    by_arithmetic = record["bound"] == "arithmetic"
    rate = f"{record['tflops']:.0f} TFLOP/s" if by_arithmetic else f"{record['gbps']:.0f} GB/s"
    return f"{start} {record['us']:>9.1f} {rate:>15} {record['of_ceiling']:>8.0%} {record['ours']:>6.2f} {record['error']:>8.1e}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
