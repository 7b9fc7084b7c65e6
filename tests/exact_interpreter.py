"""Triton's interpreter, repaired: casts round as the hardware does (its own cut bf16 off and round e4m3 wrongly), matrices of
bf16 are multiplied as numbers (not as their bits), and loops may end at a run-time number (with newer numpy they cannot)."""

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

        if interpreter._convert_float is not _convert:
            _repair(interpreter)


def _repair(interpreter: Any) -> None:
    import triton.language as tl

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def multiply(self: Any, *operands: Any) -> Any:
        return dot(self, *(widen(operand) for operand in operands[:2]), *operands[2:])

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        numbers = _convert(operand.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(numbers, tl.float32)

    interpreter._convert_float = _convert
    interpreter._patch_lang_tensor = patch_index
    interpreter.InterpreterBuilder.create_dot = multiply


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
