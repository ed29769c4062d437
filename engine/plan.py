"""``python -m engine.plan OVERRIDES``: what would run, and whether it fits, from configs alone: no weights, no GPU, no torch."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import hub, memory, schedule
from engine.config import compose, layout, megatron, sources
from engine.config.known_models import MODELS
from engine.config.layout import Layout
from engine.config.schema import RunConfig, max_tokens_per_micro_batch
from engine.data import cache
from engine.data.plan import assign, assign_padded, train_plan
from engine.data.samples import DataSet, Part, hold_out
from engine.errors import EXIT_DONE, EXIT_ERROR, UserError, command
from engine.memory import Memory

CARD_GB = 80.0
"""Memory of a GPU, 10⁹ bytes, where nobody has said."""
MARGIN = 0.1
"""Share of a card that CUDA itself, NCCL's buffers and gaps between allocations are given."""
ASSUMED_RANKS = 8
"""Where the recipe leaves it to the machine."""
MOST_NODES = 64
"""That are tried for a run that does not fit."""
RATE, WARM_UP_STEPS = "perf/tokens_per_second_per_device", 10
FIELDS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")
"""Of config.json, without which nothing is known of a model's size."""


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """How far a run goes, as its tokenised data tell."""

    steps: int
    """Optimizer steps."""
    tokens: int
    """That go through the model in all of them: counted in the first epoch's share, to about one part in a thousand."""
    conversations: int
    """Conversations (pairs) to train on."""
    micro_steps: int
    """Micro-batches of each data-parallel rank in the first step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would run.

    Attributes:
        config: The recipe.
        ranks: Of the run.
        named: Whether the recipe says how many; else they are assumed.
        layout: How they are split.
        tokens: Most tokens of a micro-batch.
        parameters: Of the model; None: its sizes are not known here.
        trained: Those of them, or of its adapters, that are trained.
        memory: Of the device that needs most, bytes; None: the model's sizes are not known here.
        card_gb: Memory of a card, 10⁹ bytes; None: the ranks are on CPUs.
        horizon: Steps and tokens; None: the data are not tokenised yet.
        steps: Of the run; None: that depends on the data.
        change: Words to add so that it fits; None: it does, or nothing that was tried makes it.
    """

    config: RunConfig
    ranks: int
    named: bool
    layout: Layout
    tokens: int
    parameters: int | None
    trained: int | None
    memory: Memory | None
    card_gb: float | None
    horizon: Horizon | None
    steps: int | None
    change: tuple[str, ...] | None = None

    @property
    def margin(self) -> float:
        """Bytes of a card that are not planned with."""
        return MARGIN * (self.card_gb or 0.0) * 1e9

    @property
    def fits(self) -> bool:
        """Whether nothing is known that speaks against it."""
        if self.memory is None or self.card_gb is None:
            return True
        return self.memory.total + self.margin <= self.card_gb * 1e9

    @property
    def problem(self) -> str | None:
        """Why it does not fit and what would, in a sentence; None: it fits."""
        if self.fits:
            return None
        assert self.memory is not None
        need = (self.memory.total + self.margin) / 1e9
        remedy = (
            f"add {' '.join(self.change)}"
            if self.change
            else "no change of recompute, micro-batch, parallelism or LoRA is enough: take more devices or a smaller model"
        )
        return f"memory: a device needs {need:,.1f} GB with the margin, and a card has {self.card_gb:g}; {remedy}."


def plan(config: RunConfig, *, card_gb: float = CARD_GB) -> Plan:
    """Return what a recipe would run; reads config files and what is tokenised already, imports and computes nothing heavy.

    Args:
        config: The recipe.
        card_gb: Memory of a GPU, 10⁹ bytes.

    Raises:
        UserError: For a model or layout that is impossible, or data that fill no step.
    """
    named = layout.named_ranks(config.cluster)
    ranks = named or max(ASSUMED_RANKS, Layout.of(config.backend, 1).copies)
    fields = model_fields(config)
    if problems := _problems(config, fields, ranks):
        raise UserError(*problems)
    if fields is not None and not all(isinstance(fields.get(name), int) for name in FIELDS):
        fields = None
    horizon = _horizon(config, Layout.of(config.backend, ranks), fields)
    known = memory.Sizes.of(fields) if fields is not None else None
    lora = config.model.lora
    adapters = known.layers * memory.adapter_parameters(known, lora) if known is not None and lora.enabled else None
    found = Plan(
        config=config,
        ranks=ranks,
        named=named is not None,
        layout=Layout.of(config.backend, ranks),
        tokens=micro_batch_tokens(config),
        parameters=None if known is None else known.parameters,
        trained=adapters or (None if known is None else known.parameters),
        memory=None if fields is None else device_memory(config, fields, ranks),
        card_gb=None if config.cluster.num_workers else card_gb,
        horizon=horizon,
        steps=horizon.steps if horizon else _steps_alone(config),
    )
    return found if found.fits or fields is None else replace(found, change=_change(found, fields))


def model_fields(config: RunConfig) -> dict[str, Any] | None:
    """Return the fields of the model's config.json, from this machine or as the engine knows them; None: neither has them."""
    model = config.model
    fields = hub.known_fields(model)
    if fields is None and model.path in MODELS:
        return {**MODELS[model.path], **model.config_overrides}
    return fields


def micro_batch_tokens(config: RunConfig) -> int:
    """Return the most tokens of a micro-batch."""
    together = config.algorithm.together
    if config.data.packing.enabled:
        return max_tokens_per_micro_batch(config.data, together)
    return config.train.micro_batch_size * together * config.data.max_length


def device_memory(config: RunConfig, fields: dict[str, Any], ranks: int) -> Memory:
    """Return the memory of the device that needs most, by the formulas of the recipe's backend."""
    model, tokens = config.model, micro_batch_tokens(config)
    compute = _compute(config, fields)
    recompute = model.recompute == "full"
    if config.backend.name == "megatron":
        split = Layout.of(config.backend, ranks)
        return memory.device_memory(fields, split, tokens=tokens, recompute=recompute, compute=compute)
    return memory.torch_memory(
        fields,
        ranks=ranks,
        section=config.backend.torch,
        lora=model.lora,
        tokens=tokens,
        recompute=recompute,
        compute=compute,
    )


def _compute(config: RunConfig, fields: dict[str, Any]) -> memory.Compute:
    """Return what the kernels of the recipe's devices need."""
    dtype, with_megatron = config.model.dtype, config.backend.name == "megatron"
    if config.cluster.num_workers:
        found = memory.CPU._replace(copied_gradient=with_megatron)
        return found._replace(itemsize=2) if dtype == "bfloat16" else found
    found = memory.MEGATRON if with_megatron else memory.CUDA
    if not with_megatron and config.model.liger is False:
        found = found._replace(fused_norms=False, fused_mlp=False)
    return found._replace(itemsize=4) if dtype == "float32" else found


def _problems(config: RunConfig, fields: dict[str, Any] | None, ranks: int) -> list[str]:
    """Return why the ranks cannot be split so, or the backend does not have the model."""
    per_node = layout.named_ranks_per_node(config.cluster)
    if ranks == 1 and config.backend.name == "torch":
        return []
    found = layout.problems(config.backend, fields, config.train, config.data, ranks, per_node)
    if config.backend.name == "megatron" and fields is not None:
        found += megatron.check_fields(config.model.path, fields)
    return found


def _horizon(config: RunConfig, split: Layout, fields: dict[str, Any] | None) -> Horizon | None:
    """Return how far the run goes, if all that it trains on has been tokenised."""
    parts = []
    for source in sources.of(config.data, "train"):
        samples = cache.find(config, source)
        if samples is None:
            return None
        part = Part(name=source.name, samples=samples, weight=source.weight)
        parts.append(hold_out(part, config.data.val_fraction)[0] if config.data.val_fraction else part)
    data, batch = DataSet(parts), config.train.global_batch_size
    order = train_plan(data, config.data, batch_size=batch, seed=config.run.seed)
    steps = schedule.total_steps(config.algorithm, order)
    epoch = sum(q * _tokens_each(config, part) for part, q in zip(data.parts, order.quotas, strict=True))
    return Horizon(
        steps=steps,
        tokens=round(epoch * steps * batch / sum(order.quotas)),
        conversations=sum(data.sizes),
        micro_steps=_micro_steps(config, data, order.members(0), split.data, fields),
    )


def _tokens_each(config: RunConfig, part: Part) -> float:
    """Return the tokens that a conversation of a source puts into micro-batches, on average."""
    documents = part.documents(np.arange(part.num_conversations))
    tokens = part.samples.lengths[documents].sum(dtype=np.int64)
    if config.data.packing.enabled and config.data.packing.share_prompts:
        tokens -= part.samples.shared[documents].sum(dtype=np.int64)
    return float(tokens) / part.num_conversations


def _micro_steps(
    config: RunConfig, data: DataSet, members: NDArray[np.int64], ranks: int, fields: dict[str, Any] | None
) -> int:
    """Return how many micro-batches a rank has in a step of some conversations."""
    packing, lengths = config.data.packing, data.lengths
    attention = 12.0 * fields["hidden_size"] if fields is not None else math.inf
    if packing.enabled and packing.share_prompts:
        lengths = lengths - data.shared
    own = lengths[data.documents(members)].reshape(-1, config.algorithm.together)
    if packing.enabled:
        return len(assign(own.sum(1), capacity=micro_batch_tokens(config), ranks=ranks, attention_length=attention)[0])
    return len(assign_padded(own.max(1), config.train.micro_batch_size, ranks, attention)[0])


def _steps_alone(config: RunConfig) -> int | None:
    """Return how many steps there are where the recipe counts nothing but steps."""
    return config.algorithm.max_num_steps if config.algorithm.max_num_epochs is None else None


def _change(found: Plan, fields: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the smallest change with which a plan fits: one alone, else several, those first that cost least; None: none does."""
    groups = [list(changes) for changes in _changes(found.config, found.ranks) if changes]
    for change in (change for group in groups for change in group):
        if _fits(found, fields, (change,)):
            return (_words(change),)
    taken: tuple[Change, ...] = ()
    for group in groups:
        possible = [c for c in group if not _refused(found, fields, (*taken, c))]
        fitting = next((c for c in possible if _fits(found, fields, (*taken, c))), None)
        if fitting is not None:
            return tuple(map(_words, _needed(found, fields, (*taken, fitting))))
        taken += tuple(possible[-1:])
    return None


Change = tuple[str, Any]
"""A key and its new value."""


def _changes(config: RunConfig, ranks: int) -> Iterator[list[Change]]:
    """Yield what could be changed, the values of a key together, the least change first."""
    if config.model.recompute == "none":
        yield [("model.recompute", "full")]
    yield _smaller_batches(config)
    per_node = layout.named_ranks_per_node(config.cluster) or ranks
    if config.backend.name == "megatron":
        for key, most in (("tensor", per_node), ("pipeline", ranks), ("context", ranks)):
            now = getattr(config.backend, f"{key}_parallel") or 1
            yield [(f"backend.{key}_parallel", n) for n in _doubled(now, most)]
    else:
        size = config.backend.torch.shard_size
        yield [("backend.torch.shard_size", n) for n in _doubled(size, ranks)] if size is not None else []
        yield [] if config.model.lora.enabled else [("model.lora.enabled", True)]
    if config.cluster.num_nodes > 1 or config.cluster.name not in ("local", "ray_local", "env"):
        yield [("cluster.num_nodes", n) for n in _doubled(config.cluster.num_nodes, MOST_NODES)]


def _smaller_batches(config: RunConfig) -> list[Change]:
    """Return smaller micro-batches; a packed one holds the longest conversation (pair) in any case."""
    if config.data.packing.enabled:
        now, least = micro_batch_tokens(config), config.algorithm.together * config.data.max_length
        return [("data.packing.max_tokens", max(least, n)) for n in _halved(now, least)]
    return [("train.micro_batch_size", n) for n in _halved(config.train.micro_batch_size, 1)]


def _halved(now: int, least: int) -> list[int]:
    found = []
    while now > least:
        now = max(least, now // 2)
        found.append(now)
    return found


def _doubled(now: int, most: int) -> list[int]:
    found = []
    while 2 * now <= most:
        now *= 2
        found.append(now)
    return found


def _words(change: Change) -> str:
    """Return a change as it is typed."""
    key, value = change
    return f"{key}={str(value).lower()}"


def _needed(found: Plan, fields: dict[str, Any], changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """Leave out of several changes those without which it fits too, the costliest first."""
    for change in reversed(changes):
        fewer = tuple(c for c in changes if c is not change)
        if _fits(found, fields, fewer):
            changes = fewer
    return changes


def _fits(found: Plan, fields: dict[str, Any], changes: tuple[Change, ...]) -> bool:
    """Tell whether a plan fits with some changes."""
    if _refused(found, fields, changes):
        return False
    config, ranks = _changed(found, changes)
    return replace(found, memory=device_memory(config, fields, ranks)).fits


def _refused(found: Plan, fields: dict[str, Any], changes: tuple[Change, ...]) -> bool:
    config, ranks = _changed(found, changes)
    return bool(_problems(config, fields, ranks))


def _changed(found: Plan, changes: tuple[Change, ...]) -> tuple[RunConfig, int]:
    """Return the recipe with some changes, and its ranks."""
    config = found.config
    for key, value in changes:
        config = _with(config, key.split("."), value)
        if key == "backend.tensor_parallel":  # as composing does
            config = _with(config, ["backend", "sequence_parallel"], True)
    return config, found.ranks * config.cluster.num_nodes // found.config.cluster.num_nodes


def _with(section: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return section.model_copy(update={first: _with(getattr(section, first), rest, value) if rest else value})


def text(found: Plan, like: Path | None = None) -> str:
    """Return a plan to read.

    Args:
        found: The plan.
        like: Folder of an earlier run whose measured rate is taken.

    Raises:
        UserError: If that has measured nothing.
    """
    config, batch, split = found.config, found.config.train.global_batch_size, found.layout
    unit = "pairs" if config.algorithm.together > 1 else "conversations"
    lines = [
        ("model", _model_line(found)),
        ("layout", _layout_line(found)),
        ("batch", f"{batch:,} {unit} a step, {batch / split.data:,.3g} a data-parallel rank"),
        ("micro-batch", _micro_batch_line(found, unit)),
        ("data", _data_line(found, unit)),
        ("steps", "not known before the data are tokenised" if found.steps is None else f"{found.steps:,}"),
        ("tokens", "not known" if found.horizon is None else f"about {found.horizon.tokens:,}"),
    ]
    if like is not None:
        lines.append(("time", _time_line(found, like)))
    return "\n".join([*(f"{name:<13}{words}" for name, words in lines), *_memory_lines(found)])


def _model_line(found: Plan) -> str:
    path = found.config.model.path
    if found.parameters is None or found.trained is None:
        return f"{path}: its config.json is not on this machine, or says no sizes; hf download {path} config.json"
    what = "LoRA adapters" if found.config.model.lora.enabled else "parameters"
    return f"{path}: {_short(found.parameters)} parameters; {_short(found.trained)} {what} are trained"


def _layout_line(found: Plan) -> str:
    cluster, split, torch = found.config.cluster, found.layout, found.config.backend.torch
    sizes = {name: getattr(split, name) for name in ("tensor", "pipeline", "virtual", "context", "expert")}
    split_by = "".join(f" × {name} {size}" for name, size in sizes.items() if size > 1)
    shard = torch.shard_size or found.ranks
    weights = f"; weights sharded over {shard}" if found.config.backend.name == "torch" and shard > 1 else ""
    where = f"{cluster.num_nodes} node{'s' * (cluster.num_nodes > 1)}, {found.ranks} rank{'s' * (found.ranks > 1)}"
    assumed = "" if found.named else " (assumed: set cluster.gpus_per_node)"
    return f"{where}{assumed}: backend {found.config.backend.name}, data {split.data}{split_by}{weights}"


def _micro_batch_line(found: Plan, unit: str) -> str:
    packing, recompute = found.config.data.packing.enabled, found.config.model.recompute
    size = "packed" if packing else f"{found.config.train.micro_batch_size} {unit} padded"
    steps = "" if found.horizon is None else f"; {found.horizon.micro_steps} a rank in step 1"
    return f"at most {found.tokens:,} tokens, {size}{steps}; recompute {recompute}"


def _data_line(found: Plan, unit: str) -> str:
    if found.horizon is None:
        return "not tokenised yet, so not counted: python -m engine.cache build, with the same words"
    return f"{found.horizon.conversations:,} {unit} to train on"


def _memory_lines(found: Plan) -> list[str]:
    if found.memory is None:
        return ["memory       not known without the model's config.json"]
    rows = [(name, size) for name, size in zip(Memory._fields, found.memory, strict=True)]
    total, limit = found.memory.total, ""
    if found.card_gb is not None:
        rows.append(("margin", found.margin))
        total += found.margin
        limit = f" of {found.card_gb:g}: {'fits' if found.fits else 'does not fit'}"
    lines = [f"  {name:<13}{size / 1e9:8.1f}" for name, size in rows]
    return ["memory       a device, GB", *lines, f"  {'total':<13}{total / 1e9:8.1f}{limit}"]


def _time_line(found: Plan, like: Path) -> str:
    rate = measured_rate(like)
    if found.horizon is None:
        return f"not known before the data are tokenised; {like} did {rate:,.0f} tokens a second and device"
    hours = found.horizon.tokens / (rate * found.ranks) / 3600
    return f"about {hours:,.1f} hours at the {rate:,.0f} tokens a second and device of {like}"


def measured_rate(folder: Path) -> float:
    """Return the median of ``perf/tokens_per_second_per_device`` of a run, its first steps left out.

    Raises:
        UserError: If the folder has no such figures.
    """
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--like {folder}: no metrics.jsonl there that can be read; give a run folder.") from error
    rates = [float(line[RATE]) for line in lines if RATE in line]
    if not rates:
        raise UserError(f"--like {folder}: its metrics.jsonl has no {RATE}; give a run that has trained some steps.")
    return statistics.median(rates[min(len(rates) // 2, WARM_UP_STEPS) :])


def _short(count: float) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


@command
def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.plan", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for python -m engine")
    parser.add_argument("--card", type=float, metavar="GB", help=f"memory of a GPU ({CARD_GB:g})")
    parser.add_argument("--like", type=Path, metavar="RUN_DIR", help="run whose measured rate tells the time")
    options = parser.parse_intermixed_args(argv)
    if options.card is not None and not 0 < options.card < math.inf:
        raise UserError(f"--card {options.card:g}: give the memory of a GPU in GB, such as 80.")
    composed = compose.compose(compose.with_quickstart(options.overrides))
    found = plan(composed.config, card_gb=options.card or CARD_GB)
    print(text(found, options.like))
    if options.card is None and found.card_gb is not None:
        print(f"cards of {CARD_GB:g} GB are assumed; --card GB says otherwise")
    if found.problem is not None:
        print(f"error: {found.problem}", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
