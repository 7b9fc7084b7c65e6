"""Shipping between GPUs over NCCL, and within one over Gloo. Where there is one GPU, NCCL joins two processes that share it as
it joins two hosts: over the network."""

import os
from collections.abc import Callable, Iterator

import pytest
import shipping_scenes as scenes
import torch
from shipping_sides import Sides, assert_landed, make_ticket, wait_until

from workers.shipping.pair import backend_for, gpu_of
from workers.shipping.sender import CORRUPT_VARIABLE

os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="there is no CUDA device"),
]
OURS = "cuda:0"
NEXT = f"cuda:{max(NUM_GPUS - 1, 0)}"
to_devices = pytest.mark.parametrize(
    ("sides", "to_device"),
    [pytest.param("", OURS, id="gloo"), pytest.param("other", NEXT, id="nccl")],
    indirect=["sides"],
)
SCENES = [
    scenes.two_prefill_workers_to_one_decode_worker,
    scenes.one_prefill_worker_to_two_decode_workers,
    scenes.prefill_worker_killed_in_mid_shipment,
]


@pytest.fixture
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    with Sides(child_host=getattr(request, "param", "")) as sides:
        yield sides


@to_devices
def test_round_trip_with_a_corrupt_page(
    sides: Sides, to_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CORRUPT_VARIABLE, "latent:2")
    child, prefill = sides.decode_process(device=to_device), sides.prefill(device=OURS)
    prefill.pair(child)
    ticket, sources = make_ticket(num_pages=30), [7 * index % 40 for index in range(30)]
    prefill.send(ticket, sources)
    assert prefill.end() == ("r", None)
    assert_landed(child, prefill.cache, ticket, sources)
    assert prefill.shipper.counters()["resent_shipments"] == child.call("counters")["refused_shipments"] == 1


@to_devices
def test_pages_leave_only_once_they_are_written(sides: Sides, to_device: str) -> None:
    """`ship` is called while the GPU is still at work on the pages."""
    child, prefill = sides.decode_process(device=to_device), sides.prefill(device=OURS)
    prefill.pair(child)
    ticket, sources = make_ticket(), list(range(12))
    torch.cuda._sleep(500_000_000)  # clock cycles
    for pages in (prefill.cache.latent, prefill.cache.index):
        pages.bitwise_not_()
    prefill.send(ticket, sources)
    prefill.shipper.ship(make_ticket("given up"), [0], [1])
    prefill.shipper.abandon(make_ticket("given up"))
    assert prefill.end()[0] == "given up", "it does not wait for the GPU"
    assert prefill.end() == ("r", None)
    assert_landed(child, prefill.cache, ticket, sources)


def test_a_gpu_is_paired_by_nccl_with_another_or_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gpu_of(torch.device(OURS))
    assert backend_for(ours, ours) == "gloo"
    assert backend_for(ours, None) == "gloo"
    assert backend_for(ours, gpu_of(torch.device(NEXT))) == ("nccl" if NUM_GPUS > 1 else "gloo")
    monkeypatch.setenv("NCCL_HOSTID", "other")
    assert backend_for(ours, gpu_of(torch.device(OURS))) == "nccl"


@to_devices
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_scene(sides: Sides, scene: Callable[[Sides, str, str], None], to_device: str) -> None:
    scene(sides, OURS, to_device)


@to_devices
def test_decode_worker_killed_in_mid_shipment(sides: Sides, to_device: str) -> None:
    child, prefill = sides.decode_process(device=to_device), sides.prefill(device=OURS)
    prefill.pair(child)
    child.call("set", "behaviour", "die")
    prefill.send(make_ticket(num_pages=40), list(range(40)))
    request_id, reason = prefill.end()
    assert (request_id, "lost" in (reason or "")) == ("r", True), reason
    assert float(torch.ones(8, device=OURS).sum()) == 8
    successor = sides.decode_process(epoch=2, device=to_device)
    prefill.shipper.set_peers({"d": successor.where})
    wait_until(lambda: prefill.shipper.peers() == [("d", 2)])
    ticket = make_ticket("next", epoch=2)
    prefill.send(ticket, list(range(12)))
    assert prefill.end() == ("next", None)
    assert_landed(successor, prefill.cache, ticket, list(range(12)))
