"""Triton's kernels for causal attention over packed documents: forward, the gradient of queries, that of keys and values.

A document of L own tokens behind a prompt of P tokens, which stand in the document before it, is a row of P + L keys; its query i
is at position P + i of it. A program does one block of one document for one head; it reads from a list, made on the host and
longest work first, which. The gradients of keys and values are summed by the program that owns them, over all query heads that
see them and over the next document where that shares them: nothing is added atomically, so the same input gives the same bits.

For scores s = scale · q k, or cap · tanh(scale · q k / cap), o = Σ p v with p = exp(s − lse):

    dv = pᵀ do,   ds = p · (do vᵀ − δ),   δ = Σ_D do · o − dlse,   dq = scale · ds k,   dk = scale · dsᵀ q,

where ds takes a further factor 1 − tanh² with a cap (Dao et al., FlashAttention-2, 2023). The kernels work in powers of two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import architecture
from kernels.tiles import ARCHITECTURES, TILES, Case, Tile, tile
from kernels.triton_math import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1e30)
"""Score of a key that is not seen: finite, so that a row whose first tile shows it nothing has no NaN; what it adds is undone."""

_TILES = {  # kernel, bytes of an element, size of a head → (M queries, N keys, warps, stages) for each architecture
    ("attention_forward", 2, 64): [(128, 64, 8, 3)] * 3,
    ("attention_forward", 2, 128): [(128, 64, 8, 3)] * 3,
    ("attention_forward", 2, 256): [(64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2)],
    ("attention_forward", 4, 64): [(32, 32, 8, 1)] * 3,
    ("attention_forward", 4, 128): [(16, 16, 8, 1)] * 3,
    ("attention_forward", 4, 256): [(16, 16, 8, 1)] * 3,
    ("attention_dq", 2, 64): [(128, 64, 8, 2)] * 3,
    ("attention_dq", 2, 128): [(128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)],
    ("attention_dq", 2, 256): [(64, 32, 8, 2)] * 3,
    ("attention_dq", 4, 64): [(32, 32, 8, 2)] * 3,
    ("attention_dq", 4, 128): [(32, 32, 8, 2)] * 3,
    ("attention_dq", 4, 256): [(16, 16, 8, 2)] * 3,
    ("attention_dkdv", 2, 64): [(64, 128, 8, 2)] * 3,
    ("attention_dkdv", 2, 128): [(64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2)],
    ("attention_dkdv", 2, 256): [(32, 32, 8, 2), (32, 32, 8, 2), (32, 64, 8, 2)],
    ("attention_dkdv", 4, 64): [(32, 32, 8, 1)] * 3,
    ("attention_dkdv", 4, 128): [(16, 16, 8, 1)] * 3,
    ("attention_dkdv", 4, 256): [(16, 16, 8, 1)] * 3,
}
TILES.update(
    {
        (kernel, arch, size, head): Tile(*shape)
        for (kernel, size, head), shapes in _TILES.items()
        for arch, shape in zip(ARCHITECTURES, shapes, strict=True)
    }
)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(ptr, rows, stride, ok, DIM: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load [rows, HEAD], zero in rows that are not ok and in columns beyond DIM."""
    d = tl.arange(0, HEAD)
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED and DIM < HEAD:
        return tl.load(at, mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=ok[:, None], other=0.0)
    elif DIM < HEAD:
        return tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit  # type: ignore[untyped-decorator]
def _store(ptr, rows, stride, x, ok, DIM: tl.constexpr, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, HEAD)
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=ok[:, None] & (d < DIM)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _scores(x, scale, softcap, HAS_CAP: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scores of q·k in powers of two, and what they are differentiated by beside the scale."""
    if HAS_CAP:
        t = tanh(x * (scale / softcap), EXACT)
        return t * (softcap * LOG2E), 1 - t * t
    else:
        return x * (scale * LOG2E), 1.0


@triton.jit  # type: ignore[untyped-decorator]
def _seen(position, n, window, HAS_WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    age = position - n
    if HAS_WINDOW:
        return (age >= 0) & (age < window)
    else:
        return age >= 0


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    acc, total, peak, q, k_ptr, v_ptr, k_t, v_t, position, lo, hi, start, prompt, prompt_start, scale, softcap, window,
    DIM: tl.constexpr, HEAD: tl.constexpr, N: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Let the queries see the keys lo:hi, all of them unless MASKED."""
    for n0 in range(lo, hi, N):
        n = n0 + tl.arange(0, N)
        rows = n + tl.where(n < prompt, prompt_start, start - prompt)
        k = _rows(k_ptr, rows, k_t, n < hi, DIM, HEAD, MASKED)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, _ = _scores(x, scale, softcap, HAS_CAP, PRECISION == "ieee")
        if MASKED:
            s = tl.where(_seen(position[:, None], n[None, :], window, HAS_WINDOW), s, HIDDEN)
        new = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrunk = tl.exp2(peak - new)
        total = total * shrunk + tl.sum(p, 1)
        v = _rows(v_ptr, rows, v_t, n < hi, DIM, HEAD, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrunk[:, None], input_precision=PRECISION)
        peak = new
    return acc, total, peak


@triton.jit(do_not_specialize=["window", "tokens"])  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, work_ptr, scale, softcap, window, tokens, heads, group,
    q_t, q_h, k_t, k_h, v_t, v_h,
    DIM: tl.constexpr, HEAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend: M queries of one head; o [T, A, D] and lse [A, T] contiguous."""
    pid = tl.program_id(0)
    work_ptr += pid // heads * 5
    head = (pid % heads).to(tl.int64)
    start, length, first = tl.load(work_ptr), tl.load(work_ptr + 1), tl.load(work_ptr + 2)
    prompt, prompt_start = tl.load(work_ptr + 3), tl.load(work_ptr + 4)
    m = first + tl.arange(0, M)
    q = _rows(q_ptr + head * q_h, start + m, q_t, m < length, DIM, HEAD, True)
    k_ptr += head // group * k_h
    v_ptr += head // group * v_h
    acc = tl.zeros([M, HEAD], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], HIDDEN, tl.float32)
    hi = prompt + tl.minimum(length, first + M)
    if HAS_WINDOW:
        partly = tl.maximum(0, prompt + first - window + 1)
    else:
        partly = (prompt + first + 1) // N * N  # all queries see the keys before
        acc, total, peak = _attend(
            acc, total, peak, q, k_ptr, v_ptr, k_t, v_t, prompt + m, 0, partly, start, prompt, prompt_start,
            scale, softcap, window, DIM, HEAD, N, HAS_WINDOW, HAS_CAP, PRECISION, False,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_ptr, v_ptr, k_t, v_t, prompt + m, partly, hi, start, prompt, prompt_start,
        scale, softcap, window, DIM, HEAD, N, HAS_WINDOW, HAS_CAP, PRECISION, True,
    )  # fmt: skip
    _store(o_ptr + head * DIM, start + m, heads * DIM, acc / total[:, None], m < length, DIM, HEAD)
    tl.store(lse_ptr + head * tokens + start + m, (peak + tl.log2(total)) * LN2, mask=m < length)


@triton.jit(do_not_specialize=["window", "tokens"])  # type: ignore[untyped-decorator]
def dq_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, work_ptr, scale, softcap, window, tokens, heads,
    group, q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    DIM: tl.constexpr, HEAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Differentiate by M queries of one head; writes δ [A, T] too, for the other kernel; o and dq [T, A, D] contiguous."""
    pid = tl.program_id(0)
    work_ptr += pid // heads * 5
    head = (pid % heads).to(tl.int64)
    start, length, first = tl.load(work_ptr), tl.load(work_ptr + 1), tl.load(work_ptr + 2)
    prompt, prompt_start = tl.load(work_ptr + 3), tl.load(work_ptr + 4)
    m = first + tl.arange(0, M)
    ok = m < length
    row = heads * DIM
    do = _rows(do_ptr + head * do_h, start + m, do_t, ok, DIM, HEAD, True)
    o = _rows(o_ptr + head * DIM, start + m, row, ok, DIM, HEAD, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = head * tokens + start + m
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=ok, other=0.0)
    tl.store(delta_ptr + at, delta, mask=ok)
    lse = tl.load(lse_ptr + at, mask=ok, other=0.0) * LOG2E
    q = _rows(q_ptr + head * q_h, start + m, q_t, ok, DIM, HEAD, True)
    k_ptr += head // group * k_h
    v_ptr += head // group * v_h
    dq = tl.zeros([M, HEAD], tl.float32)
    lo = 0
    hi = prompt + tl.minimum(length, first + M)
    if HAS_WINDOW:
        lo = tl.maximum(0, prompt + first - window + 1)
    for n0 in range(lo, hi, N):
        n = n0 + tl.arange(0, N)
        rows = n + tl.where(n < prompt, prompt_start, start - prompt)
        k = _rows(k_ptr, rows, k_t, n < hi, DIM, HEAD, True)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, slope = _scores(x, scale, softcap, HAS_CAP, PRECISION == "ieee")
        seen = _seen((prompt + m)[:, None], n[None, :], window, HAS_WINDOW)
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        v = _rows(v_ptr, rows, v_t, n < hi, DIM, HEAD, True)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(dq_ptr + head * DIM, start + m, row, dq * scale, ok, DIM, HEAD)


@triton.jit(do_not_specialize=["window", "tokens"])  # type: ignore[untyped-decorator]
def dkdv_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, work_ptr, scale, softcap, window, tokens, kv_heads, group,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    DIM: tl.constexpr, HEAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Differentiate by N keys and values of one head; dk and dv [T, K, D] contiguous.

    Its queries are the document's own from the first key on, then all of the next document if that shares a key of these; one
    loop goes over both, for each query head of the group.
    """
    pid = tl.program_id(0)
    work_ptr += pid // kv_heads * 5
    kv = (pid % kv_heads).to(tl.int64)
    start, length, first = tl.load(work_ptr), tl.load(work_ptr + 1), tl.load(work_ptr + 2)
    shared, next_length = tl.load(work_ptr + 3), tl.load(work_ptr + 4)
    n = first + tl.arange(0, N)
    ok_n = n < length
    k = _rows(k_ptr + kv * k_h, start + n, k_t, ok_n, DIM, HEAD, True)
    v = _rows(v_ptr + kv * v_h, start + n, v_t, ok_n, DIM, HEAD, True)
    own_end = length
    next_end = tl.where(first < shared, next_length, 0)
    if HAS_WINDOW:
        own_end = tl.minimum(length, first + N - 1 + window)
        next_end = tl.minimum(next_end, tl.maximum(0, first + N - 1 + window - shared))
    own_steps = tl.cdiv(own_end - first, M)
    steps = own_steps + tl.cdiv(next_end, M)
    dk = tl.zeros([N, HEAD], tl.float32)
    dv = tl.zeros([N, HEAD], tl.float32)
    for step in range(0, group * steps):
        head = kv * group + step // steps
        i = step % steps
        after = i >= own_steps  # the next document's queries stand behind this one's, at positions behind the prompt
        m = tl.where(after, length + (i - own_steps) * M, first + i * M) + tl.arange(0, M)
        ok = m < tl.where(after, length + next_end, own_end)
        position = m + tl.where(after, shared - length, 0)
        q = _rows(q_ptr + head * q_h, start + m, q_t, ok, DIM, HEAD, True)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s, slope = _scores(x, scale, softcap, HAS_CAP, PRECISION == "ieee")
        at = head * tokens + start + m
        lse = tl.load(lse_ptr + at, mask=ok, other=0.0) * LOG2E
        seen = _seen(position[None, :], n[:, None], window, HAS_WINDOW) & (n < tl.where(after, shared, length))[:, None]
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        do = _rows(do_ptr + head * do_h, start + m, do_t, ok, DIM, HEAD, True)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        delta = tl.load(delta_ptr + at, mask=ok, other=0.0)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    row = kv_heads * DIM
    _store(dk_ptr + kv * DIM, start + n, row, dk * scale, ok_n, DIM, HEAD)
    _store(dv_ptr + kv * DIM, start + n, row, dv, ok_n, DIM, HEAD)


class Options(NamedTuple):
    """What the kernels are asked for."""

    scale: float
    window: int | None
    softcap: float | None

    def constants(self, q: Tensor) -> dict[str, Any]:
        """Return the kernels' switches for queries like these."""
        return {
            "DIM": q.shape[2],
            "HEAD": padded(q.shape[2]),
            "HAS_WINDOW": self.window is not None,
            "HAS_CAP": self.softcap is not None,
            "PRECISION": _precision(q.dtype),
        }

    def values(self) -> tuple[float, float, int]:
        """Return scale, softcap and window as the kernels take them."""
        return self.scale, self.softcap or 1.0, self.window or 0


def forward(
    q_TAD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu: tuple[int, ...], shared: tuple[int, ...] | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Return the output [T, A, D] and the log-sum-exp of the scores, float32 [A, T], both contiguous.

    Args:
        q_TAD: Queries, float32, bfloat16 or float16, [T, A, D]; D at most 256, the last stride 1, the others any.
        k_TKD: Keys of the same type, [T, K, D]; A is a multiple of K.
        v_TKD: Values of the same type, [T, K, D].
        cu: Edges of the documents.
        shared: Tokens that each document has from the beginning of the one before it; None: none do.
        options: Of the scores.
    """
    (tokens, heads, dim), kv_heads = q_TAD.shape, k_TKD.shape[1]
    out_TAD = q_TAD.new_empty(tokens, heads, dim)
    lse_AT = q_TAD.new_empty(heads, tokens, dtype=torch.float32)
    shape = _tile("attention_forward", q_TAD)
    work = _query_work(cu, shared, shape.m, q_TAD.device)
    if len(work):
        forward_kernel[(len(work) * heads,)](
            q_TAD, k_TKD, v_TKD, out_TAD, lse_AT, work, *options.values(), tokens, heads, heads // kv_heads,
            *_strides(q_TAD, k_TKD, v_TKD), **options.constants(q_TAD), **_meta(shape),
        )  # fmt: skip
    return out_TAD, lse_AT


def backward(
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_TAD: Tensor,
    lse_AT: Tensor,
    d_out_TAD: Tensor,
    d_lse_AT: Tensor | None,
    cu: tuple[int, ...],
    shared: tuple[int, ...] | None,
    options: Options,
    *,
    need_kv: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of queries, keys and values, contiguous, in their type: [T, A, D], and [T, K, D] or None unless needed.

    Args:
        q_TAD: As given to ``forward``, like the two that follow.
        k_TKD: Keys.
        v_TKD: Values.
        out_TAD: What ``forward`` returned.
        lse_AT: And with it.
        d_out_TAD: Gradient of the output, the last stride 1.
        d_lse_AT: Gradient of the log-sum-exp, float32, contiguous; None: 0.
        cu: As given to ``forward``, like the two that follow.
        shared: Tokens shared.
        options: Of the scores.
        need_kv: Compute those of keys and values.
    """
    (tokens, heads, dim), kv_heads = q_TAD.shape, k_TKD.shape[1]
    group, strides = heads // kv_heads, _strides(q_TAD, k_TKD, v_TKD, d_out_TAD)
    dq_TAD, delta_AT = q_TAD.new_empty(tokens, heads, dim), torch.empty_like(lse_AT)
    shape = _tile("attention_dq", q_TAD)
    work = _query_work(cu, shared, shape.m, q_TAD.device)
    if len(work):
        dq_kernel[(len(work) * heads,)](
            q_TAD, k_TKD, v_TKD, out_TAD, d_out_TAD, lse_AT, d_lse_AT, delta_AT, dq_TAD, work, *options.values(), tokens, heads,
            group, *strides, HAS_DLSE=d_lse_AT is not None, **options.constants(q_TAD), **_meta(shape),
        )  # fmt: skip
    if not need_kv:
        return dq_TAD, None, None
    dk_TKD, dv_TKD = (q_TAD.new_empty(tokens, kv_heads, dim) for _ in range(2))
    shape = _tile("attention_dkdv", q_TAD)
    work = _key_work(cu, shared, shape.n, q_TAD.device)
    if len(work):
        dkdv_kernel[(len(work) * kv_heads,)](
            q_TAD, k_TKD, v_TKD, d_out_TAD, lse_AT, delta_AT, dk_TKD, dv_TKD, work, *options.values(), tokens, kv_heads,
            group, *strides, **options.constants(q_TAD), **_meta(shape),
        )  # fmt: skip
    return dq_TAD, dk_TKD, dv_TKD


def padded(dim: int) -> int:
    """Return the size of a head as the kernels hold it: 64, 128 or 256."""
    return max(64, 1 << (dim - 1).bit_length())


def _precision(dtype: torch.dtype) -> str | None:
    return "ieee" if dtype == torch.float32 else None


def _tile(kernel: str, q: Tensor) -> Tile:
    return tile(kernel, architecture(q.device), q.element_size(), padded(q.shape[2]))


def _meta(shape: Tile) -> dict[str, int]:
    return {"M": shape.m, "N": shape.n, "num_warps": shape.warps, "num_stages": shape.stages}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _query_work(cu: tuple[int, ...], shared: tuple[int, ...] | None, block: int, device: torch.device) -> Tensor:
    """Return (start, own tokens, first query, prompt, its start) for each block of queries, int32 [n, 5]; see ``_work``."""
    return _work(cu, shared, block, device, _stream(device), keys=False)


def _key_work(cu: tuple[int, ...], shared: tuple[int, ...] | None, block: int, device: torch.device) -> Tensor:
    """Return (start, own tokens, first key, keys that the next document shares, its tokens) for each block, int32 [n, 5]."""
    return _work(cu, shared, block, device, _stream(device), keys=True)


def _stream(device: torch.device) -> int:
    """Return what tells streams apart: a list is made, and its memory used again, in the order of one."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=64)
def _work(
    cu: tuple[int, ...], shared: tuple[int, ...] | None, block: int, device: torch.device, stream: int, *, keys: bool
) -> Tensor:
    """Return the work on packed documents, longest first; made once for all layers of a micro-batch, without waiting for it."""
    edges = torch.tensor(cu, dtype=torch.int32)
    start, length = edges[:-1], edges.diff()
    prompt = torch.zeros_like(length) if shared is None else torch.tensor(shared, dtype=torch.int32)
    if keys:
        others = [torch.cat([x[1:], x.new_zeros(1)]) for x in (prompt, length)]
    else:
        others = [prompt, torch.cat([start[:1], start[:-1]])]
    blocks = (length + block - 1) // block
    document = torch.repeat_interleave(blocks.long())
    first = (torch.arange(len(document)) - (blocks.cumsum(0) - blocks)[document]) * block
    start, length, *others = (x[document] for x in (start, length, *others))
    cost = length - first + (first < others[0]) * others[1] if keys else others[0] + first
    work = torch.stack([start, length, first.int(), *others], 1)[cost.argsort(descending=True, stable=True)]
    return work.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else work


def cases(arch: str) -> list[Case]:
    """Return every kernel × dtype × size of a head, as compiled ahead of time for an architecture."""
    plain = [(d, dim, False) for d in (torch.bfloat16, torch.float16, torch.float32) for dim in (64, 96, 128, 256)]
    return [
        _case(name, kernel, arch, dtype, dim, every)
        for name, kernel in KERNELS.items()
        for dtype, dim, every in [*plain, *((torch.bfloat16, dim, True) for dim in (64, 128, 256))]
    ]


KERNELS = {"attention_forward": forward_kernel, "attention_dq": dq_kernel, "attention_dkdv": dkdv_kernel}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _case(name: str, kernel: Any, arch: str, dtype: torch.dtype, dim: int, every: bool) -> Case:
    """Return a kernel's case, with every option or with none."""
    shape = tile(name, arch, dtype.itemsize, padded(dim))
    constants = {
        "DIM": dim,
        "HEAD": padded(dim),
        "M": shape.m,
        "N": shape.n,
        "HAS_WINDOW": every,
        "HAS_CAP": every,
        "HAS_DLSE": every,
        "PRECISION": _precision(dtype),
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {key: _type(key, NAMES[dtype]) for key in kernel.arg_names if key not in constants}
    if "HAS_DLSE" in constants and not every:
        constants["dlse_ptr"] = None
        del signature["dlse_ptr"]
    divisible = tuple(key for key in signature if key.endswith(("_ptr", "_t", "_h")))
    title = f"{name} {NAMES[dtype]} {dim}{' window softcap lse' if every else ''}"
    return Case(title, kernel, signature, constants, divisible, shape)


def _type(argument: str, dtype: str) -> str:
    if argument in ("scale", "softcap"):
        return "fp32"
    if not argument.endswith("_ptr"):
        return "i32"
    return {"work_ptr": "*i32", "lse_ptr": "*fp32", "dlse_ptr": "*fp32", "delta_ptr": "*fp32"}.get(
        argument, f"*{dtype}"
    )
