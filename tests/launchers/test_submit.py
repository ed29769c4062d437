"""Submitting: what is queued, what is frozen in the run folder, and what is refused before anything is queued."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.__main__ import main
from engine.config.compose import compose
from engine.errors import RunError, UserError
from launchers import slurm as asked
from launchers import snapshot
from launchers.prepare import prepare
from launchers.submit import submit, submit_array
from tests.conftest import ROOT
from tests.launchers.conftest import FakeSlurm

GPUS = ["cluster=slurm", "cluster.num_nodes=2", "cluster.gpus_per_node=2"]
CPUS = ["cluster=slurm", "cluster.num_nodes=2", "cluster.num_workers=4"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_a_run_is_frozen_and_queued_behind_the_job_that_prepares_it(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"
    assert (
        main([*base, *GPUS, f"run.dir={folder}", "cluster.time_min=120", "cluster.account=us", "run.name=first"]) == 0
    )
    assert slurm.jobs == ["101", "102"]
    prepare, job = slurm.options("101"), slurm.options("102")
    assert job["dependency"] == "afterok:101" and job["kill-on-invalid-dep"] == "yes"
    same = {"nodes": "2", "ntasks-per-node": "1", "gres": "gpu:2", "time": "120", "account": "us", "job-name": "first"}
    assert same.items() <= job.items()
    assert {"requeue", "open-mode"} <= set(job) and job["open-mode"] == "append" and job["signal"] == "B:USR2@180"
    assert shlex.split(job["comment"]) == [str(folder)] and "wckey" not in job and "partition" not in job
    assert job["cpus-per-task"] == "24"  # of 96 cores for 2 of 8 GPUs; a machine with 4 has 32 for 2
    assert not {"gres", "dependency", "mem"} & set(prepare) and prepare["nodes"] == "1"
    assert shlex.split(slurm.command("102"))[:6] == ["exec", sys.executable, "-u", "-m", "launchers.job", str(folder)]
    assert shlex.split(slurm.command("101"))[5:] == ["--prepare", str(folder)]
    out = capsys.readouterr().out
    assert out.startswith("submitted job 102, which waits for job 101") and "scancel 101 102" in out
    assert f"'{folder}/log.txt'" in out and str(folder / "slurm" / "102.out") in out
    config, recipe = snapshot.read(folder)
    assert (
        config
        == compose(
            [*base, *GPUS, f"run.dir={folder}", "cluster.time_min=120", "cluster.account=us", "run.name=first"]
        ).config
    )
    assert yaml.safe_load(recipe)["cluster"]["account"] == "us"
    lock = json.loads((folder / "lock.json").read_text())
    assert lock["versions"]["torch"] and lock["code"]["sha256"]
    assert snapshot.read_note(folder) == {"resume": "auto", "job_id": "102", "prepared_by": "101"}
    assert not list((folder / "slurm").glob(".*"))


def test_the_named_shape_as_typed(slurm: FakeSlurm, tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    (slurm.folder / "sinfo").write_text("gpu*|gpu:8|128|16|infinite\n")
    data = [
        "data=binary_preference",
        f"data.train_path={pairs_file}",
        "data.max_length=256",
        "data.packing.max_tokens=512",
    ]
    words = ["algorithm=dpo", f"model.path={model_folder}", "cluster=slurm_8x8", *data, f"run.dir={tmp_path}"]
    assert main([*words, "cluster.prepare=none"]) == 0
    given = slurm.options("101")
    assert {"nodes": "8", "gres": "gpu:8", "exclusive": "", "mem": "0", "cpus-per-task": "128"}.items() <= given.items()
    assert "dependency" not in given


@pytest.mark.parametrize(("nodes", "shape"), [(1, "slurm_1x8"), (2, "slurm_2x8"), (4, "slurm_4x8"), (8, "slurm_8x8")])
def test_the_card_line_composes(nodes: int, shape: str) -> None:
    cluster = compose(["algorithm=dpo", "model=llama3_8b", f"cluster={shape}"]).config.cluster
    assert (cluster.name, cluster.num_nodes, cluster.gpus_per_node, cluster.prepare) == ("slurm", nodes, 8, "job")


def test_everything_a_team_may_ask_of_sbatch(slurm: FakeSlurm, base: list[str], tmp_path: Path) -> None:
    words = [
        "cluster.partition=gpu",
        "cluster.qos=fast",
        'cluster.constraint="h100&ib"',
        "cluster.setup=[module load cuda/12.8,ulimit -l unlimited]",
        "cluster.sbatch={mem: 200G, reservation: ours, container-image: a b.sqsh, cpus_per_task: 7}",
        "cluster.prepare_partition=cpu",
    ]
    assert main([*base, *GPUS, *words, f"run.dir={tmp_path}"]) == 0
    prepare, job = slurm.options("101"), slurm.options("102")
    assert {
        "partition": "gpu",
        "qos": "fast",
        "mem": "200G",
        "reservation": "ours",
        "cpus-per-task": "7",
    }.items() <= job.items()
    assert job["constraint"] == "'h100&ib'" and job["container-image"] == "'a b.sqsh'"
    assert (
        prepare["partition"] == "cpu" and prepare["reservation"] == "ours" and not {"mem", "constraint"} & set(prepare)
    )
    lines = slurm.script("102").splitlines()
    assert (
        lines.index("module load cuda/12.8")
        < lines.index("ulimit -l unlimited")
        < lines.index("trap '' USR2")
        < len(lines) - 1
    )


@pytest.mark.parametrize(("time_min", "signal"), [(None, 180), (1, 20), (6, 120), (60, 180)])
def test_the_warning_leaves_most_of_a_short_job(time_min: int | None, signal: int) -> None:
    words = ["model=tiny", "data=tasks", *CPUS, f"cluster.time_min={'null' if time_min is None else time_min}"]
    assert asked.options(compose(words).config.cluster, "x", 1)["signal"] == f"B:USR2@{signal}"


def test_the_environment_goes_along_and_is_never_written(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"HF_HOME": "/shared/hf", "WANDB_API_KEY": "top-secret-key", "ANNEAL_RECIPE_PATH": str(tmp_path)}
    outer = {
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "3",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_TIMELIMIT": "5",
        "SBATCH_ACCOUNT": "us",
    }
    for name, value in {**needed, **outer, "SLURM_CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    assert main([*base, *CPUS, f"run.dir={run}", "cluster.time_min=30"]) == 0
    for job_id in slurm.jobs:
        found = slurm.environment(job_id)
        assert needed.items() <= found.items() and found["SLURM_CONF"] == "/etc/slurm.conf"
        assert found["SBATCH_ACCOUNT"] == "us"  # fills in cluster.account=null
        assert not {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SBATCH_EXPORT", "SBATCH_TIMELIMIT"} & set(found)
    written = [file for file in run.rglob("*") if file.is_file()] + list((slurm.folder / "jobs").glob("*.sh"))
    assert written and not [file for file in written if "top-secret-key" in file.read_text()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*GPUS, "cluster.partition=gpus"], "cluster.partition=gpus: Slurm has no such partition; did you mean gpu."),
        ([*GPUS, "cluster.prepare_partition=zzz"], "cluster.prepare_partition=zzz: Slurm has no such partition; there is cpu, gpu."),
        (["cluster=slurm", "cluster.gpus_per_node=16", "train.global_batch_size=16"], "cluster.gpus_per_node: 16 GPUs of a machine, and partition gpu has none with more than 8; set it to 8 or less."),
        ([*GPUS, "cluster.partition=cpu"], "partition cpu has none with more than 0; choose another partition, or cluster.num_workers"),
        (["cluster=slurm_8x8", "train.global_batch_size=64"], "cluster.num_nodes=8: partition gpu has 4 machines with 8 GPUs or more; set it to 4 or less."),
        ([*GPUS, "cluster.time_min=2881"], "cluster.time_min=2881: partition gpu lets jobs run for 2880 minutes; set it to 2880 or less."),
        ([*GPUS, "cluster.sbatch={reservaton: x}"], "cluster.sbatch.reservaton: sbatch has no such parameter; did you mean reservation."),
        ([*GPUS, "cluster.sbatch={time: 5}"], "cluster.sbatch.time: set cluster.time_min instead."),
        ([*GPUS, "cluster.sbatch={output: x}"], "cluster.sbatch.output: every job has its own; take it out."),
        (["cluster=slurm", "cluster.num_workers=128", "train.global_batch_size=128"], "cluster.num_workers: 128 cores of a machine"),
    ],
)  # fmt: skip
def test_what_slurm_could_never_start(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    error = refused([*base, *words, "data.drop_last=false", f"run.dir={folder}"], capsys)
    assert said in error and len(error.splitlines()) == 1
    assert slurm.jobs == [] and not folder.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=slurm"], "cluster.gpus_per_node is not set"),
        (["cluster=slurm", "cluster.num_nodes=2", "cluster.num_workers=3"], "cluster.num_workers=3 is no multiple of cluster.num_nodes=2: set it to 4."),
        ([*GPUS, "cluster.prepare=null"], "cluster.prepare is not set: set it to job, here or none."),
        ([*GPUS, "cluster.sbatch={mem: null}"], "cluster.sbatch.mem=None: must be one line of text"),
        (["cluster.partition=gpu"], "cluster.partition=gpu is for cluster=slurm, not local"),
        (["cluster=ray_local", "cluster.wait=true"], "cluster.wait=True is for cluster=slurm, not ray_local"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together(
    base: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused([*base, *words], capsys)


def test_no_slurm_here(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused([*base, *GPUS, f"run.dir={tmp_path / 'run'}"], capsys)
    assert "there is no sinfo on PATH" in said and not (tmp_path / "run").exists()


def test_sbatch_refuses_and_the_job_that_prepares_is_cancelled(
    slurm: FakeSlurm,
    base: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REFUSED", "gpu:2")
    monkeypatch.setenv("SAID", "Invalid account or account/partition combination specified")
    said = refused([*base, *GPUS, f"run.dir={tmp_path}"], capsys)
    assert said.splitlines() == [
        "error: sbatch refuses the job (Batch job submission failed: Invalid account or account/partition combination specified); "
        "nothing was submitted."
    ]
    assert slurm.cancelled == ["101"]


def test_a_folder_in_use(slurm: FakeSlurm, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*base, *CPUS, f"run.dir={tmp_path}"]
    assert main(words) == 0
    capsys.readouterr()
    for state in ("PENDING", "RUNNING"):
        slurm.state("102", state)
        assert f"job 102 is {state.lower()} and has it" in refused(words, capsys)
    assert len(slurm.jobs) == 2
    slurm.state("102", None)
    assert main(words) == 0 and len(slurm.jobs) == 4
    capsys.readouterr()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()", str(tmp_path / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        assert "in use by" in refused(words, capsys)
    finally:
        holder.communicate(b"\n")
    assert len(slurm.jobs) == 4


def test_data_that_cannot_be_used_are_found_before_anything_is_queued(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "?"}, {"role": "assistant"}]}\n' * 20)
    words = [*base, *CPUS, f"data.train_path={rows}", f"run.dir={tmp_path / 'run'}", "cluster.prepare=here"]
    assert main(words) == 2
    assert "rows.jsonl" in capsys.readouterr().err and slurm.jobs == []


def test_a_model_that_the_hub_does_not_give(
    slurm: FakeSlurm,
    base: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError

    def gated(self: HfApi, repo_id: str, **options: object) -> None:
        raise GatedRepoError("no", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    def unplugged(self: HfApi, repo_id: str, **options: object) -> None:
        raise HTTPError("Temporary failure in name resolution")

    words = [*base, *CPUS, "model.path=someone/gated", f"run.dir={tmp_path}"]
    assert "someone/gated: not in the hub's cache, and the hub does not answer" in refused(words, capsys)
    monkeypatch.setattr(HfApi, "auth_check", unplugged)
    assert "someone/gated: not in the hub's cache, and the hub does not answer" in refused(words, capsys)
    monkeypatch.setattr(HfApi, "auth_check", gated)
    assert "someone/gated: gated, and this account may not read it" in refused(words, capsys)
    assert slurm.jobs == []


LARGE = "model.config_overrides={hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 80}"


def test_what_the_plan_calls_impossible_is_not_queued(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*base, *GPUS, "train.global_batch_size=64", f"data.cache_dir={tmp_path / 'cache'}"]
    composed = compose([*words, f"run.dir={tmp_path / 'before'}"])
    submit(composed.config, composed.recipe)  # how many conversations there are is not known yet
    prepare(composed.config)
    capsys.readouterr()
    error = refused([*words, f"run.dir={tmp_path / 'run'}"], capsys)
    assert "train.global_batch_size=64 is more than the 40 conversations of an epoch" in error
    assert len(error.splitlines()) == 1 and len(slurm.jobs) == 2 and not (tmp_path / "run").exists()


def test_a_model_that_the_backend_does_not_have_is_found_without_its_sizes(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = tmp_path / "hub" / "models--someone--gpt" / "snapshots" / "1"
    hub.mkdir(parents=True)
    (hub.parent.parent / "refs").mkdir()
    (hub.parent.parent / "refs" / "main").write_text("1")
    (hub / "config.json").write_text('{"model_type": "gpt2", "n_embd": 768}')
    words = [*base, *GPUS, "model.path=someone/gpt", f"model.tokenizer={model_folder}", "backend=megatron"]
    found = subprocess.run(
        [sys.executable, "-m", "engine", *words, f"run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")},
    )  # fmt: skip
    assert found.returncode == 2 and "backend=megatron has no models of type gpt2" in found.stderr
    assert slurm.jobs == []


def test_a_card_that_may_be_too_small_is_said_and_the_run_queued(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*base, "model.init=random", LARGE]
    assert main([*words, *GPUS, f"run.dir={tmp_path / 'gpus'}"]) == 0
    doubt, submitted, *_ = capsys.readouterr().out.splitlines()
    assert doubt.startswith("memory: a device needs ") and "and a card has 80; add " in doubt
    assert doubt.endswith("Cards of 80 GB are assumed; python -m engine.plan --card GB tells of others.")
    assert submitted.startswith("submitted job 102")
    assert main([*words, *CPUS, f"run.dir={tmp_path / 'cpus'}"]) == 0
    assert capsys.readouterr().out.startswith("submitted job 104")


def test_runs_that_the_plan_cannot_tell_apart_are_planned_once(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    monkeypatch.setattr(
        "engine.plan.plan", lambda config: planned.append(config) or types.SimpleNamespace(problem=None)
    )
    values = (["optimizer.lr=1e-3"], ["optimizer.lr=1e-4", "run.seed=1"], ["data.max_length=128"])
    runs = [compose([*base, *CPUS, *own, f"run.dir={tmp_path / str(i)}"]) for i, own in enumerate(values)]
    submit_array([(run.config, run.recipe) for run in runs])
    assert sorted(config.data.max_length for config in planned) == [128, 256]


def test_what_cannot_be_noted_is_not_left_in_the_queue(
    slurm: FakeSlurm, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = compose([*base, *CPUS, f"run.dir={tmp_path}"])
    noted = snapshot.note

    def full(folder: Path, **values: Any) -> None:
        if values.get("job_id") is not None:
            raise OSError(28, "No space left on device")
        noted(folder, **values)

    monkeypatch.setattr(snapshot, "note", full)
    with pytest.raises(OSError, match="No space left"):
        submit(composed.config, composed.recipe)
    assert slurm.cancelled == ["101", "102"]
    (slurm.folder / "bin" / "scancel").write_text("#!/bin/sh\necho 'slurmctld is down' >&2; exit 1\n")
    with pytest.raises(
        RunError, match=r"No space left(.|\n)*jobs 103 104 are queued all the same; .*slurmctld is down"
    ):
        submit(composed.config, composed.recipe)


def test_an_array_of_runs(slurm: FakeSlurm, base: list[str], tmp_path: Path) -> None:
    folders = [tmp_path / f"{i:03d}" for i in range(3)]
    runs = [compose([*base, *CPUS, f"run.seed={i}", f"run.dir={folder}"]) for i, folder in enumerate(folders)]
    done = submit_array([(run.config, run.recipe) for run in runs], 2)
    assert (done.job_id, done.prepared_by, done.folder) == ("102", "101", tmp_path)
    job = slurm.options("102")
    assert job["array"] == "0-2%2" and job["dependency"] == "afterok:101" and job["output"].endswith("%A_%a.out")
    assert shlex.split(slurm.command("102"))[5:] == ["--array", *map(str, folders)]
    assert [snapshot.read(folder)[0].run.seed for folder in folders] == [0, 1, 2]
    assert [snapshot.read_note(folder)["job_id"] for folder in folders] == ["102_0", "102_1", "102_2"]
    slurm.state("102_1", "RUNNING")
    with pytest.raises(UserError, match="job 102_1 is running"):
        submit(runs[1].config, runs[1].recipe)
    odd = compose([*base, "cluster=slurm", "cluster.num_workers=2", f"run.dir={tmp_path / '003'}"])
    with pytest.raises(UserError, match="sweep no key of cluster"):
        submit_array([(runs[0].config, runs[0].recipe), (odd.config, odd.recipe)], 2)


def test_what_is_frozen_is_what_runs(slurm: FakeSlurm, base: list[str], tmp_path: Path) -> None:
    other = tmp_path / "an 'odd' folder, really"
    (tmp_path / "before").mkdir()
    words = [*base, *CPUS, f"run.dir='{str(other).replace(chr(39), chr(92) + chr(39))}'", "run.resume=never"]
    composed = compose(words)
    submit(composed.config, composed.recipe)
    config, text = snapshot.read(other)
    assert config.run.resume == "auto" and text == composed.recipe  # queued again, it has checkpoints
    assert config.model_copy(update={"run": composed.config.run}) == composed.config
    assert snapshot.changed(other) is None
    lock = json.loads((other / "lock.json").read_text())
    lock["code"]["sha256"] = "another"
    (other / "lock.json").write_text(json.dumps(lock))
    assert "the code has changed since this run was submitted" in (snapshot.changed(other) or "")


def test_another_cluster_for_the_recipe_of_a_submitted_run(slurm: FakeSlurm, base: list[str], tmp_path: Path) -> None:
    composed = compose(
        [*base, *GPUS, "cluster.partition=gpu", "cluster.setup=[module load cuda]", f"run.dir={tmp_path}"]
    )
    submit(composed.config, composed.recipe)
    again = [f"recipe={tmp_path / 'recipe.yaml'}", "cluster=ray_local", "cluster.num_nodes=1"]
    assert compose(again).config.cluster.partition is None


def test_waiting_ends_with_the_code_of_the_job(slurm: FakeSlurm, base: list[str], tmp_path: Path) -> None:
    words = [*base, *CPUS, f"run.dir={tmp_path}", "cluster.wait=true", "cluster.prepare=none"]
    slurm.state("101", "PENDING")
    waiting = subprocess.Popen(
        [sys.executable, "-m", "engine", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while "101" not in slurm.jobs and time.monotonic() < deadline:
        time.sleep(0.1)
    (tmp_path / "log.txt").write_text("step 1/4  loss 2.0\n")
    slurm.state("101", "RUNNING")
    time.sleep(3)
    slurm.ended("101", "FAILED", 75)
    out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 75
    assert "step 1/4  loss 2.0" in out and "has ended with exit code 75" in out


def test_submitting_is_quick_and_loads_nothing_heavy(slurm: FakeSlurm, base: list[str], tmp_path: Path) -> None:
    program = (
        "import sys, time; from engine.__main__ import main; code = main(sys.argv[1:]); "
        "print(time.process_time(), [name for name in ('torch', 'ray', 'transformers', 'datasets') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *base, *GPUS, f"run.dir={tmp_path}"],
        capture_output=True, text=True, cwd=ROOT, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spent, _, loaded = done.stdout.splitlines()[-1].partition(" ")
    assert loaded == "[]" and float(spent) < 2.0  # of this process's own time: other tests may keep the machine busy


def test_preparing_leaves_its_error_in_the_log_and_a_sweep_its_other_runs(
    slurm: FakeSlurm, base: list[str], tmp_path: Path
) -> None:
    from launchers import job

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "?"}, {"role": "assistant"}]}\n' * 20)
    good, bad = tmp_path / "000", tmp_path / "001"
    for folder, more in ((good, []), (bad, [f"data.train_path={rows}"])):
        composed = compose([*base, *CPUS, *more, f"run.dir={folder}"])
        submit(composed.config, composed.recipe)
    assert job.main(["--prepare", str(bad)]) == 2
    assert "rows.jsonl" in (bad / "log.txt").read_text()
    assert job.main(["--prepare", str(bad), str(good)]) == 0
    assert not (good / "log.txt").exists()
