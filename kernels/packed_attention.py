"""Causal attention over documents packed into one row: no document sees another, and no [T, T] mask is made.

Legend: T packed tokens, L tokens of a document, A query heads, K key/value heads, D size of a head, n documents of one length.
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
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend within each document by torch's scaled_dot_product_attention, one call for neighbours of one length.

    Args:
        q_TAD: Queries, [T, A, D].
        k_TKD: Keys, [T, K, D]; A is a multiple of K.
        v_TKD: Values, [T, K, D].
        cu_seqlens: Document d is the tokens cu_seqlens[d]:cu_seqlens[d + 1]; on the host, so that nothing waits for the device.
        scale: Of the scores; None: 1/√D.
        window: A token sees itself and the window − 1 tokens before it; None: all before it.
        dropout: Probability of dropping an attention weight.

    Returns:
        [T, A, D], contiguous.
    """
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    sizes = [length * n for length, n in runs]
    # split, not slices: the gradient of a slice is as large as the whole row, the gradient of a split is one concatenation
    parts = zip(runs, *(torch.split(x, sizes) for x in (q_TAD, k_TKD, v_TKD)), strict=True)
    outputs = []
    for (length, n), q, k, v in parts:
        mask = _window_mask(length, window, q.device) if window is not None and window < length else None
        q_nALD, k_nKLD, v_nKLD = (x.reshape(n, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
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


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return which keys [L] each query [L] of one document sees."""
    age = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (age >= 0) & (age < window)
