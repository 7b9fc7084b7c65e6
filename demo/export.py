"""A trained network as a checkpoint folder: `python -m demo.export --run DIR --stage mtp --to demo/checkpoint`.

Linear layers become FP8 with one scale for each block of 128 x 128, as in the published checkpoint; `--dtype fp32` stores all as it
is, to see what that costs.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from demo.network import Network
from demo.shape import CONFIG, FP8_CONFIG
from demo.train import Run
from kernels.reference import quantize_weight
from workers.checkpoint import write_checkpoint
from workers.model_config import ModelConfig

# What stays bf16 in an FP8 checkpoint.
_TABLES = ("embed_tokens", "lm_head", "mlp.gate", "weights_proj", "eh_proj", "shared_head.head")
Dtype = Literal["fp8", "fp32"]


def tensors(network: Network, dtype: Dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the checkpoint. The MTP layer gets its copies of embedding and head."""
    mtp = f"model.layers.{network.config.num_hidden_layers}"
    state = {name: tensor.detach().float().cpu() for name, tensor in network.state_dict().items()}
    state[f"{mtp}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
    state[f"{mtp}.shared_head.head.weight"] = state["lm_head.weight"]
    for name, tensor in state.items():
        if dtype == "fp32" or tensor.dim() == 1:
            yield name, tensor.clone()
        elif name.removesuffix(".weight").endswith(_TABLES):
            yield name, tensor.bfloat16()
        else:
            weight, scale_inv = quantize_weight(tensor)
            yield name, weight
            yield f"{name}_scale_inv", scale_inv


def export(run: Run, stage: str, folder: Path, dtype: Dtype) -> None:
    network = Network(ModelConfig.from_json(CONFIG), "cpu")
    state = torch.load(run.weights(stage), map_location="cpu", weights_only=True)
    network.load_state_dict(state["network"])
    config = FP8_CONFIG if dtype == "fp8" else CONFIG
    write_checkpoint(folder, config, run.tokenizer(), tensors(network, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the training")
    parser.add_argument("--stage", default="mtp", help="whose weights")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("fp8", "fp32"), default="fp8", help="of the linear layers")
    arguments = parser.parse_args()
    export(Run(arguments.run), arguments.stage, arguments.to, arguments.dtype)


if __name__ == "__main__":
    main()
