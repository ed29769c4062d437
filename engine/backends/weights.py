"""The weights that the optimizer updates: float32, as plain tensors of this rank, whole or one shard of them.

What requires no gradient, the base under LoRA's adapters, stays as it is and has no other copy. Both classes offer the same face.
``Replicated`` holds all weights on every rank; ``Sharded`` spreads them by FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import _from_local_no_grad
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from engine.backends.lora import plain
from engine.config.schema import TorchSection
from engine.ranks import Ranks

P = TypeVar("P", bound=Tensor)


class Replicated:
    """A whole copy on every rank: the parameters themselves, or float32 masters of bfloat16 parameters that are trained.

    Gradients add up over micro-batches in float32 and over ranks once a step.

    Args:
        root: The model; parameters that are trained are float32.
        dtype: Compute type.
        ranks: Every one has a copy.
    """

    def __init__(self, root: nn.Module, dtype: torch.dtype, ranks: Ranks) -> None:
        self.parameters = _named_parameters(root)
        self.compute = _trained(self.parameters)
        self.master: dict[str, Tensor] = self.compute
        self.ranks = ranks
        if dtype == torch.float32:
            return
        self.master = {name: nn.Parameter(p.detach().clone()) for name, p in self.compute.items() if p.requires_grad}
        for p in self.parameters.values():
            p.data = p.data.to(dtype)
        for name in self.master:
            p = self.compute[name]
            p.register_post_accumulate_grad_hook(self._accumulator(self.master[name]))  # type: ignore[no-untyped-call]

    def reduce(self) -> None:
        """Make the gradients those of all ranks."""
        if self.ranks.size > 1:
            for p in self.master.values():  # every rank sums the same, used by its samples or not
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for work in [dist.all_reduce(g, async_op=True) for g in self.grads()]:
                work.wait()

    def grads(self) -> list[Tensor]:
        """Return this rank's gradients."""
        return [p.grad for p in self.master.values() if p.grad is not None]

    def norm(self) -> Tensor:
        """Return the global L2 norm of the gradients."""
        return nn.utils.get_total_norm(self.grads())

    def publish(self) -> None:
        """Copy the updated master weights to the model, and drop the gradients."""
        for p in self.master.values():
            p.grad = None
        if self.master is not self.compute:
            with torch.no_grad():
                torch._foreach_copy_([self.compute[name] for name in self.master], list(self.master.values()))

    def rest(self) -> None:
        """Give up what a pass without gradients has gathered: nothing."""

    def saved(self, name: str, local: Tensor) -> Tensor:
        """Return a tensor of the shape of a parameter's part as a checkpoint takes it: with its place in the whole."""
        return local.detach()

    def whole(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Return each parameter whole, by default those that are not trained too."""
        yield from ({**self.parameters, **self.master} if frozen else self.master).items()

    @staticmethod
    def _accumulator(master: Tensor) -> Any:
        def accumulate(p: Tensor) -> None:
            assert p.grad is not None
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        return accumulate


class Sharded:
    """Rows of every parameter on each of ``shard_size`` ranks (FSDP2), copies of that over the others (HSDP).

    Compute in the compute type; gradients are summed over ranks in float32 after every micro-batch.

    Args:
        root: The module whose forward owns all parameters, which may be on the meta device; it is sharded in place.
        layers: Its decoder layers, gathered one at a time.
        dtype: Compute type.
        section: Options of the recipe.
        ranks: All of them take part; ``layout.problems`` has seen that they can be split so.
    """

    def __init__(
        self, root: nn.Module, layers: list[nn.Module], dtype: torch.dtype, section: TorchSection, ranks: Ranks
    ) -> None:
        size = section.shard_size or ranks.size
        if size == ranks.size:
            mesh = init_device_mesh(ranks.device.type, (size,), mesh_dim_names=("shard",))
        else:
            shape = (ranks.size // size, size)
            mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
        self.group = mesh["shard"].get_group()
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
            ),
            "offload_policy": CPUOffloadPolicy() if section.cpu_offload else OffloadPolicy(),
        }
        for layer in layers:
            fully_shard(layer, reshard_after_forward=section.reshard_after_forward, **options)
        fully_shard(root, **options)
        self.modules = [m for m in root.modules() if isinstance(m, FSDPModule)]
        for module in self.modules:  # sums, never means: losses are divided by the global batch's units
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        device = torch.device("cpu") if section.cpu_offload else ranks.device
        root._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(ranks.device))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            root(lambda: None)  # FSDP gives every shard its final storage with the first forward
        self.rest()
        self.parameters: dict[str, DTensor] = _named_parameters(root)  # type: ignore[assignment]
        self.trained: dict[str, DTensor] = _trained(self.parameters)
        self.master: dict[str, Tensor] = {n: nn.Parameter(p.to_local().detach()) for n, p in self.trained.items()}

    def fill(self, name: str, source: Any) -> None:
        """Copy this rank's rows of a parameter from a whole tensor, or anything that is sliced like one."""
        p = self.parameters[name]
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        if shape[0]:
            p.to_local().detach().copy_(source[offset[0] : offset[0] + shape[0]])

    def reduce(self) -> None:
        """Take the gradients that the backward pass has reduced."""
        for name, p in self.trained.items():
            self.master[name].grad = None if p.grad is None else p.grad.to_local()  # type: ignore[attr-defined]

    def grads(self) -> list[Tensor]:
        """Return this rank's shards of the gradients."""
        return [p.grad for p in self.master.values() if p.grad is not None]

    def norm(self) -> Tensor:
        """Return the global L2 norm of the gradients."""
        squared = nn.utils.get_total_norm(self.grads()).square()
        dist.all_reduce(squared, group=self.group)
        return squared.sqrt()

    def publish(self) -> None:
        """Drop the gradients; the shards are the model's own."""
        for name, p in self.trained.items():
            self.master[name].grad = p.grad = None

    def rest(self) -> None:
        """Give up what a pass without gradients has gathered: it would not see the next change of the shards."""
        for module in self.modules:
            module.reshard()

    def saved(self, name: str, local: Tensor) -> Tensor:
        """Return a tensor of the shape of a parameter's shard as a checkpoint takes it: with its place in the whole."""
        spec = self.parameters[name]._spec
        return _from_local_no_grad(
            local.detach(), spec
        )  # DTensor.from_local would copy what is offloaded to the device

    def whole(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Return each parameter whole, by default those that are not trained too, gathered when its turn comes."""
        for name, p in (self.parameters if frozen else self.trained).items():
            yield name, p.full_tensor().detach()


def _named_parameters(root: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by the names that the model gives them without LoRA, tied ones once."""
    return {plain(name.removeprefix("lm.")): p for name, p in root.named_parameters()}


def _trained(parameters: dict[str, P]) -> dict[str, P]:
    """Return those of the parameters that the optimizer updates."""
    return {name: p for name, p in parameters.items() if p.requires_grad}
