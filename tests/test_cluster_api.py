"""The HTTP API over real workers, ledger and text; the openai SDK as client."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from in_process_gateway import Gateway, running_gateway

from cluster.ledger import verify
from cluster.structured import StructuredOutput
from workers.tiny import write_tiny

HELLO: Any = [{"role": "user", "content": "Hello there, how are you today? " * 20}]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model")
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


def test_the_ledger_has_every_choice_once(gateway: Gateway) -> None:
    report = verify(gateway.ledger)
    assert report.bad is None
    assert not report.unsettled


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["small", "large"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module")
def terse(gateway: Gateway) -> dict[str, float]:
    """A bias against new lines, which would only make answers longer."""
    _, newline = _post(gateway, "/tokenize", prompt="\n").json()["tokens"]
    return {str(newline): -100}


def test_every_choice_follows_the_schema(sdk: openai.OpenAI, terse: dict[str, float]) -> None:
    settings: Any = {
        "model": "lightship",
        "messages": HELLO,
        "max_tokens": 300,
        "response_format": FORMAT,
        "logit_bias": terse,
        "seed": 3,
    }
    chat = sdk.chat.completions.create(**settings, n=3, temperature=2.0)
    for choice in chat.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    assert len({choice.message.content for choice in chat.choices}) > 1
    stream = sdk.chat.completions.create(**settings, temperature=0, stream=True, logprobs=True)
    chunks = [choice for chunk in stream for choice in chunk.choices]
    jsonschema.validate(json.loads("".join(choice.delta.content or "" for choice in chunks)), SCHEMA)
    assert chunks[-1].finish_reason == "stop"


def test_reasoning_before_an_answer_in_a_format_is_free(sdk: openai.OpenAI, terse: dict[str, float]) -> None:
    """The model would never stop thinking by itself; a bias makes it."""
    think_end = 4
    chat = sdk.chat.completions.create(
        model="lightship",
        messages=HELLO,
        max_tokens=400,
        seed=1,
        temperature=1.0,
        response_format=FORMAT,
        logit_bias=terse | {str(think_end): 8},
        extra_body={"thinking": {"type": "enabled"}},
    )
    message = chat.choices[0].message
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"]
    jsonschema.validate(json.loads(message.content or ""), SCHEMA)


def test_a_schema_that_is_wrong_or_too_much_is_refused_before_a_worker_sees_it(gateway: Gateway) -> None:
    field = "response_format.json_schema.schema"
    for schema, sentence in [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"enum": ["x" * 70_000]}, "the limit is 65536"),
    ]:
        answer = _post(
            gateway,
            "/v1/chat/completions",
            messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert sentence in answer.json()["error"]["message"]


def test_a_grammar_that_fails_at_a_worker_is_the_request_s_fault_alone(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only shows while the answer is written: here the gateway is made to let a wrong grammar through."""
    monkeypatch.setattr(StructuredOutput, "_checked", lambda *wanted: "start: nothing")
    body = {"messages": HELLO, "response_format": {"type": "json_object"}}
    answer = _post(gateway, "/v1/chat/completions", **body)
    assert answer.status_code == 400
    assert "too complex to follow" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert _post(gateway, "/v1/chat/completions", **body, max_tokens=5).status_code == 200
