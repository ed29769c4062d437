"""A micro-batch as the ranks of one model replica see it: one row of documents, of which context-parallel ranks have parts.

The row is cut into 2·C chunks of like length, and rank r of C has chunks r and 2·C − 1 − r: under a causal mask what comes late
costs more, so that each has something early and something late. Keys and values of the whole row are gathered in attention, and
each rank attends from its own tokens.

Legend: T tokens of the row, L of this rank, N trained tokens of the row, O of this rank, K rows of keys that its tokens see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.types import MicroBatch, Targets


class Keys(NamedTuple):
    """What a rank's tokens see of the gathered row, under context parallelism."""

    index_K: Tensor
    """Rows of the gathered keys, int64."""
    edges_q: list[int]
    """Pieces of documents among this rank's tokens."""
    edges_k: list[int]
    """Their keys among ``index_K``; the queries are the last of them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """This rank's part of a micro-batch."""

    input_ids: Tensor
    """Token ids, int64 [1, L]."""
    position_ids: Tensor
    """Of each token in its document, int64 [1, L]."""
    cu_seqlens: list[int]
    """Edges of the documents of the whole row."""
    shared: list[int] | None
    """Leading tokens of each document that stand in the one before it alone."""
    keys: Keys | None
    """None: this rank has the whole row."""
    index_O: Tensor
    """Where in L this rank's trained tokens are predicted from, int64."""
    own_O: Tensor | None
    """Which of the N trained tokens these are, int64; None: all."""
    labels_N: Tensor
    """All trained tokens of the row, int64."""
    targets: Targets
    """Of all of them."""
    length: int
    """Tokens of the whole row with what it is padded by, T."""

    @property
    def labels_O(self) -> Tensor:
        """The trained tokens of this rank."""
        return self.labels_N if self.own_O is None else self.labels_N.index_select(0, self.own_O)

    @property
    def own(self) -> Targets:
        """The targets of this rank's tokens, their sequences forgotten."""
        if self.own_O is None:
            return self.targets
        weights = self.targets.weights_N
        return Targets(
            bounds=[0, len(self.own_O)], weights_N=None if weights is None else weights.index_select(0, self.own_O)
        )

    def to(self, device: torch.device) -> Row:
        """Return the row with its tensors on ``device``."""
        if device.type == "cpu":
            return self

        def move(x: Any) -> Any:
            return None if x is None else x.to(device, non_blocking=True)

        weights, reference = move(self.targets.weights_N), move(self.targets.reference_S)
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            keys=None if self.keys is None else self.keys._replace(index_K=move(self.keys.index_K)),
            index_O=move(self.index_O),
            own_O=move(self.own_O),
            labels_N=move(self.labels_N),
            targets=replace(self.targets, weights_N=weights, reference_S=reference),
        )


def length(batch: MicroBatch, multiple: int) -> int:
    """Return the tokens of a micro-batch's row, padding included, rounded up to a multiple."""
    return -(-batch.input_ids.numel() // multiple) * multiple


def row(batch: MicroBatch, *, length: int, rank: int = 0, ranks: int = 1) -> Row:
    """Return a rank's part of a micro-batch.

    A padded micro-batch is a row too: each of its documents goes on over its padding, which nothing that counts can see.

    Args:
        batch: On the host.
        length: Tokens of the row, T: what is not the batch's is a last document that nothing is trained of. A multiple of 2·C.
        rank: Context-parallel rank.
        ranks: Context-parallel ranks, C.
    """
    tokens, longest = batch.input_ids.numel(), batch.input_ids.shape[1]
    edges = list(range(0, tokens + 1, longest)) if batch.cu_seqlens is None else list(batch.cu_seqlens)
    shared = None if batch.shared is None else list(batch.shared)
    input_ids, position_ids = batch.input_ids.reshape(1, -1), batch.position_ids.reshape(1, -1)
    if length > tokens:
        edges.append(length)
        shared = None if shared is None else [*shared, 0]
        input_ids = torch.nn.functional.pad(input_ids, (0, length - tokens))
        position_ids = torch.cat([position_ids, torch.arange(length - tokens)[None]], 1)
    found = Row(
        input_ids=input_ids,
        position_ids=position_ids,
        cu_seqlens=edges,
        shared=shared,
        keys=None,
        index_O=batch.index_N,
        own_O=None,
        labels_N=batch.labels_N,
        targets=batch.targets,
        length=length,
    )
    return found if ranks == 1 else _part(found, rank, ranks)


def places(length: int, rank: int, ranks: int) -> Tensor:
    """Return which tokens of a row a context-parallel rank has, in its order, int64 [L]."""
    chunk = length // (2 * ranks)
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in (rank, 2 * ranks - 1 - rank)])


def _part(whole: Row, rank: int, ranks: int) -> Row:
    gathered_T = torch.cat([places(whole.length, r, ranks) for r in range(ranks)])
    at_T = torch.empty_like(gathered_T)
    at_T[gathered_T] = torch.arange(whole.length)  # row of the gathered keys where each token's are
    first, count = rank * whole.length // ranks, whole.length // ranks
    own_L = gathered_T[first : first + count]
    place_N = at_T[whole.index_O] - first
    own_O = torch.nonzero((place_N >= 0) & (place_N < count)).flatten()
    return replace(
        whole,
        input_ids=whole.input_ids[:, own_L],
        position_ids=whole.position_ids[:, own_L],
        keys=_keys(whole, at_T, rank, ranks),
        index_O=place_N[own_O],
        own_O=own_O,
    )


def _keys(whole: Row, at_T: Tensor, rank: int, ranks: int) -> Keys:
    chunk = whole.length // (2 * ranks)
    documents = list(zip(whole.cu_seqlens, whole.cu_seqlens[1:], strict=False))
    prompts = whole.shared or [0] * len(documents)
    index, edges_q, edges_k = [], [0], [0]
    for c in (rank, 2 * ranks - 1 - rank):
        first, last = c * chunk, (c + 1) * chunk
        for (before, _), (start, stop), prompt in zip([(0, 0), *documents], documents, prompts, strict=False):
            a, b = max(start, first), min(stop, last)
            if a < b:
                index += [at_T[before : before + prompt], at_T[start:b]]
                edges_q.append(edges_q[-1] + b - a)
                edges_k.append(edges_k[-1] + prompt + b - start)
    return Keys(torch.cat(index), edges_q, edges_k)


def to_predict(documents: Sequence[Sequence[int]]) -> MicroBatch:
    """Return a packed micro-batch that asks what follows each document; the labels mean nothing."""
    lengths = [len(d) for d in documents]
    edges = [0, *accumulate(lengths)]
    return MicroBatch(
        input_ids=torch.tensor([[t for d in documents for t in d]]),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=edges,
        attention_mask=None,
        index_N=torch.tensor(edges[1:]) - 1,
        labels_N=torch.zeros(len(documents), dtype=torch.int64),
        targets=Targets(bounds=list(range(len(documents) + 1))),
        num_tokens=edges[-1],
    )


def together(documents: Sequence[Sequence[int]], capacity: int = 8192) -> list[range]:
    """Return neighbouring documents that make a row of at most about so many tokens."""
    found, start, filled = [], 0, 0
    for i, document in enumerate(documents):
        if filled and filled + len(document) > capacity:
            found.append(range(start, i))
            start, filled = i, 0
        filled += len(document)
    return [*found, range(start, len(documents))]
