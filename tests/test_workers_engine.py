"""The engine with a model that reads its tokens back through slots and page tables: a wrong page gives a wrong token."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rows import Rows
from workers.config import EngineConfig
from workers.engine import Engine, StepOutput
from workers.grammar import Compiler, Grammars
from workers.request import Grammar, Request, SamplingParams
from workers.runner import Runner
from workers.sampler import sample
from workers.vocabulary import Vocabulary

VOCAB, EOS, MODULUS = 101, 1, 1_000_003
SPELLINGS = [b"", b"", b'{"', b'":', b'", "', b'"}', *(bytes([byte]) for byte in range(32, 127))]
COMPILER = Compiler(Vocabulary(SPELLINGS, {"end": EOS}), vocab_size=VOCAB, eos_token_ids=[EOS])


def mix(values: torch.Tensor) -> torch.Tensor:
    """A running hash of everything up to each position. int64 [n] -> int64 [n]."""
    weights = torch.arange(1, len(values) + 1) * 7919 % 10_007
    return (values * weights % MODULUS).cumsum(0) % MODULUS


def embed(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return (token_ids * 31_337 + positions * 271 + 17) % MODULUS


def head(hidden: torch.Tensor) -> torch.Tensor:
    """int64 [n] -> fp32 [n, VOCAB]."""
    return ((hidden[:, None] + 1) * (torch.arange(VOCAB) + 11) * 7919 % MODULUS / MODULUS * 8).float()


def dense_logits(tokens: list[int]) -> torch.Tensor:
    """The same model without pages. fp32 [1, VOCAB], after the last token."""
    layer_1 = embed(torch.tensor(tokens), torch.arange(len(tokens)))
    return head(mix(mix(layer_1))[-1:])


class PagedModel:
    """Two layers that cache a value for each token. cache: int64 [2, slots], full of rubbish where not written."""

    device = "cpu"

    def forward(
        self,
        token_ids: torch.Tensor,
        rows: Rows,
        slots: torch.Tensor,
        cache: Any,
        logits_rows: torch.Tensor,
        on_selected: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        assert len(set(slots.tolist())) == len(slots) == len(token_ids) == rows.query_starts[-1]
        cache[0, slots] = embed(token_ids, rows.positions)
        hidden = []
        for r, pages in enumerate(rows.page_table.tolist()):
            first, last = rows.query_starts[r], rows.query_starts[r + 1]
            length = int(rows.positions[last - 1]) + 1
            assert rows.positions[first:last].tolist() == list(range(length - last + first, length))
            assert all(page >= 0 for page in pages[: -(-length // 64)])
            read = torch.tensor([64 * page + offset for page in pages for offset in range(64)])[:length]
            cache[1, slots[first:last]] = mix(cache[0, read])[length - last + first :]
            hidden.append(mix(cache[1, read])[length - last + first :])
        return head(torch.cat(hidden)[logits_rows])


def make_cache(num_pages: int) -> torch.Tensor:
    return torch.randint(MODULUS, (2, 64 * num_pages))


def make_engine(num_pages: int = 12, cache: torch.Tensor | None = None, **config: Any) -> Engine:
    cache = make_cache(num_pages) if cache is None else cache
    return Engine(
        Runner(PagedModel(), cache),
        num_pages=num_pages,
        config=EngineConfig(**config),
        eos_token_ids=[EOS],
        max_context=600,
        grammars=Grammars(COMPILER),
    )


def prompt(name: str, length: int) -> list[int]:
    """Prompts share the tokens up to where their names differ, 70 tokens a letter."""
    return [ord(name[min(i // 70, len(name) - 1)]) * (i + 3) % VOCAB for i in range(length)]


def make_request(request_id: str, tokens: list[int], *, max_tokens: int = 5, **fields: Any) -> Request:
    sampling = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__struct_fields__}
    num_prompt_tokens = fields.pop("num_prompt_tokens", len(tokens))
    return Request(
        request_id,
        list(tokens),
        num_prompt_tokens,
        SamplingParams(max_tokens=max_tokens, **sampling),
        b"tenant",
        **fields,
    )


def expected_output(request: Request) -> list[int]:
    """One request alone, without pages, chunks or cache. Call before the engine has touched the request."""
    alone = make_request("alone", request.tokens[: request.num_prompt_tokens])
    while True:
        (token,), _ = sample(
            dense_logits(alone.tokens),
            [Request("", alone.tokens, alone.num_prompt_tokens, request.sampling, b"")],
        )
        alone.tokens.append(token)
        if token == EOS or alone.num_output_tokens == request.sampling.max_tokens:
            return alone.tokens[alone.num_prompt_tokens :]


def run(engine: Engine, disturb: Random | None = None) -> tuple[dict[str, list[int]], list[StepOutput]]:
    """Output tokens by request as the step outputs tell them, and the outputs themselves.

    `disturb` preempts any request at any time, which pages alone would do far too seldom for a test.
    """
    tokens: dict[str, list[int]] = {}
    outputs = []
    while engine.has_work():
        running = engine._scheduler._running
        if disturb and running and disturb.random() < 0.2:
            engine._scheduler._preempt(disturb.choice(running))
            continue
        outputs.append(engine.step())
        for result in outputs[-1].results:
            tokens.setdefault(result.request.id, []).append(result.token)
    return tokens, outputs


SPEC = st.tuples(
    st.sampled_from(["a", "ab", "abc", "b"]),
    st.sampled_from([1, 50, 63, 64, 65, 130, 190, 256]),
    st.sampled_from([1, 4, 20]),
    st.sampled_from([0.0, 1.0]),
)


@settings(max_examples=30)
@given(
    st.lists(st.lists(SPEC, min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from([3, 50, 64, 1000]),
    st.sampled_from([6, 7, 20]),
    st.sampled_from([1, 2, 8]),
    st.none() | st.randoms(use_true_random=False),
)
def test_output_does_not_depend_on_budget_pages_batch_preemption_or_prefix_cache(
    waves: list[list[tuple[str, int, int, float]]],
    budget: int,
    num_pages: int,
    max_running: int,
    disturb: Random | None,
) -> None:
    engine = make_engine(num_pages, max_batched_tokens=budget, max_running=max_running)
    for wave in waves:
        expected = {}
        for i, (name, length, max_tokens, temperature) in enumerate(wave):
            request = make_request(
                str(i), prompt(name, length), max_tokens=max_tokens, temperature=temperature, seed=i
            )
            expected[request.id] = expected_output(request)
            engine.add(request)
        assert run(engine, disturb)[0] == expected
        assert engine.pools.held == 0


def test_preempted_requests_end_with_the_same_tokens() -> None:
    requests = [make_request(name, prompt(name, 60), max_tokens=140, ignore_eos=True) for name in "abc"]
    expected = {r.id: run_alone(r) for r in requests}
    engine = make_engine(5)
    for request in requests:
        engine.add(request)
    tokens, outputs = run(engine)
    assert sum(len(output.preempted) for output in outputs) >= 2
    assert tokens == expected


def run_alone(request: Request) -> list[int]:
    engine = make_engine(20)
    engine.add(
        make_request(request.id, request.tokens, max_tokens=request.sampling.max_tokens, ignore_eos=True)
    )
    return run(engine)[0][request.id]


def test_a_request_goes_on_in_another_engine() -> None:
    whole = make_request("whole", prompt("a", 100), max_tokens=60, seed=3, ignore_eos=True)
    first = make_engine()
    first.add(whole)
    run(first)
    rest = make_request(
        "rest", whole.tokens[:131], num_prompt_tokens=100, max_tokens=60, seed=3, ignore_eos=True
    )
    second = make_engine()
    second.add(rest)
    tokens, _ = run(second)
    assert tokens["rest"] == whole.tokens[131:]
    assert rest.finish_reason == "length"


@settings(max_examples=20)
@given(
    st.lists(SPEC, min_size=1, max_size=5),
    st.sampled_from([40, 1000]),
    st.sampled_from([6, 8, 20]),
    st.randoms(use_true_random=False),
)
def test_prefill_here_and_decode_there_equals_the_plain_run(
    specs: list[tuple[str, int, int, float]], budget: int, num_pages: int, random: Random
) -> None:
    prefill_cache, decode_cache = make_cache(20), make_cache(num_pages)
    prefill = make_engine(20, prefill_cache, max_batched_tokens=budget)
    decode = make_engine(num_pages, decode_cache, max_batched_tokens=budget)
    expected, received = {}, dict[str, list[int]]()
    for i, (name, length, max_tokens, temperature) in enumerate(specs):
        sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": i}
        request = make_request(str(i), prompt(name, length), **sampling)
        expected[request.id] = expected_output(request)
        while not decode.reserve(request):
            collect(decode.step(), received)
        resident = request.num_computed_tokens // 64
        assert request.num_cached_tokens == 64 * resident

        sender = make_request(str(i), request.tokens, **sampling, one_token=True, hold_pages=True)
        prefill.add(sender)
        (first_token,) = run(prefill)[0][sender.id]
        shipped = list(range(resident, len(request.pages)))
        random.shuffle(shipped)
        for index in shipped:
            source, target = 64 * sender.pages[index], 64 * request.pages[index]
            decode_cache[:, target : target + 64] = prefill_cache[:, source : source + 64]
            decode.landed(request.id, index)
            if decode.has_work():
                collect(decode.step(), received)
        received[request.id] = [first_token]
        assert decode.join(request.id, first_token) == request.finish_reason
        assert sender.finish_reason == (request.finish_reason or "prefilled")
        assert prefill.release(sender.id)
    while decode.has_work():
        collect(decode.step(), received)
    assert received == expected
    assert prefill.pools.held == decode.pools.held == 0


def collect(output: StepOutput, received: dict[str, list[int]]) -> None:
    for result in output.results:
        received[result.request.id].append(result.token)


def test_what_a_step_tells() -> None:
    engine = make_engine(max_batched_tokens=100)
    long = make_request("long", prompt("a", 130), temperature=0, max_tokens=2, logprobs=2, ignore_eos=True)
    short = make_request("short", prompt("b", 20), temperature=0, max_tokens=1)
    engine.add(long)
    engine.add(short)
    first = engine.step()
    assert [(item.request, item.num_tokens) for item in first.scheduled] == [(long, 100)]
    assert (first.results, first.preempted, long.num_computed_tokens) == ([], [], 100)
    second = engine.step()
    assert [(item.request, item.end) for item in second.scheduled] == [(long, 130), (short, 20)]
    assert [(result.request, result.finish) for result in second.results] == [(long, None), (short, "length")]
    assert [result.logprobs is None for result in second.results] == [False, True]
    best = second.results[0].logprobs
    assert best is not None
    assert best.top[0] == (second.results[0].token, best.logprob)
    (last,) = engine.step().results
    assert (last.request, last.finish) == (long, "length")
    assert not engine.has_work()
    assert first.seconds > 0


def test_load_figures() -> None:
    engine = make_engine(12, max_batched_tokens=100)
    engine.add(make_request("a", prompt("a", 150)))
    engine.add(make_request("b", prompt("b", 50)))
    engine.step()
    load = engine.load(extra_waiting=3, step_seconds=0.5)
    assert (load.waiting, load.running, load.queued_tokens, load.step_seconds) == (4, 1, 100, 0.5)
    assert (load.free_pages, load.cached_pages, load.held_pages) == (9, 0, 3)
    run(engine)
    load = engine.load()
    assert (load.waiting, load.running, load.queued_tokens) == (0, 0, 0)
    assert (load.free_pages, load.cached_pages, load.held_pages) == (10, 2, 0)


@pytest.mark.parametrize("state", ["waiting", "running", "landing"])
def test_an_abort_gives_the_pages_back(state: str) -> None:
    engine = make_engine(12, max_batched_tokens=100)
    request = make_request("a", prompt("a", 150))
    if state == "landing":
        assert engine.reserve(request)
    else:
        engine.add(request)
    if state == "running":
        engine.step()
    assert engine.abort("a")
    assert not engine.abort("a")
    assert engine.pools.held == 0
    assert engine.pools.free + engine.pools.cached == 12
    assert not engine.has_work()


def test_a_lost_page_is_noticed_when_the_engine_is_idle() -> None:
    engine = make_engine()
    engine.add(make_request("a", prompt("a", 10), max_tokens=1))
    engine.pools[0].allocate(1)
    with pytest.raises(RuntimeError, match="1 pages are held, but requests own 0"):
        engine.step()


def test_what_can_never_be_served_is_refused() -> None:
    engine = make_engine(4)
    request = make_request("a", prompt("a", 300))
    for refuse in (engine.check_fits, engine.add, engine.reserve):
        with pytest.raises(ValueError, match="need 5 pages of 64 tokens; there are 4"):
            refuse(request)


RULES = [
    'start: %json {"type": "object", "properties": {"a": {"enum": [1, 23]}, "b": {"type": "string", "maxLength": 5}}, "required": ["a", "b"]}',
    'start: %json {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 3, "maxItems": 6}',
]
PATTERN_OF_WHITESPACE = ', "x-guidance": {"whitespace_flexible": false}}'


def ruled(request_id: str, number: int, **fields: Any) -> Request:
    """Beside reasoning in two of three; even one that ignores EOS ends with its grammar."""
    grammar = Grammar(RULES[number % 2].removesuffix("}") + PATTERN_OF_WHITESPACE, [None, 40, 60][number % 3])
    tokens = fields.pop("tokens", prompt("ab", 50 + 30 * number))
    return make_request(
        request_id,
        tokens,
        max_tokens=400,
        seed=number,
        temperature=float(number % 4 != 0),
        presence_penalty=1.0,
        ignore_eos=number == 1,
        grammar=grammar,
        **fields,
    )


def answer_of(request: Request) -> Any:
    """What stands behind the reasoning."""
    output = request.tokens[request.num_prompt_tokens :]
    assert output.pop() == EOS
    after = request.sampling.grammar.after if request.sampling.grammar else None
    if after is not None:
        output = output[output.index(after) + 1 :]
    assert EOS not in output
    return json.loads(b"".join(SPELLINGS[token] for token in output))


def test_a_grammar_holds_beside_free_requests_whatever_disturbs_them() -> None:
    alone: dict[str, list[int]] = {}
    for number in range(6):
        tokens, _ = run_after_adding(make_engine(), ruled(f"ruled-{number}", number))
        alone |= tokens
    free = [make_request(f"free-{n}", prompt("abc", 60 + 40 * n), max_tokens=30) for n in range(4)]
    expected = {request.id: expected_output(request) for request in free}
    requests = [ruled(f"ruled-{number}", number) for number in range(6)]
    engine = make_engine(num_pages=14, max_batched_tokens=64)
    tokens, _ = run_after_adding(engine, *free, *requests, disturb=Random(2))
    assert tokens == expected | alone
    for number, request in enumerate(requests):
        assert request.finish_reason == "stop"
        answer = answer_of(request)
        if number % 2:
            assert 3 <= len(answer) <= 6
        else:
            assert answer["a"] in (1, 23)
            assert len(answer["b"]) <= 5


def run_after_adding(
    engine: Engine, *requests: Request, disturb: Random | None = None
) -> tuple[dict[str, list[int]], list[StepOutput]]:
    for request in requests:
        engine.add(request)
    return run(engine, disturb)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_resumed_request_goes_on_inside_its_grammar(number: int) -> None:
    whole = ruled("whole", number)
    run_after_adding(make_engine(), whole)
    for cut in range(whole.num_prompt_tokens, len(whole.tokens)):
        resumed = ruled(
            "resumed", number, tokens=whole.tokens[:cut], num_prompt_tokens=whole.num_prompt_tokens
        )
        run_after_adding(make_engine(), resumed)
        assert resumed.tokens == whole.tokens


@pytest.mark.parametrize("prefills", [False, True])
def test_a_grammar_that_cannot_be_followed_ends_its_request_only(prefills: bool) -> None:
    engine = make_engine()
    free = make_request("free", prompt("a", 70), max_tokens=6)
    expected = expected_output(free)
    fields = {"hold_pages": True, "one_token": True} if prefills else {}
    broken = [
        make_request("unreadable", prompt("b", 90), grammar=Grammar("start: nothing"), **fields),
        make_request(
            "wrong output",
            [*prompt("b", 70), 50],
            num_prompt_tokens=70,
            grammar=Grammar('start: "}"'),
            **fields,
        ),
    ]
    tokens, outputs = run_after_adding(engine, free, *broken)
    assert tokens == {"free": expected}
    failed = {request.id: reason for output in outputs for request, reason in output.failed}
    assert failed.keys() == {"unreadable", "wrong output"}
    assert "nothing" in failed["unreadable"]
    for request in broken:
        assert request.finish_reason is not None
        assert engine.release(request.id) == prefills
    engine.pools.check()
    assert engine.pools.held == 0
