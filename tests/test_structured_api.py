"""Replies in a format and calls that are strict, required or named, over HTTP and real workers; the openai SDK as client."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from in_process_gateway import Gateway, running_gateway

from cluster.structured import StructuredOutput
from workers.tiny import write_tiny

HELLO: Any = [{"role": "user", "content": "Hello there"}]


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


ARGUMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
}


def _tool(name: str) -> Any:
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": ARGUMENTS}}


TOOLS = [_tool("make"), _tool("take")]


def _settings(terse: dict[str, float], choice: Any) -> Any:
    return {
        "model": "lightship",
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "temperature": 1.0,
        "logit_bias": terse,
        "seed": 2,
    }


def test_a_required_call_is_made_in_a_stream(sdk: openai.OpenAI, terse: dict[str, float]) -> None:
    name, arguments, content, finish = "", "", "", None
    for chunk in sdk.chat.completions.create(**_settings(terse, "required"), stream=True):
        content += chunk.choices[0].delta.content or ""
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.index == 0
            assert delta.function is not None
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert finish == "tool_calls"
    assert content == ""
    assert name in ("make", "take")
    jsonschema.validate(json.loads(arguments), ARGUMENTS)


def test_a_strict_schema_that_cannot_be_held_is_refused_with_its_tool(gateway: Gateway) -> None:
    bad = {"type": "function", "function": {"name": "bad", "strict": True, "parameters": {"not": {}}}}
    answer = _post(gateway, "/v1/chat/completions", messages=HELLO, tools=[*TOOLS, bad])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools[2].function.parameters"
    bad["function"]["strict"] = False  # type: ignore[index]
    allowed = _post(gateway, "/v1/chat/completions", messages=HELLO, tools=[*TOOLS, bad], max_tokens=3)
    assert allowed.status_code == 200
