"""Tool calls over the HTTP API, in both chat formats, with real workers; the openai SDK as client.

The model is random: what it calls, and with what, is held to one possibility by strict schemas.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from in_process_gateway import Gateway, running_gateway
from openai.types.chat import ChatCompletion, ChatCompletionMessage

from cluster.chat_encoding import ChatFormat
from cluster.config import ClusterConfig
from workers.tiny import write_tiny

ASK: Any = [{"role": "user", "content": "How high is the tide?"}]
ARGUMENTS: dict[str, Any] = {"s": 'a "', "j": 2.5}


def _tool(name: str, arguments: dict[str, Any], *, strict: bool = True) -> Any:
    parameters = {
        "type": "object",
        "properties": {key: {"const": value} for key, value in arguments.items()},
        "required": list(arguments),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


TOOLS = [_tool("t", ARGUMENTS), _tool("c", {})]
NAMED: Any = {"type": "function", "function": {"name": "t"}}


@pytest.fixture(scope="module", params=["v3.2", "v3.2-exp"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model", num_hidden_layers=2)
    chat_format: ChatFormat = request.param
    with running_gateway(folder / "model", folder, ClusterConfig(chat_encoding=chat_format)) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def settings(gateway: Gateway) -> dict[str, Any]:
    """With a bias against new lines, which would only make arguments longer."""
    body = {"model": "lightship", "prompt": "\n"}
    _, newline = httpx.post(f"{gateway.url}/tokenize", json=body).json()["tokens"]
    same = {"model": "lightship", "messages": ASK, "tools": TOOLS, "max_tokens": 200, "temperature": 0}
    return same | {"logit_bias": {str(newline): -100}}


@pytest.fixture(scope="module")
def called(sdk: openai.OpenAI, settings: dict[str, Any]) -> ChatCompletion:
    return sdk.chat.completions.create(**settings, tool_choice=NAMED)


def _calls(message: ChatCompletionMessage) -> list[tuple[str, str]]:
    calls = message.tool_calls or []
    return [(call.function.name, call.function.arguments) for call in calls if call.type == "function"]


def _num_tokens(gateway: Gateway, messages: Any, **fields: Any) -> int:
    body = {"model": "lightship", "messages": messages, **fields}
    count: int = httpx.post(f"{gateway.url}/tokenize", json=body).json()["count"]
    return count


def _prompt_tokens(answer: ChatCompletion) -> int:
    assert answer.usage is not None
    return answer.usage.prompt_tokens


def test_a_named_call_whole_and_streamed(
    sdk: openai.OpenAI, settings: dict[str, Any], called: ChatCompletion
) -> None:
    (choice,) = called.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    ((name, arguments),) = _calls(choice.message)
    assert (name, json.loads(arguments)) == ("t", ARGUMENTS)
    with sdk.chat.completions.stream(**settings, tool_choice=NAMED) as stream:
        deltas = [event.chunk.choices[0].delta for event in stream if event.type == "chunk"]
        (streamed,) = stream.get_final_completion().choices
    assert not any(delta.content for delta in deltas)
    assert sum(bool(delta.tool_calls) for delta in deltas) > 3, "arguments come as they are written"
    assert _calls(streamed.message) == _calls(choice.message)
    assert streamed.finish_reason == "tool_calls"


def test_a_second_turn_with_results(sdk: openai.OpenAI, gateway: Gateway, called: ChatCompletion) -> None:
    """What came is sent back as it came."""
    said = called.choices[0].message
    (call,) = said.tool_calls or []
    messages = [*ASK, said.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "2 m"}]
    answer = sdk.chat.completions.create(
        messages=messages, tools=TOOLS, model="lightship", max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert _prompt_tokens(answer) == _num_tokens(gateway, messages, tools=TOOLS) > _prompt_tokens(called)
    assert answer.choices[0].finish_reason == "length"
    for wrong, param in (
        (messages[:2], "messages[1]"),
        ([*messages, messages[2]], "messages[3].tool_call_id"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(messages=wrong, model="lightship")
        assert caught.value.param == param


def test_calls_of_several_choices(sdk: openai.OpenAI, settings: dict[str, Any]) -> None:
    several = settings | {"tools": TOOLS[1:], "temperature": 1.0, "seed": 1, "n": 2}
    answer = sdk.chat.completions.create(**several, tool_choice="required", parallel_tool_calls=False)
    for choice in answer.choices:
        ((name, arguments),) = _calls(choice.message)
        assert (name, json.loads(arguments)) == ("c", {})
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert len(set(ids)) == 2


def test_a_call_that_was_cut(sdk: openai.OpenAI, settings: dict[str, Any], called: ChatCompletion) -> None:
    assert called.usage is not None
    ((_, whole),) = _calls(called.choices[0].message)
    half = called.usage.completion_tokens // 2
    answer = sdk.chat.completions.create(**settings | {"max_tokens": half}, tool_choice=NAMED)
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)
    ((_, arguments),) = _calls(choice.message)
    assert whole.startswith(arguments)
    assert len(arguments) < len(whole)


def test_tools_that_are_not_to_be_called_are_not_in_the_prompt(
    sdk: openai.OpenAI, settings: dict[str, Any], gateway: Gateway
) -> None:
    loose = [_tool("t", ARGUMENTS, strict=False)]
    none = sdk.chat.completions.create(**settings | {"max_tokens": 3}, tool_choice="none")
    auto = sdk.chat.completions.create(**settings | {"max_tokens": 3, "tools": loose})
    assert _prompt_tokens(none) == _num_tokens(gateway, ASK)
    assert _prompt_tokens(auto) == _num_tokens(gateway, ASK, tools=loose) > _prompt_tokens(none)
