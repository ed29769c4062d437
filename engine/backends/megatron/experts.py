"""The experts of a layer that a rank has, as transformers keeps them: one matrix over another in one parameter.

Legend: E experts of this rank, T tokens that were sent to them, H hidden size, I hidden size of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Experts(nn.Module):
    """Gated MLPs (Shazeer, 2020), each for the tokens that the router has sent to it.

    Args:
        experts: How many this rank has.
        config: megatron-core's.
        options: What megatron-core tells its own experts beside that.
    """

    gate_up_proj: nn.Parameter
    """The gate's matrix above the one that it gates, [E, 2·I, H]."""
    down_proj: nn.Parameter
    """[E, H, I]."""

    def __init__(self, experts: int, config: TransformerConfig, **options: Any) -> None:
        super().__init__()
        assert config.moe_ffn_hidden_size is not None
        self.act: Any = config.activation_func
        width, inner = config.hidden_size, config.moe_ffn_hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        for name, shape in (("gate_up_proj", (2 * inner, width)), ("down_proj", (width, inner))):
            weight = nn.Parameter(torch.empty(experts, *shape, dtype=config.params_dtype, device=device))
            weight.allreduce = False  # type: ignore[attr-defined]  # summed over the ranks that have the same experts
            self.register_parameter(name, weight)

    def forward(self, hidden_TH: Tensor, tokens_E: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Return what the experts make of their tokens, weighted; [T, H].

        Args:
            hidden_TH: Tokens, those of each expert together.
            tokens_E: How many each has, int64 on the host.
            weights_T: The router's.
        """
        ends_E = tokens_E.cumsum(0).to(torch.int32).to(hidden_TH.device, non_blocking=True)
        gate_TI, up_TI = F.grouped_mm(hidden_TH, self.gate_up_proj.transpose(1, 2), offs=ends_E).chunk(2, -1)
        made_TH = F.grouped_mm(self.act(gate_TI) * up_TI, self.down_proj.transpose(1, 2), offs=ends_E)
        return (made_TH * weights_T[:, None]).to(hidden_TH.dtype), None
