"""Data and its plan together: one rank's micro-batches of any step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from engine.config.schema import DataSection, max_tokens_per_micro_batch
from engine.data.batch import collate_packed, collate_padded, with_reference
from engine.data.plan import Assignment, Plan, assign, assign_padded, bin_costs, imbalance, train_plan
from engine.data.samples import DataSet
from engine.types import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Micro-batches by step.

    Attributes:
        data: Tokenised samples.
        plan: Which conversations make a step.
        capacity: Most tokens in a packed micro-batch; None for padded ones.
        micro_batch_size: Conversations in a padded micro-batch; a pair is two rows.
        rank: Data-parallel rank whose micro-batches these are.
        ranks: Data-parallel ranks.
        attention_length: Tokens at which a document's attention costs as much as all the rest, about 12 times the model's
            hidden size; see ``plan.cost``. Alike on every rank.
        together: Documents of each conversation, which share a micro-batch: 2 for pairs; 1: any document goes anywhere.
        share_prompts: Whether documents that have a prompt in common with the one before go through the model without it.
    """

    data: DataSet
    plan: Plan
    capacity: int | None
    micro_batch_size: int
    rank: int = 0
    ranks: int = 1
    attention_length: float = math.inf
    together: int = 1
    share_prompts: bool = False

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens that each document puts into a micro-batch."""
        return self.data.lengths - self.data.shared if self.share_prompts else self.data.lengths

    def step(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step, counted from 0: equally many on every rank, some perhaps empty."""
        return [batch for _, batch in self.batches(self.documents(step))]

    def batches(
        self, documents: NDArray[np.int64], *, apart: bool = False
    ) -> list[tuple[NDArray[np.int64], MicroBatch]]:
        """Return this rank's micro-batches of some documents: equally many on every rank, some perhaps empty.

        Args:
            documents: Of whole conversations, [D].
            apart: Give each conversation a micro-batch of its own.

        Returns:
            Each micro-batch behind the indices into ``documents`` of what it holds, [S].
        """
        groups = (np.asarray(group, np.int64) for group in self.assign(documents, apart=apart)[self.rank])
        return [(group, self._collate(documents[group])) for group in groups]

    def documents(self, step: int) -> NDArray[np.int64]:
        """Return the documents of a step."""
        return self.data.documents(self.plan.members(step))

    def assign(self, documents: NDArray[np.int64], *, apart: bool = False) -> Assignment:
        """Return the micro-batches of all ranks for some documents, as indices into ``documents``; see ``batches``."""
        lengths = self.lengths[documents].reshape(-1, self.together)
        if self.capacity is None or apart:
            size = 1 if apart else self.micro_batch_size
            found = assign_padded(lengths.max(1), size, self.ranks, self.attention_length)
        else:
            found = assign(
                lengths.sum(1), capacity=self.capacity, ranks=self.ranks, attention_length=self.attention_length
            )
        if self.together == 1:
            return found
        own = range(self.together)
        return [[[i * self.together + k for i in group for k in own] for group in steps] for steps in found]

    def imbalance(self, step: int) -> float:
        """Return the share of a step's time that the plan loses to the slowest rank; reads lengths alone."""
        documents = self.documents(step)
        padded = self.capacity is None
        return imbalance(
            bin_costs(self.lengths[documents], self.assign(documents), self.attention_length, padded=padded)
        )

    def by_source(self, step: int) -> dict[str, float]:
        """Return what each of several sources gives to a step: its tokens, and how often it has been gone through after it."""
        if len(self.data.parts) == 1:
            return {}
        documents = self.documents(step)
        part_of = self.data.part_of_document(documents)
        figures: dict[str, float] = {}
        for p, (part, done) in enumerate(zip(self.data.parts, self.plan.passes(step + 1), strict=True)):
            tokens = int(self.lengths[documents[part_of == p]].sum())
            figures |= {f"train/{part.name}/tokens": tokens, f"train/{part.name}/epoch": done}
        return figures

    def _collate(self, documents: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
        samples = [self.data[int(i)] for i in documents]
        if not self.share_prompts:
            samples = [s._replace(shared=0) for s in samples]
        batch = collate_padded(samples) if self.capacity is None else collate_packed(samples)
        return batch if self.data.reference is None else with_reference(batch, self.data.reference[documents])


class Place(TypedDict, total=False):
    """Whose micro-batches a loader gives, and what belongs together: fields of ``Loader``."""

    rank: int
    ranks: int
    attention_length: float
    together: int


def train_loader(
    data: DataSet,
    section: DataSection,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    **place: Unpack[Place],
) -> Loader:
    """Return the loader of the training data.

    Args:
        data: Tokenised samples.
        section: The recipe's data.
        batch_size: Conversations in a step, over all ranks.
        micro_batch_size: Conversations in a padded micro-batch; a pair is two rows.
        seed: Of the order.
        place: Whose micro-batches.

    Raises:
        UserError: If the data does not fill one batch.
    """
    plan = train_plan(data, section, batch_size=batch_size, seed=seed)
    return _loader(data, plan, section, micro_batch_size, place)


def val_loader(
    data: DataSet, section: DataSection, *, batch_size: int, micro_batch_size: int, **place: Unpack[Place]
) -> Loader:
    """Return the loader of the validation data: in the file's order, nothing left out, however few for the ranks."""
    plan = Plan(sizes=[sum(data.sizes)], batch_size=batch_size, shuffle=False, drop_last=False)
    return _loader(data, plan, section, micro_batch_size, place)


def _loader(data: DataSet, plan: Plan, section: DataSection, micro_batch_size: int, place: Place) -> Loader:
    packing, together = section.packing, place.get("together", 1)
    return Loader(
        data=data,
        plan=plan,
        capacity=max_tokens_per_micro_batch(section, together) if packing.enabled else None,
        micro_batch_size=micro_batch_size,
        share_prompts=packing.enabled and packing.share_prompts and together > 1,
        **place,
    )
