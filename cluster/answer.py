"""One answer of one or more choices: their parts merged into one body or one stream of events. Knows nothing of routes.

The choices of one prompt begin with the first one's first token: until then that one reads the prompt, and the others find
its pages in the prefix caches.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from cluster.activity import Ending
from cluster.completion import Completion, Part
from cluster.errors import ApiError
from cluster.explanation import Routing, explain
from cluster.logprobs import ChatLogprobs, ChatLogprobsWriter, CompletionLogprobs, CompletionLogprobsWriter
from cluster.output import Delta
from cluster.responses import DONE, PromptProgress, Reply, Usage, Whole, sse

Event = tuple[int, Part | PromptProgress | None]  # None: this choice has ended


@dataclass(eq=False)
class Choice:
    """`leader`: the choice that reads the prompt; None: this one."""

    completion: Completion
    logprobs: ChatLogprobsWriter | CompletionLogprobsWriter
    leader: "Choice | None" = None
    echo: str = ""  # what comes before the model's text

    def __post_init__(self) -> None:
        self.begun = asyncio.Event()  # its first token has come

    async def parts(self) -> AsyncGenerator[Part | PromptProgress, None]:
        if self.leader is not None:
            await self.leader.begun.wait()
        async with contextlib.aclosing(self.completion.parts()) as parts:
            async for part in parts:
                if isinstance(part, Part):
                    self.begun.set()
                yield part
        self.begun.set()

    def whole(self, part: Part) -> Whole:
        """The choice in one piece; `part`: all of its parts."""
        return Whole(part.delta, self.completion.finish_reason, self.write_logprobs(part))

    def write_logprobs(self, part: Part) -> ChatLogprobs | CompletionLogprobs | None:
        return self.logprobs.write(part.tokens, part.logprobs) if part.logprobs else None


class Answer:
    """Call `begin`, then either `body` or `events`, and `close` in the end."""

    def __init__(
        self,
        reply: Reply,
        choices: Sequence[Choice],
        *,
        include_usage: bool,
        explains_routing: bool = False,
    ) -> None:
        self._reply = reply
        self._choices = choices
        self._include_usage = include_usage
        self._explains_routing = explains_routing
        self._merged = self._merge()
        self._first: Event | None = None

    @property
    def endings(self) -> list[Ending]:
        """Of the choices that have begun and ended."""
        endings = (choice.completion.ending for choice in self._choices)
        return [ending for ending in endings if ending is not None]

    async def close(self) -> None:
        """Ends what still runs: the client has left."""
        await self._merged.aclose()

    async def begin(self) -> None:
        """Returns with the first event, so that an error before it gets its own status. Raises ApiError."""
        self._first = await anext(self._merged)

    async def body(self) -> bytes:
        """The whole answer. Raises ApiError."""
        parts = [[Part(Delta(content=choice.echo), [], None)] for choice in self._choices]
        async with contextlib.aclosing(self._events()) as events:
            async for index, part in events:
                assert not isinstance(part, PromptProgress), "only a stream tells its progress"
                if part is not None:
                    parts[index].append(part)
        wholes = [choice.whole(Part.joined(mine)) for choice, mine in zip(self._choices, parts, strict=True)]
        lead = self._choices[0].completion
        return self._reply.whole(wholes, self._usage, lead.timing, lead.debug, self._routing)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. An error in mid-stream is an event of its own, and no [DONE] follows."""
        reply, lead = self._reply, self._choices[0].completion
        async with contextlib.aclosing(self._events()) as events:
            for index, choice in enumerate(self._choices):
                if start := reply.start(index):
                    yield start
                if choice.echo:
                    yield reply.delta(Delta(content=choice.echo), index=index)
            try:
                async for index, part in events:
                    yield self._event(index, part)
            except ApiError as error:
                yield sse(error.body())
                return
        if self._include_usage:
            yield reply.usage(self._usage, lead.timing, lead.debug, self._routing)
        elif self._routing is not UNSET:
            yield reply.routing(self._routing)
        yield DONE

    @property
    def _usage(self) -> Usage:
        return Usage.total([choice.completion.usage for choice in self._choices])

    @property
    def _routing(self) -> list[Routing] | UnsetType:
        if not self._explains_routing:
            return UNSET
        return [explain(index, choice.completion.flight) for index, choice in enumerate(self._choices)]

    def _event(self, index: int, part: Part | PromptProgress | None) -> bytes:
        choice = self._choices[index]
        if part is None:
            debug = UNSET if self._include_usage else choice.completion.debug
            return self._reply.end(choice.completion.finish_reason, debug, index)
        if isinstance(part, PromptProgress):
            return self._reply.progress(part)
        return self._reply.delta(part.delta, choice.write_logprobs(part), index)

    async def _events(self) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(self._merged) as merged:
            if self._first is not None:
                yield self._first
            async for event in merged:
                yield event

    async def _merge(self) -> AsyncGenerator[Event, None]:
        if len(self._choices) == 1:  # without the queue: this is the path that has to be fast
            async with contextlib.aclosing(self._choices[0].parts()) as parts:
                async for only in parts:
                    yield 0, only
            yield 0, None
            return
        queue: asyncio.Queue[Event] = asyncio.Queue()
        tasks = [
            asyncio.create_task(_follow(index, choice, queue)) for index, choice in enumerate(self._choices)
        ]
        try:
            running = len(tasks)
            while running:
                index, part = await queue.get()
                if part is None:
                    await tasks[index]  # raises what ended it
                    running -= 1
                yield index, part
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(index: int, choice: Choice, queue: "asyncio.Queue[Event]") -> None:
    """Puts a choice's parts into the queue, and None at its end, whatever ended it."""
    try:
        async with contextlib.aclosing(choice.parts()) as parts:
            async for part in parts:
                queue.put_nowait((index, part))
    finally:
        queue.put_nowait((index, None))
