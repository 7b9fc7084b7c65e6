"""Other selections than the indexer's against their definitions, and how answers are counted."""

import pytest
import torch

from demo import selections
from demo.evaluate import Score, interval, score, total
from demo.quiz import CHECKPOINT, MAX_ANSWER_TOKENS, Question, Quiz, ask, load_tokenizer, make_quiz
from demo.selections import Recorder
from kernels import reference
from kernels.dispatch import Ops
from kernels.layout import CacheLayout
from kernels.rows import Rows
from kernels.testing import SOFTMAX_SCALE, make_case
from workers.config import EngineConfig
from workers.engine import Engine
from workers.start import make_engine

LAYOUT = CacheLayout(512, 64, 128)
TOPK = 64


@pytest.fixture
def rows() -> Rows:
    """Two requests, the last tokens of 300 and of 40, their pages scattered."""
    table = torch.tensor([[7, 2, 9, 4, 0], [5, -1, -1, -1, -1]], dtype=torch.int32)
    return Rows.of((0, 3, 5), torch.tensor([297, 298, 299, 38, 39]), table)


def positions(rows: Rows, slots: torch.Tensor) -> list[list[int]]:
    """Slot by slot, by searching each page."""
    found = []
    for row, chosen in enumerate(slots.tolist()):
        pages = rows.page_table[0 if row < 3 else 1].tolist()
        found.append([pages.index(slot // 64) * 64 + slot % 64 for slot in chosen if slot >= 0])
        assert chosen[: len(found[-1])].count(-1) == 0, "-1 comes last"
    return found


def select(ops: Ops, rows: Rows) -> list[list[int]]:
    q = torch.zeros(5, 2, 128)
    nothing = torch.zeros(0)
    return positions(rows, ops.select_tokens(q, nothing, nothing, rows, TOPK, LAYOUT))


def test_the_window_is_the_last_tokens(rows: Rows) -> None:
    ends = rows.positions.tolist()
    assert select(selections.window(), rows) == [list(range(max(0, end - 63), end + 1)) for end in ends]


def test_random_tokens_are_visible_and_spread(rows: Rows) -> None:
    ops = selections.at_random(0)
    seen: set[int] = set()
    for _ in range(30):
        picks = select(ops, rows)
        for end, row in zip(rows.positions.tolist(), picks, strict=True):
            assert row == sorted(set(row))
            assert row[-1] <= end
        assert picks[3:] == [list(range(39)), list(range(40))], "few enough to see all"
        assert all(40 < len(row) <= TOPK for row in picks[:3])
        seen |= set(picks[0])
    assert seen == set(range(298))
    assert select(selections.at_random(0), rows) == select(selections.at_random(0), rows)


def test_dense_reads_all_that_is_visible() -> None:
    case, ops = make_case([300, 40], [3, 2]), selections.dense()
    chosen = ops.select_tokens(case.index_q, case.index_weights, case.index_pages, case.rows, TOPK, LAYOUT)
    out, _ = ops.sparse_mla(case.q, case.latent_pages, chosen, SOFTMAX_SCALE, LAYOUT)
    for row, (request, length) in enumerate([(0, 298), (0, 299), (0, 300), (1, 39), (1, 40)]):
        keys = reference.read_latents(case.latent_pages, case.slots_of(request, length), LAYOUT)
        weights = (case.q[row] @ keys.T * SOFTMAX_SCALE).softmax(-1)
        torch.testing.assert_close(out[row], weights @ keys[:, : LAYOUT.latent_dim], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", [40, 300])
def test_the_recorder_keeps_what_the_indexer_selects(context: int) -> None:
    case, recorder = make_case([context], [5]), Recorder()
    inputs = (case.index_q, case.index_weights, case.index_pages, case.rows, TOPK, LAYOUT)
    recorder.ops.select_tokens(*inputs)
    assert recorder.taken == []
    recorder.on = True
    slots = recorder.ops.select_tokens(*inputs)
    assert torch.equal(slots, reference.select_tokens(*inputs))
    pages = case.rows.page_table[0].tolist()
    expected = [
        [pages.index(slot // 64) * 64 + slot % 64 if slot >= 0 else -1 for slot in row]
        for row in slots.tolist()
    ]
    assert [taken.tolist() for taken in recorder.taken] == [expected]


def engine(ops: Ops | None = None) -> Engine:
    return make_engine(CHECKPOINT, EngineConfig(cache_bytes=8 * 2**20, max_context=1500, threads=1), ops=ops)[
        0
    ]


@pytest.fixture(scope="module")
def quiz() -> Quiz:
    return make_quiz(load_tokenizer(CHECKPOINT), tokens=600, questions=2, seed=1)


def test_questions_do_not_disturb_each_other(quiz: Quiz) -> None:
    together = ask(engine(), quiz)
    for question, answer in zip(quiz.questions, together, strict=True):
        assert ask(engine(), Quiz(quiz.document, [question])) == [answer]


def test_a_selection_of_everything_is_dense(quiz: Quiz) -> None:
    """Where no context is longer than top-k the indexer chooses nothing; beyond, dense attention reads more."""
    short = Quiz(quiz.document[:8], quiz.questions)
    longest = max(len(question.prompt) for question in short.questions)
    assert len(short.document) + longest + MAX_ANSWER_TOKENS <= TOPK, "whatever is answered"
    assert ask(engine(selections.dense()), short) == ask(engine(), short)
    everywhere = Recorder()
    everywhere.on = True
    ask(engine(everywhere.ops), Quiz(quiz.document, quiz.questions[:1]))
    assert all(int((taken >= 0).sum(1).max()) <= TOPK for taken in everywhere.taken)


def test_the_recorder_keeps_positions(quiz: Quiz) -> None:
    recorder = Recorder()
    running = engine(recorder.ops)
    recorder.on = True
    ask(running, Quiz(quiz.document, quiz.questions[:1]))
    first = recorder.taken[0]  # layer 0 of the whole prompt
    assert first[:TOPK].tolist() == [[*range(row + 1), *[-1] * (TOPK - 1 - row)] for row in range(TOPK)]
    assert bool((first.max(1).values <= torch.arange(len(first))).all())


def test_a_quiz_fits_its_length() -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    for tokens in (512, 4096):
        made = make_quiz(tokenizer, tokens=tokens, questions=6, seed=0)
        lengths = [
            len(made.document) + len(question.prompt) + len(question.answer) for question in made.questions
        ]
        assert 0.7 * tokens < max(lengths) <= tokens
        assert {question.part for question in made.questions} <= {"start", "middle", "end", None}


def test_answers_are_counted_by_kind_and_place() -> None:
    questions = [
        Question("fact", "start", [1], [5, 6]),
        Question("fact", "end", [1], [5, 7]),
        Question("absent", None, [1], [9]),
    ]
    found = score([Quiz([0], questions)], [[[5, 6], [5, 8], [9]]], way="dsa", precision="fp8", tokens=64)
    assert set(found) == {
        Score("dsa", "fp8", 64, "fact", "start", 1, 1),
        Score("dsa", "fp8", 64, "fact", "end", 0, 1),
        Score("dsa", "fp8", 64, "absent", None, 1, 1),
    }
    assert total(found, kind="fact") == (1, 2)
    assert total(found, way="dense") == (0, 0)


def test_wilson_interval() -> None:
    low, high = interval(90, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert interval(0, 0) == (0.0, 1.0)
    assert interval(10, 10)[1] == pytest.approx(1.0)
