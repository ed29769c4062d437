"""megatron-core's distributed optimizer with torch's fused AdamW: float32 masters and moments, spread over the data-parallel ranks.

Clipping, skipping of steps that are not finite, and the state behind checkpoints are alike in form to the torch backend's, and
nothing waits for the device.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import optimizer as core
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from engine.config.schema import OptimizerSection

STATE = ("model", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: its master, and the moments of its gradient."""


class Optimizer:
    """The optimizer of this rank's model chunks.

    Args:
        chunks: The model, wrapped.
        section: The recipe's optimizer.
        dtype: Of the parameters.
        overlap: Whether parameters are gathered while the next step computes.
    """

    def __init__(
        self, chunks: list[DistributedDataParallel], section: OptimizerSection, dtype: torch.dtype, *, overlap: bool
    ) -> None:
        config = core.OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.betas[0],
            adam_beta2=section.betas[1],
            adam_eps=section.eps,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap,
        )
        with mock.patch.object(core, "USING_PYTORCH_OPTIMIZER", True):  # the same one whatever else is installed
            self.chained = core.get_megatron_optimizer(config, chunks)
        self.parts: list[Any] = self.chained.chained_optimizers
        self.device = next(chunks[0].parameters()).device
        self.applied = torch.zeros(1, device=self.device)  # steps
        for part in self.parts:
            part.optimizer.defaults["fused"] = True
            for group in part.optimizer.param_groups:
                decay = section.weight_decay * group["wd_mult"]  # none of norms and biases
                group |= {"fused": True, "foreach": None, "weight_decay": decay}
                for p in group[
                    "params"
                ]:  # from the start, so that a checkpoint before the first step is one like the others
                    moments = {key: torch.zeros_like(p) for key in STATE[1:]}
                    part.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def norm(self) -> Tensor:
        """Make the gradients ready, and return their global L2 norm."""
        self.chained.prepare_grads()
        grads = [grad for part in self.parts for grad in part.get_main_grads_for_grad_norm()]
        squared = nn.utils.get_total_norm(grads).square() if grads else torch.zeros((), device=self.device)
        dist.all_reduce(squared)  # each element of a gradient is on one rank
        return squared.sqrt()

    def step(self, norm: Tensor, max_norm: float, failed: Tensor, lr: float) -> None:
        """Clip and apply the gradients, or change nothing.

        Args:
            norm: Of the gradients.
            max_norm: They are clipped to.
            failed: Whether the step is to change nothing; scalar on the device.
            lr: Learning rate.
        """
        for part in self.parts:
            parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            for group in part.optimizer.param_groups:
                group["lr"] = lr
            part.optimizer.found_inf = failed.float()
        self.chained.step_with_ready_grads()
        self.applied += ~failed

    def zero(self) -> None:
        """Drop the gradients."""
        self.chained.zero_grad()

    def resume(self, steps: Tensor) -> None:
        """Continue after so many steps, float32 [1]."""
        self.applied.copy_(steps)
        for part in self.parts:
            for state in part.optimizer.state.values():
                state["step"].copy_(steps[0])

    def owners(self, parameter: nn.Parameter) -> Any:
        """Return the process group whose ranks share the state of a parameter."""
        return self._part(parameter).data_parallel_group

    def share(self, parameter: nn.Parameter) -> tuple[slice, dict[str, Tensor]] | None:
        """Return which elements of a parameter this rank keeps the state of, and the state by kind; None: of none."""
        part = self._part(parameter)
        if parameter not in part.model_param_group_index_map:
            return None
        span = part._get_model_param_range_map(parameter)["param"]
        group, index = part.model_param_group_index_map[parameter]
        master = part.optimizer.param_groups[group]["params"][index]
        moments = part.optimizer.state[master]
        return slice(span.start, span.end), {"model": master.detach(), **{key: moments[key] for key in STATE[1:]}}

    def _part(self, parameter: nn.Parameter) -> Any:
        dense = getattr(parameter, "allreduce", True)
        return self.parts[0 if dense else -1]
