"""The smallest kernel, which shows whether Triton works on a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _double(x_ptr, out_ptr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, tl.load(x_ptr) * 2)


def doubled(x: Tensor) -> Tensor:
    """Return twice the first value of a tensor, computed by Triton."""
    out = torch.empty_like(x)
    _double[(1,)](x, out)
    return out
