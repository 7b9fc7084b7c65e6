"""Shared by all tests: a derandomised hypothesis profile, a seed for each test taken from its name, Triton's interpreter, and how
tests are shared out among processes."""

import os
import random
import zlib

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: it looks when a kernel is defined

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # a process for each core: more threads than cores take turns, and wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "lightship", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("lightship")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process, because they share what it has set up. Those that start Ray come first, all in the same
    process: one service at a time, beside everything else."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
