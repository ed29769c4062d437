"""DPO and its relatives against plain Python, and against formulas of their own in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.compose import compose
from engine.config.names import PREFERENCE_LOSSES
from engine.config.schema import AlgorithmSection
from engine.errors import UserError
from engine.objectives import build
from engine.objectives.dpo import DPO
from engine.objectives.preference_losses import LOSSES, preference_loss
from engine.types import Targets
from kernels.linear_objective import linear_objective
from kernels.output_layer import rows_per_chunk

RECIPE = compose(["model=tiny", "data=tasks", "algorithm=dpo"]).config.algorithm
BETA, EPSILON, GAMMA = 0.3, 0.1, 0.7
BOUNDS = [0, 3, 5, 6, 10, 12, 13]
"""Three pairs: 3 and 2 tokens, 1 and 4, 2 and 1."""
LOGPROBS = [-0.5, -1.25, -0.1, -2.0, -0.75, -0.2, -1.5, -0.3, -0.9, -0.05, -3.0, -0.4, -0.6]
REFERENCE = [-2.5, -2.0, -0.5, -2.25, -3.0, -1.0]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.25, 1.0, 1.0, 0.5, 0.5, 1.0, 3.0, 1.0, 0.5]


def recipe(**changes: Any) -> AlgorithmSection:
    return RECIPE.model_copy(update=changes)


def batch(weights: list[float] | None = None, *, reference: bool = True) -> tuple[Tensor, Targets]:
    targets = Targets(
        bounds=BOUNDS,
        weights_N=None if weights is None else torch.tensor(weights),
        reference_S=torch.tensor(REFERENCE) if reference else None,
    )
    return torch.tensor(LOGPROBS, requires_grad=True), targets


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def log_odds(average: float) -> float:
    return average - math.log(1 - math.exp(average))


BY_HAND: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda c, r: -(1 - EPSILON) * log_sigmoid(BETA * (c - r)) - EPSILON * log_sigmoid(-BETA * (c - r)),
    "ipo": lambda c, r: (c - r - 1 / (2 * BETA)) ** 2,
    "hinge": lambda c, r: max(0.0, 1 - BETA * (c - r)),
    "robust": lambda c, r: (
        (-(1 - EPSILON) * log_sigmoid(BETA * (c - r)) + EPSILON * log_sigmoid(-BETA * (c - r))) / (1 - 2 * EPSILON)
    ),
    "simpo": lambda c, r: -log_sigmoid(BETA * (c - r) - GAMMA),
    "orpo": lambda c, r: -log_sigmoid(log_odds(c) - log_odds(r)),
}


def by_hand(
    name: str, *, average: bool, sft_average: bool, weights: list[float] | None, preference: float, sft: float
) -> dict[str, float]:
    """The loss and what is reported beside it, in plain Python."""
    mask = weights or [1.0] * len(LOGPROBS)
    spans = [range(a, b) for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)]
    sums = [sum(mask[t] * LOGPROBS[t] for t in span) for span in spans]
    lengths = [sum(mask[t] for t in span) for span in spans]
    rewards = [s - r for s, r in zip(sums, REFERENCE, strict=True)] if PREFERENCE_LOSSES[name] else sums
    if average or name in ("simpo", "orpo"):
        rewards = [r / n for r, n in zip(rewards, lengths, strict=True)]
    pairs = list(zip(rewards[0::2], rewards[1::2], strict=True))
    chosen = [s / n if sft_average else s for s, n in zip(sums[0::2], lengths[0::2], strict=True)]
    found = {
        "preference_loss": sum(BY_HAND[name](c, r) for c, r in pairs),
        "sft_loss": -sum(chosen),
        "accuracy": float(sum(c > r for c, r in pairs)),
        "rewards_chosen_mean": sum(c for c, _ in pairs),
        "rewards_rejected_mean": sum(r for _, r in pairs),
        "margin": sum(c - r for c, r in pairs),
    }
    return {"loss": preference * found["preference_loss"] + sft * found["sft_loss"], **found}


def objective(name: str, **changes: Any) -> DPO:
    knobs = {
        "label_smoothing": EPSILON if name in ("sigmoid", "robust") else 0.0,
        "preference_margin": GAMMA if name == "simpo" else 0.0,
    }
    return DPO(recipe(preference_loss=name, reference_policy_kl_penalty=BETA, **knobs, **changes))


def measured(dpo: DPO, logprobs: Tensor, targets: Targets) -> dict[str, Tensor]:
    loss, sums = dpo.loss(logprobs, targets)
    return {"loss": loss, **sums}


def added(*parts: dict[str, Tensor]) -> dict[str, float]:
    return {name: sum(float(p[name].detach()) for p in parts) for name in parts[0]}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_loss_and_metrics_by_hand(name: str, average: bool, weights: list[float] | None) -> None:
    dpo = objective(
        name,
        preference_average_log_probs=average,
        sft_average_log_probs=average,
        preference_loss_weight=1.5,
        sft_loss_weight=0.25,
    )
    logprobs, targets = batch(weights, reference=dpo.needs_reference)
    found = measured(dpo, logprobs, targets)
    assert all(x.dtype == torch.float32 and x.shape == () for x in found.values())
    expected = by_hand(name, average=average, sft_average=average, weights=weights, preference=1.5, sft=0.25)
    assert added(found) == pytest.approx(expected, rel=1e-5)
    assert dpo.units(targets) == 3.0 and isinstance(dpo.units(targets), float)


def test_one_pair_in_figures() -> None:
    """r_chosen = −1.85 + 2.5, r_rejected = −2.75 + 2; −log σ(0.3 · 1.4) = ln(1 + e^−0.42) = 0.505037."""
    logprobs, targets = batch()
    dpo = DPO(recipe(reference_policy_kl_penalty=0.3, sft_loss_weight=0.5))
    found = added(measured(dpo, logprobs[:5], targets.sequences(0, 2)))
    assert found == pytest.approx(
        {
            "loss": 0.505037 + 0.925,
            "preference_loss": 0.505037,
            "sft_loss": 1.85,
            "accuracy": 1.0,
            "rewards_chosen_mean": 0.65,
            "rewards_rejected_mean": -0.75,
            "margin": 1.4,
        },
        abs=1e-6,
    )


TORCH: dict[str, Callable[[Tensor], Tensor]] = {  # of the margin
    "sigmoid": lambda m: F.softplus(-BETA * m) * (1 - EPSILON) + F.softplus(BETA * m) * EPSILON,
    "ipo": lambda m: (m - 0.5 / BETA) ** 2,
    "hinge": lambda m: (1 - BETA * m).clamp(min=0),
    "robust": lambda m: (F.softplus(-BETA * m) * (1 - EPSILON) - F.softplus(BETA * m) * EPSILON) / (1 - 2 * EPSILON),
    "simpo": lambda m: F.softplus(GAMMA - BETA * m),
}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", [*TORCH, "orpo"])
def test_gradient(name: str, average: bool, weights: list[float] | None) -> None:
    """Against autograd in float64, a sequence at a time."""
    dpo = objective(name, preference_average_log_probs=average, sft_loss_weight=0.25)
    logprobs, targets = batch(weights, reference=dpo.needs_reference)
    dpo.loss(logprobs, targets)[0].backward()
    exact = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(weights or [1.0] * 13, dtype=torch.float64)
    total = exact.new_zeros(())
    for pair in range(3):
        rewards = []
        for s in (2 * pair, 2 * pair + 1):
            own = slice(BOUNDS[s], BOUNDS[s + 1])
            reward = (exact[own] * mask[own]).sum() - (REFERENCE[s] if dpo.needs_reference else 0.0)
            rewards.append(reward / mask[own].sum() if average or name in ("simpo", "orpo") else reward)
        if name == "orpo":
            rewards = [(p / (1 - p)).log() for p in (r.exp() for r in rewards)]
            total = total + F.softplus(rewards[1] - rewards[0])
        else:
            total = total + TORCH[name](rewards[0] - rewards[1])
        own = slice(BOUNDS[2 * pair], BOUNDS[2 * pair + 1])
        total = total - 0.25 * (exact[own] * mask[own]).sum()
    total.backward()
    torch.testing.assert_close(logprobs.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", [False, True])
def test_first_step_is_ln_2(average: bool) -> None:
    """The policy is the reference: whatever β and the lengths."""
    logprobs, targets = batch()
    sums = torch.stack([logprobs[a:b].detach().sum() for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)])
    dpo = DPO(recipe(preference_average_log_probs=average))
    found = added(measured(dpo, logprobs, replace(targets, reference_S=sums)))
    assert found["loss"] / 3 == pytest.approx(math.log(2), abs=1e-6)
    assert found["rewards_chosen_mean"] == pytest.approx(0.0, abs=1e-6)


def test_accuracy_is_strict() -> None:
    targets = Targets(bounds=[0, 1, 2, 3, 4], reference_S=torch.zeros(4))
    found = added(measured(DPO(RECIPE), torch.tensor([-1.0, -1.0, -1.0, -2.0]), targets))
    assert found["accuracy"] == 1.0 and found["margin"] == 1.0


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", BY_HAND)
def test_pairs_add_up_however_they_are_split(name: str, weights: list[float] | None) -> None:
    """N × 1 = 1 × N: loss, sums, units and gradient."""
    dpo = objective(name, preference_average_log_probs=True, sft_loss_weight=0.5)
    whole, targets = batch(weights)
    found = measured(dpo, whole, targets)
    found["loss"].backward()
    split = torch.tensor(LOGPROBS, requires_grad=True)
    parts, units = [], 0.0
    for a, b in ((0, 2), (2, 4), (4, 6)):
        own = targets.sequences(a, b)
        parts.append(measured(dpo, split[BOUNDS[a] : BOUNDS[b]], own))
        parts[-1]["loss"].backward()
        units += dpo.units(own)
    assert units == dpo.units(targets)
    assert added(*parts) == pytest.approx(added(found), rel=1e-6)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [2, 5, 100])
@pytest.mark.filterwarnings("ignore:A group of tokens")
def test_inside_the_fused_output_layer(rows: int) -> None:
    """Two rows: no pair fits a chunk; five: a chunk a pair; a hundred: all at once."""
    dpo = objective("sigmoid", sft_loss_weight=0.5, preference_average_log_probs=True)
    _, targets = batch()
    vocabulary, generator = 37, torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    labels = torch.randint(vocabulary, (13,), generator=generator)
    mb = (rows + 0.5) * 4 * vocabulary / 2**20
    assert rows_per_chunk(vocabulary, mb) == rows
    loss, sums = linear_objective(
        hidden,
        weight,
        labels,
        lambda x, a, b: dpo.loss(x, targets.sequences(2 * a, 2 * b)),
        group_bounds=BOUNDS[::2],
        workspace_mb=mb,
    )
    loss.backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact, expected = dpo.loss((h @ w.t()).log_softmax(-1).gather(1, labels[:, None]).squeeze(1).float(), targets)
    exact.backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    assert added(sums) == pytest.approx(added(expected), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_rank_without_pairs(name: str) -> None:
    """It computes, and adds nothing."""
    dpo = objective(name, preference_average_log_probs=True)
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    targets = Targets(bounds=[0], reference_S=torch.zeros(0))
    loss, sums = linear_objective(
        hidden,
        weight,
        torch.zeros(0, dtype=torch.int64),
        lambda x, a, b: dpo.loss(x, targets.sequences(2 * a, 2 * b)),
        group_bounds=targets.bounds[::2],
        workspace_mb=1,
    )
    loss.backward()
    assert dpo.units(targets) == 0.0 and float(loss.detach()) == 0.0
    assert len(sums) == 6 and not any(added(sums).values()) and not weight.grad.any()


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 0.5]])
@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_not_trained_or_certain_stays_finite(name: str, weights: list[float] | None) -> None:
    """An answer without trained tokens, and one of probability 1."""
    logprobs = torch.tensor([-1.0, -2.0, 0.0], requires_grad=True)
    targets = Targets(
        bounds=[0, 2, 2, 3, 3],
        weights_N=None if weights is None else torch.tensor(weights),
        reference_S=torch.tensor([-3.0, 0.0, -0.5, 0.0]),
    )
    loss, _ = objective(name, preference_average_log_probs=True, sft_average_log_probs=True).loss(logprobs, targets)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()


def test_registry_is_what_the_checks_know() -> None:
    ours = {name: loss.needs_reference for name, loss in LOSSES.items() if not name.startswith("test_")}
    assert ours == PREFERENCE_LOSSES
    with pytest.raises(ValueError, match="choose another name"):
        preference_loss("ipo", needs_reference=True)(lambda c, r, k: c - r)


OWN = '''
"""Losses of the user's own."""

from engine.objectives.preference_losses import preference_loss


def squared(chosen_P, rejected_P, knobs):
    return (1 - knobs.beta * (chosen_P - rejected_P)).relu().square()


def averaged(chosen_P, rejected_P, knobs):
    return (rejected_P - chosen_P).mean()


@preference_loss("test_free", needs_reference=False)
def free(chosen_P, rejected_P, knobs):
    return rejected_P - chosen_P
'''


def test_a_loss_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, and its name in the recipe; the checks know that it may need any knob."""
    (tmp_path / "my_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    words = ["model=tiny", "data=tasks", "algorithm=dpo"]
    own = compose([*words, "algorithm.preference_loss=my_losses:squared", "algorithm.label_smoothing=0.1"])
    logprobs, targets = batch()
    dpo = build(own.config.algorithm)
    assert dpo.needs_reference
    sums = [sum(LOGPROBS[a:b]) - r for a, b, r in zip(BOUNDS, BOUNDS[1:], REFERENCE, strict=False)]
    margins = [sums[i] - sums[i + 1] for i in (0, 2, 4)]
    expected = sum(max(0.0, 1 - 0.05 * m) ** 2 for m in margins)
    assert float(dpo.loss(logprobs, targets)[0].detach()) == pytest.approx(expected, rel=1e-6)

    free = compose([*words, "algorithm.preference_loss=my_losses:free", "algorithm.reference=none"])
    dpo = build(free.config.algorithm)
    assert not dpo.needs_reference
    dpo.loss(*batch(reference=False))[0].backward()

    with pytest.raises(
        UserError, match=r"must return a loss for each of the 3 pairs, and returned the shape \[\]; leave out"
    ):
        build(recipe(preference_loss="my_losses:averaged")).loss(logprobs, targets)
    with pytest.raises(UserError, match=r"algorithm.reference=none: my_losses:squared needs a reference"):
        build(recipe(preference_loss="my_losses:squared", reference="none"))
    with pytest.raises(UserError, match=r"algorithm.preference_loss: my_losses:absent cannot be imported"):
        build(recipe(preference_loss="my_losses:absent"))
