"""bfloat16 in Triton's interpreter, which keeps its bits in uint16 and multiplies, rounds and adds those as integers.

Repaired are ``tl.dot`` and casts, which round to nearest, ties to even, as on a GPU. Other arithmetic in bfloat16, which kernels
here do not do, raises.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ACCEPTED = {
    "create_dot": ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"],
    "cast_impl": ["self", "src", "dst_type"],
    "create_fp_to_fp": ["self", "src", "dst_type", "rounding_mode"],
    "binary_op": ["self", "lhs", "rhs", "op"],
    "unary_op": ["self", "arg", "op"],
}
"""The interpreter's methods that are replaced, and their parameters, as in triton 3.6 to 3.9."""


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16, of two the even one; NaN stays NaN."""
    bits = np.asarray(values, np.float32).reshape(-1).view(np.uint32).reshape(np.shape(values))
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def repair() -> None:
    """Replace the interpreter's methods, once.

    Raises:
        RuntimeError: If this triton's are others than those that were read.
    """
    for name, parameters in ACCEPTED.items():
        method = getattr(InterpreterBuilder, name, None)
        found = None if method is None else list(inspect.signature(method).parameters)
        if found != parameters:
            raise RuntimeError(
                f"tests/interpreter/bf16.py: triton's {name} takes {found}, not {parameters}; read it anew."
            )
        if not hasattr(method, "__wrapped__"):
            replaced = {"create_dot": _dot, "cast_impl": _cast, "create_fp_to_fp": _cast}.get(name, _refuse)
            setattr(InterpreterBuilder, name, functools.wraps(method)(replaced(method)))


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: Any) -> Any:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bf16(handle) else handle


def _dot(plain: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, _wide(a), _wide(b), *rest)

    return create_dot


def _cast(plain: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        target, wide = dst_type.scalar, _wide(src)
        if target != tl.bfloat16:
            return wide if wide.dtype.scalar == target else plain(self, wide, dst_type, *rounding)
        assert wide.dtype.scalar != tl.float64 and all("RTZ" not in str(mode) for mode in rounding), "not repaired"
        return TensorHandle(rounded(wide.data), tl.bfloat16)

    return cast


def _refuse(plain: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *arguments: Any) -> Any:
        if any(isinstance(x, TensorHandle) and _is_bf16(x) for x in arguments):
            raise TypeError("arithmetic in bfloat16, which the interpreter does on the bits: cast to float32 first")
        return plain(self, *arguments)

    return operation
