"""Shipping when a peer dies, freezes or is not what it should be."""

import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import shipping_scenes as scenes
from shipping_sides import (
    HANG,
    LAYOUT,
    NUM_PAGES,
    QUICK,
    Sides,
    assert_landed,
    make_ticket,
    wait_until,
)

from workers.paged_cache import PagedCache
from workers.shipping.protocol import LinkConfig


@pytest.fixture
def sides() -> Iterator[Sides]:
    with Sides() as sides:
        yield sides


def test_receiver_killed_in_mid_shipment(sides: Sides) -> None:
    """The payloads are large enough for some to be in the middle of their way."""
    config = LinkConfig(max_shipment_bytes=2**20)
    child, prefill = sides.decode_process(config=config), sides.prefill(config=config)
    prefill.pair(child)
    child.call("set", "behaviour", "die")
    tickets = [make_ticket(f"r{number}", NUM_PAGES) for number in range(3)]
    for ticket in tickets:
        prefill.send(ticket, list(range(NUM_PAGES)))
    ends = dict(prefill.end() for _ in tickets)
    assert set(ends) == {"r0", "r1", "r2"}
    assert all("lost" in (reason or "") for reason in ends.values())
    assert prefill.shipper.peers() == []
    prefill.send(make_ticket("late"), [0])
    assert prefill.end() == ("late", "decode worker d: not paired")

    successor = sides.decode_process(epoch=2)
    prefill.pair(successor)
    prefill.send(make_ticket("stale", epoch=1), [0])
    assert prefill.end() == ("stale", "decode worker d of epoch 1: not a peer")
    ticket = make_ticket("next", epoch=2)
    prefill.send(ticket, list(range(12)))
    assert prefill.end() == ("next", None)
    assert_landed(successor, prefill.cache, ticket, list(range(12)))
    assert prefill.shipper.counters()["pairs_lost"] == 1


def test_sender_killed_in_mid_shipment(sides: Sides) -> None:
    scenes.prefill_worker_killed_in_mid_shipment(sides, "cpu", "cpu")


def test_frozen_peer_is_noticed_and_welcome_again(sides: Sides) -> None:
    child, prefill = sides.decode_process(config=QUICK), sides.prefill(config=QUICK)
    prefill.pair(child)
    child.kill(signal.SIGSTOP)
    prefill.send(make_ticket(), list(range(12)))
    request_id, reason = prefill.end()
    assert (request_id, "silent" in (reason or "")) == ("r", True), reason
    child.kill(signal.SIGCONT)
    wait_until(lambda: prefill.shipper.peers() == [("d", 1)])
    ticket = make_ticket("next")
    prefill.send(ticket, list(range(12)))
    assert prefill.end() == ("next", None)
    assert_landed(child, prefill.cache, ticket, list(range(12)))


@pytest.mark.parametrize(
    ("options", "epoch", "reason"),
    [
        ({"secret": "a guess"}, 1, "wrong secret"),
        (
            {"cache": PagedCache(LAYOUT, num_layers=2, num_pages=1, device="cpu")},
            1,
            "the caches differ: num_layers is 3 here and 2 there",
        ),
        ({}, 4, "this is d of epoch 1, not d of epoch 4"),
    ],
)
def test_rejected(
    options: dict[str, Any],
    epoch: int,
    reason: str,
    sides: Sides,
    caplog: pytest.LogCaptureFixture,
) -> None:
    side, prefill = sides.decode(), sides.prefill(**options)
    with caplog.at_level(logging.WARNING):
        prefill.shipper.set_peers({"d": ("127.0.0.1", side.port(), epoch)})
        wait_until(lambda: any(f"cannot pair with d: {reason}" in m for m in caplog.messages))
    assert prefill.shipper.peers() == side.landing.peers() == []
    prefill.send(make_ticket(epoch=epoch), [0])
    assert prefill.end() == ("r", "decode worker d: not paired")


def test_older_life_of_a_prefill_worker_is_rejected_and_a_newer_one_takes_over(
    sides: Sides,
) -> None:
    side = sides.decode()
    where = {"d": ("127.0.0.1", side.port(), 1)}
    old, new = sides.prefill(epoch=1), sides.prefill(epoch=2)
    old.shipper.set_peers(where)
    wait_until(lambda: side.landing.peers() == [("p", 1)])
    new.shipper.set_peers(where)
    wait_until(lambda: side.landing.peers() == [("p", 2)] and old.shipper.peers() == [])
    old.shipper.close()
    new.send(make_ticket(), [0, 1])
    assert new.end() == ("r", None)
    assert side.events[0] == ("lost", "p", 1)


def test_strangers_do_no_harm(sides: Sides) -> None:
    side, prefill = sides.decode(QUICK), sides.prefill(config=QUICK)
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\1\xc1", b"", b"\0\0"):
        with socket.create_connection(("127.0.0.1", side.port())) as stranger:
            stranger.sendall(data)
            stranger.settimeout(HANG)
            if data:
                assert stranger.recv(1) in (b"", b"\0"), "closed, or a heartbeat"
    prefill.shipper.set_peers({"d": ("127.0.0.1", side.port(), 1)})
    wait_until(lambda: bool(prefill.shipper.peers()))
