"""Direct preference optimisation and its relatives: a loss of the rewards of a pair, and an SFT term on its chosen answer.

Legend: N trained tokens, S sequences (chosen and rejected alternate), P pairs.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from engine import plugins
from engine.config.schema import AlgorithmSection
from engine.errors import UserError
from engine.objectives.preference_losses import LOSSES, Knobs, PreferenceLoss
from engine.types import Targets
from kernels.reference import sums_by_group

T = TypeVar("T")


class DPO:
    """L = (preference_loss_weight · Σ_pairs L_pref + sft_loss_weight · Σ_pairs L_sft) / pairs of the global batch.

    The reward of an answer is r = Σ_t w_t (log π(y_t) − log π_ref(y_t)), not multiplied by β; w is the mask, or the tokens'
    weights. An average is that divided by Σ_t w_t. L_sft = −Σ_t w_t log π(y_t) over the chosen answer. Rafailov et al., 2023.

    Args:
        algorithm: Section of a recipe with ``algorithm=dpo``.

    Raises:
        UserError: If a preference loss of the user's own cannot be had, or needs the reference that the recipe does without.
    """

    sequences_per_group = 2
    count_metric: str | None = "num_valid_samples"

    def __init__(self, algorithm: AlgorithmSection) -> None:
        self.preference = _preference(_given(algorithm.preference_loss))
        self.needs_reference = self.preference.needs_reference
        if self.needs_reference and algorithm.reference == "none":
            raise UserError(
                f"algorithm.reference=none: {algorithm.preference_loss} needs a reference; set algorithm.reference=initial, or "
                'register it with @preference_loss("NAME", needs_reference=False).'
            )
        self.knobs = Knobs(
            beta=_given(algorithm.reference_policy_kl_penalty),
            label_smoothing=_given(algorithm.label_smoothing),
            margin=_given(algorithm.preference_margin),
        )
        self.average_rewards = self.preference.always_average or _given(algorithm.preference_average_log_probs)
        self.average_sft = _given(algorithm.sft_average_log_probs)
        self.preference_weight = _given(algorithm.preference_loss_weight)
        self.sft_weight = _given(algorithm.sft_loss_weight)

    def units(self, targets: Targets) -> float:
        """Return the number of pairs."""
        return float((len(targets.bounds) - 1) // 2)

    def loss(self, logprobs_N: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the loss over the pairs.

        Args:
            logprobs_N: Log-probabilities of the targets, float32 [N].
            targets: Whole pairs, with the reference's log-probabilities where ``needs_reference``: Σ_t w_t log π_ref(y_t).

        Returns:
            A scalar, and the sums over the pairs of: preference_loss and sft_loss, before their weights; accuracy (1 where
            r_chosen > r_rejected); rewards_chosen_mean, rewards_rejected_mean; margin, their difference.

        Raises:
            UserError: If a loss of the user's own returns another shape than [P].
        """
        weighted_N = logprobs_N if targets.weights_N is None else logprobs_N * targets.weights_N
        logprobs_S = sums_by_group(weighted_N, targets.bounds)
        rewards_S = logprobs_S
        if self.needs_reference:
            assert targets.reference_S is not None
            rewards_S = rewards_S - targets.reference_S
        if self.average_rewards:
            rewards_S = _average(rewards_S, targets)
        chosen_P, rejected_P = rewards_S[0::2], rewards_S[1::2]
        losses_P = self.preference(chosen_P, rejected_P, self.knobs)
        if losses_P.shape != chosen_P.shape:
            raise UserError(
                f"algorithm.preference_loss: must return a loss for each of the {len(chosen_P)} pairs, and returned the shape "
                f"{list(losses_P.shape)}; leave out the mean or sum."
            )
        preference = losses_P.sum()
        sft = -(_average(logprobs_S, targets) if self.average_sft else logprobs_S)[0::2].sum()
        return self.preference_weight * preference + self.sft_weight * sft, {
            "preference_loss": preference,
            "sft_loss": sft,
            "accuracy": (chosen_P > rejected_P).float().sum(),
            "rewards_chosen_mean": chosen_P.sum(),
            "rewards_rejected_mean": rejected_P.sum(),
            "margin": (chosen_P - rejected_P).sum(),
        }


def _average(sums_S: Tensor, targets: Targets) -> Tensor:
    """Divide sums over sequences by the length of their masks; a sequence without trained tokens has the average 0."""
    if targets.weights_N is None:
        lengths = [float(b - a) for a, b in zip(targets.bounds, targets.bounds[1:], strict=False)]
        lengths_S = torch.tensor(lengths, dtype=torch.float32).to(sums_S.device, non_blocking=True)
    else:
        lengths_S = sums_by_group(targets.weights_N, targets.bounds)
    return sums_S / torch.where(lengths_S > 0, lengths_S, 1.0)


def _preference(name: str) -> PreferenceLoss:
    """Return a loss of ours by name, or the user's own by module:function."""
    if ":" not in name:
        return LOSSES[name]
    found = plugins.load(name, "algorithm.preference_loss")
    return found if isinstance(found, PreferenceLoss) else PreferenceLoss(found)


def _given(value: T | None) -> T:
    """Return a key that the check of the recipe has seen to be set."""
    assert value is not None
    return value
