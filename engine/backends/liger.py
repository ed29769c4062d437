"""Liger's kernels (Hsu et al., 2024, arXiv:2410.10989) for RMSNorm, RoPE and the gated MLP, in one model, in and out again.

They are put in by liger-kernel's own way for a model that exists: RMSNorm and MLP keep their weights and get another forward. RoPE
is a function that layers look up in their module, so there it is exchanged for all models of the type. The classes, which
liger-kernel exchanges for models to come, are put back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from engine.errors import UserError
from kernels.dispatch import works

ACTIVATIONS = {
    "gemma": "gelu_pytorch_tanh",
    "gemma2": "gelu_pytorch_tanh",
    "gemma3_text": "gelu_pytorch_tanh",
    "granite": "silu",
    "llama": "silu",
    "ministral": "silu",
    "mistral": "silu",
    "olmo2": "silu",
    "olmo3": "silu",
    "phi3": "silu",
    "qwen2": "silu",
    "qwen3": "silu",
    "smollm3": "silu",
}
"""Types of models whose values and gradients with Liger's kernels are tested against their own; the activation that these have."""
PARTS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
REST = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Which would exchange the forward of the whole model; the loss is ours."""

_plain: dict[ModuleType, dict[str, Callable[..., Any]]] = {}
"""Functions of a model's module as they were before Liger's."""


class Liger:
    """Liger's kernels in a model: they serve from the beginning.

    Args:
        lm: A transformers model of one of the types in ``ACTIVATIONS``, whole or on the meta device, with LoRA or without, neither
            sharded nor compiled yet.
    """

    def __init__(self, lm: Any) -> None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        self.modeling = sys.modules[type(lm).__module__]
        names = vars(self.modeling)
        names.update(_plain.get(self.modeling, {}))  # where a model of this type has them already
        own = dict(names)
        _apply_liger_kernel_to_instance(model=lm, **PARTS, **REST)
        exchanged = {name: x for name, x in names.items() if name in own and x is not own[name]}
        names.update(own)
        self.functions = {name: x for name, x in exchanged.items() if not isinstance(own[name], type)}
        _plain.setdefault(self.modeling, {name: own[name] for name in self.functions})
        self.forwards: dict[nn.Module, Any] = {
            m: m.__dict__["forward"] for m in lm.modules() if "forward" in m.__dict__
        }
        names.update(self.functions)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute by the model's own code for a while."""
        vars(self.modeling).update(_plain[self.modeling])
        for module in self.forwards:
            del module.__dict__["forward"]
        try:
            yield
        finally:
            vars(self.modeling).update(self.functions)
            for module, forward in self.forwards.items():
                module.__dict__["forward"] = forward


def why_not(choice: Literal["auto", True, False], device: torch.device, config: Any) -> str | None:
    """Return why Liger's kernels are not to be put into a model; None if they are.

    Args:
        choice: ``model.liger``.
        device: Where the model will be.
        config: Its transformers configuration.

    Raises:
        UserError: If they are asked for and cannot serve.
    """
    reason = "model.liger=false" if choice is False else _obstacle(device, config)
    if choice is True and reason is not None:
        raise UserError(f"model.liger=true: {reason}; set model.liger=auto, which then goes without.")
    return reason


def _obstacle(device: torch.device, config: Any) -> str | None:
    if device.type != "cuda":
        return "Liger's kernels need CUDA"
    if config.model_type not in ACTIVATIONS:
        return f"Liger's kernels are not known to be right for {config.model_type} ({', '.join(ACTIVATIONS)} are)"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != ACTIVATIONS[config.model_type]:
        return f"Liger's kernel of {config.model_type} computes {ACTIVATIONS[config.model_type]}, and this one has {activation}"
    if not works(device):
        return "Triton does not work here"
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError as error:
        return f"liger-kernel cannot be imported ({' '.join(str(error).split())[:200]})"
    return None
