"""Causal attention over documents packed into one row: no document sees another, and no [T, T] mask is made.

A document may begin with tokens that stand in the document before it alone: the prompt of a pair, whose two answers both see it.
Its own tokens then see those first, and no others of that document.

Legend: T packed tokens, A query heads, K key/value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import use_triton
from kernels.reference import packed_attention_lse, packed_attention_sdpa

LARGEST_HEAD = 256
"""That Triton's kernels hold in a tile."""


class Options(TypedDict, total=False):
    """How documents are attended within."""

    shared: Sequence[int] | None
    """Tokens that each document has from the beginning of the one before it, which then shares none itself; None: none do."""
    scale: float | None
    """Of the scores; None: 1/√D."""
    window: int | None
    """A token sees itself and the window − 1 tokens before it; None: all before it."""
    softcap: float | None
    """Scores s become softcap · tanh(s / softcap); None: they stay."""
    dropout: float
    """Probability of dropping an attention weight; 0."""


def packed_attention(
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Sequence[int],
    *,
    edges_k: Sequence[int] | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Attend within each document: by Triton's kernels where they serve and nothing is dropped, else by the eager twin.

    Args:
        q_TAD: Queries, float32, bfloat16, float16 or float64, [T, A, D].
        k_TKD: Keys of the same type, [T, K, D]; A is a multiple of K.
        v_TKD: Values, [T, K, D].
        cu_seqlens: Document d owns the tokens cu_seqlens[d]:cu_seqlens[d + 1]; on the host, so that nothing waits for the device.
        edges_k: The same of keys and values where they are more than the queries, which are the last of their document's tokens (a
            part of a row whose keys come from other ranks too); without ``shared``, and by the eager twin. None: ``cu_seqlens``.
        options: See ``Options``.

    Returns:
        [T, A, D], contiguous.

    Raises:
        ValueError: If shapes, types and documents do not fit each other.
    """
    if edges_k is not None:
        return packed_attention_sdpa(q_TAD, k_TKD, v_TKD, cu_seqlens, edges_k=edges_k, **options)
    _check(q_TAD, k_TKD, v_TKD)
    _check_options(q_TAD.shape[0], cu_seqlens, options)
    if _by_triton(q_TAD, options):
        return _triton(q_TAD, k_TKD, v_TKD, cu_seqlens, options)[0]
    return packed_attention_sdpa(q_TAD, k_TKD, v_TKD, cu_seqlens, **options)


def packed_attention_outputs(
    q_TAD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: Sequence[int], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """Return what ``packed_attention`` does, and the log-sum-exp of each query's scores; both have a gradient.

    Args:
        q_TAD: See ``packed_attention``, as the rest.
        k_TKD: Keys.
        v_TKD: Values.
        cu_seqlens: Edges of the documents.
        options: See ``Options``.

    Returns:
        [T, A, D], contiguous, and [A, T], float32 (float64 of float64).

    Raises:
        ValueError: If shapes, types and documents do not fit each other.
    """
    _check(q_TAD, k_TKD, v_TKD)
    _check_options(q_TAD.shape[0], cu_seqlens, options)
    if _by_triton(q_TAD, options):
        return _triton(q_TAD, k_TKD, v_TKD, cu_seqlens, options)
    return packed_attention_lse(q_TAD, k_TKD, v_TKD, cu_seqlens, **options)


def with_prompts(x_TKD: Tensor, cu_seqlens: Sequence[int], shared: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Return keys or values with each document's shared prompt before it, and where each document then begins and ends.

    Queries of a document are to be aligned with the last of its keys.

    Args:
        x_TKD: Keys or values, [T, K, D].
        cu_seqlens: Edges of the documents.
        shared: Tokens shared; see ``Options``.

    Returns:
        [T + Σ shared, K, D], and the edges on the host.
    """
    documents = torch.split(x_TKD, [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)])
    parts = [
        part
        for before, own, prompt in zip((None, *documents), documents, shared, strict=False)
        for part in ((own,) if before is None or not prompt else (before[:prompt], own))
    ]
    edges = [0]
    for a, b, prompt in zip(cu_seqlens, cu_seqlens[1:], shared, strict=False):
        edges.append(edges[-1] + prompt + b - a)
    return torch.cat(parts), edges


class _Attention(torch.autograd.Function):
    """Triton's kernels; scale, window and softcap are the options."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TAD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        cu: tuple[int, ...],
        shared: tuple[int, ...] | None,
        options: tuple[float, int | None, float | None],
    ) -> tuple[Tensor, Tensor]:
        from kernels import triton_attention

        q, k, v = (_unit_stride(x) for x in (q_TAD, k_TKD, v_TKD))
        ctx.documents = cu, shared, triton_attention.Options(*options)
        out_TAD, lse_AT = triton_attention.forward(q, k, v, *ctx.documents)
        ctx.save_for_backward(q, k, v, out_TAD, lse_AT)
        ctx.set_materialize_grads(False)
        return out_TAD, lse_AT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TAD: Tensor | None, d_lse_AT: Tensor | None) -> tuple[Tensor | None, ...]:
        from kernels import triton_attention

        q, k, v, out_TAD, lse_AT = ctx.saved_tensors
        d_out = torch.zeros_like(out_TAD) if d_out_TAD is None else _unit_stride(d_out_TAD)
        d_lse = None if d_lse_AT is None else d_lse_AT.contiguous()
        need_kv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grads = triton_attention.backward(q, k, v, out_TAD, lse_AT, d_out, d_lse, *ctx.documents, need_kv=need_kv)
        return *grads, None, None, None


def _by_triton(q: Tensor, options: Options) -> bool:
    """Tell whether Triton's kernels do what is asked for."""
    known = not options.get("dropout") and q.shape[2] <= LARGEST_HEAD and q.dtype != torch.float64
    return known and use_triton(q)


def _triton(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int], options: Options) -> tuple[Tensor, Tensor]:
    shared, scale = options.get("shared"), options.get("scale")
    edges, prompts = tuple(cu_seqlens), tuple(shared) if shared is not None and any(shared) else None
    scores = (q.shape[2] ** -0.5 if scale is None else scale, options.get("window"), options.get("softcap"))
    out_TAD, lse_AT = _Attention.apply(q, k, v, edges, prompts, scores)  # type: ignore[no-untyped-call]
    return out_TAD, lse_AT


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what kernels would read beyond their tensors for, or answer wrongly."""
    fits = k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0
    if not fits or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"packed_attention: q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)} {v.dtype} do not "
            "fit; give [T, A, D], [T, K, D] and [T, K, D] of one dtype, A a multiple of K."
        )


def _check_options(tokens: int, cu_seqlens: Sequence[int], options: Options) -> None:
    shared, window, softcap = options.get("shared"), options.get("window"), options.get("softcap")
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"packed_attention: cu_seqlens must rise from 0 to the {tokens} tokens of q.")
    prompts = [0] * len(lengths) if shared is None else shared
    befores = zip([0, *lengths], [0, *prompts], strict=True)  # one more than there are documents
    if any(p and not (0 < p <= own and not theirs) for p, (own, theirs) in zip(prompts, befores, strict=False)):
        raise ValueError(
            "packed_attention: a document shares what the one before it has not of its own; correct shared."
        )
    if window is not None and window < 1:
        raise ValueError(f"packed_attention: window={window} hides a token from itself; give 1 or more, or None.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"packed_attention: softcap={softcap} leaves no scores; give more than 0, or None.")
