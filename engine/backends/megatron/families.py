"""Families of models: which of megatron-core's parameters are which of transformers', and how they are laid out.

A family is a table. A ``Rule`` says of a parameter of megatron-core's how it is spread over the tensor-parallel ranks and which
parameters of transformers' it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal, NamedTuple

Kind = Literal["whole", "rows", "columns", "stacked", "qkv", "experts"]


class Rule(NamedTuple):
    """What a parameter of megatron-core's holds."""

    kind: Kind
    """whole: on every rank. rows, columns: a rank has some of them. stacked: some rows of each of several, one after the other.
    qkv: for each group of heads its queries, its key and its value; a rank has some groups. experts: an expert-parallel rank has
    some experts, whole."""
    names: tuple[str, ...]
    """In transformers; {i} is the layer."""


def _layer(attention: dict[str, Rule], mlp: dict[str, Rule]) -> dict[str, Rule]:
    """Return the rules of a decoder layer."""
    norms = {
        "input_layernorm.weight": Rule("whole", ("input_layernorm.weight",)),
        "pre_mlp_layernorm.weight": Rule("whole", ("post_attention_layernorm.weight",)),
    }
    return {**norms, **attention, **mlp}


def _qkv(what: str) -> Rule:
    return Rule("qkv", tuple(f"self_attn.{x}_proj.{what}" for x in "qkv"))


ATTENTION = {
    "self_attention.linear_qkv.weight": _qkv("weight"),
    "self_attention.linear_proj.weight": Rule("columns", ("self_attn.o_proj.weight",)),
}
BIASES = {"self_attention.linear_qkv.bias": _qkv("bias")}
NORMS = {f"self_attention.{x}_layernorm.weight": Rule("whole", (f"self_attn.{x}_norm.weight",)) for x in "qk"}
MLP = {
    "mlp.linear_fc1.weight": Rule("stacked", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Rule("columns", ("mlp.down_proj.weight",)),
}
EXPERTS = {
    "mlp.router.weight": Rule("whole", ("mlp.gate.weight",)),
    **{f"mlp.experts.{x}": Rule("experts", (f"mlp.experts.{x}",)) for x in ("gate_up_proj", "down_proj")},
}
MODEL = {
    "embedding.word_embeddings.weight": Rule("rows", ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": Rule("whole", ("model.norm.weight",)),
    "output_layer.weight": Rule("rows", ("lm_head.weight",)),
}
"""Outside the layers, alike in all families."""


class Family(NamedTuple):
    """A type of transformers models."""

    layer: dict[str, Rule]
    """Rules of the parameters of a layer."""
    options: dict[str, Any] = {}
    """Fields of megatron-core's configuration that are the family's own."""
    read: dict[str, Callable[[Any], Any]] = {}
    """Those of them that a transformers configuration says."""


def _sparse_layers(hf: Any) -> list[int]:
    """Return for each layer whether it has experts, 1, or is dense, 0; qwen3_moe's way to say it."""
    step, dense = hf.decoder_sparse_step, hf.mlp_only_layers
    return [int(i not in dense and (i + 1) % step == 0) for i in range(hf.num_hidden_layers)]


ROUTING = {
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
}
"""No token is dropped, and the loss is the objective's alone."""
CHOICE = {"num_moe_experts": attrgetter("num_local_experts"), "moe_router_topk": attrgetter("num_experts_per_tok")}
_PLAIN = Family(_layer(ATTENTION, MLP))
FAMILIES = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": Family(_layer(ATTENTION | BIASES, MLP), {"add_qkv_bias": True}),
    "qwen3": Family(_layer(ATTENTION | NORMS, MLP), {"qk_layernorm": True}),
    "qwen3_moe": Family(
        _layer(ATTENTION | NORMS, MLP | EXPERTS),
        {"qk_layernorm": True} | ROUTING,
        CHOICE
        | {
            "moe_ffn_hidden_size": attrgetter("moe_intermediate_size"),
            "moe_layer_freq": _sparse_layers,
            "moe_router_pre_softmax": lambda hf: not hf.norm_topk_prob,
        },
    ),
    "mixtral": Family(
        _layer(ATTENTION, EXPERTS), ROUTING, CHOICE | {"moe_ffn_hidden_size": attrgetter("intermediate_size")}
    ),
}
"""By the ``model_type`` of config.json."""
