"""What a pair costs, given the rewards of its two answers: one function a loss.

A reward is r = Σ_t (log π(y_t) − log π_ref(y_t)) over the tokens of an answer, without the reference where a loss needs none;
Δ = r_chosen − r_rejected. Every loss is differentiable, pure, and element by element. Legend: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_AVERAGE = -1e-6
"""Average log-probability at which odds are cut off: that of a certain answer would be infinite."""


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a recipe sets for the preference loss."""

    beta: float
    """β, algorithm.reference_policy_kl_penalty."""
    label_smoothing: float = 0.0
    """ε, algorithm.label_smoothing: share of the pairs that may be the wrong way round."""
    margin: float = 0.0
    """γ, algorithm.preference_margin."""


LossFn = Callable[[Tensor, Tensor, Knobs], Tensor]
"""(rewards of chosen [P], rewards of rejected [P], knobs) → losses [P], all float32."""


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss and what it is given."""

    function: LossFn
    needs_reference: bool = True
    """Whether rewards are relative to the reference."""
    always_average: bool = False
    """Whether rewards are averages over tokens, whatever algorithm.preference_average_log_probs says."""

    def __call__(self, chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
        """Return the loss of each pair."""
        return self.function(chosen_P, rejected_P, knobs)


LOSSES: dict[str, PreferenceLoss] = {}
"""Every loss that a recipe may name; ``engine.config.names`` lists them for the checks, which do not import torch."""


def preference_loss(
    name: str, *, needs_reference: bool, always_average: bool = False
) -> Callable[[LossFn], PreferenceLoss]:
    """Make a function a preference loss, and register it.

    Args:
        name: Its name; for a loss outside this file, which a recipe names as module:function, any that is free.
        needs_reference: See PreferenceLoss.
        always_average: See PreferenceLoss.

    Raises:
        ValueError: If the name is taken.
    """

    def register(function: LossFn) -> PreferenceLoss:
        if name in LOSSES:
            raise ValueError(f"there is a preference loss {name} already; choose another name")
        LOSSES[name] = PreferenceLoss(function, needs_reference, always_average)
        return LOSSES[name]

    return register


@preference_loss("sigmoid", needs_reference=True)
def sigmoid(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ).

    DPO (Rafailov et al., 2023, eq. 7); with ε > 0 conservative DPO (Mitchell, 2023).
    """
    logits_P = knobs.beta * (chosen_P - rejected_P)
    return -(1 - knobs.label_smoothing) * F.logsigmoid(logits_P) - knobs.label_smoothing * F.logsigmoid(-logits_P)


@preference_loss("ipo", needs_reference=True)
def ipo(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """(Δ − 1/(2β))², β being the paper's τ.

    Azar et al., 2023, eq. 17. TRL's averages the log-probabilities over tokens: here, preference_average_log_probs=true.
    """
    return (chosen_P - rejected_P - 1 / (2 * knobs.beta)).square()


@preference_loss("hinge", needs_reference=True)
def hinge(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """max(0, 1 − βΔ).

    SLiC-HF (Zhao et al., 2023) on rewards relative to the reference, as RSO (Liu et al., 2023) writes it.
    """
    return torch.relu(1 - knobs.beta * (chosen_P - rejected_P))


@preference_loss("robust", needs_reference=True)
def robust(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """(−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε).

    Robust DPO (Chowdhury et al., 2024): unbiased where a share ε of the labels was flipped. Negative values are right.
    """
    logits_P, flipped = knobs.beta * (chosen_P - rejected_P), knobs.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(logits_P) + flipped * F.logsigmoid(-logits_P)) / (1 - 2 * flipped)


@preference_loss("simpo", needs_reference=False, always_average=True)
def simpo(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """−log σ(βΔ − γ), r being an average log-probability.

    SimPO (Meng et al., 2024, eq. 6).
    """
    return -F.logsigmoid(knobs.beta * (chosen_P - rejected_P) - knobs.margin)


@preference_loss("orpo", needs_reference=False, always_average=True)
def orpo(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """−log σ(log odds(chosen) − log odds(rejected)), odds = p / (1 − p), log p = r being an average log-probability.

    The odds ratio term of ORPO (Hong et al., 2024, eq. 7); it has no β. The paper's loss is this one times λ
    (preference_loss_weight) plus the SFT term (sft_loss_weight=1, sft_average_log_probs=true).
    """
    return -F.logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def _log_odds(average_P: Tensor) -> Tensor:
    """Return log(p / (1 − p)) for p = exp(average), exact near p = 1 too."""
    average_P = average_P.clamp(max=LARGEST_AVERAGE)
    return average_P - torch.log(-torch.expm1(average_P))
