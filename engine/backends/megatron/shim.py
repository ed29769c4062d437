"""megatron-core without CUDA: the few names through which its modules reach for a GPU lead to the CPU instead.

Nothing of torch itself changes, but for ``Tensor.type`` as megatron-core's optimizer sees it. With CUDA nothing is done at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import types
import warnings
from typing import Any

import torch

from engine.config.megatron import VERSION, check_installed
from engine.errors import UserError

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "zeros_like", "empty_like", "arange")
MODULES = (
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "tensor_parallel.random",
    "utils",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "transformer.moe.token_dispatcher",
    "transformer.moe.moe_utils",
    "transformer.moe.experts",
    "transformer.moe.router",
)
"""Those that name CUDA on the way of a training step."""


@functools.cache
def install() -> None:
    """Make megatron-core work on this machine, once; only where there is no CUDA anything changes.

    Raises:
        UserError: For a version that is not known.
    """
    problems = check_installed()
    if problems:
        raise UserError(*problems)
    warnings.filterwarnings("ignore", module=r"megatron\.")  # of vendors' kernels that are not installed, above all
    warnings.filterwarnings("ignore", "`torch.distributed", category=FutureWarning)  # of names that it calls
    importlib.import_module("megatron.core.optimizer")
    importlib.import_module("megatron.core.models.gpt")
    routing: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(routing, "te_general_gemm"):  # it asks for the name where Transformer Engine is not installed too
        routing.te_general_gemm = None
    if torch.cuda.is_available():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # kernels start in the order they are queued in
        return
    proxy = _torch_without_cuda()
    for name in MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        if getattr(module, "torch", None) is not torch:
            raise UserError(f"backend=megatron: megatron.core.{name} is not as in {VERSION}; install that version.")
        setattr(module, "torch", proxy)  # noqa: B010
    _random_state_of_cpu()
    _split_sizes_of_cpu()
    torch.Tensor.type = _type_for_optimizer(torch.Tensor.type)  # type: ignore[method-assign]


class Order:
    """The one stream of a CPU, where everything is in order, and an event on it."""

    def wait_stream(self, other: Order) -> None:
        """Do nothing: what it is to wait for is done."""

    def record_event(self) -> Order:
        """Return what is waited for."""
        return self

    def synchronize(self) -> None:
        """Do nothing."""


def _torch_without_cuda() -> types.ModuleType:
    """Return a module that is torch, but whose current device is the CPU and whose factories make CPU tensors of CUDA ones."""

    class Cuda(types.ModuleType):
        current_device = staticmethod(lambda: CPU)
        Stream = current_stream = Order
        stream = staticmethod(contextlib.nullcontext)
        synchronize = staticmethod(lambda *args: None)
        empty_cache = staticmethod(lambda: None)
        get_rng_state = staticmethod(lambda *args: torch.get_rng_state())
        manual_seed = staticmethod(torch.default_generator.manual_seed)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cuda, name)

    class Torch(types.ModuleType):
        cuda = Cuda("torch.cuda")

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    proxy = Torch("torch")
    for name in FACTORIES:
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    return proxy


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def made(*args: Any, **options: Any) -> Any:
        device = options.get("device")
        if device is not None and torch.device(device).type == "cuda":
            options["device"] = CPU
        return factory(*args, **options)

    return made


def _random_state_of_cpu() -> None:
    """Let the random streams that tensor-parallel ranks share and keep apart be the CPU's."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **options: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **options: torch.set_rng_state(state)
    logging.getLogger(random.__name__).setLevel(logging.ERROR)  # that the CPU's state has changed: it is meant to


def _split_sizes_of_cpu() -> None:
    """Let numbers that are to be brought to the CPU be arrays, as tokens are sent to experts by, where they are there already."""
    from megatron.core.transformer.moe import token_dispatcher

    def brought(found: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return found.numpy() if as_numpy and torch.is_tensor(found) else found

    token_dispatcher.maybe_move_tensor_to_cpu = brought


def _type_for_optimizer(plain: Any) -> Any:
    """Return ``Tensor.type`` that names CPU tensors as CUDA's where megatron-core's optimizer asks, which knows no others."""

    def of(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = plain(self, *args, **options)
        if args or options or self.device.type != "cpu":
            return found
        asks = sys._getframe(1).f_globals.get("__name__", "")
        return found.replace("torch.", "torch.cuda.", 1) if asks.startswith("megatron.core.optimizer.") else found

    return of
