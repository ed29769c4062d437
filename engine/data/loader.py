"""A data set and its plan together: the micro-batches of any step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.config.schema import DataSection, max_tokens_per_micro_batch
from engine.data.batch import collate_packed, collate_padded
from engine.data.cache import Samples
from engine.data.plan import Plan, pack, pad
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
    """

    samples: Samples
    plan: Plan
    capacity: int | None
    micro_batch_size: int

    def step(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of a step, counted from 0."""
        members = self.plan.members(step)
        return [self._collate(members[group]) for group in self.assign(members)]

    def assign(self, members: NDArray[np.int64]) -> list[list[int]]:
        """Return the micro-batches of some samples, as indices into ``members``."""
        lengths = self.samples.lengths[members]
        return pad(lengths, self.micro_batch_size) if self.capacity is None else pack(lengths, self.capacity)

    def _collate(self, members: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
        samples = [self.samples[int(i)] for i in members]
        return collate_padded(samples) if self.capacity is None else collate_packed(samples)


def train_loader(samples: Samples, data: DataSection, *, batch_size: int, micro_batch_size: int, seed: int) -> Loader:
    """Return the loader of the training data.

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
    return Loader(samples=samples, plan=plan, capacity=_capacity(data), micro_batch_size=micro_batch_size)


def val_loader(samples: Samples, data: DataSection, *, batch_size: int, micro_batch_size: int) -> Loader:
    """Return the loader of the validation data: in the file's order, nothing left out."""
    plan = Plan(num_samples=len(samples), batch_size=batch_size, shuffle=False, drop_last=False)
    return Loader(samples=samples, plan=plan, capacity=_capacity(data), micro_batch_size=micro_batch_size)


def _capacity(data: DataSection) -> int | None:
    return max_tokens_per_micro_batch(data) if data.packing.enabled else None
