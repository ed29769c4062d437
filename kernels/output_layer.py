"""A chunk of the output layer: its options, what statistics say of each token, the gradient of logits, ranks that share the layer.

Legend: N tokens, V vocabulary, H hidden size, C tokens of a chunk, K rows of their statistics, S parts of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import reference
from kernels.dispatch import use_triton
from kernels.reference import MAX, SUMEXP, TARGET, TOTAL, WEIGHTED


@dataclass(frozen=True, kw_only=True)
class LogitOptions:
    """What is done to logits on their way to log-probabilities; by default, nothing."""

    label_smoothing: float = 0.0
    """ε, below 1: share of the target that is spread evenly over the whole vocabulary."""
    z_loss: float = 0.0
    """``linear_objective`` adds so many times Σ lse² to the loss sum (PaLM, Chowdhery et al. 2022)."""
    softcap: float | None = None
    """c: logits become c · tanh(z / c) (Gemma 2); None: they stay."""
    temperature: float = 1.0
    """τ that logits are divided by, after the softcap."""
    ignore_index: int = -100
    """Label of tokens that do not count: log-probability, lse and entropy are 0, and so is the gradient."""
    entropy: bool = False
    """Whether the entropy of the predicted distributions is computed; it has no gradient."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: For a value out of range.
        """
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: choose at least 0 and below 1.")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss={self.z_loss}: choose 0 or more.")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}: choose a positive number, or None for no cap.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: choose a positive number.")


PLAIN = LogitOptions()


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of the vocabulary that this rank has: consecutive rows of the output matrix."""

    group: dist.ProcessGroup
    """The ranks that have all of it, each called with the same hidden states and (global) labels."""
    start: int
    """This rank's first token id."""
    vocabulary: int
    """Size of the whole vocabulary."""


class Outputs(NamedTuple):
    """What the output layer says of each token; float32 (float64 of float64)."""

    logprobs_N: Tensor
    """Log-probability of the label."""
    lse_N: Tensor
    """Log-sum-exp of the logits."""
    entropy_N: Tensor | None
    """Entropy of the predicted distribution, in nats, without a gradient; None where the options do not ask for it."""


class Head(NamedTuple):
    """The output layer as one call sees it."""

    weight_VH: Tensor
    bias_V: Tensor | None
    options: LogitOptions
    shard: Shard | None

    @property
    def vocabulary(self) -> int:
        """Size of the whole vocabulary."""
        return self.weight_VH.shape[0] if self.shard is None else self.shard.vocabulary

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that have parts of it; None: this one has all."""
        return None if self.shard is None else self.shard.group

    def rows(self, workspace_mb: float) -> int:
        """Return how many tokens are a chunk, the same on every rank."""
        ranks = 1 if self.group is None else self.group.size()
        return rows_per_chunk(-(-self.vocabulary // ranks), workspace_mb, self.weight_VH.element_size())

    def local(self, labels_C: Tensor) -> Tensor:
        """Return labels as rows of this rank's matrix; they are outside of it where another rank has them, or nobody."""
        return labels_C.long() if self.shard is None else labels_C.long() - self.shard.start

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Return logits of this rank's vocabulary, before softcap and temperature, [C, V]."""
        weight_HV = self.weight_VH.t()
        return hidden_CH @ weight_HV if self.bias_V is None else torch.addmm(self.bias_V, hidden_CH, weight_HV)

    def wanted(self) -> dict[str, Any]:
        """Return what the statistics of logits depend on."""
        o = self.options
        return {**self.scaling(), "total": o.label_smoothing > 0, "weighted": o.entropy}

    def scaling(self) -> dict[str, Any]:
        """Return what makes z' of z."""
        return {"softcap": self.options.softcap, "temperature": self.options.temperature}


def rows_per_chunk(vocabulary: int, workspace_mb: float, itemsize: int = 4) -> int:
    """Return how many rows of logits fit the workspace; at least one.

    Args:
        vocabulary: Logits of a row.
        workspace_mb: MiB.
        itemsize: Bytes of a logit. There is no second copy of them, of whatever type.
    """
    return max(1, int(workspace_mb * 2**20) // (itemsize * vocabulary))


def merge(parts_KSN: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the statistics of a whole vocabulary from those of its parts, which this rank and those of a group have.

    Args:
        parts_KSN: As of ``reference.logit_stats``, one for each part, float32, [5, S, N].
        group: All call alike; None: this rank has all parts.

    Returns:
        The same, [5, N].
    """
    if group is None and parts_KSN.shape[1] == 1:
        return parts_KSN[:, 0]
    top_N = parts_KSN[MAX].amax(0)
    if group is not None:
        dist.all_reduce(top_N, dist.ReduceOp.MAX, group=group)
    down_SN = parts_KSN[MAX] - top_N
    shrink_SN = down_SN.exp()
    sumexp_SN, weighted_SN = parts_KSN[SUMEXP], parts_KSN[WEIGHTED]
    moved_SN = (weighted_SN + down_SN * sumexp_SN) * shrink_SN
    sums_KN = torch.stack([sumexp_SN * shrink_SN, parts_KSN[TARGET], parts_KSN[TOTAL], moved_SN]).sum(1)
    if group is not None:
        dist.all_reduce(sums_KN, group=group)
    return torch.cat([top_N[None], sums_KN])


def by_triton(x: Tensor) -> bool:
    """Tell whether Triton's kernels work on such logits."""
    return x.dtype != torch.float64 and use_triton(x)


def twin(x: Tensor) -> ModuleType:
    """Return who works on logits like these."""
    if not by_triton(x):
        return reference
    from kernels import triton_softmax

    return triton_softmax


def token_outputs(head: Head, stats_KC: Tensor, labels_C: Tensor) -> tuple[Outputs, Tensor]:
    """Return what the statistics of the whole vocabulary, float32 [5, C], give, and lse of ignored tokens too."""
    smoothing = head.options.label_smoothing
    top_C, log_sum_C = stats_KC[MAX], stats_KC[SUMEXP].log()
    lse_C, target_C = top_C + log_sum_C, stats_KC[TARGET] - top_C
    if smoothing:
        target_C = (1 - smoothing) * target_C + smoothing * (stats_KC[TOTAL] / head.vocabulary - top_C)
    known_C = (labels_C >= 0) & (labels_C < head.vocabulary)
    logprobs_C = torch.where(known_C, target_C - log_sum_C, torch.nan)
    found = [logprobs_C, lse_C]
    if head.options.entropy:
        found.append(log_sum_C - stats_KC[WEIGHTED] / stats_KC[SUMEXP])
    counted_C = labels_C != head.options.ignore_index
    found = [torch.where(counted_C, x, 0.0) for x in found]
    return Outputs(found[0], found[1], found[2] if head.options.entropy else None), lse_C


def logits_grad_(
    head: Head, z_CV: Tensor, labels_C: Tensor, lse_C: Tensor, grad_C: Tensor, grad_lse_C: Tensor
) -> Tensor:
    """Write the gradient of the logits [C, V] over them, from those of log-probabilities and lse, float32 [C]."""
    counted_C, smoothing = labels_C != head.options.ignore_index, head.options.label_smoothing
    grad_C, grad_lse_C = (torch.where(counted_C, x, 0.0) for x in (grad_C, grad_lse_C))
    parts = (1 - smoothing) * grad_C, smoothing / head.vocabulary * grad_C, grad_lse_C - grad_C
    grad_: Callable[..., Tensor] = twin(z_CV).logit_grad_
    return grad_(z_CV, head.local(labels_C), lse_C, *parts, **head.scaling())
