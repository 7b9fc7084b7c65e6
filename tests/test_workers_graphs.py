"""Who sits in which row of a decode graph. What a row reads is compared with what the request holds, step after step."""

import random

import numpy as np
import pytest

from workers.graphs import Seats, buckets
from workers.request import Request, SamplingParams
from workers.scheduler import Scheduled

WIDTH, SCRATCH = 6, 99


def request(number: int, length: int) -> Request:
    tokens = [random.randrange(1000) for _ in range(length)]
    made = Request(str(number), tokens, length, SamplingParams(max_tokens=9), b"")
    made.pages = random.sample(range(90), -(-length // 64))
    return made


def seats(max_rows: int) -> tuple[Seats, np.ndarray, np.ndarray]:
    inputs = np.zeros((4, max_rows), dtype=np.int64)
    table = np.full((max_rows, WIDTH), -1, dtype=np.int32)
    return Seats(inputs, table, scratch_page=SCRATCH), inputs, table


def check(inputs: np.ndarray, table: np.ndarray, bucket: int, batch: list[Scheduled]) -> None:
    rows = inputs[3, : len(batch)].tolist()
    assert len(set(rows)) == len(batch)
    assert max(rows) < bucket
    for row, item in zip(rows, batch, strict=True):
        position, pages = item.start, item.request.pages
        slot = pages[position // 64] * 64 + position % 64
        assert inputs[:3, row].tolist() == [item.request.tokens[position], position, slot]
        assert table[row, : len(pages)].tolist() == pages
    others = sorted(set(range(bucket)) - set(rows))
    assert (inputs[1, others] == -1).all()  # sees no token
    assert (inputs[2, others] // 64 == SCRATCH).all()


def test_buckets() -> None:
    assert buckets(1) == [1]
    assert buckets(10) == [1, 2, 4, 8, 10]
    assert buckets(64)[-2:] == [48, 64]


@pytest.mark.parametrize("max_rows", [1, 5, 33])
def test_a_long_life(max_rows: int) -> None:
    """Requests come, grow, end, and are preempted: then they come back with other pages and the same id."""
    table_of, inputs, table = seats(max_rows)
    running: list[Request] = []
    made = 0
    for _ in range(150):
        while running and random.random() < 0.3:
            running.pop(random.randrange(len(running)))
        while len(running) < max_rows and random.random() < 0.6:
            running.append(request(made, random.randrange(1, 64 * (WIDTH - 1))))
            made += 1
        for one in running:
            one.tokens.append(random.randrange(1000))
            if len(one.tokens) > 64 * WIDTH:
                one.tokens = one.tokens[:60]
                one.pages = [random.randrange(90)]
            elif len(one.tokens) > 64 * len(one.pages):
                one.pages += [random.randrange(90)]
            elif random.random() < 0.02:
                one.pages = random.sample(range(90), len(one.pages))
        if not running:
            continue
        random.shuffle(running)
        batch = [Scheduled(one, len(one.tokens) - 1, 1) for one in running]
        bucket, _ = table_of.fill(batch, len(batch))
        assert bucket == next(size for size in buckets(max_rows) if size >= len(batch))
        check(inputs, table, bucket, batch)


def test_only_new_pages_are_written() -> None:
    table_of, _, table = seats(4)
    one, two = request(1, 100), request(2, 64)
    batch = [Scheduled(one, 99, 1), Scheduled(two, 63, 1)]
    assert table_of.fill(batch, len(batch))[1]
    table[:] = -7
    assert not table_of.fill(batch, len(batch))[1]
    assert (table == -7).all()
    two.tokens.append(5)
    two.pages += [42]
    assert table_of.fill([Scheduled(two, 64, 1), Scheduled(one, 99, 1)], 2)[1]
    assert (table == 42).sum() == 1
    assert (table == -7).sum() == table.size - 1


def test_a_smaller_batch_moves_into_a_smaller_graph() -> None:
    table_of, inputs, table = seats(8)
    requests = [request(number, 70) for number in range(8)]
    table_of.fill([Scheduled(one, 69, 1) for one in requests], len(requests))
    last = [Scheduled(requests[7], 69, 1)]
    bucket, changed = table_of.fill(last, len(last))
    assert (bucket, changed) == (1, True)
    check(inputs, table, bucket, last)
