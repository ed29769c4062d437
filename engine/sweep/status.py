"""Where the runs of a sweep stand, by their folders, live or long over; by Slurm too, of what it has still queued or running."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.columns import columns
from engine.run_folder import is_live
from engine.sweep.points import Record

Kind = Literal["done", "running", "queued", "stopped", "failed", "missing"]
ORDER: tuple[Kind, ...] = ("done", "running", "queued", "stopped", "failed", "missing")
BEGUN = "run folder "
ENDS: dict[str, Kind] = {"done: ": "done", "already finished: ": "done", "stopped by ": "stopped", "error: ": "failed"}
"""How the lines of log.txt begin that say how a run has ended."""
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
"""Slurm's states of a job that is yet to start, or to start again."""
SILENT = "ended without a word: its process was killed, or its machine was lost"


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where one run stands."""

    kind: Kind
    said: str = ""
    """The line of log.txt that says how it has ended."""
    step: int | None = None
    """The last step of which there are figures."""
    total: int | None = None
    """Steps that the run is to do; None: not known yet."""
    best: float | None = None
    """Best value of the metric."""
    best_step: int | None = None
    """The step that it was measured after."""

    @property
    def place(self) -> str:
        """How far it is, in words."""
        return "no step yet" if not self.step else f"step {self.step}" + (f" of {self.total}" if self.total else "")

    def __str__(self) -> str:
        if self.kind == "failed":
            return f"failed: {self.said}"
        if self.kind in ("running", "stopped") or (self.kind == "queued" and self.step):
            return f"{self.kind}, {self.place}"
        return self.kind


def read(folder: Path, metric: str, mode: str) -> Status:
    """Return where a run stands.

    Args:
        folder: Its run folder.
        metric: ``checkpoint.metric``.
        mode: ``checkpoint.mode``.
    """
    kind, said = _end(folder)
    lines = _lines(folder / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    values = [(line[metric], line["step"]) for line in lines if isinstance(line.get(metric), (int, float))]
    best, best_step = (min if mode == "min" else max)(values, key=lambda item: item[0], default=(None, None))
    return Status(
        kind=kind, said=said, step=max(steps, default=None), total=total_steps(folder), best=best, best_step=best_step
    )


def is_done(folder: Path) -> bool:
    """Tell whether the run in a folder has done all its steps."""
    return _end(folder)[0] == "done"


def progress(folder: Path) -> str:
    """Return how far a run is, in words."""
    lines = _lines(folder / "metrics.jsonl")
    return Status(kind="running", step=lines[-1]["step"] if lines else None, total=total_steps(folder)).place


def ask_slurm(record: Record) -> dict[str, Kind]:
    """Return which runs Slurm has queued or running, by the names of their folders; none where Slurm is not at hand."""
    if record.job is None:
        return {}
    from launchers import slurm  # loaded only where something was submitted

    states = slurm.states(record.job)
    kinds: dict[str, Kind] = {task: "queued" if state in WAITING else "running" for task, state in states.items()}
    return {name: kinds[task] for name, task in record.tasks.items() if task in kinds}


def table(root: Path, record: Record, submitted: Mapping[str, Kind]) -> str:
    """Return the runs of a sweep as a table, those that are done first, the best of them at the top.

    Args:
        root: The sweep's folder.
        record: What its sweep.json holds.
        submitted: Which runs Slurm has queued or running, by the names of their folders: it knows it before their folders do.
    """
    found = {name: read(root / name, record.metric, record.mode) for name in record.points}
    for name, kind in submitted.items():
        if found[name].kind not in ("done", "running"):
            found[name] = replace(found[name], kind=kind)
    keys = list(dict.fromkeys(key for values in record.points.values() for key in values))
    rows = [("run", *keys, record.metric, "at step", "")]
    for name in sorted(found, key=lambda name: (*_rank(found[name], record.mode), name)):
        status, values = found[name], record.points[name]
        measured = ("–", "–") if status.best is None else (f"{status.best:.6g}", str(status.best_step))
        rows.append((name, *(values.get(key, "–") for key in keys), *measured, str(status)))
    counts = {kind: sum(status.kind == kind for status in found.values()) for kind in ORDER}
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    notes = [f"{root}: {summary}; best {record.metric} first (checkpoint.metric, checkpoint.mode={record.mode})"]
    if counts["done"] and all(status.best is None for status in found.values()):
        notes.append(
            f"no run has logged {record.metric}: give validation data, or set checkpoint.metric=train/loss to rank by that."
        )
    return "\n".join([*columns(rows, left={-1}), *notes])


def total_steps(folder: Path) -> int | None:
    """Return how many steps a run is to do, once its log says so."""
    for line in reversed(log(folder)):
        if line.startswith(BEGUN):
            break
        if found := re.match(r"(?:resuming after |stopped by \w+ after )?step \d+(?:/| of )(\d+)", line):
            return int(found[1])
    return None


def _rank(status: Status, mode: str) -> tuple[int, float]:
    worth = math.inf if status.best is None else status.best if mode == "min" else -status.best
    return ORDER.index(status.kind), worth


def _end(folder: Path) -> tuple[Kind, str]:
    """Return how a run has ended, and the words for it."""
    if is_live(folder):
        return "running", ""
    lines = log(folder)
    return ending(lines) or (("failed", SILENT) if lines else ("missing", ""))


def ending(lines: list[str]) -> tuple[Kind, str] | None:
    """Return how a run has ended, and the words for it, by the lines of its log; None: they do not say."""
    for line in reversed(lines):
        for head, kind in ENDS.items():
            if line.startswith(head):
                return kind, line.removeprefix("error: ")
        if line.startswith(BEGUN):
            break
    return None


def log(folder: Path) -> list[str]:
    """Return the lines of a run's log.txt."""
    file = folder / "log.txt"
    return file.read_text(errors="replace").splitlines() if file.is_file() else []


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, but for one that is being written."""
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
