"""Packed attention by Triton's kernels, forward and backward, against a mask written out in float64.

The rule: a kernel's error may be twice that of eager PyTorch in the same type, plus two units in the last place of the
largest value, plus 1e-6: eager's terms cancel exactly where a token sees only itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import packed_attention as public
from kernels import triton_attention
from kernels.packed_attention import packed_attention, packed_attention_outputs
from tests.kernels.masked_attention import by_mask, edges_of, seen_by

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES: dict[str, tuple[list[int], tuple[int, int], int, dict[str, Any]]] = {
    # lengths, query and key heads, size of a head, options; blocks are of 16
    "one token": ([1], (1, 1), 64, {}),
    "around a block": ([15, 16, 17], (2, 2), 64, {}),
    "an odd one, and none": ([0, 21, 0, 7], (4, 1), 64, {}),
    "one document": ([34], (6, 1), 64, {}),
    "many of one token": ([1] * 20, (2, 1), 64, {}),
    "window of one": ([20], (2, 1), 64, {"window": 1}),
    "window below a block": ([37, 5], (2, 1), 64, {"window": 5}),
    "window of a block": ([50], (1, 1), 64, {"window": 16}),
    "window above a block": ([50], (1, 1), 64, {"window": 21}),
    "window beyond": ([20], (1, 1), 64, {"window": 100}),
    "softcap": ([20, 5], (2, 1), 64, {"softcap": 2.0}),
    "large softcap": ([20, 5], (2, 1), 64, {"softcap": 50.0}),
    "prompts": ([20, 17, 18, 1, 0, 6, 4], (2, 1), 64, {"shared": [0, 20, 0, 17, 0, 0, 1]}),
    "prompts and all else": ([24, 20], (2, 1), 64, {"shared": [0, 19], "window": 12, "softcap": 2.0, "scale": 0.3}),
    "padded head": ([20, 5], (6, 1), 96, {"window": 9}),
    "odd head": ([18], (2, 1), 40, {}),
    "head of 128": ([18], (1, 1), 128, {}),
    "head of 256": ([18], (1, 1), 256, {}),
}


def inputs(case: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return queries, keys and values, as a projection leaves them, and upstream gradients of output and log-sum-exp."""
    torch.manual_seed(0)
    lengths, heads, dim, _ = CASES[case]
    total = sum(lengths)
    row = torch.randn(total, (heads[0] + 2 * heads[1]) * dim).to(dtype)
    parts = row.split([heads[0] * dim, heads[1] * dim, heads[1] * dim], 1)
    qkv = [x.unflatten(1, (-1, dim)).detach().requires_grad_() for x in parts]
    upstream = [torch.randn(heads[0], total, dim).to(dtype).transpose(0, 1), torch.randn(heads[0], total)]
    return qkv, upstream


def with_gradients(out: tuple[Tensor, Tensor], qkv: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(out, qkv, [g.to(x.dtype) for g, x in zip(upstream, out, strict=True)])
    return [x.detach() for x in (*out, *grads)]


def ours(case: str, qkv: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    lengths, _, _, options = CASES[case]
    return with_gradients(packed_attention_outputs(*qkv, edges_of(lengths), **options), qkv, upstream)


def eager(case: str, qkv: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    lengths, _, _, options = CASES[case]
    seen = seen_by(lengths, options.get("shared"), options.get("window"))
    out = by_mask(*qkv, seen, scale=options.get("scale"), softcap=options.get("softcap"))
    return with_gradients(out, qkv, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_is_as_exact_as_eager(case: str, dtype: torch.dtype) -> None:
    qkv, upstream = inputs(case, dtype)
    found, rounded = ours(case, qkv, upstream), eager(case, qkv, upstream)
    exact = eager(case, [x.detach().double().requires_grad_() for x in qkv], upstream)
    for name, mine, theirs, truth in zip(("o", "lse", "dq", "dk", "dv"), found, rounded, exact, strict=True):
        error, allowed = ((x.double() - truth).abs().max().item() for x in (mine, theirs))
        allowed = 2 * allowed + 2 * torch.finfo(mine.dtype).eps * truth.abs().max().item() + 1e-6
        assert mine.is_contiguous() and error <= allowed, f"{name}: {error:.2g} where {allowed:.2g} is allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    case = "prompts and all else"
    qkv, upstream = inputs(case, dtype)
    first, second = ours(case, qkv, upstream), ours(case, qkv, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_one_output_alone() -> None:
    qkv, (d_out, d_lse) = inputs("prompts", torch.float32)
    lengths, _, _, options = CASES["prompts"]
    exact = eager("prompts", [x.detach().double().requires_grad_() for x in qkv], [d_out, torch.zeros_like(d_lse)])
    out = packed_attention(*qkv, edges_of(lengths), **options)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, d_out), tuple(x.float() for x in exact[2:]))
    exact = eager("prompts", [x.detach().double().requires_grad_() for x in qkv], [torch.zeros_like(d_out), d_lse])
    _, lse = packed_attention_outputs(*qkv, edges_of(lengths), **options)
    torch.testing.assert_close(torch.autograd.grad(lse, qkv[:2], d_lse), tuple(x.float() for x in exact[2:4]))


def test_an_expanded_upstream_gradient_and_frozen_keys() -> None:
    qkv, _ = inputs("around a block", torch.float32)
    q, k, v = (x.detach() for x in qkv)
    q.requires_grad_()
    lengths = CASES["around a block"][0]
    packed_attention(q, k, v, edges_of(lengths)).sum().backward()
    exact, _ = by_mask(*(x.detach().double() for x in (q, k, v)), seen_by(lengths))
    wide = q.detach().double().requires_grad_()
    by_mask(wide, k.double(), v.double(), seen_by(lengths))[0].sum().backward()
    torch.testing.assert_close(q.grad, wide.grad.float())
    assert exact.shape == q.shape and k.grad is None


def test_recomputed_in_the_backward_pass() -> None:
    qkv, (d_out, _) = inputs("prompts", torch.float32)
    lengths, _, _, options = CASES["prompts"]

    def attend(*qkv: Tensor) -> Tensor:
        return packed_attention(*qkv, edges_of(lengths), **options)

    plain = torch.autograd.grad(attend(*qkv), qkv, d_out)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(attend, *qkv, use_reentrant=False), qkv, d_out)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with torch.no_grad():
        assert torch.equal(attend(*qkv), attend(*qkv))


def test_no_token() -> None:
    q, k, v = (torch.zeros(0, heads, 64, requires_grad=True) for heads in (2, 1, 1))
    for edges in ([0], [0, 0]):
        out = packed_attention(q, k, v, edges)
        out.sum().backward()
        assert out.shape == q.shape and q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize(
    ("dtype", "dim", "options"),
    [(torch.float32, 64, {"dropout": 0.5}), (torch.float64, 64, {}), (torch.float32, 264, {})],
    ids=["dropout", "float64", "head of 264"],
)
def test_what_the_kernels_lack_is_for_the_eager_twin(
    dtype: torch.dtype, dim: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public._Attention, "apply", None)
    x = torch.ones(3, 1, dim, dtype=dtype)
    assert packed_attention(x, x, x, [0, 3], **options).shape == x.shape


def test_work_is_listed_once_and_the_longest_first() -> None:
    cu, shared, here = (0, 40, 41, 41, 60), (0, 8, 0, 0), torch.device("cpu")
    queries = triton_attention._query_work(cu, shared, 16, here)
    assert queries is triton_attention._query_work(cu, shared, 16, here)
    # start, tokens, first query, prompt, its start
    assert queries.tolist() == [
        [0, 40, 32, 0, 0],
        [0, 40, 16, 0, 0],
        [41, 19, 16, 0, 41],
        [40, 1, 0, 8, 0],
        [0, 40, 0, 0, 0],
        [41, 19, 0, 0, 41],
    ]
    # start, tokens, first key, keys that the next document shares, its tokens
    assert triton_attention._key_work(cu, shared, 16, here).tolist() == [
        [0, 40, 0, 8, 1],
        [0, 40, 16, 8, 1],
        [41, 19, 0, 0, 0],
        [0, 40, 32, 8, 1],
        [41, 19, 16, 0, 0],
        [40, 1, 0, 0, 0],
    ]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_architecture_has_its_tiles(arch: str) -> None:
    names = {case.name for case in triton_attention.cases(arch)}
    assert len(names) == 3 * (3 * 4 + 3)
