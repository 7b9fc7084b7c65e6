import asyncio

import hypothesis.strategies as st
from hypothesis import given

from cluster.fleet import Mailbox, WorkerLost
from workers.messages import Landed, Tokens
from workers.request import TokenLogprobs


def _tokens(start: int, count: int, *, logprobs: bool = False, finish: str | None = None) -> Tokens:
    entries = [TokenLogprobs(-float(n), []) for n in range(start, start + count)] if logprobs else None
    return Tokens(
        request_id="r",
        start=start,
        tokens=list(range(start, start + count)),
        logprobs=entries,
        finish=finish,
        queued_s=float(not start),
    )


@given(st.lists(st.sampled_from(["put", "put", "landed", "get"]), max_size=30), st.booleans())
def test_joined_tokens_are_the_same_tokens(actions: list[str], logprobs: bool) -> None:
    async def body() -> tuple[list[int], list[float], int]:
        mailbox = Mailbox()
        told: list[Tokens] = []
        start = waiting = events = 0

        async def take() -> None:
            nonlocal events
            update = await mailbox.get()
            events += 1
            if isinstance(update, Tokens):
                told.append(update)

        for action in actions:
            if action == "put":
                mailbox.put(_tokens(start, 2, logprobs=logprobs))
                start, waiting = start + 2, waiting + 1
            elif action == "landed":
                mailbox.put(Landed("r"))
                waiting += 1
            elif waiting:
                waiting = 0
                while mailbox:
                    await take()
        mailbox.put(_tokens(start, 1, logprobs=logprobs, finish="length"))
        while mailbox:
            await take()
        assert [update.finish for update in told] == [None] * (len(told) - 1) + ["length"]
        assert told[0].queued_s == 1.0
        values = [entry.logprob for update in told for entry in update.logprobs or []]
        return [token for update in told for token in update.tokens], values, start

    tokens, values, last = asyncio.run(body())
    assert tokens == list(range(last + 1))
    assert values == ([-float(token) for token in tokens] if logprobs else [])


def test_only_what_goes_on_is_joined() -> None:
    async def body() -> None:
        mailbox = Mailbox()
        for update in (
            _tokens(0, 1),
            _tokens(1, 1),
            _tokens(5, 1),
            Landed("r"),
            _tokens(6, 1),
            WorkerLost("w"),
        ):
            mailbox.put(update)
        taken = [await mailbox.get() for _ in range(5)]
        assert [getattr(update, "tokens", None) for update in taken] == [[0, 1], [5], None, [6], None]

    asyncio.run(body())


def test_a_reader_waits() -> None:
    async def body() -> None:
        mailbox = Mailbox()
        reader = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        assert not reader.done()
        mailbox.put(Landed("r"))
        assert await reader == Landed("r")

    asyncio.run(body())
