"""Run folders as a report reads them: the figures of each step once, recipe, lock, and how the run ended."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine import checkpoint
from engine.errors import UserError

FINISHED, STOPPED, FAILED, UNFINISHED = "finished", "stopped", "failed", "unfinished"
SWEEP = "sweep.json"
"""What the folder of a sweep says of its points: {"points": {"000": {"optimizer.lr": "1e-5"}, …}, …}."""
LAST_STEPS = 10
"""Training steps whose mean stands for the end of a run."""

Series = dict[int, float | None]
"""Value of each step, in order; None: it was not finite."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read."""

    folder: Path
    name: str
    """What the report calls it; no other run of it has this name."""
    recipe: dict[str, Any]
    """Its resolved recipe; empty where there is none yet."""
    lock: dict[str, Any]
    """What it has consumed; empty where there is none yet."""
    series: dict[str, Series]
    """Values of each metric by step."""
    state: str
    """finished, stopped, failed or unfinished."""
    reason: str
    """Why it stopped or failed, as log.txt has it, or when its newest figures are from; empty: it has finished."""
    total_steps: int | None
    """Steps that it was going to do, as its newest checkpoint has it."""
    swept: dict[str, Any] = field(default_factory=dict)
    """What the sweep that it is a point of has set, by key; empty: no sweep.json says so."""
    notes: list[str] = field(default_factory=list)
    """What was passed over, a sentence each."""

    @property
    def step(self) -> int:
        """The newest step that has a training figure."""
        return max(self.series.get("train/loss", {}), default=0)

    def setting(self, key: str) -> Any:
        """Return what the run has under a dotted key, or under a group that was swept; None where there is nothing."""
        if key in self.swept:
            return self.swept[key]
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def finite(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric where it is finite, in order."""
        return [(step, value) for step, value in self.series.get(metric, {}).items() if value is not None]

    def last(self, metric: str) -> float | None:
        """Return the newest finite value of a metric."""
        found = self.finite(metric)
        return found[-1][1] if found else None

    def middle(self, metric: str) -> float | None:
        """Return the median of a metric over all steps."""
        found = [value for _, value in self.finite(metric)]
        return statistics.median(found) if found else None

    def closing(self, metric: str = "train/loss") -> float | None:
        """Return the mean of a metric over the last steps."""
        found = [value for _, value in self.finite(metric)[-LAST_STEPS:]]
        return statistics.fmean(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """A folder named on the command line: one run, or the runs in it."""

    folder: Path
    runs: list[Run]
    many: bool
    """Whether it is a folder of run folders."""


def gather(folders: Sequence[Path]) -> list[Group]:
    """Read run folders, and the run folders in others.

    Raises:
        UserError: Naming every folder that is no run or has no figures yet, and every file that cannot be read.
    """
    problems: list[str] = []
    groups = []
    once = list({folder.expanduser().resolve(): folder.expanduser() for folder in folders}.values())
    found = [(folder, _run_folders(folder, problems)) for folder in once]
    names = _names([inside for _, insides in found for inside in insides])
    for folder, insides in found:
        runs = []
        for inside in insides:
            try:
                runs.append(read(inside, names[inside]))
            except UserError as error:
                problems += error.problems
            except OSError as error:
                problems.append(f"{inside}: cannot be read ({error.strerror}); ask its owner, or leave it out.")
        many = insides != [folder]
        if runs and not any(run.series for run in runs):
            has = "none of its runs has figures" if many else "has no figures"
            problems.append(f"{folder}: {has} yet ({runs[0].reason}); name it again after the first step.")
        groups.append(Group(folder=folder, runs=runs, many=many))
    if problems:
        raise UserError(*problems)
    return groups


def _run_folders(folder: Path, problems: list[str]) -> list[Path]:
    """Return the folder itself if it is a run's, else those in it that are."""
    try:
        if not folder.is_dir():
            problems.append(f"{folder}: no such folder; name run folders, or a folder of them.")
            return []
        if is_run(folder):
            return [folder]
        points = _points(folder)
        inside = [folder / name for name in points] if points else folder.iterdir()
        found = sorted(run for run in inside if run.is_dir() and (is_run(run) or _has_log(run)))
    except OSError as error:
        problems.append(f"{folder}: cannot be read ({error.strerror}); ask its owner.")
        return []
    if not any(map(is_run, found)):
        problems.append(
            f"{folder}: no run folder (it has neither recipe.yaml nor metrics.jsonl), nor a folder of them; name run folders."
        )
        return []
    return found


def _points(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the swept values of each run of a sweep by its folder's name, as its sweep.json has them; empty: there is none."""
    points = _mapping(folder / SWEEP).get("points")
    if not isinstance(points, dict) or not all(isinstance(values, dict) for values in points.values()):
        return {}
    return {name: {key: _number(str(value)) for key, value in values.items()} for name, values in points.items()}


def _number(word: str) -> Any:
    """Return a word of the command line as the number that it is, or as it is."""
    try:
        return int(word) if word.lstrip("-").isdigit() else float(word)
    except ValueError:
        return word


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's."""
    return (folder / "recipe.yaml").is_file() or (folder / "metrics.jsonl").is_file()


def _has_log(folder: Path) -> bool:
    """Tell whether a folder is that of a run which ended before it had a recipe."""
    return (folder / "log.txt").is_file()


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the shortest end of each path that no other has."""
    parts = {folder: folder.absolute().parts for folder in folders}
    names = {}
    for folder, own in parts.items():
        others = [other for another, other in parts.items() if another is not folder]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names[folder] = "/".join(own[-length:])
    return names


def read(folder: Path, name: str) -> Run:
    """Read a run folder.

    Raises:
        UserError: If a file of it cannot be read.
    """
    series, notes = figures(folder / "metrics.jsonl")
    step = max(series.get("train/loss", {}), default=0)
    state, reason, total_steps = _ending(folder, step)
    return Run(
        folder=folder,
        name=name,
        swept=_points(folder.parent).get(folder.name, {}),
        recipe=_mapping(folder / "recipe.yaml"),
        lock=_mapping(folder / "lock.json"),
        series=series,
        state=state,
        reason=reason,
        total_steps=total_steps,
        notes=notes + _not_finite(series),
    )


def figures(file: Path) -> tuple[dict[str, Series], list[str]]:
    """Read metrics.jsonl: each step once, as the last attempt at it had it; and what was passed over.

    Where a step comes again, a run has gone on from a checkpoint before it, and what was there from that step on is void.
    """
    found: dict[str, Series] = {}
    bad: list[int] = []
    last = -1
    lines = _text(file).splitlines()
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None:
            bad += [number] if line.strip() else []
            continue
        step = row.pop("step")
        if step < last:
            found = {name: {s: v for s, v in series.items() if s < step} for name, series in found.items()}
        last = step
        for name, value in row.items():
            if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                finite = value is not None and math.isfinite(value)
                found.setdefault(name, {})[step] = value if finite else None
    return {name: series for name, series in found.items() if series}, _passed_over(bad, len(lines))


def _row(line: str) -> dict[str, Any] | None:
    """Return a line's object, or None where it is not one with a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _passed_over(bad: list[int], count: int) -> list[str]:
    """Say which lines of metrics.jsonl were not used."""
    if bad == [count]:
        return ["the last line of metrics.jsonl is cut short and was ignored"]
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        return [f"{len(bad)} lines of metrics.jsonl are not readable and were ignored: {shown}"]
    return []


def _not_finite(series: dict[str, Series]) -> list[str]:
    """Say where the loss or the norm of the gradient was not finite."""
    found = []
    for name in ("train/loss", "train/grad_norm", "validation/loss"):
        steps = [step for step, value in series.get(name, {}).items() if value is None]
        if steps:
            shown = ", ".join(map(str, steps[:5])) + (", …" if len(steps) > 5 else "")
            found.append(f"{name} was not finite at {len(steps)} step{'s' * (len(steps) > 1)}: {shown}")
    return found


def _ending(folder: Path, step: int) -> tuple[str, str, int | None]:
    """Return how a run ended, why, and how many steps it was going to do.

    Where log.txt does not say, it is finished if its newest checkpoint says so and no step came after; without checkpoints, if its
    final weights are there.
    """
    saved = checkpoint.all_in(folder / "checkpoints")
    newest = checkpoint.read_state(saved[-1]) if saved else None
    state, reason = _last_word(_text(folder / "log.txt"))
    final = any((folder / name).is_file() for name in ("hf/config.json", "adapter/adapter_config.json"))
    if state == UNFINISHED and (newest.finished and step <= newest.step if newest is not None else final):
        state = FINISHED
    if state == UNFINISHED:
        reason = _newest_figures(folder / "metrics.jsonl")
    return state, reason, newest.total_steps if newest is not None else None


def _newest_figures(file: Path) -> str:
    """Say when the newest figures were written, which tells a run that goes on from one that was killed."""
    if not file.is_file():
        return "no figures yet"
    return time.strftime("newest figures of %-d %B %Y, %H:%M", time.localtime(file.stat().st_mtime))


def _last_word(log: str) -> tuple[str, str]:
    """Return what a run's last attempt says about its end, and why."""
    attempt = log[log.rfind("run folder ") :] if "run folder " in log else log
    for line in reversed(attempt.splitlines()):
        if line.startswith("error: "):
            return FAILED, line.removeprefix("error: ")
        if line.startswith("stopped by "):
            return STOPPED, line.partition(";")[0]
        if line.startswith(("done: ", "already finished: ")):
            return FINISHED, ""
    return UNFINISHED, ""


def _mapping(file: Path) -> dict[str, Any]:
    """Return the mapping that a YAML or JSON file holds; empty if there is no file."""
    text = _text(file)
    try:
        found = json.loads(text or "{}") if file.suffix == ".json" else yaml.safe_load(text or "{}")
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: cannot be read ({reason}); restore it, or leave {file.parent} out.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no mapping; restore it, or leave {file.parent} out.")
    return found


def _text(file: Path) -> str:
    """Return a file's text; empty if there is no file."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); ask its owner, or leave {file.parent} out."
        ) from error
