"""What happens to real jobs: killed, stopped, started twice, resumed with another recipe, out of disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import engine
from engine.errors import RunError, UserError
from tests.conftest import read_metrics

STEPS = 12
MEASURED = ("perf/", "timing/", "host/", "device/")
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def long_run(base: list[str]) -> list[str]:
    """Twelve steps over two and a half epochs, with validation, a checkpoint a step and dropout, so that the random state counts."""
    rows = next(o.split("=", 1)[1] for o in base if o.startswith("data.train_path"))
    return [
        *base,
        f"algorithm.max_num_steps={STEPS}",
        "algorithm.val_period=3",
        f"data.val_path={rows}",
        "scheduler=cosine",
        "model.config_overrides={attention_dropout: 0.1}",
        "run.probe=false",
    ]


@pytest.fixture(scope="module")
def undisturbed(long_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert engine.run([*long_run, f"run.dir={folder}"]) == 0
    return folder


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """Everything in metrics.jsonl that is no measurement of time or memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]


def assert_same_run(folder: Path, other: Path) -> None:
    assert figures(folder) == figures(other)
    last = f"checkpoints/step_{STEPS:08d}"
    for ours, theirs in zip(
        (load_file(folder / "hf" / "model.safetensors"), state_of(folder / last)),
        (load_file(other / "hf" / "model.safetensors"), state_of(other / last)),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        assert all((ours[k] == theirs[k]).all() for k in ours)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What the one rank has written: weights, moments, steps and random state."""
    (file,) = checkpoint.glob("shard-*.safetensors")
    state = load_file(file)
    kinds = {name.split("/")[0] for name in state}
    assert kinds == {"model", "exp_avg", "exp_avg_sq", "optimizer", "skipped", "rng"}
    return state


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_and_resumed_equals_undisturbed(
    long_run: list[str], undisturbed: Path, tmp_path: Path, engine_process: Start, seed: int
) -> None:
    """kill -9 at a random step, resumed in another process: the same figures and weights, bit for bit."""
    step = random.Random(seed).randrange(1, STEPS - 2)
    process = engine_process([*long_run, f"run.dir={tmp_path}"])
    wait_for((tmp_path / "checkpoints" / f"step_{step:08d}").exists, process)
    process.kill()
    process.wait()
    reached = sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*"))
    assert reached and reached[-1] < f"step_{STEPS:08d}"
    assert engine.run([*long_run, f"run.dir={tmp_path}"]) == 0
    assert "resuming after step" in (tmp_path / "log.txt").read_text()
    assert_same_run(tmp_path, undisturbed)


def test_killed_during_a_checkpoint_leaves_the_one_before(
    long_run: list[str], undisturbed: Path, tmp_path: Path, engine_process: Start
) -> None:
    """A process that dies between two files of a checkpoint; what it left is no checkpoint and does not stay."""
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, signal\n"
        "from engine.types import Callback\n"
        "from engine.backends import hf_model\n"
        "class Killer(Callback):\n"
        "    def on_step_end(self, control):\n"
        "        if control.step == 5:\n"
        "            write = hf_model.write_description\n"
        "            def die(lm, tokenizer, folder, dtype):\n"
        "                if folder.name.endswith('step_00000005') and list(folder.glob('shard-*.safetensors')):\n"
        "                    os.kill(os.getpid(), signal.SIGKILL)\n"
        "                write(lm, tokenizer, folder, dtype)\n"
        "            hf_model.write_description = die\n"
    )
    run_dir = tmp_path / "run"
    process = engine_process([*long_run, f"run.dir={run_dir}", "run.callbacks=[killer:Killer]"], cwd=tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    partial = list((run_dir / "checkpoints").glob(".partial-*"))
    assert [p.name for p in partial] == [".partial-step_00000005"]
    assert [p.name.split("-")[0] for p in partial[0].iterdir()] == ["shard"]
    assert max(p.name for p in (run_dir / "checkpoints").glob("step_*")) == "step_00000004"
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  - killer:Killer\n", "").replace("callbacks:\n", "callbacks: []\n"))
    assert engine.run([*long_run, f"run.dir={run_dir}"]) == 0
    assert not list((run_dir / "checkpoints").glob(".partial-*"))
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda n: n.name)
def test_signal_saves_and_exits_75(
    long_run: list[str], undisturbed: Path, tmp_path: Path, engine_process: Start, number: signal.Signals
) -> None:
    overrides = [
        *(o for o in long_run if not o.startswith("checkpoint.period")),
        "checkpoint.period=0",
        f"run.dir={tmp_path}",
    ]
    process = engine_process([*overrides, "run.callbacks=[]"])
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(read_metrics(tmp_path)) >= 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    state = json.loads((saved / "state.json").read_text())
    assert 2 <= state["step"] < STEPS
    assert read_metrics(tmp_path)[-1]["step"] == state["step"]
    assert f"stopped by {number.name} after step {state['step']}" in (tmp_path / "log.txt").read_text()
    assert engine.run(overrides) == 0
    assert_same_run(tmp_path, undisturbed)


def test_signal_before_the_first_step_is_a_stop_too(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "early.py").write_text(
        "import os, signal\n"
        "from engine.types import Callback\n"
        "class Early(Callback):\n"
        "    def on_train_begin(self, control):\n"
        "        if not (control.run_dir / 'checkpoints' / 'step_00000000').exists():\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [*base, "run.callbacks=[early:Early]", f"run.dir={tmp_path / 'run'}"]
    assert engine.run(overrides) == 75
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000000"]
    assert engine.run(overrides) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_signal_while_preparing_ends_at_once_with_75(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reader.py").write_text(
        "import os, signal, time\n"
        "def slow(row):\n"
        "    os.kill(os.getpid(), signal.SIGUSR2)\n"
        "    time.sleep(1)\n"
        "    return row['messages']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert engine.run([*base, "data.reader=reader:slow", f"run.dir={tmp_path / 'run'}"]) == 75
    assert "stopped by SIGUSR2 before training began" in (tmp_path / "run" / "log.txt").read_text()


def test_error_in_a_reader_of_ones_own_names_the_row(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reader.py").write_text("def read(row):\n    return row['nowhere']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"rows.jsonl line 1: data.reader failed on this row \(KeyError\('nowhere'\)\)"):
        engine.run([*base, "data.reader=broken_reader:read", f"run.dir={tmp_path / 'run'}"])


def test_stop_asked_for_by_an_evaluation_is_saved_and_is_the_end(
    base: list[str], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stopper.py").write_text(
        "from engine.types import Callback\n"
        "class Stopper(Callback):\n"
        "    def on_evaluate(self, control, metrics):\n"
        "        control.should_stop = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [
        *(o for o in base if not o.startswith("checkpoint.period")),
        f"data.val_path={rows_file}",
        "algorithm.val_period=3",
        "run.callbacks=[stopper:Stopper]",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert engine.run(overrides) == 0
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = json.loads((saved / "state.json").read_text())
    assert saved.name == "step_00000003" and state["finished"] and state["val_loss"] is not None
    assert engine.run(overrides) == 0
    assert "already finished: 3 steps" in (tmp_path / "run" / "log.txt").read_text()
    assert len(read_metrics(tmp_path / "run")) == 3


def test_metrics_of_a_run_that_died_before_its_first_checkpoint_are_cut(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(
        "from engine.types import Callback\n"
        "class Dying(Callback):\n"
        "    def on_step_begin(self, control):\n"
        "        if control.step == 3 and not (control.run_dir / 'died').exists():\n"
        "            (control.run_dir / 'died').write_text('')\n"
        "            raise RuntimeError('died')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [
        *(o for o in base if not o.startswith("checkpoint.period")),
        "run.callbacks=[dying:Dying]",
        f"run.dir={tmp_path / 'run'}",
    ]
    with pytest.raises(RuntimeError, match="died"):
        engine.run(overrides)
    assert engine.run(overrides) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_signal_to_a_sweep_reaches_its_run(base: list[str], tmp_path: Path, engine_process: Start) -> None:
    words = [*base, "algorithm.max_num_steps=100000", "-m", "run.seed=0,1", f"run.dir={tmp_path}"]
    process = engine_process(words)
    wait_for(lambda: (tmp_path / "000" / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert list((tmp_path / "000" / "checkpoints").glob("step_*")) and not (tmp_path / "001" / "log.txt").exists()


def test_resume_from_a_run_of_another_recipe_or_an_older_checkpoint_is_refused(base: list[str], tmp_path: Path) -> None:
    first = [*base, f"run.dir={tmp_path / 'a'}"]
    assert engine.run(first) == 0
    with pytest.raises(UserError, match=r"run.resume=.*another recipe(.|\n)*run.seed: 0 → 1"):
        engine.run([*base, "run.seed=1", f"run.resume={tmp_path / 'a'}", f"run.dir={tmp_path / 'b'}"])
    older = tmp_path / "a" / "checkpoints" / "step_00000003"
    with pytest.raises(UserError, match="holds newer checkpoints"):
        engine.run([*first, f"run.resume={older}", "algorithm.max_num_steps=9"])


def test_receipt_of_a_finished_run_stays(base: list[str], tmp_path: Path) -> None:
    overrides = [*base, f"run.dir={tmp_path}"]
    assert engine.run(overrides) == 0
    lock = tmp_path / "lock.json"
    lock.write_text(lock.read_text().replace('"torch": "', '"torch": "0.0-'))
    before = lock.read_text()
    assert engine.run(overrides) == 0
    assert lock.read_text() == before


def test_crash_between_the_two_renames_of_a_checkpoint_loses_nothing(base: list[str], tmp_path: Path) -> None:
    overrides = [*base, f"run.dir={tmp_path}"]
    assert engine.run(overrides) == 0
    newest = tmp_path / "checkpoints" / "step_00000004"
    newest.rename(newest.with_name(".partial-old-step_00000004"))
    assert engine.run(overrides) == 0
    assert newest.is_dir() and "already finished" in (tmp_path / "log.txt").read_text()


def test_finished_run_says_so(long_run: list[str], undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (undisturbed / "metrics.jsonl").read_text()
    assert engine.run([*long_run, f"run.dir={undisturbed}", "logger=console"]) == 0
    assert "already finished" in (undisturbed / "log.txt").read_text()
    assert (undisturbed / "metrics.jsonl").read_text() == before


def test_more_steps_go_on(base: list[str], tmp_path: Path) -> None:
    constant = [*base, "scheduler=constant", "scheduler.warmup_ratio=0", f"run.dir={tmp_path / 'a'}"]
    assert engine.run([*constant, "algorithm.max_num_steps=3"]) == 0
    assert engine.run([*constant, "algorithm.max_num_steps=6"]) == 0
    assert engine.run([*constant[:-1], f"run.dir={tmp_path / 'b'}", "algorithm.max_num_steps=6"]) == 0
    assert figures(tmp_path / "a") == figures(tmp_path / "b")


def test_resume_from_another_folder(base: list[str], tmp_path: Path) -> None:
    constant = [*base, "scheduler=constant", "scheduler.warmup_ratio=0"]
    assert (
        engine.run([*constant, f"run.dir={tmp_path / 'a'}", "algorithm.max_num_steps=4", "checkpoint.keep_last=9"]) == 0
    )
    there = tmp_path / "a" / "checkpoints" / "step_00000002"
    assert engine.run([*constant, f"run.dir={tmp_path / 'b'}", "algorithm.max_num_steps=4", f"run.resume={there}"]) == 0
    assert figures(tmp_path / "b") == figures(tmp_path / "a")[2:]


def test_changed_recipe_is_refused_with_the_difference(long_run: list[str], undisturbed: Path) -> None:
    with pytest.raises(UserError, match=r"another recipe(.|\n)*optimizer.lr: 0.001 → 0.002") as refused:
        engine.run([*long_run, f"run.dir={undisturbed}", "optimizer.lr=2e-3", "algorithm.max_num_steps=99"])
    assert "max_num_steps" not in str(refused.value)


def test_changed_data_is_refused(base: list[str], rows_file: Path, tmp_path: Path) -> None:
    rows = shutil.copy(rows_file, tmp_path / "rows.jsonl")
    overrides = [*base, f"data.train_path={rows}", f"run.dir={tmp_path / 'run'}"]
    assert engine.run(overrides) == 0
    rows.write_text("\n".join(rows.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(UserError, match="the data, tokenizer or template changed since the run began"):
        engine.run([*overrides, "algorithm.max_num_steps=9"])


def test_resume_never_refuses_a_folder_with_a_run(long_run: list[str], undisturbed: Path) -> None:
    with pytest.raises(UserError, match="run.resume=never"):
        engine.run([*long_run, f"run.dir={undisturbed}", "run.resume=never"])


def test_second_live_run_is_refused(long_run: list[str], tmp_path: Path, engine_process: Start) -> None:
    process = engine_process([*long_run, f"run.dir={tmp_path}", "algorithm.max_num_steps=100000"])
    try:
        wait_for(lambda: (tmp_path / ".lock").exists() and bool((tmp_path / ".lock").read_text()), process)
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on"):
            engine.run([*long_run, f"run.dir={tmp_path}"])
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "is damaged"),
        (lambda file: flip(file, -1), "is damaged"),
        (lambda file: flip(file, 100), "is damaged"),
        (lambda file: file.unlink(), "is missing from the checkpoint"),
        (lambda file: (file.parent / "manifest.json").unlink(), "has no readable manifest.json"),
    ],
    ids=["cut short", "last byte", "header", "weights gone", "manifest gone"],
)
def test_damaged_checkpoint_is_named(
    base: list[str], tmp_path: Path, damage: Callable[[Path], Any], answer: str
) -> None:
    overrides = [*base, f"run.dir={tmp_path}"]
    assert engine.run(overrides) == 0
    (weights,) = (tmp_path / "checkpoints" / "step_00000004").glob("shard-*.safetensors")
    damage(weights)
    with pytest.raises(RunError, match=rf"step_00000004: the checkpoint.*{answer}|step_00000004: shard-\S* {answer}"):
        engine.run([*overrides, "algorithm.max_num_steps=5"])


def flip(file: Path, place: int) -> None:
    """Change one bit, and nothing of a file's size."""
    words = bytearray(file.read_bytes())
    words[place] ^= 1
    file.write_bytes(words)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_before_the_start(base: list[str], small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"0" * 2_300_000)
    with pytest.raises(UserError, match=r"GiB free, and a checkpoint takes"):
        engine.run([*base, f"run.dir={small_disk / 'run'}"])


def test_full_disk_along_the_way(base: list[str], small_disk: Path, tmp_path: Path) -> None:
    """The disk fills up after two checkpoints: a sentence, those two usable, and the run goes on once there is space."""
    module = tmp_path / "ballast.py"
    module.write_text(
        "from engine.types import Callback\n"
        "class Ballast(Callback):\n"
        "    def on_save(self, control, checkpoint):\n"
        "        if control.step == 2:\n"
        "            try:\n"
        f"                open({str(small_disk / 'ballast')!r}, 'wb').write(b'0' * 9_000_000)\n"
        "            except OSError:\n"
        "                pass\n"
    )
    overrides = [*base, f"run.dir={small_disk / 'run'}", "run.callbacks=[ballast:Ballast]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(RunError, match=r"the disk is full(.|\n)*goes on from step_00000002") as full:
            engine.run(overrides)
        assert full.value.exit_code == 1
        assert not list((small_disk / "run" / "checkpoints").glob(".partial-*"))
        os.remove(small_disk / "ballast")
        assert engine.run(overrides) == 0
    assert [line["step"] for line in read_metrics(small_disk / "run")] == [1, 2, 3, 4]


def test_losses_that_stay_non_finite_end_the_run(base: list[str], tmp_path: Path) -> None:
    module = tmp_path / "poison.py"
    module.write_text(
        "import torch\n"
        "from engine.types import Callback\n"
        "class Poison(Callback):\n"
        "    def on_step_begin(self, control):\n"
        "        if control.step == 2:\n"
        "            with torch.no_grad():\n"
        "                control.backend.lm.model.norm.weight.fill_(float('nan'))\n"
    )
    overrides = [*base, f"run.dir={tmp_path / 'run'}", "algorithm.max_num_steps=50", "run.callbacks=[poison:Poison]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(RunError, match=r"step 7: loss or gradient norm was not finite 5 times in a row"):
            engine.run(overrides)
    lines = read_metrics(tmp_path / "run")
    assert [line["train/loss"] is None for line in lines] == [False, False, True, True, True, True, True]
