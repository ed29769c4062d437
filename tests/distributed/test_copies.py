"""Ranks that have the same micro-batches, as tensor, context and pipeline parallelism make them, count once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from torch import Tensor

from engine.checkpoint import TrainState
from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.data.assemble import assemble
from engine.data.loader import Loader, train_loader
from engine.objectives.sft import SFT
from engine.ranks import Ranks
from engine.reference.attach import attach
from engine.train import Trainer
from engine.types import MicroBatch, StepMetrics


class Counting:
    """In place of a model: a document's log-probability is made of its tokens, and the units of a step are noted."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.units: list[float] = []
        self.passes = 0

    def sequence_logprobs(self, batch: MicroBatch) -> Tensor:
        self.passes += 1
        bounds, labels = batch.targets.bounds, batch.labels_N.float()
        return torch.stack(
            [-labels[a:b].sum() / 97 for a, b in zip(bounds, bounds[1:], strict=False)] or [torch.zeros(0)]
        )

    def score(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        return [self.sequence_logprobs(batch) for batch in batches]

    def train_step(self, batches: Sequence[MicroBatch], objective: Any, global_units: float, lr: float) -> StepMetrics:
        self.units.append(global_units)
        return StepMetrics(loss=torch.tensor(1.0))

    def utilization(self, **counts: float) -> None:
        return None


def loader_of(config: RunConfig, rank: int, ranks: int, together: int = 1) -> Loader:
    data = assemble(config, Path(config.run.dir), lambda text: None).train
    return train_loader(
        data, config.data, batch_size=8, micro_batch_size=1, seed=0, rank=rank, ranks=ranks, together=together
    )


def references(ranks: Ranks, recipe: str, data_ranks: int) -> tuple[list[float], int]:
    """Attach a reference on ranks of which so many have documents of their own."""
    config = RunConfig.model_validate_json(recipe)
    model, loader = Counting(), loader_of(config, ranks.rank % data_ranks, data_ranks, together=2)
    attach(config, "weights", lambda: model, [(loader, range(3))], Path(config.run.dir), ranks, lambda text: None)  # type: ignore[arg-type,return-value]
    assert loader.data.reference is not None
    return loader.data.reference.tolist(), model.passes


def step(ranks: Ranks, recipe: str, data_ranks: int) -> tuple[list[float], dict[str, float]]:
    """Do a step, and return the units it was divided by and what it logs."""
    config = RunConfig.model_validate_json(recipe)
    silent: Any = SimpleNamespace(say=print, newest=lambda: None, path=Path(config.run.dir))
    model: Any = Counting()
    trainer = Trainer(
        config=config,
        ranks=ranks,
        backend=model,
        objective=SFT(),
        train=loader_of(config, ranks.rank % data_ranks, data_ranks),
        val={},
        folder=silent,
        checkpoints=silent,
        console=silent,
        loggers=[],
        callbacks=[],
        state=TrainState(total_steps=4),
    )
    trainer._step()
    assert trainer._pending is not None
    return model.units, dict(trainer._pending.figures)


def test_references_of_copies_count_once(two_ranks: RankPool, dpo: list[str], tmp_path: Path) -> None:
    def recipe(name: str) -> str:
        words = [*dpo, f"run.dir={tmp_path / name}", "data.cache=off"]
        return compose(words).config.model_dump_json()

    (tmp_path / "cache").mkdir(exist_ok=True)
    expected, passes = references(Ranks(), recipe("one"), 1)
    known = np.isfinite(expected)
    assert known.sum() == 48 and min(np.array(expected)[known]) < -1
    copies = two_ranks(references, recipe("copies"), 1)
    spread = two_ranks(references, recipe("spread"), 2)
    for found, _ in (*copies, *spread):
        assert found == pytest.approx(expected, nan_ok=True, rel=0)
    assert [n for _, n in copies] == [passes, passes]  # each copy has all of the micro-batches


def test_counts_of_copies_count_once(two_ranks: RankPool, base: list[str], tmp_path: Path) -> None:
    recipe = compose([*base, f"run.dir={tmp_path}", "data.packing.max_tokens=256"]).config.model_dump_json()
    (units,), one = step(Ranks(), recipe, 1)
    assert units > 100 and one["train/trained_tokens"] == units
    for data_ranks in (1, 2):
        for found, figures in two_ranks(step, recipe, data_ranks):
            assert found == [units]
            assert figures["train/tokens"] == one["train/tokens"]
            assert figures["train/trained_tokens"] == one["train/trained_tokens"]
            per_device = figures["perf/tokens_per_second_per_device"]
            assert per_device == pytest.approx(figures["perf/tokens_per_second"] / 2)
            if data_ranks == 1:
                assert figures["perf/padding_share"] == one["perf/padding_share"]
                assert figures["perf/imbalance"] == 0


def test_a_sum_over_copies_is_divided_once() -> None:
    class Echo(Ranks):
        def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
            return [value * self.size for value in values]

    assert Echo(size=8).sum([3.0, 0.5], copies=4) == [6.0, 1.0] and Echo(size=8).sum([3.0]) == [24.0]
