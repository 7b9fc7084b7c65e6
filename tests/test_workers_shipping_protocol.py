"""Framing, and what makes a hello or a header unacceptable."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.layout import PAGE_SIZE, CacheLayout
from workers.shipping.protocol import (
    MAX_MESSAGE_BYTES,
    MAX_SHIPMENT_BYTES,
    Abandon,
    Accepted,
    Commit,
    Fingerprint,
    Framer,
    Header,
    Heartbeat,
    Hello,
    Identity,
    LinkConfig,
    Message,
    Refused,
    encode,
    header_error,
    hello_error,
)

FINGERPRINT = Fingerprint.of(CacheLayout(512, 64, 128), num_layers=61)
HELLO = Hello(
    prefill_worker="p",
    prefill_epoch=1,
    decode_worker="d",
    decode_epoch=2,
    secret="só",
    fingerprint=FINGERPRINT,
    gpu=None,
)
HEADER = Header(
    shipment_id=1,
    request_id="r",
    prefill_epoch=1,
    decode_epoch=2,
    kind="index",
    layer_start=59,
    layer_stop=61,
    page_indices=[4, 5, 6],
    page_ids=[9, 8, 7],
    generations=[0, 1, 0],
    nbytes=6 * FINGERPRINT.index_page_bytes,
)
MESSAGES: list[Message] = [
    HELLO,
    HEADER,
    Heartbeat(),
    Accepted(1),
    Refused(2, "stale"),
    Commit("r", 2, 7, 11, None),
    Abandon("r"),
]


def test_fingerprint_holds_the_bytes_of_a_page() -> None:
    layout = CacheLayout(512, 64, 128)
    assert FINGERPRINT.page_bytes("latent") == 656 * PAGE_SIZE
    assert (
        FINGERPRINT.page_bytes("latent") + FINGERPRINT.page_bytes("index") == layout.token_bytes * PAGE_SIZE
    )


@given(st.lists(st.sampled_from(MESSAGES)), st.lists(st.integers(1, 40), min_size=1))
def test_messages_survive_any_cut_of_the_stream(messages: list[Message], cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in messages)
    framer, received, at = Framer(), [], 0
    while at < len(stream):
        size = cuts[len(received) % len(cuts)]
        received += framer.feed(stream[at : at + size])
        at += size
    assert received == messages


def test_a_stranger_cannot_make_us_take_memory() -> None:
    with pytest.raises(ValueError, match="limit"):
        list(Framer().feed((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big")))
    with pytest.raises(ValueError, match="malformed|expected|invalid|Invalid|truncated"):
        list(Framer().feed(b"\0\0\0\1\xc1"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"secret": "so"}, "wrong secret"),
        ({"version": 0}, "version"),
        ({"decode_epoch": 1}, "epoch 2, not d of epoch 1"),
        ({"decode_worker": "e"}, "not e"),
        (
            {"fingerprint": Fingerprint.of(CacheLayout(512, 64, 128), 60)},
            "num_layers is 61 here and 60 there",
        ),
        ({"fingerprint": Fingerprint.of(CacheLayout(512, 64, 128, False), 61)}, "latent_page_bytes"),
    ],
)
def test_hello(change: dict[str, object], reason: str | None) -> None:
    identity = Identity(worker_id="d", epoch=2, secret="só", fingerprint=FINGERPRINT)
    said = hello_error(msgspec.structs.replace(HELLO, **change), identity)
    assert said == reason if reason is None else reason in (said or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"layer_stop": 62}, "layers"),
        ({"layer_start": 61}, "layers"),
        ({"layer_start": -1}, "layers"),
        ({"page_ids": [9]}, "indices"),
        ({"generations": []}, "generations"),
        ({"page_ids": [], "page_indices": [], "generations": []}, "page ids"),
        ({"kind": "latent"}, "nbytes"),
        ({"nbytes": 1}, "nbytes"),
    ],
)
def test_header(change: dict[str, object], reason: str | None) -> None:
    said = header_error(msgspec.structs.replace(HEADER, **change), FINGERPRINT)
    assert said == reason if reason is None else reason in (said or "")


def test_no_one_ships_more_at_once_than_all_accept() -> None:
    pages = list(range(2 * MAX_SHIPMENT_BYTES // FINGERPRINT.index_page_bytes))
    too_much = msgspec.structs.replace(
        HEADER,
        page_indices=pages,
        page_ids=pages,
        generations=pages,
        nbytes=2 * len(pages) * FINGERPRINT.index_page_bytes,
    )
    assert "limit" in (header_error(too_much, FINGERPRINT) or "")
    with pytest.raises(ValueError, match="max_shipment_bytes"):
        LinkConfig(max_shipment_bytes=MAX_SHIPMENT_BYTES + 1)
