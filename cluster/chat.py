"""A small streaming chat in the terminal: `python -m cluster.chat`. Knows only HTTP.

/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends the reply that is being written.
"""

import argparse
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from rich.console import Console

from cluster import client

READ_TIMEOUT_S = 120.0  # between two pieces of a reply


class ChatError(Exception):
    """The server refused or failed; the sentence says why."""


@dataclass
class Reply:
    content: str = ""
    usage: dict[str, Any] | None = None


@dataclass
class Chat:
    """A conversation with one model."""

    http: httpx.Client
    model: str
    thinking: bool
    messages: list[dict[str, str]] = field(default_factory=list)

    def stream(self, text: str, reply: Reply) -> Generator[tuple[str, bool], None, None]:
        """Says `text` and yields (piece of the answer, whether it is reasoning); fills `reply` as it comes.

        What was said and answered joins the conversation, also where the reader stops half-way. Raises ChatError.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            yield from self._events(reply)
        finally:
            if reply.content:
                self.messages.append({"role": "assistant", "content": reply.content})
            else:
                self.messages.pop()

    def _events(self, reply: Reply) -> Iterator[tuple[str, bool]]:
        body = {
            "model": self.model,
            "messages": self.messages,
            "thinking": {"type": "enabled" if self.thinking else "disabled"},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        events = client.Events()
        with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise ChatError(client.error_text(answer.status_code, answer.read()))
            for data in answer.iter_bytes():
                for event in events.push(data):
                    yield from _pieces(event, reply)
        if not events.done:
            raise ChatError("the reply was cut")


def _pieces(event: dict[str, Any], reply: Reply) -> Iterator[tuple[str, bool]]:
    if "error" in event:
        raise ChatError(client.error_message(event))
    reply.usage = event.get("usage") or reply.usage
    for choice in event.get("choices", []):
        if reasoning := choice["delta"].get("reasoning_content"):
            yield reasoning, True
        if content := choice["delta"].get("content"):
            reply.content += content
            yield content, False


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


def _show(chat: Chat, line: str, console: Console) -> None:
    reply = Reply()
    try:
        with closing(chat.stream(line, reply)) as pieces:
            for text, is_reasoning in pieces:
                style = "dim" if is_reasoning else None
                console.print(printable(text), style=style, end="", soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim", end="")
    except (ChatError, httpx.HTTPError, msgspec.DecodeError) as error:
        console.print(f"\n{error or type(error).__name__}", style="red", end="")
    console.print()
    if reply.usage:
        console.print(usage_line(reply.usage), style="dim")


def printable(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def usage_line(usage: dict[str, Any]) -> str:
    parts = [f"prompt {usage['prompt_tokens']}", f"answer {usage['completion_tokens']} tokens"]
    if "prompt_cache_hit_tokens" in usage:
        parts[0] += f" (hit {usage['prompt_cache_hit_tokens']}, miss {usage['prompt_cache_miss_tokens']})"
    if "cost" in usage:
        parts.append(f"${usage['cost']}")
    return "  ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.chat", description="A chat in the terminal.")
    client.add_options(parser)
    parser.add_argument(
        "--thinking", action="store_true", help="let the model reason first; its reasoning is shown dim"
    )
    arguments = parser.parse_args(argv)
    console = Console(markup=False, highlight=False)
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
        console.print(f"{model}: /reset forgets, /exit leaves, Ctrl-C ends a reply", style="dim")
        talk(Chat(http, model, arguments.thinking), console, input)
    return 0


if __name__ == "__main__":
    sys.exit(main())
