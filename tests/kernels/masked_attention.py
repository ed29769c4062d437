"""Attention with its whole mask written out, a truth for every other way of computing it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def edges_of(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def seen_by(lengths: Sequence[int], shared: Sequence[int] | None = None, window: int | None = None) -> Tensor:
    """Return which tokens each token sees, [T, T]."""
    edges = edges_of(lengths)
    seen = torch.zeros(edges[-1], edges[-1], dtype=torch.bool)
    for d, prompt in enumerate(shared or [0] * len(lengths)):
        before = list(range(edges[d - 1], edges[d - 1] + prompt)) if prompt else []
        row = [*before, *range(edges[d], edges[d + 1])]
        for i in range(prompt, len(row)):
            seen[row[i], row[max(0, i + 1 - (window or len(row))) : i + 1]] = True
    return seen


def by_mask(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scale: float | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of the scores, all computed in the type of the input."""
    groups, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5 if scale is None else scale
    scores = torch.einsum("tad,sad->ats", q, k.repeat_interleave(groups, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("ats,sad->tad", scores.softmax(-1), v.repeat_interleave(groups, 1)), scores.logsumexp(-1)
