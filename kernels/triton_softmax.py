"""Softmax over the logits of a chunk: its statistics in one read, its gradient in one read and one write over the logits.

A program serves a row, block after block of its columns; what is read is made float32 first. The twins are
``reference.logit_stats`` and ``reference.logit_grad_``.

Legend: C tokens of a chunk, V vocabulary (of this rank), K rows of the statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import architecture
from kernels.reference import FLOOR
from kernels.tiles import ARCHITECTURES, TILES, Case, Tile, tile
from kernels.triton_math import tanh

ELEMENTS = {2: ("bf16", "fp16"), 4: ("fp32",)}
"""Types that are served, by bytes of an element, as signatures name them."""
_FLOOR = tl.constexpr(FLOOR)

TILES.update({("logit_stats", arch, 2, 0): Tile(1, 8192, 8, 2) for arch in ARCHITECTURES})
TILES.update({("logit_stats", arch, 4, 0): Tile(1, 4096, 8, 2) for arch in ARCHITECTURES})
TILES.update({("logit_grad", arch, 2, 0): Tile(1, 8192, 8, 2) for arch in ARCHITECTURES})
TILES.update({("logit_grad", arch, 4, 0): Tile(1, 4096, 8, 2) for arch in ARCHITECTURES})


@triton.jit  # type: ignore[untyped-decorator]
def _stats(  # type: ignore[no-untyped-def]
    z_ptr,
    labels_ptr,
    out_ptr,
    C,
    V,
    stride_c,
    softcap,
    scale,
    CAPPED: tl.constexpr,
    TOTAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_c
    columns = tl.arange(0, BLOCK)
    top = _FLOOR
    sumexp = 0.0
    total = 0.0
    weighted = 0.0
    for start in range(0, V, BLOCK):
        real = start + columns < V
        x = tl.load(z_ptr + start + columns, mask=real, other=0.0).to(tl.float32)
        if CAPPED:
            x = softcap * tanh(x / softcap, True)
        x = tl.where(real, x * scale, -float("inf"))
        new = tl.maximum(top, tl.max(x, 0))
        shrink = tl.exp(top - new)
        e = tl.exp(x - new)
        if TOTAL:
            total += tl.sum(tl.where(real, x, 0.0), 0)
        if WEIGHTED:
            weighted = shrink * (weighted + (top - new) * sumexp) + tl.sum(e * tl.where(e > 0, x - new, 0.0), 0)
        sumexp = sumexp * shrink + tl.sum(e, 0)
        top = new
    label = tl.load(labels_ptr + row)
    inside = (label >= 0) & (label < V)
    target = tl.load(z_ptr + label, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        target = softcap * tanh(target / softcap, True)
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + C + row, sumexp)
    tl.store(out_ptr + 2 * C + row, target * scale)
    tl.store(out_ptr + 3 * C + row, total)
    tl.store(out_ptr + 4 * C + row, weighted)


@triton.jit  # type: ignore[untyped-decorator]
def _grad(  # type: ignore[no-untyped-def]
    z_ptr,
    labels_ptr,
    lse_ptr,
    target_ptr,
    even_ptr,
    softmax_ptr,
    V,
    stride_c,
    softcap,
    scale,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_c
    label = tl.load(labels_ptr + row)
    lse = tl.load(lse_ptr + row)
    target = tl.load(target_ptr + row)
    even = tl.load(even_ptr + row)
    softmax = tl.load(softmax_ptr + row)
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        real = start + columns < V
        x = tl.load(z_ptr + start + columns, mask=real, other=0.0).to(tl.float32)
        slope = scale
        if CAPPED:
            t = tanh(x / softcap, True)
            x = softcap * t
            slope = scale * (1.0 - t * t)
        d = even + softmax * tl.exp(x * scale - lse) + tl.where(start + columns == label, target, 0.0)
        tl.store(z_ptr + start + columns, (d * slope).to(z_ptr.dtype.element_ty), mask=real)


def logit_stats(
    z_CV: Tensor, labels_C: Tensor, *, softcap: float | None, temperature: float, total: bool, weighted: bool
) -> Tensor:
    """Do as ``reference.logit_stats`` does; float64 is not served.

    Args:
        z_CV: Logits, neighbours in memory along V.
        labels_C: Column of each target, int64.
        softcap: Cap of the logits.
        temperature: Of the softmax.
        total: Whether the sum of logits is wanted.
        weighted: Whether what entropy needs is.
    """
    stats_KC = torch.empty(5, len(z_CV), dtype=torch.float32, device=z_CV.device)
    shape = tile("logit_stats", architecture(z_CV.device), z_CV.element_size())
    if len(z_CV):
        _stats[(len(z_CV),)](
            z_CV, labels_C.contiguous(), stats_KC, *z_CV.shape, z_CV.stride(0), softcap or 1.0, 1 / temperature,
            CAPPED=softcap is not None, TOTAL=total, WEIGHTED=weighted, BLOCK=shape.n,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return stats_KC


def logit_grad_(
    z_CV: Tensor,
    labels_C: Tensor,
    lse_C: Tensor,
    target_C: Tensor,
    even_C: Tensor,
    softmax_C: Tensor,
    *,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """Do as ``reference.logit_grad_`` does; float64 is not served.

    Args:
        z_CV: Logits, neighbours in memory along V.
        labels_C: Column of each target, int64.
        lse_C: Log-sum-exp.
        target_C: Coefficient of the onehot.
        even_C: Of 1.
        softmax_C: Of the softmax.
        softcap: Cap of the logits.
        temperature: Of the softmax.
    """
    shape = tile("logit_grad", architecture(z_CV.device), z_CV.element_size())
    if len(z_CV):
        _grad[(len(z_CV),)](
            z_CV, *(x.contiguous() for x in (labels_C, lse_C, target_C, even_C, softmax_C)),
            z_CV.shape[1], z_CV.stride(0), softcap or 1.0, 1 / temperature,
            CAPPED=softcap is not None, BLOCK=shape.n, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return z_CV


def cases(arch: str) -> list[Case]:
    """Return every kernel of this file as it is compiled ahead of time for an architecture: plain, and with all options."""
    found: list[Case] = []
    for size, names in ELEMENTS.items():
        for name in names:
            for full in (False, True):
                found += [_stats_case(arch, size, name, full), _grad_case(arch, size, name, full)]
    return found


def _stats_case(arch: str, size: int, name: str, full: bool) -> Case:
    shape = tile("logit_stats", arch, size)
    constants: dict[str, Any] = {"CAPPED": full, "TOTAL": full, "WEIGHTED": full, "BLOCK": shape.n}
    signature = {
        "z_ptr": f"*{name}",
        "labels_ptr": "*i64",
        "out_ptr": "*fp32",
        "C": "i32",
        "V": "i32",
        "stride_c": "i32",
    }
    signature |= {"softcap": "fp32", "scale": "fp32"}
    divisible = ("z_ptr", "labels_ptr", "out_ptr", "V", "stride_c")
    return Case(f"logit_stats {name}{' all options' * full}", _stats, signature, constants, divisible, shape)


def _grad_case(arch: str, size: int, name: str, full: bool) -> Case:
    shape = tile("logit_grad", arch, size)
    vectors = ("lse_ptr", "target_ptr", "even_ptr", "softmax_ptr")
    signature = {
        "z_ptr": f"*{name}",
        "labels_ptr": "*i64",
        **dict.fromkeys(vectors, "*fp32"),
        "V": "i32",
        "stride_c": "i32",
    }
    signature |= {"softcap": "fp32", "scale": "fp32"}
    divisible = ("z_ptr", "labels_ptr", *vectors, "V", "stride_c")
    constants: dict[str, Any] = {"CAPPED": full, "BLOCK": shape.n}
    return Case(f"logit_grad {name}{' all options' * full}", _grad, signature, constants, divisible, shape)
