"""Checkpoints of the Megatron backend: resumed bit for bit in their own layout, and to rounding in any other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_ranks
import pytest
from megatron_ranks import LAYOUTS, close, in_layout
from rank_pool import RankPool

import engine
from engine.config.schema import RunConfig
from engine.errors import UserError
from engine.ranks import Ranks
from tests.conftest import ROOT, read_metrics

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

DROPOUT = "model.config_overrides.attention_dropout=0.2"
OTHERS = {"tp·pp": ["one rank", "dp·tp", "tp·cp", "pp+virtual"], "dp·tp": ["tp·pp", "pp"], "one rank": ["tp·pp"]}


@pytest.fixture
def half(
    recipes: Callable[..., RunConfig],
    ranks: dict[int, RankPool],
    tmp_path: Path,
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Return a checkpoint after two steps in a layout, and what four steps gave there."""

    def make(layout: str, *more: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        pool = ranks[LAYOUTS[layout][0]]
        whole = pool(saved_on_the_way, recipes("sft", *in_layout(layout), *more), folder)[0]
        return folder, whole

    return make


def saved_on_the_way(ranks: Ranks, config: RunConfig, folder: Path) -> dict[str, Any]:
    return megatron_ranks.train(ranks, config, save=(2, folder))


def resumed(ranks: Ranks, config: RunConfig, folder: Path) -> dict[str, Any]:
    return megatron_ranks.train(ranks, config, range(2, 4), resume=folder)


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_the_same_layout_goes_on_bit_for_bit_with_dropout(
    layout: str,
    half: Callable[..., tuple[Path, dict[str, Any]]],
    recipes: Callable[..., RunConfig],
    ranks: dict[int, RankPool],
) -> None:
    folder, whole = half(layout, DROPOUT)
    for found in ranks[LAYOUTS[layout][0]](resumed, recipes("sft", *in_layout(layout), DROPOUT), folder):
        assert found["losses"] == whole["losses"][2:]
        assert found["norms"] == whole["norms"][2:]


@pytest.mark.parametrize(("written", "read"), [(a, b) for a, all_b in OTHERS.items() for b in all_b])
def test_another_layout_goes_on_to_rounding(
    written: str,
    read: str,
    half: Callable[..., tuple[Path, dict[str, Any]]],
    recipes: Callable[..., RunConfig],
    ranks: dict[int, RankPool],
) -> None:
    folder, whole = half(written)
    found = ranks[LAYOUTS[read][0]](resumed, recipes("sft", *in_layout(read)), folder)[0]
    assert close(found["losses"], whole["losses"][2:])
    assert close(found["norms"], whole["norms"][2:])


def test_a_checkpoint_holds_no_pickle(half: Callable[..., tuple[Path, dict[str, Any]]]) -> None:
    folder, _ = half("tp·pp")
    names = {re.sub(r"\d+", "N", f.name) for f in folder.iterdir()}
    assert names == {
        "shard-N-model-N-of-N.safetensors",
        "config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def refused(ranks: Ranks, config: RunConfig, folder: Path) -> str:
    try:
        resumed(ranks, config, folder)
    except UserError as error:
        return str(error)
    raise AssertionError("it was not refused")


def test_a_checkpoint_of_another_model_is_refused(
    half: Callable[..., tuple[Path, dict[str, Any]]],
    recipes: Callable[..., RunConfig],
    ranks: dict[int, RankPool],
) -> None:
    folder, _ = half("one rank")
    wider = ["model.init=random", "model.config_overrides.intermediate_size=96"]
    recipe = recipes("sft", *in_layout("tp+sp"), *wider)
    said = f"{folder}: the checkpoint is of another model than {recipe.model.path}; choose the run's own recipe."
    assert ranks[2](refused, recipe, folder) == [said] * 2


TENSOR_PARALLEL = ["backend=megatron", "backend.tensor_parallel=2"]


@pytest.fixture(scope="module")
def long_run(words: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Return the overrides of a run of twelve steps, without a backend."""

    def make(folder: Path, *more: str) -> list[str]:
        own = [*words("sft"), "algorithm.max_num_steps=12", "checkpoint.period=2", f"run.dir={folder}"]
        return list({o.split("=", 1)[0]: o for o in [*own, *more]}.values())

    return make


def test_a_rank_that_is_killed_changes_nothing(
    long_run: Callable[..., list[str]],
    engine_process: Callable[..., subprocess.Popen[str]],
    two_ranks: RankPool,
    tmp_path: Path,
) -> None:
    """kill -9 of a tensor-parallel rank in the middle of a step: Ray starts both again, from the last checkpoint."""
    assert two_ranks(megatron_ranks.whole_run, long_run(tmp_path / "whole", *TENSOR_PARALLEL, DROPOUT)) == [0, 0]
    (tmp_path / "disturb.py").write_text(
        "import os, signal\n"
        "from engine.types import Callback\n"
        "class Disturb(Callback):\n"
        "    def on_step_begin(self, control):\n"
        "        died = control.run_dir / 'died'\n"
        "        if control.rank == 1 and control.step == 7 and not died.exists():\n"
        "            died.write_text('')\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ray = ["cluster=ray_local", "cluster.num_workers=2", "cluster.max_failures=1", "run.callbacks=[disturb:Disturb]"]
    killed_run = long_run(tmp_path / "killed", *TENSOR_PARALLEL, DROPOUT, *ray)
    process = engine_process(killed_run, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert (tmp_path / "killed" / "died").exists()
    whole, killed = ([line["train/loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "killed"))
    assert killed == whole and len(whole) == 12


def test_a_run_moves_between_backends_through_hf(
    long_run: Callable[..., list[str]], one: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    first = tmp_path / "megatron"
    short = "algorithm.max_num_steps=2"
    assert two_ranks(megatron_ranks.whole_run, long_run(first, *TENSOR_PARALLEL, short)) == [0, 0]
    out = tmp_path / "exported"
    run = [sys.executable, "-m", "engine.export", "--checkpoint", str(first), "--out", str(out)]
    subprocess.run(run, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    written, exported = (load_file(folder / "model.safetensors") for folder in (first / "hf", out))
    assert written.keys() == exported.keys() and all((x == exported[name]).all() for name, x in written.items())
    for backend in ("megatron", "torch"):
        one_more = [f"backend={backend}", f"model.path={first / 'hf'}", "algorithm.max_num_steps=1"]
        assert one(megatron_ranks.whole_run, long_run(tmp_path / backend / "again", *one_more)) == [0]
    ours, theirs = (read_metrics(tmp_path / name / "again")[0] for name in ("megatron", "torch"))
    assert close([ours["train/loss"], ours["train/grad_norm"]], [theirs["train/loss"], theirs["train/grad_norm"]])
    with pytest.raises(
        UserError, match=r"was written by backend=megatron; resume with that, or start a new run from its hf/"
    ):
        engine.run(long_run(first, "backend=torch", "cluster=local", "algorithm.max_num_steps=3"))
