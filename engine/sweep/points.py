"""The points of a sweep: the words of ``-m`` become recipes, and each gets its folder.

``sweep.json`` in the sweep's folder says which values are where, so that the same command, or one with further values, finds
what is there. A point is its swept values; its recipe is written to its folder before it starts, and is what runs, whatever
becomes of the configs meanwhile.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.config import compose
from engine.config.schema import RunConfig
from engine.errors import UserError
from engine.run_folder import difference

FILE = "sweep.json"
HORIZON = ("max_num_steps", "max_num_epochs")
"""Keys of ``algorithm`` that have a finished run go on."""


@dataclass(kw_only=True)
class Record:
    """What sweep.json holds."""

    command: str
    """The command that goes on with the sweep."""
    metric: str
    """``checkpoint.metric``, which ranks the runs."""
    mode: str
    """``checkpoint.mode``: min or max."""
    points: dict[str, dict[str, str]] = field(default_factory=dict)
    """The swept values of each run, by key, by the name of its folder."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Slurm's task, JOB_NUMBER, of each run that was submitted last, by the name of its folder."""

    @property
    def job(self) -> str | None:
        """Slurm's job that has these tasks; None: nothing was submitted."""
        return next((task.partition("_")[0] for task in self.tasks.values()), None)

    @classmethod
    def of(cls, folder: Path) -> Record:
        """Read a sweep's folder.

        Raises:
            UserError: If it is none.
        """
        try:
            return cls(**json.loads((folder / FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{folder}: no sweep's folder (it has no readable {FILE}); give run.dir of a python -m engine -m …"
            ) from error

    def write(self, folder: Path) -> None:
        """Write sweep.json."""
        aside = folder / f".{FILE}.tmp"
        aside.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(aside, folder / FILE)

    def name(self, values: dict[str, str]) -> str:
        """Return the folder's name of a point: the one it has, or the next."""
        known = next((name for name, its in self.points.items() if its == values), None)
        name = known or f"{len(self.points):03d}"
        self.points[name] = values
        return name


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    folder: Path
    """Its run folder."""
    values: dict[str, str]
    """What is swept, by key."""
    config: RunConfig
    """Its recipe; ``run.dir`` is its folder."""
    recipe: str
    """The recipe's text."""

    @property
    def file(self) -> Path:
        """The recipe, in the run's folder."""
        return self.folder / "recipe.yaml"

    def __str__(self) -> str:
        return " ".join([self.folder.name, *(f"{key}={value}" for key, value in self.values.items())])

    def words(self, folder: Path | None = None) -> list[str]:
        """Return the words with which ``python -m engine`` runs it, in its folder or another."""
        resume = self.config.run.resume
        where = folder or self.folder
        return [
            f"recipe={compose.quoted(self.file)}",
            f"run.dir={compose.quoted(where)}",
            f"run.resume={compose.quoted(resume)}",
        ]

    def same_horizon(self) -> bool:
        """Tell whether the run in its folder was to go as far as this one."""
        before, now = self._before().get("algorithm", {}), self.config.algorithm
        return all(before.get(key) == getattr(now, key) for key in HORIZON)

    def conflict(self) -> str | None:
        """Return what keeps the run that its folder holds from going on with this recipe; None: nothing."""
        found = difference(self._before(), yaml.safe_load(self.recipe))
        if not found:
            return None
        shown = "".join(f"\n  {key}: {old!r} → {new!r}" for key, old, new in found)
        remedy = "restore these keys to go on with it, or choose another run.dir"
        return f"{self.folder}: holds a run of another recipe; {remedy}:{shown}"

    def freeze(self) -> None:
        """Write its recipe to its folder.

        Raises:
            UserError: If that cannot be.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file.write_text(self.recipe)
        except OSError as error:
            raise UserError(
                f"run.dir={self.folder}: cannot be made or written ({error.strerror}); choose another folder."
            ) from error

    def _before(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load(self.file.read_text()) if self.file.is_file() else {}
        return found


def points(overrides: Sequence[str]) -> tuple[list[Point], Record]:
    """Compose every combination of the swept values, and give each its folder.

    Args:
        overrides: Words of the command line; ``run.dir`` is the sweep's folder.

    Returns:
        The points, in the order of the values, and what sweep.json is to hold.

    Raises:
        UserError: With every problem of every point, once.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = compose.parse(compose.swept(list(overrides)))
    swept = {
        override.key_or_group: override.is_sweep_override() for override in parsed
    }  # of a key given twice, the last
    combinations = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    composed = _compose([compose.with_quickstart(list(words)) for words in combinations])
    for own in ("run.dir", "run.resume", "cluster", "cluster.name", "cluster.max_parallel"):
        if swept.get(own):
            raise UserError(f"{own}: a sweep has one; give one value.")
    if any(recipe.config.cluster.name == "env" for recipe in composed):
        raise UserError("-m: cluster=env runs one recipe on the ranks that are there; start a command for each point.")
    first = composed[0].config
    root = Path(first.run.dir).expanduser().absolute()
    record = _record(root, overrides, first)
    found = {}
    for words, recipe in zip(combinations, composed, strict=True):
        given = dict(word.lstrip("+").split("=", 1) for word in words)
        values = {key: text for key, text in given.items() if swept[key]}
        folder = root / record.name(values)
        run = recipe.config.run.model_copy(update={"dir": str(folder)})
        config = recipe.config.model_copy(update={"run": run})
        found[folder] = Point(folder=folder, values=values, config=config, recipe=recipe.recipe)
    return list(found.values()), record


def _compose(combinations: list[list[str]]) -> list[compose.Composed]:
    """Compose all points, or raise all that is wrong with any."""
    composed, problems = [], list[str]()
    for words in combinations:
        try:
            composed.append(compose.compose(words))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return composed


def _record(root: Path, overrides: Sequence[str], config: RunConfig) -> Record:
    """Return what sweep.json of a folder is to hold, but for new points: those that it has stay.

    Raises:
        UserError: If the folder holds a run.
    """
    if (root / "metrics.jsonl").exists():
        raise UserError(f"run.dir={root}: holds a run, and is to be a sweep's folder; choose another one.")
    words = [word for word in overrides if not word.startswith("run.dir=")]
    command = f"python -m engine -m {shlex.join([*words, f'run.dir={compose.quoted(root)}'])}"
    before = Record.of(root).points if (root / FILE).is_file() else {}
    return Record(command=command, metric=config.checkpoint.metric, mode=config.checkpoint.mode, points=before)
