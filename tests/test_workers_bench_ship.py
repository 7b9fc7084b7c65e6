"""The benchmark of shipping runs anywhere, small, and says what it measured."""

import json
import subprocess
import sys

import torch

from workers.bench_ship import title


def test_small_run() -> None:
    command = "-m workers.bench_ship --tokens 256 1024 --layers 2 --buffers 0.25 1 --repeats 1"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, check=True)
    first, header, *lines, last = done.stdout.splitlines()
    found = json.loads(last)
    assert "2 layers" in first
    assert header.split()[0] == "tokens"
    assert len(lines) == len(found["results"]) == 4
    assert [(row["tokens"], row["buffer_mib"]) for row in found["results"]] == [
        (256, 0.25),
        (256, 1.0),
        (1024, 0.25),
        (1024, 1.0),
    ]
    assert found["results"][2]["shipments"] > found["results"][3]["shipments"] >= 2
    for row in found["results"]:
        assert row["mb"] == row["tokens"] * 2 * 788 / 1e6
        assert all(row[name] > 0 for name in ("gb_per_s", "pack_ms", "send_ms", "unpack_ms", "engine_us"))
    assert torch.cuda.is_available() or (found["devices"], found["backend"]) == (["cpu", "cpu"], "gloo")


def test_one_gpu_is_said_to_be_too_few_for_nccl() -> None:
    assert "over NCCL;" in title(["cuda:0", "cuda:1"], "nccl", 4, 8)
    assert "NCCL cannot join a GPU with itself" in title(["cuda:0", "cuda:0"], "gloo", 4, 8)
    assert "over Gloo;" in title(["cpu", "cpu"], "gloo", 4, 8)
