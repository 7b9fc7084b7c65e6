"""Times calls on a device and measures what the device can do at most. Knows nothing of operators."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

L2_BYTES = 60 * 2**20
MEASURED_SECONDS = 0.1  # of each call
GRAPH_BELOW = 3000.0  # microseconds; shorter calls are replayed from a CUDA graph, so that the host does not slow them down

Call = Callable[[int], object]  # takes the number of a set of inputs


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches on large problems: FLOP/s of matrix products, bytes/s read and written by a copy."""

    bf16: float
    fp8: float
    copy: float

    def seconds(self, flop: float, kind: str, num_bytes: float) -> tuple[float, bool]:
        """The least time, and whether arithmetic rather than memory sets it."""
        compute, memory = flop / (self.fp8 if kind == "fp8" else self.bf16), num_bytes / self.copy
        return max(compute, memory), compute > memory


def sets_beyond_cache(num_bytes: float, most: int = 64) -> int:
    """How many sets of inputs of so many bytes it takes for each to have left the L2 cache when it is used again."""
    return max(1, min(most, math.ceil(2 * L2_BYTES / max(1, num_bytes))))


def microseconds(call: Call, sets: int, device: torch.device, *, replayed: bool = True) -> float:
    """Median time of a call over rounds through all sets of inputs. replayed: whether a graph can hold it."""
    for number in (*range(sets), 0):  # compiles and allocates
        call(number)
    if device.type != "cuda":
        return _rounds(lambda: _pass(call, sets), _host_seconds) / sets * 1e6
    once = _device_seconds(lambda: _pass(call, sets)) / sets
    run = _graph(call, sets) if replayed and once * 1e6 < GRAPH_BELOW else lambda: _pass(call, sets)
    return _rounds(run, _device_seconds) / sets * 1e6


def measure_ceilings(device: torch.device) -> Ceilings:
    if device.type != "cuda":
        a = torch.randn(256, 256)
        rate = 2 * 256**3 / (microseconds(lambda _: a @ a, 1, device) * 1e-6)
        return Ceilings(bf16=rate, fp8=rate, copy=_copy_rate(2**22, device))
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * n**3 / (microseconds(lambda _: a @ b, 1, device) * 1e-6)
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T, torch.ones((), device=device)
    multiply = lambda _: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)  # noqa: E731
    return Ceilings(
        bf16=bf16, fp8=2 * n**3 / (microseconds(multiply, 1, device) * 1e-6), copy=_copy_rate(2**30, device)
    )


def _copy_rate(num_bytes: int, device: torch.device) -> float:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / (microseconds(lambda _: target.copy_(source), 1, device) * 1e-6)


def _pass(call: Call, sets: int) -> None:
    for number in range(sets):
        call(number)


def _graph(call: Call, sets: int) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _pass(call, sets)
    graph.replay()
    return graph.replay


def _rounds(run: Callable[[], None], seconds: Callable[[Callable[[], None]], float]) -> float:
    """Median over at least three runs, or as many as MEASURED_SECONDS take."""
    first = seconds(run)
    count = max(3, min(100, int(MEASURED_SECONDS / max(first, 1e-6))))
    return statistics.median(seconds(run) for _ in range(count))


def _host_seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_seconds(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
