"""Checkpoints: written aside, renamed into place, pruned by age and by metric. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from engine.config.schema import CheckpointSection
from engine.errors import RunError, UserError
from engine.types import Backend

if TYPE_CHECKING:
    from engine.ranks import Ranks

PARTIAL = ".partial-"
MANIFEST = "manifest.json"
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


@dataclass(kw_only=True)
class Writing:
    """A checkpoint that is being written."""

    target: Path
    aside: Path
    state: TrainState
    thread: Thread | None = None
    sums: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and checksum of each file that this rank has written."""
    error: Exception | None = None
    took_s: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether this rank's part is still being written."""
        return self.thread is not None and self.thread.is_alive()


class Checkpoints:
    """The checkpoints of a run folder.

    Args:
        folder: ``run.dir/checkpoints``, the same folder for all ranks.
        section: How many are kept, by which metric, and whether they are written while training goes on.
        ranks: Each writes its part; the first one publishes.
    """

    def __init__(self, folder: Path, section: CheckpointSection, ranks: Ranks) -> None:
        self.folder = folder
        self.section = section
        self.ranks = ranks
        self._writing: Writing | None = None
        if ranks.main:
            for partial in folder.glob(f"{PARTIAL}*"):
                _clear(partial, folder / partial.name.removeprefix(f"{PARTIAL}old-"))

    def save(self, state: TrainState, backend: Backend) -> None:
        """Begin to write a checkpoint; it is whole when its folder has its name, which ``finish`` gives it.

        All ranks call. With ``checkpoint.async_save`` the state has been copied when this returns, and a thread writes it.
        """
        target = self.folder / f"step_{state.step:08d}"
        aside = self.ranks.first(lambda: begin(target))
        write = backend.snapshot(copy=self.section.async_save)
        job = self._writing = Writing(target=target, aside=aside, state=replace(state))

        def work() -> None:
            started = time.perf_counter()
            try:
                for file in write(aside):
                    job.sums[file.name] = _checksum(file)
                    _sync(file)
            except Exception as error:
                job.error = error
            job.took_s = time.perf_counter() - started

        if self.section.async_save:
            job.thread = Thread(target=work, name="checkpoint")
            job.thread.start()
        else:
            work()

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing its part of a checkpoint."""
        return self._writing is not None and self._writing.busy

    def finish(self, backend: Backend) -> tuple[Path, float] | None:
        """Wait for the checkpoint that is being written, and publish it; all ranks call.

        Returns:
            Its folder and the seconds that its writing took; None if none was being written.

        Raises:
            RunError: If the disk is full; earlier checkpoints are untouched.
        """
        job, self._writing = self._writing, None
        if job is None:
            return None
        if job.thread is not None:
            job.thread.join()
        try:
            self.ranks.together(lambda: _raise(job.error))
            sums = self.ranks.gather(job.sums)
            self.ranks.together(lambda: self._publish(job, sums) if self.ranks.main else None)
        except Exception as error:
            if self.ranks.main:
                _clear(job.aside, job.target)
            if is_disk_full(error):
                newest, size = self.newest(), backend.checkpoint_bytes() / 2**30
                raise RunError(
                    f"{self.folder}: the disk is full, and the checkpoint of step {job.state.step} ({size:.2f} GiB) was not "
                    "written; free some space and repeat the command, which goes on from "
                    f"{newest.name if newest else 'the start'}."
                ) from error
            raise
        return job.target, job.took_s

    def _publish(self, job: Writing, sums: Sequence[dict[str, tuple[int, int]]]) -> None:
        manifest = {name: entry for part in sums for name, entry in part.items()}
        for name, (size, _) in manifest.items():
            if not _appears(job.aside / name, size):
                raise RunError(
                    f"{self.folder}: {name}, which another rank has written, is not there; the machines do not share this folder: "
                    "choose a run.dir on a file system that they share."
                )
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(manifest.items()))
        (job.aside / MANIFEST).write_text(f"{{\n{lines}\n}}\n")
        (job.aside / "state.json").write_text(json.dumps(asdict(job.state), indent=2) + "\n")
        publish(job.aside, job.target)
        self._prune()

    def close(self) -> None:
        """Wait for this rank's writing to end."""
        if self._writing is not None and self._writing.thread is not None:
            self._writing.thread.join()

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
                f"({most} of them exist at times); free some space, choose another folder or lower checkpoint.keep_last."
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
    aside = begin(target)
    try:
        yield aside
        publish(aside, target)
    finally:
        _clear(aside, target)


def begin(target: Path) -> Path:
    """Return an empty folder beside the one that ``publish`` will make of it."""
    aside, old = _beside(target)
    for folder in (aside, old):
        _clear(folder, target)
    aside.mkdir(parents=True)
    return aside


def publish(aside: Path, target: Path) -> None:
    """Give a folder its name once it is on disk."""
    for path in aside.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~UMASK)  # safetensors makes its files private
        _sync(path)
    _sync(aside)
    old = _beside(target)[1]
    if target.exists():
        os.rename(target, old)
    os.rename(aside, target)
    _sync(target.parent)
    _clear(old, target)


def check_whole(checkpoint: Path, ranks: Ranks | None = None) -> None:
    """Refuse a checkpoint of which a file is missing or not what was written.

    Args:
        checkpoint: Its folder.
        ranks: Share the reading of all files for their checksums; None: only their sizes are looked at.

    Raises:
        RunError: Naming the file.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{checkpoint}: the checkpoint has no readable {MANIFEST}; resume from another one.") from error
    files = sorted(manifest.items())
    for name, (size, checksum) in files if ranks is None else files[ranks.rank :: ranks.size]:
        file = checkpoint / name
        if not file.is_file():
            raise RunError(
                f"{checkpoint}: {name} is missing from the checkpoint; restore it, or resume from another one."
            )
        if file.stat().st_size != size or (ranks is not None and _checksum(file)[1] != checksum):
            raise RunError(
                f"{checkpoint}: {name} is damaged (not the {size:,} bytes that were written); resume from another checkpoint."
            )


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


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f"{PARTIAL}{target.name}"), target.with_name(f"{PARTIAL}old-{target.name}")


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _appears(file: Path, size: int) -> bool:
    """Tell whether a file is there, given some seconds: a network file system may show it late."""
    for _ in range(10):
        if file.is_file() and file.stat().st_size == size:
            return True
        time.sleep(1.0)
    return False


def _checksum(file: Path) -> tuple[int, int]:
    """Return a file's size and CRC-32."""
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
