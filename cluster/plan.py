"""`python -m cluster.plan`: how many GPUs, which of them for prefill and which for decode, and what to expect of them.

Prints what fits, what each figure comes from, and a configuration to paste. Memory is counted; times are extrapolated from one H200.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from cluster import plan_times
from cluster.plan_choice import Hardware, Mix, Shape, Split, shapes, splits, workers_needed
from cluster.plan_memory import DoesNotFit, GpuMemory, requests_that_fit
from workers.config import EngineConfig
from workers.model_config import ModelConfig
from workers.slice import slice_config
from workers.tiny import CONFIG

GB = 1e9
NEAR_LIMIT = 0.9  # of what a cluster can do, where it is asked for more than that


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        sys.stdout.write(plan(arguments))
    except (DoesNotFit, ValueError) as error:
        sys.stderr.write(f"lightship: {error}\n")
        return 1
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.plan", description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="folder with a config.json; default: the sizes of DeepSeek-V3.2"
    )
    parser.add_argument("--nodes", type=_positive, default=2, help="machines with GPUs; default 2")
    parser.add_argument("--gpus", type=_positive, default=8, help="of one machine; default 8")
    parser.add_argument(
        "--gpu-memory", type=float, default=139.0, metavar="GIB", help="of one GPU, default 139: an H200"
    )
    parser.add_argument("--context", type=_positive, help="most tokens of a request; default: input + output")
    parser.add_argument("--input", type=_positive, default=8192, help="tokens of a prompt; default 8192")
    parser.add_argument("--output", type=_positive, default=512, help="tokens of an answer; default 512")
    parser.add_argument(
        "--hit-rate", type=_share, default=0.0, help="of the prompt, 0 to 1, in the prefix cache; default 0"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second; default 1")
    parser.add_argument(
        "--max-batched-tokens", type=_positive, default=8192, help="of a prefill step; default 8192"
    )
    parser.add_argument(
        "--max-running", type=_positive, default=256, help="requests of one worker; default 256"
    )
    return parser.parse_args(argv)


def plan(arguments: argparse.Namespace) -> str:
    """The whole report. Raises DoesNotFit, or ValueError for a config that is not supported."""
    v32 = ModelConfig.from_json(CONFIG | slice_config(61))
    model = ModelConfig.load(arguments.model) if arguments.model else v32
    mix = Mix(arguments.input, arguments.output, arguments.hit_rate, arguments.rate)
    hardware = Hardware(arguments.nodes, arguments.gpus, int(arguments.gpu_memory * 2**30))
    engine = EngineConfig(
        max_batched_tokens=arguments.max_batched_tokens,
        max_running=arguments.max_running,
        cache_bytes=None,
        max_context=_context(arguments.context or mix.tokens, mix, model),
        device="cuda",
    )
    found = [splits(shape, hardware, mix) for shape in _large_enough(model, hardware, mix, engine)]
    # The sort is stable: of shapes that can do the same, the one with the fewest GPUs a worker.
    best = max((ways[0] for ways in found), key=lambda split: split.limit)
    timed = plan_times.applies_to(model, v32)
    if not timed:
        best = next(split for split in found[0] if split.prefills == (len(found[0]) + 1) // 2)
    parts = [_inputs(arguments, hardware), _workers(best, hardware, timed), _memory(best.shape, mix)]
    parts += [_times(best), _sources()] if timed else [_untimed()]
    parts.append(_config(best, arguments.model or Path("/models/DeepSeek-V3.2")))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _large_enough(model: ModelConfig, hardware: Hardware, mix: Mix, engine: EngineConfig) -> list[Shape]:
    """Those of which the cluster has room for two workers. Raises DoesNotFit."""
    fitting = shapes(model, hardware, mix, engine)
    two = [shape for shape in fitting if shape.per_node * hardware.nodes > 1]
    return two or fitting[:1]


def _context(context: int, mix: Mix, model: ModelConfig) -> int:
    if context > model.max_position_embeddings:
        raise ValueError(
            f"the context is {context} tokens, but the model's limit is {model.max_position_embeddings}"
        )
    if context < mix.tokens:
        raise ValueError(f"the context is {context} tokens, but a request of this mix has {mix.tokens}")
    return context


def _inputs(arguments: argparse.Namespace, hardware: Hardware) -> Iterator[str]:
    yield f"model      {arguments.model or 'DeepSeek-V3.2, built-in sizes'}"
    yield f"hardware   {hardware.nodes} x {hardware.gpus} GPUs of {hardware.gpu_bytes / GB:.1f} GB"
    yield (
        f"requests   {arguments.input} tokens in ({arguments.hit_rate:.0%} of them cached), {arguments.output} out, "
        f"{arguments.rate:g} a second"
    )


def _workers(best: Split, hardware: Hardware, timed: bool) -> Iterator[str]:
    total = best.prefills + best.decodes
    yield (
        f"A worker is {_gpus(best.shape.ranks)} of one machine; {total} fit, {best.shape.per_node} on each of {hardware.nodes}."
    )
    yield f"  prefill workers  {best.prefills}"
    yield f"  decode workers   {best.decodes}"
    if not timed:
        return
    yield f"  limits: prefill {best.prefill_limit:.2f} requests/s, decode {best.decode_limit:.2f} requests/s (extrapolated)"
    if not best.holds:
        prefills, decodes = workers_needed(best)
        nodes = -(-(prefills + decodes) // best.shape.per_node)
        yield (
            f"  TOO FEW for {best.mix.rate:g} requests/s: {prefills} prefill and {decodes} decode workers would do, "
            f"on {nodes} machines (extrapolated). What follows is at {NEAR_LIMIT:.0%} of the limit."
        )


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _memory(shape: Shape, mix: Mix) -> Iterator[str]:
    memory, weights, needed = shape.memory, shape.memory.weights, shape.memory.workspace
    yield f"Memory of one GPU, GB (counted; the experts are shared by {_gpus(shape.ranks)}):"
    for name, count in (
        *((f"weights, {name.replace('_', ' ')}", count) for name, count in vars(weights).items()),
        *((f"workspace, {name}", count) for name, count in vars(needed).items()),
        ("reserve (driver, collectives, fragments)", memory.reserve),
        (
            f"pages: {memory.num_pages} of {memory.page_bytes / 1e6:.2f} MB, {memory.cached_tokens} tokens",
            memory.pages,
        ),
        ("left over", memory.left_over),
    ):
        yield f"  {count / GB:8.2f}  {name}"
    yield f"  {memory.device / GB:8.2f}  in all, of which weights {weights.total / GB:.2f}, workspace {needed.total / GB:.2f}"
    yield f"  requests of {mix.tokens} tokens: {_fits(memory, shape, mix)}"


def _fits(memory: GpuMemory, shape: Shape, mix: Mix) -> str:
    prefill = requests_that_fit(memory, "prefill", shape.ranks, mix.tokens)
    decode = requests_that_fit(memory, "decode", shape.ranks, mix.tokens)
    return f"{prefill} in a prefill worker (its ranks hold the same pages), {decode} in a decode worker (each rank its own)"


def _times(best: Split) -> Iterator[str]:
    at = best if best.holds else replace(best, mix=replace(best.mix, rate=best.limit * NEAR_LIMIT))
    mix = at.mix
    prefill, step = at.prefill_time, at.step
    yield f"Expected at {mix.rate:.2f} requests/s; every time here is an EXTRAPOLATION, none was measured on several GPUs:"
    yield f"  TTFT    {at.ttft_ms:8.0f} ms, mean = gateway {plan_times.GATEWAY_MS:.0f} + reserve {step.total_ms:.0f} + queue {at.queue_ms:.0f} + prefill {prefill.total_ms:.0f}"
    yield (
        f"    prefill = (T({mix.input_tokens}) - T({mix.cached_tokens})) / {at.shape.ranks} ranks {prefill.compute_ms:.0f} "
        f"+ exchange between ranks {prefill.exchange_ms:.0f}"
    )
    yield "    queue = mean wait for one of the prefill workers, random arrivals (Sakasegawa); without load, 0"
    yield (
        f"  TPOT    {step.total_ms:8.1f} ms = attention {step.attention_ms:.1f} + experts {step.experts_ms:.1f} + exchange "
        f"{step.exchange_ms:.1f} + dense MLPs {step.dense_ms:.1f} + head {step.head_ms:.1f} + host {step.host_ms:.1f}, "
        f"{at.batch:.1f} requests in each rank's batch"
    )
    yield f"  second token: up to {at.last_shipment_ms:.0f} ms more, for the last chunk's pages"
    yield f"  output  {mix.rate * mix.output_tokens:8.0f} tokens/s, at the limit {best.limit * mix.output_tokens:.0f}"
    yield f"  input   {mix.rate * mix.input_tokens:8.0f} tokens/s, at the limit {best.limit * mix.input_tokens:.0f}"
    each = mix.rate * at.shipped_bytes / at.prefills / GB
    yield f"  shipped {each:8.2f} GB/s out of each prefill worker: {at.shipped_bytes / GB:.2f} GB a request"


def _sources() -> Iterator[str]:
    yield "Measured on one H200 (docs/benchmarks.md, docs/kernels.md), a slice of 4 layers at true sizes, our own kernels:"
    yield "  prefill, tokens: 4 layers, 61 by rest + 3 x dense layer + 58 x MoE layer, ms"
    for prompt in plan_times.PREFILL:
        yield f"    {prompt.tokens:6d}: {prompt.slice_ms:g}, {prompt.whole_ms:g}"
    yield "  decode step, context x batch: 4 layers, 61, ms"
    for step in plan_times.DECODE:
        yield f"    {step.context:6d} x {step.batch}: {step.slice_ms:g}, {step.whole_ms:g}"
    yield (
        f"  experts read at {plan_times.WEIGHTS_GB_S:g} GB/s; between two GPUs: gather {plan_times.GATHER_GB_S:g} GB/s, sums back "
        f"{plan_times.RETURN_GB_S:g} GB/s, both ways in a small step {plan_times.EXCHANGE_MS * 1000:g} us; shipping {plan_times.LINK_GB_S:g} GB/s a pair"
    )
    yield f"  host {plan_times.HOST_MS:g} ms and language head {plan_times.HEAD_MS:g} ms a step; choosing experts {plan_times.GATE_MS * 1000:g} us a layer"


def _untimed() -> Iterator[str]:
    yield "Nothing was measured with a model of these sizes: no times, and the workers are divided evenly."


def _config(best: Split, model: Path) -> Iterator[str]:
    yield "# Paste into a file for `python -m cluster.deploy --config FILE`. Set model to its folder on every machine; for more than one"
    yield "# machine also host: 0.0.0.0 and keys_required: true."
    yield msgspec.yaml.encode(config_of(best, model)).decode().rstrip()


def config_of(best: Split, model: Path) -> dict[str, object]:
    """Settings for `cluster.config`."""

    keys = ("max_batched_tokens", "max_running", "cache_bytes", "max_context", "device", "ranks")
    engine = {key: getattr(best.shape.engine, key) for key in keys}

    def role(workers: int) -> dict[str, object]:
        return {"workers": workers, "num_gpus": best.shape.ranks, "engine": engine}

    return {
        "model": str(model),
        "prefill": role(best.prefills),
        "decode": role(best.decodes),
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} does not lie in 0 to 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
