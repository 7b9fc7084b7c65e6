"""How pages are cut into parts, and what a link sends next."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.messages import Ticket
from workers.shipping.outbox import Outbox, Part, split
from workers.shipping.protocol import CORRUPT, STALE_GENERATION, Commit, Fingerprint

FINGERPRINT = Fingerprint(7, 656 * 64, 132 * 64, True)


def ticket(request_id: str, num_pages: int = 8) -> Ticket:
    pages = [100 + index for index in range(num_pages)]
    return Ticket("d", 3, request_id, pages, [page % 5 for page in pages], 0)


def parts(request_id: str, number: int) -> list[Part]:
    return [Part(ticket(request_id), "index", (layer, layer + 1), [0], [5]) for layer in range(number)]


def commit(request_id: str) -> Commit:
    return Commit(request_id, 3, 8, 1, None)


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 2**21))
def test_split_covers_every_page_of_every_layer_once(num_pages: int, first: int, max_bytes: int) -> None:
    indices = list(range(first, first + num_pages))
    ids = [7 * index % 101 for index in indices]
    made = list(split(ticket("r", 50), indices, ids, fingerprint=FINGERPRINT, max_bytes=max_bytes))
    covered: Counter[tuple[str, int, int]] = Counter()
    for part in made:
        num_layers = part.layers[1] - part.layers[0]
        nbytes = num_layers * len(part.page_ids) * FINGERPRINT.page_bytes(part.kind)
        assert nbytes <= max_bytes or (num_layers, len(part.page_ids)) == (1, 1)
        assert list(part.page_ids) == [7 * index % 101 for index in part.page_indices]
        for layer in range(*part.layers):
            covered.update((part.kind, layer, index) for index in part.page_indices)
    assert covered == {(k, la, i): 1 for k in ("index", "latent") for la in range(7) for i in indices}


def test_index_keys_of_a_group_of_layers_go_first() -> None:
    made = list(split(ticket("r"), [0, 1], [4, 5], fingerprint=FINGERPRINT, max_bytes=6 * 656 * 64))
    assert [(part.kind, part.layers) for part in made] == [
        ("index", (0, 7)),
        ("latent", (0, 2)),
        ("latent", (2, 4)),
        ("latent", (4, 7)),
    ]
    made = list(split(ticket("r"), [0, 1], [4, 5], fingerprint=FINGERPRINT, max_bytes=2 * 656 * 64))
    assert [(part.kind, part.layers) for part in made[:5]] == [
        ("index", (0, 3)),
        ("latent", (0, 1)),
        ("latent", (1, 2)),
        ("latent", (2, 3)),
        ("index", (3, 7)),
    ]


def test_parts_are_about_as_large() -> None:
    made = list(
        split(ticket("r", 11), range(11), range(11), fingerprint=FINGERPRINT, max_bytes=10 * 656 * 64)
    )
    assert {len(part.page_ids) for part in made if part.kind == "latent"} == {5, 6}
    assert {len(part.page_ids) for part in made if part.kind == "index"} == {11}


def test_header_names_the_pages_of_the_receiver() -> None:
    part = Part(ticket("r"), "latent", (2, 4), [3, 5], [17, 18])
    header = part.header(9, prefill_epoch=1, fingerprint=FINGERPRINT)
    assert (header.nbytes, header.payload_bytes) == (4 * 656 * 64, 4 * (656 * 64 + 8))
    assert (header.page_indices, header.page_ids, header.generations) == ([3, 5], [103, 105], [3, 0])
    assert (header.shipment_id, header.decode_epoch, header.layer_start, header.layer_stop) == (9, 3, 2, 4)


def test_commit_waits_for_every_answer_of_its_own_request() -> None:
    outbox = Outbox(4)
    outbox.add("a", parts("a", 2))
    outbox.add("b", parts("b", 1))
    outbox.commit(commit("a"))
    ids = [outbox.next_part()[0] for _ in range(3)]  # type: ignore[index]
    assert outbox.next_part() is None
    outbox.accepted(ids[0])
    assert outbox.next_commit() is None
    outbox.accepted(ids[1])
    assert outbox.next_commit() == commit("a")
    assert outbox.next_commit() is None
    assert outbox.drop("a")
    assert not outbox.drop("a")
    assert outbox.requests == ["b"]


def test_commit_of_a_request_without_parts_leaves_at_once() -> None:
    outbox = Outbox(1)
    outbox.commit(commit("resident"))
    assert outbox.next_commit() == commit("resident")


def test_corrupt_part_is_sent_once_more_and_first() -> None:
    outbox = Outbox(2)
    outbox.add("a", parts("a", 3))
    first = outbox.next_part()
    assert first is not None
    assert outbox.refused(first[0], CORRUPT) is None
    again = outbox.next_part()
    assert again is not None
    assert again[0] != first[0]
    assert (again[1].layers, again[1].resent) == (first[1].layers, True)
    assert outbox.refused(again[0], CORRUPT) == again[1]


def test_other_refusals_are_final() -> None:
    outbox = Outbox(2)
    outbox.add("a", parts("a", 1))
    sent = outbox.next_part()
    assert sent is not None
    assert outbox.refused(sent[0], STALE_GENERATION) == sent[1]


def test_answers_to_nothing_change_nothing() -> None:
    outbox = Outbox(2)
    assert outbox.accepted(1) is None
    assert outbox.refused(1, CORRUPT) is None


@pytest.mark.parametrize("max_in_flight", [1, 3])
@given(st.data())
def test_any_history(max_in_flight: int, data: st.DataObject) -> None:
    """Whatever is added, dropped, accepted or refused: never too many in flight, nothing of a dropped request, and a
    commit if and only if its parts were all accepted."""
    outbox = Outbox(max_in_flight)
    wanted: dict[str, int] = {}
    in_flight: dict[int, Part] = {}
    for number in range(data.draw(st.integers(0, 6))):
        name = f"r{number}"
        wanted[name] = data.draw(st.integers(0, 4))
        outbox.add(name, parts(name, wanted[name]))
        outbox.commit(commit(name))
    committed: set[str] = set()
    while True:
        while (sent := outbox.next_part()) is not None:
            assert sent[1].ticket.request_id in wanted
            in_flight[sent[0]] = sent[1]
        assert len(in_flight) <= max_in_flight
        while (ready := outbox.next_commit()) is not None:
            assert wanted.pop(ready.request_id) == 0
            committed.add(ready.request_id)
            outbox.drop(ready.request_id)
        if not in_flight:
            break
        shipment_id = data.draw(st.sampled_from(sorted(in_flight)))
        part = in_flight.pop(shipment_id)
        name = part.ticket.request_id
        what = data.draw(st.sampled_from(["accept", "corrupt", "drop"]))
        if what == "drop":
            wanted.pop(name, None)
            outbox.drop(name)
            outbox.accepted(shipment_id)
        elif what == "accept":
            outbox.accepted(shipment_id)
            wanted[name] = wanted.get(name, 0) - 1
            if wanted[name] < 0:
                del wanted[name]
        elif outbox.refused(shipment_id, CORRUPT) is not None:
            wanted.pop(name)
            outbox.drop(name)
    assert not wanted
    assert outbox.requests == []
