"""A pair of workers becomes routable: a short request of our own goes through it first, so that no client's is the first.

Knows nothing of Ray or HTTP.
"""

import asyncio
import logging
import secrets

from cluster.errors import ApiError
from cluster.fleet import Fleet, Pair
from cluster.flight import Flight, Pilot
from kernels.layout import PAGE_SIZE
from workers.request import SamplingParams

log = logging.getLogger(__name__)

PROBE_TOKENS = PAGE_SIZE + 2  # a full page and a part of one
PROBE_TIMEOUT_S = 60.0
PAUSE_S = 0.5  # after a probe that failed, and between two looks for new pairs


async def prove_pairs(fleet: Fleet, pilot: Pilot) -> None:
    """Sends a request through each new pair, for ever; only then is it routable."""
    busy: dict[Pair, asyncio.Task[None]] = {}
    while True:
        for pair in fleet.linked_pairs() - fleet.proven:
            if pair not in busy or busy[pair].done():
                busy[pair] = asyncio.create_task(_probe(pair, fleet, pilot))
        fleet.changed.clear()
        try:
            async with asyncio.timeout(PAUSE_S):
                await fleet.changed.wait()
        except TimeoutError:
            continue


async def _probe(pair: Pair, fleet: Fleet, pilot: Pilot) -> None:
    (prefill, _), (decode, _) = pair
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    flight = Flight(
        id=f"probe-{secrets.token_hex(8)}",
        prompt=[2 + i % 7 for i in range(PROBE_TOKENS)],
        sampling=sampling,
        namespace=secrets.token_bytes(16),  # no earlier probe's pages: the caches are really shipped
        page_hashes=[],
        pair=(prefill, decode),
    )
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            async for _step in pilot.fly(flight):
                pass
    except (ApiError, TimeoutError) as error:
        log.warning("no token through %s -> %s yet: %s", prefill, decode, error)
        await asyncio.sleep(PAUSE_S)
        return
    fleet.proven.add(pair)
    fleet.changed.set()
