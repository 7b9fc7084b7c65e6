"""From a worker's load to the figures that `cluster.scaling` decides by. Knows nothing of Ray."""

from cluster.scaling import DecodeFigures, PrefillFigures
from workers.messages import Load


class BusyMeter:
    """The share of the time that a worker computes, between one look and the next. `now` is when it starts."""

    def __init__(self, now: float) -> None:
        self._busy_seconds = 0.0
        self._looked_at = now

    def share(self, busy_seconds: float, now: float) -> float:
        """busy_seconds: since the worker's start. A step counts when it ends, so one look may find more than fits."""
        share = (busy_seconds - self._busy_seconds) / max(now - self._looked_at, 1e-9)
        self._busy_seconds, self._looked_at = busy_seconds, now
        return min(1.0, share)


def prefill_figures(load: Load, queued_tokens: int, busy_share: float) -> PrefillFigures:
    return PrefillFigures(
        queued_tokens=queued_tokens, seconds_per_token=load.seconds_per_token, busy_share=busy_share
    )


def decode_figures(load: Load) -> DecodeFigures:
    num_pages = load.free_pages + load.cached_pages + load.held_pages
    return DecodeFigures(
        page_share=load.held_pages / num_pages if num_pages else 0.0,
        place_share=(load.running + load.waiting) / load.max_running if load.max_running else 0.0,
        step_seconds=load.step_seconds,
    )
