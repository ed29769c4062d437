"""What the backends do alike: the probe's documents and verdict, the objective by chunks, utilisation, limits of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine import flops
from engine.backends import hf_model
from engine.config.schema import RunConfig
from engine.errors import UserError
from engine.types import Objective, Sample, Targets
from kernels.linear_objective import ObjectiveFn

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
WORKSPACE_MB = {"cpu": 64, "cuda": 512}
"""MiB of logits that exist at once, of the compute type: on CPUs few enough to stay near the caches, and rows enough for each
pass over the gradient of a large output matrix."""
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest difference in a log-probability that rounding explains; what a wrong mask or scale does is far above."""


def by_chunk(objective: Objective, targets: Targets) -> tuple[ObjectiveFn, Sequence[int] | None]:
    """Return an objective as ``linear_objective`` calls it, a chunk of whole groups at a time, and the edges of its groups.

    Args:
        objective: Of log-probabilities.
        targets: Of all tokens that it is going to be called with.
    """
    size = objective.sequences_per_group

    def chunk(logprobs_C: Tensor, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
        part = targets.sequences(start * size, stop * size) if size else targets.tokens(start, stop)
        return objective.loss(logprobs_C, part)

    return chunk, targets.bounds[::size] if size else None


def accumulate(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add named scalars to those of before."""
    for name, value in found.items():
        sums[name] = sums[name] + value if name in sums else value


def probed_documents(samples: Sequence[Sample]) -> list[Sample]:
    """Return beginnings of documents, all trained, the first followed by one that shares half of it and goes on otherwise."""
    documents: list[NDArray[np.int32]] = [s.input_ids[:128] for s in samples]
    whole = [Sample(d, np.array([[0, len(d)]], np.int32)) for d in documents]
    first, half = documents[0], len(documents[0]) // 2
    fork = np.concatenate([first[:half], first[half:][::-1]])
    return [whole[0], Sample(fork, np.array([[half, len(fork)]], np.int32), shared=half), *whole[1:]]


def check_gap(ours_N: Tensor, own_N: Tensor, dtype: torch.dtype, lm: Any, path: str, hint: str) -> None:
    """Hold log-probabilities as they are trained against those by the model's own logits.

    Args:
        ours_N: Packed and fused.
        own_N: One document at a time, by logits.
        dtype: Compute type.
        lm: The model, for its name.
        path: ``model.path``.
        hint: What to do about a difference.

    Raises:
        UserError: If they differ by more than rounding.
    """
    gap = float((ours_N - own_N).abs().max())
    if not gap <= PROBE_TOLERANCE[dtype]:
        raise UserError(
            f"model.path={path}: packed, fused log-probabilities differ from the model's own logits by up to {gap:.3g} "
            f"({type(lm).__name__} makes its logits or attends in its own way), so its loss would be wrong; {hint}."
        )


def check_model(lm: Any, config: RunConfig) -> None:
    """Refuse a model that has no output layer, or reads less than the recipe's samples.

    Raises:
        UserError: Naming the key.
    """
    path = config.model.path
    if lm.get_output_embeddings() is None:
        raise UserError(f"model.path={path}: {type(lm).__name__} has no output layer; choose a language model.")
    longest = getattr(lm.config, "max_position_embeddings", None)
    if longest is not None and config.data.max_length > longest:
        raise UserError(f"data.max_length={config.data.max_length}: {path} reads at most {longest} tokens; lower it.")


class Utilization:
    """What share of the devices' peak a step has used; a backend's ``utilization`` is one of these.

    Args:
        lm: The transformers model, or its skeleton.
        device: A rank's.
        dtype: Compute type.
        ranks: Devices of the run.
    """

    def __init__(self, lm: Any, device: torch.device, dtype: torch.dtype, ranks: int) -> None:
        self.lm, self.device, self.dtype, self.ranks = lm, device, dtype, ranks

    def __call__(self, *, tokens: float, trained_tokens: float, squared_lengths: float, seconds: float) -> float | None:
        """Return the utilisation (``flops.train_flops``); None without a known peak; see ``types.Backend.utilization``."""
        if self._peak is None:
            return None
        needed = flops.train_flops(
            num_tokens=int(tokens),
            num_trained_tokens=int(trained_tokens),
            squared_lengths=int(squared_lengths),
            **self._model,
        )
        return needed / (seconds * self.ranks * self._peak)

    @cached_property
    def _peak(self) -> float | None:
        """Peak of a rank's device, FLOP/s; none for mixtures of experts, of which a token does not pass all."""
        if any(getattr(self.lm.config, name, None) for name in EXPERTS):
            return None
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return flops.peak_flops(name, str(self.dtype))

    @cached_property
    def _model(self) -> dict[str, Any]:
        config = self.lm.config
        layers = nn.ModuleList(hf_model.layers(self.lm))
        return {
            "layer_params": sum(p.numel() for p in layers.parameters() if p.requires_grad),
            "frozen_layer_params": sum(p.numel() for p in layers.parameters() if not p.requires_grad),
            "frozen_output": not self.lm.get_output_embeddings().weight.requires_grad,
            "num_layers": len(layers),
            "num_heads": config.num_attention_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
        }
