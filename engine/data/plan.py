"""The plan: which samples make a step, whatever the layout, and how a step's samples are packed.

Two pure functions. ``Plan.members(step)`` is evaluated for that step alone: an epoch is never materialised, and resuming is
a number. ``pack`` and ``pad`` turn the lengths of a step's samples into micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


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


def pack(lengths: Sequence[int] | NDArray[np.int32], capacity: int) -> list[list[int]]:
    """Pack samples into micro-batches by first-fit decreasing (at most 11/9 of the optimum plus 6/9; Dósa, 2007).

    Args:
        lengths: Tokens of each sample, none above ``capacity``.
        capacity: Most tokens in a micro-batch.

    Returns:
        Indices into ``lengths`` for each micro-batch.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"a sample of {sizes.max()} tokens fits no micro-batch of {capacity}")
    room = np.full(len(sizes), capacity, np.int64)
    bins: list[list[int]] = []
    for i in np.argsort(-sizes, kind="stable").tolist():
        first = int(np.argmax(room[: len(bins) + 1] >= sizes[i]))
        if first == len(bins):
            bins.append([])
        bins[first].append(i)
        room[first] -= sizes[i]
    return bins


def pad(lengths: Sequence[int] | NDArray[np.int32], micro_batch_size: int) -> list[list[int]]:
    """Group samples of like length into padded micro-batches of ``micro_batch_size``."""
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    return [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits (Steele, Lea and Flood, 2014); wraps around on purpose."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
