"""How often a job may start again, and what it finds on a node, without any Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import RunError
from launchers.allocation import Job, Starts
from launchers.ray_node import claim

JOB = Job("12", ["node1", "node2"])


def begin(run_dir: Path, most: int = 2, job: Job = JOB) -> None:
    Starts(run_dir, job, most).begin()


def reach(run_dir: Path, step: int) -> None:
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": step, "train/loss": 1.0}) + "\n")


def test_restarts_are_counted_and_limited(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        begin(tmp_path)
        reach(tmp_path, step)
    with pytest.raises(RunError, match="cluster.max_failures=2 restarts are used up"):
        begin(tmp_path)


def test_no_step_between_two_starts_ends_it(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(RunError, match="no step was made between its last two starts"):
        begin(tmp_path)


def test_start_that_was_asked_to_stop_need_not_have_made_a_step(tmp_path: Path) -> None:
    first = Starts(tmp_path, JOB, 2)
    first.begin()
    first.note_stop()
    begin(tmp_path)
    with pytest.raises(RunError, match="no step was made"):
        begin(tmp_path)


def test_line_that_a_crash_cut_short_is_no_step(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tr')
    with pytest.raises(RunError, match="no step was made"):
        begin(tmp_path)


def test_another_job_counts_anew_and_what_else_is_noted_stays(tmp_path: Path) -> None:
    (tmp_path / "slurm.json").write_text(json.dumps({"resume": "auto"}))
    begin(tmp_path)
    begin(tmp_path, job=Job("13", ["node1"]))
    noted = json.loads((tmp_path / "slurm.json").read_text())
    assert noted["resume"] == "auto" and [start["job"] for start in noted["starts"]] == ["12", "13"]


def test_folders_of_jobs_that_were_killed_are_removed_by_the_next(tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.mkdir()
    claim(node / "11-0")
    (node / "12-0" / "session").mkdir(parents=True)
    claim(node / "13-0")
    assert sorted(folder.name for folder in node.iterdir()) == ["11-0", "13-0"]
