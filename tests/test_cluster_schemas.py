import contextlib
import json
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import example, given

from cluster.errors import ApiError, ContextTooLong, InvalidRequest
from cluster.schemas import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    IGNORED,
    ChatRequest,
    CompletionRequest,
    Limits,
    parse_chat,
    parse_completion,
)
from workers.request import SamplingParams

LIMITS = Limits(max_context=1000, vocab_size=512, temperature=0.6, top_p=0.95)
HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "m", "messages": HELLO}
COMPLETION = {"model": "m", "prompt": "hello"}


def _chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps(CHAT | fields).encode(), LIMITS)


def _completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps(COMPLETION | fields).encode(), LIMITS)


def test_absent_fields_get_the_model_s_defaults() -> None:
    request = _chat()
    assert request.messages[0].text == "hello"
    assert not (request.stream)
    assert not (request.thinks)
    assert not (request.include_usage)
    assert not (request.stops)
    sampling = request.sampling(LIMITS, num_prompt_tokens=10)
    assert sampling == SamplingParams(max_tokens=990, seed=sampling.seed, temperature=0.6, top_p=0.95)
    assert request.sampling(LIMITS, num_prompt_tokens=10).seed != sampling.seed
    assert _completion().sampling(LIMITS, num_prompt_tokens=10).max_tokens == 16


def test_every_field_reaches_the_worker() -> None:
    shared = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -2,
        "repetition_penalty": 1.5, "seed": -5, "stop_token_ids": [7, 511], "ignore_eos": True, "min_tokens": 2,
        "logit_bias": {"3": -100, "511": 1.5}, "stop": ["a", "bc"], "stream": True, "max_tokens": 5,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    expected = SamplingParams(
        max_tokens=5, seed=-5, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, presence_penalty=1.0,
        frequency_penalty=-2.0, repetition_penalty=1.5, logit_bias={3: -100.0, 511: 1.5}, stop_token_ids=(7, 511),
        ignore_eos=True, min_tokens=2, logprobs=3,
    )  # fmt: skip
    for request in (_chat(logprobs=True, top_logprobs=3, **shared), _completion(logprobs=3, **shared)):
        assert request.sampling(LIMITS, num_prompt_tokens=10) == expected
        assert request.stops == ["a", "bc"]
        assert request.stream
        assert request.include_usage


def test_what_a_reply_tells_besides_its_text_is_off_unless_asked_for() -> None:
    for parse in (_chat, _completion):
        assert not parse(stream=True).return_progress
        assert parse(stream=True, return_progress=True).return_progress
        assert not parse(return_progress=False).return_progress
        assert not parse().selected_pages
        assert not parse(debug={}, stop="x").selected_pages
        assert not parse(debug={"selected_pages": False}, stop="x").selected_pages
        assert parse(debug={"selected_pages": True}, stop=[], stop_token_ids=[7]).selected_pages


def test_a_null_is_an_absent_field() -> None:
    nulls = dict.fromkeys({*ChatRequest.__struct_fields__, *CHAT_NEUTRAL, *IGNORED} - set(CHAT))
    assert _chat(**nulls) == _chat()
    nulls = dict.fromkeys({*CompletionRequest.__struct_fields__, *COMPLETION_NEUTRAL} - set(COMPLETION))
    assert _completion(**nulls) == _completion()


def test_neutral_and_ignored_fields_change_nothing() -> None:
    for name, values in CHAT_NEUTRAL.items():
        for value in values:
            assert _chat(**{name: value}) == _chat()
    assert _chat(user="me", metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True) == _chat()
    echoed = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "tool_calls": None}
    named = {"role": "user", "content": "hello", "name": "Ann"}
    assert len(_chat(messages=[named, echoed, *HELLO]).messages) == 3


PREFIX = {"role": "assistant", "content": "x", "prefix": True}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_tools_and_their_choice() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}]
    for choice in (None, "auto"):
        request = _chat(tools=tools, tool_choice=choice)
        assert [tool.name for tool in request.offered_tools] == ["f"]
    assert _chat(tools=tools, tool_choice="none").offered_tools == []
    assert _chat(tools=[], tool_choice="none") == _chat(tool_choice="none")


def test_calls_and_results_in_a_history() -> None:
    """Also as a client sends them that has put the deltas of a stream together."""
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL | {"index": 0}],
        "function_call": None,
    }
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}], "name": "f"}
    messages = _chat(messages=[*HELLO, called, result]).messages
    assert messages[1].tool_calls[0].function.name == "f"
    assert messages[2].text == "x"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"thinking": True}, "thinking": {"type": "enabled"}}, True),
    ],
)
def test_thinking_is_switched_as_deepseek_and_as_vllm_do(fields: dict[str, Any], expected: bool) -> None:
    assert _chat(**fields).thinks is expected


def test_what_is_written_in_more_than_one_way() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "a\nb"
    assert _chat(stop="x").stops == ["x"]
    assert _chat(max_tokens=7, max_completion_tokens=3).max_output == 3
    assert _chat(logprobs=True).num_logprobs == 0
    assert _chat(top_k=-1).sampling(LIMITS, num_prompt_tokens=1).top_k == 0
    assert _chat(temperature=1e-9).sampling(LIMITS, num_prompt_tokens=1).temperature == 0
    for prompt in ("hi", ["hi"]):
        assert _completion(prompt=prompt).prompt == ["hi"]
    for ids in ([1, 511], [[1, 511]]):
        assert _completion(prompt=ids).prompt == [[1, 511]]
    assert _completion(prompt=["a", [1, 2]]).prompt == ["a", [1, 2]]


def test_prompt_and_answer_must_fit_into_the_context() -> None:
    assert _chat(max_tokens=10).sampling(LIMITS, num_prompt_tokens=990).max_tokens == 10
    assert _chat().sampling(LIMITS, num_prompt_tokens=999).max_tokens == 1
    for max_tokens, num_prompt_tokens in [(11, 990), (10**30, 1), (None, 1000), (None, 2000), (1, 1000)]:
        with pytest.raises(ContextTooLong, match="context holds 1000"):
            _chat(max_tokens=max_tokens).sampling(LIMITS, num_prompt_tokens=num_prompt_tokens)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"model": None}, "model", "required"),
    ({"model": ""}, "model", "length >= 1"),
    ({"model": 5}, "model", "Expected `str`, got `int`"),
    ({"temperature": 2.1}, "temperature", "<= 2"),
    ({"temperature": -0.1}, "temperature", ">= 0"),
    ({"temperature": True}, "temperature", "got `bool`"),
    ({"top_p": 0}, "top_p", "> 0"),
    ({"top_p": 1.1}, "top_p", "<= 1"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"top_k": 1.5}, "top_k", "Expected `int`"),
    ({"min_p": 1.01}, "min_p", "<= 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", ">= 0.01"),
    ({"presence_penalty": 2.5}, "presence_penalty", "<= 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", ">= -2"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"seed": 2**63}, "seed", str(2**63 - 1)),
    ({"seed": "1"}, "seed", "Expected `int`"),
    ({"n": 0}, "n", ">= 1"),
    ({"n": 129}, "n", "<= 128"),
    ({"n": True}, "n", "Expected `int`"),
    ({"n": 2, "stream": True, "return_progress": True}, "return_progress", "single choice"),
    ({"n": 2, "debug": {"selected_pages": True}}, "debug.selected_pages", "single choice"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "more than the 5 tokens"),
    ({"store": True}, "store", "not supported other than false"),
    ({"stop": ""}, "stop", "length >= 1"),
    ({"stop": ["a", ""]}, "stop[1]", "length >= 1"),
    ({"stop": ["a"] * 5}, "stop", "length <= 4"),
    ({"stop": "a" * 1001}, "stop", "length <= 1000"),
    ({"stop": 5}, "stop", "Expected `str | array`"),
    ({"stop_token_ids": [1, 512]}, "stop_token_ids[1]", "below 512"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", ">= 0"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "length <= 64"),
    ({"logit_bias": {"512": 1}}, "logit_bias", "below 512"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"٣": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]", "<= 100"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "<= 1024"),
    ({"stream_options": {}}, "stream_options", "stream is true"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "bool"),
    ({"stream": "yes"}, "stream", "Expected `bool`"),
    ({"return_progress": True}, "return_progress", "stream is true"),
    ({"stream": False, "return_progress": True}, "return_progress", "stream is true"),
    ({"stream": True, "return_progress": 1}, "return_progress", "Expected `bool`"),
    ({"debug": True}, "debug", "Expected `object`"),
    ({"debug": {"selected_pages": 1}}, "debug.selected_pages", "Expected `bool`"),
    ({"debug": {"selected_rows": True}}, "debug", "unknown field `selected_rows`"),
    ({"debug": {"selected_pages": True}, "stop": "x"}, "debug.selected_pages", "together with stop"),
    ({"frobnicate": 1}, "frobnicate", "not a field"),
]  # fmt: skip
WRONG_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "required"),
    ({"messages": []}, "messages", "length >= 1"),
    ({"messages": {}}, "messages", "Expected `array`"),
    ({"messages": [5]}, "messages[0]", "Expected `object`"),
    ({"messages": [*HELLO, {"content": "x"}]}, "messages[1].role", "required"),
    ({"messages": [*HELLO, {"role": "wizard", "content": "x"}]}, "messages[1].role", "must be one of"),
    ({"messages": [*HELLO, {"role": 5, "content": "x"}]}, "messages[1].role", "Expected `str`"),
    ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "is required"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].type", "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "required"),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
     "messages[0].reasoning_content", "assistant"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id", "is required"),
    ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "messages[0].mood", "not a field"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", ">= 1"),
    ({"logprobs": 3}, "logprobs", "Expected `bool`"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs is true"),
    ({"tools": [{}]}, "tools[0].type", "is required"),
    ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type", "custom"),
    ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name", "1 to 64 letters"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools[1].function.name", "there twice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
     "tools[0].function.parameters", "must be an object"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", "length <= 128"),
    ({"messages": [*HELLO, PREFIX], "response_format": {"type": "json_object"}}, "messages[1].prefix", "response_format"),
    ({"messages": [*HELLO, PREFIX], "tools": [TOOL], "tool_choice": "required"}, "messages[1].prefix", "must be made"),
    ({"tool_choice": "f"}, "tool_choice", "f"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name", "none of the tools"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}]},
     "messages[1].tool_calls[0].function.arguments", "is required"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{**CALL, "x": 1}]}]},
     "messages[1].tool_calls[0].x", "not a field"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [5]}]}, "messages[1].tool_calls[0]", "Expected `object`"),
    ({"tool_choice": "required"}, "tool_choice", "only where there are tools"),
    ({"response_format": {"type": "grammar"}}, "response_format.type", "grammar"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"audio": {}}, "audio", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"thinking": True}, "thinking", "Expected `object`"),
    ({"thinking": {"type": "yes"}}, "thinking.type", "yes"),
    ({"chat_template_kwargs": {"thinking": True, "x": 1}}, "chat_template_kwargs", "unknown field `x`"),
    ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}},
     "chat_template_kwargs.thinking", "contradicts"),
    ({"prompt": "x"}, "prompt", "not a field"),
]  # fmt: skip
WRONG_COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "required"),
    ({"prompt": ""}, "prompt", "length >= 1"),
    ({"prompt": []}, "prompt", "length >= 1"),
    ({"prompt": [[]]}, "prompt[0]", "length >= 1"),
    ({"prompt": ["a", ""]}, "prompt[1]", "length >= 1"),
    ({"prompt": ["a", 1]}, "prompt[1]", "Expected `str | array`"),
    ({"prompt": [[1], [2, 512]]}, "prompt[1][1]", "below 512"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "65 prompts"),
    ({"prompt": [1, 512]}, "prompt[1]", "below 512"),
    ({"prompt": [1, -1]}, "prompt[1]", ">= 0"),
    ({"prompt": [1, "a"]}, "prompt[1]", "Expected `int`"),
    ({"prompt": [1, 2.5]}, "prompt[1]", "Expected `int`"),
    ({"prompt": 5}, "prompt", "Expected `str | array`"),
    ({"logprobs": 21}, "logprobs", "<= 20"),
    ({"logprobs": True}, "logprobs", "Expected `int`"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"echo": True, "logprobs": 0}, "echo", "together with logprobs"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "not a field"),
]


@pytest.mark.parametrize(("fields", "param", "sentence"), [*WRONG, *WRONG_CHAT], ids=str)
def test_a_wrong_chat_request_is_refused_by_the_field_s_name(
    fields: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _chat(**fields)
    assert caught.value.param == param
    assert sentence in caught.value.message
    assert caught.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize(("fields", "param", "sentence"), [*WRONG, *WRONG_COMPLETION], ids=str)
def test_a_wrong_completion_request_is_refused_by_the_field_s_name(
    fields: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _completion(**fields)
    assert caught.value.param == param
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b'{"model": NaN}', "byte 10"),
        (b'{"model": -Infinity}', "byte 11"),
        (b'{"temperature": 1e999}', "out of range"),
        (b'{"model": "m"}x', "byte 15"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"\xed\xa0\x80": 1}', "UTF-8"),
        (b'{"model": "\\ud800"}', "JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_what_is_no_json_object_is_refused(body: bytes, sentence: str) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(InvalidRequest, match=sentence):
            parse(body, LIMITS)


def test_an_error_never_repeats_much_of_the_body() -> None:
    long = "x" * 10**5
    for fields in ({long: 1}, {"model": 1, "stop": [long]}, {"thinking": {"type": long}}, {"thinking": {long: 1}},
                   {"messages": [{"role": long}]}, {"messages": [{"role": "user", long: 1}]}):  # fmt: skip
        with pytest.raises(InvalidRequest) as caught:
            _chat(**fields)
        assert len(caught.value.body()) < 1000


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "reasoning_content", "tool_calls", "x"]),
        st.sampled_from(["system", "user", "assistant", None]) | VALUES,
    ),
    max_size=3,
)
CHAT_FIELDS = sorted({*ChatRequest.__struct_fields__, *CHAT_NEUTRAL, *IGNORED, "other"})
COMPLETION_FIELDS = sorted({*CompletionRequest.__struct_fields__, *COMPLETION_NEUTRAL, *IGNORED, "other"})
BODIES = st.builds(
    dict,
    st.dictionaries(st.sampled_from(sorted({*CHAT_FIELDS, *COMPLETION_FIELDS})), VALUES, max_size=4),
    messages=st.just(HELLO) | MESSAGES,
)


def _harmless(parse: Any, body: bytes) -> None:
    """Parsing refuses with an ApiError or gives something a worker can be sent."""
    with contextlib.suppress(ApiError):
        sampling = parse(body, LIMITS).sampling(LIMITS, num_prompt_tokens=10)
        msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=SamplingParams)
        assert 1 <= sampling.max_tokens <= 990


@given(st.binary(max_size=40) | VALUES.map(msgspec.json.encode))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    _harmless(parse_chat, body)
    _harmless(parse_completion, body)


@given(BODIES)
@example({"logit_bias": {"³": 1}, "messages": HELLO})
def test_no_fields_raise_anything_else(fields: dict[str, Any]) -> None:
    chat = {name: value for name, value in fields.items() if name in CHAT_FIELDS}
    completion = {name: value for name, value in fields.items() if name in COMPLETION_FIELDS}
    _harmless(parse_chat, msgspec.json.encode({"model": "m"} | chat))
    _harmless(parse_completion, msgspec.json.encode(COMPLETION | completion))
