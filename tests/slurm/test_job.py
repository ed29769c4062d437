"""Runs that are submitted to a simulated cluster: real sbatch, real Ray, ranks on CPUs; whatever disturbs them, the figures are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import all_in
from tests.conftest import read_metrics
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import STEPS, Submitted

Submit = Callable[..., Submitted]
ONE, TWO = (["cluster=slurm", f"cluster.num_nodes={nodes}", "cluster.prepare=none"] for nodes in (1, 2))
SLOW = "run.callbacks=[slow_steps:Slow]"


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in read_metrics(run_dir)]


def starts(run: Submitted) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run.run_dir / "slurm.json").read_text())["starts"]
    return found


def assert_went_on(run: Submitted, undisturbed: Path) -> None:
    """The job has ended, started again from a checkpoint, as if nothing had been."""
    run.wait()
    first, *_, last = starts(run)  # one between them where Ray was too slow to start on a busy machine
    assert first["step"] == 0 < last["step"] < STEPS
    log = (run.run_dir / "log.txt").read_text()
    assert f"resuming after step {last['step']} of {STEPS}" in log and log.count("run folder") >= 2
    assert losses(run.run_dir) == losses(undisturbed) and len(losses(undisturbed)) == STEPS


def test_two_nodes_leave_a_run_folder_like_a_local_one(
    small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit
) -> None:
    """Prepared by a job of its own, as is the default."""
    run = submitted([*small, "cluster=slurm", "cluster.num_nodes=2"])
    run.wait()
    assert losses(run.run_dir) == losses(undisturbed) and len(losses(undisturbed)) == STEPS
    own = {p.name for p in run.run_dir.iterdir()}
    assert own - {"slurm.json", ".slurm.json.lock", "slurm", ".lock.submit"} == {p.name for p in undisturbed.iterdir()}
    wait_for(lambda: not slurm.running() and not slurm.files(), "all is ended", 30.0)
    (start,) = starts(run)
    assert start["job"] == run.job and start["step"] == 0 and len(start["nodes"]) == 2


def test_time_limit_saves_and_goes_on(small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit) -> None:
    """The limit is brought near enough, once the run has made some steps, for the warning to be due at once."""
    run = submitted([*small, *ONE, SLOW, "cluster.time_min=20"])
    run.wait_for_step(3)
    minutes = int(slurm.ask("squeue", "-h", "-o", "%M", f"--jobs={run.job}").split(":")[0]) + 3
    slurm.ask("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")
    wait_for(lambda: "is requeued" in run.text(), "the warning", 100.0)
    slurm.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=20")
    assert_went_on(run, undisturbed)
    assert "stopped by SIGUSR2 after step" in (run.run_dir / "log.txt").read_text()


def test_preempted_run_saves_and_goes_on(
    small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit
) -> None:
    """It has no checkpoint but the one that the warning makes it write."""
    run = submitted([*(o for o in small if not o.startswith("checkpoint.period")), "checkpoint.period=0", *TWO, SLOW])
    run.wait_for_step(3)
    slurm.ask("sbatch", "--partition=high", "--nodes=8", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert_went_on(run, undisturbed)
    assert "stopped by SIGUSR2 after step" in (run.run_dir / "log.txt").read_text()


def test_requeued_run_goes_on(small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit) -> None:
    run = submitted([*small, *ONE, SLOW])
    run.wait_for_step(3)
    slurm.ask("scontrol", "requeue", run.job)
    assert_went_on(run, undisturbed)


def test_cancelled_run_stays_cancelled_and_may_be_submitted_again(
    small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit
) -> None:
    run = submitted([*small, *TWO, SLOW])
    run.wait_for_step(3)
    slurm.ask("scancel", run.job)
    run.wait("CANCELLED")
    wait_for(lambda: not slurm.running() and not slurm.files(), "all is ended", 30.0)
    assert "is requeued" not in run.text() and all_in(run.run_dir / "checkpoints")
    again = submitted([*small, *TWO, SLOW], run.run_dir)
    assert_went_on(again, undisturbed)
    assert [start["job"] for start in starts(again)][:2] == [run.job, again.job]


@pytest.mark.parametrize("number", [0, 1], ids=["the driver's", "another"])
def test_crashed_node_is_done_without(
    small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit, number: int
) -> None:
    run = submitted([*small, *TWO, SLOW])
    run.wait_for_step(3)
    lost = starts(run)[0]["nodes"][number]
    slurm.crash(lost)
    assert_went_on(run, undisturbed)
    assert lost not in starts(run)[-1]["nodes"]


def test_node_without_network_is_done_without(
    small: list[str], undisturbed: Path, slurm: Cluster, submitted: Submit
) -> None:
    """One of ranks: where it is the driver's, its run folder is in use until it has ended."""
    run = submitted([*small, *TWO, SLOW])
    run.wait_for_step(3)
    lost = starts(run)[0]["nodes"][1]
    slurm.cut(lost)
    assert_went_on(run, undisturbed)
    assert lost not in starts(run)[-1]["nodes"]
