"""What is made of hidden states on the last pipeline stage: loss, log-probabilities, the next token.

Each is given the hidden states of this rank's tokens, and its rows of the output matrix. Under context parallelism an objective of
single tokens is a sum over ranks; one of sequences is computed on every rank alike, from the log-probabilities of all.

Legend: L tokens of this rank, N trained tokens of the row, O of this rank, S sequences, H hidden size, V vocabulary of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from engine.backends.common import by_chunk
from engine.backends.megatron.rows import Row
from engine.types import Objective
from kernels import linear_objective, reference
from kernels.output_layer import LogitOptions, Shard


class Head(NamedTuple):
    """The output layer, whose vocabulary the tensor-parallel ranks share."""

    options: LogitOptions
    vocabulary: int
    """Tokens of the model."""
    workspace_mb: float

    def loss(
        self, hidden_LH: Tensor, weight_VH: Tensor, row: Row, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's loss sum and sums to report; a rank that computes what another one does reports zero.

        The first is what is differentiated; over all ranks that share the row its gradients add up to those of the whole.
        """
        hidden_OH = hidden_LH.index_select(0, row.index_O)
        if objective.sequences_per_group and row.own_O is not None:
            return objective.loss(self._everywhere(self._logprobs(hidden_OH, weight_VH, row), row), row.targets)
        chunk, group_bounds = by_chunk(objective, row.own)
        return linear_objective.linear_objective(
            hidden_OH, labels_N=row.labels_O, objective=chunk, group_bounds=group_bounds, **self._layer(weight_VH)
        )

    def logprobs(self, hidden_LH: Tensor, weight_VH: Tensor, row: Row) -> Tensor:
        """Return the log-probabilities of all trained tokens of the row, [N]."""
        return self._everywhere(self._logprobs(hidden_LH.index_select(0, row.index_O), weight_VH, row), row)

    def sequence_logprobs(self, hidden_LH: Tensor, weight_VH: Tensor, row: Row) -> Tensor:
        """Return the log-probability of each sequence, summed over its trained tokens, weighted, [S]."""
        logprobs_N, weights_N = self.logprobs(hidden_LH, weight_VH, row), row.targets.weights_N
        return reference.sums_by_group(logprobs_N if weights_N is None else logprobs_N * weights_N, row.targets.bounds)

    def own_logprobs(self, hidden_LH: Tensor, weight_VH: Tensor, row: Row) -> Tensor:
        """Return the log-probabilities of all trained tokens by logits written out, [N]."""
        logits_OV = self._logits(hidden_LH.index_select(0, row.index_O), weight_VH).float()
        return self._everywhere(logits_OV.log_softmax(-1).gather(1, row.labels_O[:, None])[:, 0], row)

    def best(self, hidden_LH: Tensor, weight_VH: Tensor, row: Row) -> Tensor:
        """Return the likeliest token at each of the row's places to be predicted from, int64 [N]."""
        return self._everywhere(self._logits(hidden_LH.index_select(0, row.index_O), weight_VH).argmax(-1), row)

    def _logprobs(self, hidden_OH: Tensor, weight_VH: Tensor, row: Row) -> Tensor:
        return linear_objective.linear_logprobs(hidden_OH, labels_N=row.labels_O, **self._layer(weight_VH))

    def _layer(self, weight_VH: Tensor) -> dict[str, Any]:
        group = parallel_state.get_tensor_model_parallel_group()
        start = group.rank() * len(weight_VH)
        shard = None if group.size() == 1 else Shard(group=group, start=start, vocabulary=self.vocabulary)
        real = weight_VH[: max(0, min(len(weight_VH), self.vocabulary - start))]  # the last rows may be nobody's
        return {"weight_VH": real, "options": self.options, "workspace_mb": self.workspace_mb, "shard": shard}

    def _logits(self, hidden_OH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return all logits, [O, whole vocabulary]."""
        logits_OV = hidden_OH @ weight_VH.t()
        gathered: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(logits_OV)
        return gathered[:, : self.vocabulary]

    def _everywhere(self, found_O: Tensor, row: Row) -> Tensor:
        """Return the values of all ranks that share the row, [N]; their gradient is that of this rank's alone."""
        if row.own_O is None:
            return found_O
        whole_N = found_O.new_zeros(len(row.labels_N)).index_copy(0, row.own_O, found_O)
        group = parallel_state.get_context_parallel_group()
        if not whole_N.is_floating_point():
            dist.all_reduce(whole_N, group=group)
            return whole_N
        summed: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(whole_N, group=group)
        return summed


def counted_here(row: Row, objective: Objective) -> bool:
    """Tell whether this rank's loss counts: not where each rank computes that of all, but for the first."""
    return not objective.sequences_per_group or parallel_state.get_context_parallel_rank() == 0


def zero_like(loss: Tensor, sums: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same with nothing in it."""
    return torch.zeros_like(loss), {name: torch.zeros_like(x) for name, x in sums.items()}
