"""Which of a cluster's workers should prefill and which decode, for a mix of requests that are all alike.

Pure: puts `cluster.plan_memory` and `cluster.plan_times` together. Knows nothing of terminals or files.
"""

from dataclasses import dataclass
from functools import cached_property

import msgspec

from cluster import plan_times
from cluster.plan_memory import DoesNotFit, GpuMemory, gpu_memory, requests_that_fit
from cluster.plan_times import PrefillTime, StepTime
from kernels.layout import PAGE_SIZE
from workers.config import EngineConfig
from workers.model_config import ModelConfig
from workers.shares import expert_blocks

HALVINGS = 60  # of an interval, when a batch is looked for


@dataclass(frozen=True)
class Hardware:
    nodes: int
    gpus: int  # of one node
    gpu_bytes: int


@dataclass(frozen=True)
class Mix:
    """Requests that are all alike, arriving at random."""

    input_tokens: int
    output_tokens: int
    hit_rate: float  # of the input tokens, in a prefill worker's cache
    rate: float  # requests/s

    @property
    def cached_tokens(self) -> int:
        """Whole units, and never the last token."""
        return min(int(self.input_tokens * self.hit_rate), self.input_tokens - 1) // PAGE_SIZE * PAGE_SIZE

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class Shape:
    """A worker of either role: so many GPUs, and what the memory of each goes to."""

    model: ModelConfig
    engine: EngineConfig
    memory: GpuMemory
    per_node: int  # workers of a node

    @property
    def ranks(self) -> int:
        return self.engine.ranks

    def batch_limit(self, mix: Mix) -> float:
        """Requests that each rank of a decode worker can hold: by its pages and by max_running."""
        fits = requests_that_fit(self.memory, "decode", self.ranks, mix.tokens)
        return min(fits, self.engine.max_running) / self.ranks


@dataclass(frozen=True)
class Split:
    """So many prefill and so many decode workers under a mix. All times are extrapolations."""

    shape: Shape
    mix: Mix
    prefills: int
    decodes: int

    @cached_property
    def prefill_time(self) -> PrefillTime:
        mix = self.mix
        return plan_times.prefill_time(
            self.shape.model, mix.input_tokens, mix.cached_tokens, self.shape.ranks
        )

    @property
    def prefill_limit(self) -> float:
        """Requests/s that the prefill workers can read."""
        return self.prefills * 1000 / self.prefill_time.total_ms

    @property
    def decode_limit(self) -> float:
        """Requests/s that the decode workers can answer when as many are in their batches as fit."""
        return self._decode_rate(self.shape.batch_limit(self.mix))

    @property
    def limit(self) -> float:
        return min(self.prefill_limit, self.decode_limit)

    @property
    def holds(self) -> bool:
        """Whether the rate that is asked for is below what both roles can do."""
        return self.mix.rate < self.limit

    @cached_property
    def batch(self) -> float:
        """Requests of each decode rank at the rate that is asked for: rate x output tokens x step = requests in progress."""
        low, high = 0.0, self.shape.batch_limit(self.mix)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._decode_rate(middle) >= self.mix.rate else (middle, high)
        return high

    @property
    def step(self) -> StepTime:
        return self._step(self.batch)

    @property
    def queue_ms(self) -> float:
        utilisation = self.mix.rate / self.prefill_limit
        return plan_times.queue_ms(self.prefill_time.total_ms, utilisation, self.prefills)

    @property
    def ttft_ms(self) -> float:
        """Gateway, a decode step until pages are reserved, queue, prefill. The first token does not wait for shipping."""
        return plan_times.GATEWAY_MS + self.step.total_ms + self.queue_ms + self.prefill_time.total_ms

    @property
    def shipped_bytes(self) -> int:
        """Of a request: its whole prompt, as if the decode worker held nothing of it."""
        pages = -(-self.mix.input_tokens // PAGE_SIZE)
        return pages * self.shape.memory.page_bytes

    @property
    def last_shipment_ms(self) -> float:
        """What is left to ship when the prompt has been read: its last chunk. The second token waits for it."""
        last = min(self.mix.input_tokens - self.mix.cached_tokens, self.shape.engine.max_batched_tokens)
        return plan_times.ship_ms(self.shipped_bytes * last // self.mix.input_tokens, self.shape.ranks)

    def _step(self, batch: float) -> StepTime:
        context = self.mix.input_tokens + self.mix.output_tokens // 2
        ranks = self.shape.ranks
        return plan_times.step_time(self.shape.model, context, max(batch, 1 / ranks), ranks)

    def _decode_rate(self, batch: float) -> float:
        in_progress = batch * self.shape.ranks * self.decodes
        return in_progress * 1000 / (self.mix.output_tokens * self._step(batch).total_ms)


def shapes(model: ModelConfig, hardware: Hardware, mix: Mix, engine: EngineConfig) -> list[Shape]:
    """Every number of GPUs that a worker may have here, fewest first. Raises DoesNotFit with the reason of the largest if there is none.

    engine: what both roles have in common
    """
    allowed = [
        r for r in (1, 2, 4, 8) if expert_blocks(model.n_routed_experts) % r == 0 and hardware.gpus % r == 0
    ]
    found: list[Shape] = []
    reason = ""
    for ranks in allowed:
        own = msgspec.structs.replace(engine, ranks=ranks)
        try:
            memory = gpu_memory(model, own, hardware.gpu_bytes)
            _check_request(memory, mix)
        except DoesNotFit as error:
            reason = str(error)
            continue
        found.append(Shape(model, own, memory, hardware.gpus // ranks))
    if not found:
        raise DoesNotFit(reason)
    return found


def _check_request(memory: GpuMemory, mix: Mix) -> None:
    if memory.cached_tokens < mix.tokens:
        raise DoesNotFit(
            f"a request of {mix.tokens} tokens does not fit the {memory.cached_tokens} tokens that a GPU of "
            f"{memory.device / 1e9:.0f} GB has room for beside {memory.weights.total / 1e9:.1f} GB of weights"
        )


def splits(shape: Shape, hardware: Hardware, mix: Mix) -> list[Split]:
    """Every division of the workers among the roles, the one that answers the most requests first. Raises DoesNotFit."""
    total = shape.per_node * hardware.nodes
    if total < 2:
        raise DoesNotFit(
            f"one worker takes {shape.ranks} GPUs, all of {hardware.nodes} node with {hardware.gpus}; "
            "a prefill and a decode worker need twice as many"
        )
    found = [Split(shape, mix, prefills, total - prefills) for prefills in range(1, total)]
    return sorted(found, key=lambda split: -split.limit)


def workers_needed(best: Split) -> tuple[int, int]:
    """The fewest prefill and decode workers whose limits lie above the rate that is asked for."""
    rate = best.mix.rate
    return (
        int(rate // (best.prefill_limit / best.prefills)) + 1,
        int(rate // (best.decode_limit / best.decodes)) + 1,
    )
