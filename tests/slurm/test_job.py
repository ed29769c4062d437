"""Runs in jobs of a simulated cluster: real sbatch, real Ray, ranks on CPUs; whatever disturbs them, the figures are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import read_metrics
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import STEPS, Submitted

Submit = Callable[..., Submitted]
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
SLOW = "run.callbacks=[slow_steps:Slow]"


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in read_metrics(run_dir)]


def starts(run: Submitted) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run.run_dir / "slurm.json").read_text())["starts"]
    return found


def assert_went_on(run: Submitted, undisturbed: Path) -> None:
    """The job has ended, started again from a checkpoint, as if nothing had been."""
    run.wait()
    first, second = starts(run)
    assert first["step"] == 0 < second["step"]
    log = (run.run_dir / "log.txt").read_text()
    assert f"resuming after step {second['step']} of {STEPS}" in log and log.count("run folder") == 2
    assert losses(run.run_dir) == losses(undisturbed) and len(losses(undisturbed)) == STEPS


def test_two_nodes_leave_a_run_folder_like_a_local_one(small: list[str], undisturbed: Path, submitted: Submit) -> None:
    run = submitted(small)
    run.wait()
    assert losses(run.run_dir) == losses(undisturbed) and len(losses(undisturbed)) == STEPS
    own = {p.name for p in run.run_dir.iterdir()}
    assert own - {"slurm.json"} == {p.name for p in undisturbed.iterdir()}
    (start,) = starts(run)
    assert start["job"] == run.job and start["step"] == 0 and len(start["nodes"]) == 2


def test_time_limit_saves_and_goes_on(small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit) -> None:
    """The warning before the limit, which is brought near once the run has made some steps."""
    run = submitted([*small, SLOW], "--signal=B:USR2@50", "--time=20", nodes=1)
    run.wait_for_step(2)
    minutes = int(slurm.ask("squeue", "-h", "-o", "%M", f"--jobs={run.job}").split(":")[0]) + 1
    slurm.ask("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")
    wait_for(lambda: "is requeued" in run.text(), "the warning", 75.0)
    slurm.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=20")
    assert_went_on(run, undisturbed)
    assert "stopped by SIGUSR2 after step" in (run.run_dir / "log.txt").read_text()


def test_preempted_run_saves_and_goes_on(
    small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit
) -> None:
    run = submitted([*(o for o in small if not o.startswith("checkpoint.period")), "checkpoint.period=0", SLOW])
    run.wait_for_step(2)
    slurm.ask("sbatch", "--partition=high", "--nodes=8", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert_went_on(run, undisturbed)
    assert "stopped by SIGUSR2 after step" in (run.run_dir / "log.txt").read_text()


def test_requeued_run_goes_on(small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit) -> None:
    run = submitted([*small, SLOW], nodes=1)
    run.wait_for_step(2)
    slurm.ask("scontrol", "requeue", run.job)
    assert_went_on(run, undisturbed)


def test_eight_nodes_are_one_ray_cluster_of_64_gpus(base: list[str], slurm: Cluster, submitted: Submit) -> None:
    run = submitted(
        [*base, "cluster.gpus_per_node=8", "train.global_batch_size=64"], "--gres=gpu:8", nodes=8, program=PROBE
    )
    run.wait()
    total, by_node = json.loads((run.run_dir / "found.json").read_text())
    assert total == 64 and by_node == dict.fromkeys(slurm.nodes, 8)
