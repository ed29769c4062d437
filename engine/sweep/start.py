"""``python -m engine -m …``: run, or submit, the points of a sweep that are missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from engine import checkpoint
from engine.config import compose
from engine.config.schema import RunConfig
from engine.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, UserError
from engine.run_folder import LOCK, is_live, take_lock
from engine.sweep import pool, status
from engine.sweep.points import FILE, Point, Record, points

HERE = ("local", "ray_local", "ray")
"""Choices of cluster whose runs are started from here; others are submitted."""
PREPARED = "reference"
"""Folder, in the sweep's, of the job that computes what several runs wait for."""
NO_REFERENCE = ("simpo", "orpo")
"""Preference losses that look at none."""


def start(overrides: Sequence[str]) -> int:
    """Run, or submit, every combination of the swept values that is not done, and return the sweep's exit code.

    Raises:
        UserError: If a point cannot run, or the folder is in use; nothing has started then.
    """
    found, record = points(overrides)
    root = found[0].folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"run.dir={root}: cannot be made or written ({error.strerror}); choose another folder."
        ) from error
    with lock:
        take_lock(lock, root)
        missing = _missing(found, root)
        if not missing:
            print(f"nothing is missing of {len(found)} runs")
            print(status.table(root, record, {}))
            return EXIT_DONE
        for point in missing:
            point.freeze()
        record.write(root)
        if found[0].config.cluster.name in HERE:
            return _run(missing, root, record)
        return _submit(missing, root, record)


def _missing(found: Sequence[Point], root: Path) -> list[Point]:
    """Return the points to run: neither done nor running.

    Raises:
        UserError: If a folder holds a run of another recipe, or a job of the sweep is still queued.
    """
    begun = [p for p in found if checkpoint.all_in(p.folder / "checkpoints") or status.is_done(p.folder)]
    conflict = next((conflict for point in begun if (conflict := point.conflict()) is not None), None)
    if conflict is not None:
        raise UserError(conflict)
    before = Record.of(root) if (root / FILE).is_file() else None
    if before is not None and status.ask_slurm(before):
        job = before.job
        raise UserError(
            f"run.dir={root}: job {job} of this sweep is still queued or running; wait for it, or end it with scancel {job}."
        )
    missing = []
    for point in found:
        if is_live(point.folder):
            print(f"{point}: is running already, and left alone")
        elif not (status.is_done(point.folder) and point.same_horizon()):
            missing.append(point)
    return missing


def _run(points: Sequence[Point], root: Path, record: Record) -> int:
    """Run points on this machine."""
    runs, others = pool.build(points), len(record.points) - len(points)
    print(
        f"sweep folder {root}: {len(points)} runs" + (f", {others} that are done or running left alone" * bool(others))
    )
    runs.run(points)
    print(f"\n{status.table(root, record, {})}", flush=True)
    if all(status.is_done(root / name) for name in record.points):
        return EXIT_DONE
    print(f"{record.command} goes on with what is missing")
    return EXIT_STOPPED if runs.asked else EXIT_ERROR


def _submit(points: Sequence[Point], root: Path, record: Record) -> int:
    """Submit points as one job array; references that several need are computed in a job that they wait for."""
    from launchers import submit  # loaded only where something is submitted

    runs, ahead = [(point.config, point.recipe) for point in points], _references(points, root)
    submitted = submit.submit_array(runs, points[0].config.cluster.max_parallel, ahead=ahead)
    record.tasks = {point.folder.name: f"{submitted.job_id}_{number}" for number, point in enumerate(points)}
    record.write(root)
    print(submit.described(submitted))
    return EXIT_DONE


def _references(points: Sequence[Point], root: Path) -> list[tuple[RunConfig, str]]:
    """Return the runs that compute, and only compute, each reference that several points need."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        if (needed := _reference(point.config)) is not None:
            groups.setdefault(needed, []).append(point)
    shared = [group[0] for group in groups.values() if len(group) > 1]
    found = []
    for number, point in enumerate(shared):
        folder = root / (PREPARED if len(shared) == 1 else f"{PREPARED}{number}")
        composed = compose.compose([*point.words(folder), "run.prepare_only=true"])
        found.append((composed.config, composed.recipe))
    return found


def _reference(config: RunConfig) -> str | None:
    """Return what decides on the reference's log-probabilities that a run needs; None: it needs none, or keeps its own."""
    algorithm = config.algorithm
    if algorithm.name != "dpo" or algorithm.preference_loss in NO_REFERENCE or algorithm.reference == "none":
        return None
    if config.data.cache != "use":
        return None
    steps = (algorithm.max_num_steps, algorithm.max_num_epochs, config.train.global_batch_size, config.run.seed)
    model = config.model.model_dump(mode="json", exclude={"lora"})
    return json.dumps([model, config.data.model_dump(mode="json"), algorithm.reference, config.backend.name, steps])
