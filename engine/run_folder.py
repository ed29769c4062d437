"""The folder of a run: one live run at a time, a recipe that repeats it, and whether it may be continued."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

import yaml

from engine import checkpoint
from engine.checkpoint import TrainState
from engine.config.places import RECIPE_LOCK
from engine.config.schema import RunConfig
from engine.errors import UserError

RESUMABLE = {
    "algorithm.max_num_steps",
    "algorithm.max_num_epochs",
    "logger",
    "cluster",
    "checkpoint",
    "data.bad_rows",
    "data.cache",
    "data.cache_dir",
    "data.num_workers",
    "data.revision",
    "run.probe",
    "run.prepare_only",
    "run.record_memory",
    "run.profile_steps",
    "backend.torch",
    "backend.tensor_parallel",
    "backend.sequence_parallel",
    "backend.pipeline_parallel",
    "backend.virtual_pipeline",
    "backend.context_parallel",
    "backend.expert_parallel",
    "backend.overlap",
    "model.lora.merge",
    RECIPE_LOCK,
}
"""Keys, and groups, that may differ between a run and its continuation: the horizon, and what changes no figure."""

LOCK = ".lock"
"""The file that a live run, or sweep, has locked in its folder."""


class RunFolder:
    """The folder of a run, locked by the one process that writes what the run has once.

    Args:
        config: The recipe.
        recipe: Its re-runnable text.
        lock: Name of the lock file; None on the ranks that do not write.
        wait_s: How long an earlier holder may take to go away; one who only looks whether there is a holder is soon gone.

    Raises:
        UserError: If the folder is in use, not writable, or holds another recipe's run.
    """

    def __init__(self, config: RunConfig, recipe: str, lock: str | None = LOCK, wait_s: float = 1.0) -> None:
        self.path = Path(config.run.dir).expanduser().absolute()
        self.lora, self.pretrained = config.model.lora, config.model.init == "pretrained"
        self._lock: TextIO | None = None
        if lock is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / lock).open("a+")
        except OSError as error:
            raise UserError(
                f"run.dir={config.run.dir}: cannot be made or written ({error.strerror}); choose another folder."
            ) from error
        self.recipe = recipe
        try:
            take_lock(self._lock, self.path, wait_s)
            self._check_recipe(config)
        except UserError:
            self.release()
            raise

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def hf(self, step: int | None = None) -> Path | None:
        """Return the folder of the final weights, or those after a step (``checkpoint.hf_period``); None: not written."""
        return self._weights("hf", step) if not self.lora.enabled or self.lora.merge else None

    def adapter(self, step: int | None = None) -> Path | None:
        """Return the same of LoRA's adapters; None too where peft would not find the base, random weights, again."""
        return self._weights("adapter", step) if self.lora.enabled and self.pretrained else None

    @property
    def final(self) -> Path:
        """Folder of the final weights: the model, or adapters alone with ``model.lora.merge=false``."""
        return self.hf() or self.path / "adapter"

    def _weights(self, name: str, step: int | None) -> Path:
        return self.path / name if step is None else self.path / f"{name}_steps" / f"step_{step:08d}"

    def is_finished(self) -> bool:
        """Tell whether the final weights are written."""
        return any((self.final / name).is_file() for name in ("config.json", "adapter_config.json"))

    def check_receipt(self, lock: dict[str, Any]) -> None:
        """Refuse to go on with other data, weights or reference than the run began with.

        Raises:
            UserError: Saying which.
        """
        before = self._begun_with()
        if not before:
            return
        for name, what in (
            ("data", "data, tokenizer or template"),
            ("weights", "initial weights"),
            ("reference", "weights of algorithm.reference"),
        ):
            if before.get(name) != lock.get(name):
                raise UserError(
                    f"run.dir={self.path}: the {what} changed since the run began (lock.json: {before.get(name)}, now "
                    f"{lock.get(name)}); restore it, or start afresh in another run.dir."
                )

    def write_recipe(self, lock: dict[str, Any]) -> None:
        """Write recipe.yaml and lock.json."""
        self._replace("recipe.yaml", self.recipe)
        origin = {key: value for key, value in self.frozen().items() if key == "recipe"}
        self._replace("lock.json", json.dumps({**lock, **origin}, indent=2, sort_keys=True) + "\n")

    def frozen(self) -> dict[str, Any]:
        """Return the lock that came with the recipe: of the run that it was frozen from, and its place in a git repository."""
        lock: dict[str, Any] = yaml.safe_load(self.recipe).get(RECIPE_LOCK, {})
        return lock

    def check_same_recipe(self, file: Path, where: str) -> None:
        """Refuse to continue a run of another recipe.

        Args:
            file: Its recipe.yaml; nothing is checked where there is none.
            where: Key and value to name.

        Raises:
            UserError: With the difference.
        """
        if not file.is_file():
            return
        differences = difference(yaml.safe_load(file.read_text()), yaml.safe_load(self.recipe))
        backend = next((old for key, old, _ in differences if key == "backend.name"), None)
        if backend is not None:
            raise UserError(
                f"{where}: was written by backend={backend}; resume with that, or start a new run from its hf/ folder "
                f"(model.path={file.parent / 'hf'})."
            )
        if differences:
            shown = "".join(f"\n  {key}: {old!r} → {new!r}" for key, old, new in differences)
            raise UserError(
                f"{where}: holds a run of another recipe; restore these keys to continue it, or choose another folder:{shown}"
            )

    def resume_from(self, config: RunConfig) -> tuple[Path | None, TrainState]:
        """Return the checkpoint to go on from, and where the run was: the folder's own newest, else the one that run.resume names.

        Raises:
            RunError: If a file of it is missing or cut short.
            UserError: If run.resume names another than the folder's own newest, or a run of another recipe.
        """
        source = max(checkpoint.all_in(self.checkpoints), default=None)
        if config.run.resume not in ("auto", "never"):
            named = checkpoint.find(Path(config.run.resume).expanduser()).resolve()
            if source is None:
                self.check_same_recipe(named.parent.parent / "recipe.yaml", f"run.resume={config.run.resume}")
                source = named
            elif named.parent == self.checkpoints.resolve() and named.name != source.name:
                raise UserError(
                    f"run.resume={config.run.resume}: {self.path} holds newer checkpoints, which going on from there would mix "
                    "up; remove them, or choose another run.dir."
                )
        if source is None:
            return None, TrainState()
        checkpoint.check_whole(source)
        return source, checkpoint.read_state(source)

    def revisions(self) -> dict[str, str]:
        """Return the revision of each source that the run has begun with, by the source's name."""
        found = self._begun_with().get("samples", {})
        return {name: source["revision"] for name, source in found.items() if source.get("revision")}

    def reference_revision(self) -> str | None:
        """Return the commit of a reference from the hub that the run has begun with."""
        return (self._begun_with().get("reference") or {}).get("revision")

    def _begun_with(self) -> dict[str, Any]:
        """Return the receipt of the run that has left checkpoints here; nothing if there is none."""
        file = self.path / "lock.json"
        if not checkpoint.all_in(self.checkpoints) or not file.is_file():
            return {}
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that lie past a step, and a line that a crash left unfinished."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                break
        self._replace("metrics.jsonl", "".join(kept))

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.close()

    def _check_recipe(self, config: RunConfig) -> None:
        if not checkpoint.all_in(self.checkpoints):
            return
        if config.run.resume == "never":
            raise UserError(f"run.dir={self.path}: holds a run already, and run.resume=never; choose another folder.")
        self.check_same_recipe(self.path / "recipe.yaml", f"run.dir={self.path}")

    def _replace(self, name: str, text: str) -> None:
        aside = self.path / f".{name}.tmp"
        aside.write_text(text)
        os.replace(aside, self.path / name)


def take_lock(lock: TextIO, folder: Path, wait_s: float = 0.0) -> None:
    """Lock a folder's open lock file, and write into it who has it.

    Args:
        lock: The file.
        folder: The folder, for the sentences.
        wait_s: How long another holder may take to go away.

    Raises:
        UserError: If another process has it, or the file system has no locks.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"run.dir={folder}: its file system has no locks ({error.strerror}); choose a folder on another one."
                ) from error
            if time.monotonic() > deadline:
                lock.seek(0)
                owner = lock.read().strip() or "another process"
                raise UserError(
                    f"run.dir={folder}: in use by {owner}; wait for it, stop it, or choose another folder."
                ) from error
        time.sleep(0.2)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def is_live(folder: Path) -> bool:
    """Tell whether a process has the folder of a run locked, on this machine or on one that shares the file system's locks."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def difference(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (key, before, after) for each key that differs and may not, between a run and its continuation."""
    found = []
    for name in {**before, **after}:
        key, old, new = f"{prefix}{name}", before.get(name), after.get(name)
        if key in RESUMABLE or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += difference(old, new, f"{key}.")
        else:
            found.append((key, old, new))
    return found
