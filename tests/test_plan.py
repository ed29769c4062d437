"""The plan: what it says before anything runs against what runs; what does not fit, and what then does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from engine import plan as planning
from engine.config.compose import compose
from engine.config.known_models import MODELS
from engine.config.schema import RunConfig
from engine.errors import UserError
from engine.plan import Plan, plan
from tests.conftest import ROOT, read_metrics

EIGHT = ["cluster=ray_local", "cluster.gpus_per_node=8"]
RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))


def config_of(*words: str) -> RunConfig:
    return compose(list(words)).config


def planned(*words: str, card_gb: float = 80.0) -> Plan:
    return plan(config_of(*words), card_gb=card_gb)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits(recipe: str) -> None:
    found = planned(f"recipe={recipe}")
    assert found.fits and found.problem is None and found.memory is not None


def test_every_model_of_the_group_is_known_without_a_download() -> None:
    names = {file.stem for file in (ROOT / "conf" / "model").glob("*.yaml")} - {"tiny"}
    paths = {config_of(f"model={name}").model.path for name in names}
    assert paths == MODELS.keys()


def test_what_the_model_alone_forbids_is_said_though_it_is_not_here() -> None:
    words = ["model=llama3_8b", "backend=megatron", "cluster=ray_local", "cluster.gpus_per_node=3"]
    with pytest.raises(UserError, match="tensor_parallel=3 does not divide the model's 32 attention heads"):
        planned(*words, "backend.tensor_parallel=3")


def test_one_change_is_enough_and_the_least_is_named() -> None:
    words = ["model=llama3_8b", *EIGHT, "data.packing.max_tokens=16384"]
    found = planned(*words)
    assert not found.fits and found.change == ("model.recompute=full",)
    assert planned(*words, *found.change).fits
    less = planned(*words, "model.recompute=full", card_gb=32)
    assert less.change == ("data.packing.max_tokens=8192",)
    assert planned(*words, "model.recompute=full", *less.change, card_gb=32).fits


def test_changes_are_put_together_where_none_is_enough_alone() -> None:
    words = ["model=llama3_8b", *EIGHT, "backend=megatron", "data.max_length=8192", "data.packing.max_tokens=65536"]
    found = planned(*words, card_gb=48)
    assert found.change is not None and len(found.change) > 1
    assert planned(*words, *found.change, card_gb=48).fits
    for word in found.change:
        assert not planned(*words, *(w for w in found.change if w != word), card_gb=48).fits


def test_changes_of_the_torch_backend() -> None:
    whole = planned("model=llama3_1b", *EIGHT, "backend.torch.shard_size=1", card_gb=24)
    assert whole.change is not None and whole.change[0].startswith("backend.torch.shard_size=")
    assert planned("model=llama3_8b").change == ("model.lora.enabled=true",)
    assert "does not fit" in planning.text(planned("model=llama3_8b"))
    hopeless = planned("model=llama3_70b", card_gb=8)
    assert hopeless.change is None and "take more devices" in str(hopeless.problem)


def test_more_machines_are_the_last_thing_asked_for() -> None:
    words = ["recipe=sft_llama3_70b_8x8_megatron", "cluster=slurm_4x8"]
    found = planned(*words, card_gb=30)
    assert found.change is not None
    assert planned(*words, *found.change, card_gb=30).fits


def test_memory_of_the_torch_backend() -> None:
    def memory(*words: str) -> dict[str, float]:
        found = planned("model=llama3_8b", *words).memory
        assert found is not None
        return found._asdict()

    whole, spread = memory("cluster=local"), memory(*EIGHT)
    n = planned("model=llama3_8b").parameters or 0
    assert (whole["weights"], whole["gradients"], whole["optimizer"]) == (2 * n, 4 * n, 12 * n)
    assert spread["optimizer"] == 12 * n / 8 and spread["weights"] < whole["weights"] / 4
    assert spread["activations"] == whole["activations"] and spread["output"] == whole["output"]
    offloaded = memory(*EIGHT, "backend.torch.cpu_offload=true")
    assert not offloaded["optimizer"] and offloaded["gradients"] < spread["gradients"]
    assert memory(*EIGHT, "backend.torch.reshard_after_forward=false")["weights"] > 2 * n
    assert memory("cluster=local", "model.recompute=full")["activations"] < whole["activations"] / 5
    adapters = memory("cluster=local", "model.lora.enabled=true")
    assert 2 * n < adapters["weights"] < 2.02 * n and adapters["optimizer"] < 0.2 * n
    assert memory("cluster=local", "model.dtype=float32")["activations"] > 1.9 * whole["activations"]


def test_adapters_are_those_of_the_model() -> None:
    import torch

    from engine.backends import hf_model, lora

    for target in ("null", "[q_proj,down_proj]"):
        config = config_of("model=tiny", "data=dummy", "model.lora.enabled=true", f"model.lora.target_modules={target}")
        lm = hf_model.skeleton(config.model, attention="eager")
        lora.inject(config.model, lm, torch.float32)
        assert plan(config).trained == sum(p.numel() for p in lm.parameters() if p.requires_grad)


@pytest.mark.parametrize("more", [[], ["data.packing.enabled=false", "train.micro_batch_size=2"]])
def test_steps_and_tokens_are_those_of_the_run(base: list[str], tmp_path: Path, more: list[str]) -> None:
    words = [*base, *more, f"run.dir={tmp_path / 'run'}", "algorithm.max_num_steps=null", "algorithm.max_num_epochs=1"]
    words.append(f"data.cache_dir={tmp_path / 'cache'}")
    before = plan(config_of(*words))
    assert before.horizon is None and before.steps is None and "engine.cache build" in planning.text(before)
    assert engine.run(words) == 0
    done, found = read_metrics(tmp_path / "run"), plan(config_of(*words)).horizon
    assert found is not None and found.steps == len(done) == 5
    assert found.tokens == sum(line["train/tokens"] for line in done)
    assert found.conversations == 40 and found.micro_steps == (4 if more else 1)
    other = plan(config_of(*words, "data.max_length=128"))
    assert other.horizon is None  # tokenised otherwise


def test_tokens_of_pairs(dpo: list[str], tmp_path: Path) -> None:
    words = [*dpo, f"run.dir={tmp_path / 'run'}", "algorithm.max_num_steps=null", "algorithm.max_num_epochs=1"]
    assert engine.run(words) == 0
    found, done = plan(config_of(*words)), read_metrics(tmp_path / "run")
    assert found.horizon is not None and found.steps == len(done) == 5
    assert found.horizon.tokens == sum(line["train/tokens"] for line in done)
    assert "40 pairs" in planning.text(found)


def test_made_up_data_are_known_at_once() -> None:
    found = planned("model=llama3_8b", "data=dummy", *EIGHT, "data.max_length=1024", "algorithm.max_num_steps=100")
    assert found.horizon is not None and found.horizon.tokens == 100 * 32 * 1024


def test_time_is_told_by_a_measured_rate_alone(tmp_path: Path) -> None:
    words = ["model=llama3_8b", "data=dummy", *EIGHT, "data.max_length=1024", "algorithm.max_num_steps=100"]
    found = planned(*words)
    assert "time" not in planning.text(found)
    rates = [1.0] * 10 + [1000.0] * 21
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, planning.RATE: r}) + "\n" for r in rates))
    assert "about 0.1 hours at the 1,000 tokens a second and device" in planning.text(found, tmp_path)
    with pytest.raises(UserError, match="no metrics.jsonl"):
        planning.text(found, tmp_path / "none")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="has no perf/tokens_per_second_per_device"):
        planning.text(found, tmp_path)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=120)


def test_the_command() -> None:
    fits = command("-m", "engine.plan", "recipe=sft_llama3_8b_1x8")
    assert fits.returncode == 0 and "fits" in fits.stdout and "cards of 80 GB are assumed" in fits.stdout
    large = command("-m", "engine.plan", "recipe=sft_llama3_8b_1x8", "--card", "24")
    assert large.returncode == 1 and large.stderr.startswith("error: memory: a device needs")
    assert "assumed" not in large.stdout
    wrong = command("-m", "engine.plan", "recipe=sft_llama3_8b_1x8_megatron", "backend.tensor_parallel=3")
    assert wrong.returncode == 2 and "needs a multiple of 3 ranks" in wrong.stderr and not wrong.stdout
    card = command("-m", "engine.plan", "--card", "0")
    assert card.returncode == 2 and "--card 0" in card.stderr


def test_nothing_heavy_is_imported() -> None:
    code = """
import sys
from engine.plan import main
assert main(["recipe=sft_llama3_8b_1x8"]) == 0
print(sorted({"torch", "ray", "transformers", "datasets", "megatron", "pandas"} & set(sys.modules)))
"""
    done = command("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
