"""Backends: what computes a step. Nothing heavy is imported until one is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config.schema import RunConfig
from engine.types import Backend

if TYPE_CHECKING:
    from engine.ranks import Ranks


def check(config: RunConfig) -> None:
    """Refuse, before any data is read, what the names of the model's layers alone can tell: adapters that it cannot have.

    Raises:
        UserError: For ``model.lora.target_modules`` that do not fit the model, or a model that cannot be built.
    """
    if config.model.lora.enabled:
        import torch

        from engine.backends import hf_model, lora

        lora.inject(config.model, hf_model.skeleton(config.model, attention="eager"), torch.float32)


def build(config: RunConfig, ranks: Ranks) -> Backend:
    """Return the backend that ``backend.name`` chooses, its model spread over the ranks."""
    from engine.backends.torch_backend import TorchBackend

    return TorchBackend(config, ranks)
