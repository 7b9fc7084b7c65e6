"""Shipping between processes that live: round trips, refusals, and when a request is over."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import shipping_scenes as scenes
import torch
from shipping_sides import (
    CONFIG,
    HANG,
    LAYOUT,
    NUM_LAYERS,
    NUM_PAGES,
    Prefill,
    Sides,
    assert_landed,
    make_ticket,
    wait_until,
)

from kernels.dispatch import select
from kernels.layout import PAGE_SIZE
from workers.shipping.protocol import (
    CORRUPT,
    STALE_GENERATION,
    Commit,
    Header,
    LinkConfig,
    encode,
)
from workers.shipping.sender import CORRUPT_VARIABLE


@pytest.fixture
def sides() -> Iterator[Sides]:
    with Sides() as sides:
        yield sides


def test_round_trip(sides: Sides) -> None:
    child, prefill = sides.decode_process(), sides.prefill()
    prefill.pair(child)
    ticket = make_ticket(num_pages=30, resident=3)
    sources = [7 * index % NUM_PAGES for index in range(27)]
    prefill.shipper.ship(ticket, range(3, 20), sources[:17])
    prefill.shipper.ship(ticket, range(20, 30), sources[17:])
    prefill.shipper.commit(ticket, 99, "stop")
    assert prefill.end() == ("r", None)
    assert_landed(child, prefill.cache, ticket, sources, first=3)
    commit = Commit("r", 1, 30, 99, "stop")
    assert child.call("get", "events") == [commit]

    sent, landed = prefill.shipper.counters(), child.call("counters")
    headers: list[Header] = child.call("get", "headers")
    assert sent["shipped_bytes"] == landed["landed_bytes"] == 27 * NUM_LAYERS * LAYOUT.token_bytes * PAGE_SIZE
    assert sent["shipped_header_bytes"] == (
        sum(len(encode(message)) for message in [*headers, commit])
        + 2 * 8 * 27 * NUM_LAYERS  # a checksum for each page, layer and kind
    )
    assert sent["shipments"] == len(headers) > 10
    assert sent["shipped_pages"] == 27
    assert sent["ship_seconds"] > 0
    assert sent["resent_shipments"] == landed["refused_pages"] == 0
    assert prefill.ends.empty()

    prefill.shipper.commit(make_ticket("resident"), 5, None)
    assert prefill.end() == ("resident", None)
    prefill.shipper.abandon(ticket)
    prefill.shipper.ship(ticket, [3], [0])
    prefill.send(make_ticket("next"), [0])
    assert prefill.end() == ("next", None), "what is said of an ended request is not heard"
    assert not prefill.shipper._lane_of


@pytest.mark.parametrize(
    "scene",
    [scenes.two_prefill_workers_to_one_decode_worker, scenes.one_prefill_worker_to_two_decode_workers],
    ids=lambda scene: scene.__name__,
)
def test_several_pairs(sides: Sides, scene: Callable[[Sides, str, str], None]) -> None:
    scene(sides, "cpu", "cpu")


def test_stale_generation_is_refused(sides: Sides) -> None:
    child, prefill = sides.decode_process(), sides.prefill()
    prefill.pair(child)
    child.call("set", "generation", 1)
    ticket = make_ticket()
    prefill.send(ticket, list(range(12)))
    request_id, reason = prefill.end()
    assert request_id == "r"
    assert STALE_GENERATION in (reason or "")
    assert_landed(child, prefill.cache, make_ticket(num_pages=0), [])
    wait_until(lambda: child.call("get", "events") == [("abandon", "r")])
    assert prefill.shipper.counters()["resent_shipments"] == 0
    prefill.send(make_ticket("next", generation=1), list(range(12)))
    assert prefill.end() == ("next", None)
    assert child.call("get", "events")[-1] == Commit("next", 1, 12, 7, None)


def test_one_flipped_byte_is_noticed_and_repaired(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORRUPT_VARIABLE, "index:2")
    child, prefill = sides.decode_process(), sides.prefill()
    prefill.pair(child)
    ticket, sources = make_ticket(), list(range(12))
    prefill.send(ticket, sources)
    assert prefill.end() == ("r", None)
    assert_landed(child, prefill.cache, ticket, sources)
    landed, sent = child.call("counters"), prefill.shipper.counters()
    assert landed["refused_shipments"] == sent["resent_shipments"] == 1
    headers = child.call("get", "headers")
    assert landed["refused_pages"] == len([h for h in headers if h.kind == "index"][1].page_ids)
    assert sent["shipped_bytes"] == sum(header.nbytes for header in headers)
    assert landed["landed_bytes"] == 12 * NUM_LAYERS * LAYOUT.page_bytes


def test_corrupt_twice_fails(sides: Sides) -> None:
    def flip(header: Header, payload: torch.Tensor) -> None:
        if header.kind == "latent" and header.layer_start == 1 and header.request_id == "r":
            payload[3] ^= 128

    child, prefill = sides.decode_process(), sides.prefill(corrupt=flip)
    prefill.pair(child)
    ticket = make_ticket(num_pages=4)
    prefill.send(ticket, [0, 1, 2, 3])
    assert prefill.end() == ("r", f"decode worker d: {CORRUPT}")
    latent = torch.frombuffer(bytearray(child.call("pages")[0]), dtype=torch.uint8).view(
        prefill.cache.latent.shape
    )
    assert not latent[1, ticket.pages[0]].any()
    assert child.call("counters")["refused_shipments"] == 2
    prefill.send(make_ticket("next"), list(range(12)))
    assert prefill.end() == ("next", None)


def test_setting_for_corruption_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORRUPT_VARIABLE, "keys:1")
    with pytest.raises(ValueError, match=CORRUPT_VARIABLE):
        Prefill()


def test_abandoned_request_leaves_the_others_alone(sides: Sides) -> None:
    child, prefill = sides.decode_process(), sides.prefill()
    prefill.pair(child)
    child.call("set", "behaviour", "hold")
    prefill.send(make_ticket("given up"), list(range(12)))
    wait_until(lambda: len(child.call("get", "headers")) == CONFIG.max_in_flight)
    prefill.shipper.abandon(make_ticket("given up"))
    assert prefill.end() == ("given up", "decode worker d: abandoned")
    wait_until(lambda: child.call("get", "events") == [("abandon", "given up")])
    prefill.shipper.abandon(make_ticket("never shipped"))
    assert prefill.end() == ("never shipped", "decode worker d: abandoned")
    child.call("release")
    ticket = make_ticket("next")
    prefill.send(ticket, list(range(12)))
    assert prefill.end() == ("next", None)
    assert_landed(child, prefill.cache, ticket, list(range(12)))


def test_no_page_is_read_after_the_end(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests end in every way, some while one of their pages is being packed; each has pages of its own."""
    packing: list[int] = []
    over: set[int] = set()
    too_late: list[int] = []
    begun = threading.Event()
    reference = select()

    class Slow:
        @staticmethod
        def pack_pages(pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]) -> Any:
            too_late.extend(over.intersection(page_ids))
            packing[:] = page_ids
            begun.set()
            time.sleep(0.02)
            packing.clear()
            return reference.pack_pages(pages, layers, page_ids)

    def ended(request_id: str, reason: str | None = None) -> None:
        page = int(request_id)
        too_late.extend({page}.intersection(packing))
        over.add(page)
        ends.put((request_id, reason))

    ends: queue.Queue[tuple[str, str | None]] = queue.Queue()
    child, prefill = sides.decode_process(), sides.prefill(on_done=ended, on_failed=ended)
    monkeypatch.setattr(prefill.cache, "ops", Slow)
    prefill.pair(child)
    for page in range(4):
        prefill.send(make_ticket(str(page), 1, generation=page // 3), [page])  # the last one is stale
    assert begun.wait(HANG)
    prefill.shipper.abandon(make_ticket("0", 1))
    prefill.shipper.abandon(make_ticket("2", 1))
    outcomes = dict(ends.get(timeout=HANG) for _ in range(4))
    assert outcomes["1"] is None
    assert all(outcomes[name] for name in ("0", "2", "3"))
    begun.clear()
    prefill.send(make_ticket("4", 1), [4])
    assert begun.wait(HANG)
    prefill.shipper.set_peers({})
    assert "let it go" in (ends.get(timeout=HANG)[1] or "")
    prefill.shipper.close()
    assert ends.empty()
    assert not too_late


def test_request_that_cannot_be_packed_fails_alone(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        @staticmethod
        def pack_pages(pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]) -> Any:
            if 13 in page_ids:
                raise RuntimeError("out of memory")
            return operators.pack_pages(pages, layers, page_ids)

    operators = select()
    config = LinkConfig(max_in_flight=1)
    child, prefill = sides.decode_process(config=config), sides.prefill(config=config)
    monkeypatch.setattr(prefill.cache, "ops", Exhausted)
    prefill.pair(child)
    prefill.send(make_ticket("large"), list(range(8, 20)))
    assert prefill.end() == ("large", "decode worker d: cannot pack pages: out of memory")
    prefill.send(make_ticket("next"), list(range(12)))
    assert prefill.end() == ("next", None)
    assert prefill.shipper.counters()["pairs_lost"] == 0
