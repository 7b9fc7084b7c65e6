"""Shared by all tests: a derandomised hypothesis profile and a seed for each test taken from its name."""

import random
import zlib

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "lightship", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("lightship")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)
