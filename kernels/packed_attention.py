"""Causal attention over documents packed into one row: no document sees another, and no [T, T] mask is made.

A document may begin with tokens that stand in the document before it alone: the prompt of a pair, whose two answers both see it.
Its own tokens then see those first, and no others of that document.

Legend: T packed tokens, L tokens of a document, P tokens of a shared prompt, A query heads, K key/value heads, D size of a head,
n documents of one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention_sdpa(
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Sequence[int],
    *,
    shared: Sequence[int] | None = None,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend within each document by torch's scaled_dot_product_attention, one call for neighbours of one length.

    Args:
        q_TAD: Queries, [T, A, D].
        k_TKD: Keys, [T, K, D]; A is a multiple of K.
        v_TKD: Values, [T, K, D].
        cu_seqlens: Document d owns the tokens cu_seqlens[d]:cu_seqlens[d + 1]; on the host, so that nothing waits for the device.
        shared: Tokens that each document has from the beginning of the one before it, which then shares none itself; None: none do.
        scale: Of the scores; None: 1/√D.
        window: A token sees itself and the window − 1 tokens before it; None: all before it.
        dropout: Probability of dropping an attention weight.

    Returns:
        [T, A, D], contiguous.
    """
    runs = _runs(cu_seqlens, shared)
    sizes = [length * n for length, _, n in runs]
    # split, not slices: the gradient of a slice is as large as the whole row, the gradient of a split is one concatenation
    parts = list(zip(*(torch.split(x, sizes) for x in (q_TAD, k_TKD, v_TKD)), strict=True))
    outputs = []
    for i, ((length, prompt, n), (q, k, v)) in enumerate(zip(runs, parts, strict=True)):
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
    return torch.cat(outputs)


def with_prompts(x_TKD: Tensor, cu_seqlens: Sequence[int], shared: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Return keys or values with each document's shared prompt before it, and where each document then begins and ends.

    Queries of a document are to be aligned with the last of its keys.
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


def _runs(cu_seqlens: Sequence[int], shared: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """Return neighbours that go through one call as (own tokens, shared prompt, documents); what shares a prompt goes alone."""
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    prompts = [0] * len(lengths) if shared is None else list(shared)
    pairs = [d if own or after else -1 for d, (own, after) in enumerate(zip(prompts, [*prompts[1:], 0], strict=True))]
    return [(*key[:2], len(list(same))) for key, same in groupby(zip(lengths, prompts, pairs, strict=True))]


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query of one document sees, [queries, keys], the last query being at the last key."""
    age = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return age >= 0 if window is None else (age >= 0) & (age < window)
