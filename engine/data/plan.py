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
from fractions import Fraction
from functools import cached_property
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.config.schema import DataSection
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.samples import DataSet

ROUNDS = 6

Lengths = Sequence[int] | NDArray[np.integer]
Assignment = list[list[list[int]]]
"""[rank][micro_step] → indices of the bin's samples, none for an empty bin; equally many micro-steps on every rank."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Order of the conversations over the whole run.

    Sources are drawn side by side: the m-th conversation of a source of weight w, counted from 0, has its turn at time
    (2m + 1) / 2w, ties in the sources' order. However a run is cut into steps, each source has so had its share to within
    one conversation or so. An epoch ends with the last conversation of the source of the largest weight; without weights
    that is when every source has been seen once. Each source goes on where the epoch before has left it.

    Attributes:
        sizes: Conversations of each source; they are numbered through.
        batch_size: Conversations in a step.
        seed: ``run.seed``.
        shuffle: Draw each pass over a source in an order of its own.
        drop_last: Leave out the partial batch at the end of an epoch.
        weights: Share of each source in the samples, in any unit; None: as their sizes.
        names: Of the sources; the order of one depends on no other.
    """

    sizes: Sequence[int]
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    weights: Sequence[float] | None = None
    names: Sequence[str] = ("",)

    @cached_property
    def _shares(self) -> list[int]:
        """The weights as whole numbers."""
        exact = [Fraction(str(w)) for w in (self.sizes if self.weights is None else self.weights)]
        unit = math.lcm(*(w.denominator for w in exact))
        return [int(w * unit) for w in exact]

    @cached_property
    def quotas(self) -> list[int]:
        """Conversations of each source in an epoch."""
        shares = self._shares
        largest = max(range(len(shares)), key=lambda i: (shares[i], self.sizes[i], i))
        end = Fraction(2 * self.sizes[largest] - 1, 2 * shares[largest])
        quotas = []
        for i, share in enumerate(shares):
            before = end * share + Fraction(1, 2)
            quotas.append(math.floor(before) - (before.denominator == 1 and i > largest))
        return quotas

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in one epoch."""
        whole, rest = divmod(sum(self.quotas), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def size(self, step: int) -> int:
        """Return the number of conversations of a step."""
        return min(self.batch_size, sum(self.quotas) - step % self.steps_per_epoch * self.batch_size)

    def members(self, step: int) -> NDArray[np.int64]:
        """Return the indices of the conversations of a step, source by source.

        Args:
            step: Number of steps before it, from 0.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        first, last = self._drawn(start), self._drawn(start + self.size(step))
        found, offset = [], 0
        for i, size in enumerate(self.sizes):
            seen = epoch * self.quotas[i]
            found.append(offset + self._stream(i, seen + first[i], seen + last[i]))
            offset += size
        return np.concatenate(found)

    def passes(self, step: int) -> list[float]:
        """Return how often each source has been gone through before a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        drawn = self._drawn(within * self.batch_size)
        return [(epoch * q + d) / size for q, d, size in zip(self.quotas, drawn, self.sizes, strict=True)]

    def _drawn(self, count: int) -> list[int]:
        """Return how many of the first ``count`` conversations of an epoch come from each source."""
        shares, total, n = self._shares, sum(self._shares), len(self.sizes)
        # Rounding moves the sum at any time by n/2 at most, so each source has had at least this; a few turns are left.
        drawn = [max(0, ((2 * count - n) * share - total) // (2 * total)) for share in shares]
        turns = [(Fraction(2 * m + 1, 2 * share), i) for i, (m, share) in enumerate(zip(drawn, shares, strict=True))]
        heapify(turns)
        for _ in range(count - sum(drawn)):
            time, i = turns[0]
            drawn[i] += 1
            heapreplace(turns, (time + Fraction(1, shares[i]), i))
        return drawn

    def _stream(self, source: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the conversations of a source from ``start`` to ``stop``, counted over the whole run."""
        size, name = self.sizes[source], self.names[source]
        found = []
        while start < stop:
            lap, within = divmod(start, size)
            count = min(stop - start, size - within)
            positions = np.arange(within, within + count, dtype=np.uint64)
            key = f"{self.seed}/{name}/{lap}" if name else f"{self.seed}/{lap}"
            found.append(permute(positions, size, key) if self.shuffle else positions.astype(np.int64))
            start += count
        return np.concatenate(found) if found else np.zeros(0, np.int64)


def train_plan(data: DataSet, section: DataSection, *, batch_size: int, seed: int) -> Plan:
    """Return the plan of the training data.

    Args:
        data: Tokenised samples.
        section: The recipe's data.
        batch_size: Conversations in a step, over all ranks.
        seed: Of the order.

    Raises:
        UserError: If the data does not fill one batch, or one of its sources has no place in it.
    """
    plan = Plan(
        sizes=data.sizes,
        weights=data.weights,
        names=[part.name for part in data.parts] if len(data.parts) > 1 else [""],
        batch_size=batch_size,
        seed=seed,
        shuffle=section.shuffle,
        drop_last=section.drop_last,
    )
    for part, quota in zip(data.parts, plan.quotas, strict=True):
        if not quota:
            raise UserError(
                f"data.train: an epoch has no place for a conversation of {part.name} (weight {part.weight}); raise its weight."
            )
    if not plan.steps_per_epoch:
        raise UserError(
            f"train.global_batch_size={batch_size} is more than the {sum(plan.quotas)} conversations of an epoch: "
            f"lower it to {sum(plan.quotas)}, or set data.drop_last=false."
        )
    return plan


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

    Raises:
        ValueError: If a sample is longer than that.
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
