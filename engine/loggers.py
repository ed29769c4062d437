"""Loggers of others: Weights & Biases, TensorBoard, MLflow; imported when a recipe names them.

metrics.jsonl is the record of a run. These show the same figures elsewhere, and training does not depend on them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from engine.config.schema import MlflowSection, RunConfig, WandbSection
from engine.errors import RunError, UserError
from engine.metrics import Logger

UPLOAD_S = 300
"""Longest wait for Weights & Biases to take the last figures; ``wandb sync`` sends what is left."""
MLFLOW_PERIOD_S = 5.0
"""Seconds that figures are gathered before MLflow gets them in one request."""
MLFLOW_METRICS, MLFLOW_PARAMS, MLFLOW_CHARACTERS = 1000, 100, 6000
"""MLflow's limits: metrics and parameters of a request, length of a parameter."""


def build(config: RunConfig, recipe: str, run_dir: Path, step: int, say: Callable[[str], None]) -> list[Logger]:
    """Start the loggers that ``logger.backends`` names, the console excepted.

    Args:
        config: The recipe.
        recipe: Its text with secrets unresolved; what the loggers show as the run's configuration.
        run_dir: The run folder.
        step: The step that the run goes on from, 0 for a fresh start.
        say: Takes a sentence for the console.

    Raises:
        RunError: If a logger cannot start with a fresh run; one that goes on is not kept from it, only told.
    """
    shown = yaml.safe_load(recipe)
    starts: dict[str, Callable[[], Logger]] = {
        "wandb": lambda: WandbLogger(config.logger.wandb, config.run.name, shown, run_dir, say),
        "tensorboard": lambda: TensorboardLogger(recipe, run_dir, step),
        "mlflow": lambda: MlflowLogger(config.logger.mlflow, config.run.name, shown, run_dir),
    }
    loggers: list[Logger] = []
    for name in config.logger.backends:
        if name == "console":
            continue
        try:
            loggers.append(Guarded(name, starts[name](), say))
        except Exception as error:  # anything: a server, a disk, a login
            sentence = f"logger.backends: {name} cannot start ({_brief(error)})"
            if step == 0:
                mistake = UserError if isinstance(error, UserError) else RunError
                raise mistake(f"{sentence}; correct that, or take {name} out.") from error
            say(f"{sentence}; the run goes on without it, and metrics.jsonl has every figure.")
    return loggers


class Guarded:
    """A logger whose failure is told once and ends the logger, not the run."""

    def __init__(self, name: str, logger: Logger, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._logger: Logger | None = logger

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the figures on."""
        if self._logger is None:
            return
        try:
            self._logger.log(step, metrics)
        except Exception as error:  # anything: the logger is not ours
            self._logger = None
            self._say(
                f"step {step}: logger {self._name} failed and is off from here ({_brief(error)}); the run goes on, "
                "and metrics.jsonl has every figure."
            )

    def close(self) -> None:
        """Flush and end the logger."""
        logger, self._logger = self._logger, None
        if logger is None:
            return
        try:
            logger.close()
        except Exception as error:  # anything: the logger is not ours
            self._say(
                f"logger {self._name} failed to close and may lack the last figures ({_brief(error)}); "
                "metrics.jsonl has every figure."
            )


class WandbLogger:
    """Weights & Biases: one run a run folder, in the mode of ``WANDB_MODE``."""

    def __init__(
        self, section: WandbSection, name: str, recipe: dict[str, Any], run_dir: Path, say: Callable[[str], None]
    ) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # without a login it then fails instead of asking on the terminal
        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "x_save_requirements": False,
        }
        if "finish_timeout" in wandb.Settings.model_fields:
            settings.update(finish_timeout=UPLOAD_S, finish_timeout_raises=True)
        try:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                tags=section.tags,
                name=name,
                id=_kept_id(run_dir / ".wandb_id"),
                resume="allow",
                dir=str(run_dir),
                config=recipe,
                settings=wandb.Settings(**settings),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            reason = _brief(error).rstrip(".")
            raise UserError(f"{reason}; WANDB_API_KEY may hold a key, WANDB_MODE=offline needs none") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # wandb's own count refuses steps repeated after a resume
        if not self._run.offline and self._run.url:
            say(f"wandb: {self._run.url}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the figures; a process of wandb's own sends them."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Wait for the last figures to be sent."""
        self._run.finish(exit_code=int(_failing()))


class TensorboardLogger:
    """TensorBoard's event files."""

    def __init__(self, recipe: str, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A viewer hides the points from purge_step on that earlier files hold. A start at step 0 repeats step 0 as well.
        purge_step = step + 1 if step else 0
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)
        self._writer.add_text("recipe", "    " + recipe.replace("\n", "\n    "), step)  # indented: code in Markdown

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the figures for the writing thread."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is queued."""
        self._writer.close()


class MlflowLogger:
    """MLflow: one run a run folder, on a server or in files below it."""

    def __init__(self, section: MlflowSection, name: str, recipe: dict[str, Any], run_dir: Path) -> None:
        # A server that hangs costs half a minute, not a quarter of an hour, which the other ranks would not wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        uri = section.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self._pending: list[Any] = []
        self._sent = time.monotonic()
        id_file = run_dir / ".mlflow_id"
        run = self._existing(id_file.read_text().strip()) if id_file.is_file() else None
        if run is not None:
            self._id: str = run.info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(self._experiment(section.experiment), run_name=name).info.run_id
        id_file.write_text(self._id + "\n")
        self._log_params(flat(recipe))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gather the figures, without those that are not finite, and send them now and then."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(name, value, now, step) for name, value in metrics.items() if math.isfinite(value)]
        if time.monotonic() - self._sent >= MLFLOW_PERIOD_S:
            self._send()

    def close(self) -> None:
        """Send the rest and end the run."""
        self._send()
        self._client.set_terminated(self._id, status="FAILED" if _failing() else "FINISHED")

    def _send(self) -> None:
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=pending[start : start + MLFLOW_METRICS])
        self._sent = time.monotonic()

    def _existing(self, run_id: str) -> Any | None:
        """Return a run of this tracking server, or None where it has no such run."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _experiment(self, name: str) -> str:
        """Return the id of an experiment, made now if need be."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another run was faster
                if found is None:
                    raise
        return str(found.experiment_id)

    def _log_params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value[:MLFLOW_CHARACTERS]) for key, value in values.items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_PARAMS])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values under dotted keys, as text: strings as they are, all else as JSON."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def _kept_id(file: Path) -> str:
    """Return the id that a file keeps, chosen now if there is none."""
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


def _failing() -> bool:
    """Tell whether an error is on its way out of the run, so that the run does not look finished."""
    return sys.exc_info()[0] is not None


def _brief(error: Exception) -> str:
    """Return the first line of an error."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
