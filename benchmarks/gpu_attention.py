"""Section (c) of gpu.py: attention over packed documents, beside everything else that computes it.

Legend: T packed tokens, A query heads, K key/value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_section import Job, Run, Timing, attempt, compare
from torch import Tensor

MEAN_LENGTH = 1024
GOAL = 1.10
"""Our time over that of the fastest rival, at most."""
OURS = "ours"
TOLERANCE = 0.02
"""Largest gap at which a side has computed the same, in bfloat16."""


@dataclass(frozen=True)
class Case:
    """The tensors of a comparison."""

    q_TAD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    d_out_TAD: Tensor
    cu_seqlens: list[int]

    @property
    def edges(self) -> Tensor:
        """The documents' bounds on the device, int32."""
        return torch.tensor(self.cu_seqlens, dtype=torch.int32, device=self.q_TAD.device)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [b - a for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]

    @property
    def flops(self) -> float:
        """Operations of a forward pass: two products over the pairs of tokens of which one sees the other."""
        _, heads, size = self.q_TAD.shape
        return 2.0 * heads * size * sum(n * n for n in self.lengths)


Attention = Callable[[], Tensor]


def run(job: Job) -> None:
    """Measure documents of equal and of exponential length, forward alone and with backward."""
    tokens, mean = job.sizes((16_384, MEAN_LENGTH), (96, 16))
    cases = {"equal lengths": equal(tokens, mean), "exponential lengths": exponential(tokens, mean)}
    for name, lengths in cases.items():
        case = inputs(job, lengths)
        table = f"{name}: {len(lengths)} documents in {tokens:,} tokens, {case.q_TAD.shape[1]}/{case.k_TKD.shape[1]} heads of "
        table += f"{case.q_TAD.shape[2]}"
        gaps = {side: _gap(job, case, prepare) for side, prepare in sides(job, case).items()}
        works = [side for side, gap in gaps.items() if isinstance(gap, float)]
        forward = compare(job, {side: partial(_forward, sides(job, case)[side]) for side in works})
        whole = compare(job, {side: partial(_both, case, sides(job, case)[side]) for side in works})
        for side, gap in gaps.items():
            _row(job, table, case, side, gap, forward.get(side), whole.get(side))
        right = {side: whole[side].ms for side, gap in gaps.items() if isinstance(gap, float) and gap <= TOLERANCE}
        _goal(job, name, {side: ms for side, ms in right.items() if ms is not None})


def equal(tokens: int, length: int) -> list[int]:
    """Return lengths of documents, all the same."""
    return [length] * (tokens // length)


def exponential(tokens: int, mean: int) -> list[int]:
    """Return lengths of documents drawn from an exponential distribution, always the same, that fill so many tokens."""
    make, lengths = torch.Generator().manual_seed(0), list[int]()
    while (left := tokens - sum(lengths)) > 0:
        drawn = torch.empty(()).exponential_(1 / mean, generator=make)
        lengths.append(min(left, max(1, round(float(drawn)))))
    return lengths


def inputs(job: Job, lengths: list[int], head: int = 128) -> Case:
    """Return random tensors for documents of these lengths."""
    heads, kv_heads, size = job.sizes((32, 8, head), (4, 1, 16))
    make = torch.Generator(job.device).manual_seed(0)

    def drawn(count: int) -> Tensor:
        return torch.randn(sum(lengths), count, size, generator=make, device=job.device, dtype=job.dtype)

    q, k, v = (drawn(n).requires_grad_() for n in (heads, kv_heads, kv_heads))
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return Case(q, k, v, drawn(heads), edges)


def sides(job: Job, case: Case) -> dict[str, Callable[[], Attention]]:
    """Return what computes the attention of a case, [T, A, D]."""
    return {
        OURS: lambda: ours(case),
        "FlashAttention-3": lambda: _flash(case, "flash_attn_interface"),
        "FlashAttention-2": lambda: _flash(case, "flash_attn"),
        "torch's varlen_attn": lambda: _varlen(job, case),
        "flex_attention, compiled": lambda: _flex(job, case),
        "SDPA per document": lambda: _per_document(case),
    }


def ours(case: Case) -> Attention:
    """Return our attention of a case."""
    from kernels.packed_attention import packed_attention

    return lambda: packed_attention(case.q_TAD, case.k_TKD, case.v_TKD, case.cu_seqlens)


def _per_document(case: Case) -> Attention:
    from kernels.reference import packed_attention_sdpa

    return lambda: packed_attention_sdpa(case.q_TAD, case.k_TKD, case.v_TKD, case.cu_seqlens)


def _flash(case: Case, package: str) -> Attention:
    import importlib

    varlen = importlib.import_module(package).flash_attn_varlen_func
    edges, longest = case.edges, max(case.lengths)

    def attention() -> Tensor:
        out = varlen(case.q_TAD, case.k_TKD, case.v_TKD, edges, edges, longest, longest, causal=True)
        return (
            out[0] if isinstance(out, tuple) else out
        )  # the first releases of FlashAttention-3 return the log-sum-exp too

    return attention


def _varlen(job: Job, case: Case) -> Attention:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    if job.smoke:
        raise ImportError("varlen_attn needs a card")
    edges, longest, groups = case.edges, max(case.lengths), case.q_TAD.shape[1] // case.k_TKD.shape[1]
    options: dict[str, Any] = {}
    named = inspect.signature(varlen_attn).parameters
    grouped = "enable_gqa" in named
    options |= {"enable_gqa": True} if grouped else {}
    options |= {"window_size": (-1, 0)} if "window_size" in named else {"is_causal": True}

    def attention() -> Tensor:
        k, v = (x if grouped else x.repeat_interleave(groups, 1) for x in (case.k_TKD, case.v_TKD))
        out = varlen_attn(case.q_TAD, k, v, edges, edges, longest, longest, **options)
        assert isinstance(out, Tensor)
        return out

    return attention


def _flex(job: Job, case: Case) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if job.smoke:
        raise ImportError("flex_attention's backward pass needs a card")
    tokens = len(case.q_TAD)
    document_T = torch.repeat_interleave(torch.tensor(case.lengths, device=job.device))

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_T[query] == document_T[key])

    mask = create_block_mask(seen, None, None, tokens, tokens, device=job.device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attention() -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (case.q_TAD, case.k_TKD, case.v_TKD))
        out: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attention


def _forward(prepare: Callable[[], Attention]) -> Run:
    """Return a call that computes the output alone."""
    return torch.no_grad()(prepare())


def _both(case: Case, prepare: Callable[[], Attention]) -> Run:
    """Return a call that computes the output and the three gradients."""
    return both(case, prepare())


def both(case: Case, attention: Attention) -> Run:
    """Return a call that computes an attention's output and the three gradients."""
    inputs = (case.q_TAD, case.k_TKD, case.v_TKD)
    return lambda: torch.autograd.grad(attention(), inputs, case.d_out_TAD)


def _gap(job: Job, case: Case, prepare: Callable[[], Attention]) -> float | str:
    """Return how far a side's output is from one SDPA call a document, or why it has none."""
    if job.left <= 0:
        return "skipped: out of time"

    def gap() -> float:
        with torch.no_grad():
            expected, out = _per_document(case)().float(), prepare()().float()
            return float((out - expected).abs().max() / expected.abs().max())

    found, reason = attempt(gap)
    return reason if found is None else found


def _row(
    job: Job, table: str, case: Case, side: str, gap: float | str, forward: Timing | None, both: Timing | None
) -> None:
    if isinstance(gap, str) or forward is None or both is None:
        job.row(table, side=side, forward_ms=None, both_ms=None, note=gap)
        return
    other = "" if gap <= TOLERANCE else "not the same computation"
    job.row(
        table,
        side=side,
        forward_ms=forward.ms,
        both_ms=both.ms,
        forward_TFLOP_per_s=case.flops / forward.ms / 1e9 if forward.ms else None,
        both_TFLOP_per_s=3 * case.flops / both.ms / 1e9 if both.ms else None,
        peak_GB=both.peak_gb,
        gap=gap,
        note="; ".join(filter(None, [other, forward.state, both.state])),
    )


def _goal(job: Job, name: str, both_ms: dict[str, float]) -> None:
    goal = f"(c) {name}: at most {GOAL:.2f} times the fastest rival, forward and backward; else that one is the default"
    rivals = {side: ms for side, ms in both_ms.items() if side != OURS}
    if OURS not in both_ms or not rivals or job.smoke:
        job.goal(goal, "–", None)
        return
    fastest = min(rivals, key=lambda side: rivals[side])
    ratio = both_ms[OURS] / rivals[fastest]
    job.goal(goal, f"{ratio:.2f} times {fastest}", ratio <= GOAL)
