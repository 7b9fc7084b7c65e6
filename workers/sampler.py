"""Logits to tokens. A row's result depends only on its own logits and its own request, never on the rest of the batch.

Random numbers are counter-based, one for each (seed, output position), so that another worker can go on exactly where one
stopped. Penalties, bias and truncation are defined, and applied in the order, as in vLLM. Knows nothing of scheduling.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence

import torch

from workers.request import Request, SamplingParams, TokenLogprobs


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The next token of each request, and its log-probabilities where the request asks for them.

    logits: fp32 [S, V], row s for requests[s]; left unchanged.
    """
    chosen = logits.argmax(dim=-1)  # the lowest id on ties
    drawn = [row for row, request in enumerate(requests) if not _takes_argmax(request.sampling)]
    if drawn:
        chosen[drawn] = _draw(logits[drawn].double(), [requests[row] for row in drawn])
    tokens = chosen.tolist()
    logprobs = [
        None
        if (count := request.sampling.logprobs) is None
        else token_logprobs(logits[row], tokens[row], count)
        for row, request in enumerate(requests)
    ]
    return tokens, logprobs


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for the output token at `position` (0: the first)."""
    counter = struct.pack("<QQ", seed % 2**64, position)
    return (int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def token_logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """logits: [V], as the model gave them."""
    logprobs = logits.double().log_softmax(dim=-1)
    best, ids = logprobs.sort(descending=True, stable=True)
    top = list(zip(ids[:count].tolist(), best[:count].tolist(), strict=True))
    return TokenLogprobs(logprobs[token].item(), top)


def _takes_argmax(sampling: SamplingParams) -> bool:
    return sampling.temperature == 0 and not (
        sampling.logit_bias
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1
    )


def _draw(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Inverse CDF over the tokens in order of falling probability, the lowest id first on ties.

    logits: fp64 [N, V], overwritten. Returns int64 [N]. Masked tokens always form the tail of a row, so one cumulative
    sum serves every step. No torch.sum over floats: its order of summation depends on the number of rows.
    """
    for row, request in zip(logits, requests, strict=True):
        _adjust(row, request)
    params = [request.sampling for request in requests]

    def column(values: list[float]) -> torch.Tensor:
        return logits.new_tensor(values).unsqueeze(-1)

    scaled = logits / column([p.temperature or 1.0 for p in params])
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    rank = torch.arange(probs.shape[1], device=logits.device)
    keep = (probs >= column([p.min_p for p in params]) * probs[:, :1]) & (
        rank < column([p.top_k or probs.shape[1] for p in params])
    )
    probs = probs.where(keep, 0.0)
    cdf = probs.cumsum(dim=-1)
    nucleus = cdf - probs < column([p.top_p for p in params]) * cdf[:, -1:]
    mass = cdf.where(nucleus, 0.0).amax(dim=-1, keepdim=True)
    # Greedy after penalties is the same draw with the number 0: the first token in order.
    draws = [
        uniform(r.sampling.seed, r.num_output_tokens) if r.sampling.temperature else 0.0 for r in requests
    ]
    index = (cdf <= column(draws) * mass).sum(dim=-1, keepdim=True)
    return ids.gather(-1, index).squeeze(-1)


def _adjust(logits: torch.Tensor, request: Request) -> None:
    """logits: fp64 [V], changed in place: bias, then repetition penalty (prompt and output), then frequency and presence
    penalties (output only)."""
    sampling = request.sampling
    if sampling.logit_bias:
        logits[list(sampling.logit_bias)] += logits.new_tensor(list(sampling.logit_bias.values()))
    if sampling.repetition_penalty != 1:
        seen = list(set(request.tokens))
        before = logits[seen]
        logits[seen] = torch.where(
            before > 0, before / sampling.repetition_penalty, before * sampling.repetition_penalty
        )
    if sampling.frequency_penalty or sampling.presence_penalty:
        counts = Counter(request.tokens[request.num_prompt_tokens :])
        penalties = [sampling.frequency_penalty * n + sampling.presence_penalty for n in counts.values()]
        logits[list(counts)] -= logits.new_tensor(penalties)
