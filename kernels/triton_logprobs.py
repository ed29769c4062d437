"""Statistics of log-probabilities straight from hidden states and output matrix: the logits are never written.

A program has some tokens and a split of the vocabulary, and goes through it a tile of logits at a time; the splits' statistics are
merged as those of ranks are (``output_layer.merge``). Without gradients only.

Legend: N tokens, V vocabulary (of this rank), H hidden size, S splits of the vocabulary, K rows of the statistics.
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
from kernels.triton_softmax import ELEMENTS

PROGRAMS = 528
"""That at least are started where there is work for them: four for each of an H200's processors."""
_FLOOR = tl.constexpr(FLOOR)

TILES["logprobs", "sm_80", 2, 0] = Tile(128, 64, 8, 3)
TILES["logprobs", "sm_90", 2, 0] = Tile(128, 128, 8, 3)
TILES["logprobs", "sm_100", 2, 0] = Tile(128, 64, 8, 3)
TILES.update({("logprobs", arch, 4, 0): Tile(64, 64, 4, 2) for arch in ARCHITECTURES})


@triton.jit  # type: ignore[untyped-decorator]
def _logprobs(  # type: ignore[no-untyped-def]
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    out_ptr,
    N,
    V,
    H,
    stride_n,
    stride_v,
    V_SPLIT,
    softcap,
    scale,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    TOTAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * V_SPLIT
    last = tl.minimum(first + V_SPLIT, V)
    here = rows < N
    label = tl.load(labels_ptr + rows, mask=here, other=-1)
    deep = tl.arange(0, BLOCK_H)
    top = tl.full([BLOCK_N], _FLOOR, tl.float32)
    sumexp = tl.zeros([BLOCK_N], tl.float32)
    target = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    hidden_ptrs = hidden_ptr + rows[:, None].to(tl.int64) * stride_n + deep[None, :]
    for start in range(first, last, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        real = columns < last
        weight_ptrs = weight_ptr + columns[None, :].to(tl.int64) * stride_v + deep[:, None]
        x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for h in range(0, H, BLOCK_H):
            within = h + deep < H
            a = tl.load(hidden_ptrs + h, mask=here[:, None] & within[None, :], other=0.0)
            b = tl.load(weight_ptrs + h, mask=real[None, :] & within[:, None], other=0.0)
            x = tl.dot(a, b, x, input_precision=PRECISION)
        if BIASED:
            x += tl.load(bias_ptr + columns, mask=real, other=0.0).to(tl.float32)[None, :]
        if CAPPED:
            x = softcap * tanh(x / softcap, True)
        x = tl.where(real[None, :], x * scale, -float("inf"))
        new = tl.maximum(top, tl.max(x, 1))
        shrink = tl.exp(top - new)
        e = tl.exp(x - new[:, None])
        target += tl.sum(tl.where(columns[None, :] == label[:, None], x, 0.0), 1)
        if TOTAL:
            total += tl.sum(tl.where(real[None, :], x, 0.0), 1)
        if WEIGHTED:
            below = tl.where(e > 0, x - new[:, None], 0.0)
            weighted = shrink * (weighted + (top - new) * sumexp) + tl.sum(e * below, 1)
        sumexp = sumexp * shrink + tl.sum(e, 1)
        top = new
    out_ptrs = out_ptr + tl.program_id(1).to(tl.int64) * N + rows
    step = tl.num_programs(1).to(tl.int64) * N
    tl.store(out_ptrs, top, mask=here)
    tl.store(out_ptrs + step, sumexp, mask=here)
    tl.store(out_ptrs + 2 * step, target, mask=here)
    tl.store(out_ptrs + 3 * step, total, mask=here)
    tl.store(out_ptrs + 4 * step, weighted, mask=here)


def linear_logit_stats(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    softcap: float | None,
    temperature: float,
    total: bool,
    weighted: bool,
) -> Tensor:
    """Return the statistics of ``reference.logit_stats`` for each split of the vocabulary.

    Args:
        hidden_NH: Hidden states, float32, bfloat16 or float16, [N, H].
        weight_VH: Output matrix of the same type, [V, H].
        bias_V: Of the logits; None: none.
        labels_N: Row of the output matrix that each target has, int64, [N].
        softcap: See ``reference.logit_stats``, as the rest.
        temperature: Of the softmax.
        total: Whether the sum of logits is wanted.
        weighted: Whether what entropy needs is.

    Returns:
        Float32 [5, S, N]; S is chosen so that the device has enough to do.
    """
    (n, h), v = hidden_NH.shape, weight_VH.shape[0]
    hidden_NH, weight_VH = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden_NH, weight_VH))
    shape = tile("logprobs", architecture(hidden_NH.device), hidden_NH.element_size())
    blocks, columns = triton.cdiv(n, shape.m), triton.cdiv(v, shape.n)
    split = shape.n * triton.cdiv(columns, min(columns, triton.cdiv(PROGRAMS, max(1, blocks))))
    out_KSN = torch.empty(5, triton.cdiv(v, split), n, dtype=torch.float32, device=hidden_NH.device)
    if n:
        _logprobs[(blocks, out_KSN.shape[1])](
            hidden_NH, weight_VH, weight_VH if bias_V is None else bias_V.contiguous(), labels_N.contiguous(), out_KSN,
            n, v, h, hidden_NH.stride(0), weight_VH.stride(0), split, softcap or 1.0, 1 / temperature,
            BIASED=bias_V is not None, CAPPED=softcap is not None, TOTAL=total, WEIGHTED=weighted,
            **_constants(shape, hidden_NH.element_size()), num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return out_KSN


def cases(arch: str) -> list[Case]:
    """Return the kernel as it is compiled ahead of time for an architecture: plain, and with all options."""
    return [
        _case(arch, size, name, full) for size, names in ELEMENTS.items() for name in names for full in (False, True)
    ]


def _constants(shape: Tile, size: int) -> dict[str, Any]:
    """Return what of the kernel follows from its tile and the bytes of an element."""
    deep = min(16, shape.n) if shape.n < 64 else 128 // size
    return {
        "PRECISION": "ieee" if size == 4 else "tf32",  # of which types of two bytes take no notice
        "BLOCK_N": shape.m,
        "BLOCK_V": shape.n,
        "BLOCK_H": deep,
    }


def _case(arch: str, size: int, name: str, full: bool) -> Case:
    shape = tile("logprobs", arch, size)
    pointers = ("hidden_ptr", "weight_ptr", "bias_ptr")
    signature = {**dict.fromkeys(pointers, f"*{name}"), "labels_ptr": "*i64", "out_ptr": "*fp32"}
    signature |= dict.fromkeys(("N", "V", "H", "stride_n", "stride_v", "V_SPLIT"), "i32")
    signature |= {"softcap": "fp32", "scale": "fp32"}
    constants = {"BIASED": full, "CAPPED": full, "TOTAL": full, "WEIGHTED": full, **_constants(shape, size)}
    divisible = (*pointers, "labels_ptr", "out_ptr", "V", "H", "stride_n", "stride_v", "V_SPLIT")
    return Case(f"logprobs {name}{' all options' * full}", _logprobs, signature, constants, divisible, shape)
