"""A run from the command line to its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.checkpoint import read_state
from engine.errors import RunError, UserError
from tests.conftest import ROOT, SHARED_DATA, TASKS, read_metrics


@pytest.fixture(scope="module")
def finished(base: list[str], rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation at the start, along the way and at the end."""
    folder = tmp_path_factory.mktemp("finished")
    more = [
        "algorithm.val_period=2",
        "algorithm.val_at_start=true",
        "algorithm.val_at_end=true",
        f"data.val_path={rows_file}",
    ]
    assert engine.run([*base, *more, "algorithm.max_num_steps=5", "logger=console", f"run.dir={folder}"]) == 0
    return folder


def test_run_folder_is_complete(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names == {".lock", "recipe.yaml", "lock.json", "data.txt", "metrics.jsonl", "checkpoints", "hf", "log.txt"}
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step_00000004", "step_00000005"]
    lock = json.loads((finished / "lock.json").read_text())
    assert lock["samples"]["train"]["used"] == 40 and lock["versions"]["torch"] == torch.__version__
    assert set(lock) == {"data", "weights", "code", "versions", "hardware", "samples"}
    log = (finished / "log.txt").read_text()
    assert "40 of 40 rows used" in log and "done: 5 steps" in log and "\x1b" not in log


def test_metrics_have_the_names_of_the_contract(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5]
    names = "loss grad_norm lr tokens trained_tokens epoch total_tokens".split()
    perf = "tokens_per_second tokens_per_second_per_device step_s memory_gb padding_share".split()
    for line in train:
        assert {f"train/{n}" for n in names} | {f"perf/{n}" for n in perf} <= set(line)
        assert line["perf/padding_share"] == 0.0 and 0 < line["train/trained_tokens"] < line["train/tokens"]
    assert train[-1]["train/total_tokens"] == sum(line["train/tokens"] for line in train)
    assert train[-1]["train/epoch"] == 1.0
    assert [line["step"] for line in lines if "validation/loss" in line] == [0, 2, 4, 5]
    assert train[-1]["train/loss"] < train[0]["train/loss"]


def test_state_of_a_checkpoint(finished: Path) -> None:
    state = json.loads((finished / "checkpoints" / "step_00000005" / "state.json").read_text())
    train = read_metrics(finished)
    assert state["step"] == state["total_steps"] == 5 and state["epoch"] == 1.0 and state["consumed_samples"] == 40
    assert state["total_valid_tokens"] == sum(line["train/trained_tokens"] for line in train)
    assert state["val_loss"] is not None
    files = [p for p in (finished / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jinja"}  # nothing that is unpickled
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in files)
    assert [p.name for p in files if p.suffix == ".safetensors"] == ["shard-00001-model-00001-of-00001.safetensors"] * 2


def test_manifest_of_a_checkpoint_has_size_and_checksum_of_every_file(finished: Path) -> None:
    folder = finished / "checkpoints" / "step_00000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("manifest.json", "state.json")}
    assert manifest == {name: [len(words), zlib.crc32(words)] for name, words in files.items()}


def test_validation_loss_is_that_of_the_whole_set(finished: Path, rows_file: Path) -> None:
    """One forward pass over each row with transformers alone gives the same figure."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm: Any = AutoModelForCausalLM.from_pretrained(finished / "hf")
    tokenizer: Any = AutoTokenizer.from_pretrained(finished / "hf")
    total, count = 0.0, 0
    for line in rows_file.read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()
        with torch.no_grad():
            logprobs = lm(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        total -= float(logprobs[mask[1:]].sum())
        count += int(mask[1:].sum())
    assert read_state(finished / "checkpoints" / "step_00000005").val_loss == pytest.approx(total / count, rel=1e-5)


def test_recipe_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    assert engine.run([f"recipe={finished / 'recipe.yaml'}", f"run.dir={tmp_path}"]) == 0
    ours, theirs = read_metrics(tmp_path), read_metrics(finished)
    assert [line["train/loss"] for line in ours] == [line["train/loss"] for line in theirs]
    locks = [json.loads((folder / "lock.json").read_text()) for folder in (tmp_path, finished)]
    assert locks[0]["data"] == locks[1]["data"] and locks[0]["weights"] == locks[1]["weights"]
    assert (tmp_path / "recipe.yaml").read_text() == (finished / "recipe.yaml").read_text()


def test_export_equals_hf(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from engine.export import main

    assert main(["--checkpoint", str(finished), "--out", str(tmp_path / "out")]) == 0
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(finished / "hf" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (finished / "hf").iterdir()}
    assert main(["--checkpoint", str(finished), "--out", str(tmp_path / "out")]) == 2
    assert main(["--checkpoint", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")]) == 2


def test_bfloat16_run_exports_bfloat16_and_resumes(base: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    overrides = [
        *base,
        "model.dtype=bfloat16",
        "scheduler=constant",
        "scheduler.warmup_ratio=0",
        f"run.dir={tmp_path / 'a'}",
    ]
    assert engine.run([*overrides, "algorithm.max_num_steps=2"]) == 0
    assert engine.run(overrides) == 0
    assert engine.run([*overrides[:-1], f"run.dir={tmp_path / 'b'}"]) == 0
    losses = [[line["train/loss"] for line in read_metrics(tmp_path / run)] for run in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert {w.dtype for w in load_file(tmp_path / "a" / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "a" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_needs_the_checkpoint_alone(base: list[str], tmp_path: Path, model_folder: Path) -> None:
    """In the type it was trained in, with the template it was trained with, wherever the checkpoint was moved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine.export import export

    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}")
    overrides = [*base, "model.dtype=bfloat16", f"model.chat_template={template}", f"run.dir={tmp_path / 'run'}"]
    assert engine.run(overrides) == 0
    moved = (tmp_path / "run" / "checkpoints" / "step_00000004").rename(tmp_path / "moved")
    text = template.read_text()
    template.unlink()
    export(moved, tmp_path / "out")
    lm: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert lm.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == text


def test_generate_answers(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from engine.generate import main

    assert main(["--model", str(finished / "hf"), "--prompt", "hello", "--max-new-tokens", "4"]) == 0
    assert main(["--model", str(finished)]) == 2
    assert f"{finished}/hf does" in capsys.readouterr().err
    assert main(["--model", str(finished / "hf"), "--prompt", "hello", "--max-new-tokens", "0"]) == 2
    assert "--max-new-tokens 0: give 1 or more." in capsys.readouterr().err


def test_folders_of_a_run_that_hold_no_model_are_told_apart(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.config.compose import compose
    from engine.generate import main

    checkpoint = finished / "checkpoints" / "step_00000005"
    made = (
        f"a checkpoint, no model folder; python -m engine.export --checkpoint {checkpoint} --out DIR makes one of it."
    )
    for folder, sentence in (
        (checkpoint, made),
        (finished, f"a run folder; give that of its model, {finished / 'hf'}."),
    ):
        for words, key in (
            (["model.path="], "model.path"),
            (["algorithm=dpo", "model=tiny", "algorithm.reference="], "algorithm.reference"),
        ):
            with pytest.raises(UserError) as refused:
                compose(["data=task_pairs", f"run.dir={tmp_path}", *words[:-1], f"{words[-1]}{folder}"])
            assert f"{key}={folder}: {sentence}" in str(refused.value)
    assert main(["--model", str(checkpoint), "--prompt", "hello"]) == 2
    assert f"--model {checkpoint}: {made}" in capsys.readouterr().err
    (tmp_path / "runs").symlink_to(finished.parent)
    monkeypatch.chdir(tmp_path)  # a path that could be a hub id, and is a folder here
    assert main(["--model", f"runs/{finished.name}", "--prompt", "hello"]) == 2
    assert "hf does." in capsys.readouterr().err


@pytest.mark.skipif(not (SHARED_DATA / "alpaca_en_demo.json").is_file(), reason="the demo data is not here")
def test_alpaca_loss_falls(tmp_path: Path) -> None:
    overrides = [
        "data=alpaca",
        f"data.train_path={SHARED_DATA / 'alpaca_en_demo.json'}",
        "model=tiny",
        "data.max_length=192",
        "data.overlong=truncate",
        "train.global_batch_size=8",
        "algorithm.max_num_steps=40",
        "optimizer.lr=3e-3",
        "logger.backends=[]",
        f"run.dir={tmp_path}",
    ]
    assert engine.run(overrides) == 0
    losses = [line["train/loss"] for line in read_metrics(tmp_path)]
    means = [sum(losses[i : i + 10]) / 10 for i in range(0, 40, 10)]
    assert means == sorted(means, reverse=True) and means[-1] < 0.6 * losses[0]


def test_callbacks_see_and_ask(
    base: list[str], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "watcher.py").write_text(
        "import json\n"
        "from engine.types import Callback\n"
        "EVENTS = []\n"
        "def note(name):\n"
        "    def method(self, control, *what):\n"
        "        EVENTS.append((name, control.step))\n"
        "        if name == 'on_log':\n"
        "            what[0]['train/mine' if 'train/loss' in what[0] else 'validation/mine'] = 42.0\n"
        "        if name == 'on_step_end':\n"
        "            control.should_evaluate = control.step == 1\n"
        "            control.should_save = control.step == 2\n"
        "            control.should_stop = control.step == 6\n"
        "    return method\n"
        "names = [n for n in dir(Callback) if n.startswith('on_')]\n"
        "Watcher = type('Watcher', (Callback,), {n: note(n) for n in names})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [
        *(o for o in base if not o.startswith("checkpoint.period")),
        "checkpoint.period=0",
        "algorithm.max_num_steps=9",
        f"data.val_path={rows_file}",
        "run.callbacks=[watcher:Watcher]",
    ]
    assert engine.run([*overrides, f"run.dir={tmp_path / 'run'}"]) == 0
    events = __import__("watcher").EVENTS
    assert [step for name, step in events if name == "on_evaluate"] == [1]
    assert [step for name, step in events if name == "on_save"] == [2, 6]
    assert [step for name, step in events if name == "on_epoch_begin"] == [0, 5]
    assert [step for name, step in events if name == "on_epoch_end"] == [5]
    assert [e for e in events if "train" in e[0]] == [("on_train_begin", 0), ("on_train_end", 6)]
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 6 and all(line["train/mine"] == 42.0 for line in lines)
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="cannot be imported"):
        engine.run([*base, "run.callbacks=[watcher:Nobody]", f"run.dir={tmp_path / 'x'}"])
    with pytest.raises(UserError, match="is no engine.types.Callback"):
        engine.run([*base, "run.callbacks=[json:JSONDecoder]", f"run.dir={tmp_path / 'y'}"])


def test_keep_best_by_the_validation_since_the_last_save(base: list[str], rows_file: Path, tmp_path: Path) -> None:
    """A metric that gets worse: the best checkpoint is an early one, and those without a validation of their own do not count."""
    overrides = [
        *base,
        f"data.val_path={rows_file}",
        "algorithm.max_num_steps=8",
        "algorithm.val_period=2",
        "checkpoint.keep_last=1",
        "checkpoint.keep_best=2",
        "checkpoint.mode=max",
        f"run.dir={tmp_path}",
    ]
    assert engine.run(overrides) == 0
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["step_00000002", "step_00000004", "step_00000008"]
    losses = [read_state(p).metric for p in kept]
    assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]


def test_epochs_and_partial_batches(base: list[str], tmp_path: Path) -> None:
    overrides = [o for o in base if "max_num" not in o] + ["train.global_batch_size=16", "checkpoint.period=0"]
    for drop_last, steps, samples in (("true", 2, 32), ("false", 3, 40)):
        folder = tmp_path / drop_last
        assert engine.run([*overrides, f"data.drop_last={drop_last}", f"run.dir={folder}"]) == 0
        state = read_state(sorted((folder / "checkpoints").iterdir())[-1])
        assert (state.step, state.consumed_samples, state.epoch) == (steps, samples, 1.0)
    with pytest.raises(
        UserError, match=r"train.global_batch_size=64 is more than the 40 conversations of an epoch: lower it to 40"
    ):
        engine.run([*overrides, "train.global_batch_size=64", f"run.dir={tmp_path / 'none'}"])


def test_sweep_runs_every_point_in_its_own_folder(base: list[str], tmp_path: Path) -> None:
    words = [*base, f"run.dir={tmp_path / 'sweep'}", "-m", "optimizer.lr=1e-3,2e-3", "algorithm.max_num_steps=1"]
    command = [sys.executable, "-m", "engine", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "sweep").glob("0*"))
    assert [f.name for f in folders] == ["000", "001"]
    assert [read_metrics(f)[0]["train/lr"] for f in folders] == [1e-3, 2e-3]
    assert "001 optimizer.lr=0.002: done" in done.stdout


def test_same_seed_same_run_other_seed_other_order(base: list[str], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert engine.run([*base, f"run.seed={seed}", f"run.dir={tmp_path / name}"]) == 0
    losses = [[line["train/loss"] for line in read_metrics(tmp_path / name)] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]


def test_custom_and_null_templates_reach_hf(base: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}")
    assert engine.run([*base, f"model.chat_template={template}", f"run.dir={tmp_path / 'file'}"]) == 0
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "file" / "hf")
    assert tokenizer.chat_template == template.read_text()
    assert engine.run([*base, "model.chat_template=null", "data.add_eos=true", f"run.dir={tmp_path / 'null'}"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "null" / "hf")
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a "}, {"role": "assistant", "content": "b"}], tokenize=False
    )
    assert said == "a b"


def test_out_of_memory_names_the_smallest_change(base: list[str], tmp_path: Path) -> None:
    """A process with too little address space: a sentence with a key to set, exit code 1."""
    (tmp_path / "squeeze.py").write_text(
        "import resource\n"
        "from engine.types import Callback\n"
        "class Squeeze(Callback):\n"
        "    def on_train_begin(self, control):\n"
        "        used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (used + 3_000_000, -1))\n"
    )
    words = [
        *base,
        "run.callbacks=[squeeze:Squeeze]",
        "train.global_batch_size=32",
        "model.init=random",
        f"run.dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "engine", *words, "model.config_overrides={hidden_size: 512, intermediate_size: 2048}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "error: out of memory: set data.packing.max_tokens=2048" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"hidden_size": 64}, "weights are missing or of another shape"),
        ({"hidden_sise": 64}, "did you mean hidden_size?"),
    ],
)
def test_config_overrides_are_checked(base: list[str], tmp_path: Path, change: dict[str, int], answer: str) -> None:
    ((key, value),) = change.items()
    with pytest.raises(UserError, match=answer.replace("?", r"\?")):
        engine.run([*base, f"model.config_overrides={{{key}: {value}}}", f"run.dir={tmp_path}"])


def test_damaged_weights_are_named(base: list[str], model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    others = [o for o in base if not o.startswith("model.path")]
    with pytest.raises(UserError, match=r"model.path=.*: the model cannot be loaded"):
        engine.run([*others, f"model.path={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}"])


def test_hub_data_without_network_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"someone/set is neither a file here nor a data set that the hub or its cache has"
    ):
        engine.run(["model=tiny", "data.train_path=someone/set", f"run.dir={tmp_path}"])


def test_hub_model_without_network_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"someone/model: neither a folder here nor in the hub's cache"):
        engine.run([*TASKS, "model.path=someone/model", f"run.dir={tmp_path}"])


def test_hub_model_from_the_cache_layout(
    base: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that the hub's cache holds is loaded by its id, offline."""
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / ("0" * 40)
    shutil.copytree(model_folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    others = [o for o in base if not o.startswith("model.path")]
    assert (
        engine.run([*others, "model.path=someone/small", f"run.dir={tmp_path / 'run'}", "algorithm.max_num_steps=1"])
        == 0
    )
