"""What was read: counts of selected tokens by page, against loops over the same selections."""

from collections.abc import Callable
from typing import Any

import torch

from kernels.rows import Rows
from workers.config import EngineConfig
from workers.engine import Engine
from workers.page_counts import PageCounts
from workers.request import Request, SamplingParams
from workers.runner import Runner

LAYERS, TOPK = 2, 5


def _selected_positions(layer: int, position: int) -> list[int]:
    """What the stand-in for a model selects: two or three tokens of those that the row sees."""
    return sorted({0, position // (layer + 2), position})


class SelectingModel:
    """Always says token 7. Its caches are nothing; it selects by `_selected_positions`."""

    device = "cpu"

    def __init__(self) -> None:
        self.watched = 0

    def forward(
        self,
        token_ids: torch.Tensor,
        rows: Rows,
        slots: torch.Tensor,
        cache: Any,
        logits_rows: torch.Tensor,
        on_selected: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        self.watched += on_selected is not None
        owner = [r for r, end in enumerate(rows.query_starts[1:]) for _ in range(rows.query_starts[r], end)]
        for layer in range(LAYERS if on_selected else 0):
            selected = torch.full((len(token_ids), TOPK), -1, dtype=torch.int32)
            for row, (request, position) in enumerate(zip(owner, rows.positions.tolist(), strict=True)):
                for column, chosen in enumerate(_selected_positions(layer, position)):
                    selected[row, column] = rows.page_table[request, chosen // 64] * 64 + chosen % 64
            assert on_selected is not None
            on_selected(selected)
        logits = torch.zeros(len(logits_rows), 10)
        logits[:, 7] = 1.0
        return logits


def _expected(first: int, end: int) -> list[list[int]]:
    counts = [[0] * -(-end // 64) for _ in range(LAYERS)]
    for position in range(first, end):
        for layer in range(LAYERS):
            for chosen in _selected_positions(layer, position):
                counts[layer][chosen // 64] += 1
    return counts


def _request(name: str, num_tokens: int, num_answer: int, *, counted: bool = True) -> Request:
    prompt = [ord(name)] * num_tokens
    sampling = SamplingParams(max_tokens=num_answer, temperature=0.0, ignore_eos=True)
    counts = PageCounts(num_tokens) if counted else None
    return Request(name, prompt, num_tokens, sampling, b"tenant", page_counts=counts)


def _run(num_pages: int, *requests: Request) -> tuple[SelectingModel, int]:
    """The model, and how often a request was preempted."""
    model = SelectingModel()
    engine = Engine(
        Runner(model, None),
        num_pages=num_pages,
        config=EngineConfig(max_batched_tokens=50),
        eos_token_ids=[1],
        max_context=600,
    )
    for request in requests:
        engine.add(request)
    preempted = 0
    while engine.has_work():
        preempted += len(engine.step().preempted)
    return model, preempted


def test_counts_by_page_of_the_request_s_own_sequence() -> None:
    counts = PageCounts(100)
    selected = torch.tensor(
        [[[64 * 9, 64 * 9 + 63, 64 * 2, -1], [64 * 2 + 5, -1, -1, -1]]], dtype=torch.int32
    )
    counts.add(selected, [9, 2])
    assert counts.tolist() == [[2, 2]]
    counts.add(torch.tensor([[[64 * 5 + 1, 64 * 9, -1, -1]]], dtype=torch.int32), [9, 2, 5])  # it has grown
    assert counts.tolist() == [[3, 2, 1]]
    assert counts.next_row == 103
    assert PageCounts(3).tolist() == []


def test_only_the_rows_of_the_answer_count_and_only_where_asked_for() -> None:
    asking, other = _request("a", 130, 80), _request("b", 70, 60, counted=False)
    model, _ = _run(20, other, asking)
    assert asking.page_counts.tolist() == _expected(130, 209)  # the last token is never computed
    assert other.page_counts is None
    assert model.watched == 79
    assert _run(20, _request("b", 70, 60, counted=False))[0].watched == 0


def test_a_row_that_is_computed_again_counts_once() -> None:
    requests = [_request(name, 60, 140) for name in "abc"]
    _, preempted = _run(5, *requests)
    assert preempted >= 2
    for request in requests:
        assert request.page_counts.tolist() == _expected(60, 199)
