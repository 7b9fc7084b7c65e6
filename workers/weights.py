"""Reads a Hugging Face checkpoint tensor by tensor: every tensor is used exactly once, or the load fails by name.

`Checkpoint` knows files, `Weights` the form in which the layers want a tensor. Neither knows the forward pass.
"""

import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from kernels.dispatch import ExpertWeights, Ops
from kernels.layout import QUANT_BLOCK
from workers.layers import MLP, FusedLinear, LayerNorm, Linear, RMSNorm

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
Progress = Callable[[int, int], None]  # (tensors taken, tensors in all)

_FP8 = torch.float8_e4m3fn
_DTYPES = {
    "F8_E4M3": _FP8,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}  # safetensors' names; others are refused
_FLOATS = (torch.bfloat16, torch.float32)


class Source(Protocol):
    """Where tensors come from, each once. folder: for messages."""

    folder: Path

    def take(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor: ...

    def leave(self, prefix: str, children: Container[str]) -> None: ...


class CheckpointError(ValueError):
    """The files do not hold this model. The sentence names the file and the tensor."""


class Checkpoint:
    """The tensors of a folder, each to be taken once. A tensor is read when it is taken and held by nobody else.

    Names with one of the prefixes or suffixes to ignore are neither needed nor missed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "cpu",
        ignored_prefixes: Sequence[str] = (),
        ignored_suffixes: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._device = device
        self._progress = progress
        self._files: dict[str, Any] = {}  # open safetensors files
        self._waiting = {
            name: file
            for name, file in self._open_files().items()
            if not name.startswith(tuple(ignored_prefixes)) and not name.endswith(tuple(ignored_suffixes))
        }
        self._num_tensors = len(self._waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._waiting

    def take(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        """Reads one tensor onto the device. CheckpointError if it is missing, taken before, or of another shape or dtype."""
        file = self._waiting.pop(name, None)
        if file is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        try:
            tensor = self._read(file, name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file}: tensor {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.folder / file}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise CheckpointError(
                f"{self.folder / file}: tensor {name} is {tensor.dtype}, expected {expected}"
            )
        if self._progress:
            self._progress(self._num_tensors - len(self._waiting), self._num_tensors)
        return tensor

    def leave(self, prefix: str, children: Container[str]) -> None:
        """The tensors prefix + child + ... are another rank's."""
        start = len(prefix)
        left = [
            name
            for name in self._waiting
            if name.startswith(prefix) and name[start:].split(".")[0] in children
        ]
        for name in left:
            del self._waiting[name]

    def finish(self) -> None:
        """CheckpointError if a tensor was not taken: the files hold another model than the config says."""
        if self._waiting:
            name, file = min(self._waiting.items())
            others = f" (and {len(self._waiting) - 1} more)" if len(self._waiting) > 1 else ""
            raise CheckpointError(f"{self.folder / file}: tensor {name}{others} is not part of this model")

    def _read(self, file: str, name: str) -> torch.Tensor:
        if self._device == "meta":  # the file's header says it all
            header = self._files[file].get_slice(name)
            dtype = _DTYPES.get(header.get_dtype(), torch.uint8)
            return torch.empty(header.get_shape(), dtype=dtype, device="meta")
        # On a CPU the tensor is a window into the file; the copy lets go of the file.
        tensor: torch.Tensor = self._files[file].get_tensor(name).clone()
        return tensor

    def _open_files(self) -> dict[str, str]:
        """Tensor name -> file name, as the index and the files agree."""
        index_path = self.folder / INDEX_FILE
        if not index_path.exists():
            if not (self.folder / SINGLE_FILE).exists():
                raise CheckpointError(f"{self.folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
            return dict.fromkeys(self._open(SINGLE_FILE), SINGLE_FILE)
        try:
            where = msgspec.json.decode(index_path.read_bytes(), type=_Index).weight_map
        except msgspec.MsgspecError as error:
            raise CheckpointError(f"{index_path}: not a safetensors index: {error}") from error
        for file in sorted(set(where.values())):
            if not (self.folder / file).exists():
                raise CheckpointError(f"{index_path}: names {file}, which does not exist")
            stored, listed = self._open(file), {name for name in where if where[name] == file}
            if stored != listed:
                name = min(stored ^ listed)
                problem = "is in the file but not in" if name in stored else "is not in the file but in"
                raise CheckpointError(f"{self.folder / file}: tensor {name} {problem} {INDEX_FILE}")
        return where

    def _open(self, file: str) -> set[str]:
        path = self.folder / file
        try:
            self._files[file] = safe_open(
                path, framework="pt", device="cpu" if self._device == "meta" else self._device
            )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
        return set(self._files[file].keys())


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Stack:
    """Matrices of one shape, with their scales if they are FP8, in one tensor that the first of them makes room for."""

    weight: torch.Tensor
    scale_inv: torch.Tensor | None = None

    def __init__(self, *counts: int) -> None:
        self._counts = counts
        self._empty = True

    def put(self, place: tuple[int, ...], weight: torch.Tensor, scale_inv: torch.Tensor | None) -> None:
        if self._empty:
            self.weight = weight.new_empty(*self._counts, *weight.shape)
            self.scale_inv = (
                None if scale_inv is None else scale_inv.new_empty(*self._counts, *scale_inv.shape)
            )
            self._empty = False
        self.weight[place].copy_(weight)
        if self.scale_inv is not None and scale_inv is not None:
            self.scale_inv[place].copy_(scale_inv)


@dataclass(frozen=True)
class Weights:
    """Makes layers of the tensors under one name prefix.

    precision: "fp8" leaves e4m3 matrices as they are, "fp32" dequantises them.
    dtype:     of the activations, and so of the matrices that are not FP8.
    quantized: whether config.json announces FP8 matrices at all.
    """

    checkpoint: Source
    ops: Ops
    precision: Literal["fp8", "fp32"]
    dtype: torch.dtype
    quantized: bool
    prefix: str = ""

    def at(self, name: str) -> "Weights":
        return replace(self, prefix=f"{self.prefix}{name}.")

    def leave(self, children: Container[str]) -> None:
        """Reads nothing of these: another rank does."""
        self.checkpoint.leave(self.prefix, children)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """fp32 [size]."""
        return self.checkpoint.take(self.prefix + name, (size,), _FLOATS).float()

    def table(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """A matrix that is never FP8: [rows, columns]."""
        return self.checkpoint.take(f"{self.prefix}{name}.weight", (rows, columns), _FLOATS).to(dtype)

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] in the activations' dtype, dequantised if it is FP8."""
        weight, scale_inv = self._take_matrix(name, rows, columns)
        return (weight if scale_inv is None else self.ops.dequantize_weight(weight, scale_inv)).to(self.dtype)

    def linear(self, name: str, rows: int, columns: int) -> Linear:
        return self._linear(*self._take_matrix(name, rows, columns))

    def fused(self, rows: dict[str, int], columns: int) -> FusedLinear:
        """Matrices of the same input, name -> rows, as one. Either all of them are FP8, or none."""
        matrices = self._take_alike(rows, columns)
        scales = [scale_inv for _, scale_inv in matrices if scale_inv is not None]
        ends = list(itertools.accumulate(-(-count // QUANT_BLOCK) * QUANT_BLOCK for count in rows.values()))
        starts = (0, *ends[:-1])
        stacked = matrices[0][0].new_zeros(starts[-1] + len(matrices[-1][0]), columns)
        for start, (weight, _) in zip(starts, matrices, strict=True):
            stacked[start : start + len(weight)] = weight
        linear = self._linear(stacked, torch.cat(scales) if scales else None)
        return FusedLinear(linear, starts, tuple(rows.values()))

    def rms_norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self.vector(f"{name}.weight", size), eps, self.ops)

    def layer_norm(self, name: str, size: int) -> LayerNorm:
        weight, bias = (self.vector(f"{name}.{part}", size) for part in ("weight", "bias"))
        return LayerNorm(weight, bias)

    def mlp(self, hidden_size: int, intermediate_size: int) -> MLP:
        return MLP(
            self.fused({"gate_proj": intermediate_size, "up_proj": intermediate_size}, hidden_size),
            self.linear("down_proj", hidden_size, intermediate_size),
            self.ops,
        )

    def experts(self, numbers: range, hidden_size: int, intermediate_size: int) -> ExpertWeights:
        """The matrices of the experts of these numbers: all FP8, or none. Each is read into its place among the others, since
        all of a layer's are too large to be held twice."""
        gate_up, down = _Stack(len(numbers), 2), _Stack(len(numbers))
        plain: set[bool] = set()
        for place, number in enumerate(numbers):
            at = self.at(f"experts.{number}")
            pair = at._take_alike({"gate_proj": intermediate_size, "up_proj": intermediate_size}, hidden_size)
            last = at._take_alike({"down_proj": hidden_size}, intermediate_size)
            for index, matrix in enumerate(pair):
                gate_up.put((place, index), *at._in_precision(*matrix))
            down.put((place,), *at._in_precision(*last[0]))
            plain |= {scale_inv is None for _, scale_inv in (*pair, *last)}
            if len(plain) > 1:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: some matrices of {at.prefix}* and the experts before are FP8, "
                    "but all or none must be"
                )
        return self.ops.prepare_experts(gate_up.weight, gate_up.scale_inv, down.weight, down.scale_inv)

    def _linear(self, weight: torch.Tensor, scale_inv: torch.Tensor | None) -> Linear:
        weight, scale_inv = self._in_precision(weight, scale_inv)
        if scale_inv is None:
            return Linear(weight, self.ops)
        return Linear(self.ops.prepare_fp8_weight(weight, scale_inv), self.ops)

    def _in_precision(
        self, weight: torch.Tensor, scale_inv: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if scale_inv is None or self.precision == "fp8":
            return weight, scale_inv
        return self.ops.dequantize_weight(weight, scale_inv).to(self.dtype), None

    def _take_alike(
        self, rows: dict[str, int], columns: int
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Matrices of the same input, name -> rows. Either all of them are FP8, or none."""
        matrices = [self._take_matrix(name, count, columns) for name, count in rows.items()]
        if len({scale_inv is None for _, scale_inv in matrices}) > 1:
            names = ", ".join(self.prefix + name for name in rows)
            raise CheckpointError(
                f"{self.checkpoint.folder}: some of {names} are FP8, but all or none must be"
            )
        return matrices

    def _take_matrix(self, name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A matrix in the activations' dtype, or e4m3 with a scale for each block of 128 x 128, the last ones cut short."""
        name = f"{self.prefix}{name}.weight"
        weight = self.checkpoint.take(name, (rows, columns), (_FP8, *_FLOATS) if self.quantized else _FLOATS)
        if weight.dtype != _FP8:
            return weight.to(self.dtype), None
        blocks = (-(-rows // QUANT_BLOCK), -(-columns // QUANT_BLOCK))
        return weight, self.checkpoint.take(f"{name}_scale_inv", blocks, (torch.float32,))
