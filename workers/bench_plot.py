"""Draws what the benchmark has measured, one picture for each question. Knows nothing of how it was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
COLOURS = {"dense": "tab:gray", "sparse": "tab:blue"}


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """-> the files written."""
    drawn = []
    for part, draw in DRAWN.items():
        if results.get(part):
            path = folder / f"bench-{part}.png"
            draw(results[part], path)
            drawn.append(path)
    return drawn


def _figure(columns: int) -> Any:
    from matplotlib.figure import Figure  # here: it takes longer to import than all the rest

    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _say_plainly(axis: Any, values: list[int]) -> None:
    """These numbers at a logarithmic axis, in units of 1024 where they are such."""
    names = [f"{value // 1024}k" if value % 1024 == 0 else str(value) for value in values]
    axis.set_ticks(values, names)
    axis.set_ticks([], minor=True)


def _prefill(results: list[Result], path: Path) -> None:
    figure, (times, ratios) = _figure(2)
    lengths = [result["tokens"] for result in results]
    for kind, colour in COLOURS.items():
        seconds = [result[f"{kind}_61_layers_ms"] / 1e3 for result in results]
        times.plot(lengths, seconds, "o-", color=colour, label=kind)
    times.set(xscale="log", yscale="log", xlabel="prompt, tokens", ylabel="s, extrapolated to 61 layers")
    _say_plainly(times.xaxis, lengths)
    times.legend()
    ratios.plot(lengths, [result["ratio"] for result in results], "o-", label="slice")
    ratios.plot(lengths, [result["ratio_61_layers"] for result in results], "o--", label="61 layers")
    ratios.axhline(1, color="0.7", lw=1)
    ratios.set(xscale="log", xlabel="prompt, tokens", ylabel="dense time / sparse time")
    _say_plainly(ratios.xaxis, lengths)
    ratios.legend()
    figure.suptitle("Prefill of one prompt")
    figure.savefig(path, dpi=130)


def _decode(results: list[Result], path: Path) -> None:
    contexts = sorted({result["context"] for result in results})
    figure, axes = _figure(len(contexts))
    for axis, context in zip(axes, contexts, strict=True):
        rows = [result for result in results if result["context"] == context]
        batches = [result["batch"] for result in rows]
        for kind, colour in COLOURS.items():
            axis.plot(batches, [row[f"{kind}_61_layers_ms"] for row in rows], "o-", color=colour, label=kind)
        axis.set(title=f"context {context}", xlabel="batch", ylabel="ms a step, extrapolated to 61 layers")
        axis.set(xscale="log", yscale="log")
        _say_plainly(axis.xaxis, batches)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend()
    figure.suptitle("Decode step")
    figure.savefig(path, dpi=130)


def _room(result: Result, path: Path) -> None:
    figure, (axis,) = _figure(1)
    fits = result["requests_that_fit"]
    bars = axis.bar(list(fits), list(fits.values()))
    axis.bar_label(bars)
    axis.set(yscale="log", xlabel="tokens of each request", ylabel="requests that fit")
    axis.set_title(f"{result['layers']} layers, {result['bytes_per_cached_token']} bytes a cached token")
    figure.savefig(path, dpi=130)


def _host(results: list[Result], path: Path) -> None:
    figure, (axis,) = _figure(1)
    for context in sorted({result["context"] for result in results}):
        rows = [result for result in results if result["context"] == context]
        axis.plot(
            [row["batch"] for row in rows], [row["host_ms"] for row in rows], "o-", label=f"context {context}"
        )
    axis.set(xscale="log", xlabel="batch", ylabel="ms of a step in which the device waits for the host")
    axis.legend()
    figure.savefig(path, dpi=130)


def _ship(results: list[Result], path: Path) -> None:
    figure, (axis,) = _figure(1)
    lengths = [result["tokens"] for result in results]
    axis.plot(lengths, [result["ttft_ms"] for result in results], "o-", label="request to first token")
    axis.plot(lengths, [result["exposed_ms"] for result in results], "o-", label="then, until all has landed")
    axis.set(xscale="log", yscale="log", xlabel="prompt, tokens", ylabel="ms")
    _say_plainly(axis.xaxis, lengths)
    axis.set_title(f"Prefill, ship, decode over {results[0]['transport']}")
    axis.legend()
    figure.savefig(path, dpi=130)


def _ranks(results: list[Result], path: Path) -> None:
    figure, (axis,) = _figure(1)
    names = [f"{result['step']}\n{result['batch']} x {result['tokens']}" for result in results]
    bars = axis.bar(names, [result["speedup"] for result in results])
    axis.bar_label(bars, fmt="%.2f")
    axis.axhline(1, color="0.7", lw=1)
    axis.set(ylabel="time of one rank / time of two")
    figure.savefig(path, dpi=130)


DRAWN: dict[str, Callable[[Any, Path], None]] = {
    "prefill": _prefill,
    "decode": _decode,
    "ship": _ship,
    "ranks": _ranks,
    "room": _room,
    "host": _host,
}
