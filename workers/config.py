"""Settings of one worker. The model's own sizes are in `workers.model_config`."""

from typing import Literal

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an engine may use. Every field can be set in the cluster's YAML file."""

    max_batched_tokens: int = 2048  # the token budget of one step
    max_running: int = 64  # requests that hold pages and are scheduled
    max_waiting: int = 256  # requests that wait for pages; one more is refused
    cache_bytes: int | None = (
        256 * 2**20
    )  # both paged caches, all layers; None: all memory of the GPU that is left
    max_context: int | None = None  # tokens of prompt + output; None: the model's own limit
    precision: Literal["fp8", "fp32"] = "fp8"  # fp32: dequantised weights and unquantised caches
    attention: Literal["absorbed", "unabsorbed"] = "absorbed"
    device: str = "cpu"
    ranks: int = 1  # processes, each with a GPU of its own, that share prompts (prefill) or requests (decode), and the experts
    kernels: str | None = (
        None  # back ends, "NAME" or "OPERATOR=NAME,...": see kernels.dispatch; None: the best there are
    )
    random_weights: int | None = None  # a seed: weights of no checkpoint, made on the device (workers.slice)
    threads: int | None = None  # CPU threads of the engine; None: torch's default, in Ray num_cpus
