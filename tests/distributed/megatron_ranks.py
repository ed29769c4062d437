"""What ranks of the Megatron tests do: train in a layout, and say all that it gave."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import rank_pool
import torch
import torch.distributed as dist
from torch import Tensor

from engine import backends, objectives
from engine.config.layout import Layout
from engine.config.schema import RunConfig
from engine.data.assemble import assemble
from engine.data.loader import Loader, train_loader
from engine.ranks import Ranks
from engine.reference.attach import attach
from engine.train import Counts

F = TypeVar("F", bound=Callable[..., Any])
TOLERANCE = 1e-5
"""Float32: sums of the same terms in another order."""
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "tp": (2, ["tensor_parallel=2", "sequence_parallel=false"]),
    "tp+sp": (2, ["tensor_parallel=2"]),
    "pp": (2, ["pipeline_parallel=2"]),
    "pp+virtual": (2, ["pipeline_parallel=2", "virtual_pipeline=2"]),
    "cp": (2, ["context_parallel=2"]),
    "dp": (2, []),
    "dp, no overlap": (2, ["overlap=false"]),
    "tp·pp": (4, ["tensor_parallel=2", "pipeline_parallel=2"]),
    "tp·cp": (4, ["tensor_parallel=2", "context_parallel=2"]),
    "dp·tp": (4, ["tensor_parallel=2"]),
}
LR = 1e-3
ATTENTION_LENGTH = 12.0 * 32


def in_layout(layout: str) -> list[str]:
    return ["backend=megatron", *(f"backend.{o}" for o in LAYOUTS[layout][1])]


def close(ours: list[float], theirs: list[float], tolerance: float = TOLERANCE) -> bool:
    return len(ours) == len(theirs) and all(abs(a - b) <= tolerance * abs(b) for a, b in zip(ours, theirs, strict=True))


def leave(ranks: Ranks) -> None:
    """Forget the layout of the call before, which a run never changes, and end its process groups and their threads."""
    from engine.backends.megatron import shim

    shim.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from torch.distributed.distributed_c10d import _world

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        get_cuda_rng_tracker().reset()
    for group in list(_world.pg_map):
        if group not in (dist.group.WORLD, ranks.group):
            dist.destroy_process_group(group)


def in_a_layout_of_its_own(work: F) -> F:
    """Begin and end a function of ranks without a layout: groups that stay have threads, which cost other tests their time."""

    @functools.wraps(work)
    def done(ranks: Ranks, *args: Any, **options: Any) -> Any:
        leave(ranks)
        try:
            return work(ranks, *args, **options)
        finally:
            gc.collect()
            leave(ranks)

    return done  # type: ignore[return-value]


@in_a_layout_of_its_own
def whole_run(ranks: Ranks, overrides: Sequence[str]) -> int:
    """Do a whole run on this rank, and return its exit code."""
    return rank_pool.whole_run(ranks, overrides)


def loader_of(config: RunConfig, ranks: Ranks) -> Loader:
    layout = Layout.of(config.backend, ranks.size)
    return train_loader(
        assemble(config, Path(config.run.dir), lambda text: None).train,
        config.data,
        batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
        rank=layout.data_rank(ranks.rank),
        ranks=layout.data,
        attention_length=ATTENTION_LENGTH,
        together=config.algorithm.together,
    )


@in_a_layout_of_its_own
def train(
    ranks: Ranks,
    config: RunConfig,
    steps: Sequence[int] = range(4),
    *,
    resume: Path | None = None,
    save: tuple[int, Path] | None = None,
    export: Path | None = None,
) -> dict[str, Any]:
    """Train some steps, after a checkpoint where one is given, and return losses and norms; save after so many steps."""
    loader, objective = loader_of(config, ranks), objectives.build(config.algorithm)
    backend = backends.build(config, ranks)
    backend.probe([loader.data[i] for i in range(3)])
    if objective.needs_reference:
        attach(config, "weights", lambda: backend, [(loader, range(4))], Path(config.run.dir), ranks, lambda text: None)
    if resume is not None:
        backend.load(resume)
    found: dict[str, Any] = {"losses": [], "norms": [], "micro_batches": [], "sums": []}
    for step in steps:
        batches = loader.step(step)
        counts = Counts(*ranks.sum(Counts.of(batches, objective), ranks.size // loader.ranks))
        result = backend.train_step(batches, objective, counts.units, LR)
        assert result.grad_norm is not None
        found["losses"].append(float(result.loss))
        found["norms"].append(float(result.grad_norm))
        found["sums"].append({name: float(x) for name, x in result.sums.items()})
        found["micro_batches"].append(len(batches))
        if save is not None and save[0] == step + 1:
            backend.snapshot(copy=False)(save[1])
            ranks.gather(None)
    if export is not None:
        backend.export(export if ranks.main else None)
        ranks.gather(None)
    if config.backend.name == "megatron":
        found |= precision(backend, config)
    return found


def precision(backend: Any, config: RunConfig) -> dict[str, Any]:
    """Return the types of parameters and masters, and how many masters are not what the model's files hold, read again."""
    from engine.backends import hf_model

    shares = [(held, backend.optimizer.share(held.parameter)) for held in backend.weights.held]
    masters = {str(share[1]["model"].dtype) for _, share in shares if share is not None}
    rounded = 0
    if config.model.init == "pretrained":
        backend.weights.fill(backend.optimizer)
        sources = dict(hf_model.sources(config.model, backend.lm))
        for held, share in shares:
            whole = torch.zeros(held.parameter.shape)
            for part in held.parts:
                part.write(whole, sources[part.name][part.place])
            rounded += 0 if share is None else int((whole.view(-1)[share[0]] != share[1]["model"].view(-1)).sum())
    types = {str(held.parameter.dtype) for held in backend.weights.held}
    return {"masters": masters, "parameters": types, "rounded_masters": rounded}


@in_a_layout_of_its_own
def train_with_a_bad_step(ranks: Ranks, config: RunConfig) -> dict[str, Any]:
    """Train three steps, the second of a loss that is not finite, and look at the parameters around it."""
    loader, objective = loader_of(config, ranks), objectives.build(config.algorithm)
    backend: Any = backends.build(config, ranks)
    skipped, before = [], []
    for step, units in enumerate((100.0, 0.0, 100.0)):
        before.append([held.parameter.detach().clone() for held in backend.weights.held])
        skipped.append(int(backend.train_step(loader.step(step), objective, units or float("nan"), LR).skipped))
    unchanged = all(torch.equal(a, b) for a, b in zip(before[1], before[2], strict=True))
    changed = any(not torch.equal(a, b) for a, b in zip(before[0], before[1], strict=True))
    return {"skipped": skipped, "unchanged": unchanged and changed}


@in_a_layout_of_its_own
def evaluate(ranks: Ranks, config: RunConfig) -> dict[str, float]:
    """Return the loss over all of an epoch before any training."""
    loader, objective = loader_of(config, ranks), objectives.build(config.algorithm)
    backend = backends.build(config, ranks)
    result = backend.evaluate((b for step in range(3) for b in loader.step(step)), objective)
    return {"loss": float(result.loss), "units": result.units}


@in_a_layout_of_its_own
def answers(ranks: Ranks, config: RunConfig, conversations: Any, ends: list[int]) -> list[str]:
    """Return greedy answers, which end with any of some tokens."""
    backend: Any = backends.build(config, ranks)
    backend.lm.generation_config.eos_token_id = ends
    found: list[str] = backend.generate(conversations, 12)
    return found


@in_a_layout_of_its_own
def loaded(ranks: Ranks, config: RunConfig, export: Path, ids: Tensor) -> Tensor:
    """Load and export a model, and return the log-probabilities of a document's tokens."""
    import numpy as np

    from engine.data.batch import collate_packed
    from engine.types import Sample

    backend: Any = backends.build(config, ranks)
    backend.export(export if ranks.main else None)
    ranks.gather(None)
    sample = Sample(ids.numpy().astype(np.int32), np.array([[1, len(ids)]], np.int32))
    batch = collate_packed([sample])
    return torch.stack(backend._shared(backend._ask([batch], backend.head.logprobs), [len(ids) - 1]))[0]
