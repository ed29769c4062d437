"""Chunked log-probabilities against full logits in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import chunk_edges, linear_logprobs, linear_objective, rows_per_chunk

V, H = 37, 8


def inputs(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (n,), generator=generator)


def workspace(rows: int) -> float:
    """Return the workspace that holds so many rows of logits."""
    mb = (rows + 0.5) * 4 * V / 2**20
    assert rows_per_chunk(V, mb) == rows
    return mb


def truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return (h @ w.t()).log_softmax(-1).gather(1, labels[:, None]).squeeze(1), h, w


def sigmoid_of_pairs(bounds: list[int]) -> object:
    """An objective that is not additive over tokens: log-sigmoid of the difference of two neighbours' sums."""

    def objective(logprobs: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
        inner = [b - bounds[2 * start] for b in bounds[2 * start : 2 * stop + 1]]
        sums = torch.stack([logprobs[a:b].sum() for a, b in zip(inner, inner[1:], strict=False)])
        margin = sums[0::2] - sums[1::2]
        return -F.logsigmoid(0.1 * margin).sum(), {"margin": margin.sum()}

    return objective


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 100])
@pytest.mark.parametrize("n", [1, 7, 8, 9])
def test_logprobs_and_any_gradient(n: int, rows: int) -> None:
    hidden, weight, labels = inputs(n)
    ours = linear_logprobs(hidden, weight, labels, workspace_mb=workspace(rows))
    exact, h, w = truth(hidden, weight, labels)
    upstream = torch.linspace(-1, 2, n)
    (ours * upstream).sum().backward()
    (exact * upstream.double()).sum().backward()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [5, 9, 100, 2])
def test_objective_over_groups_in_both_ways(rows: int) -> None:
    """Chunks of whole pairs, and (two rows: no pair fits) the way that computes the logits twice."""
    bounds = [0, 2, 4, 5, 9, 9, 12, 13, 14]
    hidden, weight, labels = inputs(14)
    objective = sigmoid_of_pairs(bounds)
    fast = chunk_edges(bounds[::2], rows)
    assert (fast is None) == (rows < 5)
    loss, sums = linear_objective(
        hidden, weight, labels, objective, group_bounds=bounds[::2], workspace_mb=workspace(rows)  # type: ignore[arg-type]
    )  # fmt: skip
    (loss / 3).backward()
    exact, h, w = truth(hidden, weight, labels)
    expected, named = objective(exact, 0, 4)  # type: ignore[operator]
    (expected / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums["margin"].item() == pytest.approx(named["margin"].item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_as_good_as_eager() -> None:
    """The rule: our error against the float64 truth is at most eager's own plus a little."""
    hidden, weight, labels = inputs(64, torch.bfloat16)
    loss, _ = linear_objective(
        hidden, weight, labels, lambda x, a, b: (-x.sum(), {}), group_bounds=None, workspace_mb=workspace(10)
    )
    loss.backward()
    exact, h, w = truth(hidden, weight, labels)
    (-exact.sum()).backward()
    eh, ew = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    F.cross_entropy((eh @ ew.t()).float(), labels, reduction="sum").backward()
    for ours, eager, right in ((hidden.grad, eh.grad, h.grad), (weight.grad, ew.grad, w.grad)):
        error, eager_error = ((x.double() - right).norm() / right.norm() for x in (ours, eager))
        assert error <= 1.2 * eager_error + 1e-3


def test_nothing_to_train() -> None:
    hidden, weight, labels = inputs(0)
    loss, sums = linear_objective(hidden, weight, labels, lambda x, a, b: (-x.sum(), {}), workspace_mb=1)
    loss.backward()
    assert float(loss.detach()) == 0.0 and sums == {}
    assert hidden.grad.shape == (0, H) and float(weight.grad.abs().sum()) == 0.0


def test_frozen_output_matrix() -> None:
    hidden, weight, labels = inputs(9)
    free = linear_objective(hidden, weight, labels, lambda x, a, b: (-x.sum(), {}), workspace_mb=workspace(4))[0]
    free.backward()
    again, frozen = hidden.detach().clone().requires_grad_(), weight.detach()
    linear_objective(again, frozen, labels, lambda x, a, b: (-x.sum(), {}), workspace_mb=workspace(4))[0].backward()
    assert torch.equal(again.grad, hidden.grad) and frozen.grad is None


def test_no_gradient_wanted() -> None:
    hidden, weight, labels = inputs(9)
    with torch.no_grad():
        loss, _ = linear_objective(hidden, weight, labels, lambda x, a, b: (-x.sum(), {}), workspace_mb=workspace(4))
    exact, _, _ = truth(hidden, weight, labels)
    assert not loss.requires_grad and float(loss) == pytest.approx(-float(exact.sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "bounds", "edges"),
    [
        (2, range(6), [0, 2, 4, 5]),
        (2, range(1), [0, 0]),  # nothing to train is one empty chunk, so that an objective gives its sums all the same
        (6, [0, 3, 6], [0, 2]),
        (5, [0, 3, 6], [0, 1, 2]),
        (2, [0, 3, 6], None),
        (4, [0, 1, 2, 5, 6], [0, 2, 4]),
        (3, [0, 3, 3, 3, 6, 6], [0, 3, 5]),
    ],
)
def test_chunks_cut_no_group(rows: int, bounds: list[int] | range, edges: list[int] | None) -> None:
    assert chunk_edges(bounds, rows) == edges


def test_peak_memory_does_not_hold_all_logits() -> None:
    """16,384 × 1,024 logits are 64 MiB; a workspace of 2 MiB stays far below (largest allocation that the profiler saw)."""
    hidden, weight = torch.randn(16_384, H, requires_grad=True), torch.randn(1_024, H, requires_grad=True)
    labels = torch.randint(1_024, (16_384,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_objective(hidden, weight, labels, lambda x, a, b: (-x.sum(), {}), workspace_mb=2)[0].backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 1 * 2**20 < largest < 4 * 2**20
