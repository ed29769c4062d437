"""How the ranks of a run are split: which of them have the same data, and why ranks, recipe and model do not go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from engine.config.schema import BackendSection, ClusterSection, DataSection, TrainSection


class Layout(NamedTuple):
    """Sizes of the groups of ranks, in megatron-core's order "tp-cp-ep-dp-pp": ranks next to each other share tensors.

    With backend=torch every rank has data of its own; ``backend.torch.shard_size`` is a matter of weights alone.
    """

    tensor: int = 1
    """Ranks that split each layer's matrices."""
    pipeline: int = 1
    """Stages that the layers are split into."""
    virtual: int = 1
    """Chunks of layers a stage."""
    context: int = 1
    """Ranks that split each sequence."""
    expert: int = 1
    """Ranks that split the experts, of those of one stage; an expert is whole."""
    data: int = 1
    """Ranks with micro-batches of their own."""
    sequence: bool = False
    """Whether the tensor-parallel ranks split what lies between the matrices too, by tokens."""

    @classmethod
    def of(cls, backend: BackendSection, ranks: int) -> Layout:
        """Return the layout of so many ranks; ``problems`` says where there is none."""
        if backend.name == "torch":
            return cls(data=ranks)
        own = cls(
            tensor=backend.tensor_parallel or 1,
            pipeline=backend.pipeline_parallel or 1,
            virtual=backend.virtual_pipeline or 1,
            context=backend.context_parallel or 1,
            expert=backend.expert_parallel or 1,
            sequence=bool(backend.sequence_parallel),
        )
        return own._replace(data=max(1, ranks // own.copies))

    @property
    def copies(self) -> int:
        """Ranks that get the same micro-batches."""
        return self.tensor * self.context * self.pipeline

    def data_rank(self, rank: int) -> int:
        """Return whose micro-batches a rank gets: rank = tensor + T·(context + C·(data + D·pipeline))."""
        return rank // (self.tensor * self.context) % self.data


def named_ranks(cluster: ClusterSection) -> int | None:
    """Return how many ranks the recipe alone says that there will be; None: that shows when they start."""
    if cluster.name == "local":
        return 1
    return cluster.num_workers or (cluster.gpus_per_node or 0) * cluster.num_nodes or None


def named_ranks_per_node(cluster: ClusterSection) -> int | None:
    """Return how many of them share a machine; None: not known."""
    if cluster.name == "slurm" and cluster.num_workers is not None:
        return cluster.num_workers // cluster.num_nodes
    return named_ranks(cluster) if cluster.name in ("local", "ray_local") else cluster.gpus_per_node


def problems(
    backend: BackendSection,
    fields: Mapping[str, Any] | None,
    train: TrainSection,
    data: DataSection,
    ranks: int,
    ranks_per_node: int | None = None,
) -> list[str]:
    """Return a sentence for every reason why a recipe cannot be split over so many ranks.

    Args:
        backend: The recipe's.
        fields: Of the model's config.json, ``model.config_overrides`` over them; None: not known yet.
        train: The recipe's.
        data: The recipe's.
        ranks: Of the run.
        ranks_per_node: That share a machine; None: not known.
    """
    layout = Layout.of(backend, ranks)
    found = _knobs(layout) + (check_model(layout, fields) if fields is not None else [])
    if ranks % layout.copies:
        return [*found, _no_multiple(layout, ranks)]
    size = backend.torch.shard_size
    if size is not None and ranks % size:
        found.append(f"backend.torch.shard_size={size} does not divide the {ranks} ranks; choose a divisor.")
    return found + _node(layout, ranks_per_node) + _experts(layout) + _batch(layout, train, data, ranks)


def _no_multiple(layout: Layout, ranks: int) -> str:
    sizes = {
        "tensor_parallel": layout.tensor,
        "pipeline_parallel": layout.pipeline,
        "context_parallel": layout.context,
    }
    named = [f"backend.{key}={size}" for key, size in sizes.items() if size > 1]
    shown = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    need = "needs" if len(named) == 1 else "together need"
    near = _either({ranks // layout.copies * layout.copies, (ranks // layout.copies + 1) * layout.copies} - {0})
    return f"{shown} {need} a multiple of {layout.copies} ranks, and there {_are(ranks)}: use {near}, or lower a size."


def _are(ranks: int) -> str:
    return "is 1" if ranks == 1 else f"are {ranks}"


def _knobs(layout: Layout) -> list[str]:
    """Look at what sizes say about each other, whatever the model."""
    found = []
    if layout.virtual > 1 and layout.pipeline == 1:
        found.append(
            f"backend.virtual_pipeline={layout.virtual} splits the stages of a pipeline, and backend.pipeline_parallel=1 has one: "
            "set backend.virtual_pipeline=null, or backend.pipeline_parallel=2 or more."
        )
    if layout.sequence and layout.tensor == 1:
        found.append(
            "backend.sequence_parallel=true splits tokens over the tensor-parallel ranks, and backend.tensor_parallel=1 has one: "
            "set backend.sequence_parallel=null, or backend.tensor_parallel=2 or more."
        )
    return found


def check_model(layout: Layout, fields: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every size of a layout that does not divide the model's own, given by the fields of config.json."""
    heads, experts = fields.get("num_attention_heads"), num_experts(fields)
    split = {
        "attention heads": heads,
        "key/value heads": fields.get("num_key_value_heads") or heads,
        "units of an MLP": fields.get("intermediate_size"),
    }
    found = _divided("backend.tensor_parallel", layout.tensor, split) + _stages(layout, fields.get("num_hidden_layers"))
    if experts is None:
        dense = f"backend.expert_parallel={layout.expert}: the model has no experts to split; set it to 1."
        return found + [dense] * (layout.expert > 1)
    if layout.tensor > 1 and not layout.sequence:
        found.append(
            "backend.sequence_parallel=false: a model with experts needs it where backend.tensor_parallel is 2 or more; set it to "
            "null."
        )
    return found + _divided("backend.expert_parallel", layout.expert, {"experts": experts})


def num_experts(fields: Mapping[str, Any]) -> int | None:
    """Return how many experts a layer has, from the fields of config.json; None: the model is dense."""
    return fields.get("num_experts") or fields.get("num_local_experts")


def _stages(layout: Layout, layers: Any) -> list[str]:
    if not isinstance(layers, int) or layers % layout.pipeline:
        return _divided("backend.pipeline_parallel", layout.pipeline, {"layers": layers})
    stage = layers // layout.pipeline
    if stage % layout.virtual == 0 or layout.pipeline == 1:
        return []
    near = _near(layout.virtual, lambda size: size > 1 and stage % size == 0, stage)
    return [
        f"backend.virtual_pipeline={layout.virtual} does not divide the layers of a stage, {stage} with "
        f"backend.pipeline_parallel={layout.pipeline}: set it to {near or 'null'}."
    ]


def _divided(key: str, size: int, counts: Mapping[str, Any]) -> list[str]:
    """Return a sentence where a size does not divide each of the model's counts, as far as they are known."""
    known = {what: count for what, count in counts.items() if isinstance(count, int)}
    odd = [f"{count} {what}" for what, count in known.items() if count % size]
    if not odd:
        return []
    common = math.gcd(*known.values())
    near = _near(size, lambda n: common % n == 0, common)
    return [f"{key}={size} does not divide the model's {' and '.join(odd)}: set it to {near}."]


def _node(layout: Layout, ranks_per_node: int | None) -> list[str]:
    if ranks_per_node is None or ranks_per_node % layout.tensor == 0:
        return []
    near = _near(layout.tensor, lambda n: ranks_per_node % n == 0, ranks_per_node)
    return [
        f"backend.tensor_parallel={layout.tensor} stays inside a machine and does not divide its {ranks_per_node} ranks: set it "
        f"to {near}."
    ]


def _batch(layout: Layout, train: TrainSection, data: DataSection, ranks: int) -> list[str]:
    batch, padded = train.global_batch_size, 1 if data.packing.enabled else train.micro_batch_size
    step = padded * layout.data
    if layout.data == 1 or (batch % step == 0 if padded > 1 else batch >= layout.data):
        return []
    near = _either({max(step, batch // step * step), (batch // step + 1) * step})
    who = f"{ranks} ranks" if layout.copies == 1 else f"the {layout.data} data-parallel ranks of {ranks}"
    return [
        f"train.global_batch_size={batch} cannot serve {who}"
        + (f" with train.micro_batch_size={padded}" if padded > 1 else "")
        + f": set it to {near}, or use fewer ranks."
    ]


def _experts(layout: Layout) -> list[str]:
    room = layout.data * layout.context * layout.tensor
    if room % layout.expert == 0:
        return []
    near = _near(layout.expert, lambda n: room % n == 0, room)
    return [f"backend.expert_parallel={layout.expert} does not divide the {room} ranks of a stage: set it to {near}."]


def _near(size: int, possible: Callable[[int], bool], most: int) -> str:
    """Return the nearest possible sizes on either side, in words; empty if there is none."""
    below = next((n for n in range(min(size, most + 1) - 1, 0, -1) if possible(n)), None)
    above = next((n for n in range(size + 1, most + 1) if possible(n)), None)
    return _either(n for n in (below, above) if n is not None)


def _either(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(sizes)))
