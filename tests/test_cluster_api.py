"""The HTTP API over real workers, ledger and text; the openai SDK as client."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from in_process_gateway import Gateway, running_gateway

from cluster.ledger import verify
from workers.tiny import write_tiny

HELLO: Any = [{"role": "user", "content": "Hello there, how are you today? " * 20}]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model", num_hidden_layers=2)
    with running_gateway(folder / "model", folder) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def _post(gateway: Gateway, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{gateway.url}{path}", json={"model": "lightship", **body}, timeout=60)


def test_several_choices_of_one_prompt(sdk: openai.OpenAI) -> None:
    settings: Any = {"model": "lightship", "max_tokens": 8, "seed": 5, "temperature": 1.0}
    chat = sdk.chat.completions.create(messages=HELLO, n=3, extra_body={"ignore_eos": True}, **settings)
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in chat.choices}) == 3
    alone = sdk.chat.completions.create(messages=HELLO, extra_body={"ignore_eos": True}, **settings)
    assert alone.choices[0].message.content == chat.choices[0].message.content
    assert chat.usage is not None
    assert alone.usage is not None
    assert chat.usage.prompt_tokens == alone.usage.prompt_tokens, "a prompt counts once"
    assert chat.usage.completion_tokens == 24


def test_several_choices_in_a_stream(sdk: openai.OpenAI) -> None:
    settings: Any = {"model": "lightship", "messages": HELLO, "n": 3, "max_tokens": 8, "seed": 9}
    whole = sdk.chat.completions.create(**settings)
    stream = sdk.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    texts = dict.fromkeys(range(3), "")
    finishes: dict[int, str] = {}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in finishes
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


def test_lists_of_prompts_and_echo(sdk: openai.OpenAI, gateway: Gateway) -> None:
    prompts = ["Once upon a time", "In the beginning"]
    settings: Any = {"model": "lightship", "max_tokens": 6, "temperature": 0}
    both = sdk.completions.create(prompt=prompts, n=2, echo=True, **settings)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    for choice in both.choices:
        prompt = prompts[choice.index // 2]
        alone = sdk.completions.create(prompt=prompt, **settings)
        assert choice.text == prompt + alone.choices[0].text
    ids = _post(gateway, "/tokenize", prompt="Once upon a time").json()["tokens"]
    of_ids = sdk.completions.create(prompt=ids, echo=True, **settings)
    assert of_ids.choices[0].text == both.choices[0].text
    stream = sdk.completions.create(prompt=prompts, echo=True, stream=True, **settings)
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [both.choices[0].text, both.choices[2].text]


def test_text_to_tokens_and_back(gateway: Gateway) -> None:
    text = "Once upon a time, €"
    answer = _post(gateway, "/tokenize", prompt=text, return_token_strs=True).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 3000
    assert _post(gateway, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    chat = _post(gateway, "/tokenize", messages=HELLO).json()
    used = _post(gateway, "/v1/chat/completions", messages=HELLO, max_tokens=1).json()["usage"]
    assert chat["count"] == used["prompt_tokens"]
    for body, param in (({}, "prompt"), ({"prompt": "a", "messages": HELLO}, "prompt"),
                        ({"messages": []}, "messages"), ({"prompt": "a", "tools": 1}, "tools")):  # fmt: skip
        refused = _post(gateway, "/tokenize", **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    refused = _post(gateway, "/detokenize", tokens=[1, 10**6])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens[1]")


def test_one_choice_that_fails_ends_the_answer(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context holds 3000"):
        sdk.completions.create(model="lightship", prompt=[[20], [20] * 3000], max_tokens=1)


def test_an_answer_has_its_least_length(sdk: openai.OpenAI) -> None:
    free = sdk.completions.create(
        model="lightship", prompt="Hi", max_tokens=9, temperature=0, extra_body={"ignore_eos": True}
    )
    token = sdk.completions.create(model="lightship", prompt="Hi", max_tokens=1, temperature=0, logprobs=0)
    assert free.choices[0].text.startswith(token.choices[0].text)
    stops = free.choices[0].text[:2]
    ended = sdk.completions.create(model="lightship", prompt="Hi", max_tokens=9, temperature=0, stop=stops)
    assert ended.choices[0].text == ""
    longer = sdk.completions.create(
        model="lightship",
        prompt="Hi",
        max_tokens=9,
        temperature=0,
        stop=stops,
        extra_body={"min_tokens": 9, "ignore_eos": True},
    )
    assert longer.choices[0].text == free.choices[0].text


def test_a_key_sees_what_it_used(gateway: Gateway) -> None:
    def usage(**query: str) -> httpx.Response:
        return httpx.get(f"{gateway.url}/v1/usage", params=query, timeout=10)

    _post(gateway, "/v1/completions", prompt="Hello", max_tokens=1)
    deadline = time.monotonic() + 10
    while verify(gateway.ledger).unsettled and time.monotonic() < deadline:
        time.sleep(0.05)  # a settlement follows its answer
    before = usage().json()["total"]
    body = {"prompt": "Hello", "max_tokens": 3, "n": 2, "ignore_eos": True}
    used = _post(gateway, "/v1/completions", **body).json()["usage"]
    while (after := usage().json())["total"]["completion_tokens"] < before["completion_tokens"] + 6:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    total = after["total"]
    assert total["requests"] == before["requests"] + 1
    assert total["cost_nanodollars"] == before["cost_nanodollars"] + used["cost_nanodollars"]
    assert sum(day["completion_tokens"] for day in after["data"]) == total["completion_tokens"]
    assert usage(start="2020-01-01", end="2020-02-01").json()["data"] == []
    for query, param in (({"start": "today"}, "start"), ({"end": "2026-02-30"}, "end"), ({"day": "x"}, "day"),
                         ({"start": "2026-02-01", "end": "2026-01-01"}, "start")):  # fmt: skip
        refused = usage(**query)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_the_ledger_has_every_choice_once(gateway: Gateway) -> None:
    deadline = time.monotonic() + 10
    while (report := verify(gateway.ledger)).unsettled and time.monotonic() < deadline:
        time.sleep(0.05)  # a settlement follows its answer
    assert report.bad is None
    assert not report.unsettled
