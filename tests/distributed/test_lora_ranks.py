"""LoRA over two ranks: the same losses, weights, references, checkpoints and folders as on one, whole or sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from safetensors.torch import load_file
from test_fsdp import (
    BF16_TOLERANCE,
    ONE,
    SHARDED_OR_NOT,
    TOLERANCE,
    assert_same_training,
    do_step,
    loader_of,
    part,
    raised,
    recipe,  # noqa: F401
    same,
    state_of,
    train,
    whole,
)
from torch.distributed.tensor import DTensor

from engine.backends.torch_backend import TorchBackend
from engine.config.schema import RunConfig
from engine.data.batch import collate_packed
from engine.ranks import Ranks

LORA = ["model.lora.enabled=true", "model.lora.rank=3", "model.lora.alpha=6"]
LAYOUTS = {
    "sharded": [],
    "replicated": ["backend.torch.shard_size=1"],
    "several micro-batches": ["data.packing.max_tokens=256", "backend.torch.reshard_after_forward=false"],
    "recomputed": ["model.recompute=full"],
    "tied": ["model.init=random", "model.config_overrides={tie_word_embeddings: true}"],
    "one layer": ["model.lora.target_modules=[layers.1.mlp.up_proj]"],
    "an empty bin": ["train.global_batch_size=13", "data.drop_last=false"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_step_and_five_equal_one_ranks(two_ranks: RankPool, recipe: Callable[..., RunConfig], layout: str) -> None:  # noqa: F811
    config = recipe(*LORA, *LAYOUTS[layout])
    theirs = train(ONE, config)
    results = two_ranks(train, config)
    assert all(".lora_" in name for name in part(theirs[0], "model/"))
    for ours in results:
        assert_adapters_trained(ours, theirs)
    if layout != "replicated":
        assert sum(r["local"] for r in results) == theirs["local"]


def assert_adapters_trained(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare two trainings; of the weights, only adapters have a state."""
    held = {name: x for name, x in theirs["initial"].items() if ".lora_" in name}
    assert same(ours["initial"], theirs["initial"]) and len(held) < len(theirs["initial"])
    assert_same_training({**ours, "initial": held}, {**theirs, "initial": held})


def bfloat16(ranks: Ranks, config: RunConfig) -> dict[str, Any]:
    """Train two steps; return what is kept in which type, and what has become of the base."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    before = whole(backend)
    losses = [float(do_step(backend, loader, step).loss) for step in range(3)]
    after = whole(backend)
    local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in backend.weights.parameters.items()}
    return {
        "losses": losses,
        "moved": {n for n, x in before.items() if not torch.equal(x, after[n])},
        "base": {p.dtype for n, p in local.items() if ".lora_" not in n},
        "masters": {(p.dtype, ".lora_" in n) for n, p in backend.weights.master.items()},
        "gradients": [n for n, p in backend.lm.named_parameters() if p.grad is not None],
        "frozen": [n for n, p in backend.lm.named_parameters() if not p.requires_grad and ".lora_" in n],
    }


@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
def test_the_base_is_bfloat16_alone(two_ranks: RankPool, recipe: Callable[..., RunConfig], spread: str) -> None:  # noqa: F811
    config = recipe(*LORA, "model.dtype=bfloat16", *SHARDED_OR_NOT[spread])
    exact = bfloat16(ONE, recipe(*LORA))
    for found in two_ranks(bfloat16, config):
        assert found["losses"] == pytest.approx(exact["losses"], rel=BF16_TOLERANCE)
        assert found["base"] == {torch.bfloat16} and found["masters"] == {(torch.float32, True)}
        assert found["moved"] == exact["moved"] and all(".lora_" in name for name in found["moved"])
        assert not found["gradients"] and not found["frozen"]


def around(ranks: Ranks, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Ask for the reference before the first forward pass with gradients, train, save, go on, load and write."""
    backend, loader = TorchBackend(config, ranks), loader_of(config, ranks)
    batch = collate_packed([loader.data[i] for i in range(5)])
    first = backend.sequence_logprobs(batch).tolist()
    losses = [float(do_step(backend, loader, step).loss) for step in range(3)]
    ranks.first(lambda: [(folder / name).mkdir(parents=True) for name in ("saved", "hf", "adapter")])
    backend.snapshot(copy=False)(folder / "saved")
    then = state_of(backend)
    losses += [float(do_step(backend, loader, step).loss) for step in (3, 4)]
    other = TorchBackend(config, ranks)
    other.load(folder / "saved")
    loaded = same(state_of(other), then)
    again = [float(do_step(other, loader, step).loss) for step in (3, 4)]
    other.export(folder / "hf" if ranks.main else None)
    other.export_adapter(folder / "adapter" if ranks.main else None)
    last = backend.sequence_logprobs(batch).tolist()
    return {"losses": losses, "loaded": loaded, "again": again, "reference": (first, last), "state": then}


@pytest.mark.parametrize("spread", SHARDED_OR_NOT)
def test_reference_checkpoints_and_folders_are_those_of_one_rank(
    two_ranks: RankPool,
    recipe: Callable[..., RunConfig],  # noqa: F811
    tmp_path: Path,
    spread: str,
) -> None:
    config = recipe(*LORA, *SHARDED_OR_NOT[spread])
    theirs = around(ONE, recipe(*LORA), tmp_path / "one")
    for ours in two_ranks(around, config, tmp_path / "two"):
        assert ours["loaded"] and ours["again"] == ours["losses"][3:]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=TOLERANCE)
        assert ours["reference"][0] == ours["reference"][1] == theirs["reference"][0] == theirs["reference"][1]
    for file in ("hf/model.safetensors", "adapter/adapter_model.safetensors"):
        mine, other = (load_file(tmp_path / name / file) for name in ("two", "one"))
        assert mine.keys() == other.keys()
        for name, x in mine.items():
            torch.testing.assert_close(x, other[name], rtol=1e-4, atol=1e-5)
    backend = TorchBackend(recipe(*LORA), ONE)
    backend.load(tmp_path / "two" / "saved")
    assert same(state_of(backend), ours["state"])


def other_adapters(ranks: Ranks, config: RunConfig, folder: Path) -> tuple[str, str, int]:
    backend = TorchBackend(config, ranks)
    return raised(lambda: backend.load(folder))


def test_other_adapters_are_refused_on_every_rank(
    two_ranks: RankPool,
    recipe: Callable[..., RunConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    around(ONE, recipe(*LORA), tmp_path)
    for kind, text, code in two_ranks(other_adapters, recipe(*LORA, "model.lora.rank=5"), tmp_path / "saved"):
        assert (kind, code) == ("UserError", 2) and "than this run's (rank 5 on 14 layers" in text
