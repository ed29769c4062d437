"""The seams: what the loop, objectives, backends and callbacks agree on.

Shape suffixes: T tokens of a micro-batch, N trained tokens, S sequences of a micro-batch (documents; two a pair in DPO).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from engine.config.schema import RunConfig


class Sample(NamedTuple):
    """A tokenised document: a conversation, or one turn of it behind what comes before."""

    input_ids: NDArray[np.int32]
    """Token ids [T]."""
    trained: NDArray[np.int32]
    """Ranges of trained tokens, [start, stop) pairs in order, [R, 2]."""
    weights: NDArray[np.float32] | None = None
    """Loss weight of each range [R]; None: all one."""
    shared: int = 0
    """Leading tokens, none of them trained, that are those of the document before it: the prompt of a pair's second answer."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The trained tokens of some whole sequences: all that an objective sees beside their log-probabilities."""

    bounds: Sequence[int]
    """Sequence s owns the tokens bounds[s]:bounds[s + 1] of N; length S + 1."""
    weights_N: torch.Tensor | None = None
    """Loss weight of each token, float32; None: all one."""
    reference_S: torch.Tensor | None = None
    """The reference's log-probability of each sequence, summed over its tokens, float32 [S]; None: there is no reference."""

    @property
    def num_tokens(self) -> int:
        """Number of trained tokens, N."""
        return self.bounds[-1] - self.bounds[0]

    def tokens(self, start: int, stop: int) -> Targets:
        """Return the tokens start:stop of N, their sequences forgotten."""
        return replace(self, bounds=[0, stop - start], weights_N=self._weights(start, stop), reference_S=None)

    def sequences(self, start: int, stop: int) -> Targets:
        """Return the sequences start:stop of S."""
        bounds = self.bounds[start : stop + 1]
        weights = self._weights(bounds[0], bounds[-1])
        reference = None if self.reference_S is None else self.reference_S[start:stop]
        return replace(self, bounds=[b - bounds[0] for b in bounds], weights_N=weights, reference_S=reference)

    def _weights(self, start: int, stop: int) -> torch.Tensor | None:
        return None if self.weights_N is None else self.weights_N[start:stop]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples that go through the model together, packed into one row or padded into several."""

    input_ids: torch.Tensor
    """Token ids, int64: [1, T] packed, [S, longest] padded."""
    position_ids: torch.Tensor
    """Position of each token in its own document, shaped like input_ids."""
    cu_seqlens: Sequence[int] | None
    """Packed: document d has tokens cu_seqlens[d]:cu_seqlens[d + 1] of T to itself. None: padded."""
    shared: Sequence[int] | None = None
    """Packed: leading tokens of each document that stand in the document before it alone; None: no document shares any."""
    attention_mask: torch.Tensor | None
    """Padded: 1 where a token is real, shaped like input_ids. None: packed."""
    index_N: torch.Tensor
    """Flat position in input_ids from which each trained token is predicted, int64."""
    labels_N: torch.Tensor
    """The trained tokens, int64."""
    targets: Targets
    """Their grouping into sequences, and weights."""
    num_tokens: int
    """Tokens that go through the model and are not padding."""

    def squared_lengths(self) -> int:
        """Return the squared length of every document, summed: twice the pairs of tokens of which one sees the other."""
        if self.cu_seqlens is None:
            assert self.attention_mask is not None
            return int(self.attention_mask.sum(1).square().sum())
        own = [b - a for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]
        return sum(n * n + 2 * n * before for n, before in zip(own, self.shared or [0] * len(own), strict=True))

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch with its tensors on ``device``."""

        def move(x: torch.Tensor | None) -> Any:
            return None if x is None else x.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            attention_mask=move(self.attention_mask),
            index_N=move(self.index_N),
            labels_N=move(self.labels_N),
            targets=replace(
                self.targets, weights_N=move(self.targets.weights_N), reference_S=move(self.targets.reference_S)
            ),
        )


class Objective(Protocol):
    """A loss as a function of the log-probabilities of the trained tokens."""

    sequences_per_group: int
    """Sequences that must be seen together: 0 for none (any run of tokens), 2 for a pair."""
    needs_reference: bool
    """Whether it looks at ``Targets.reference_S``."""
    count_metric: str | None
    """Name of the metric that shows the units of a step; None: none."""

    def units(self, targets: Targets) -> float:
        """Return this micro-batch's share of the count that normalises the loss of a global batch."""
        ...

    def loss(self, logprobs_N: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sum of the loss over whole groups and sums to report beside it.

        Args:
            logprobs_N: Log-probabilities of the targets, float32 [N].
            targets: The targets they belong to.

        Returns:
            A scalar sum, never a mean, and named scalar sums; the backend divides both by the global batch's units.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What a step or an evaluation measured, on the device until it is read."""

    loss: torch.Tensor
    """Loss of the global batch: the sum over micro-batches divided by its units; float32 scalar."""
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The objective's other metrics, divided by the units."""
    units: float = 0.0
    """What the loss of an evaluation was divided by."""
    grad_norm: torch.Tensor | None = None
    """Global L2 norm of the gradient before clipping; float32 scalar."""
    skipped: torch.Tensor | None = None
    """Number of steps in a row, this one included, that were not applied because loss or norm was not finite."""


class Scorer(Protocol):
    """A model that says how likely documents are: all that a reference is asked for."""

    device: torch.device
    dtype: torch.dtype
    """Of the forward pass."""

    def sequence_logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """Return the log-probability of each document's trained tokens, summed, without gradients; float32 [S].

        All ranks call equally often, where need be with an empty micro-batch.
        """
        ...

    def score(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Return the same for each of several micro-batches, of which all ranks have equally many."""
        ...

    def probe(self, samples: Sequence[Sample]) -> None:
        """Check on this model that packing and the fused loss equal its own logits.

        Raises:
            UserError: If they differ by more than rounding.
        """
        ...


class Backend(Scorer, Protocol):
    """Owns the model and the optimizer; knows nothing of data sources, schedules or files of a run."""

    @property
    def kernels(self) -> str | None:
        """Which kernels were chosen for the device, in words; None where there is no choice."""
        ...

    def train_step(
        self, micro_batches: Sequence[MicroBatch], objective: Objective, global_units: float, lr: float
    ) -> StepMetrics:
        """Do forward, backward, clipping and update for one global batch, of which this rank has some micro-batches."""
        ...

    def evaluate(self, micro_batches: Iterable[MicroBatch], objective: Objective) -> StepMetrics:
        """Compute the loss over all ranks' micro-batches, normalised by their units, without gradients."""
        ...

    def snapshot(self, *, copy: bool) -> Callable[[Path], Sequence[Path]]:
        """Return what writes this rank's part of model, optimizer and random state to a folder, once, and names its files.

        Args:
            copy: Copy the state first, so that the writing may go on in another thread while training changes it.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read what a snapshot wrote, on any number of ranks."""
        ...

    def utilization(
        self, *, tokens: float, trained_tokens: float, squared_lengths: float, seconds: float
    ) -> float | None:
        """Return the model FLOPs utilisation of a step over all devices; None where a device's peak is not known.

        Args:
            tokens: Of the step, padding not counted.
            trained_tokens: Those of them that carry loss.
            squared_lengths: The squared length of every document, summed.
            seconds: That the step took.
        """
        ...

    def checkpoint_bytes(self) -> int:
        """Return the size of one checkpoint in bytes, all ranks' parts together."""
        ...

    def export(self, folder: Path | None) -> None:
        """Write the weights and configuration as transformers loads them, LoRA's adapters merged.

        All ranks call, those that do not write with None.
        """
        ...

    def export_adapter(self, folder: Path | None) -> None:
        """Write LoRA's adapters as peft loads them; all ranks call, as with ``export``."""
        ...

    def generate(self, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
        """Answer conversations (messages up to the assistant's turn) by greedy decoding; all ranks call with the same."""
        ...


@dataclass
class Control:
    """What callbacks may ask of the loop, and what they may see of it. What one rank asks, all ranks do."""

    config: RunConfig
    run_dir: Path
    backend: Backend
    rank: int = 0
    world_size: int = 1
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    should_save: bool = False
    """Ask for a checkpoint after this step."""
    should_evaluate: bool = False
    """Ask for a validation after this step."""
    should_stop: bool = False
    """Ask the run to end after this step, as if it were the last."""
    say: Callable[[str], None] = print
    """Write a line to the console and log.txt, once, whatever the number of ranks."""


class Callback:
    """Base class of callbacks: override what is needed; every method gets the control."""

    def on_train_begin(self, control: Control) -> None:
        """Before the first step (of this process)."""

    def on_train_end(self, control: Control) -> None:
        """After the last step, once the final weights are written."""

    def on_epoch_begin(self, control: Control) -> None:
        """Before the first step of an epoch."""

    def on_epoch_end(self, control: Control) -> None:
        """After the last step of an epoch."""

    def on_step_begin(self, control: Control) -> None:
        """Before a step."""

    def on_step_end(self, control: Control) -> None:
        """After a step; may set the control's requests."""

    def on_evaluate(self, control: Control, metrics: Mapping[str, float]) -> None:
        """After a validation."""

    def on_save(self, control: Control, checkpoint: Path) -> None:
        """After a checkpoint is in place."""

    def on_log(self, control: Control, metrics: dict[str, float]) -> None:
        """Before a line of metrics is written; may add to it."""

    def close(self) -> None:
        """Once training is over, however it ended."""


class Executor(Protocol):
    """Runs the whole SPMD program of a rank wherever the ranks are."""

    def run(self, config: RunConfig, recipe: str) -> int:
        """Run every rank's ``worker.main`` and return the run's exit code."""
        ...
