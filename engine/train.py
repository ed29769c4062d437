"""The loop: one, for every objective and backend."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from engine.checkpoint import Checkpoints, TrainState, written_aside
from engine.config.schema import RunConfig
from engine.data.loader import Loader
from engine.errors import EXIT_DONE, EXIT_STOPPED, RunError
from engine.metrics import Console, Logger
from engine.ranks import Ranks
from engine.run_folder import RunFolder
from engine.schedule import learning_rate
from engine.types import Backend, Callback, Control, MicroBatch, Objective, StepMetrics

MOST_SKIPPED = 5
"""Steps in a row that may be lost to a loss or norm that is not finite."""


class Stopped(KeyboardInterrupt):
    """A signal came before training began: there is nothing to save, and the same command starts again.

    No Exception, so that nothing which handles errors on the way takes it for one.
    """


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR2 end the preparations at once, and training after its step; a second SIGINT interrupts.

    Signals reach a process's main thread; where the loop runs in another one, its executor sets ``signal``.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: str | None = None
        self.training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.training:
            raise Stopped(f"stopped by {name} before training began; the same command starts again.")
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = name


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A step whose figures are still on the device; they are read once the next step is under way."""

    step: int
    result: StepMetrics
    figures: dict[str, float]


class Counts(NamedTuple):
    """What the micro-batches of a step hold, over all ranks."""

    units: float
    tokens: float
    places: float
    """Tokens with padding."""
    trained_tokens: float
    squared_lengths: float
    """Sum of the squared lengths of the documents, for the cost of attention."""

    @classmethod
    def of(cls, batches: Sequence[MicroBatch], objective: Objective) -> Counts:
        """Count one rank's micro-batches."""
        return cls(
            units=sum(objective.units(b.targets) for b in batches),
            tokens=sum(b.num_tokens for b in batches),
            places=sum(b.input_ids.numel() for b in batches),
            trained_tokens=sum(b.targets.num_tokens for b in batches),
            squared_lengths=sum(b.squared_lengths() for b in batches),
        )


class Requests(NamedTuple):
    """What callbacks of any rank have asked for after a step."""

    save: bool = False
    evaluate: bool = False
    stop: bool = False


@dataclass(kw_only=True)
class Trainer:
    """Everything the loop needs, already built."""

    config: RunConfig
    ranks: Ranks
    backend: Backend
    objective: Objective
    train: Loader
    val: Mapping[str, Loader]
    folder: RunFolder
    checkpoints: Checkpoints
    console: Console
    loggers: Sequence[Logger]
    callbacks: Sequence[Callback]
    state: TrainState
    timings: Mapping[str, float] = field(default_factory=dict)
    """What was measured before training; logged with the first step."""

    def __post_init__(self) -> None:
        self.control = Control(
            config=self.config,
            run_dir=self.folder.path,
            backend=self.backend,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            step=self.state.step,
            total_steps=self.state.total_steps,
            epoch=int(self.state.epoch),
            say=self.console.say,
        )
        self._pending: Pending | None = None
        self._since_save: dict[str, float] = {}
        self._timings = dict(self.timings)  # measured beside a step: logged with the next one
        self._saved_step = self.state.step if self.checkpoints.newest() is not None else None
        self._asked = Requests()
        self._stopped_by: str | None = None

    def run(self, stop: StopRequest) -> int:
        """Train to the end, or until a signal or a callback asks to stop; all ranks do the same.

        Args:
            stop: Notes the signals of this process.

        Returns:
            The exit code: 0, or 75 if a signal stopped the run with its checkpoint saved.

        Raises:
            RunError: If losses stay non-finite, or the disk is full.
        """
        config, state, stop.training = self.config, self.state, True
        self._call("on_train_begin")
        self.console.start(state.step, state.total_steps)
        if state.step == 0 and (config.algorithm.val_at_start or not state.total_steps):
            self._evaluate()
        self._agree(stop)
        while state.step < state.total_steps and not self._asked.stop and self._stopped_by is None:
            self._asked = Requests()
            self._step()
            self._agree(stop)
            evaluate = self._due(config.algorithm.val_period) or self._asked.evaluate
            if evaluate:
                self._evaluate()
                self._agree(stop)
            state.finished = state.step == state.total_steps or self._asked.stop
            if state.finished and config.algorithm.val_at_end and not evaluate:
                self._evaluate()
            if state.finished or self._due(config.checkpoint.period) or self._asked.save:
                self._save()
                self._agree(stop)
            if self._due(config.checkpoint.hf_period):
                self._export(state.step)
        if not state.total_steps:  # algorithm.max_num_steps=0 validates, and trains nothing to keep
            self.console.say("done: there were no steps to train")
            return EXIT_DONE
        if self._saved_step != state.step:
            self._save()
        self._publish_checkpoint()
        if self._stopped_by is not None and not state.finished:
            self.console.say(
                f"stopped by {self._stopped_by} after step {state.step} of {state.total_steps}, checkpoint saved; "
                f"the same command with run.dir={self.folder.path} goes on from there."
            )
            return EXIT_STOPPED
        self._finish()
        return EXIT_DONE

    def _step(self) -> None:
        """Do one optimizer step; read the figures of the step before."""
        state, started = self.state, time.perf_counter()
        per_epoch = self.train.plan.steps_per_epoch
        self.control.epoch = state.step // per_epoch
        if state.step % per_epoch == 0:
            self._call("on_epoch_begin")
        self._call("on_step_begin")
        batches = self.train.step(state.step)
        loaded = time.perf_counter()
        counts = Counts(*self.ranks.sum(Counts.of(batches, self.objective), self.ranks.size // self.train.ranks))
        met = time.perf_counter()
        lr = learning_rate(state.step + 1, state.total_steps, self.config.optimizer.lr, self.config.scheduler)
        result = self.backend.train_step(batches, self.objective, counts.units, lr)
        if self.ranks.size > 1:
            self._timings |= {"perf/imbalance": self.train.imbalance(state.step), "timing/wait_s": met - loaded}
        self._advance(counts)
        self._flush()
        taken = time.perf_counter() - started
        figures = {
            "train/lr": lr,
            "train/tokens": int(counts.tokens),
            "train/trained_tokens": int(counts.trained_tokens),
            "train/epoch": state.epoch,
            "train/total_tokens": state.total_tokens,
            "perf/step_s": taken,
            "perf/tokens_per_second": counts.tokens / taken,
            "perf/tokens_per_second_per_device": counts.tokens / taken / self.ranks.size,
            "perf/padding_share": 1 - counts.tokens / counts.places,
            "perf/memory_gb": memory_gb(),
            "timing/data_s": loaded - started,
            **({} if self.objective.count_metric is None else {f"train/{self.objective.count_metric}": counts.units}),
            **self.train.by_source(state.step - 1),
            **self._timings,
        }
        mfu = self.backend.utilization(
            tokens=counts.tokens,
            trained_tokens=counts.trained_tokens,
            squared_lengths=counts.squared_lengths,
            seconds=taken,
        )
        if mfu is not None:
            figures["perf/mfu"] = mfu
        self._timings = {}
        self._pending = Pending(step=state.step, result=result, figures=figures)
        self._call("on_step_end")
        if state.step % per_epoch == 0:
            self._call("on_epoch_end")

    def _agree(self, stop: StopRequest) -> None:
        """Make every rank's signals and requests those of all, and publish the checkpoint that all have written.

        The loop acts on what was agreed; what a callback asks for later, in on_save say, waits for the next time.
        """
        control, number = self.control, 0 if stop.signal is None else signal.Signals[stop.signal].value
        asked = [number, control.should_save, control.should_evaluate, control.should_stop, self.checkpoints.busy]
        number, save, evaluate, end, busy = map(int, self.ranks.max(asked))
        before = self._asked
        self._asked = Requests(bool(save) or before.save, bool(evaluate) or before.evaluate, bool(end) or before.stop)
        control.should_save = control.should_evaluate = False
        self._stopped_by = signal.Signals(number).name if number else None
        if not busy:
            self._publish_checkpoint()

    def _advance(self, counts: Counts) -> None:
        state = self.state
        state.consumed_samples += self.train.plan.size(state.step)
        state.step += 1
        state.epoch = state.step / self.train.plan.steps_per_epoch
        state.total_tokens += int(counts.tokens)
        state.total_valid_tokens += int(counts.trained_tokens)
        self.control.step = state.step

    def _flush(self) -> None:
        """Read and log the figures that are pending."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        result = pending.result
        metrics = {"train/loss": float(result.loss), **pending.figures}
        metrics.update({f"train/{name}": float(value) for name, value in result.sums.items()})
        assert result.grad_norm is not None and result.skipped is not None
        metrics["train/grad_norm"] = float(result.grad_norm)
        skipped = int(result.skipped)
        if skipped:
            metrics["train/skipped_steps"] = skipped
            self.console.say(
                f"step {pending.step}: loss or gradient norm is not finite; the update was skipped ({skipped} in a row)."
            )
        self._log(pending.step, metrics)
        if skipped >= MOST_SKIPPED:
            raise RunError(
                f"step {pending.step}: loss or gradient norm was not finite {skipped} times in a row; look at the data of these "
                "steps, or start another run.dir with a lower optimizer.lr or train.max_grad_norm."
            )

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.on_log(self.control, metrics)
        self._since_save.update(metrics)
        for logger in self.loggers:
            logger.log(step, metrics)

    def _evaluate(self) -> None:
        self._flush()
        if not self.val:
            return
        started = time.perf_counter()
        metrics = evaluate(self.backend, self.objective, self.val, self.config.algorithm.val_batches)
        metrics["timing/validation_s"] = time.perf_counter() - started
        self._log(self.state.step, metrics)
        for callback in self.callbacks:
            callback.on_evaluate(self.control, metrics)

    def _save(self) -> None:
        """Write a checkpoint, or begin to (``checkpoint.async_save``)."""
        self._flush()
        self._publish_checkpoint()
        self.state.val_loss = self._since_save.get("validation/loss")
        self.state.metric = self._since_save.get(self.config.checkpoint.metric)
        started = time.perf_counter()
        self.checkpoints.save(self.state, self.backend)
        self._stalled(started)
        self._saved_step, self._since_save = self.state.step, {}
        if not self.config.checkpoint.async_save:
            self._publish_checkpoint()

    def _stalled(self, started: float) -> None:
        """Add the time since then to what training has waited for checkpoints."""
        waited = self._timings.get("timing/checkpoint_s", 0.0)
        self._timings["timing/checkpoint_s"] = waited + time.perf_counter() - started

    def _publish_checkpoint(self) -> None:
        started = time.perf_counter()
        written = self.checkpoints.finish(self.backend)
        if written is None:
            return
        self._stalled(started)
        checkpoint, self._timings["timing/checkpoint_write_s"] = written
        for callback in self.callbacks:
            callback.on_save(self.control, checkpoint)

    def _export(self, step: int | None = None) -> None:
        """Write the folders of weights, the final ones or those of a step."""
        for target, write in (
            (self.folder.adapter(step), self.backend.export_adapter),
            (self.folder.hf(step), self.backend.export),
        ):
            if target is not None:
                self._write(target, write)

    def _write(self, target: Path, write: Callable[[Path | None], None]) -> None:
        """Write a folder; the first rank writes, the others take part in gathering."""
        if not self.ranks.main:
            self.ranks.together(lambda: write(None))
            return
        with written_aside(target) as aside:
            self.ranks.together(lambda: write(aside))

    def _finish(self) -> None:
        self._flush()
        self._export()
        self.console.say(
            f"done: {self.state.step} steps, {self.state.total_tokens:,} tokens; weights in {self.folder.final}"
        )
        self._call("on_train_end")

    def _due(self, period: int) -> bool:
        return bool(period) and self.state.step % period == 0

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.control)


def evaluate(backend: Backend, objective: Objective, sets: Mapping[str, Loader], val_batches: int) -> dict[str, float]:
    """Return the validation metrics over all batches of every set, or the first ``val_batches``.

    Several sets have theirs under ``validation/NAME/``; ``validation/`` itself is then what one set of all of them would have.
    """
    found = {name: _evaluate(backend, objective, val, val_batches) for name, val in sets.items()}
    units = sum(result.units for result in found.values())
    metrics: dict[str, float] = {}
    for name, result in found.items():
        if objective.count_metric is not None:
            metrics[f"validation/{objective.count_metric}"] = units
        for key, value in {"loss": result.loss, **result.sums}.items():
            whole = f"validation/{key}"
            metrics[whole] = metrics.get(whole, 0.0) + float(value) * (result.units / units if len(found) > 1 else 1.0)
            if len(found) > 1:
                metrics[f"validation/{name}/{key}"] = float(value)
    return metrics


def _evaluate(backend: Backend, objective: Objective, val: Loader, val_batches: int) -> StepMetrics:
    steps = range(min(val_batches or val.plan.steps_per_epoch, val.plan.steps_per_epoch))

    def batches() -> Iterator[MicroBatch]:
        for step in steps:
            yield from val.step(step)

    return backend.evaluate(batches(), objective)


def memory_gb() -> float:
    """Return the peak memory of the device in GB; of this process on CPUs."""
    import resource

    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
