"""The gateway's side of the ledger: opens a request before its first token leaves, settles it once, whatever happens.

An opening is awaited: when the ledger is away the request is refused and nothing is served unbilled. A settlement is kept
here and sent again until the controller has taken it; the ledger ignores a second one of the same request.
"""

import asyncio
import logging
from typing import Any

import msgspec
import ray

from cluster.errors import LedgerAway
from cluster.ledger import DayTotals
from cluster.prices import Price, PriceBook
from cluster.records import LedgerUnavailable, Opening, RecordRefused, Settlement

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 5.0
RETRY_S = 0.5


class Books:
    """Prices, openings and settlements of one gateway."""

    def __init__(self, controller: Any, prices: PriceBook, entry: str) -> None:
        self._controller = controller
        self._prices = prices
        self._entry = entry
        self._unsettled: asyncio.Queue[tuple[Settlement, asyncio.Task[None]]] = asyncio.Queue()
        self._num_unsettled = 0  # those in the queue, and the one that is being settled

    def price(self, now: float) -> Price:
        """The price in force; it is written into the opening, so a later price cannot change the bill."""
        return self._prices.price_at(self._entry, now)

    async def open(self, opening: Opening) -> None:
        """Returns once the opening is on disk. Raises LedgerAway (503)."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self._controller.open.remote(opening)
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("%s is refused, the ledger is away: %s", opening.request_id, error)
            raise LedgerAway("the ledger is not available; nothing is served unbilled") from None

    async def days(self, tenant: str, key_id: str, first: int, last: int) -> list[DayTotals]:
        """A key's own sums by day. Raises LedgerAway (503)."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                days: list[DayTotals] = await self._controller.days.remote(tenant, key_id, first, last)
        except (ray.exceptions.RayError, LedgerUnavailable, TimeoutError) as error:
            log.warning("the ledger is away: %s", error)
            raise LedgerAway("the ledger is not available; try again later") from None
        return days

    @property
    def num_unsettled(self) -> int:
        """Requests that are over, but not yet in the ledger."""
        return self._num_unsettled

    def settle(self, settlement: Settlement, *, after: asyncio.Task[None]) -> None:
        """Settles what the task `after` opened. Never blocks and never fails: see `settle_forever`."""
        self._num_unsettled += 1
        self._unsettled.put_nowait((settlement, after))

    async def settle_forever(self) -> None:
        """Sends settlements in order, each until it is taken."""
        while True:
            settlement, opening = await self._unsettled.get()
            await asyncio.wait([opening])
            if opening.cancelled() or opening.exception() is not None:
                # Refused before its first token. An opening that timed out may be on disk all the same.
                settlement = msgspec.structs.replace(settlement, finish="error")
            while not await self._try_settle(settlement):
                await asyncio.sleep(RETRY_S)
            self._num_unsettled -= 1

    async def _try_settle(self, settlement: Settlement) -> bool:
        try:
            await self._controller.settle.remote(settlement)
        except RecordRefused as error:
            log.warning("not settled: %s", error)
        except ray.exceptions.RayError as error:
            log.warning("settlement of %s waits for the ledger: %s", settlement.request_id, error)
            return False
        return True
