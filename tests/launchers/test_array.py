"""Sweeps on Slurm: one array, the reference before it, nothing left of a submission that fails, and where the runs stand."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.__main__ import main
from engine.sweep.__main__ import main as table
from engine.sweep.points import Record
from tests.conftest import ROOT
from tests.launchers.conftest import FakeSlurm

CPUS = ["cluster=slurm", "cluster.num_workers=2"]
BETAS = "algorithm.reference_policy_kl_penalty=0.05,0.1"


@pytest.fixture
def sweep(dpo: list[str], tmp_path: Path) -> list[str]:
    """Four points over one reference, two at a time; the sweep's folder is tmp_path/sweep."""
    values = [BETAS, "optimizer.lr=1e-3,1e-4", "cluster.max_parallel=2"]
    return ["-m", *dpo, *CPUS, *values, f"run.dir={tmp_path / 'sweep'}"]


def standing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """Return where each run stands, in the order of their names, and the rest of what the table's command prints."""
    capsys.readouterr()
    assert table([str(tmp_path / "sweep")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = sorted(line for line in lines if line[:3].isdigit())
    return [row.split("–  ", 1)[1].strip(" –") for row in rows], "\n".join(lines[len(rows) + 1 :])


def begin(folder: Path, log: str = "", step: int | None = None) -> None:
    """Write a run folder as far as a run has come."""
    (folder / "log.txt").write_text(f"run folder {folder}\n{log}")
    if step is not None:
        (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "train/loss": 1.0}) + "\n")


def test_one_array_behind_the_reference(
    slurm: FakeSlurm, sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sweep) == 0
    root = tmp_path / "sweep"
    assert slurm.jobs == ["101", "102", "103"]
    assert shlex.split(slurm.command("101"))[5:] == ["--prepare", *(str(root / f"00{i}") for i in range(4))]
    assert shlex.split(slurm.command("102"))[5:] == ["--array", str(root / "reference")]
    assert shlex.split(slurm.command("103"))[5:] == ["--array", *(str(root / f"00{i}") for i in range(4))]
    assert slurm.options("102")["dependency"] == "afterok:101" and slurm.options("103")["array"] == "0-3%2"
    assert slurm.options("103")["dependency"] == "afterok:101:102"
    assert Record.of(root).tasks == {f"00{i}": f"103_{i}" for i in range(4)} and Record.of(root).job == "103"
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 103 (4 runs, 2 at a time), which waits for job 101 to download and tokenise and job 102 to compute the reference",
        f"sweep       {root}",
        f"table       python -m engine.sweep {root}",
        "watch       squeue --jobs=101,102,103",
        f"output      {root}/slurm/103_N.out (101.out: preparing)",
        "cancel      scancel 101 102 103",
    ]


def test_an_array_that_sbatch_refuses_leaves_no_reference_behind(
    slurm: FakeSlurm,
    sweep: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REFUSED", "array=0-3")
    monkeypatch.setenv("SAID", "Invalid job array specification")
    assert main(sweep) == 2
    assert capsys.readouterr().err.startswith(
        "error: sbatch refuses the job (Batch job submission failed: Invalid job array"
    )
    assert slurm.jobs == ["101", "102"] and slurm.cancelled == ["101", "102"]
    assert Record.of(tmp_path / "sweep").job is None
    monkeypatch.delenv("REFUSED")
    assert main(sweep) == 0 and slurm.jobs[2:] == ["103", "104", "105"]


def test_what_slurm_knows_is_in_the_table(
    slurm: FakeSlurm, sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sweep) == 0
    root = tmp_path / "sweep"
    for number, state in enumerate(("RUNNING", "PENDING", "PENDING", "REQUEUED")):
        slurm.state(f"103_{number}", state)
    before = len(slurm.asked)
    said, rest = standing(tmp_path, capsys)
    assert said == ["running, no step yet", "queued", "queued", "queued"]
    assert slurm.asked[before:] == ["103"]  # once, for all
    assert "1 running, 3 queued" in rest and "goes on with what is missing" not in rest
    capsys.readouterr()
    assert main(sweep) == 2 and "job 103 of this sweep is still queued or running" in capsys.readouterr().err
    begin(root / "000", "error: a.\n")
    begin(root / "001", "step 2/6  loss\nstopped by SIGUSR2 after step 3 of 6\n", step=3)  # and queued again
    begin(root / "002", "step 2/6  loss\n", step=2)
    for number, state in ((0, None), (2, "RUNNING"), (3, None)):
        slurm.state(f"103_{number}", state)
    said, rest = standing(tmp_path, capsys)
    assert said == ["failed: a.", "queued, step 3 of 6", "running, step 2 of 6", "missing"]
    assert "goes on with what is missing" not in rest  # that would be refused
    for number in range(4):
        slurm.state(f"103_{number}", None)
    assert "goes on with what is missing" in standing(tmp_path, capsys)[1]


def test_the_table_needs_no_slurm(
    slurm: FakeSlurm,
    sweep: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(sweep) == 0
    slurm.state("103_0", "RUNNING")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert standing(tmp_path, capsys)[0] == ["missing"] * 4


def test_the_same_command_submits_what_is_missing(
    slurm: FakeSlurm, sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sweep) == 0
    for name in ("000", "002", "003"):
        begin(tmp_path / "sweep" / name, "done: 6 steps\n", step=6)
    capsys.readouterr()
    assert main(sweep) == 0
    said = capsys.readouterr().out.splitlines()[0]  # one alone computes its own reference
    assert said == "submitted job 105 (1 run), which waits for job 104 to download and tokenise"
    assert shlex.split(slurm.command("105"))[5:] == ["--array", str(tmp_path / "sweep" / "001")]
    assert Record.of(tmp_path / "sweep").tasks == {"001": "105_0"}


def test_a_sweep_is_not_waited_for(slurm: FakeSlurm, sweep: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*sweep, "cluster.wait=true"]) == 2
    assert "cluster.wait=True: one run is waited for, and not a sweep" in capsys.readouterr().err and slurm.jobs == []


def test_several_references_are_an_array_too(
    slurm: FakeSlurm, sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sweep, "run.seed=0,1"]) == 0
    folders = [str(tmp_path / "sweep" / f"reference{i}") for i in range(2)]
    assert shlex.split(slurm.command("102"))[5:] == ["--array", *folders]
    assert slurm.options("102")["array"] == "0-1%2" and slurm.options("103")["array"] == "0-7%2"


def test_the_table_loads_nothing_heavy(slurm: FakeSlurm, sweep: list[str], tmp_path: Path) -> None:
    assert main(sweep) == 0
    program = (
        "import sys; from engine.sweep.__main__ import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'ray', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "sweep"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
