"""Logits to tokens. A row's result depends only on its own logits and its own request, never on the rest of the batch.

Random numbers are counter-based, one for each (seed, output position), so that another worker can go on exactly where one
stopped. Penalties, bias and truncation are defined, and applied in the order, as in vLLM; what a grammar does not allow is
taken away before them. Knows nothing of scheduling.

On a GPU the host waits once, for the tokens, and once more if log-probabilities are asked for.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch

from workers.device import to_device
from workers.grammar import Masks
from workers.request import Request, TokenLogprobs


def sample(
    logits: torch.Tensor,
    requests: Sequence[Request],
    eos_token_ids: Collection[int] = (),
    masks: Masks | None = None,
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The next token of each request, and its log-probabilities where the request asks for them.

    logits: fp32 [S, V], row s for requests[s]; left unchanged. eos_token_ids: what ends an answer by itself.
    """
    scores = logits if masks is None else _allowed(logits, masks)
    chosen = scores.argmax(dim=-1)  # the lowest id on ties
    drawn = [row for row, request in enumerate(requests) if not _takes_argmax(request)]
    if drawn:
        rows = to_device(torch.tensor(drawn), logits.device)
        chosen[rows] = _draw(scores[rows].double(), [requests[row] for row in drawn], eos_token_ids)
    tokens = chosen.tolist()
    return tokens, _logprobs(logits, tokens, [request.sampling.logprobs for request in requests])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for the output token at `position` (0: the first)."""
    counter = struct.pack("<QQ", seed % 2**64, position)
    return (int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _logprobs(
    logits: torch.Tensor, tokens: list[int], counts: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """logits: fp32 [S, V], as the model gave them; how many of the best tokens each row wants, None if it wants nothing."""
    wanted = [row for row, count in enumerate(counts) if count is not None]
    result: list[TokenLogprobs | None] = [None] * len(tokens)
    if not wanted:
        return result
    logprobs = logits[to_device(torch.tensor(wanted), logits.device)].double().log_softmax(dim=-1)
    sampled = to_device(torch.tensor([[tokens[row]] for row in wanted]), logits.device)
    best, ids = logprobs.sort(descending=True, stable=True)
    most = max(counts[row] or 0 for row in wanted)
    # Ids are whole numbers far below 2^53, so one tensor brings everything back.
    parts = (logprobs.gather(1, sampled), best[:, :most], ids[:, :most].double())
    for row, values in zip(wanted, torch.cat(parts, dim=1).tolist(), strict=True):
        top = zip(map(int, values[1 + most :]), values[1 : 1 + most], strict=True)
        result[row] = TokenLogprobs(values[0], list(top)[: counts[row]])
    return result


def _allowed(logits: torch.Tensor, masks: Masks) -> torch.Tensor:
    """The logits, -inf where a grammar forbids a token."""
    rows, bits = (
        to_device(part, logits.device) for part in (torch.tensor(masks.rows), torch.from_numpy(masks.bits))
    )
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    forbidden = ((bits.unsqueeze(-1) >> places) & 1).flatten(1)[:, : logits.shape[1]] == 0
    return logits.index_copy(0, rows, logits[rows].masked_fill(forbidden, -torch.inf))


def _takes_argmax(request: Request) -> bool:
    sampling = request.sampling
    return sampling.temperature == 0 and not (
        _goes_on(request)
        or sampling.logit_bias
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1
    )


def _goes_on(request: Request) -> bool:
    """Whether this token must not end the answer."""
    return request.num_output_tokens < request.sampling.min_tokens


def _draw(logits: torch.Tensor, requests: Sequence[Request], eos_token_ids: Collection[int]) -> torch.Tensor:
    """Inverse CDF over the tokens in order of falling probability, the lowest id first on ties.

    logits: fp64 [N, V], overwritten. Returns int64 [N]. Masked tokens always form the tail of a row, so one cumulative
    sum serves every step. No torch.sum over floats: its order of summation depends on the number of rows.
    """
    for row, request in zip(logits, requests, strict=True):
        _adjust(row, request)
        if _goes_on(request):
            ends = {*request.sampling.stop_token_ids, *(eos_token_ids if request.sampling.eos_ends else ())}
            others = row.index_fill(0, _ids(ends, row), -torch.inf)
            # Where a grammar has come to its end, only the end is left.
            row.copy_(torch.where(others.isneginf().all(), row, others))
    settings = torch.tensor(
        [_settings(request, logits.shape[1]) for request in requests], dtype=torch.float64
    )
    temperature, min_p, top_k, top_p, draw = to_device(settings, logits.device).unsqueeze(-1).unbind(1)
    scaled = logits / temperature
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    rank = torch.arange(probs.shape[1], device=logits.device)
    keep = (probs >= min_p * probs[:, :1]) & (rank < top_k)
    probs = probs.where(keep, 0.0)
    cdf = probs.cumsum(dim=-1)
    nucleus = cdf - probs < top_p * cdf[:, -1:]
    mass = cdf.where(nucleus, 0.0).amax(dim=-1, keepdim=True)
    index = (cdf <= draw * mass).sum(dim=-1, keepdim=True)
    return ids.gather(-1, index).squeeze(-1)


def _settings(request: Request, vocab_size: int) -> tuple[float, ...]:
    """Temperature, min_p, top_k, top_p and the random number of a row.

    Greedy after penalties is a draw with the number 0: the first token in order.
    """
    p = request.sampling
    draw = uniform(p.seed, request.num_output_tokens) if p.temperature else 0.0
    return p.temperature or 1.0, p.min_p, p.top_k or vocab_size, p.top_p, draw


def _adjust(logits: torch.Tensor, request: Request) -> None:
    """logits: fp64 [V], changed in place: bias, then repetition penalty (prompt and output), then frequency and presence
    penalties (output only)."""
    sampling = request.sampling
    if sampling.logit_bias:
        logits[_ids(sampling.logit_bias, logits)] += _numbers(sampling.logit_bias.values(), logits)
    if sampling.repetition_penalty != 1:
        seen = _ids(set(request.tokens), logits)
        before = logits[seen]
        logits[seen] = torch.where(
            before > 0, before / sampling.repetition_penalty, before * sampling.repetition_penalty
        )
    if sampling.frequency_penalty or sampling.presence_penalty:
        counts = Counter(request.tokens[request.num_prompt_tokens :])
        penalties = [sampling.frequency_penalty * n + sampling.presence_penalty for n in counts.values()]
        logits[_ids(counts, logits)] -= _numbers(penalties, logits)


def _ids(tokens: Iterable[int], logits: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(list(tokens), dtype=torch.int64), logits.device)


def _numbers(values: Iterable[float], logits: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(list(values), dtype=torch.float64), logits.device)
