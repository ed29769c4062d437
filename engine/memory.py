"""Memory of a device in a training step, from sizes alone: docs/plan.md and docs/megatron.md derive the formulas.

Bytes; h hidden size, f units of an MLP, a and k heads of queries and of keys, d width of a head, V vocabulary, s tokens of a
micro-batch, b bytes of a number of the compute type; t tensor, c context, p pipeline parallelism, v chunks a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.config.layout import Layout, num_experts
from engine.config.schema import LoraSection, TorchSection

LAYERS_GATHERED = 3
"""Of a sharded model at once, in the forward pass: the one that computes, what it arrived in, and what the next one arrives in."""


class Compute(NamedTuple):
    """What the kernels of a device make of the formulas."""

    itemsize: int
    """Bytes of a number of the compute type."""
    workspace_bytes: int
    """Of the output layer's logits (docs/kernels.md)."""
    fused_norms: bool
    """Whether a norm keeps its input and what it gives; else its input in float32 and the normalised one too."""
    fused_mlp: bool
    """Whether a gated MLP computes the gate's activation again (Liger's does); of backend=torch."""
    copied_attention: bool
    """Whether attention keeps its output apart from what it gives to the next matrix (sdpa, a call a document)."""
    copied_gradient: bool
    """Whether the gradient of the output matrix exists twice for a moment, as it does in any case where it is cast."""
    streams: bool
    """Whether what one stream gives up is not there for another: what layers arrived in stays in the backward pass, which needs
    one less of it."""


CUDA = Compute(
    itemsize=2,
    workspace_bytes=512 * 2**20,
    fused_norms=True,
    fused_mlp=True,
    copied_attention=False,
    copied_gradient=False,
    streams=True,
)
"""With Liger's kernels."""
MEGATRON = CUDA._replace(fused_mlp=False, copied_gradient=True)
CPU = Compute(
    itemsize=4,
    workspace_bytes=64 * 2**20,
    fused_norms=False,
    fused_mlp=False,
    copied_attention=True,
    copied_gradient=False,
    streams=False,
)


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
    normed_heads: bool
    """Whether queries and keys are normed (Qwen 3)."""

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
            normed_heads=family.startswith("qwen3"),
        )

    @property
    def parameters(self) -> int:
        """Parameters of the model, its last norm included."""
        matrices = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.layer + self.experts) + matrices + self.hidden


class Memory(NamedTuple):
    """Bytes of a device, by what they are for."""

    weights: float
    """Weights of the compute type: 2 a parameter in bfloat16, as far as this device has them at once."""
    gradients: float
    """Their sums in float32, 4 a parameter, and those that are being summed."""
    optimizer: float
    """Both moments in float32, and float32 weights beside those of the compute type: 12 a parameter, over the ranks that share."""
    activations: float
    """What the forward pass keeps for the backward pass, of all micro-batches under way."""
    output: float
    """The output layer's chunk of logits, its gradient in float32 and the hidden states it sees."""

    @property
    def total(self) -> float:
        """All of it; CUDA itself, NCCL's buffers and gaps between allocations come on top, 2 to 5 GB."""
        return sum(self)


def torch_memory(
    fields: Mapping[str, Any],
    *,
    ranks: int,
    section: TorchSection,
    lora: LoraSection,
    tokens: int,
    recompute: bool,
    compute: Compute = CUDA,
) -> Memory:
    """Return what a device holds at once in a step with backend=torch; all ranks need alike.

    Args:
        fields: Of the model's config.json, ``model.config_overrides`` over them.
        ranks: Of the run.
        section: How they share the weights.
        lora: The recipe's adapters.
        tokens: Most tokens of a micro-batch.
        recompute: Whether a layer keeps its input alone (``model.recompute=full``).
        compute: What the device's kernels need.
    """
    sizes, size = Sizes.of(fields), compute.itemsize
    adapters = sizes.layers * adapter_parameters(sizes, lora) if lora.enabled else 0
    kept = torch_layer_bytes(sizes, lora, compute) * tokens
    last = _norm_bytes(sizes.hidden, compute, frozen=lora.enabled) * tokens
    layers = sizes.layers * size * sizes.hidden * tokens + kept if recompute else sizes.layers * kept
    output = output_bytes(sizes, compute, tokens, frozen=lora.enabled)
    shard = section.shard_size or ranks
    if shard > 1:
        shared = _Shared(sizes, section, shard, adapters, compute)
        earlier = layers + last - (0 if recompute else kept)
        moments = shared.output(layers + last, output), shared.backward(earlier, tokens), shared.end()
        return max(moments, key=lambda memory: memory.total)
    trained, masters = adapters or sizes.parameters, 4 if size < 4 else 0
    weights = float(size * (sizes.parameters + adapters))
    return Memory(weights, 4.0 * trained, (8.0 + masters) * trained, layers + last, output)


class _Shared:
    """A device that has its share of weights and state (FSDP2), at the moments of a step that may need most.

    It gathers a layer at a time; the root's own parameters, embedding and output layer, stay for a whole pass, and their gradients
    are summed at its end.
    """

    def __init__(self, sizes: Sizes, section: TorchSection, shard: int, adapters: int, compute: Compute) -> None:
        self.sizes, self.section, self.shard, self.compute = sizes, section, shard, compute
        self.size, self.adapters = compute.itemsize, adapters
        self.layer = sizes.layer + sizes.experts + adapters / sizes.layers
        self.ends = sizes.parameters - sizes.layers * (sizes.layer + sizes.experts)
        self.matrix = 0 if adapters else sizes.vocab * sizes.hidden
        trained = adapters or sizes.parameters
        own = 0.0 if section.cpu_offload else 1 / shard
        self.frozen = self.size * sizes.parameters * own if adapters else 0.0
        self.sums, self.optimizer = 4 * trained * own, 12 * trained * own

    def output(self, activations: float, output: float) -> Memory:
        """Return what it holds in the output layer, all activations there."""
        return Memory(self._gathered(LAYERS_GATHERED), self.sums, self.optimizer, activations, output)

    def backward(self, activations: float, tokens: int) -> Memory:
        """Return what it holds in a layer's backward pass: its gradients, and those of the one behind it in float32."""
        own = self.adapters / self.sizes.layers or self.layer
        weights = self._gathered(LAYERS_GATHERED if self.compute.streams else LAYERS_GATHERED - 1)
        output = self.size * (self.matrix + tokens * self.sizes.hidden)  # its gradients, until the end
        return Memory(weights, self.sums + (self.size + 4) * own, self.optimizer, activations, output)

    def end(self) -> Memory:
        """Return what it holds when the root's gradients are summed at the end; with LoRA it has none."""
        if self.adapters:
            return Memory(self.frozen, self.sums, self.optimizer, 0.0, 0.0)
        summed = max(self.size * self.ends, 4 * self.ends / self.shard + self.size * self.matrix)
        return Memory(0.0, self.sums + 4 * self.ends + summed, self.optimizer, 0.0, 0.0)

    def _gathered(self, layers: int) -> float:
        at_once = layers if self.section.reshard_after_forward else self.sizes.layers + 1
        return self.size * (self.ends + at_once * self.layer) + self.frozen


def adapter_parameters(sizes: Sizes, lora: LoraSection) -> int:
    """Return how many parameters the adapters of a layer have: rank times the inputs and outputs of each of its matrices."""
    return lora.rank * sum(a + b for a, b in _matrices(sizes, lora))


def _matrices(sizes: Sizes, lora: LoraSection) -> list[tuple[int, int]]:
    """Return inputs and outputs of the matrices of a layer that get adapters; experts get none."""
    hidden, query, key = sizes.hidden, sizes.query, sizes.key
    found = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden)}
    if not sizes.experts:
        mlp = (hidden, sizes.units)
        found |= {"gate_proj": mlp, "up_proj": mlp, "down_proj": mlp[::-1]}
    wanted = lora.target_modules
    named = None if wanted is None else {name.rpartition(".")[2] for name in wanted}
    return [sides for name, sides in found.items() if named is None or name in named]


def torch_layer_bytes(sizes: Sizes, lora: LoraSection, compute: Compute) -> float:
    """Return the bytes that a layer keeps of each token with backend=torch; ``layer_bytes`` has the same of megatron-core's."""
    size, frozen = compute.itemsize, lora.enabled
    attention = size * ((2 + compute.copied_attention) * sizes.query + 2 * sizes.key) + 4 * sizes.heads
    if sizes.normed_heads:  # what a norm gives is rotated, and that is counted
        width = sizes.query + sizes.key
        attention += _norm_bytes(width, compute, frozen=frozen) - size * width
    adapters = size * lora.rank * len(_matrices(sizes, lora)) if lora.enabled else 0
    mlp = size * sizes.units * (3 if compute.fused_mlp else 4)
    return 2 * _norm_bytes(sizes.hidden, compute, frozen=frozen) + attention + mlp + adapters


def _norm_bytes(width: int, compute: Compute, *, frozen: bool) -> int:
    """Return the bytes that a norm keeps of a token: its input and what it gives; unfused, what it multiplies by its weight too."""
    size = compute.itemsize
    if compute.fused_norms:
        return 2 * size * width
    return (4 + size + (0 if frozen else size)) * width


def output_bytes(sizes: Sizes, compute: Compute, tokens: float, *, split: int = 1, frozen: bool = False) -> float:
    """Return the bytes of the output layer: a chunk of logits, the matrix's gradient in float32, hidden states and theirs.

    Args:
        sizes: Of the model.
        compute: What the device's kernels need.
        tokens: That it sees, all of them trained.
        split: Ranks that share the matrix.
        frozen: Whether the matrix is not trained.
    """
    size, matrix = compute.itemsize, 0.0 if frozen else sizes.vocab * sizes.hidden / split
    logits = min(compute.workspace_bytes, size * tokens * sizes.vocab / split)
    again = size * matrix if size < 4 or compute.copied_gradient else 0.0  # in the backward pass, when logits are gone
    return 4 * matrix + max(logits, again) + 2 * size * tokens * sizes.hidden


def device_memory(
    fields: Mapping[str, Any], layout: Layout, *, tokens: int, recompute: bool, compute: Compute = MEGATRON
) -> Memory:
    """Return what the device that needs most holds at once in a step: of the first stage of the pipeline, or of the last.

    Args:
        fields: Of the model's config.json, ``model.config_overrides`` over them.
        layout: Sizes of the groups of ranks.
        tokens: Most tokens of a micro-batch.
        recompute: Whether a layer keeps its input alone (``model.recompute=full``).
        compute: What the device's kernels need.
    """
    sizes = Sizes.of(fields)
    stages = {0, layout.pipeline - 1}
    found = [_stage(sizes, layout, stage, tokens, compute, recompute=recompute) for stage in sorted(stages)]
    return max(found, key=lambda memory: memory.total)


def _stage(sizes: Sizes, layout: Layout, stage: int, tokens: int, compute: Compute, *, recompute: bool) -> Memory:
    """Return what a device of one stage holds."""
    first, last = stage == 0, stage == layout.pipeline - 1
    layers, sharing = sizes.layers / layout.pipeline, layout.data * layout.context
    ends = int(first and last and sizes.tied) or first + last  # one matrix, where a stage has both ends of a tied model
    matrix = sizes.vocab * sizes.hidden / layout.tensor
    dense = layers * sizes.layer / layout.tensor + ends * matrix
    experts = layers * sizes.experts / layout.expert
    own, masters = tokens / layout.context, 4 if compute.itemsize < 4 else 0
    return Memory(
        weights=compute.itemsize * (dense + experts),
        gradients=4 * (dense + experts),
        optimizer=(8 + masters) * (dense / sharing + experts * layout.expert / (sharing * layout.tensor)),
        activations=_activations(sizes, layout, stage, own, compute, recompute=recompute),
        output=output_bytes(sizes, compute, own, split=layout.tensor) if last else 0.0,
    )


def _activations(sizes: Sizes, layout: Layout, stage: int, own: float, compute: Compute, *, recompute: bool) -> float:
    """Return the bytes of activations: layers times micro-batches under way, with recomputation of their inputs and one layer."""
    chunks = _chunks_under_way(layout, stage)
    layers = chunks * sizes.layers / (layout.pipeline * layout.virtual)
    kept = layer_bytes(sizes, layout, compute) * own
    entry = compute.itemsize * sizes.hidden * own / (layout.tensor if layout.sequence else 1)
    return layers * entry + kept if recompute else layers * kept


def layer_bytes(sizes: Sizes, layout: Layout, compute: Compute = MEGATRON) -> float:
    """Return the bytes that a layer of megatron-core's keeps of each of a rank's own tokens for the backward pass.

    Four tensors of width h: the inputs of both norms, and what they give to the matrices behind them. Attention: rotated queries
    and keys, the product that values are a part of, its output, a float32 a head; under context parallelism keys and values of the
    whole sequence, gathered, in place of that product. The gated MLP: the product of both projections, the gate's activation, the
    other half once more (an offset of 0 is added to it), and what goes into the last matrix.
    """
    size, query, key = compute.itemsize, sizes.query, sizes.key
    between = 2 * _norm_bytes(sizes.hidden, compute, frozen=False) / (layout.tensor if layout.sequence else 1)
    values = query + 2 * key if layout.context == 1 else key * layout.context
    attention = size * ((2 + compute.copied_attention) * query + key * layout.context + values) + 4 * sizes.heads
    if sizes.normed_heads:
        attention += _norm_bytes(query + key, compute, frozen=False) - size * (query + key)  # what it gives is rotated
    return between + (attention + 5 * size * sizes.units) / layout.tensor


def _chunks_under_way(layout: Layout, stage: int) -> int:
    """Return how many chunks' activations a stage holds at most under one-forward-one-backward (Narayanan et al., 2021)."""
    after = layout.pipeline - 1 - stage
    if layout.virtual == 1:
        return after + 1
    return 2 * after + (layout.virtual - 1) * layout.pipeline + 1
