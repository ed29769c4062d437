"""What a submitted run is, frozen in its folder: the recipe and its lock as they were, and the job that runs them."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from engine import checkpoint, receipt
from engine.config import compose
from engine.config.schema import RunConfig
from engine.errors import UserError

NOTE = "slurm.json"


def freeze(folder: Path, config: RunConfig, recipe: str) -> None:
    """Write recipe.yaml, lock.json as far as it is known, and slurm.json, all but the job's id.

    The lock of a run that has checkpoints is what it began with, and stays.
    """
    _replace(folder / "recipe.yaml", recipe)
    if not checkpoint.all_in(folder / "checkpoints"):
        _replace(folder / "lock.json", json.dumps(receipt.software(), indent=2, sort_keys=True) + "\n")
    # That "never" holds has been seen by now, and the job may be queued again.
    resume = "auto" if config.run.resume == "never" else config.run.resume
    note(folder, resume=resume, job_id=None, prepared_by=None)


def note(folder: Path, **values: Any) -> None:
    """Write values into slurm.json; who submits and the job itself may do so at once."""
    with (folder / f".{NOTE}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _replace(folder / NOTE, json.dumps({**read_note(folder), **values}, indent=2) + "\n")


def read_note(folder: Path) -> dict[str, Any]:
    """Return what slurm.json says; nothing if there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return found


def read(folder: Path) -> tuple[RunConfig, str]:
    """Return the recipe that was frozen in a run folder, and its text.

    Raises:
        UserError: If there is none, or it composes no longer.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{file}: no such file; the job runs what a submission has written there.")
    values = {"recipe": file, "run.dir": folder, "run.resume": read_note(folder).get("resume", "auto")}
    words = [f"{key}={compose.quoted(value)}" for key, value in values.items()]
    return compose.compose(words).config, file.read_text()


def changed(folder: Path) -> str | None:
    """Say that the code is not what it was when the run was submitted; None: it is."""
    file = folder / "lock.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    now = receipt.software()
    if "code" not in before or before["code"]["sha256"] == now["code"]["sha256"]:
        return None
    commits = [str(lock["code"]["commit"])[:10] for lock in (before, now)]
    return f"the code has changed since this run was submitted (commit {commits[0]}, now {commits[1]}): it runs as it is now"


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.write_text(text)
    os.replace(aside, file)
