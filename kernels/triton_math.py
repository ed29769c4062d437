"""Functions that several kernels call and Triton's own language lacks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def tanh(x, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return tanh of float32: to float32's precision where EXACT, by its series near 0, else good enough for half types."""
    if EXACT:
        square = x * x
        series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
        e = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        t = tl.where(square < 0.0625, x * series, tl.where(x < 0, -far, far))
    else:
        t = 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268))
    return t
