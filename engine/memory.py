"""Memory of a device with backend=megatron, from sizes alone: docs/megatron.md derives the formulas and has them for two models.

What a model of bfloat16 weights needs; h hidden size, f units of an MLP, a and k heads of queries and of keys, d width of a head,
V vocabulary, s tokens of a micro-batch; t tensor, c context, p pipeline parallelism, v chunks a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.config.layout import Layout, num_experts

WORKSPACE_BYTES = 512 * 2**20
"""Of the output layer on CUDA (docs/kernels.md)."""


class Sizes(NamedTuple):
    """A model's sizes, from the fields of its config.json."""

    hidden: int
    units: int
    """Of an MLP, or of all experts that a token goes through."""
    query: int
    """Width of all query heads, a·d."""
    key: int
    """Width of all key heads, and of all value heads, k·d."""
    heads: int
    layers: int
    vocab: int
    tied: bool
    """Whether embedding and output layer are one matrix."""
    layer: int
    """Parameters of a layer, its experts apart."""
    experts: int
    """Parameters of a layer's experts; 0 where it has an MLP."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Sizes:
        """Read the fields; a head is as wide as hidden size by heads unless ``head_dim`` says otherwise."""
        hidden, heads, count = fields["hidden_size"], fields["num_attention_heads"], num_experts(fields)
        wide = fields.get("head_dim") or hidden // heads
        query, key = heads * wide, (fields.get("num_key_value_heads") or heads) * wide
        units = fields.get("moe_intermediate_size") or fields["intermediate_size"]
        family = fields.get("model_type", "")
        biases = query + 2 * key if family == "qwen2" else 0
        norms = 2 * hidden + (2 * wide if family.startswith("qwen3") else 0)
        mlp = 3 * hidden * units
        return cls(
            hidden=hidden,
            units=units * fields["num_experts_per_tok"] if count else units,
            query=query,
            key=key,
            heads=heads,
            layers=fields["num_hidden_layers"],
            vocab=fields["vocab_size"],
            tied=bool(fields.get("tie_word_embeddings")),
            layer=2 * hidden * (query + key) + biases + norms + (hidden * count if count else mlp),
            experts=count * mlp if count else 0,
        )

    @property
    def parameters(self) -> int:
        """Parameters of the model, its last norm included."""
        matrices = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.layer + self.experts) + matrices + self.hidden


class Memory(NamedTuple):
    """Bytes of a device, by what they are for."""

    weights: float
    """Weights in bfloat16, 2 a parameter of this device."""
    gradients: float
    """Their sums in float32, 4 a parameter."""
    optimizer: float
    """Weights and both moments in float32, 12 a parameter, over the ranks that differ in data or context."""
    activations: float
    """What the forward pass keeps for the backward pass, of all micro-batches under way."""
    output: float
    """The output layer's chunk of logits, its gradient in float32 and the hidden states it sees."""

    @property
    def total(self) -> float:
        """All of it; CUDA itself, NCCL's buffers and gaps between allocations come on top, 2 to 5 GB."""
        return sum(self)


def device_memory(fields: Mapping[str, Any], layout: Layout, *, tokens: int, recompute: bool) -> Memory:
    """Return what the device that needs most holds at once in a step: of the first stage of the pipeline, or of the last.

    Args:
        fields: Of the model's config.json, ``model.config_overrides`` over them.
        layout: Sizes of the groups of ranks.
        tokens: Most tokens of a micro-batch.
        recompute: Whether a layer keeps its input alone (``model.recompute=full``).
    """
    sizes = Sizes.of(fields)
    stages = {0, layout.pipeline - 1}
    found = [_stage(sizes, layout, stage, tokens, recompute=recompute) for stage in sorted(stages)]
    return max(found, key=lambda memory: memory.total)


def _stage(sizes: Sizes, layout: Layout, stage: int, tokens: int, *, recompute: bool) -> Memory:
    """Return what a device of one stage holds."""
    first, last = stage == 0, stage == layout.pipeline - 1
    layers, sharing = sizes.layers / layout.pipeline, layout.data * layout.context
    ends = int(first and last and sizes.tied) or first + last  # one matrix, where a stage has both ends of a tied model
    matrix = sizes.vocab * sizes.hidden / layout.tensor
    dense = layers * sizes.layer / layout.tensor + ends * matrix
    experts = layers * sizes.experts / layout.expert
    own = tokens / layout.context
    output = WORKSPACE_BYTES + 4 * matrix + 4 * own * sizes.hidden if last else 0.0
    return Memory(
        weights=2 * (dense + experts),
        gradients=4 * (dense + experts),
        optimizer=12 * (dense / sharing + experts * layout.expert / (sharing * layout.tensor)),
        activations=_activations(sizes, layout, stage, own, recompute=recompute),
        output=output,
    )


def _activations(sizes: Sizes, layout: Layout, stage: int, own: float, *, recompute: bool) -> float:
    """Return the bytes of activations: layers times micro-batches under way, with recomputation of their inputs and one layer."""
    chunks = _chunks_under_way(layout, stage)
    layers = chunks * sizes.layers / (layout.pipeline * layout.virtual)
    kept = layer_bytes(sizes, layout) * own
    entry = 2 * sizes.hidden * own / (layout.tensor if layout.sequence else 1)
    return layers * entry + kept if recompute else layers * kept


def layer_bytes(sizes: Sizes, layout: Layout) -> float:
    """Return the bytes that a layer keeps of each of a rank's own tokens for the backward pass.

    Four tensors of width h: the inputs of both norms, and what they give to the matrices behind them. Attention: queries and its
    output, keys and values (those of the whole sequence, gathered over the context-parallel ranks), a float32 a head. The gated
    MLP: both projections, the gate's activation, the product. 2 bytes each.
    """
    between = 8 * sizes.hidden / (layout.tensor if layout.sequence else 1)
    attention = 4 * sizes.query + 4 * sizes.key * layout.context + 4 * sizes.heads
    return between + (attention + 8 * sizes.units) / layout.tensor


def _chunks_under_way(layout: Layout, stage: int) -> int:
    """Return how many chunks' activations a stage holds at most under one-forward-one-backward (Narayanan et al., 2021)."""
    after = layout.pipeline - 1 - stage
    if layout.virtual == 1:
        return after + 1
    return 2 * after + (layout.virtual - 1) * layout.pipeline + 1
