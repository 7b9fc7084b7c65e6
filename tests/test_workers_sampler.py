"""The sampler against a slow float64 oracle; distribution; independence of the batch; going on elsewhere."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from workers.grammar import Masks
from workers.request import Grammar, Request, SamplingParams
from workers.sampler import _allowed, sample, uniform


def make_request(prompt: list[int], output: list[int], **sampling: Any) -> Request:
    return Request("r", [*prompt, *output], len(prompt), SamplingParams(max_tokens=99, **sampling), b"")


def oracle(logits: list[float], request: Request) -> int:
    """Written from the definitions, one token at a time."""
    p, scores = request.sampling, dict(enumerate(logits))
    output = request.tokens[request.num_prompt_tokens :]
    for token, bias in p.logit_bias.items():
        scores[token] += bias
    for token in set(request.tokens):
        score = scores[token]
        scores[token] = score / p.repetition_penalty if score > 0 else score * p.repetition_penalty
    for token, count in Counter(output).items():
        scores[token] -= p.frequency_penalty * count
        scores[token] -= p.presence_penalty
    order = sorted(scores, key=lambda token: (-scores[token], token))
    if p.temperature == 0:
        return order[0]
    weights = [math.exp((scores[token] - scores[order[0]]) / p.temperature) for token in order]
    weights = [w for w in weights if w >= p.min_p]
    weights = weights[: p.top_k or None]
    total, kept = math.fsum(weights), 0
    while kept < len(weights) and math.fsum(weights[:kept]) < p.top_p * total:
        kept += 1
    target = uniform(p.seed, len(output)) * math.fsum(weights[:kept])
    return next(token for i, token in enumerate(order) if math.fsum(weights[: i + 1]) > target)


VOCAB = 12
CHOICES: dict[str, list[float]] = {
    "temperature": [0.0, 0.3, 1.0, 2.0],
    "top_p": [1.0, 0.9, 0.5, 0.01],
    "top_k": [0, 1, 3, 100],
    "min_p": [0.0, 0.1, 1.0],
    "presence_penalty": [0.0, 0.0, 1.5, -1.0],
    "frequency_penalty": [0.0, 0.0, 0.7],
    "repetition_penalty": [1.0, 1.0, 1.3, 0.8],
}


def random_request() -> Request:
    params: dict[str, Any] = {name: random.choice(values) for name, values in CHOICES.items()}
    params["seed"] = random.randrange(-(2**63), 2**64)
    params["logit_bias"] = {
        random.randrange(VOCAB): random.choice([-100.0, 2.0, 100.0]) for _ in range(random.choice([0, 0, 2]))
    }
    prompt, output = (random.choices(range(VOCAB), k=random.randrange(8)) for _ in range(2))
    return make_request(prompt, output, **params)


@pytest.mark.parametrize("num_rows", [1, 2, 17, 1000, 3000])
def test_every_row_equals_the_oracle(num_rows: int) -> None:
    requests = [random_request() for _ in range(num_rows)]
    logits = torch.randint(-12, 13, (num_rows, VOCAB)) / 4  # ties are common
    before = logits.clone()
    tokens, logprobs = sample(logits, requests)
    assert tokens == [oracle(row, request) for row, request in zip(logits.tolist(), requests, strict=True)]
    assert logprobs == [None] * num_rows
    assert torch.equal(logits, before)


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    logits = torch.zeros(2, 50)
    logits[1, [30, 7, 42]] = 1.0
    plain, penalised = (
        make_request([1], [], temperature=0),
        make_request([1], [2], temperature=0, presence_penalty=1),
    )
    assert sample(logits, [plain, plain])[0] == [0, 7]
    assert sample(logits, [penalised, penalised])[0] == [0, 7]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_an_answer_before_its_least_length(temperature: float) -> None:
    logits = torch.zeros(1, 10)
    logits[0, [3, 4, 5]] = torch.tensor([30.0, 20.0, 10.0])  # 3 ends any answer, 4 this one

    def choose(output: list[int], **params: Any) -> int:
        request = make_request([1], output, temperature=temperature, stop_token_ids=(4,), **params)
        return sample(logits, [request], [3])[0][0]

    assert choose([7], min_tokens=2) == 5
    assert choose([7], min_tokens=2, ignore_eos=True) == 3
    assert choose([7], min_tokens=2, logit_bias={4: 100.0}) == 5
    assert choose([7, 7], min_tokens=2) == 3


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 50), []) == ([], [])


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = 3 * torch.randn(33, 2000)
    requests = [make_request([1], [], seed=seed, top_p=0.97, logprobs=3) for seed in range(33)]
    tokens, logprobs = sample(logits, requests)
    for row, request in enumerate(requests):
        alone = sample(logits[row : row + 1], [request])
        assert alone == ([tokens[row]], [logprobs[row]])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_the_draws_follow_the_distribution(params: dict[str, Any], expected: list[float]) -> None:
    n = 4000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(n, 4)
    tokens, _ = sample(logits, [make_request([0], [], seed=seed, **params) for seed in range(n)])
    for token, share in enumerate(expected):
        deviation = 4 * math.sqrt(share * (1 - share) / n)  # 4 standard deviations
        assert tokens.count(token) / n == pytest.approx(share, abs=deviation)


def test_positions_of_one_seed_are_independent_draws() -> None:
    draws = [uniform(5, position) for position in range(4000)]
    assert all(0 <= draw < 1 for draw in draws)
    for tenth in range(10):
        assert sum(tenth <= 10 * draw < tenth + 1 for draw in draws) == pytest.approx(400, abs=80)
    pairs = sum((a < 0.5) == (b < 0.5) for a, b in zip(draws, draws[1:], strict=False))
    assert pairs == pytest.approx(2000, abs=130)


def test_the_random_numbers_are_a_fixed_format() -> None:
    """Workers of different versions may continue each other's requests: these numbers must not change."""
    assert [uniform(0, 0), uniform(-1, 7)] == [0.0564663990004608, 0.9622429077364113]


def test_another_worker_goes_on_exactly_where_one_stopped() -> None:
    table = 2 * torch.randn(40, 40)  # the logits after each token

    def go_on(request: Request, steps: int) -> list[int]:
        for _ in range(steps):
            request.tokens += sample(table[request.tokens[-1]].unsqueeze(0), [request])[0]
        return request.tokens

    params = {"seed": 11, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "top_p": 0.95}
    whole = go_on(make_request([3, 4], [], **params), 30)
    for stop in (1, 13, 29):
        assert go_on(make_request([3, 4], whole[2 : 2 + stop], **params), 30 - stop) == whole
    assert go_on(make_request([3, 4], [], **params | {"seed": 12}), 30) != whole


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(1, 30)
    logits[0, [4, 9, 20]] = 5.0
    expected = logits[0].double().log_softmax(-1)
    request = make_request(
        [1],
        [4],
        temperature=0,
        logit_bias={17: 100.0},
        presence_penalty=1.0,
        repetition_penalty=2.0,
        logprobs=4,
    )
    (token,), (logprobs,) = sample(logits, [request])
    assert token == 17
    assert logprobs is not None
    assert logprobs.logprob == expected[17].item()
    assert [i for i, _ in logprobs.top][:3] == [4, 9, 20]
    assert [p for _, p in logprobs.top] == expected.sort(descending=True).values[:4].tolist()
    (none,) = sample(logits, [make_request([1], [], temperature=0, logprobs=0)])[1]
    assert none is not None
    assert (none.logprob, none.top) == (expected[4].item(), [])


def masks_of(rows: list[int], allowed: list[set[int]], vocab: int) -> Masks:
    bits = torch.zeros(len(rows), -(-vocab // 32), dtype=torch.int64)
    for row, tokens in zip(bits, allowed, strict=True):
        for token in tokens:
            row[token // 32] |= 1 << token % 32
    return Masks(rows, bits.to(torch.uint32).view(torch.int32).numpy())


@pytest.mark.parametrize("vocab", [12, 32, 65])
def test_a_masked_row_equals_one_whose_other_tokens_are_impossible(vocab: int) -> None:
    requests = [random_request() for _ in range(200)]
    rows = sorted(random.sample(range(200), 80))
    allowed = [set(random.sample(range(vocab), random.randrange(1, vocab))) | {vocab - 1} for _ in rows]
    logits = torch.randint(-12, 13, (200, vocab)) / 4
    before = logits.clone()
    masked = logits.clone()
    for row, tokens in zip(rows, allowed, strict=True):
        masked[row, sorted(set(range(vocab)) - tokens)] = -torch.inf
    tokens, _ = sample(logits, requests, (), masks_of(rows, allowed, vocab))
    assert tokens == sample(masked, requests)[0]
    assert torch.equal(logits, before)
    for row, choice in zip(rows, allowed, strict=True):
        assert tokens[row] in choice
    free = [row for row in range(200) if row not in rows]
    assert [tokens[row] for row in free] == [sample(logits, requests)[0][row] for row in free]


def test_the_end_of_a_grammar_is_the_end() -> None:
    grammar = Grammar('start: "x"')
    logits = torch.zeros(1, 40)
    for ignore_eos in (False, True):
        request = make_request(
            [1], [2], temperature=0, min_tokens=5, ignore_eos=ignore_eos, stop_token_ids=(7,), grammar=grammar
        )
        only_the_end, more = (masks_of([0], [tokens], 40) for tokens in ({3}, {3, 7, 9}))
        assert sample(logits, [request], (3,), only_the_end)[0] == [3]
        assert sample(logits, [request], (3,), more)[0] == [9]


def test_logprobs_know_nothing_of_the_grammar() -> None:
    logits = torch.randn(2, 40)
    request = make_request([1], [], temperature=0, logprobs=3)
    (free, ruled), (expected, same) = sample(logits, [request, request], (), masks_of([1], [{33}], 40))
    assert ruled == 33
    assert expected is not None
    assert same is not None
    assert free == expected.top[0][0]
    assert same.logprob == logits[1].double().log_softmax(-1)[33].item()
    assert same.top[0][0] == int(logits[1].argmax())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_masks_as_a_cpu_does_and_waits_for_nothing() -> None:
    logits = torch.randn(8, 129_280)
    allowed = [set(random.sample(range(129_280), 50)) for _ in range(5)]
    masks = masks_of([1, 2, 4, 6, 7], allowed, 129_280)
    expected = _allowed(logits, masks)
    logits = logits.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = _allowed(logits, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)
