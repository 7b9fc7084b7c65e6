"""Records as the tests of the ledger write them."""

from typing import Any

from cluster.prices import Price
from cluster.records import Opening, Settlement

PRICE = Price(version="v3.2-list@2025-12-01", hit=28, miss=280, output=420)


def opening(request_id: str = "r1", **changes: Any) -> Opening:
    fields = {
        "tenant": "acme",
        "key_id": "2c26b46b68ff",
        "model": "lightship",
        "price": PRICE,
        "time_ms": 1_765_000_000_000,
    }
    return Opening(
        **{
            **fields,
            "request_id": request_id,
            "prompt_tokens": 200,
            "hit_tokens": 64,
            "miss_tokens": 136,
            **changes,
        }
    )


def settlement(request_id: str = "r1", **changes: Any) -> Settlement:
    fields = {
        "hit_tokens": 64,
        "miss_tokens": 136,
        "output_tokens": 10,
        "finish": "stop",
        "time_ms": 1_765_000_001_000,
    }
    return Settlement(**{**fields, "request_id": request_id, **changes})
