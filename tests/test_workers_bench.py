"""The benchmark on the tiny model: every part runs and adds up, and what it compares DSA with is dense attention."""

import json
from pathlib import Path

import pytest
import torch

from kernels.rows import Rows
from workers import bench, bench_parts
from workers.bench_bed import Bed, Split, chunk_rows, decode_rows, forward, make_bed
from workers.bench_dense import attend_per_head


@pytest.fixture(scope="module")
def bed() -> Bed:
    return make_bed(layers=2, small=True, device="cpu", tokens=1024, max_rows=2, batched_tokens=128)


def logits(bed: Bed, kind: str, rows: Rows) -> torch.Tensor:
    return forward(bed, bed.models[kind], rows)()


def test_dense_is_what_sparse_is_where_everything_is_selected(bed: Bed) -> None:
    topk = bed.config.index_topk
    rows = chunk_rows(bed, 0, topk)
    torch.testing.assert_close(logits(bed, "dense", rows), logits(bed, "sparse", rows), atol=2e-3, rtol=0)
    rows = chunk_rows(bed, 2 * topk, topk)
    assert (logits(bed, "dense", rows) - logits(bed, "sparse", rows)).abs().max() > 0.1


def test_one_row_and_many_rows_attend_alike(bed: Bed) -> None:
    """Per head, with keys expanded, and over latents."""
    rows = chunk_rows(bed, 192, 64)
    chunk = logits(bed, "dense", rows)  # writes the caches of the 64 tokens
    tokens = torch.randint(512, (64,), generator=torch.Generator().manual_seed(0))
    last = Rows.of((0, 1), rows.positions[-1:], rows.page_table)
    slots = rows.page_table[0, 3:4].long() * 64 + 63
    model = bed.models["dense"]
    one = model.forward(tokens[-1:], last, slots, bed.cache, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(one, chunk, atol=2e-3, rtol=0)


@pytest.mark.parametrize("before", [0, 70])
def test_attention_per_head(before: int) -> None:
    query, keys = torch.randn(1, 3, 50, 24), torch.randn(1, 3, before + 50, 24)
    values = torch.randn(1, 3, before + 50, 16)
    scores = query @ keys.transpose(2, 3) * 0.3
    hidden = torch.arange(before + 50) > torch.arange(50).unsqueeze(1) + before
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(attend_per_head(query, keys, values, 0.3), expected, atol=1e-5, rtol=1e-5)


def test_pages_of_different_requests_differ(bed: Bed) -> None:
    table = decode_rows(bed, 2, 512).page_table
    assert table.shape == (2, 8)
    assert table.unique().numel() == 16
    assert bed.cache.latent[0, table.long()].view(torch.uint8).float().std() > 0


def test_extrapolation_and_sums(bed: Bed) -> None:
    split = Split(dense_layers=2.0, moe_layers=5.0, rest=1.0)  # one layer of each kind
    assert bench_parts.whole(bed, split) == 1.0 + 3 * 2.0 + 58 * 5.0
    times = [Split(1.0, 10.0, 0.0), Split(3.0, 30.0, 0.0)]
    total = bench_parts._sum(times, [0, 2], 3)
    assert (total.dense_layers, total.moe_layers) == (1 + 2 + 3, 10 + 20 + 30)
    assert bench_parts._sum(times, [0, 2], 1).total == 11


def test_room(bed: Bed) -> None:
    room = bench_parts.room(bed, [1024], device_bytes=2**34, weight_bytes=2**30)
    assert room["bytes_per_cached_token"] == 788 * 2
    fits = room["requests_that_fit"]["1024"]
    free = 2**34 - 2**30 - room["workspace_bytes"]
    assert 0 < fits * 1024 * 788 * 2 < free


def test_every_part_runs_and_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--layers 2 --lengths 64 128 --chunk 64 --measured 2 --contexts 128 --batches 2 --prompt 100"
    parts = "--part ship ranks prefill decode room host fidelity"
    monkeypatch.setattr("sys.argv", ["bench", "--small", *parts.split(), *sizes.split()])
    bench.main()
    printed = capsys.readouterr().out.splitlines()
    results = json.loads(printed[-1])
    assert [(row["bytes_per_token"], row["equal"]) for row in results["ship"]] == [(788 * 2, True)] * 2
    assert [(row["step"], row["equal"]) for row in results["ranks"]] == [("prefill", True), ("decode", None)]
    assert [row["tokens"] for row in results["prefill"]] == [64, 128]
    assert all(row["sparse_ms"] > 0 for row in results["prefill"])
    assert {"dense_ms", "sparse_61_layers_ms", "ratio"} <= results["decode"][0].keys()
    assert results["host"][0]["step_ms"] > 0
    assert [row["layer"] for row in results["fidelity"]] == [0, 1]
    assert all(0 < row["own"] < 0.4 and row["overlap"] > 0.9 for row in results["fidelity"])
    assert any("T(61) = rest + 3 x dense layer + 58 x MoE layer" in line for line in printed)

    (tmp_path / "log").write_text("\n".join(printed))
    monkeypatch.setattr("sys.argv", ["bench", "--read", str(tmp_path / "log"), "--plot", str(tmp_path)])
    bench.main()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {f"bench-{part}.png" for part in ("ship", "ranks", "prefill", "decode", "room", "host")}


def test_lengths_are_whole_chunks(bed: Bed) -> None:
    with pytest.raises(ValueError, match=r"lengths \[200\] are not multiples of the chunk, 128 tokens"):
        bench_parts.prefill(bed, [64, 200], 128, 2)
