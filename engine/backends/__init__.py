"""Backends: what computes a step. Nothing heavy is imported until one is built."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engine.config.schema import RunConfig
from engine.types import Backend, Sample, Scorer

if TYPE_CHECKING:
    from engine.ranks import Ranks


def check(config: RunConfig) -> None:
    """Refuse, before any data is read, what the model's layers and configuration alone can tell.

    Raises:
        UserError: For ``model.lora.target_modules`` that do not fit the model, a model that cannot be built, or what megatron-core
            cannot be told.
    """
    if config.backend.name == "megatron":
        _kind(config).check(config)
    if config.model.lora.enabled:
        import torch

        from engine.backends import hf_model, lora

        lora.inject(config.model, hf_model.skeleton(config.model, attention="eager"), torch.float32)


def build(config: RunConfig, ranks: Ranks) -> Backend:
    """Return the backend that ``backend.name`` chooses, its model spread over the ranks."""
    built: Backend = _kind(config)(config, ranks)
    return built


def _kind(config: RunConfig) -> Any:
    """Return the class that ``backend.name`` chooses."""
    if config.backend.name == "megatron":
        from engine.backends.megatron import shim

        shim.install()  # before its own modules are imported
        from engine.backends.megatron.backend import MegatronBackend

        return MegatronBackend
    from engine.backends.torch_backend import TorchBackend

    return TorchBackend


@contextmanager
def scorer(config: RunConfig, ranks: Ranks, probed: Sequence[Sample] = ()) -> Iterator[Callable[[], Scorer]]:
    """Offer a model without optimizer or master weights; it is built when it is first asked for, and its memory is free after.

    Args:
        config: The recipe.
        ranks: Its model is spread over them.
        probed: Documents that it has to prove itself on.
    """
    built: list[Scorer] = []

    def model() -> Scorer:
        if not built:
            built.append(_kind(config)(config, ranks, train=False))
            if probed:
                built[0].probe(probed)
        return built[0]

    try:
        yield model
    finally:
        built.clear()
        gc.collect()  # modules refer to each other
        if ranks.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
