"""One rank from recipe to exit code: data, backend, checkpoints, loop."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from engine import backends, checkpoint, metrics, objectives
from engine.checkpoint import Checkpoints, TrainState
from engine.config.checks import packing_problem
from engine.config.schema import RunConfig
from engine.data import cache
from engine.data.loader import train_loader, val_loader
from engine.errors import EXIT_DONE, RunError, UserError
from engine.receipt import receipt
from engine.run_folder import RunFolder
from engine.train import Trainer, total_steps
from engine.types import Callback

PROBE_SAMPLES = 3


def main(config: RunConfig, recipe: str, device_name: str) -> int:
    """Run a recipe on one device.

    Args:
        config: The recipe.
        recipe: Its re-runnable text.
        device_name: "cpu" or "cuda".

    Returns:
        The run's exit code.

    Raises:
        RunError: For whatever ends a run with a sentence.
    """
    folder = RunFolder(config, recipe)
    loggers: list[metrics.Logger] = []
    try:
        source = _resume_from(config, folder)
        state = checkpoint.read_state(source) if source is not None else TrainState()
        if source is not None and source.parent == folder.checkpoints:
            folder.cut_metrics(state.step)
        console, loggers = metrics.build(config.logger, folder.path)
        console.say(f"run folder {folder.path}")
        trainer = _build(config, folder, console, loggers, state, device_name)
        if source is not None:
            if _finished(trainer, folder):
                console.say(f"already finished: {state.step} steps; weights in {folder.hf}")
                return EXIT_DONE
            trainer.backend.load(source)
            console.say(f"resuming after step {state.step} of {trainer.state.total_steps} from {source}")
        return trainer.run()
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"out of memory: {remedy(config)}.") from error
        raise
    finally:
        for logger in loggers:
            logger.close()
        folder.release()


def _build(
    config: RunConfig,
    folder: RunFolder,
    console: metrics.Console,
    loggers: list[metrics.Logger],
    state: TrainState,
    device_name: str,
) -> Trainer:
    """Prepare the data, build the backend and prove it on a few samples."""
    data, algorithm = config.data, config.algorithm
    callbacks = [_callback(spec) for spec in config.run.callbacks]
    splits = ["train", "val"] if data.val_path is not None else ["train"]
    samples = {split: cache.prepare(config, split, folder.path, console.say) for split in splits}
    for split in splits:
        problem = packing_problem(config, int(samples[split].lengths.max()))
        if problem:
            raise UserError(problem)
    train = train_loader(
        samples["train"],
        data,
        batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
    )
    val = None
    if "val" in samples:
        val = val_loader(
            samples["val"],
            data,
            batch_size=algorithm.val_global_batch_size or config.train.global_batch_size,
            micro_batch_size=algorithm.val_micro_batch_size or config.train.micro_batch_size,
        )
    if total_steps(config, train) == 0 and algorithm.max_num_steps != 0:
        raise UserError(
            f"algorithm.max_num_epochs={algorithm.max_num_epochs}: less than one step of train.global_batch_size="
            f"{config.train.global_batch_size} on {len(samples['train'])} samples; raise it."
        )
    import torch

    device = torch.device(device_name)
    if config.run.deterministic or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.run.deterministic)  # imports the compiler: not for nothing
    folder.write_recipe(receipt(config, samples, torch.cuda.get_device_name() if device.type == "cuda" else "cpu"))
    backend = backends.build(config, device)
    if config.run.probe:
        backend.probe([samples["train"][i] for i in range(min(PROBE_SAMPLES, len(samples["train"])))])
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    checkpoints.check_space(backend)
    return Trainer(
        config=config,
        backend=backend,
        objective=objectives.build(algorithm),
        train=train,
        val=val,
        folder=folder,
        checkpoints=checkpoints,
        console=console,
        loggers=loggers,
        callbacks=callbacks,
        state=state,
    )


def _resume_from(config: RunConfig, folder: RunFolder) -> Path | None:
    """Return the checkpoint to go on from: the folder's own newest, else the one that run.resume names."""
    own = sorted(folder.checkpoints.glob("step_*")) if folder.checkpoints.is_dir() else []
    if own:
        return own[-1]
    if config.run.resume in ("auto", "never"):
        return None
    return checkpoint.find(Path(config.run.resume).expanduser())


def _finished(trainer: Trainer, folder: RunFolder) -> bool:
    return trainer.state.step >= trainer.state.total_steps and (folder.hf / "config.json").is_file()


def _callback(spec: str) -> Callback:
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        built = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"run.callbacks: {spec} cannot be built ({error}); is its folder on PYTHONPATH?") from error
    finally:
        sys.path.pop(0)
    if not isinstance(built, Callback):
        raise UserError(f"run.callbacks: {spec} is no engine.types.Callback; derive it from that class.")
    return built


def is_out_of_memory(error: BaseException) -> bool:
    """Tell memory that ran out, of a device or of the host, from other failures."""
    import torch

    words = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "can't allocate memory" in words
        or "bad_alloc" in words
    )


def remedy(config: RunConfig) -> str:
    """Return the smallest change that makes a step need less memory."""
    packing, longest = config.data.packing, config.data.max_length
    if packing.enabled and (packing.max_tokens or max(4096, longest)) > longest:
        half = max(longest, (packing.max_tokens or max(4096, longest)) // 2)
        return f"set data.packing.max_tokens={half}"
    if not packing.enabled and config.train.micro_batch_size > 1:
        return f"set train.micro_batch_size={config.train.micro_batch_size // 2}"
    if config.model.recompute == "none":
        return "set model.recompute=full"
    return f"set data.max_length={longest // 2}, or train a smaller model"
