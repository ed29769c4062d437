"""DPO from recipe to weights: the same loop as SFT, the reference computed once, the same numbers in every layout."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.backends.torch_backend import TorchBackend
from engine.config.compose import compose
from engine.data.assemble import assemble
from engine.data.loader import train_loader
from engine.errors import RunError, UserError
from engine.schedule import learning_rate
from tests.conftest import ROOT, SHARED_DATA, read_metrics

STEPS = 6
DEMO = SHARED_DATA / "dpo_en_demo.json"
CHECK = 2 * 3
"""Documents that are computed again to see whether what is there is the model's."""


def losses(run_dir: Path) -> list[float]:
    return [m["train/loss"] for m in read_metrics(run_dir)]


def run(words: list[str], folder: Path, *more: str) -> list[float]:
    assert engine.run([*words, f"run.dir={folder}", *more]) == 0
    return losses(folder)


def test_the_first_loss_is_ln_2_and_figures_are_those_of_the_contract(
    dpo: list[str], pairs_file: Path, tmp_path: Path
) -> None:
    validation = [f"data.val_path={pairs_file}", "algorithm.val_at_start=true", "algorithm.val_at_end=true"]
    found = run(dpo, tmp_path / "run", *validation)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1] < 0.67
    lines = read_metrics(tmp_path / "run")
    names = {
        "preference_loss",
        "sft_loss",
        "accuracy",
        "rewards_chosen_mean",
        "rewards_rejected_mean",
        "margin",
        "num_valid_samples",
    }
    for line in lines:
        assert {f"train/{name}" for name in names} <= set(line)
        assert line["train/num_valid_samples"] == 8
        assert line["train/margin"] == pytest.approx(
            line["train/rewards_chosen_mean"] - line["train/rewards_rejected_mean"], abs=1e-5
        )
    assert lines[0]["train/accuracy"] <= 1 and lines[-1]["train/accuracy"] > 0.7
    first, last = read_metrics(tmp_path / "run", "validation/loss")
    assert first["validation/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["validation/num_valid_samples"] == 40 and last["validation/accuracy"] > 0.6
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
    assert state["consumed_samples"] == 8 * STEPS


def test_every_layout_has_the_same_losses(dpo: list[str], tmp_path: Path) -> None:
    packed = run(dpo, tmp_path / "packed")
    narrow = run(dpo, tmp_path / "narrow", "data.max_length=192", "data.packing.max_tokens=384")
    padded = run(dpo, tmp_path / "padded", "data.packing.enabled=false", "train.micro_batch_size=4")
    single = run(dpo, tmp_path / "single", "data.packing.enabled=false", "train.micro_batch_size=1")
    apart = run(dpo, tmp_path / "apart", "data.packing.share_prompts=false")
    assert read_metrics(tmp_path / "padded")[0]["perf/padding_share"] > 0
    tokens = {name: read_metrics(tmp_path / name)[0]["train/tokens"] for name in ("packed", "apart", "padded")}
    assert tokens["packed"] < 0.8 * tokens["apart"] == 0.8 * tokens["padded"]
    for other in (narrow, padded, single, apart):
        assert other == pytest.approx(packed, rel=1e-5)


def test_a_resumed_run_is_the_undisturbed_one(dpo: list[str], tmp_path: Path, passes: list[int]) -> None:
    """The reference is that of the first weights, not of the checkpoint's; it is not computed again."""
    whole = run(dpo, tmp_path / "whole", "model.config_overrides={attention_dropout: 0.1}")
    passes.clear()
    words = [*dpo, "model.config_overrides={attention_dropout: 0.1}", f"data.cache_dir={tmp_path / 'other'}"]
    horizon = ["scheduler.warmup_steps=0", "scheduler=constant"]
    run(words, tmp_path / "half", *horizon, "algorithm.max_num_steps=3")
    assert sum(passes) == 2 * 8 * 3
    passes.clear()
    again = run(words, tmp_path / "half", *horizon)
    assert (
        sum(passes) == 2 * (40 - 24) + CHECK
    )  # those that the first half has not seen; of 48 draws 40 are different pairs
    fresh = run(words, tmp_path / "fresh", *horizon)
    assert again == fresh and len(again) == STEPS
    one, other = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("half", "fresh"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole[0] == pytest.approx(math.log(2), abs=0.05)  # dropout is on in training, off in the reference


def test_a_sweep_over_beta_computes_the_reference_once(dpo: list[str], tmp_path: Path, passes: list[int]) -> None:
    for i, beta in enumerate((0.05, 0.1, 0.2)):
        run(dpo, tmp_path / f"{i}", f"algorithm.reference_policy_kl_penalty={beta}")
        said = (tmp_path / f"{i}" / "log.txt").read_text()
        if i:
            assert "reference: all 80 log-probabilities of train are there" in said and "computing" not in said
            assert sum(passes) == CHECK
        else:
            assert "reference: computing 80 of 80 log-probabilities" in said and sum(passes) == 80
        passes.clear()
    assert len({losses(tmp_path / f"{i}")[-1] for i in range(3)}) == 3


def test_records_that_are_missing_or_damaged_are_computed_again(
    dpo: list[str], tmp_path: Path, passes: list[int]
) -> None:
    first = run(dpo, tmp_path / "first")
    (file,) = (tmp_path / "cache" / "reference").glob("*/sums.bin")
    data = bytearray(file.read_bytes())
    data[8 * 5 + 1] ^= 4
    file.write_bytes(data[: 8 * 70])  # the last ten are lost, and one is not what it was
    passes.clear()
    assert run(dpo, tmp_path / "second") == first
    assert sum(passes) == 12 + CHECK  # a pair is computed whole
    assert "reference: 1 record in" in (tmp_path / "second" / "log.txt").read_text()


def test_another_models_reference_is_another(
    dpo: list[str], tmp_path: Path, passes: list[int], model_folder: Path
) -> None:
    run(dpo, tmp_path / "first")
    passes.clear()
    run(dpo, tmp_path / "second", f"model.path={tmp_path / 'first' / 'hf'}")
    assert sum(passes) == 80
    passes.clear()
    held = run(
        dpo, tmp_path / "third", f"model.path={tmp_path / 'first' / 'hf'}", f"algorithm.reference={model_folder}"
    )
    assert sum(passes) == CHECK  # that of the first run
    assert held[0] != pytest.approx(math.log(2), abs=1e-3)


def test_ten_steps_equal_plain_pytorch(dpo: list[str], tmp_path: Path) -> None:
    """DPO as anyone would write it: two models, one document at a time, full logits."""
    from transformers import AutoModelForCausalLM

    words = [
        *dpo,
        "algorithm.max_num_steps=10",
        "scheduler=constant",
        "scheduler.warmup_steps=0",
        "algorithm.sft_loss_weight=0.2",
    ]
    ours = run(words, tmp_path / "run")
    config = compose([*words, f"run.dir={tmp_path / 'plain'}"]).config
    data = assemble(config, tmp_path, lambda text: None).train
    loader = train_loader(data, config.data, batch_size=8, micro_batch_size=1, seed=0, together=2)
    load = AutoModelForCausalLM.from_pretrained
    policy, frozen = (load(config.model.path, dtype=torch.float32, attn_implementation="eager") for _ in range(2))
    decayed = [p for p in policy.parameters() if p.ndim > 1]
    others = [p for p in policy.parameters() if p.ndim <= 1]
    o = config.optimizer
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)

    def logprob(model: Any, document: int) -> torch.Tensor:
        sample = data[document]
        ids = torch.tensor(sample.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logits.gather(1, ids[0, 1:, None])[:, 0]
        return torch.cat([taken[a - 1 : b - 1] for a, b in sample.trained.tolist()]).sum()

    plain = []
    for step in range(10):
        total = torch.zeros(())
        for chosen, rejected in loader.documents(step).reshape(-1, 2).tolist():
            with torch.no_grad():
                held = logprob(frozen, chosen) - logprob(frozen, rejected)
            won = logprob(policy, chosen)
            margin = won - logprob(policy, rejected) - held
            total = total - torch.nn.functional.logsigmoid(0.1 * margin) - 0.2 * won
        loss = total / 8
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.train.max_grad_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step + 1, 10, o.lr, config.scheduler)
        adamw.step()
        plain.append(float(loss.detach()))
    assert ours == pytest.approx(plain, rel=1e-5)


def test_rows_that_are_no_pairs_are_refused(dpo: list[str], rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pair"):
        engine.run([*dpo, "data=messages", f"data.train_path={rows_file}", f"run.dir={tmp_path / 'run'}"])


def test_made_up_samples_are_no_pairs(dpo: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"algorithm=dpo: train has no pairs \(format dummy\); choose other data"):
        engine.run([*dpo, "data=dummy", "data.train_path=builtin:dummy", f"run.dir={tmp_path / 'run'}"])


def test_a_prompt_is_held_out_with_all_its_pairs(dpo: list[str], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {i}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(3) for i in range(40)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose([*dpo, f"data.train_path={file}", "data.val_fraction=0.3", f"run.dir={tmp_path / 'run'}"]).config
    (held,) = assemble(config, tmp_path, lambda text: None).validation[""].parts
    assert held.kept is not None and 9 <= len(held.kept) < 100
    kept = set(held.kept.tolist())
    assert all(({i, i + 40, i + 80} <= kept) == bool({i, i + 40, i + 80} & kept) for i in range(40))


def test_a_reference_that_is_not_finite_ends_the_run(
    dpo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        TorchBackend, "sequence_logprobs", lambda self, b: torch.full((len(b.targets.bounds) - 1,), math.nan)
    )
    with pytest.raises(RunError, match=r"the log-probability of answer 0 of train is not finite; look at the weights"):
        engine.run([*dpo, f"run.dir={tmp_path / 'run'}"])


@pytest.mark.skipif(not DEMO.is_file(), reason="needs ../shared/data")
def test_a_hundred_real_pairs_are_learned(dpo: list[str], tmp_path: Path) -> None:
    """Those of the shortest prompts, over and over."""
    rows = json.loads(DEMO.read_text())
    file = tmp_path / "demo.json"
    file.write_text(json.dumps(sorted(rows, key=lambda r: sum(len(t["value"]) for t in r["conversations"]))[:100]))
    data = ["data=sharegpt", f"data.train_path={file}", "data.max_length=512", "data.overlong=truncate"]
    model = ["model.config_overrides={max_position_embeddings: 512}", "optimizer.lr=5e-3", "scheduler=constant"]
    sizes = ["train.global_batch_size=20", "algorithm.max_num_steps=20", "checkpoint.period=0"]
    run([*dpo, *data, *model, *sizes], tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert lines[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[4]["train/epoch"] == 1  # 5 steps of 20: all hundred are used
    assert sum(line["train/accuracy"] for line in lines[-5:]) / 5 > 0.9


def run_on_two_ranks(words: list[str], folder: Path) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "engine", *words, "cluster=env", f"run.dir={folder}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder)


def test_two_ranks_are_one(dpo: list[str], tmp_path: Path) -> None:
    """Two ranks share the pass of the reference too; sharded, so that all must take part in it."""
    one = run(dpo, tmp_path / "one")
    two = run_on_two_ranks([*dpo, f"data.cache_dir={tmp_path / 'other'}"], tmp_path / "two")
    assert "reference: computing 80 of 80" in (tmp_path / "two" / "log.txt").read_text()
    assert two == pytest.approx(one, rel=1e-5)
