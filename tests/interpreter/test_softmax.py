"""The softmax kernels, alone and beneath the objective, against float64 and against their eager twins.

The rule: a kernel's error against the float64 truth is at most twice eager PyTorch's in the same type, plus a few units in the
last place of float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import output_layer, reference, triton_softmax
from kernels.linear_objective import linear_objective, linear_outputs
from kernels.output_layer import LogitOptions, merge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 15, 16, 17, 37, 130]
SCALINGS = [{"softcap": None, "temperature": 1.0}, {"softcap": 2.5, "temperature": 0.6}]
EPSILON = 2e-6


def logits(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits of seven tokens, among them equal, large and tiny ones, and labels, two of which are not there."""
    generator = torch.Generator().manual_seed(vocabulary)
    z = 4 * torch.randn(7, vocabulary, generator=generator)
    z[1], z[2], z[3] = 0.0, z[2] * 20, z[3] * 1e-3
    labels = torch.randint(vocabulary, (7,), generator=generator)
    labels[4], labels[5], labels[6] = -3, vocabulary, vocabulary - 1
    return z.to(dtype), labels


def assert_as_good(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Hold errors, relative to the largest value, against each other."""
    size = truth.abs().amax().clamp_min(1e-30)
    error, eager_error = (float(((x.double() - truth).abs() / size).amax()) for x in (ours, eager))
    assert error <= 2 * eager_error + EPSILON


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_statistics_and_gradient(vocabulary: int, dtype: torch.dtype, scaling: dict[str, Any]) -> None:
    z, labels = logits(vocabulary, dtype)
    wanted = {**scaling, "total": True, "weighted": True}
    ours = triton_softmax.logit_stats(z, labels, **wanted)
    eager, truth = (reference.logit_stats(x, labels, **wanted) for x in (z, z.double()))
    assert ours.dtype == torch.float32
    for row in range(5):
        assert_as_good(ours[row], eager[row], truth[row])
    lse = truth[reference.MAX] + truth[reference.SUMEXP].log()
    parts = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right = reference.logit_grad_(z.double(), labels, lse, *parts, **scaling)
    found = [
        twin.logit_grad_(z.clone(), labels, lse.float(), *parts.float(), **scaling)
        for twin in (triton_softmax, reference)
    ]
    assert found[0].dtype == dtype
    assert_as_good(*found, right)


def test_what_is_not_asked_for_is_not_computed() -> None:
    z, labels = logits(37, torch.float32)
    found = triton_softmax.logit_stats(z, labels, softcap=None, temperature=1.0, total=False, weighted=False)
    assert not found[reference.TOTAL].any() and not found[reference.WEIGHTED].any()


def test_rows_apart_in_memory_and_columns_that_stand_for_no_token() -> None:
    wide, labels = logits(130, torch.float32)
    z = wide[:, 3:40]
    z[:, 20:] = -torch.inf
    wanted: dict[str, Any] = {"softcap": None, "temperature": 1.0, "total": False, "weighted": True}
    torch.testing.assert_close(
        triton_softmax.logit_stats(z, labels, **wanted), reference.logit_stats(z, labels, **wanted)
    )
    z[:] = -torch.inf
    found = triton_softmax.logit_stats(z, labels * 0 - 1, **wanted)
    assert not found[1:].any() and (found[0] == torch.tensor(reference.FLOOR)).all()
    before = wide.clone()
    parts = torch.ones(4, 7)
    triton_softmax.logit_grad_(z, labels, *parts, softcap=None, temperature=1.0)
    assert torch.equal(wide[:, :3], before[:, :3]) and torch.equal(wide[:, 40:], before[:, 40:])
    assert not torch.equal(z, before[:, 3:40])


def test_tanh_has_the_digits_of_float32() -> None:
    """Seen through a softcap of 1: near nothing, where series and formula meet, and far away."""
    x = torch.cat([torch.logspace(-8, -0.5, 20), torch.linspace(0.2, 0.3, 20), torch.linspace(0.3, 30, 10)])
    z = torch.cat([x, -x])[:, None]
    labels = torch.zeros(len(z), dtype=torch.int64)
    found = triton_softmax.logit_stats(z, labels, softcap=1.0, temperature=1.0, total=False, weighted=False)
    right = z[:, 0].double().tanh()
    assert float(((found[reference.TARGET] - right) / right).abs().max()) < 3e-7


def all_logits(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, options: LogitOptions) -> Tensor:
    z = F.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)
    z = z / options.temperature
    loss = F.cross_entropy(
        z, labels, reduction="sum", label_smoothing=options.label_smoothing, ignore_index=options.ignore_index
    )
    return loss + options.z_loss * z.logsumexp(-1)[labels != options.ignore_index].square().sum()


@pytest.mark.parametrize("way", ["objective", "outputs"])
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_objective_by_the_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str, way: str) -> None:
    """Loss and gradients in three chunks, one token not counted; eager writes all logits."""
    monkeypatch.setattr(output_layer, "reference", None)  # it is not what serves
    every = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0, "temperature": 1.5}
    options = LogitOptions(**(every if name == "all" else {}))
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*size, generator=generator).to(dtype) for size in ((24, 24), (37, 24), (37,))]
    labels = torch.randint(37, (24,), generator=generator)
    labels[7] = -100
    mb = 9.5 * dtype.itemsize * 37 / 2**20

    def fused(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, options: LogitOptions) -> Tensor:
        more: dict[str, Any] = {"workspace_mb": mb, "bias_V": bias, "options": options}
        if way == "objective":
            return linear_objective(hidden, weight, labels, lambda x, a, b: (-x.sum(), {}), **more)[0]
        found = linear_outputs(hidden, weight, labels, **more)
        return -found.logprobs_N.sum() + options.z_loss * found.lse_N.square().sum()

    results = []
    for work, kind in ((fused, dtype), (all_logits, dtype), (all_logits, torch.float64)):
        own = [x.to(kind).requires_grad_() for x in leaves]
        loss = work(*own, labels, options)
        results.append([loss.detach(), *torch.autograd.grad(loss, own)])
    for ours, eager, truth in zip(*results, strict=True):
        assert_as_good(ours, eager, truth)


@pytest.mark.parametrize("way", ["objective", "outputs"])
def test_nothing_to_train(way: str) -> None:
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    if way == "objective":
        loss, _ = linear_objective(hidden, weight, labels, lambda x, a, b: (-x.sum(), {}), workspace_mb=1)
    else:
        loss = linear_outputs(hidden, weight, labels, workspace_mb=1).logprobs_N.sum()
    loss.backward()
    assert float(loss.detach()) == 0.0 and not weight.grad.any() and hidden.grad.shape == (0, 8)


def test_parts_of_the_vocabulary_merge() -> None:
    z, labels = logits(130, torch.float32)
    wanted = {**SCALINGS[1], "total": True, "weighted": True}
    parts = [triton_softmax.logit_stats(z[:, a:b], labels - a, **wanted) for a, b in ((0, 1), (1, 60), (60, 130))]
    whole = triton_softmax.logit_stats(z, labels, **wanted)
    torch.testing.assert_close(merge(torch.stack(parts, 1)), whole, rtol=1e-5, atol=1e-5)
