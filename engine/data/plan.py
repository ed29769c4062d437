"""The plan: which samples make a step, whatever the layout, and which rank takes which of them at which micro-step.

Two pure functions. ``Plan.members(step)`` is evaluated for that step alone: an epoch is never materialised, and resuming is
a number. ``assign`` and ``assign_padded`` turn the lengths of a step's samples into the micro-batches of all ranks; every
rank evaluates them alike and takes its own, so nothing is sent.

Shape suffixes: R data-parallel ranks, M micro-steps of a step. A bin is what one rank computes in one micro-step.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6

Lengths = Sequence[int] | NDArray[np.integer]
Assignment = list[list[list[int]]]
"""[rank][micro_step] → indices of the bin's samples, none for an empty bin; equally many micro-steps on every rank."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Order of the samples over the whole run.

    Attributes:
        num_samples: Size of the data set, in conversations.
        batch_size: Conversations in a step.
        seed: ``run.seed``.
        shuffle: Draw each epoch in an order of its own.
        drop_last: Leave out the partial batch at the end of an epoch.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in one pass over the data."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def members(self, step: int) -> NDArray[np.int64]:
        """Return the indices of the samples of a step.

        Args:
            step: Number of steps before it, from 0.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        positions = np.arange(start, min(start + self.batch_size, self.num_samples), dtype=np.uint64)
        if not self.shuffle:
            return positions.astype(np.int64)
        return permute(positions, self.num_samples, f"{self.seed}/{epoch}")


def permute(positions: NDArray[np.uint64], size: int, key: str) -> NDArray[np.int64]:
    """Return where a keyed random permutation of ``range(size)`` sends some positions.

    A balanced Feistel network (Luby and Rackoff, 1988) on the smallest even number of bits that holds ``size``, walked until
    the result is inside (Black and Rogaway, 2002); rounds mix with splitmix64. Our own, so that no library's next version
    changes an order.

    Args:
        positions: Any positions in ``range(size)``, uint64.
        size: Size of the set.
        key: The permutation's name.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")[:ROUNDS]
    out = positions.copy()
    todo = np.ones(len(out), np.bool_)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for k in keys:
            left, right = right, left ^ (_splitmix64(right ^ k) & mask)
        out[todo] = (left << half) | right
        todo = out >= np.uint64(size)
    return out.astype(np.int64)


def pack(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Pack samples into micro-batches by first-fit decreasing (at most 11/9 of the optimum plus 6/9; Dósa, 2007).

    Args:
        lengths: Tokens of each sample, none above ``capacity``.
        capacity: Most tokens in a micro-batch.

    Returns:
        Indices into ``lengths`` for each micro-batch.
    """
    if len(lengths) and max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens fits no micro-batch of {capacity}")
    left = _Left(lengths, math.inf)
    bins: list[list[int]] = []
    while left.order:
        bins.append(left.fill(capacity, math.inf))
    return bins


def pad(lengths: Lengths, micro_batch_size: int) -> list[list[int]]:
    """Group samples of like length into padded micro-batches of ``micro_batch_size``."""
    order = _longest_first(lengths)
    return [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]


def assign(lengths: Lengths, *, capacity: int, ranks: int, attention_length: float) -> Assignment:
    """Pack a step's samples into as few micro-steps as first-fit decreasing needs, with ranks that finish together.

    Ranks meet at every micro-step, where weights are gathered and gradients reduced, so a step takes Σ_m max_r cost(m, r).
    The bins of ``pack`` are rounded up to a multiple of ``ranks``, and the room this leaves is used to balance: see
    ``_balance``. A micro-step then holds bins of like cost, dealt out forwards and backwards in turn, which evens the sums of
    the ranks too. A single rank waits for nobody and gets the bins of ``pack`` as they are.

    Args:
        lengths: Tokens of each sample, none above ``capacity``.
        capacity: Most tokens in a bin.
        ranks: Data-parallel ranks.
        attention_length: Tokens at which a document's attention costs as much as all the rest; see ``cost``.
    """
    bins = pack(lengths, capacity)
    if ranks == 1:
        return [bins]
    num_steps = -(-len(bins) // ranks)
    bins = _balance(lengths, capacity, ranks * num_steps, ranks, attention_length) or bins
    costs = cost(lengths, attention_length).tolist()
    return _deal(bins, [math.fsum(costs[i] for i in group) for group in bins], ranks)


def assign_padded(lengths: Lengths, micro_batch_size: int, ranks: int, attention_length: float) -> Assignment:
    """Group samples of like length into padded micro-batches, equally many on every rank.

    A batch that does not fill them makes smaller groups rather than idle ranks. A single rank gets the groups of ``pad``.

    Args:
        lengths: Tokens of each sample.
        micro_batch_size: Most samples in a bin.
        ranks: Data-parallel ranks.
        attention_length: Tokens at which a document's attention costs as much as all the rest; see ``cost``.
    """
    if ranks == 1:
        return [pad(lengths, micro_batch_size)]
    order = _longest_first(lengths)
    num_steps = -(-len(order) // (micro_batch_size * ranks))
    num_groups = min(len(order), num_steps * ranks)
    groups = [order[k * len(order) // num_groups : (k + 1) * len(order) // num_groups] for k in range(num_groups)]
    longest = cost([lengths[group[0]] for group in groups], attention_length).tolist()
    return _deal(groups, [len(group) * c for group, c in zip(groups, longest, strict=True)], ranks)


def cost(lengths: Lengths, attention_length: float) -> NDArray[np.float64]:
    """Return what samples cost, l + l²/attention_length: the unit is a token without its attention.

    A decoder layer of hidden size H has about 12·H² weights (4·H² in attention's projections, 8·H² in the MLP), so 24·H²
    floating-point operations a token. A token that sees t others costs attention 4·t·H more (scores and their sum over
    values, 2·t·H each); under a causal mask t is l/2 on average, which makes 2·l·H a token. Both are equal at l = 12·H =
    attention_length, about 49,000 tokens at H = 4096; a backward pass triples both sides alike.
    """
    sizes = np.asarray(lengths, np.float64)
    return sizes + sizes * sizes / attention_length


def bin_costs(
    lengths: Lengths, assignment: Assignment, attention_length: float, *, padded: bool = False
) -> NDArray[np.float64]:
    """Return what each bin of an assignment costs, [R, M]; in padded ones each sample costs as much as the longest."""
    costs = cost(lengths, attention_length)

    def of_bin(group: list[int]) -> float:
        if padded:
            return len(group) * float(costs[group].max(initial=0.0))
        return float(costs[group].sum())

    return np.array([[of_bin(group) for group in steps] for steps in assignment], np.float64)


def imbalance(costs_RM: Sequence[Sequence[float]] | NDArray[np.float64]) -> float:
    """Return the share of a step's time that is lost to the slowest rank, 1 − Σ_m mean_r cost / Σ_m max_r cost."""
    costs = np.asarray(costs_RM, np.float64)
    slowest = costs.max(0).sum() if costs.size else 0.0
    return float(1 - costs.mean(0).sum() / slowest) if slowest else 0.0


def _balance(
    lengths: Lengths, capacity: int, num_bins: int, ranks: int, attention_length: float
) -> list[list[int]] | None:
    """Return ``num_bins`` bins, a multiple of ``ranks``, of like cost in each micro-step; None where a sample finds no room.

    As long as the costliest sample left is above the average bin left, its micro-step takes that long whatever else it does:
    its bins are filled up to this cost, which leaves less to the other micro-steps. The rest is balanced over all bins that
    remain: costliest first, each to the cheapest bin with room (longest processing time first; Graham, 1969).
    """
    left = _Left(lengths, attention_length)
    bins: list[list[int]] = []
    num_left = num_bins
    # exact sums: a plain one may differ in its last bit from machine to machine
    while left.order and num_left > ranks and left.costs[-1] * num_left > math.fsum(left.costs):
        budget = left.costs[-1]
        bins += [left.fill(capacity, budget) for _ in range(ranks)]
        num_left -= ranks
    rest: list[list[int]] = [[] for _ in range(num_left)]
    room = [capacity] * num_left
    cheapest = [(0.0, b) for b in range(num_left)]  # a heap
    while left.order:
        sample, own = left.order.pop(), left.costs.pop()
        full = []
        while cheapest and room[cheapest[0][1]] < left.lengths[sample]:
            full.append(heappop(cheapest))
        if not cheapest:
            return None
        spent, b = heappop(cheapest)
        rest[b].append(sample)
        room[b] -= left.lengths[sample]
        for entry in (*full, (spent + own, b)):
            heappush(cheapest, entry)
    return bins + rest


class _Left:
    """Samples not yet in a bin, the shortest first; of equals, the later first."""

    def __init__(self, lengths: Lengths, attention_length: float) -> None:
        self.attention_length = attention_length
        self.lengths: list[int] = np.asarray(lengths, np.int64).tolist()
        self.order = _longest_first(lengths)[::-1]
        self.costs: list[float] = cost([self.lengths[i] for i in self.order], attention_length).tolist()

    def fill(self, room: int, budget: float) -> list[int]:
        """Take out the longest sample that fits, again and again, for a bin of so many tokens and so high a cost."""
        group: list[int] = []
        while fits := bisect_right(self.costs, min(budget, room + room * room / self.attention_length)):
            group.append(self.order.pop(fits - 1))
            budget -= self.costs.pop(fits - 1)
            room -= self.lengths[group[-1]]
        return group


def _longest_first(lengths: Lengths) -> list[int]:
    order: list[int] = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    return order


def _deal(bins: list[list[int]], costs: list[float], ranks: int) -> Assignment:
    """Deal bins out to the ranks, costliest first; a micro-step in which no rank has anything is left out."""
    order = [b for b in sorted(range(len(bins)), key=lambda b: -costs[b]) if bins[b]]
    steps = [[bins[b] for b in order[a : a + ranks]] for a in range(0, len(order), ranks)]
    for m, groups in enumerate(steps):
        groups += [[] for _ in range(ranks - len(groups))]
        if m % 2:
            groups.reverse()
    return [[groups[r] for groups in steps] for r in range(ranks)]


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits (Steele, Lea and Flood, 2014); wraps around on purpose."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
