"""Triton's interpreter with three repairs: casts round as the hardware does (its own cut bf16 off and round e4m3 wrongly),
loops may end at a run-time number (its own cannot with newer numpy), and products of bf16 are products of the numbers (its own
are of their bits)."""

import os
from typing import Any

import pytest
import torch

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def prepare() -> None:
    """Before the first import of triton: kernels run on CPU tensors unless there is a GPU. Skips the test without Triton."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        from triton.runtime import interpreter

        interpreter._convert_float = _convert
        original = interpreter._patch_lang_tensor

        def patch(tensor: Any, scope: Any) -> None:
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patch
        dot = interpreter.InterpreterBuilder.create_dot

        def dot_of_numbers(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
            return dot(self, _widened(a), _widened(b), d, *options)

        interpreter.InterpreterBuilder.create_dot = dot_of_numbers


def _widened(handle: Any) -> Any:
    """A bf16 operand as fp32; others as they are."""
    if str(handle.dtype.scalar) != "bf16":
        return handle
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(_convert(handle.data, bfloat16, float32, None).view("float32"), float32)


def _convert(data: Any, source: Any, target: Any, rounding_mode: object) -> Any:
    """numpy bits of `source` -> numpy bits of `target`, Triton's types, rounded to the nearest as torch does it."""
    types = {
        "fp8e4nv": torch.float8_e4m3fn,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
    }
    numbers = torch.from_numpy(data.copy()).view(types[str(source)])
    converted = numbers.to(types[str(target)])
    return converted.view(_BITS[converted.itemsize]).numpy().view(f"uint{8 * converted.itemsize}")
