"""Several jobs at once on a simulated cluster, and all of its nodes in one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import STEPS, Submitted, command
from tests.slurm.test_job import losses

Submit = Callable[..., Submitted]
RATES = ("1e-3", "2e-3", "3e-3", "4e-3", "5e-3", "6e-3")
PROBE = """
import json, sys
from pathlib import Path
from launchers import snapshot
from launchers.allocation import Job, RayNodes, Warned
folder = Path(sys.argv[1])
with Warned() as warned, RayNodes(Job.here(), snapshot.read(folder)[0].cluster) as nodes:
    nodes.wait(warned)
    import ray  # which reads the job's secret once, here
    ray.init(nodes.address)
    found = {node["NodeManagerHostname"]: node["Resources"]["GPU"] for node in ray.nodes() if node["Alive"]}
    (folder / "found.json").write_text(json.dumps([ray.cluster_resources()["GPU"], found]))
    ray.shutdown()
"""


def test_sweep_is_an_array_of_which_two_run_at_once_on_the_same_nodes(
    small: list[str], undisturbed: Path, slurm: Cluster, tmp_path: Path
) -> None:
    """Six points, two ranks on two nodes each, two points at a time and both on these nodes."""
    words = [*small, "cluster=slurm", "cluster.num_nodes=2", "cluster.max_parallel=2", f"run.dir={tmp_path / 'sweep'}"]
    words += ["cluster.sbatch.nodelist='node[1-2]'", "-m", f"optimizer.lr={','.join(RATES)}"]
    done = command(slurm, tmp_path, "engine", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    tasks, most = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["tasks"], 0
    job = tasks["000"].partition("_")[0]
    deadline = time.monotonic() + 700
    while queued := slurm.ask("squeue", "-h", "-r", "-o", "%T", f"--jobs={job}").split():
        most = max(most, queued.count("RUNNING"))
        assert time.monotonic() < deadline, queued
        time.sleep(0.3)
    assert most == 2
    folders = sorted((tmp_path / "sweep").glob("0*"))
    assert len(folders) == len(RATES)
    for folder, rate in zip(folders, RATES, strict=True):
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["optimizer"]["lr"] == float(rate)
        assert json.loads((folder / "slurm.json").read_text())["starts"][0]["nodes"] == ["node1", "node2"]
        assert len(losses(folder)) == STEPS and (folder / "hf").is_dir()
    assert losses(folders[0]) == losses(undisturbed)  # the rate of both
    assert len({tuple(losses(folder)) for folder in folders}) == len(RATES)
    again = command(slurm, tmp_path, "engine", *words)
    assert again.returncode == 0 and "nothing is missing of 6 runs" in again.stdout


def test_eight_nodes_of_slurm_8x8_are_one_ray_cluster_of_64_gpus(
    base: list[str], slurm: Cluster, submitted: Submit, tmp_path: Path
) -> None:
    """A line before the run takes its place, as there are no devices behind these names."""
    (tmp_path / "probe.py").write_text(PROBE)
    probe = f"exec {sys.executable} {tmp_path / 'probe.py'} {tmp_path / 'run'}"
    words = [*base, "train.global_batch_size=64", "data.drop_last=false", "cluster=slurm_8x8", "cluster.prepare=none"]
    run = submitted([*words, f"cluster.setup=['{probe}']"])
    run.wait()
    total, by_node = json.loads((run.run_dir / "found.json").read_text())
    assert total == 64 and by_node == dict.fromkeys(slurm.nodes, 8)
    wait_for(lambda: not slurm.running() and not slurm.files(), "all is ended", 30.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.partition=mian"], "cluster.partition=mian: Slurm has no such partition; did you mean main"),
        (["cluster.num_nodes=9", "cluster.num_workers=9"], "partition main has 8 machines with 1 cores or more"),
        (["cluster.num_workers=null", "cluster.gpus_per_node=9"], "9 GPUs of a machine, and partition main has none"),
        (["cluster.sbatch.reservaton=ours"], "sbatch has no such parameter; did you mean reservation"),
        (["cluster.sbatch.reservation=ours"], "sbatch refuses the job"),
        (
            ["backend=megatron", "backend.tensor_parallel=2", "cluster.num_workers=3"],
            "a multiple of 2 ranks, and there are 3",
        ),
    ],
)
def test_what_is_refused_queues_nothing(
    small: list[str], slurm: Cluster, tmp_path: Path, words: list[str], said: str
) -> None:
    words = [*small, "train.global_batch_size=9", "cluster=slurm", *words, f"run.dir={tmp_path / 'run'}"]
    done = command(slurm, tmp_path, "engine", *words)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert slurm.ask("squeue", "-h") == ""


def test_folder_of_a_queued_job_is_refused(small: list[str], slurm: Cluster, submitted: Submit, tmp_path: Path) -> None:
    words = [*small, "cluster=slurm", "cluster.prepare=none", "cluster.sbatch.begin='now+1hour'"]
    run = submitted(words)
    again = command(slurm, tmp_path, "engine", *words, f"run.dir={run.run_dir}")
    assert again.returncode == 2 and f"job {run.job} is pending and has it" in again.stderr, again.stderr
    assert slurm.ask("squeue", "-h", "-o", "%A") == run.job
