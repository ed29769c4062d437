"""Ranks that have nothing in a micro-step, and ranks together, through a real model: the numbers are those of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.backends.torch_backend import TorchBackend
from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.data.assemble import assemble
from engine.data.batch import empty_micro_batch
from engine.data.loader import Loader, train_loader, val_loader
from engine.data.samples import DataSet
from engine.objectives.sft import SFT
from engine.ranks import Ranks
from engine.types import MicroBatch

TOLERANCE = 1e-5
LAYOUTS = {
    "packed": ["data.packing.max_tokens=256"],
    "padded": ["data.packing.enabled=false", "train.micro_batch_size=2"],
}


def config_of(base: list[str], tmp_path: Path, *more: str) -> RunConfig:
    return compose([*base, f"run.dir={tmp_path}", "train.max_grad_norm=1e9", *more]).config


def loader_of(config: RunConfig, tmp_path: Path, *, ranks: int = 1) -> Loader:
    return train_loader(
        assemble(config, tmp_path, lambda text: None).train,
        config.data,
        batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
        ranks=ranks,
        attention_length=12 * 32,
    )


def of_ranks(loader: Loader, ranks: int, step: int = 0) -> list[list[MicroBatch]]:
    return [replace(loader, rank=rank, ranks=ranks).step(step) for rank in range(ranks)]


def gradients(config: RunConfig, batches: Sequence[MicroBatch]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Return loss, gradient norm and, out of AdamW's first moments, the gradients of a step on some micro-batches."""
    backend, objective = TorchBackend(config, Ranks()), SFT()
    units = sum(objective.units(b.targets) for b in batches) or 100.0
    result = backend.train_step(batches, objective, units, 1e-3)
    moments = {name: backend.optimizer.state[p]["exp_avg"] for name, p in backend.weights.master.items()}
    assert result.grad_norm is not None
    return float(result.loss), float(result.grad_norm), {name: m / 0.1 for name, m in moments.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("more", [[], ["model.recompute=full"], ["model.dtype=bfloat16"]], ids=lambda m: " ".join(m))
def test_empty_bins_change_no_bit(base: list[str], tmp_path: Path, layout: str, more: list[str]) -> None:
    config = config_of(base, tmp_path, *LAYOUTS[layout], *more)
    batches = loader_of(config, tmp_path).step(0)
    empty = empty_micro_batch(padded=layout == "padded")
    plain = gradients(config, batches)
    with_empty = gradients(config, [empty, batches[0], empty, *batches[1:], empty])
    assert with_empty[:2] == plain[:2] and plain[1] > 0
    assert all(torch.equal(grad, plain[2][name]) for name, grad in with_empty[2].items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_with_empty_bins(base: list[str], tmp_path: Path, layout: str) -> None:
    config = config_of(base, tmp_path, *LAYOUTS[layout])
    batches, empty = loader_of(config, tmp_path).step(0), empty_micro_batch(padded=layout == "padded")
    backend = TorchBackend(config, Ranks())
    losses = [float(backend.evaluate(some, SFT()).loss) for some in (batches, [empty, *batches, empty])]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_with_nothing_at_all_has_zero_gradients_for_every_parameter(
    base: list[str], tmp_path: Path, layout: str
) -> None:
    """Whatever reduces gradients over ranks finds one for each parameter: AdamW has moments of every one."""
    config = config_of(base, tmp_path, *LAYOUTS[layout])
    loss, norm, grads = gradients(config, [empty_micro_batch(padded=layout == "padded")])
    assert loss == norm == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 11])
def test_ranks_together_are_one_rank(base: list[str], tmp_path: Path, layout: str, ranks: int) -> None:
    config = config_of(base, tmp_path, *LAYOUTS[layout])
    loader = loader_of(config, tmp_path)
    steps = of_ranks(loader, ranks)
    assert len({len(batches) for batches in steps}) == 1
    batches = [batch for own in steps for batch in own]
    assert ranks <= 8 or any(b.num_tokens == 0 for b in batches)
    one = loader.step(0)
    assert sum(b.num_tokens for b in batches) == sum(b.num_tokens for b in one)
    assert sum(len(b.targets.bounds) - 1 for b in batches) == config.train.global_batch_size
    ours, expected = gradients(config, batches), gradients(config, one)
    assert ours[:2] == pytest.approx(expected[:2], rel=TOLERANCE)
    for name, grad in ours[2].items():
        assert (grad - expected[2][name]).norm() <= TOLERANCE * expected[1], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_of_fewer_samples_than_ranks(base: list[str], tmp_path: Path, layout: str) -> None:
    """The last batch holds 40 - 36 = 4 samples for 6 ranks."""
    config = config_of(base, tmp_path, *LAYOUTS[layout])
    samples = assemble(config, tmp_path, lambda text: None).train
    loader = val_loader(samples, config.data, batch_size=12, micro_batch_size=2, attention_length=384.0)
    assert loader.plan.steps_per_epoch == 4
    steps = of_ranks(loader, 6, step=3)
    assert [len(batches) for batches in steps] == [1] * 6
    assert sorted(len(batches[0].targets.bounds) - 1 for batches in steps) == [0, 0, 1, 1, 1, 1]
    backend, objective = TorchBackend(config, Ranks()), SFT()
    loss = backend.evaluate([b for batches in steps for b in batches], objective).loss
    assert float(loss) == pytest.approx(float(backend.evaluate(loader.step(3), objective).loss), rel=TOLERANCE)


def test_a_rank_reads_its_own_samples_alone(base: list[str], tmp_path: Path) -> None:
    class Noting:
        def __init__(self, data: DataSet) -> None:
            self.data, self.lengths, self.documents, self.read = data, data.lengths, data.documents, list[int]()
            self.reference = None

        def __getitem__(self, i: int) -> object:
            self.read.append(i)
            return self.data[i]

    loader = loader_of(config_of(base, tmp_path), tmp_path)
    everyone: list[int] = []
    for rank in range(4):
        noting = Noting(loader.data)
        own = replace(loader, data=noting, rank=rank, ranks=4)  # type: ignore[arg-type]
        assert own.imbalance(0) == replace(loader, ranks=4).imbalance(0) < 0.5
        assert noting.read == []
        own.step(0)
        assert 0 < len(noting.read) < 8
        everyone += noting.read
    assert sorted(everyone) == sorted(loader.plan.members(0).tolist())
    assert loader.imbalance(0) == 0
