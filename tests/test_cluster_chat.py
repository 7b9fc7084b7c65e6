import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from stub_server import DONE, Answer, StubServer, event

from cluster import chat
from cluster.chat import (
    Chat,
    ChatError,
    Reading,
    Reply,
    Text,
    ask,
    printable,
    read_document,
    reply_line,
    talk,
)

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


def _screen(*, terminal: bool = True) -> tuple[io.StringIO, Console]:
    screen = io.StringIO()
    console = Console(
        file=screen,
        force_terminal=terminal,
        force_interactive=terminal,
        color_system="standard" if terminal else None,
        markup=False,
        highlight=False,
        width=200,
    )
    return screen, console


def _talk(server: StubServer, *lines: str, thinking: bool = False, document: str | None = None) -> str:
    screen, console = _screen()
    with httpx.Client(base_url=server.url) as http:
        talk(Chat(http, "stub", thinking, document), console, _lines(*lines))
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
    assert "prompt 200 (hit 128, miss 72)  answer 5 tokens  first token " in screen
    assert "  $0.000001234" in screen
    assert not any("return_progress" in body for body in server.seen)


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


def test_what_a_reply_took() -> None:
    line = "prompt 200 (hit 128, miss 72)  answer 5 tokens  first token 0.12 s  total 3.46 s  $0.000001234"
    assert reply_line(USAGE, 0.123, 3.456) == line
    plain = {"prompt_tokens": 3, "completion_tokens": 4}  # of a server without a cache
    assert reply_line(plain, None, 1) == "prompt 3  answer 4 tokens  total 1.00 s"


def _read_and_echo(path: str, body: dict[str, Any]) -> Answer:
    progress = [{"total": 200, "cache": 64, "processed": processed} for processed in (64, 128, 200)]
    stream = [event(choices=[], prompt_progress=one) for one in progress]
    return iter([_delta(role="assistant", content=""), *stream, *list(_echo(path, body))[1:]])


def test_a_document_stays_before_the_conversation() -> None:
    with StubServer(_read_and_echo).running() as server:
        _talk(server, "one", "two", "/reset", "three", document="A long text.")
    for body, turns in zip(server.seen, (1, 3, 1), strict=True):
        assert body["messages"][0] == {"role": "system", "content": "A long text."}
        assert len(body["messages"]) == 1 + turns
        assert body["return_progress"] is True
    assert server.seen[2]["messages"][1] == {"role": "user", "content": "three"}


def test_how_far_the_prompt_has_been_read_comes_before_the_answer() -> None:
    reply = Reply()
    with StubServer(_read_and_echo).running() as server, httpx.Client(base_url=server.url) as http:
        events = list(Chat(http, "stub", thinking=False, document="x").stream("one", reply))
    assert events == [
        Reading(200, 64, 64),
        Reading(200, 64, 128),
        Reading(200, 64, 200),
        Text("hm", is_reasoning=True),
        Text("you said\u2028one", is_reasoning=False),
    ]
    assert reply.first_token_s is not None
    assert 0 < reply.first_token_s <= reply.total_s


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_a_line_elsewhere(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen, console = _screen(terminal=terminal)
    with StubServer(_read_and_echo).running() as server, httpx.Client(base_url=server.url) as http:
        assert ask(Chat(http, "stub", thinking=False, document="x"), console, ["one", "two"])
    shown = screen.getvalue()
    if terminal:
        for processed in (64, 128, 200):
            assert f"{processed} of 200 tokens, 64 from the cache" in shown
        assert "read 200" not in shown
    else:
        expected = ["> one", "read 200 of 200 tokens, 64 from the cache", "hmyou saidone"]
        lines = shown.replace("\u2028", "").splitlines()
        assert lines[:3] == expected
        assert lines[3].startswith("prompt 200 (hit 128")
        assert lines[4] == "> two"
        assert len(lines) == 8


def test_what_was_read_of_a_prompt_that_was_lost_is_shown() -> None:
    def lost(path: str, body: dict[str, Any]) -> Answer:
        progress = {"total": 200, "cache": 0, "processed": 64}
        return iter([event(choices=[], prompt_progress=progress), event(error={"message": "workers lost"})])

    screen, console = _screen(terminal=False)
    with StubServer(lost).running() as server, httpx.Client(base_url=server.url) as http:
        assert not ask(Chat(http, "stub", thinking=False, document="x"), console, ["one", "two"])
    assert screen.getvalue().splitlines() == [
        "> one",
        "read 64 of 200 tokens, 0 from the cache",
        "",
        "workers lost",
    ]
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "No such file"), (b"ab\xff", "not UTF-8: byte 2"), (b"", "empty"), (b" \n", "empty")],
)
def test_a_document_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, sentence: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ChatError, match=sentence):
        read_document(path)
    assert chat.main(["--document", str(path)]) == 1
    assert sentence in capsys.readouterr().out


def test_questions_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text"
    path.write_text("Größe [b]", encoding="utf-8")
    answers: list[Answer] = [(413, b'{"error": {"message": "the body is larger than 5 bytes"}}')]
    with StubServer(lambda *of: answers.pop() if answers else _read_and_echo(*of)).running() as server:
        common = ["--url", server.url, "--document", str(path)]
        assert chat.main([*common, "--ask", "one", "--ask", "two"]) == 1
        assert "HTTP 413: the body is larger than 5 bytes" in capsys.readouterr().out
        assert chat.main([*common, "--max-tokens", "7", "--ask", "one", "--ask", "two"]) == 0
    shown = capsys.readouterr().out
    assert ": 9 characters" in shown
    assert "> two" in shown
    contents = [[message["content"] for message in body["messages"]] for body in server.seen]
    about = "Größe [b]"
    assert [body.get("max_tokens") for body in server.seen] == [None, 7, 7]
    assert contents == [[about, "one"], [about, "one"], [about, "one", "you said\u2028one", "two"]]


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
