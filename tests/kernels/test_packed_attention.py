"""Packed attention against a mask written out in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.packed_attention import packed_attention, packed_attention_outputs, with_prompts
from kernels.reference import packed_attention_lse, packed_attention_sdpa
from tests.kernels.masked_attention import by_mask, edges_of, seen_by

HEADS = [(4, 4), (4, 2), (6, 1)]
TOLERANCE = 1e-12
"""Of float64."""


def inputs(total: int, heads: tuple[int, int], dim: int = 8) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        torch.randn(total, h, dim, dtype=torch.float64, requires_grad=True) for h in (heads[0], *heads[1:] * 2)
    )


def gap(ours: Sequence[Tensor], exact: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Return the largest difference of outputs, and of gradients for the same drawn ones from above; NaN if one is NaN."""
    assert [x.shape for x in ours] == [x.shape for x in exact]
    upstream = [torch.randn_like(x) for x in exact]
    found, wanted = (torch.autograd.grad(out, inputs, upstream) for out in (ours, exact))
    pairs = zip((*ours, *found), (*exact, *wanted), strict=True)
    return float(torch.cat([(a - b).abs().flatten() for a, b in pairs]).max())


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[1], [5], [7, 7, 7, 2, 1, 0, 1, 9], [1] * 6, [0, 3, 0]])
def test_equals_block_diagonal_mask(lengths: list[int], heads: tuple[int, int], window: int | None) -> None:
    qkv = inputs(sum(lengths), heads)
    ours = packed_attention_sdpa(*qkv, edges_of(lengths), scale=0.3, window=window)
    exact, _ = by_mask(*qkv, seen_by(lengths, window=window), scale=0.3)
    assert gap([ours], [exact], qkv) < TOLERANCE


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", HEADS)
def test_a_shared_prompt_is_seen_as_if_it_stood_in_both(heads: tuple[int, int], window: int | None) -> None:
    """Documents with 0, 1 and several tokens in common with the one before, beside others of the same length."""
    own, shared = [4, 4, 4, 3, 6, 2, 5, 5, 1], [0, 0, 2, 0, 1, 0, 2, 0, 5]
    qkv = inputs(sum(own), heads)
    exact, _ = by_mask(*qkv, seen_by(own, shared, window), scale=0.3)
    ours = packed_attention_sdpa(*qkv, edges_of(own), shared=shared, scale=0.3, window=window)
    assert gap([ours], [exact], qkv) < TOLERANCE


@pytest.mark.parametrize("workspace_mb", [64, 1e-4])  # 1e-4: one or two queries at a time
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", HEADS)
def test_scores_written_out(
    heads: tuple[int, int], window: int | None, softcap: float | None, workspace_mb: float
) -> None:
    own, shared = [4, 4, 0, 9, 6], [0, 2, 0, 0, 1]
    qkv = inputs(sum(own), heads)
    ours = packed_attention_lse(
        *qkv, edges_of(own), shared=shared, window=window, softcap=softcap, workspace_mb=workspace_mb
    )
    assert gap(ours, by_mask(*qkv, seen_by(own, shared, window), softcap=softcap), qkv) < TOLERANCE


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_scores_of_a_whole_document_are_never_there() -> None:
    qkv = inputs(256, (2, 2))
    with Largest() as seen:
        out, lse = packed_attention_lse(*qkv, [0, 256], workspace_mb=1 / 64)
        torch.autograd.grad((out.sum(), lse.sum()), qkv)
    assert seen.most == 4096  # of 131,072: the workspace, and as it happens the queries


def test_dispatch_on_a_cpu() -> None:
    own, shared = [4, 4], [0, 2]
    qkv, edges = inputs(8, (4, 2)), edges_of([4, 4])
    plain = packed_attention(*qkv, edges, shared=shared)
    assert torch.equal(plain, packed_attention_sdpa(*qkv, edges, shared=shared))
    both = packed_attention_outputs(*qkv, edges, shared=shared)
    assert gap(both, by_mask(*qkv, seen_by(own, shared)), qkv) < TOLERANCE
    capped = packed_attention(*qkv, edges, shared=shared, softcap=0.7)
    assert gap([capped], by_mask(*qkv, seen_by(own, shared), softcap=0.7)[:1], qkv) < TOLERANCE


@pytest.mark.parametrize("attend", [packed_attention_sdpa, packed_attention_lse])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_gradients(attend: Callable[..., object], softcap: float | None) -> None:
    qkv = inputs(9, (2, 1), dim=3)
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, [0, 4, 9], shared=[0, 2], window=3, softcap=softcap), qkv)


@pytest.mark.parametrize("attend", [packed_attention_sdpa, packed_attention_lse])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_dropout_drops(attend: Callable[..., Tensor | tuple[Tensor, Tensor]], softcap: float | None) -> None:
    """With values of one, an output is the share of the weights that is left; that averages to one."""
    q, k, _ = inputs(200, (4, 2))
    first, second = (attend(q, k, torch.ones_like(k), [0, 200], softcap=softcap, dropout=0.5) for _ in range(2))
    first, second = (x[0] if isinstance(x, tuple) else x for x in (first, second))
    assert not torch.equal(first, second) and abs(float(first.detach().mean()) - 1) < 0.1


@pytest.mark.parametrize("attend", [packed_attention_sdpa, packed_attention_lse])
def test_no_token(attend: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> None:
    qkv = inputs(0, (4, 2))
    out = attend(*qkv, [0])
    assert all(x.numel() == 0 and x.requires_grad for x in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize(
    ("heads", "edges", "options", "said"),
    [
        ((4, 3), [0, 8], {}, "multiple of K"),
        ((4, 2), [0, 7], {}, "8 tokens"),
        ((4, 2), [0, 5, 3, 8], {}, "must rise"),
        ((4, 2), [0, 3, 8], {"shared": [0, 4]}, "shares"),
        ((4, 2), [0, 3, 5, 8], {"shared": [0, 2, 1]}, "shares"),
        ((4, 2), [0, 3, 8], {"shared": [1, 0]}, "shares"),
        ((4, 2), [0, 8], {"window": 0}, "window=0"),
        ((4, 2), [0, 8], {"softcap": 0.0}, r"softcap=0\.0"),
    ],
)
def test_what_does_not_fit_is_refused(heads: tuple[int, int], edges: list[int], options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        packed_attention(*inputs(8, heads), edges, **options)


def test_keys_with_their_prompts() -> None:
    x = torch.arange(9.0)[:, None, None]
    found, edges = with_prompts(x, [0, 4, 6, 9], [0, 2, 0])
    assert found.flatten().tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8] and edges == [0, 4, 8, 11]
