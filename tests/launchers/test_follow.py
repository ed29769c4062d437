"""``cluster.wait=true``: what a terminal shows of a run that is elsewhere, and what Ctrl-C does."""

from __future__ import annotations

import json
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from engine.metrics import TerminalConsole
from launchers import follow as following
from launchers.follow import View, follow
from launchers.submit import Submission
from tests.launchers.conftest import FakeSlurm

FIGURES: dict[str, Any] = {
    "train/loss": 1.25,
    "train/accuracy": 0.5,
    "train/lr": 1e-3,
    "perf/tokens_per_second": 1234.0,
    "perf/step_s": 0.5,
}
FRAME = r"step +(\d+/\d+) (\S+) (loss.*?tokens/s)"
"""Step, bar and figures of a frame."""


@pytest.fixture
def submitted(slurm: FakeSlurm, tmp_path: Path) -> Submission:
    return Submission(job_id="102", folder=tmp_path, prepared_by="101")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rich take standard output for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def plain(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, without a terminal's codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)


def write(folder: Path, text: str = "", **row: Any) -> None:
    with (folder / "log.txt").open("a") as log:
        log.write(text)
    if row:
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(row) + "\n")


def test_a_followed_run_looks_like_one_that_is_here(
    terminal: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    here = TerminalConsole(tmp_path / "here" / "log.txt")
    here.say("run folder here")
    here.start(0, 40)
    for step in (1, 2):
        here.log(step, FIGURES)
    here.close()
    local = plain(capsys)
    view = View(tmp_path)
    view.show("job 102 (training): running")
    time.sleep(0.5)  # rich draws ten times a second
    assert "job 102 (training): running" in plain(capsys)
    write(tmp_path, (tmp_path / "here" / "log.txt").read_text())
    for step in (1, 2):
        write(tmp_path, step=step, **FIGURES)
        view.show("job 102 (training): running")
    view.close()
    followed = plain(capsys)
    assert re.findall(FRAME, followed)[-1] == re.findall(FRAME, local)[-1]
    assert re.findall(FRAME, local)[-1][::2] == ("2/40", "loss 1.2500  accuracy 0.500  1,234 tokens/s")
    assert "run folder here" in followed and "lr 1.00e-03" not in followed + local  # the bar is in that line's place


def test_a_resumed_run_and_figures_that_are_not_there(
    terminal: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "step 3/9  loss 1.0\n", step=3, **FIGURES)
    view = View(tmp_path)
    view.show("pending")
    assert not re.findall(FRAME, plain(capsys))  # of the run before
    write(tmp_path, "resuming after step 3 of 40\nstep 4/40  loss nan  9 tokens/s\nstep 4/40  validation/loss 2.0\n")
    write(tmp_path, step=4, **{"train/loss": None, "perf/tokens_per_second": 9.0})
    write(tmp_path, step=4, **{"validation/loss": 2.0})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 5, "tr')  # being written
    view.show("running")
    view.close()
    said = plain(capsys)
    step, _, figures = re.findall(FRAME, said)[-1]
    assert (step, figures) == ("4/40", "loss nan  9 tokens/s")
    assert "resuming after step 3 of 40" in said and "step 4/40  validation/loss 2.0" in said


def test_the_first_job_that_fails_ends_it(
    slurm: FakeSlurm, submitted: Submission, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "PERIOD_S", 0.0)
    slurm.ended("101", "FAILED", 2)
    assert follow(submitted, View(submitted.folder)) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert f"job 101 (preparing) has ended with exit code 2; its output is in {submitted.output('101')}" in said
    for job_id in ("101", "102"):
        slurm.ended(job_id, "COMPLETED", 0)
    assert follow(submitted, View(submitted.folder)) == 0


@pytest.mark.parametrize(("answer", "code", "cancelled"), [("", 0, []), ("n", 0, []), ("y", 1, ["101", "102"])])
def test_ctrl_c_asks_whether_the_job_runs_on(
    slurm: FakeSlurm,
    submitted: Submission,
    terminal: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
    cancelled: list[str],
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following, "time", types.SimpleNamespace(sleep=interrupt))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    slurm.ended("101", "COMPLETED", 0)
    slurm.state("102", "RUNNING")
    assert follow(submitted, View(submitted.folder)) == code
    assert "job 102 runs on; cancel it? [y/N]" in asked[0] and slurm.cancelled == cancelled
    said = plain(capsys)
    assert ("cancelled; the same command" if cancelled else "job 102 runs on; scancel 101 102 cancels it") in said
