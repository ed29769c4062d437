"""The interpreter itself: that it serves here, and computes in bfloat16 what a GPU would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels import dispatch
from kernels.triton_probe import doubled
from tests.interpreter import bf16


@triton.jit
def _matmul(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + row * SIZE + column)
    b = tl.load(b_ptr + row * SIZE + column)
    tl.store(out_ptr + row * SIZE + column, tl.dot(a, b).to(out_ptr.dtype.element_ty))


@triton.jit
def _copy(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def _add(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i))


def hard_values() -> torch.Tensor:
    """Float32 of every kind, [1024]: ties between two bfloat16, carries into the exponent, subnormal, infinite, not a number."""
    bits = torch.randint(0, 1 << 32, (1008,), generator=torch.Generator().manual_seed(0))
    chosen = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F7FFFFF, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x007FFFFF]
    chosen += [0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x3F800000, 0x00000001]
    return torch.cat([bits, torch.tensor(chosen)]).to(torch.uint32).view(torch.float32)


def test_the_interpreter_serves_tensors_of_the_cpu() -> None:
    x = torch.tensor([3.0])
    assert dispatch.use_triton(x) and dispatch.architecture(x.device) == "interpreter"
    assert doubled(x).item() == 6.0
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrix_multiply_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty_like(a)
    _matmul[(1,)](a, b, out, SIZE=16)
    truth = a.double() @ b.double()
    eager = (a @ b).double()
    assert (out.double() - truth).abs().max() <= 1.5 * (eager - truth).abs().max() + 1e-6


def test_casts_are_torchs() -> None:
    x = hard_values()
    narrow = torch.empty(len(x), dtype=torch.bfloat16)
    _copy[(1,)](x, narrow, SIZE=len(x))
    assert torch.equal(narrow.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(narrow[number].view(torch.int16), x.bfloat16()[number].view(torch.int16))
    wide = torch.empty(len(x))
    _copy[(1,)](narrow, wide, SIZE=len(x))
    assert torch.equal(wide[number].view(torch.int32), narrow.float()[number].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.bfloat16])
def test_casts_from_and_to_other_types(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -3.0, 258.0, 1000.0] * 4).to(dtype)
    narrow, back = torch.empty(16, dtype=torch.bfloat16), torch.empty_like(x)
    _copy[(1,)](x, narrow, SIZE=16)
    _copy[(1,)](narrow, back, SIZE=16)
    assert torch.equal(narrow, x.bfloat16()) and torch.equal(back, x.bfloat16().to(dtype))


def test_other_arithmetic_in_bfloat16_raises() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast to float32 first"):
        _add[(1,)](x, torch.empty_like(x), SIZE=16)


def test_the_repair_is_still_needed() -> None:
    """A triton that computes this right by itself needs no bf16.py: remove it then."""
    one = TensorHandle(bf16.rounded(np.full((16, 16), 1.0, np.float32)), tl.bfloat16)
    zero = TensorHandle(np.zeros((16, 16), np.float32), tl.float32)
    builder = InterpreterBuilder()
    product = InterpreterBuilder.create_dot.__wrapped__(builder, one, one, zero, None, 0)
    assert not np.array_equal(product.data, np.full((16, 16), 16.0)), "triton's own tl.dot is right now"
    tie = TensorHandle(np.array([0x3F818000], np.uint32).view(np.float32), tl.float32)
    cast = InterpreterBuilder.cast_impl.__wrapped__(builder, tie, tl.bfloat16)
    assert cast.data.item() != 0x3F82, "triton's own cast is right now"


def test_a_triton_with_other_methods_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, d, precision: d)
    with pytest.raises(RuntimeError, match="create_dot takes .*read it anew"):
        bf16.repair()
    monkeypatch.delattr(InterpreterBuilder, "create_dot")
    with pytest.raises(RuntimeError, match="create_dot takes None"):
        bf16.repair()
