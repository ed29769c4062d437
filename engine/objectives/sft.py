"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from __future__ import annotations

from torch import Tensor

from engine.types import Targets


class SFT:
    """L = −Σ_t w_t log p(y_t) / Σ_t w_t over the trained tokens of the global batch."""

    sequences_per_group = 0
    needs_reference = False
    count_metric: str | None = None

    def units(self, targets: Targets) -> float:
        """Return the number of trained tokens, weights counted."""
        return float(targets.num_tokens if targets.weights_N is None else targets.weights_N.sum())

    def loss(self, logprobs_N: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the loss over the tokens."""
        weighted_N = logprobs_N if targets.weights_N is None else logprobs_N * targets.weights_N
        return -weighted_N.sum(), {}
