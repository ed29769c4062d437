"""Checkpoints: written aside, renamed into place, pruned by age and by metric. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config.schema import CheckpointSection
from engine.errors import RunError, UserError
from engine.types import Backend

PARTIAL = ".partial-"
UMASK = os.umask(0o022)
os.umask(UMASK)


@dataclass(kw_only=True)
class TrainState:
    """Where a run is; with the plan, all that resuming needs beside the backend's own state."""

    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Steps the run was going to do when this was written."""
    epoch: float = 0.0
    """Passes over the data."""
    consumed_samples: int = 0
    """Conversations trained on."""
    total_tokens: int = 0
    """Tokens that went through the model, padding not counted."""
    total_valid_tokens: int = 0
    """Tokens that carried loss."""
    val_loss: float | None = None
    """Newest validation loss since the checkpoint before."""
    metric: float | None = None
    """Newest value of checkpoint.metric since the checkpoint before."""
    finished: bool = False
    """Whether this is the last checkpoint of a run that was done, by its steps or by a callback."""


class Checkpoints:
    """The checkpoints of a run folder.

    Args:
        folder: ``run.dir/checkpoints``.
        section: How many are kept, and by which metric.
    """

    def __init__(self, folder: Path, section: CheckpointSection) -> None:
        self.folder = folder
        self.section = section
        for partial in folder.glob(f"{PARTIAL}*"):
            _clear(partial, folder / partial.name.removeprefix(f"{PARTIAL}old-"))

    def save(self, state: TrainState, backend: Backend) -> Path:
        """Write a checkpoint; it is whole when its folder has its name.

        Raises:
            RunError: If the disk is full; earlier checkpoints are untouched.
        """
        target = self.folder / f"step_{state.step:08d}"
        try:
            with written_aside(target) as aside:
                backend.save(aside)
                (aside / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        except Exception as error:
            if is_disk_full(error):
                newest, size = self.newest(), backend.checkpoint_bytes() / 2**30
                raise RunError(
                    f"{self.folder}: the disk is full, and the checkpoint of step {state.step} ({size:.2f} GiB) was not written; "
                    f"free some space and repeat the command, which goes on from {newest.name if newest else 'the start'}."
                ) from error
            raise
        self._prune()
        return target

    def newest(self) -> Path | None:
        """Return the newest checkpoint."""
        return max(self.all(), default=None)

    def all(self) -> list[Path]:
        """Return all checkpoints, oldest first."""
        return all_in(self.folder)

    def check_space(self, backend: Backend) -> None:
        """Refuse to start where the checkpoints that are kept, and the one that replaces the oldest, would not fit the disk.

        Raises:
            UserError: Naming the folder and what is missing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        size = backend.checkpoint_bytes()
        free = shutil.disk_usage(self.folder).free
        most = self.section.keep_last + self.section.keep_best + 1
        if free < max(1, most - len(self.all())) * size:
            raise UserError(
                f"run.dir={self.folder.parent}: {free / 2**30:.2f} GiB free, and a checkpoint takes {size / 2**30:.2f} GiB "
                "({most} of them exist at times); free some space, choose another folder or lower checkpoint.keep_last."
            )

    def _prune(self) -> None:
        checkpoints = self.all()
        keep = set(checkpoints[-self.section.keep_last :])
        scored = [(m, c) for c in checkpoints if (m := read_state(c).metric) is not None and math.isfinite(m)]
        best = sorted(scored, key=lambda item: item[0], reverse=self.section.mode == "max")
        keep |= {c for _, c in best[: self.section.keep_best]}
        for checkpoint in checkpoints:
            if checkpoint not in keep:
                aside = checkpoint.with_name(f"{PARTIAL}{checkpoint.name}")
                os.rename(checkpoint, aside)
                shutil.rmtree(aside)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yield a folder to write into; when the block ends it is on disk, readable as others' files are, and has its name.

    A crash at any point leaves either what was there before or the whole new folder.
    """
    aside, old = (target.with_name(f"{PARTIAL}{kind}{target.name}") for kind in ("", "old-"))
    for folder in (aside, old):
        _clear(folder, target)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~UMASK)  # safetensors makes its files private
            _sync(path)
        _sync(aside)
        if target.exists():
            os.rename(target, old)
        os.rename(aside, target)
        _sync(target.parent)
    finally:
        _clear(old, target)
        _clear(aside, target)


def all_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder of them, oldest first."""
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def read_state(checkpoint: Path) -> TrainState:
    """Read a checkpoint's state.json.

    Raises:
        UserError: If the folder is no checkpoint.
    """
    try:
        return TrainState(**json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint}: not a whole checkpoint ({error}); choose another.") from error


def find(folder: Path) -> Path:
    """Return the checkpoint that a folder is, or the newest of the run that it is.

    Raises:
        UserError: If it is neither.
    """
    if (folder / "state.json").is_file():
        return folder
    inside = all_in(folder / "checkpoints") or all_in(folder)
    if not inside:
        raise UserError(f"{folder}: neither a checkpoint nor a run folder with checkpoints.")
    return inside[-1]


def is_disk_full(error: BaseException) -> bool:
    """Tell a full disk from other failures; safetensors reports it in words."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in str(error)


def _clear(leftover: Path, target: Path) -> None:
    """Remove what a crash left behind; a folder that was moved away for its successor goes back if that never came."""
    if leftover.name.startswith(f"{PARTIAL}old-") and leftover.exists() and not target.exists():
        os.rename(leftover, target)
    shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
