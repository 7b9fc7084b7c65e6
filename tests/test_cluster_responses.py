import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from stub_server import StubServer

from cluster.chat_encoding import Piece
from cluster.logprobs import ChatLogprobsWriter, CompletionLogprobsWriter
from cluster.output import Delta
from cluster.reply_parser import CallDelta
from cluster.responses import (
    DONE,
    ChatReply,
    CompletionReply,
    Debug,
    ModelCard,
    ModelList,
    PromptProgress,
    Timing,
    Usage,
    Whole,
    encode,
    sse,
)
from cluster.tokenizer import Tokenizer
from workers.request import TokenLogprobs
from workers.tiny import build_tokenizer

USAGE = Usage.of(
    hit_tokens=128, miss_tokens=72, output_tokens=10, reasoning_tokens=4, cost_nanodollars=1_234_567_890
)
TIMING = Timing(queue=0.1, prefill=0.2, ship=0.3, first_token=0.4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(400).save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def _chat(*, include_usage: bool = False) -> ChatReply:
    return ChatReply(id="chatcmpl-1", model="m", created=7, include_usage=include_usage)


def _completion(*, include_usage: bool = False) -> CompletionReply:
    return CompletionReply(id="cmpl-1", model="m", created=7, include_usage=include_usage)


def _event(data: bytes) -> dict[str, Any]:
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    event: dict[str, Any] = json.loads(data[6:])
    return event


def test_usage() -> None:
    assert json.loads(encode(USAGE)) == {
        "prompt_tokens": 200,
        "completion_tokens": 10,
        "total_tokens": 210,
        "prompt_cache_hit_tokens": 128,
        "prompt_cache_miss_tokens": 72,
        "prompt_tokens_details": {"cached_tokens": 128},
        "completion_tokens_details": {"reasoning_tokens": 4},
        "cost": "1.234567890",
        "cost_nanodollars": 1_234_567_890,
    }


def test_the_usage_of_several_choices_counts_each_token_once() -> None:
    more = Usage.of(hit_tokens=0, miss_tokens=0, output_tokens=5, reasoning_tokens=1, cost_nanodollars=70)
    assert Usage.total([USAGE]) == USAGE
    assert Usage.total([USAGE, more]) == Usage.of(
        hit_tokens=128, miss_tokens=72, output_tokens=15, reasoning_tokens=5, cost_nanodollars=1_234_567_960
    )


def test_a_whole_chat_completion() -> None:
    body = _chat().whole([Whole(Delta("why", "because"), "stop")], USAGE, TIMING)
    assert json.loads(body) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "because", "reasoning_content": "why"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": json.loads(encode(USAGE)),
        "timing": {"queue": 0.1, "prefill": 0.2, "ship": 0.3, "first_token": 0.4},
    }
    ChatCompletion.model_validate_json(body, strict=True)
    plain = json.loads(_chat().whole([Whole(Delta("", "x"), "length")], USAGE, TIMING))
    assert "reasoning_content" not in plain["choices"][0]["message"]


def test_a_streamed_chat_completion() -> None:
    reply = _chat(include_usage=True)
    events = [
        _event(data)
        for data in (
            reply.start(),
            reply.delta(Delta("why", "")),
            reply.delta(Delta("", "because")),
            reply.end("stop"),
            reply.usage(USAGE, TIMING),
        )
    ]
    for event in events:
        ChatCompletionChunk.model_validate(event)
        assert event["object"] == "chat.completion.chunk"
    *chunks, last = events
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "why"},
        {"content": "because"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert [chunk["usage"] for chunk in chunks] == [None] * 4
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 210
    assert last["timing"]["first_token"] == 0.4
    assert "usage" not in _event(_chat().start())


CALLS = (CallDelta(0, "call_a", "f", '{"x": '), CallDelta(1, "call_b", "g", "{}"))
WHOLE_CALLS = [
    {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"x": '}},
    {"id": "call_b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
]


def test_tool_calls() -> None:
    body = _chat().whole([Whole(Delta("why", "", CALLS), "tool_calls")], USAGE, TIMING)
    ChatCompletion.model_validate_json(body, strict=True)
    choice = json.loads(body)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "why",
        "tool_calls": WHOLE_CALLS,
    }
    spoken = json.loads(_chat().whole([Whole(Delta("", "Wait.", CALLS), "tool_calls")], USAGE, TIMING))
    assert spoken["choices"][0]["message"]["content"] == "Wait."


def test_streamed_tool_calls() -> None:
    """As the SDK puts them together."""
    more = Delta("", "", (CallDelta(0, arguments="1}"),))
    events = [
        _event(_chat().delta(Delta("", "", CALLS))),
        _event(_chat().delta(more)),
        _event(_chat().end("tool_calls")),
    ]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas == [
        {"tool_calls": [{"index": index, **call} for index, call in enumerate(WHOLE_CALLS)]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {},
    ]
    state = ChatCompletionStreamState()
    for event in events:
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
    calls = state.get_final_completion().choices[0].message.tool_calls
    assert calls is not None
    assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
        ("call_a", "f", '{"x": 1}'),
        ("call_b", "g", "{}"),
    ]


def test_completions() -> None:
    body = _completion().whole([Whole(Delta("", "text"), "length")], USAGE, TIMING)
    assert Completion.model_validate_json(body, strict=True).choices[0].text == "text"
    both = json.loads(_completion().whole([Whole(Delta("", t), "stop") for t in "ab"], USAGE, TIMING))
    assert [(choice["index"], choice["text"]) for choice in both["choices"]] == [(0, "a"), (1, "b")]
    reply = _completion(include_usage=True)
    events = [
        _event(reply.delta(Delta("", "a"))),
        _event(reply.end("stop")),
        _event(reply.usage(USAGE, TIMING)),
    ]
    assert {event["object"] for event in events} == {"text_completion"}
    assert events[0]["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]
    assert events[1]["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]
    assert events[2]["choices"] == []


@pytest.mark.parametrize("include_usage", [True, False])
def test_progress_is_an_event_without_choices(include_usage: bool) -> None:
    progress = PromptProgress(total=500, cache=128, processed=320)
    for reply, kind in ((_chat(include_usage=include_usage), ChatCompletionChunk),
                        (_completion(include_usage=include_usage), Completion)):  # fmt: skip
        event = _event(reply.progress(progress))
        assert kind.model_validate(event).choices == []
        assert event.pop("created") == 7
        assert event.pop("usage", "absent") is (None if include_usage else "absent")
        del event["id"], event["object"], event["model"]
        assert event == {"choices": [], "prompt_progress": {"total": 500, "cache": 128, "processed": 320}}


def test_the_openai_sdk_reads_a_stream_with_progress_and_debug() -> None:
    progress = [PromptProgress(total=500, cache=128, processed=count) for count in (128, 320, 500)]
    debug = Debug(selected_pages=[[3, 0]])
    chat, completion = _chat(include_usage=True), _completion()
    streams = {
        "/v1/chat/completions": [
            chat.start(),
            *map(chat.progress, progress),
            chat.delta(Delta("", "text")),
            chat.end("stop"),
            chat.usage(USAGE, TIMING, debug),
            DONE,
        ],
        "/v1/completions": [
            *map(completion.progress, progress),
            completion.delta(Delta("", "text")),
            completion.end("stop", debug),
            DONE,
        ],
    }
    with (
        StubServer(lambda path, body: iter(streams[path])).running() as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as sdk,
    ):
        extra = {"return_progress": True, "debug": {"selected_pages": True}}
        hello: Any = [{"role": "user", "content": "hello"}]
        chunks = list(sdk.chat.completions.create(model="m", messages=hello, stream=True, extra_body=extra))
        pieces = list(sdk.completions.create(model="m", prompt="hello", stream=True, extra_body=extra))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "text"
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == "text"
    for events in (chunks, pieces):
        read = [event.prompt_progress["processed"] for event in events if hasattr(event, "prompt_progress")]  # type: ignore[attr-defined]
        assert read == [128, 320, 500]
        assert events[-1].debug == {"selected_pages": [[3, 0]]}  # type: ignore[attr-defined]
    assert server.seen[0]["return_progress"] is True


def test_debug_stands_beside_the_usage_or_in_the_last_event() -> None:
    debug = Debug(selected_pages=[[3, 0], [1, 2]])
    for reply in (_chat(), _completion()):
        whole = json.loads(reply.whole([Whole(Delta("", "x"), "stop")], USAGE, TIMING, debug))
        last, usage = _event(reply.end("stop", debug)), _event(reply.usage(USAGE, TIMING, debug))
        assert [body["debug"] for body in (whole, last, usage)] == [{"selected_pages": [[3, 0], [1, 2]]}] * 3
        plain = json.loads(reply.whole([Whole(Delta("", "x"), "stop")], USAGE, TIMING))
        for body in (plain, _event(reply.end("stop")), _event(reply.delta(Delta("", "x")))):
            assert not {"debug", "prompt_progress"} & set(body)


def test_chat_logprobs(tokenizer: Tokenizer) -> None:
    euro = tokenizer.encode([Piece("€", False)])[0]
    (a,) = tokenizer.encode([Piece("a", False)])
    found = ChatLogprobsWriter(tokenizer).write(
        [a, euro], [TokenLogprobs(-0.5, [(a, -0.5), (euro, -1.5)]), TokenLogprobs(float("-inf"), [])]
    )
    reply = json.loads(_chat().whole([Whole(Delta("", "a"), "stop", found)], USAGE, TIMING))
    ChatCompletion.model_validate(reply)
    spelled = {"token": r"bytes:\xe2", "bytes": [0xE2]}
    assert reply["choices"][0]["logprobs"]["content"] == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}, {**spelled, "logprob": -1.5}],
        },
        {**spelled, "logprob": -9999.0, "top_logprobs": []},
    ]


def test_completion_logprobs_count_the_characters_before_each_token(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode([Piece("ab€c", False)]), tokenizer.eos_id, tokenizer.eos_id]
    entries = [TokenLogprobs(-1.0, [(tokens[0], -0.25)]) for _ in tokens]
    writer = CompletionLogprobsWriter(tokenizer)
    halves = [writer.write(tokens[:3], entries[:3]), writer.write(tokens[3:], entries[3:])]
    assert [offset for half in halves for offset in half.text_offset] == [0, 1, 2, 2, 2, 3, 4, 4]
    assert halves[0].tokens == ["a", "b", r"bytes:\xe2"]
    assert halves[0].top_logprobs[:2] == [{"a": -1.0}, {"a": -0.25, "b": -1.0}]
    body = _completion().whole([Whole(Delta("", "ab€c"), "stop", halves[0])], USAGE, TIMING)
    Completion.model_validate_json(body, strict=True)


def test_models() -> None:
    models = ModelList(data=[ModelCard(id="m", created=7, max_model_len=1000, vocab_size=512)])
    body = json.loads(encode(models))
    assert body["object"] == "list"
    assert Model.model_validate(body["data"][0]).owned_by == "lightship"


def test_an_event_is_one_line_to_every_client() -> None:
    text = "a\n\r\x0b\x0c\x1c\x85\u2028\u2029\N{GRINNING FACE}"
    data = sse(json.dumps({"text": text}, ensure_ascii=False).encode())
    assert len(data.decode().splitlines()) == 2
    assert _event(data) == {"text": text}
