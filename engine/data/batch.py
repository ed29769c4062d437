"""From samples to the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from engine.data.samples import trained_positions, trained_weights
from engine.types import MicroBatch, Sample, Targets


def collate_packed(samples: Sequence[Sample]) -> MicroBatch:
    """Concatenate samples into one row without padding; a prompt that a sample shares with the one before it stands there once.

    Raises:
        ValueError: If a sample is not behind the one whose prompt it shares.
    """
    if not samples:
        return empty_micro_batch(padded=False)
    shared = [s.shared for s in samples]
    for before, sample in zip([None, *samples], samples, strict=False):
        n = sample.shared
        if n and (before is None or before.shared or not np.array_equal(before.input_ids[:n], sample.input_ids[:n])):
            raise ValueError("a sample that shares a prompt must stand behind the one that it shares it with")
    edges = np.cumsum([0, *(len(s.input_ids) - s.shared for s in samples)])
    starts = edges[:-1]
    places = [start + np.arange(len(s.input_ids)) - s.shared for start, s in zip(starts.tolist(), samples, strict=True)]
    for before, own, n in zip([None, *places], places, shared, strict=False):
        if before is not None:
            own[:n] = before[:n]
    return _micro_batch(
        samples,
        places=places,
        input_ids=np.concatenate([s.input_ids[s.shared :] for s in samples])[None],
        position_ids=np.concatenate([np.arange(s.shared, len(s.input_ids)) for s in samples])[None],
        cu_seqlens=edges.tolist(),
        shared=shared if any(shared) else None,
        num_tokens=int(edges[-1]),
    )


def collate_padded(samples: Sequence[Sample]) -> MicroBatch:
    """Put each sample into a row of its own, padded on the right to the longest."""
    if not samples:
        return empty_micro_batch(padded=True)
    longest = max(len(s.input_ids) for s in samples)
    input_ids = np.zeros((len(samples), longest), np.int64)
    mask = np.zeros((len(samples), longest), np.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = sample.input_ids
        mask[row, : len(sample.input_ids)] = 1
    return _micro_batch(
        samples,
        places=[row * longest + np.arange(len(s.input_ids)) for row, s in enumerate(samples)],
        input_ids=input_ids,
        position_ids=np.broadcast_to(np.arange(longest), input_ids.shape),
        attention_mask=mask,
        num_tokens=int(mask.sum()),
    )


def with_reference(batch: MicroBatch, sums: NDArray[np.float32]) -> MicroBatch:
    """Return a micro-batch with the reference's log-probability of each of its documents [S]."""
    return replace(batch, targets=replace(batch.targets, reference_S=torch.from_numpy(sums)))


def empty_micro_batch(*, padded: bool) -> MicroBatch:
    """Return the micro-batch of a rank that has no samples while others have: one token and no targets.

    It adds nothing to loss, gradients or counts, but its forward and backward passes take part in what the ranks do together.
    """
    return MicroBatch(
        input_ids=torch.zeros((1, 1), dtype=torch.int64),
        position_ids=torch.zeros((1, 1), dtype=torch.int64),
        cu_seqlens=None if padded else [0, 1],
        attention_mask=torch.ones((1, 1), dtype=torch.int64) if padded else None,
        index_N=torch.zeros(0, dtype=torch.int64),
        labels_N=torch.zeros(0, dtype=torch.int64),
        targets=Targets(bounds=[0]),
        num_tokens=0,
    )


def _micro_batch(
    samples: Sequence[Sample],
    *,
    places: Sequence[NDArray[np.int64]],
    input_ids: NDArray[np.integer],
    position_ids: NDArray[np.int64],
    num_tokens: int,
    cu_seqlens: list[int] | None = None,
    shared: list[int] | None = None,
    attention_mask: NDArray[np.int64] | None = None,
) -> MicroBatch:
    """Build the tensors; ``places`` is where each sample's tokens are in the flattened ``input_ids``."""
    positions = [trained_positions(s) for s in samples]
    labels = np.concatenate([s.input_ids[p] for s, p in zip(samples, positions, strict=True)])
    weights = None
    if any(s.weights is not None for s in samples):
        weights = torch.from_numpy(np.concatenate([trained_weights(s) for s in samples]).astype(np.float32))
    index = np.concatenate([place[p - 1] for place, p in zip(places, positions, strict=True)])
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        position_ids=torch.from_numpy(np.array(position_ids)),
        cu_seqlens=cu_seqlens,
        shared=shared,
        attention_mask=None if attention_mask is None else torch.from_numpy(attention_mask),
        index_N=torch.from_numpy(index.astype(np.int64)),
        labels_N=torch.from_numpy(labels.astype(np.int64)),
        targets=Targets(bounds=np.cumsum([0, *map(len, positions)]).tolist(), weights_N=weights),
        num_tokens=num_tokens,
    )
