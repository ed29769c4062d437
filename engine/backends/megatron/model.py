"""megatron-core's GPT model for a transformers configuration: its configuration, its layers, our attention, our output layer.

Positions are applied inside attention, by transformers' own rotary embedding and the position of each token, so that packed
documents, shared prompts and parts of a row need nothing of their own.

Legend: L tokens of this rank, T of the row, A query heads and K key/value heads of this rank, D head size, H hidden size.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from engine.backends.attention import PackedAttention
from engine.backends.megatron.experts import Experts
from engine.backends.megatron.families import FAMILIES, Family
from engine.backends.megatron.rows import Row
from engine.config.layout import Layout
from engine.config.layout import check_model as check_layout
from engine.config.schema import BackendSection, ModelSection
from engine.errors import UserError


@dataclasses.dataclass
class Packed(PackedSeqParams):  # type: ignore[misc]
    """What attention is told of a row, handed through megatron-core's layers."""

    row: Row | None = None
    cos_LD: Tensor | None = None
    """Rotary embedding of this rank's tokens."""
    sin_LD: Tensor | None = None


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019) whose weight is summed over tensor-parallel ranks where each sees a part."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **options: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normed states, shaped alike."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class CoreAttention(nn.Module):
    """Attention of this rank's tokens to the row's: rotary embedding, gathered keys and values, packed attention."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *args: Any, pg_collection: Any, **options: Any
    ) -> None:
        super().__init__()
        self.attend: PackedAttention = config.anneal_attention
        self.window: int | None = config.anneal_windows[layer_number - 1]
        self.dropout = config.attention_dropout
        self.context = pg_collection.cp

    def forward(
        self, q_LAD: Tensor, k_LKD: Tensor, v_LKD: Tensor, mask: None, *, packed_seq_params: Packed, **options: Any
    ) -> Tensor:
        """Return what each token reads, [L, A·D]."""
        row, cos_LD, sin_LD = packed_seq_params.row, packed_seq_params.cos_LD, packed_seq_params.sin_LD
        assert row is not None and cos_LD is not None and sin_LD is not None
        q_LAD, k_LKD = (_rotated(x, cos_LD, sin_LD) for x in (q_LAD, k_LKD))
        how: dict[str, Any] = {"scale": None, "window": self.window, "softcap": None}
        how["dropout"] = self.dropout if self.training else 0.0
        if row.keys is None:
            edges, how["shared"] = row.cu_seqlens, row.shared
            k, v = k_LKD, v_LKD
        else:
            gathered = (
                tensor_parallel.gather_from_sequence_parallel_region(x, group=self.context) for x in (k_LKD, v_LKD)
            )
            k, v = (x.index_select(0, row.keys.index_K) for x in gathered)
            edges, how["shared"], how["edges_k"] = row.keys.edges_q, None, row.keys.edges_k
        if not how["dropout"]:
            return self.attend(q_LAD, k, v, edges, **how).flatten(1)
        with tensor_parallel.get_cuda_rng_tracker().fork():  # ranks drop on heads of their own
            return self.attend(q_LAD, k, v, edges, **how).flatten(1)


class OutputLayer(nn.Module):
    """The output matrix of this rank; what is done with it is done in its forward pass, before which its gathering ends."""

    def __init__(self, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, work: Any, weight_VH: Tensor | None) -> Any:
        """Return ``work(matrix)``, with the given one where it is the embedding's."""
        return work(self.weight if weight_VH is None else weight_VH)


class Model(GPTModel):  # type: ignore[misc]
    """A rank's part of the model, from token ids to hidden states; the output layer waits for what is to be done with them."""

    def __init__(self, config: TransformerConfig, *args: Any, rotary: nn.Module, **options: Any) -> None:
        super().__init__(config, *args, **options)
        object.__setattr__(self, "rotary", rotary)  # no part of the model: it has no weights
        if self.post_process:
            self.output_layer: Any = OutputLayer(self.output_layer.weight)

    def forward(self, row: Row) -> Tensor:
        """Return the hidden states of this rank's tokens: [L, H] on the last stage, else as megatron-core hands them on."""
        cos_1LD, sin_1LD = self.rotary(
            torch.empty(0, dtype=self.config.params_dtype, device=row.input_ids.device), row.position_ids
        )
        packed = Packed(qkv_format="thd", row=row, cos_LD=cos_1LD[0], sin_LD=sin_1LD[0])
        found: Tensor = super().forward(row.input_ids, row.position_ids, None, packed_seq_params=packed)
        return found

    def _is_in_embd_group(self) -> bool:
        """Say that nothing is to be copied from the first stage to the last: each reads the embedding they share."""
        return False

    def _postprocess(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:  # the output layer's gradient is whole on every rank
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states.squeeze(1)

    def head(self, work: Any) -> Any:
        """Return ``work(matrix)`` with this rank's rows of the output matrix, padding included."""
        tied = self.share_embeddings_and_output_weights and self.pre_process
        return self.output_layer(work, self.shared_embedding_or_output_weight() if tied else None)


PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "router_jitter_noise": 0.0}
"""Fields of a transformers configuration that have one value here, where it has them."""


def family(model_type: str, path: str) -> Family:
    """Return the table of a type of models.

    Raises:
        UserError: If there is none.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model.path={path}: backend=megatron has no {model_type} models; choose one of {', '.join(FAMILIES)}, or "
            "backend=torch."
        )
    return FAMILIES[model_type]


def transformer_config(
    hf: Any, model: ModelSection, backend: BackendSection, dtype: torch.dtype, *, device: torch.device
) -> TransformerConfig:
    """Return megatron-core's configuration of a transformers one.

    Args:
        hf: The transformers configuration.
        model: The recipe's model.
        backend: Its parallelism.
        dtype: Compute type.
        device: Where the weights are to be.

    Raises:
        UserError: For what megatron-core cannot be told, or an unknown field in ``backend.transformer_config``.
    """
    for field, wanted in PLAIN.items():
        value = getattr(hf, field, wanted)
        if value != wanted:
            raise UserError(
                f"model.path={model.path}: {field}={value} is not for backend=megatron; choose backend=torch."
            )
    for problem in check_layout(Layout.of(backend, 1), hf.to_dict()):
        raise UserError(problem)
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    for name in backend.transformer_config or {}:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(
                f"backend.transformer_config.{name}: megatron-core has no such field"
                + (f"; did you mean {near[0]}?" if near else "; see its TransformerConfig.")
            )
    chunks = backend.virtual_pipeline
    fields: dict[str, Any] = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "ffn_hidden_size": hf.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": getattr(hf, "attention_dropout", 0.0),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": device.type == "cpu",
        "perform_initialization": False,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "calculate_per_token_loss": True,
        "batch_p2p_comm": False,
        "tensor_model_parallel_size": backend.tensor_parallel,
        "sequence_parallel": sequence_parallel(backend),
        "pipeline_model_parallel_size": backend.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": chunks,
        "context_parallel_size": backend.context_parallel,
        "expert_model_parallel_size": backend.expert_parallel,
        "expert_tensor_parallel_size": 1,
    }
    if model.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    table = family(hf.model_type, model.path)
    fields |= table.options | {name: read(hf) for name, read in table.read.items()}
    fields |= backend.transformer_config or {}
    try:
        return TransformerConfig(**fields)
    except (ValueError, AssertionError, TypeError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"backend: megatron-core refuses this layout ({words}); change it.") from error


def sequence_parallel(backend: BackendSection) -> bool:
    """Return whether what tensor parallelism leaves whole is spread over its ranks along the sequence."""
    wanted = backend.sequence_parallel
    return (backend.tensor_parallel or 1) > 1 if wanted is None else wanted


def windows(hf: Any) -> list[int | None]:
    """Return the sliding window of each layer's attention; None: it sees all before it."""
    window = getattr(hf, "sliding_window", None)
    if not window or getattr(hf, "use_sliding_window", True) is False:
        return [None] * hf.num_hidden_layers
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def build(hf: Any, config: TransformerConfig, attend: PackedAttention, rotary: nn.Module) -> list[Model]:
    """Return this rank's parts of the model, with weights that are still to be read.

    Args:
        hf: The transformers configuration.
        config: megatron-core's.
        attend: Packed attention.
        rotary: Transformers' rotary embedding of the model.
    """
    config.anneal_attention = attend
    config.anneal_windows = windows(hf)
    virtual = config.virtual_pipeline_model_parallel_size
    vocabulary = -(-hf.vocab_size // config.tensor_model_parallel_size) * config.tensor_model_parallel_size
    chunks = []
    for stage in range(virtual) if virtual else (None,):
        place: dict[str, Any] = {} if stage is None else {"vp_stage": stage, "ignore_virtual": False}
        chunks.append(
            Model(
                config,
                _layers(config, stage),
                vocab_size=vocabulary,
                max_sequence_length=hf.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(**place),
                post_process=parallel_state.is_pipeline_last_stage(**place),
                share_embeddings_and_output_weights=hf.tie_word_embeddings,
                position_embedding_type="none",
                vp_stage=stage,
                rotary=rotary,
            ).to(_device(config))  # megatron-core makes routers on the CPU
        )
    return chunks


def _layers(config: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    """Return what the layers of a stage are built of."""
    first = get_transformer_layer_offset(config, vp_stage=stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=stage))
    sparse = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [1] * config.num_layers
    specs = [_layer(config, config.num_moe_experts if sparse[i] else None) for i in numbers]
    return TransformerBlockSubmodules(specs, layer_norm=RMSNorm)


def _layer(config: TransformerConfig, experts: int | None) -> ModuleSpec:
    """Return what a layer is built of: megatron-core's own, with our norm, attention and experts, if it has any."""
    spec = get_gpt_layer_local_spec(experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if experts:
        spec.submodules.mlp.submodules.experts = Experts
    return spec


def _device(config: TransformerConfig) -> torch.device:
    """Return where weights are made."""
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


def _rotated(x_LAD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Turn pairs of features, one in each half, by the angle of their position (Su et al., 2021), as transformers does."""
    first, second = x_LAD.chunk(2, -1)
    return x_LAD * cos_LD[:, None] + torch.cat([-second, first], -1) * sin_LD[:, None]
