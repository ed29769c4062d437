"""A data set and its plan together: one rank's micro-batches of any step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.config.schema import DataSection, max_tokens_per_micro_batch
from engine.data.batch import collate_packed, collate_padded
from engine.data.cache import Samples
from engine.data.plan import Assignment, Plan, assign, assign_padded, bin_costs, imbalance
from engine.errors import UserError
from engine.types import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Micro-batches by step.

    Attributes:
        samples: Tokenised samples.
        plan: Which of them make a step.
        capacity: Most tokens in a packed micro-batch; None for padded ones.
        micro_batch_size: Samples in a padded micro-batch.
        rank: Data-parallel rank whose micro-batches these are.
        ranks: Data-parallel ranks.
        attention_length: Tokens at which a document's attention costs as much as all the rest, about 12 times the model's
            hidden size; see ``plan.cost``. Alike on every rank.
    """

    samples: Samples
    plan: Plan
    capacity: int | None
    micro_batch_size: int
    rank: int = 0
    ranks: int = 1
    attention_length: float = math.inf

    def step(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step, counted from 0: equally many on every rank, some perhaps empty."""
        members = self.plan.members(step)
        return [self._collate(members[group]) for group in self.assign(members)[self.rank]]

    def assign(self, members: NDArray[np.int64]) -> Assignment:
        """Return the micro-batches of all ranks for some samples, as indices into ``members``."""
        lengths = self.samples.lengths[members]
        if self.capacity is None:
            return assign_padded(lengths, self.micro_batch_size, self.ranks, self.attention_length)
        return assign(lengths, capacity=self.capacity, ranks=self.ranks, attention_length=self.attention_length)

    def imbalance(self, step: int) -> float:
        """Return the share of a step's time that the plan loses to the slowest rank; reads lengths alone."""
        members = self.plan.members(step)
        padded = self.capacity is None
        return imbalance(
            bin_costs(self.samples.lengths[members], self.assign(members), self.attention_length, padded=padded)
        )

    def _collate(self, members: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
        samples = [self.samples[int(i)] for i in members]
        return collate_padded(samples) if self.capacity is None else collate_packed(samples)


def train_loader(
    samples: Samples,
    data: DataSection,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    attention_length: float = math.inf,
) -> Loader:
    """Return the loader of the training data.

    Args:
        samples: Tokenised samples.
        data: The recipe's data.
        batch_size: Conversations in a step, over all ranks.
        micro_batch_size: Samples in a padded micro-batch.
        seed: Of the order.
        rank: Data-parallel rank.
        ranks: Data-parallel ranks.
        attention_length: About 12 times the model's hidden size; see ``Loader``.

    Raises:
        UserError: If the data does not fill one batch.
    """
    plan = Plan(
        num_samples=len(samples), batch_size=batch_size, seed=seed, shuffle=data.shuffle, drop_last=data.drop_last
    )
    if not plan.steps_per_epoch:
        raise UserError(
            f"train.global_batch_size={batch_size} is more than the {len(samples)} samples of {data.train_path}: "
            f"lower it to {len(samples)}, or set data.drop_last=false."
        )
    return Loader(
        samples=samples,
        plan=plan,
        capacity=_capacity(data),
        micro_batch_size=micro_batch_size,
        rank=rank,
        ranks=ranks,
        attention_length=attention_length,
    )


def val_loader(
    samples: Samples,
    data: DataSection,
    *,
    batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    attention_length: float = math.inf,
) -> Loader:
    """Return the loader of the validation data: in the file's order, nothing left out, however few for the ranks."""
    plan = Plan(num_samples=len(samples), batch_size=batch_size, shuffle=False, drop_last=False)
    return Loader(
        samples=samples,
        plan=plan,
        capacity=_capacity(data),
        micro_batch_size=micro_batch_size,
        rank=rank,
        ranks=ranks,
        attention_length=attention_length,
    )


def _capacity(data: DataSection) -> int | None:
    return max_tokens_per_micro_batch(data) if data.packing.enabled else None
