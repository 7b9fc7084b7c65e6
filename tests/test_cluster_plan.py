"""The planner: memory is counted whole, more of anything never fits less, times grow with the work, and its config loads."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster import plan, plan_times
from cluster.config import load
from cluster.plan_choice import Hardware, Mix, Split, shapes, splits, workers_needed
from cluster.plan_memory import DoesNotFit, GpuMemory, gpu_memory, requests_that_fit, weight_bytes
from kernels import dispatch
from workers.config import EngineConfig
from workers.model import load_model
from workers.model_config import ModelConfig
from workers.slice import slice_config
from workers.tiny import CONFIG, write_tiny

GIB = 2**30
V32 = ModelConfig.from_json(CONFIG | slice_config(61))
ENGINE = EngineConfig(max_batched_tokens=8192, max_running=256, cache_bytes=None, device="cuda")
H200 = 139 * GIB
ROOT = Path(__file__).resolve().parent.parent

mixes = st.builds(
    Mix,
    input_tokens=st.integers(1, 100_000),
    output_tokens=st.integers(1, 4000),
    hit_rate=st.floats(0, 1),
    rate=st.floats(0.001, 20),
)


def memory(device: int = H200, **settings: int) -> GpuMemory:
    return gpu_memory(V32, msgspec.structs.replace(ENGINE, **({"ranks": 8} | settings)), device)


def split(mix: Mix, prefills: int = 1, decodes: int = 1) -> Split:
    (shape,) = shapes(V32, Hardware(prefills + decodes, 8, H200), mix, ENGINE)
    return Split(shape, mix, prefills, decodes)


def test_weights_are_those_that_a_worker_holds(tmp_path: Path) -> None:
    """Every tensor of a real model of true sizes, as the GPU's kernels want it, one dense layer and one with experts, without its memory."""
    config = CONFIG | slice_config(2) | {"first_k_dense_replace": 1}
    write_tiny(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | config)
    )
    ours, plain = dispatch.select("triton"), dispatch.select("reference")
    names = ("prepare_fp8_weight", "prepare_experts")
    ops: Any = SimpleNamespace(**vars(plain) | {name: getattr(ours, name) for name in names})
    model = load_model(tmp_path, EngineConfig(device="meta", random_weights=0), ops=ops)
    counted = weight_bytes(model.config, 1)
    assert _tensor_bytes([model._embedding, model._head]) == counted.embedding_and_head
    held = _tensor_bytes([model._embedding, model._head, model._norm, model.layers])
    assert held == counted.total


def _tensor_bytes(root: object) -> int:
    """Of all tensors reachable from here, each once."""
    seen: set[int] = set()
    total, stack = 0, [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, ModelConfig):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.nbytes
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list | tuple):
            stack += item
        elif type(item).__module__.startswith(("workers", "kernels")):
            stack += vars(item).values() if hasattr(item, "__dict__") else []
    return total


def test_a_checkpoint_of_v32_is_the_sum_of_its_ranks() -> None:
    """Experts are divided, the rest is on every rank; the whole is near the 642 GiB of the files less their MTP layer."""
    one, eight = weight_bytes(V32, 1), weight_bytes(V32, 8)
    assert eight.routed_experts * 8 == one.routed_experts
    assert replace(eight, routed_experts=0) == replace(one, routed_experts=0)
    assert one.total == pytest.approx(689.5e9 * 61 / 62, rel=0.01)
    with pytest.raises(ValueError, match="ranks is 16"):
        weight_bytes(V32, 16)


@given(device=st.integers(120 * GIB, 300 * GIB), batched=st.integers(1, 16384), running=st.integers(1, 1024))
def test_the_parts_are_the_whole(device: int, batched: int, running: int) -> None:
    found = memory(device, max_batched_tokens=batched, max_running=running)
    parts = found.weights.total + found.workspace.total + found.reserve + found.pages
    assert parts <= device
    assert parts + found.left_over == device
    assert 0 <= found.left_over < found.page_bytes
    assert found.page_bytes == 788 * 64 * 61


@given(
    device=st.integers(120 * GIB, 300 * GIB), more=st.integers(0, 50 * GIB), tokens=st.integers(1, 160_000)
)
def test_more_memory_never_fits_fewer_requests(device: int, more: int, tokens: int) -> None:
    small, large = memory(device), memory(device + more)
    for role in ("prefill", "decode"):
        assert requests_that_fit(small, role, 8, tokens) <= requests_that_fit(large, role, 8, tokens)
    assert requests_that_fit(large, "decode", 8, tokens + 64) <= requests_that_fit(large, "decode", 8, tokens)
    assert requests_that_fit(large, "prefill", 8, tokens) * 8 == requests_that_fit(large, "decode", 8, tokens)


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(DoesNotFit, match=r"150 GB has no room .* 675\.\d GB of weights"):
        gpu_memory(V32, ENGINE, 140 * GIB)
    with pytest.raises(DoesNotFit, match="a request of 900001 tokens does not fit"):
        split(Mix(900_000, 1, 0.0, 1.0))
    with pytest.raises(DoesNotFit, match="all of 1 node with 8"):
        splits(split(Mix(100, 1, 0.0, 1.0)).shape, Hardware(1, 8, H200), Mix(100, 1, 0.0, 1.0))


def test_the_measured_prompts_are_met_exactly() -> None:
    for measured in plan_times.PREFILL:
        assert plan_times.prompt_ms(measured.tokens) == pytest.approx(measured.whole_ms)
        alone = plan_times.prefill_time(V32, measured.tokens, 0, 1)
        assert alone.total_ms == pytest.approx(measured.whole_ms)


def test_the_fit_of_attention_is_near_what_was_measured() -> None:
    for measured in plan_times.DECODE:
        layers = plan_times.DENSE_LAYERS * (
            plan_times.attention_ms(measured.context, measured.batch) + 3 * 7168 * 18432 / 4100e6
        )
        dense = measured.slice_ms - plan_times.moe_layer_ms(measured) - plan_times.HEAD_MS
        assert layers == pytest.approx(dense, rel=0.12)


@given(
    tokens=st.integers(1, 163_840),
    more=st.integers(1, 1000),
    cached=st.floats(0, 1),
    ranks=st.sampled_from([1, 2, 4, 8]),
)
def test_more_to_read_takes_longer_and_hits_take_nothing(
    tokens: int, more: int, cached: float, ranks: int
) -> None:
    hits = int(tokens * cached)
    time = plan_times.prefill_time(V32, tokens, hits, ranks)
    assert time.compute_ms >= 0
    assert plan_times.prefill_time(V32, tokens + more, hits, ranks).total_ms > time.total_ms
    assert time.total_ms <= plan_times.prefill_time(V32, tokens, 0, ranks).total_ms
    late = plan_times.prompt_ms(tokens + more) - plan_times.prompt_ms(tokens)
    assert late >= plan_times.prompt_ms(more) * 0.999  # a token costs the more the later it comes


@given(context=st.integers(1, 160_000), batch=st.floats(0.125, 128), ranks=st.sampled_from([1, 2, 4, 8]))
def test_a_step_grows_with_its_batch_and_context(context: int, batch: float, ranks: int) -> None:
    step = plan_times.step_time(V32, context, batch, ranks)
    assert step.total_ms == pytest.approx(sum(vars(step).values()))
    assert plan_times.step_time(V32, context, batch * 2, ranks).total_ms > step.total_ms
    assert plan_times.step_time(V32, context * 2, batch, ranks).total_ms > step.total_ms
    twice = plan_times.step_time(V32, context, batch * 2, ranks).total_ms
    assert 2 / twice > 1 / step.total_ms  # a larger batch always writes more tokens a second


@given(mix=mixes)
def test_a_plan_holds_together(mix: Mix) -> None:
    for found in splits(split(mix).shape, Hardware(4, 8, H200), mix):
        assert found.prefills + found.decodes == 4
        assert found.limit <= split(mix, found.prefills + 1, found.decodes + 1).limit
        if not found.holds:
            continue
        in_progress = mix.rate * mix.output_tokens * found.step.total_ms / 1000
        lone = found.batch <= 1 / 8  # then a step is that of one request
        assert lone or in_progress == pytest.approx(found.batch * 8 * found.decodes, rel=1e-6)
        assert found.batch <= found.shape.batch_limit(mix)
        assert found.prefill_time.total_ms < found.ttft_ms < float("inf")
        assert found.last_shipment_ms <= plan_times.ship_ms(found.shipped_bytes, 8)


@given(mix=mixes)
def test_the_workers_it_asks_for_would_do(mix: Mix) -> None:
    prefills, decodes = workers_needed(split(mix))
    assert split(mix, prefills, decodes).holds
    if prefills > 1:
        assert split(mix, prefills - 1, decodes).prefill_limit <= mix.rate
    if decodes > 1:
        assert split(mix, prefills, decodes - 1).decode_limit <= mix.rate


def test_the_best_split_comes_first() -> None:
    found = splits(split(Mix(32768, 256, 0.0, 1.0)).shape, Hardware(6, 8, H200), Mix(32768, 256, 0.0, 1.0))
    assert [s.limit for s in found] == sorted((s.limit for s in found), reverse=True)
    assert found[0].prefills > found[0].decodes  # long prompts, short answers


def _report(*arguments: str) -> str:
    return plan.plan(plan._parse(list(arguments)))


@pytest.mark.parametrize(
    "arguments",
    [("--nodes", "3"), ("--model", str(ROOT / "demo/checkpoint"), "--gpus", "1", "--input", "900")],
)
def test_the_config_that_is_printed_loads(arguments: tuple[str, ...], tmp_path: Path) -> None:
    report = _report(*arguments)
    (tmp_path / "cluster.yaml").write_text(report[report.index("# Paste") :])
    config = load(tmp_path / "cluster.yaml")
    assert config.prefill.workers + config.decode.workers == (3 if "3" in arguments else 2)
    for role in (config.prefill, config.decode):
        assert role.num_gpus == role.engine.ranks == (8 if "3" in arguments else 1)
        assert role.engine.cache_bytes is None


def test_the_report_names_extrapolations_and_what_was_measured() -> None:
    report = _report("--input", "32768", "--output", "1024", "--nodes", "4")
    assert "every time here is an EXTRAPOLATION" in report
    assert "131072: 2263, 38263" in report
    assert "TOO FEW" not in report
    assert "TOO FEW for 100 requests/s" in _report("--rate", "100")
    assert "no times" in _report("--model", str(ROOT / "demo/checkpoint"), "--gpus", "1")


def test_a_wrong_question_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--nodes", "1"]) == 1
    assert "twice as many" in capsys.readouterr().err
    assert plan.main(["--context", "200000"]) == 1
    assert "limit is 163840" in capsys.readouterr().err
    assert plan.main(["--context", "100"]) == 1
    assert "of this mix has 8704" in capsys.readouterr().err
    with pytest.raises(argparse.ArgumentTypeError, match="0 to 1"):
        plan._share("1.5")
