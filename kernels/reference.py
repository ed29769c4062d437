"""Eager twins of the kernels: always right, on any device, and what the kernels are tested against.

Those of the output layer work on the logits z of a few tokens, by blocks of columns, so that beside z no second [C, V] exists. What
is normalised is z' = c·tanh(z / c) / τ, with softcap c and temperature τ.

Legend: N trained tokens, C tokens of a chunk (or queries of one), V vocabulary (of this rank), B columns of a block; T packed
tokens, L tokens of a document, A query heads, K key/value heads, G query heads of one of these, D size of a head, n documents of
one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK, NARROWEST = 2**19, 64
"""Logits at a time, which stay in the caches, and the fewest columns of them."""
MAX, SUMEXP, TARGET, TOTAL, WEIGHTED = range(5)
"""Rows of the statistics of tokens: m = max z', Σ exp(z' − m), z' of the target, Σ z', Σ exp(z' − m)·(z' − m)."""
FLOOR = -1e30
"""Least m, so that logits that are all −∞ (of columns that stand for no token) have no NaN."""


def sums_by_group(values_N: Tensor, bounds: Sequence[int]) -> Tensor:
    """Return the sums of values over groups, differentiable; added up in float64, so that no order shows.

    Args:
        values_N: Float32 [N].
        bounds: Group g owns the values bounds[g]:bounds[g + 1], the first bound being 0; length G + 1.

    Returns:
        Float32 [G].
    """
    lengths_G = torch.tensor([b - a for a, b in zip(bounds, bounds[1:], strict=False)], dtype=torch.int64)
    lengths_G = lengths_G.to(values_N.device, non_blocking=True)
    group_N = torch.repeat_interleave(lengths_G, output_size=len(values_N))
    return values_N.new_zeros(len(lengths_G), dtype=torch.float64).index_add(0, group_N, values_N.double()).float()


def logit_stats(
    z_CV: Tensor, labels_C: Tensor, *, softcap: float | None, temperature: float, total: bool, weighted: bool
) -> Tensor:
    """Return what log-probabilities are made of, for these columns.

    Args:
        z_CV: Logits before softcap and temperature, float32, bfloat16, float16 or float64, [C, V].
        labels_C: Column of each target, int64, [C]; one that is not among the columns contributes 0.
        softcap: c; None: no cap.
        temperature: τ.
        total: Whether TOTAL is wanted; else it is 0.
        weighted: Whether WEIGHTED is; else it is 0.

    Returns:
        Rows MAX to WEIGHTED, float32 (float64 of float64), [5, C].
    """
    kind = torch.promote_types(z_CV.dtype, torch.float32)
    stats_KC = torch.zeros(5, len(z_CV), dtype=kind, device=z_CV.device)
    column_C1, inside_C = _columns(labels_C, z_CV.shape[1])
    ends_C2 = torch.cat([z_CV.amax(1, keepdim=True), z_CV.gather(1, column_C1)], 1).to(kind)
    ends_C2, _ = _scaled(ends_C2, softcap, temperature)  # which keeps the order
    stats_KC[MAX] = ends_C2[:, 0].clamp_min(FLOOR)
    stats_KC[TARGET] = torch.where(inside_C, ends_C2[:, 1], 0.0)
    for z_CB in _blocks(z_CV):
        x_CB, _ = _scaled(z_CB.to(kind), softcap, temperature)
        if total:
            stats_KC[TOTAL] += x_CB.sum(1)
        e_CB = (x_CB - stats_KC[MAX, :, None]).exp_()
        stats_KC[SUMEXP] += e_CB.sum(1)
        if weighted:
            stats_KC[WEIGHTED] -= torch.special.entr(e_CB).sum(1)
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
    """Write (target · onehot + even + softmax · exp(z' − lse)) · ∂z'/∂z over the logits, and return them.

    Args:
        z_CV: Logits before softcap and temperature, [C, V].
        labels_C: Column of each target, int64, [C]; one that is not among the columns has no onehot here.
        lse_C: Log-sum-exp of z' over the whole vocabulary, float32 (float64 of float64), [C].
        target_C: Coefficient of each token's onehot, like lse_C.
        even_C: Of 1.
        softmax_C: Of the softmax.
        softcap: c; None: no cap.
        temperature: τ.
    """
    column_C1, inside_C = _columns(labels_C, z_CV.shape[1])
    z_C1 = z_CV.gather(1, column_C1).to(lse_C.dtype)
    d_C1 = _slope(z_C1, lse_C, torch.where(inside_C, even_C + target_C, even_C), softmax_C, softcap, temperature)
    for z_CB in _blocks(z_CV):
        x_CB = z_CB.to(lse_C.dtype)  # itself, where that is its type
        d_CB = _slope(x_CB, lse_C, even_C, softmax_C, softcap, temperature)
        if d_CB is not z_CB:
            z_CB.copy_(d_CB)
    return z_CV.scatter_(1, column_C1, d_C1.to(z_CV.dtype))


def _blocks(z_CV: Tensor) -> tuple[Tensor, ...]:
    """Return views of blocks of columns."""
    return torch.split(z_CV, max(NARROWEST, BLOCK // max(1, len(z_CV))), 1)


def _columns(labels_C: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return a column for each label, [C, 1], and whether the label is there, [C]."""
    inside_C = (labels_C >= 0) & (labels_C < vocabulary)
    return torch.where(inside_C, labels_C, 0)[:, None], inside_C


def _scaled(x_CB: Tensor, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor | float]:
    """Return z' and ∂z'/∂z; x itself where nothing is to be done."""
    if softcap is None:
        return (x_CB if temperature == 1.0 else x_CB / temperature), 1 / temperature
    tanh_CB = (x_CB / softcap).tanh_()
    return tanh_CB * (softcap / temperature), (1 - tanh_CB.square()) / temperature


def _slope(
    x_CB: Tensor, lse_C: Tensor, even_C: Tensor, softmax_C: Tensor, softcap: float | None, temperature: float
) -> Tensor:
    """Return (even + softmax · exp(z' − lse)) · ∂z'/∂z, over z where there is neither softcap nor temperature."""
    scaled_CB, slope = _scaled(x_CB, softcap, temperature)
    out_CB = scaled_CB.sub_(lse_C[:, None]).exp_().mul_(softmax_C[:, None]).add_(even_C[:, None])
    return out_CB if isinstance(slope, float) and slope == 1.0 else out_CB.mul_(slope)


def packed_attention_sdpa(
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Sequence[int],
    *,
    shared: Sequence[int] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    edges_k: Sequence[int] | None = None,
) -> Tensor:
    """Attend within each document by torch's scaled_dot_product_attention, one call for neighbours of one length.

    With a softcap, which that function does not know, by ``packed_attention_lse``. Arguments and what is returned:
    ``packed_attention.packed_attention``.
    """
    if edges_k is not None:
        return _attend_last(q_TAD, k_TKD, v_TKD, cu_seqlens, edges_k, scale=scale, window=window, dropout=dropout)
    if softcap is not None:
        return packed_attention_lse(
            q_TAD, k_TKD, v_TKD, cu_seqlens, shared=shared, scale=scale, window=window, softcap=softcap, dropout=dropout
        )[0]
    runs = _runs(cu_seqlens, shared)
    sizes = [length * n for length, _, n in runs]
    # split, not slices: the gradient of a slice is as large as the whole row, the gradient of a split is one concatenation
    parts = list(zip(*(torch.split(x, sizes) for x in (q_TAD, k_TKD, v_TKD)), strict=True))
    outputs = []
    for i, ((length, prompt, n), (q, k, v)) in enumerate(zip(runs, parts, strict=True)):
        if not length:
            continue
        if prompt:
            _, k_before, v_before = parts[i - 1]
            k, v = torch.cat([k_before[:prompt], k]), torch.cat([v_before[:prompt], v])
        keys = prompt + length
        windowed = window is not None and window < keys
        mask = _mask(length, keys, window if windowed else None, q.device) if windowed or prompt else None
        q_nALD, k_nKLD, v_nKLD = (x.reshape(n, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q_nALD,
            k_nKLD,
            v_nKLD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=q_TAD.shape[1] != k_TKD.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(n * length, *q.shape[1:]))
    return torch.cat(outputs or [q_TAD])


def _attend_last(
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    edges_q: Sequence[int],
    edges_k: Sequence[int],
    *,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Attend where the queries of a document are the last of its keys, which are as many or more, one call a document."""
    sizes = [[b - a for a, b in zip(edges, edges[1:], strict=False)] for edges in (edges_q, edges_k)]
    parts = torch.split(q_TAD, sizes[0]), torch.split(k_TKD, sizes[1]), torch.split(v_TKD, sizes[1])
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        whole = len(q) == len(k) and (window is None or window >= len(k))
        out_ALD = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=None if whole else _mask(len(q), len(k), window, q.device),
            is_causal=whole,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )[0]
        outputs.append(out_ALD.transpose(0, 1))
    return torch.cat(outputs or [q_TAD])


def packed_attention_lse(
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Sequence[int],
    *,
    shared: Sequence[int] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    workspace_mb: float = 64,
) -> tuple[Tensor, Tensor]:
    """Attend within each document by scores written out, a few queries at a time, and again in the backward pass.

    Args:
        q_TAD: Like all but the last: ``packed_attention.packed_attention``.
        k_TKD: Keys.
        v_TKD: Values.
        cu_seqlens: Edges of the documents.
        shared: Tokens shared.
        scale: Of the scores.
        window: Of the tokens seen.
        softcap: Of the scores.
        dropout: Of the weights.
        workspace_mb: Size of the scores that exist at once, float32, MiB.

    Returns:
        The output [T, A, D], and the log-sum-exp of each query's scores, float32 (float64 for float64), [A, T].
    """
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    scale = q_TAD.shape[2] ** -0.5 if scale is None else scale
    outs, lses = [], []
    parts = [torch.split(x, lengths) for x in (q_TAD, k_TKD, v_TKD)]
    for i, (q_LAD, k, v) in enumerate(zip(*parts, strict=True)):
        prompt = 0 if shared is None else shared[i]
        if prompt:
            k, v = torch.cat([parts[1][i - 1][:prompt], k]), torch.cat([parts[2][i - 1][:prompt], v])
        rows = max(1, int(workspace_mb * 2**20) // (4 * q_LAD.shape[1] * max(1, len(k))))
        stop = prompt
        for q_CAD in torch.split(q_LAD, rows) if len(q_LAD) else ():
            first, stop = 0 if window is None else max(0, stop - window + 1), stop + len(q_CAD)
            seen_CL = _mask(len(q_CAD), stop - first, window, q_CAD.device)
            out_CAD, lse_AC = checkpoint(
                _attend, q_CAD, k[first:stop], v[first:stop], seen_CL, scale, softcap, dropout,
                use_reentrant=False, preserve_rng_state=dropout > 0,
            )  # fmt: skip
            outs.append(out_CAD)
            lses.append(lse_AC)
    if not outs:
        return q_TAD, q_TAD.sum(2).t().to(torch.promote_types(q_TAD.dtype, torch.float32))
    return torch.cat(outs), torch.cat(lses, 1)


def _attend(
    q_CAD: Tensor, k_LKD: Tensor, v_LKD: Tensor, seen_CL: Tensor, scale: float, softcap: float | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return the output of some queries, in their type, and the log-sum-exp of their scores; float32 in between."""
    wide = torch.promote_types(q_CAD.dtype, torch.float32)
    # a head of keys and values serves a group of G query heads
    q_CKGD = q_CAD.to(wide).view(len(q_CAD), k_LKD.shape[1], -1, q_CAD.shape[2])
    scores_KGCL = torch.einsum("ckgd,lkd->kgcl", q_CKGD, k_LKD.to(wide)) * scale
    if softcap is not None:
        scores_KGCL = softcap * torch.tanh(scores_KGCL / softcap)
    scores_KGCL = scores_KGCL.masked_fill(~seen_CL, float("-inf"))
    lse_KGC = scores_KGCL.logsumexp(-1)
    weights_KGCL = F.dropout((scores_KGCL - lse_KGC[..., None]).exp(), dropout)
    out_CKGD = torch.einsum("kgcl,lkd->ckgd", weights_KGCL, v_LKD.to(wide))
    return out_CKGD.flatten(1, 2).to(q_CAD.dtype), lse_KGC.flatten(0, 1)


def _runs(cu_seqlens: Sequence[int], shared: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """Return neighbours that go through one call as (own tokens, shared prompt, documents); what shares a prompt goes alone."""
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    prompts = [0] * len(lengths) if shared is None else list(shared)
    pairs = [d if own or after else -1 for d, (own, after) in enumerate(zip(prompts, [*prompts, 0][1:], strict=True))]
    return [(*key[:2], len(list(same))) for key, same in groupby(zip(lengths, prompts, pairs, strict=True))]


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query of one document sees, [queries, keys], the last query being at the last key."""
    age = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return age >= 0 if window is None else (age >= 0) & (age < window)
