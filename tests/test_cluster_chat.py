import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from rich.console import Console
from stub_server import DONE, Answer, StubServer, event

from cluster import chat
from cluster.chat import Chat, ChatError, Reply, printable, talk, usage_line

USAGE = {
    "prompt_tokens": 200,
    "completion_tokens": 5,
    "prompt_cache_hit_tokens": 128,
    "prompt_cache_miss_tokens": 72,
    "cost": "0.000001234",
}


def _delta(**delta: str) -> bytes:
    return event(choices=[{"delta": delta, "finish_reason": None}])


def _echo(path: str, body: dict[str, Any]) -> Answer:
    assert path == "/v1/chat/completions"
    return iter(
        [
            _delta(role="assistant", content=""),
            _delta(reasoning_content="hm"),
            _delta(content=f"you said\u2028{body['messages'][-1]['content']}"),
            event(choices=[], usage=USAGE),
            DONE,
        ]
    )


def _lines(*lines: str) -> Callable[[str], str]:
    left = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def _talk(server: StubServer, *lines: str, thinking: bool = False) -> str:
    screen = io.StringIO()
    console = Console(
        file=screen, force_terminal=True, color_system="standard", markup=False, highlight=False, width=200
    )
    with httpx.Client(base_url=server.url) as http:
        talk(Chat(http, "stub", thinking), console, _lines(*lines))
    return screen.getvalue()


def test_a_conversation_goes_on_until_it_is_reset() -> None:
    with StubServer(_echo).running() as server:
        screen = _talk(server, "one", "", "two", "/reset", "three", "/exit", "four")
    contents = [[message["content"] for message in body["messages"]] for body in server.seen]
    assert contents == [["one"], ["one", "you said\u2028one", "two"], ["three"]]
    assert [message["role"] for message in server.seen[1]["messages"]] == ["user", "assistant", "user"]
    assert server.seen[0]["thinking"] == {"type": "disabled"}
    assert "\x1b[2mhm\x1b[0m" in screen  # dim
    assert "you saidone" in screen
    assert "prompt 200 (hit 128, miss 72)  answer 5 tokens  $0.000001234" in screen


def test_errors_are_shown_and_the_conversation_goes_on() -> None:
    answers: Iterator[Answer] = iter(
        [
            (429, b'{"error": {"message": "slow down [1]"}}'),
            iter([_delta(content="half"), event(error={"message": "workers lost"})]),
            iter([_delta(content="cut off")]),
            iter([b"data: oops\n\n"]),
        ]
    )
    with StubServer(lambda path, body: next(answers)).running() as server:
        screen = _talk(server, "a", "b", "c", "d")
    for sentence in ("HTTP 429: slow down [1]", "workers lost", "the reply was cut", "malformed"):
        assert sentence in screen
    assert [message["content"] for message in server.seen[3]["messages"]] == [
        "b",
        "half",
        "c",
        "cut off",
        "d",
    ]


def test_ctrl_c_ends_the_reply_only(monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()

    def endless(path: str, body: dict[str, Any]) -> Answer:
        if body["messages"][-1]["content"] == "short":
            return _echo(path, body)

        def stream() -> Iterator[bytes]:
            while not left.wait(0.001):
                yield _delta(content="more ")

        return stream()

    shown = 0

    def interrupt(text: str) -> str:
        nonlocal shown
        shown += 1
        if shown == 3:
            raise KeyboardInterrupt
        return printable(text)

    monkeypatch.setattr(chat, "printable", interrupt)
    with StubServer(endless).running() as server:
        try:
            screen = _talk(server, "long", "short")
            assert server.hung_up.wait(10)
        finally:
            left.set()
    assert "(stopped)" in screen
    assert [message["content"] for message in server.seen[1]["messages"]] == [
        "long",
        "more more more ",
        "short",
    ]
    assert "you said" in screen


def test_a_reply_that_never_began_leaves_no_message() -> None:
    with (
        StubServer(lambda path, body: (500, b"?")).running() as server,
        httpx.Client(base_url=server.url) as http,
    ):
        conversation = Chat(http, "stub", thinking=True)
        with pytest.raises(ChatError, match="HTTP 500"):
            list(conversation.stream("x", Reply()))
    assert conversation.messages == []
    assert server.seen[0]["thinking"] == {"type": "enabled"}


def test_words_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31m\x07b\n\té\r") == "a[31mb\n\té"


def test_usage_of_a_server_without_a_cache() -> None:
    assert usage_line({"prompt_tokens": 3, "completion_tokens": 4}) == "prompt 3  answer 4 tokens"


def test_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    monkeypatch.setattr("builtins.input", _lines("hello"))
    with StubServer(_echo).running() as server:
        assert chat.main(["--url", server.url, "--thinking"]) == 0
        assert "hello" in capsys.readouterr().out
        assert chat.main(["--url", server.url, "--model", "other"]) == 1
        assert "no model 'other'" in capsys.readouterr().out
    assert server.keys == ["Bearer from the environment"]
    assert chat.main(["--url", server.url]) == 1
