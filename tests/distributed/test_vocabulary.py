"""An output matrix whose rows are spread over two ranks says what the whole one says, and has its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_pool import RankPool
from torch import Tensor

from engine.ranks import Ranks
from kernels.linear_objective import linear_objective, linear_outputs
from kernels.output_layer import LogitOptions, Shard

V, H, N = 37, 8, 13
BOUNDS = [0, 2, 4, 7, 7, 10, N]
EDGES = [0, 20, V]
"""Where the ranks' rows begin and end: not halves."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "label_smoothing": 0.2,
        "z_loss": 0.01,
        "softcap": 3.0,
        "temperature": 1.7,
        "ignore_index": -7,
        "entropy": True,
    },
}


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return hidden states, output matrix and bias, and labels of both ranks, one of which does not count."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((N, H), (V, H), (V,))]
    labels = torch.randint(V, (N,), generator=generator)
    labels[:3] = torch.tensor([EDGES[1] - 1, EDGES[1], V - 1])
    labels[5] = -7
    return [x.to(dtype) for x in leaves], labels


def preference(logprobs: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
    bounds = BOUNDS[2 * start : 2 * stop + 1]
    sums = torch.stack(
        [logprobs[a - bounds[0] : b - bounds[0]].sum() for a, b in zip(bounds, bounds[1:], strict=False)]
    )
    margin = sums[0::2] - sums[1::2]
    return -F.logsigmoid(margin).sum(), {"margin": margin.sum()}


def computed(
    leaves: list[Tensor], labels: Tensor, way: str, rows: int, options: dict[str, Any], **more: Any
) -> list[Tensor]:
    """Return values and gradients of one way through the output layer."""
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    chosen = LogitOptions(**{"ignore_index": -7, **options})
    mb = (rows + 0.5) * hidden.element_size() * EDGES[1] / 2**20
    more |= {"workspace_mb": mb, "bias_V": bias, "options": chosen}
    if way == "objective":
        loss, sums = linear_objective(hidden, weight, labels, preference, group_bounds=BOUNDS[::2], **more)
        values = [loss.detach(), *sums.values()]
    else:
        found = linear_outputs(hidden, weight, labels, **more)
        loss = (found.logprobs_N * torch.arange(N)).sum() + found.lse_N.square().sum()
        values = [x.detach() for x in found if x is not None]
        with torch.no_grad():
            values += [x for x in linear_outputs(hidden, weight, labels, **more) if x is not None]
    return [*values, *torch.autograd.grad(loss / 3, (hidden, weight, bias))]


def of_a_rank(ranks: Ranks, dtype: torch.dtype, way: str, rows: int, options: dict[str, Any]) -> list[Tensor]:
    (hidden, weight, bias), labels = inputs(dtype)
    assert dist.group.WORLD is not None
    own = slice(EDGES[ranks.rank], EDGES[ranks.rank + 1])
    shard = Shard(group=dist.group.WORLD, start=own.start, vocabulary=V)
    leaves = [hidden, weight[own].clone(), bias[own].clone()]
    return computed(leaves, labels, way, rows, options, shard=shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("way", "rows"), [("objective", 7), ("objective", 100), ("objective", 3), ("outputs", 4)])
@pytest.mark.filterwarnings("ignore:A group of tokens")
def test_two_ranks_are_one(two_ranks: RankPool, way: str, rows: int, name: str, dtype: torch.dtype) -> None:
    """Pairs in two chunks, in one, and in none, where logits are computed twice; and any gradient."""
    first, second = two_ranks(of_a_rank, dtype, way, rows, OPTIONS[name])
    leaves, labels = inputs(torch.float64)
    whole = computed(leaves, labels, way, 100, OPTIONS[name])
    for x, y in zip(first[:-2], second[:-2], strict=True):
        assert torch.equal(x, y)
    joined = [*first[:-2], *(torch.cat([x, y]) for x, y in zip(first[-2:], second[-2:], strict=True))]
    assert len(joined) == len(whole)
    for x, right in zip(joined, whole, strict=True):
        assert x.dtype == dtype
        if dtype == torch.float32:
            assert float((x - right).abs().max()) <= 2e-6 * max(1.0, float(right.abs().max()))
        else:
            torch.testing.assert_close(x, right, rtol=1e-11, atol=1e-12)


def with_a_wrong_label(ranks: Ranks) -> list[bool]:
    (hidden, weight, bias), labels = inputs(torch.float32)
    own = slice(EDGES[ranks.rank], EDGES[ranks.rank + 1])
    assert dist.group.WORLD is not None
    shard = Shard(group=dist.group.WORLD, start=own.start, vocabulary=V)
    labels[:] = torch.tensor([V, -1] + [EDGES[1]] * (N - 2))
    found = linear_outputs(hidden, weight[own], labels, workspace_mb=1, bias_V=bias[own], shard=shard)
    return found.logprobs_N.isnan().tolist()


def test_a_label_that_no_rank_has(two_ranks: RankPool) -> None:
    assert two_ranks(with_a_wrong_label) == [[True, True] + [False] * (N - 2)] * 2
