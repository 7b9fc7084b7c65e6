"""Shared by all tests: a derandomised hypothesis profile, a seed for each test taken from its name, and Triton's
interpreter."""

import os
import random
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: it looks when a kernel is defined

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process for each core: more threads than cores take turns, and wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "lightship", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("lightship")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Who asks for the tests of one marker only need not wait until all others have been imported."""
    asked = config.option.markexpr
    marker = asked.partition(" and ")[0]
    if marker not in ("ray", "slow", "gpu") or " or " in asked or collection_path.suffix != ".py":
        return None
    return f"mark.{marker}" not in collection_path.read_text() or None


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)
