"""One rank from recipe to exit code: data, backend, checkpoints, loop."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from engine import backends, checkpoint, metrics, objectives
from engine.checkpoint import Checkpoints, TrainState
from engine.config.schema import RunConfig
from engine.data import cache
from engine.data.loader import Loader, train_loader, val_loader
from engine.errors import EXIT_DONE, RunError, UserError
from engine.receipt import receipt
from engine.run_folder import RunFolder
from engine.train import Trainer, total_steps
from engine.types import Backend, Callback

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
        console, loggers = metrics.build(config.logger, folder.path)
        console.say(f"run folder {folder.path}")
        callbacks = [_callback(spec) for spec in config.run.callbacks]
        source = _resume_from(config, folder)
        state = checkpoint.read_state(source) if source is not None else TrainState()
        samples = _samples(config, folder, console)
        train, val = _loaders(config, samples)
        state.total_steps = total_steps(config, train)
        folder.write_recipe(receipt(config, samples, device_name))
        if source is not None and state.step >= state.total_steps and (folder.hf / "config.json").is_file():
            console.say(f"already finished: {state.step} steps; weights in {folder.hf}")
            return EXIT_DONE
        backend = _backend(config, samples["train"], device_name)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        checkpoints.check_space(backend)
        if source is not None:
            backend.load(source)
            folder.cut_metrics(state.step)
            console.say(f"resuming after step {state.step} of {state.total_steps} from {source}")
        return Trainer(
            config=config,
            backend=backend,
            objective=objectives.build(config.algorithm),
            train=train,
            val=val,
            folder=folder,
            checkpoints=checkpoints,
            console=console,
            loggers=loggers,
            callbacks=callbacks,
            state=state,
        ).run()
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"out of memory: {remedy(config)}.") from error
        raise
    finally:
        for logger in loggers:
            logger.close()
        folder.release()


def _samples(config: RunConfig, folder: RunFolder, console: metrics.Console) -> dict[str, cache.Samples]:
    """Return the tokenised data by split, made now where the cache has none."""
    splits = ["train", "val"] if config.data.val_path is not None else ["train"]
    return {split: cache.prepare(config, split, folder.path, console.say) for split in splits}


def _loaders(config: RunConfig, samples: dict[str, cache.Samples]) -> tuple[Loader, Loader | None]:
    """Return the loaders of training and validation data."""
    data, algorithm, sizes = config.data, config.algorithm, config.train
    train = train_loader(
        samples["train"],
        data,
        batch_size=sizes.global_batch_size,
        micro_batch_size=sizes.micro_batch_size,
        seed=config.run.seed,
    )
    if "val" not in samples:
        return train, None
    val = val_loader(
        samples["val"],
        data,
        batch_size=algorithm.val_global_batch_size or sizes.global_batch_size,
        micro_batch_size=algorithm.val_micro_batch_size or sizes.micro_batch_size,
    )
    return train, val


def _backend(config: RunConfig, samples: cache.Samples, device_name: str) -> Backend:
    """Build the backend and prove it on a few samples."""
    import torch

    if config.run.deterministic or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.run.deterministic)  # imports the compiler: not for nothing
    backend = backends.build(config, torch.device(device_name))
    if config.run.probe:
        backend.probe([samples[i] for i in range(min(PROBE_SAMPLES, len(samples)))])
    return backend


def _resume_from(config: RunConfig, folder: RunFolder) -> Path | None:
    """Return the checkpoint to go on from: the folder's own newest, else the one that run.resume names."""
    own = sorted(folder.checkpoints.glob("step_*")) if folder.checkpoints.is_dir() else []
    if own:
        return own[-1]
    if config.run.resume in ("auto", "never"):
        return None
    return checkpoint.find(Path(config.run.resume).expanduser())


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
