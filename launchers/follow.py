"""``cluster.wait=true``: the run's log as it grows, and on a terminal its progress, until its job ends."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from engine.errors import EXIT_DONE, EXIT_ERROR, RunError
from engine.metrics import STEP_LINE, Bar
from launchers import slurm
from launchers.submit import Submission

PERIOD_S = 2.0
"""Between two looks at the files; Slurm is asked every few of them."""
LOOKS = 5
MISSES = 6
"""Times that Slurm may not know a job before it is given up: its controller may be starting again."""
TAIL_BYTES = 16384
"""Of metrics.jsonl that are read for its last line."""


def follow(submitted: Submission, view: View) -> int:
    """Show a run's log and progress until its job ends, and return the job's exit code; Ctrl-C asks whether it goes on.

    Args:
        submitted: The run.
        view: What shows it.

    Raises:
        RunError: If Slurm has forgotten the job.
    """
    try:
        with closing(view):
            return _all_ended(submitted, view)
    except KeyboardInterrupt:
        return _interrupted(submitted)


class View:
    """What is new in a run's log.txt from now on, and on a terminal the state of its job, then the bar of a run that is here.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        from rich.console import Console

        self.folder = folder
        self._log: TextIO | None = None
        self._console = Console(highlight=False, soft_wrap=True)
        self._status = self._console.status("")
        self._bar: Bar | None = None
        file = folder / "log.txt"
        self._start = file.stat().st_size if file.is_file() else 0

    def show(self, state: str) -> None:
        """Show what is new, and under it the progress; the state of the job until there is any."""
        for line in self._new_lines():
            shown = STEP_LINE.match(line) if self._console.is_terminal else None
            if shown is None:
                self.say(line)
            elif self._bar is None:
                self._status.stop()
                self._bar = Bar(self._console, int(shown["step"]), int(shown["total"]))
        if self._bar is not None:
            row = _newest(self.folder / "metrics.jsonl")
            if row is not None:
                self._bar.show(row["step"], row)
        elif self._console.is_terminal:
            self._status.start()
            self._status.update(state)

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Take the progress away."""
        self._status.stop()
        if self._bar is not None:
            self._bar.close()

    def _new_lines(self) -> list[str]:
        file = self.folder / "log.txt"
        if self._log is None and file.is_file():
            self._log = file.open()
            self._log.seek(self._start)
        return [] if self._log is None else self._log.read().splitlines()


def _newest(file: Path) -> dict[str, Any] | None:
    """Return the figures of the last training step of metrics.jsonl, null as nan; None: there are none yet."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        tail = stream.read().decode(errors="replace").splitlines()
    for line in reversed(tail):
        try:
            row = json.loads(line)
        except ValueError:  # cut where the tail begins, or being written
            continue
        if "train/loss" in row:
            return {name: math.nan if value is None else value for name, value in row.items()}
    return None


def _all_ended(submitted: Submission, view: View) -> int:
    """Follow the jobs of a run, one after the other, and return the exit code of the last, or of the first that fails."""
    for job_id in submitted.jobs:
        what = f"job {job_id} ({'preparing' if job_id == submitted.prepared_by else 'training'})"
        code = _ended(job_id, what, view)
        if code != EXIT_DONE:
            view.say(f"{what} has ended with exit code {code}; its output is in {submitted.output(job_id)}")
            return code
    return EXIT_DONE


def _ended(job_id: str, what: str, view: View) -> int:
    """Follow one job to its end and return its exit code."""
    state, looks, missed = "", 0, 0
    while True:
        if looks % LOOKS == 0:
            now = slurm.live(job_id) or ""
            if now not in ("", state):
                view.say(f"{what}: {now.lower()}")
            state = now
        view.show(f"{what}: {state.lower()}")
        if not state:
            code = slurm.ended(job_id)
            if code is not None:
                return code
            missed += 1
            if missed == MISSES:
                raise RunError(f"job {job_id}: Slurm knows it no longer, or does not answer; look into {view.folder}.")
        looks += 1
        time.sleep(PERIOD_S)


def _interrupted(submitted: Submission) -> int:
    """Ask whether the job is to run on; without an answer it does."""
    answer = ""
    if sys.stdin.isatty():
        try:
            answer = input(f"\njob {submitted.job_id} runs on; cancel it? [y/N] ")
        except (KeyboardInterrupt, EOFError):
            print()
    if answer.strip().lower() not in ("y", "yes"):
        print(f"job {submitted.job_id} runs on; scancel {' '.join(submitted.jobs)} cancels it")
        return EXIT_DONE
    slurm.cancel(*submitted.jobs)
    print("cancelled; the same command goes on from the last checkpoint, if there is one")
    return EXIT_ERROR
