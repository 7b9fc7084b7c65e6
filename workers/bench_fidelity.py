"""How far the served model is from the same weights in fp32 throughout: reference operators, no FP8 activations, unquantised caches.

Layer by layer, so that one layer's error is told apart from what it inherits.
"""

import tempfile
from typing import Any

import msgspec
import torch

from kernels import dispatch
from kernels.layout import PAGE_SIZE
from kernels.rows import Rows
from workers.bench_bed import SEED, Bed, write_slice
from workers.model import Layer, Model, load_model
from workers.paged_cache import PagedCache
from workers.rope import Rope

Stream = tuple[torch.Tensor, torch.Tensor]  # x and the residual, to be added


@torch.inference_mode()
def fidelity(bed: Bed, num_tokens: int) -> list[dict[str, Any]]:
    """One prompt of so many tokens, more than top-k, or nothing would be selected.

    own:     relative error of what a layer adds to the stream, given the reference's input; and its median over rows, which a few
             other choices of experts do not move
    running: relative error of the stream, each model on its own output
    overlap: of the tokens that rows with a choice select, the share that the reference selects too, given the same input
    """
    served, reference = bed.models["sparse"], _reference(bed)
    rows, slots = _prompt(num_tokens, bed.device)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(bed.config.vocab_size, (num_tokens,), generator=generator).to(bed.device)
    sides = {name: _Side(model, rows, slots) for name, model in (("ours", served), ("theirs", reference))}
    ours, theirs = sides["ours"], sides["theirs"]
    running = _start(served, tokens)
    stream = _start(reference, tokens)
    results = []
    for number in range(len(served.layers)):
        running = ours.run(number, running)
        given = (stream[0].to(served.dtype), stream[1].to(served.dtype))
        before = _total(given)
        own = ours.run(number, given)
        selected = ours.selected
        stream = theirs.run(number, (given[0].float(), given[1].float()))
        added, expected = _total(own) - before, _total(stream) - before
        errors = (added - expected).norm(dim=-1) / expected.norm(dim=-1)
        results.append(
            {
                "layer": number,
                "own": _relative(added, expected),
                "own_median_row": float(errors.median()),
                "running": _relative(_total(running), _total(stream)),
                "overlap": _overlap(selected, theirs.selected, slots, rows.positions),
            }
        )
    return results


class _Side:
    """One model with caches of its own."""

    def __init__(self, model: Model, rows: Rows, slots: torch.Tensor) -> None:
        self._model, self._rows, self._slots = model, rows, slots
        self._rope: Rope = model.rope(rows.positions)
        self._cache = PagedCache(
            model.layout,
            num_layers=len(model.layers),
            num_pages=rows.page_table.shape[1],
            device=model.device,
        )
        self.selected = torch.empty(0)

    def run(self, number: int, stream: Stream) -> Stream:
        layer: Layer = self._model.layers[number]
        pages = self._cache.latent[number], self._cache.index[number]
        return layer(*stream, self._rope, self._rows, self._slots, *pages, self._keep)

    def _keep(self, selected: torch.Tensor) -> None:
        self.selected = selected


def _reference(bed: Bed) -> Model:
    config = msgspec.structs.replace(bed.engine_config, precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        write_slice(folder, small=bed.small, layers=len(bed.models["sparse"].layers))
        return load_model(folder, config, ops=dispatch.select("reference"))


def _prompt(num_tokens: int, device: str) -> tuple[Rows, torch.Tensor]:
    positions = torch.arange(num_tokens, device=device)
    pages = -(-num_tokens // PAGE_SIZE)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(SEED)).int().unsqueeze(0)
    rows = Rows.of((0, num_tokens), positions, table.to(device))
    return rows, rows.page_table[0, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE


def _start(model: Model, tokens: torch.Tensor) -> Stream:
    x = model.embed(tokens)
    return x, torch.zeros_like(x)


def _total(stream: Stream) -> torch.Tensor:
    return stream[0].float() + stream[1].float()


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _overlap(
    ours: torch.Tensor, theirs: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> float | None:
    """None where no row has a choice."""
    topk = ours.shape[1]
    choosing = positions >= topk
    if not choosing.any():
        return None
    picks = [
        torch.zeros(
            int(choosing.sum()), int(slots.max()) + 1, dtype=torch.bool, device=slots.device
        ).scatter_(1, selected[choosing].long(), True)
        for selected in (ours, theirs)
    ]
    return float((picks[0] & picks[1]).sum() / picks[1].sum())
