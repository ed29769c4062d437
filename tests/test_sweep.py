"""Sweeps on one machine: processes side by side, what fails and what dies, what is missing, the table."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import engine
from engine.config.compose import parse
from engine.errors import UserError
from engine.run_folder import LOCK, RunFolder, is_live
from engine.sweep import pool, start, status
from engine.sweep.points import Point, Record, points
from tests.conftest import ROOT, read_metrics

Start = Callable[..., subprocess.Popen[str]]
LONG = "algorithm.max_num_steps=100000"


@pytest.fixture
def words(base: list[str]) -> list[str]:
    """A small run with a validation loss."""
    changed = ("checkpoint.period", "algorithm.max_num_steps", "algorithm.val_at_end", "optimizer.lr")
    return [
        *(word for word in base if not word.startswith(changed)),
        "data.val_fraction=0.2",
        "algorithm.max_num_steps=2",
        "cluster.max_parallel=2",
        "-m",
    ]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def sweep(start: Start, *words: str) -> tuple[int, str, str]:
    process = start(words)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def rows(out: str) -> list[list[str]]:
    """Return the cells of the table that a command has printed last."""
    lines = out.splitlines()
    head = max(i for i, line in enumerate(lines) if line.startswith("run "))
    last = next(i for i in range(head, len(lines)) if lines[i].startswith("/"))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[head + 1 : last]]


def written(folder: Path, log: str, *figures: dict[str, Any], recipe: str = "") -> Path:
    """Write a run folder as a run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text(log)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in figures))
    if recipe:
        (folder / "recipe.yaml").write_text(recipe)
    return folder


def most_at_a_time(out: str) -> int:
    """Return how many runs were under way at once, by the lines that say that one starts and ends."""
    running = most = 0
    for line in out.splitlines():
        if re.match(r"\d{3} .*: started", line):
            running += 1
        elif re.match(r"\d{3} .*: (done|failed|stopped)", line):
            running -= 1
        most = max(most, running)
    return most


def test_four_runs_two_at_a_time_then_only_what_is_missing(
    words: list[str], tmp_path: Path, engine_process: Start
) -> None:
    values = ["optimizer.lr=1e-3,1e-1", "run.seed=0,1", f"run.dir={tmp_path}"]
    code, out, err = sweep(engine_process, *words, *values)
    assert code == 0, out + err
    assert most_at_a_time(out) == 2
    table = rows(out)
    losses = [float(row[3]) for row in table]
    assert len(table) == 4 and losses == sorted(losses) and {row[-1] for row in table} == {"done"}
    for name, lr, seed, loss, step, _ in table:
        (last,) = read_metrics(tmp_path / name, "validation/loss")
        assert (last["step"], f"{last['validation/loss']:.6g}") == (int(step), loss)
        recipe = yaml.safe_load((tmp_path / name / "recipe.yaml").read_text())
        assert (recipe["optimizer"]["lr"], recipe["run"]["seed"]) == (float(lr), int(seed))
    shutil.rmtree(tmp_path / "002")
    before = (tmp_path / "000" / "console.txt").read_text()
    code, out, err = sweep(engine_process, *words, *values)
    assert code == 0, out + err
    assert re.findall(r"^(\d+) .*: started", out, re.M) == ["002"]
    assert rows(out) == table  # the same figures, to the last digit that is shown
    assert (tmp_path / "000" / "console.txt").read_text() == before
    code, out, _ = sweep(engine_process, *words, *values)
    assert code == 0 and out.startswith("nothing is missing of 4 runs\n") and rows(out) == table


def test_what_fails_or_dies_leaves_the_others_unharmed(words: list[str], tmp_path: Path, engine_process: Start) -> None:
    (tmp_path / "dying.py").write_text(
        "import os, signal\n"
        "from engine.types import Callback\n"
        "class Dying(Callback):\n"
        "    def on_step_begin(self, control):\n"
        "        if control.config.run.seed == 1 and control.step == 1:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = {"env": {"PYTHONPATH": f"{ROOT}:{tmp_path}"}}
    own = ["run.callbacks=[dying:Dying]", "train.global_batch_size=8,64", "run.seed=0,1", f"run.dir={tmp_path / 's'}"]
    process = engine_process([*words, *own], **path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, out + err
    said = {row[0]: row[-1] for row in rows(out)}
    too_many = r"failed: train.global_batch_size=64 is more than the \d+ conversations of an epoch: lower it to \d+"
    assert said["000"] == "done" and rows(out)[0][0] == "000"
    assert said["001"] == "failed: killed by SIGKILL (out of the host's memory?)"
    assert all(re.match(too_many, said[name]) for name in ("002", "003"))
    assert "goes on with what is missing" in out


def test_ctrl_c_saves_the_checkpoints_and_the_same_command_goes_on(
    words: list[str], tmp_path: Path, engine_process: Start
) -> None:
    process = engine_process([*words, LONG, "run.seed=0,1,2", f"run.dir={tmp_path}"], start_new_session=True)
    wait_for(lambda: all((tmp_path / name / "metrics.jsonl").exists() for name in ("000", "001")), process)
    live = subprocess.run(
        [sys.executable, "-m", "engine.sweep", tmp_path], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert re.search(r"^000 +0 .* running, step \d+", live, re.M) and re.search(r"^002 +2 .* missing$", live, re.M)
    with pytest.raises(UserError, match=rf"run.dir={tmp_path}: in use by process {process.pid} "):
        start.start([*(w for w in words if w != "-m"), "run.seed=0,1,2", f"run.dir={tmp_path}"])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert [row[-1].partition(",")[0] for row in rows(out)] == ["stopped", "stopped", "missing"]
    saved = {name: max((tmp_path / name / "checkpoints").glob("step_*")).name for name in ("000", "001")}
    assert not (tmp_path / "002" / "log.txt").exists()
    again = shlex.split(next(line for line in out.splitlines() if line.startswith("python -m engine -m")))
    command = again[3 : again.index("goes")]
    more = {name: int(step.removeprefix("step_")) + 2 for name, step in saved.items()}
    code, out, err = sweep(engine_process, *command, f"algorithm.max_num_steps={min(more.values())}")
    assert code == 0, out + err
    assert "resuming after step" in (tmp_path / "000" / "log.txt").read_text()


def test_point_that_cannot_be_composed_stops_the_sweep_before_it_starts(words: list[str], tmp_path: Path) -> None:
    own = [w for w in words if w != "-m"]
    with pytest.raises(UserError) as refused:
        start.start([*own, "optimizer.lr=1e-3,-1", "train.global_batch_size=8,0", f"run.dir={tmp_path / 's'}"])
    assert len(refused.value.problems) == 2 and not (tmp_path / "s").exists()
    for key, text in (("run.dir", "run.dir=a,b"), ("cluster.max_parallel", "cluster.max_parallel=1,2")):
        with pytest.raises(UserError, match=f"{key}: a sweep has one"):
            points([*own, text])
    written(tmp_path / "run", "run folder x\n", {"step": 1})
    with pytest.raises(UserError, match="holds a run, and is to be a sweep's folder"):
        points([*own, f"run.dir={tmp_path / 'run'}"])


def test_further_values_get_folders_of_their_own_and_other_recipes_are_refused(
    words: list[str], tmp_path: Path
) -> None:
    own = [*(w for w in words if w != "-m"), f"run.dir={tmp_path}"]
    found, record = points([*own, "optimizer.lr=1e-3,1e-2"])
    record.write(tmp_path)
    for point in found:
        written(point.folder, "run folder x\ndone: 2 steps\n", {"step": 2}, recipe=point.recipe)
    more, record = points([*own, "optimizer.lr=1e-4,1e-3,1e-2,1e-1,1e-3"])
    assert [(p.folder.name, p.values["optimizer.lr"]) for p in more] == [
        ("002", "0.0001"),
        ("000", "0.001"),
        ("001", "0.01"),
        ("003", "0.1"),
    ]
    assert start._missing(more, tmp_path) == [more[0], more[3]]
    longer, _ = points([*own, "optimizer.lr=1e-3,1e-2", "algorithm.max_num_steps=3"])
    assert start._missing(longer, tmp_path) == longer
    other, _ = points([*own, "optimizer.lr=1e-3,1e-2", "train.max_grad_norm=2"])
    with pytest.raises(UserError, match=r"000: holds a run of another recipe(.|\n)*train.max_grad_norm: 1.0 → 2.0"):
        start._missing(other, tmp_path)


def test_table_orders_by_metric_and_says_where_each_run_stands(tmp_path: Path) -> None:
    log, metric = "run folder x\n", "validation/loss"
    written(tmp_path / "000", f"{log}done: 9 steps\n", {"step": 4, metric: 3.0}, {"step": 9, metric: 5.0})
    written(tmp_path / "001", f"{log}done: 9 steps\n", {"step": 4, metric: 4.0}, {"step": 9, metric: None})
    written(tmp_path / "002", f"{log}error: a.\nb.\n", {"step": 1, metric: 0.5})
    written(tmp_path / "003", f"{log}done: 9 steps\n{log}step 3/20  loss\n", {"step": 3})  # was to go on, and died
    live = written(tmp_path / "004", f"{log}resuming after step 5 of 20 from y\n", {"step": 6, "train/loss": 1.0})
    written(tmp_path / "005", f"{log}stopped by SIGTERM after step 2 of 20\n", {"step": 2})
    record = Record(command="", metric=metric, mode="min", points={f"{i:03d}": {"run.seed": f"{i}"} for i in range(7)})
    with (live / LOCK).open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        lowest = [line.split(None, 4) for line in status.table(tmp_path, record, {}).splitlines()[1:8]]
        record.mode = "max"
        highest = [line.split()[0] for line in status.table(tmp_path, record, {}).splitlines()[1:8]]
    assert lowest == [
        ["000", "0", "3", "4", "done"],
        ["001", "1", "4", "4", "done"],
        ["004", "4", "–", "–", "running, step 6 of 20"],
        ["005", "5", "–", "–", "stopped, step 2 of 20"],
        ["002", "2", "0.5", "1", "failed: a."],
        ["003", "3", "–", "–", f"failed: {status.SILENT}"],
        ["006", "6", "–", "–", "missing"],
    ]
    assert highest == ["000", "001", "004", "005", "002", "003", "006"]
    assert status.read(tmp_path / "000", metric, "max").best == 5.0


def test_look_at_a_folder_does_not_keep_a_run_out(words: list[str], tmp_path: Path) -> None:
    (point,), _ = points([*(w for w in words if w != "-m"), f"run.dir={tmp_path}"])
    point.freeze()
    with (point.folder / LOCK).open("a+") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        started = time.monotonic()
        threading.Timer(0.3, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        folder = RunFolder(point.config, point.recipe)  # which would refuse a folder that another run holds
        assert time.monotonic() - started >= 0.2  # it has waited for the look to end
        assert is_live(point.folder)
        folder.release()
        assert not is_live(point.folder)


@pytest.mark.parametrize(
    ("visible", "more", "at_once"),
    [
        ("0,1,2,3", ["cluster.max_parallel=null"], [["0"], ["1"], ["2"], ["3"]]),
        ("4,6", ["cluster.max_parallel=null"], [["4"], ["6"]]),
        ("4,6", ["cluster.max_parallel=1"], [["4"]]),
        ("0,1,2,3", ["cluster=ray_local", "cluster.gpus_per_node=2"], [["0", "1"], ["2", "3"]]),
        ("0,1,2,3", ["cluster=ray_local", "cluster.max_parallel=null"], [["0", "1", "2", "3"]]),
        ("0,1", ["cluster=ray_local", "cluster.num_workers=2", "cluster.max_parallel=3"], [[], [], []]),
        ("", ["cluster.max_parallel=null"], [[]]),
    ],
)
def test_devices_are_split_among_the_runs(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    more: list[str],
    at_once: list[list[str]],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found, _ = points([*(w for w in words if w != "-m"), "run.seed=0,1,2,3,4", *more, f"run.dir={tmp_path}"])
    runs, line, waiting = pool.build(found), pool.Line(False), list(found)
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: options["env"]
    )  # no GPUs here: only who gets which
    while waiting and runs._fits(waiting[0]):
        waiting[0].freeze()
        runs._start(waiting.pop(0), line)
    assert [run.devices for run in runs.running] == at_once
    shown: list[Any] = [run.process for run in runs.running]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in shown] == [",".join(taken) or visible for taken in at_once]


def test_more_devices_than_there_are(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    own = [*(w for w in words if w != "-m"), "cluster=ray_local", "cluster.gpus_per_node=4", f"run.dir={tmp_path}"]
    with pytest.raises(UserError, match="cluster.gpus_per_node=4: this machine has 2 GPUs"):
        pool.build(points(own)[0])


def test_sweep_over_beta_computes_the_reference_once(dpo: list[str], tmp_path: Path, engine_process: Start) -> None:
    beta = "algorithm.reference_policy_kl_penalty=0.05,0.1"
    code, out, err = sweep(
        engine_process,
        *dpo,
        "-m",
        beta,
        "cluster.max_parallel=2",
        "checkpoint.metric=train/loss",
        f"run.dir={tmp_path / 's'}",
    )
    assert code == 0, out + err
    logs = [(tmp_path / "s" / name / "log.txt").read_text() for name in ("000", "001")]
    assert sum("reference: computing 80 of 80 log-probabilities" in log for log in logs) == 1
    assert sum("reference: all 80 log-probabilities of train are there" in log for log in logs) == 1
    assert len({row[2] for row in rows(out)}) == 2


def test_preparing_computes_the_reference_and_trains_nothing(dpo: list[str], tmp_path: Path) -> None:
    assert engine.run([*dpo, "run.prepare_only=true", f"run.dir={tmp_path / 'ahead'}"]) == 0
    assert status.is_done(tmp_path / "ahead") and not (tmp_path / "ahead" / "hf").exists()
    assert engine.run([*dpo, f"run.dir={tmp_path / 'run'}"]) == 0
    assert "reference: all 80 log-probabilities of train are there" in (tmp_path / "run" / "log.txt").read_text()


def test_a_reference_that_one_run_needs_or_none_is_not_computed_ahead(dpo: list[str], tmp_path: Path) -> None:
    for more in (
        ["algorithm.preference_loss=simpo,orpo"],
        ["run.seed=0,1"],
        ["data.cache=off", "optimizer.lr=1e-3,1e-4"],
    ):
        found, _ = points([*dpo, *more, f"run.dir={tmp_path}"])
        assert len(found) == 2 and start._references(found, tmp_path) == []


def test_sweep_command_of_another_folder_is_answered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep's folder"):
        Record.of(tmp_path)


def test_folder_with_any_name_is_run(tmp_path: Path) -> None:
    ((plain,), _) = points(["data=dummy", "model=tiny", f"run.dir={tmp_path}"])
    point = Point(folder=tmp_path / "a 'b\"c (d), e=f", values={}, config=plain.config, recipe="")
    said = {override.key_or_group: override.value() for override in parse(point.words())}
    assert said == {"recipe": str(point.file), "run.dir": str(point.folder), "run.resume": "auto"}
