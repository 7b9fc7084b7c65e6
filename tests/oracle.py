"""Hugging Face's `deepseek_v32` as an independent oracle: the same checkpoint, dequantised by this file.

It has no Hadamard, no FP8 and no paged caches, so our model runs in precision "fp32". Its top-k leaves ties to chance (heads that
all score below zero make exact zeros): here it takes the lowest position, as Lightship does.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

SMALLEST_GAP = 4e-6  # between the scores of the last token selected and the first one left out


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in fp32, without the MTP layer, which is layer 4."""
    stored = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    result = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv") or name.startswith("model.layers.4."):
            continue
        result[name] = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = tensor.shape
            blocks = stored[f"{name}_scale_inv"]
            result[name] *= blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return result


class Oracle:
    """Full forwards only: with a cache of its own it may tip a borderline selection against itself."""

    def __init__(self, folder: Path, plain: Path) -> None:
        """Reads the checkpoint in `folder`, by way of a dequantised copy in `plain`."""
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (plain / "config.json").write_text(json.dumps(config))
        save_file(dequantised(folder), plain / "model.safetensors", metadata={"format": "pt"})
        transformers_logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        transformers_logging.enable_progress_bar()
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._gaps: list[float] = []

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """fp32 [T, V], where no selection is so close that rounding could tip it."""
        key = tuple(tokens)
        if key not in self._known:
            self._gaps = []
            self._known[key] = self._forward(tokens)
            assert min(self._gaps, default=1.0) > SMALLEST_GAP, "a borderline selection: take another prompt"
        return self._known[key]

    def continues(self, prompt: list[int], output: list[int]) -> bool:
        """Whether `output` is the greedy continuation of the prompt. A borderline selection moves no logit that far."""
        logits = self._forward(prompt + output[:-1])[len(prompt) - 1 :]
        return output == logits.argmax(-1).tolist()

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "topk", lambda scores, k, dim: self._topk(scores, k, dim))
            logits: torch.Tensor = self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    def _topk(self, scores: torch.Tensor, k: int, dim: int) -> Any:
        values, indices = scores.sort(dim=dim, descending=True, stable=True)
        if values.shape[dim] > k:
            gap = values.select(dim, k - 1) - values.select(dim, k)
            self._gaps += gap[gap.isfinite() & (gap > 0)].amin().unsqueeze(0).tolist()
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))
