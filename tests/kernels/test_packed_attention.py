"""Packed attention against a mask written out, forward and backward."""

from __future__ import annotations

import pytest
import torch

from kernels.packed_attention import packed_attention_sdpa, with_prompts

HEADS = [(4, 4), (4, 2), (6, 1)]


def by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention with the whole mask written out."""
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("tad,sad->ats", q, k.repeat_interleave(groups, 1)) * 0.3
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("ats,sad->tad", weights, v.repeat_interleave(groups, 1))


def compare(ours: torch.Tensor, exact: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(ours, exact)
    upstream = torch.randn_like(exact)
    found, wanted = (torch.autograd.grad(out, inputs, upstream) for out in (ours, exact))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", HEADS)
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
    compare(ours, by_mask(q, k, v, seen), (q, k, v))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", HEADS)
def test_a_shared_prompt_is_seen_as_if_it_stood_in_both(heads: tuple[int, int], window: int | None) -> None:
    """Documents with 0, 1 and several tokens in common with the one before, beside others of the same length."""
    torch.manual_seed(0)
    own, shared = [4, 4, 4, 3, 6, 2, 5, 5, 1], [0, 0, 2, 0, 1, 0, 2, 0, 5]
    documents, places, start = [], [], 0
    for n, p in zip(own, shared, strict=True):
        places.append([*(places[-1][:p] if p else []), *range(start, start + n)])
        start += n
    q, k, v = (torch.randn(start, h, 8, dtype=torch.float64, requires_grad=True) for h in (heads[0], *heads[1:] * 2))
    edges = [sum(own[:i]) for i in range(len(own) + 1)]
    ours = packed_attention_sdpa(q, k, v, edges, shared=shared, scale=0.3, window=window)
    for place, n in zip(places, own, strict=True):
        age = torch.arange(len(place))[:, None] - torch.arange(len(place))
        seen = (age >= 0) & (age < (window or len(place)))
        documents.append(by_mask(q[place], k[place], v[place], seen)[-n:])
    compare(ours, torch.cat(documents), (q, k, v))


def test_keys_with_their_prompts() -> None:
    x = torch.arange(9.0)[:, None, None]
    found, edges = with_prompts(x, [0, 4, 6, 9], [0, 2, 0])
    assert found.flatten().tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8] and edges == [0, 4, 8, 11]
