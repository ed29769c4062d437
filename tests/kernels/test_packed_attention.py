"""Packed attention against a mask written out, forward and backward."""

from __future__ import annotations

import pytest
import torch

from kernels.packed_attention import packed_attention_sdpa


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[1], [5], [7, 7, 7, 2, 1, 1, 9], [1] * 6])
def test_equals_block_diagonal_mask(lengths: list[int], heads: tuple[int, int], window: int | None) -> None:
    torch.manual_seed(0)
    total, dim = sum(lengths), 8
    q, k, v = (
        torch.randn(total, h, dim, dtype=torch.float64, requires_grad=True) for h in (heads[0], heads[1], heads[1])
    )
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    ours = packed_attention_sdpa(q, k, v, edges, scale=0.3, window=window)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    age = torch.arange(total)[:, None] - torch.arange(total)
    seen = (document[:, None] == document) & (age >= 0) & (age < (window or total))
    scores = torch.einsum("tad,sad->ats", q, k.repeat_interleave(heads[0] // heads[1], 1)) * 0.3
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    exact = torch.einsum("ats,sad->tad", weights, v.repeat_interleave(heads[0] // heads[1], 1))
    torch.testing.assert_close(ours, exact)
    upstream = torch.randn_like(exact)
    found = torch.autograd.grad(ours, (q, k, v), upstream)
    wanted = torch.autograd.grad(exact, (q, k, v), upstream)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
