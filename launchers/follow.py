"""``cluster.wait=true``: the run's log as it grows, until its job ends."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from engine.errors import EXIT_DONE, EXIT_ERROR, RunError
from launchers import slurm
from launchers.submit import Submission

PERIOD_S = 2.0
"""Between two looks at the files; Slurm is asked every few of them."""
LOOKS = 5
MISSES = 6
"""Times that Slurm may not know a job before it is given up: its controller may be starting again."""


def follow(submitted: Submission, view: View) -> int:
    """Show a run's log and state until its job ends, and return the job's exit code; Ctrl-C asks whether it goes on.

    Args:
        submitted: The run.
        view: What shows it.

    Raises:
        RunError: If Slurm has forgotten the job, or the job that prepares it has failed.
    """
    try:
        if submitted.prepared_by is not None:
            code = _until_ended(submitted.prepared_by, "preparing", view)
            if code != EXIT_DONE:
                output = submitted.folder / "slurm" / f"{submitted.prepared_by}.out"
                raise RunError(f"job {submitted.prepared_by} could not prepare the run: {_last_line(output)}")
        code = _until_ended(submitted.job_id, "training", view)
    except KeyboardInterrupt:
        view.close()
        return _interrupted(submitted)
    finally:
        view.close()
    if code != EXIT_DONE:
        print(f"job {submitted.job_id} has ended with exit code {code}; its output is in {submitted.output}")
    return code


class View:
    """What is new in a run's log.txt from now on, and on a terminal its state and step."""

    def __init__(self, folder: Path) -> None:
        from rich.console import Console

        self.folder = folder
        self._log: TextIO | None = None
        self._console = Console(highlight=False, soft_wrap=True)
        self._status: Any = None
        self._start = self._log_file.stat().st_size if self._log_file.is_file() else 0

    @property
    def _log_file(self) -> Path:
        return self.folder / "log.txt"

    def show(self, state: str) -> None:
        """Show what is new, and the state under it."""
        if self._log is None and self._log_file.is_file():
            self._log = self._log_file.open()
            self._log.seek(self._start)
        if self._log is not None:
            for line in self._log:
                self._console.print(line.rstrip("\n"), markup=False)
        if not self._console.is_terminal:
            return
        self._status = self._status or self._console.status("")
        self._status.start()
        self._status.update(f"{state}{self._step()}")

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Take the state away."""
        if self._status is not None:
            self._status.stop()

    def _step(self) -> str:
        """Return the newest step, as the run has written it."""
        file = self.folder / "metrics.jsonl"
        for line in reversed(_tail(file) if file.is_file() else []):
            try:
                row = json.loads(line)
            except ValueError:  # cut where the tail begins, or being written
                continue
            if "train/loss" in row:
                return f", step {row['step']}, loss {row['train/loss'] or float('nan'):.4f}"
        return ""


def _until_ended(job_id: str, what: str, view: View) -> int:
    """Follow one job to its end and return its exit code."""
    state, looks, known, missed = "PENDING", 0, "", 0
    while True:
        if looks % LOOKS == 0:
            state = slurm.live(job_id) or ""
            if state != known and state:
                view.say(f"job {job_id} ({what}): {state.lower()}")
                known = state
        view.show(f"job {job_id} {state.lower()}")
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
    ids = [i for i in (submitted.prepared_by, submitted.job_id) if i]
    answer = ""
    if sys.stdin.isatty():
        try:
            answer = input(f"\njob {submitted.job_id} runs on; cancel it? [y/N] ")
        except (KeyboardInterrupt, EOFError):
            print()
    if answer.strip().lower() not in ("y", "yes"):
        print(f"job {submitted.job_id} runs on; scancel {' '.join(ids)} cancels it")
        return EXIT_DONE
    for job_id in ids:
        if slurm.live(job_id) is not None:
            slurm.cancel(job_id)
    print("cancelled; the same command goes on from the last checkpoint, if there is one")
    return EXIT_ERROR


def _tail(file: Path, num_bytes: int = 8192) -> list[str]:
    """Return the last lines of a file."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - num_bytes))
        return stream.read().decode(errors="replace").splitlines()


def _last_line(file: Path) -> str:
    lines = file.read_text().strip().splitlines() if file.is_file() else []
    return lines[-1].removeprefix("error: ") if lines else f"see {file}"
