"""data=dummy: full-length random samples that need neither files nor memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from engine.config.compose import compose
from engine.data.assemble import assemble
from engine.data.dummy import DummySamples
from engine.data.loader import train_loader
from engine.data.samples import DataSet, Samples
from engine.errors import UserError


def prepared(tmp_path: Path, *overrides: str, split: str = "train") -> tuple[Samples, list[str]]:
    said: list[str] = []
    folders = [f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"]
    config = compose(["model=tiny", "data=dummy", *folders, *overrides]).config
    data = assemble(config, tmp_path / "run", said.append)
    return data.sources[split], said


def dummy(seed: int = 0, length: int = 64, vocabulary: int = 100) -> DummySamples:
    return DummySamples(num_samples=1000, length=length, vocabulary=vocabulary, seed=seed)


def test_the_recipe_is_twenty_steps_unless_told_otherwise() -> None:
    config = compose(["model=tiny", "data=dummy"]).config
    assert config.data.train_path == "builtin:dummy" and config.data.val_path is None
    assert config.data.max_length == 1024  # what the model reads
    assert config.algorithm.max_num_steps == 20
    assert compose(["model=tiny", "data=dummy", "algorithm.max_num_steps=3"]).config.algorithm.max_num_steps == 3


def test_every_sample_is_full_and_trained(tmp_path: Path) -> None:
    samples, said = prepared(tmp_path, "data.max_length=96")
    assert len(samples) == 1_000_000 and len(samples.lengths) == 1_000_000
    assert samples.lengths[[0, 999_999]].tolist() == [96, 96] and samples.lengths.dtype == np.int32
    for i in (0, 1, 999_999):
        sample = samples[i]
        assert sample.input_ids.dtype == np.int32 and sample.input_ids.shape == (96,)
        assert 0 <= sample.input_ids.min() and sample.input_ids.max() < 264  # what the model knows
        assert sample.trained.tolist() == [[0, 96]]
    assert said == [
        "data: 1,000,000 of 1,000,000 rows used; 96,000,000 tokens, 99.0% trained, longest 96 (format dummy)"
    ]
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_validation_is_short_and_another_draw(tmp_path: Path) -> None:
    overrides = ["data.max_length=96", "data.val_path=builtin:dummy"]
    val, said = prepared(tmp_path, *overrides, split="validation")
    train, _ = prepared(tmp_path, *overrides)
    assert len(val) == 1024 and val.lengths.tolist() == [96] * 1024
    assert said[1].startswith("validation data: 1,024 of 1,024 rows used; ")
    assert not np.array_equal(val[0].input_ids, train[0].input_ids)


def test_tokens_are_a_function_of_seed_and_index() -> None:
    one, same, other = dummy(), dummy(), dummy(seed=1)
    last = [same[i].input_ids for i in (999, 7, 0)]
    for i, ids in zip((999, 7, 0), last, strict=True):
        assert np.array_equal(one[i].input_ids, ids)
        assert not np.array_equal(other[i].input_ids, ids)
    assert len({one[i].input_ids.tobytes() for i in range(1000)}) == 1000


def test_tokens_never_change() -> None:
    """Computed once and frozen: a run that is repeated measures the same work."""
    assert dummy()[0].input_ids[:8].tolist() == [59, 58, 49, 56, 3, 25, 67, 96]
    assert dummy(seed=3)[999].input_ids[:8].tolist() == [46, 7, 16, 22, 63, 39, 59, 68]


def test_tokens_are_spread_over_the_vocabulary() -> None:
    counts = np.bincount(np.concatenate([dummy()[i].input_ids for i in range(1000)]), minlength=100)
    assert len(counts) == 100
    assert counts.min() > 500 and counts.max() < 790  # 640 expected, standard deviation 25


def test_a_smaller_vocabulary_is_kept_to(tmp_path: Path) -> None:
    samples, _ = prepared(tmp_path, "data.max_length=256", "model.config_overrides={vocab_size: 7}")
    assert set(samples[0].input_ids.tolist()) == set(range(7))


def test_fingerprints_tell_draws_apart() -> None:
    assert dummy().fingerprint == dummy().fingerprint
    draws = [dummy(), dummy(seed=1), dummy(length=65), dummy(vocabulary=101)]
    assert len({d.fingerprint for d in draws}) == 4
    with pytest.raises(IndexError):
        dummy()[1000]


def test_a_million_samples_take_no_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        samples = DummySamples(num_samples=1_000_000, length=131_072, vocabulary=128_256, seed=0)
        assert samples.lengths[np.arange(0, 1_000_000, 1000)].sum() == 1000 * 131_072
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_a_step_is_of_full_micro_batches(tmp_path: Path) -> None:
    samples, _ = prepared(tmp_path, "data.max_length=128")
    config = compose(["model=tiny", "data=dummy", "data.max_length=128", "data.packing.max_tokens=256"]).config
    loaders = [
        train_loader(DataSet.of(samples), config.data, batch_size=8, micro_batch_size=1, seed=0, rank=r, ranks=2)
        for r in (0, 1)
    ]
    batches = [b for loader in loaders for b in loader.step(5)]
    assert [b.input_ids.numel() for b in batches] == [256] * 4
    assert sum(b.targets.num_tokens for b in batches) == 8 * 127
    assert loaders[0].imbalance(5) == 0


def test_an_unknown_built_in_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data: builtin:dumy is no built-in set; there is builtin:tasks/train"):
        prepared(tmp_path, "data.train_path=builtin:dumy")
