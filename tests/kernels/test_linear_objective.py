"""Chunked log-probabilities and objectives against full logits in float64, forward and backward, with every option."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_objective as module
from kernels import reference
from kernels.linear_objective import chunk_edges, linear_logprobs, linear_objective, linear_outputs
from kernels.output_layer import LogitOptions, merge, rows_per_chunk

V, H = 37, 8
IGNORED = -7
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.3},
    "capped": {"softcap": 2.5},
    "cooled": {"temperature": 0.6},
    "ignoring": {"ignore_index": IGNORED},
    "all": {"label_smoothing": 0.2, "softcap": 3.0, "temperature": 1.7, "ignore_index": IGNORED, "entropy": True},
}


def inputs(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (n,), generator=generator)


def bias_of(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(len(weight), generator=generator).to(weight.dtype).requires_grad_()


def workspace(rows: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the workspace that holds so many rows of logits."""
    mb = (rows + 0.5) * dtype.itemsize * V / 2**20
    assert rows_per_chunk(V, mb, dtype.itemsize) == rows
    return mb


def truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return (h @ w.t()).log_softmax(-1).gather(1, labels[:, None]).squeeze(1), h, w


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LogitOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, log-sum-exp and entropies, from logits that are all there."""
    z = F.linear(hidden, weight, bias)
    z = z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)
    logprobs = (z / options.temperature).log_softmax(-1)
    counted = labels != options.ignore_index
    picked = logprobs.gather(1, torch.where(counted, labels, 0)[:, None]).squeeze(1)
    smoothed = (1 - options.label_smoothing) * picked + options.label_smoothing * logprobs.mean(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    lse = (z / options.temperature).logsumexp(-1)
    return tuple(torch.where(counted, x, 0.0) for x in (smoothed, lse, entropy))  # type: ignore[return-value]


def sigmoid_of_pairs(bounds: list[int]) -> Callable[[Tensor, int, int], tuple[Tensor, dict[str, Tensor]]]:
    """An objective that is not additive over tokens: log-sigmoid of the difference of two neighbours' sums."""

    def objective(logprobs: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
        inner = [b - bounds[2 * start] for b in bounds[2 * start : 2 * stop + 1]]
        sums = torch.stack([logprobs[a:b].sum() for a, b in zip(inner, inner[1:], strict=False)])
        margin = sums[0::2] - sums[1::2]
        return -F.logsigmoid(0.1 * margin).sum(), {"margin": margin.sum()}

    return objective


def negative_sum(logprobs: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
    return -logprobs.sum(), {}


@pytest.fixture(autouse=True)
def _says_it_again() -> None:
    module._say_twice.cache_clear()


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


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name: str, biased: bool) -> None:
    hidden, weight, labels = inputs(5, torch.float64)
    bias = bias_of(weight) if biased else None
    labels[2] = IGNORED if "ignore_index" in OPTIONS[name] else labels[2]

    def both(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_outputs(
            hidden, weight, labels, workspace_mb=workspace(2, torch.float64), bias_V=bias, options=LogitOptions(**OPTIONS[name])
        )[:2]  # fmt: skip

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


@pytest.mark.parametrize("narrowest", [64, 16])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_against_all_logits(monkeypatch: pytest.MonkeyPatch, name: str, narrowest: int) -> None:
    """Log-probabilities, log-sum-exp and entropies, and gradients of a mixture of the first two; whole rows, and blocks of them."""
    monkeypatch.setattr(reference, "BLOCK", 1)
    monkeypatch.setattr(reference, "NARROWEST", narrowest)
    hidden, weight, labels = inputs(9, torch.float64)
    labels[4] = IGNORED if "ignore_index" in OPTIONS[name] else labels[4]
    bias, options = bias_of(weight), LogitOptions(**{**OPTIONS[name], "entropy": True})
    leaves, upstream = (hidden, weight, bias), torch.linspace(-1, 2, 9, dtype=torch.float64)
    ours = linear_outputs(
        hidden, weight, labels, workspace_mb=workspace(4, torch.float64), bias_V=bias, options=options
    )
    exact = naive(*leaves, labels, options)
    for x, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-12, atol=1e-12)
    assert not ours[2].requires_grad
    grads, right_grads = (
        torch.autograd.grad((x[0] * upstream).sum() + (x[1] * upstream.flip(0)).sum(), leaves) for x in (ours, exact)
    )
    for x, right in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [100, 5, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_objective_with_every_option_in_both_ways(name: str, rows: int) -> None:
    """All at once, chunks of whole pairs, and (two rows: no pair fits) logits computed twice; z-loss and entropy too."""
    bounds = [0, 2, 4, 5, 9, 9, 12, 13, 14]
    hidden, weight, labels = inputs(14, torch.float64)
    labels[3] = IGNORED if "ignore_index" in OPTIONS[name] else labels[3]
    bias, options = bias_of(weight), LogitOptions(**{**OPTIONS[name], "z_loss": 0.01, "entropy": True})
    objective, leaves = sigmoid_of_pairs(bounds), (hidden, weight, bias)
    mb = workspace(rows, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if rows == 2 else "error")
        loss, sums = linear_objective(
            hidden, weight, labels, objective, group_bounds=bounds[::2], workspace_mb=mb, bias_V=bias, options=options
        )
    logprobs, lse, entropy = naive(*leaves, labels, options)
    expected, named = objective(logprobs, 0, 4)
    expected = expected + 0.01 * lse.square().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums["margin"], named["margin"].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums["entropy"], entropy.sum().detach(), rtol=1e-12, atol=0)
    grads, right_grads = (torch.autograd.grad(x / 3, leaves) for x in (loss, expected))
    for x, right in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [5, 9, 100, 2])
@pytest.mark.filterwarnings("ignore:A group of tokens")
def test_objective_over_groups_in_both_ways(rows: int) -> None:
    """Chunks of whole pairs, and (two rows: no pair fits) the way that computes the logits twice."""
    bounds = [0, 2, 4, 5, 9, 9, 12, 13, 14]
    hidden, weight, labels = inputs(14)
    objective = sigmoid_of_pairs(bounds)
    fast = chunk_edges(bounds[::2], rows)
    assert (fast is None) == (rows < 5)
    loss, sums = linear_objective(
        hidden, weight, labels, objective, group_bounds=bounds[::2], workspace_mb=workspace(rows)
    )
    (loss / 3).backward()
    exact, h, w = truth(hidden, weight, labels)
    expected, named = objective(exact, 0, 4)
    (expected / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums["margin"].item() == pytest.approx(named["margin"].item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=1e-6)


def test_a_group_that_fits_no_chunk_says_so_once() -> None:
    hidden, weight, labels = inputs(6)

    def once(**options: Any) -> None:
        linear_objective(
            hidden, weight, labels, negative_sum, group_bounds=[0, 6], workspace_mb=workspace(4), **options
        )

    with torch.no_grad(), warnings.catch_warnings():  # nothing is computed twice
        warnings.simplefilter("error")
        once()
    with pytest.warns(RuntimeWarning, match="longer than the 4 that fit") as said:
        once()
        once()
    assert len(said) == 1


@pytest.mark.parametrize("way", ["objective", "outputs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_eager(dtype: torch.dtype, way: str) -> None:
    """The rule: our error against the float64 truth is at most eager's own plus a little."""
    hidden, weight, labels = inputs(64, dtype)
    mb = workspace(10, dtype)
    if way == "objective":
        linear_objective(hidden, weight, labels, negative_sum, workspace_mb=mb)[0].backward()
    else:
        (-linear_logprobs(hidden, weight, labels, workspace_mb=mb).sum()).backward()
    exact, h, w = truth(hidden, weight, labels)
    (-exact.sum()).backward()
    eh, ew = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    F.cross_entropy((eh @ ew.t()).float(), labels, reduction="sum").backward()
    for ours, eager, right in ((hidden.grad, eh.grad, h.grad), (weight.grad, ew.grad, w.grad)):
        error, eager_error = ((x.double() - right).norm() / right.norm() for x in (ours, eager))
        assert ours.dtype == dtype and error <= 1.2 * eager_error + 1e-3


@pytest.mark.parametrize("size", [1e-7, 3e5])
def test_float16_takes_gradients_of_any_size(size: float) -> None:
    """Each would be nothing, or infinite, as float16, and what comes of it is neither."""
    hidden, weight, labels = inputs(6, torch.float16)
    with torch.no_grad():  # so that the gradient of the matrix has a size that float16 has
        hidden.mul_(1e3 if size < 1 else 1e-3)
        weight.div_(1e3 if size < 1 else 1e-3)
    ours = linear_logprobs(hidden, weight, labels, workspace_mb=1)
    (grad,) = torch.autograd.grad((ours * size).sum(), weight)
    exact, h, w = truth(hidden, weight, labels)
    (right,) = torch.autograd.grad((exact * size).sum(), w)
    assert float((grad.double() - right).norm() / right.norm()) < 2e-3


@pytest.mark.parametrize("way", ["objective", "outputs"])
def test_nothing_to_train(way: str) -> None:
    hidden, weight, labels = inputs(0)
    if way == "objective":
        loss, sums = linear_objective(hidden, weight, labels, negative_sum, workspace_mb=1)
        assert sums == {}
    else:
        loss = linear_logprobs(hidden, weight, labels, workspace_mb=1).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad.shape == (0, H) and float(weight.grad.abs().sum()) == 0.0


def test_labels_that_do_not_count_and_labels_that_are_wrong() -> None:
    hidden, weight, labels = inputs(5)
    labels[:] = -100
    linear_objective(hidden, weight, labels, negative_sum, workspace_mb=workspace(2))[0].backward()
    assert not hidden.grad.any() and not weight.grad.any()
    labels[:] = torch.tensor([0, V, -1, V - 1, -100])
    found = linear_logprobs(hidden, weight, labels.int(), workspace_mb=workspace(2))
    assert found.isnan().tolist() == [False, True, True, False, False] and float(found[4].detach()) == 0.0


def test_columns_that_stand_for_no_token() -> None:
    """A bias of −∞ takes them out, whole blocks of them too, and leaves nothing that is not finite."""
    hidden, weight, labels = inputs(5, torch.float64)
    labels %= 20
    bias, parts = torch.zeros(V, dtype=torch.float64), []
    bias[20:] = -torch.inf
    options = LogitOptions(entropy=True)
    ours = linear_outputs(hidden, weight, labels, workspace_mb=1, bias_V=bias, options=options)
    for x, right in zip(ours, naive(hidden, weight[:20], None, labels, options), strict=True):
        torch.testing.assert_close(x, right)
    ours[0].sum().backward()
    assert hidden.grad.isfinite().all() and not weight.grad[20:].any()
    z = F.linear(hidden, weight, bias).detach()
    for a, b in ((0, 20), (20, V)):
        parts.append(
            reference.logit_stats(z[:, a:b], labels - a, softcap=None, temperature=1.0, total=False, weighted=True)
        )
    whole = reference.logit_stats(z, labels, softcap=None, temperature=1.0, total=False, weighted=True)
    torch.testing.assert_close(merge(torch.stack(parts, 1)), whole)


@pytest.mark.parametrize("way", ["objective", "outputs"])
def test_what_is_frozen_costs_nothing(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    hidden, weight, labels = inputs(9)

    def run(hidden: Tensor, weight: Tensor) -> None:
        if way == "objective":
            linear_objective(hidden, weight, labels, negative_sum, workspace_mb=workspace(4))[0].backward()
        else:
            (-linear_logprobs(hidden, weight, labels, workspace_mb=workspace(4)).sum()).backward()

    run(hidden, weight)
    other, head = hidden.detach().clone(), weight.detach().clone().requires_grad_()
    run(other, head)
    assert torch.equal(head.grad, weight.grad) and other.grad is None
    monkeypatch.setattr(module, "_add_weight_grad", lambda *_, **__: pytest.fail("work for a frozen matrix"))
    again, frozen = hidden.detach().clone().requires_grad_(), weight.detach()
    run(again, frozen)
    assert torch.equal(again.grad, hidden.grad) and frozen.grad is None


def test_no_gradient_wanted() -> None:
    hidden, weight, labels = inputs(9)
    with torch.no_grad():
        loss, _ = linear_objective(hidden, weight, labels, negative_sum, workspace_mb=workspace(4))
        logprobs = linear_logprobs(hidden, weight, labels, workspace_mb=workspace(4))
    exact, _, _ = truth(hidden, weight, labels)
    assert not loss.requires_grad and float(loss) == pytest.approx(-float(exact.sum().detach()), rel=1e-6)
    torch.testing.assert_close(logprobs.double(), exact.detach(), rtol=1e-6, atol=1e-6)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, labels = inputs(4)
    loss, _ = linear_objective(hidden, weight, labels, negative_sum, workspace_mb=1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_inputs_that_are_not_contiguous() -> None:
    hidden, weight, labels = inputs(9)
    h, w = (x.detach().t().contiguous().t().requires_grad_() for x in (hidden, weight))
    for x, y in ((hidden, weight), (h, w)):
        (linear_logprobs(x, y, labels, workspace_mb=workspace(4)) * torch.arange(9)).sum().backward()
    assert not h.is_contiguous()
    torch.testing.assert_close(h.grad, hidden.grad)
    torch.testing.assert_close(w.grad, weight.grad)


@pytest.mark.parametrize(
    "wrong", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}, {"softcap": 0.0}, {"temperature": 0.0}]
)  # fmt: skip
def test_options_without_a_meaning(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*choose"):
        LogitOptions(**wrong)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_does_not_hold_all_logits(dtype: torch.dtype) -> None:
    """16,384 × 1,024 logits are 64 MiB; a workspace of 2 MiB stays far below (largest allocation that the profiler saw)."""
    hidden, weight = (torch.randn(n, H).to(dtype).requires_grad_() for n in (16_384, 1_024))
    labels = torch.randint(1_024, (16_384,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_objective(hidden, weight, labels, negative_sum, workspace_mb=2)[0].backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 1 * 2**20 < largest < 4 * 2**20 + 2**10
