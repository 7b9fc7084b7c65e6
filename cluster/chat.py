"""A small streaming chat in the terminal: `python -m cluster.chat`. Knows only HTTP.

/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends the reply that is being written. `--document FILE` puts a
text before the conversation, which /reset keeps; `--ask QUESTION` asks and leaves.
"""

import argparse
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cluster import client

READ_TIMEOUT_S = 120.0  # between two pieces of a reply


class ChatError(Exception):
    """The server refused or failed, or the document cannot be used; the sentence says why."""


class Text(NamedTuple):
    """A piece of the answer, or of the reasoning before it."""

    text: str
    is_reasoning: bool


class Reading(NamedTuple):
    """How many tokens of the prompt have been read; those in the cache count as read."""

    total: int
    cache: int
    processed: int


@dataclass
class Reply:
    content: str = ""
    usage: dict[str, Any] | None = None
    first_token_s: float | None = None  # from the question to the first piece of text
    total_s: float = 0.0


@dataclass
class Chat:
    """A conversation with one model, about a document where there is one."""

    http: httpx.Client
    model: str
    thinking: bool
    document: str | None = None
    max_tokens: int | None = None  # of one answer; None: what the server allows
    temperature: float | None = None  # None: the server's default
    messages: list[dict[str, str]] = field(default_factory=list)  # the turns

    def stream(self, text: str, reply: Reply) -> Generator[Text | Reading, None, None]:
        """Says `text` and yields the answer as it comes, before it how far a document has been read; fills `reply`.

        What was said and answered joins the conversation, also where the reader stops half-way. Raises ChatError.
        """
        self.messages.append({"role": "user", "content": text})
        started = time.monotonic()
        try:
            for event in self._events(reply):
                if reply.first_token_s is None and isinstance(event, Text):
                    reply.first_token_s = time.monotonic() - started
                yield event
        finally:
            reply.total_s = time.monotonic() - started
            if reply.content:
                self.messages.append({"role": "assistant", "content": reply.content})
            else:
                self.messages.pop()

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.messages,
            "thinking": {"type": "enabled" if self.thinking else "disabled"},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.document is not None:
            body["messages"] = [{"role": "system", "content": self.document}, *self.messages]
            body["return_progress"] = True
        return body

    def _events(self, reply: Reply) -> Iterator[Text | Reading]:
        events = client.Events()
        with self.http.stream("POST", "/v1/chat/completions", json=self._body()) as answer:
            if answer.status_code != 200:
                raise ChatError(client.error_text(answer.status_code, answer.read()))
            for data in answer.iter_bytes():
                for event in events.push(data):
                    yield from _pieces(event, reply)
        if not events.done:
            raise ChatError("the reply was cut")


def _pieces(event: dict[str, Any], reply: Reply) -> Iterator[Text | Reading]:
    if "error" in event:
        raise ChatError(client.error_message(event))
    reply.usage = event.get("usage") or reply.usage
    if progress := event.get("prompt_progress"):
        yield Reading(progress["total"], progress["cache"], progress["processed"])
    for choice in event.get("choices", []):
        if reasoning := choice["delta"].get("reasoning_content"):
            yield Text(reasoning, is_reasoning=True)
        if content := choice["delta"].get("content"):
            reply.content += content
            yield Text(content, is_reasoning=False)


class ReadingBar:
    """How far the prompt has been read: on a terminal a bar that goes away at the end, elsewhere one line at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("reading"),
            BarColumn(),
            TextColumn(
                "{task.completed:.0f} of {task.total:.0f} tokens, {task.fields[cache]} from the cache"
            ),
            console=console,
            transient=True,
            auto_refresh=False,
        )
        self._latest: Reading | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, reading: Reading) -> None:
        self._latest = reading
        if not self._console.is_interactive:
            return
        if not self._bar.tasks:
            self._bar.add_task(
                "reading", total=reading.total, completed=reading.processed, cache=reading.cache
            )
            self._bar.start()
        (task,) = self._bar.task_ids
        self._bar.update(task, completed=reading.processed, cache=reading.cache, refresh=True)

    def close(self) -> None:
        """The prompt has been read, or will not be. Safe to call twice."""
        if self._bar.tasks:
            self._bar.stop()
        elif self._latest is not None:
            self._console.print(reading_line(self._latest), style="dim", soft_wrap=True)
        self._latest = None


def talk(chat: Chat, console: Console, read: Callable[[str], str]) -> None:
    """Reads lines and shows replies until /exit or the end of input."""
    while True:
        try:
            line = read("> ").encode(errors="replace").decode().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            chat.messages.clear()
            console.print("(forgotten)", style="dim")
        elif line:
            _show(chat, line, console)


def ask(chat: Chat, console: Console, questions: list[str]) -> bool:
    """Asks one question after another and shows the replies; False at the first that gets no whole reply."""
    for question in questions:
        console.print(f"> {printable(question)}", soft_wrap=True)
        if not _show(chat, question, console):
            return False
    return True


def _show(chat: Chat, line: str, console: Console) -> bool:
    """Whether the reply came to its end."""
    reply, whole = Reply(), False
    try:
        with closing(chat.stream(line, reply)) as events, ReadingBar(console) as bar:
            for event in events:
                if isinstance(event, Reading):
                    bar.show(event)
                    continue
                bar.close()
                style = "dim" if event.is_reasoning else None
                console.print(printable(event.text), style=style, end="", soft_wrap=True)
        whole = True
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim", end="")
    except (ChatError, httpx.HTTPError, msgspec.DecodeError) as error:
        console.print(f"\n{error or type(error).__name__}", style="red", end="", soft_wrap=True)
    console.print()
    if reply.usage:
        console.print(
            reply_line(reply.usage, reply.first_token_s, reply.total_s), style="dim", soft_wrap=True
        )
    return whole


def printable(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def reading_line(reading: Reading) -> str:
    return f"read {reading.processed} of {reading.total} tokens, {reading.cache} from the cache"


def reply_line(usage: dict[str, Any], first_token_s: float | None, total_s: float) -> str:
    """What a reply took, in tokens, seconds and dollars. `first_token_s` None: it had no text."""
    parts = [f"prompt {usage['prompt_tokens']}", f"answer {usage['completion_tokens']} tokens"]
    if "prompt_cache_hit_tokens" in usage:
        parts[0] += f" (hit {usage['prompt_cache_hit_tokens']}, miss {usage['prompt_cache_miss_tokens']})"
    if first_token_s is not None:
        parts.append(f"first token {first_token_s:.2f} s")
    parts.append(f"total {total_s:.2f} s")
    if "cost" in usage:
        parts.append(f"${usage['cost']}")
    return "  ".join(parts)


def read_document(path: Path) -> str:
    """The text of a file. Raises ChatError where it cannot be read, is not UTF-8 or is empty."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ChatError(f"--document {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ChatError(f"--document {path}: not UTF-8: byte {error.start} is wrong") from None
    if not text.strip():
        raise ChatError(f"--document {path}: empty")
    return text


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    console = Console(markup=False, highlight=False)
    try:
        document = read_document(arguments.document) if arguments.document else None
    except ChatError as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 1
    with httpx.Client(
        base_url=arguments.url,
        headers=client.headers(arguments.api_key),
        timeout=client.timeouts(READ_TIMEOUT_S),
    ) as http:
        try:
            answer = http.get("/v1/models")
            if answer.status_code != 200:
                raise ChatError(client.error_text(answer.status_code, answer.content))
            model = client.choose_model(answer.json(), arguments.model)["id"]
        except (httpx.HTTPError, httpx.InvalidURL, ChatError, ValueError) as error:
            console.print(f"{arguments.url}: {error}", style="red")
            return 1
        chat = Chat(http, model, arguments.thinking, document, arguments.max_tokens, arguments.temperature)
        if document is not None:
            console.print(
                f"{arguments.document}: {len(document)} characters, read with each question",
                style="dim",
                soft_wrap=True,
            )
        if arguments.ask:
            return 0 if ask(chat, console, arguments.ask) else 1
        console.print(f"{model}: /reset forgets, /exit leaves, Ctrl-C ends a reply", style="dim")
        talk(chat, console, input)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.chat", description="A chat in the terminal.")
    client.add_options(parser)
    parser.add_argument(
        "--thinking", action="store_true", help="let the model reason first; its reasoning is shown dim"
    )
    parser.add_argument(
        "--max-tokens", type=int, help="of an answer, reasoning included; as many as fit if left out"
    )
    parser.add_argument("--temperature", type=float, help="0: always the likeliest token")
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="a UTF-8 text to talk about; /reset keeps it"
    )
    parser.add_argument(
        "--ask",
        action="append",
        metavar="QUESTION",
        help="ask this and leave; may be repeated. The exit status is 0 if all were answered, 1 otherwise",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
