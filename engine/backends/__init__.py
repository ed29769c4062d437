"""Backends: what computes a step. Nothing heavy is imported until one is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config.schema import RunConfig
from engine.types import Backend

if TYPE_CHECKING:
    from engine.ranks import Ranks


def build(config: RunConfig, ranks: Ranks) -> Backend:
    """Return the backend that ``backend.name`` chooses, its model spread over the ranks."""
    from engine.backends.torch_backend import TorchBackend

    return TorchBackend(config, ranks)
