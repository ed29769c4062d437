"""One rank from recipe to exit code: data, backend, checkpoints, loop."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from engine import backends, checkpoint, metrics, objectives, plugins
from engine.checkpoint import Checkpoints, TrainState
from engine.config.schema import RunConfig, max_tokens_per_micro_batch
from engine.data import cache
from engine.data.loader import Loader, train_loader, val_loader
from engine.errors import EXIT_DONE, EXIT_STOPPED, RunError, UserError
from engine.receipt import receipt
from engine.run_folder import RunFolder
from engine.train import Stopped, StopRequest, Trainer, total_steps
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
    with StopRequest() as stop:
        folder = RunFolder(config, recipe)
        console, loggers = metrics.build(config.logger, folder.path)
        try:
            return _run(config, folder, console, loggers, stop, device_name)
        except Stopped as stopped:
            console.say(str(stopped))
            return EXIT_STOPPED
        except Exception as error:
            ended = explain(error, config, folder.path)
            console.note(f"error: {ended or error!r}")
            if ended is None or ended is error:
                raise
            raise ended from error
        finally:
            for logger in loggers:
                with suppress(OSError):  # a full disk has been reported
                    logger.close()
            folder.release()


def _run(
    config: RunConfig,
    folder: RunFolder,
    console: metrics.Console,
    loggers: list[metrics.Logger],
    stop: StopRequest,
    device_name: str,
) -> int:
    """Put the rank together, piece by piece, and train."""
    console.say(f"run folder {folder.path}")
    callbacks = [_callback(spec) for spec in config.run.callbacks]
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    source = _resume_from(config, folder, checkpoints)
    state = checkpoint.read_state(source) if source is not None else TrainState()
    samples = _samples(config, folder, console)
    train, val = _loaders(config, samples)
    lock = receipt(config, samples, device_name)
    folder.check_receipt(lock)
    planned, state.total_steps = state.total_steps, total_steps(config, train)
    done = state.step >= state.total_steps or (state.finished and planned == state.total_steps)
    if source is not None and done and (folder.hf / "config.json").is_file():
        console.say(f"already finished: {state.step} steps; weights in {folder.hf}")
        return EXIT_DONE
    folder.write_recipe(lock)
    backend = _backend(config, samples["train"], device_name)
    checkpoints.check_space(backend)
    folder.cut_metrics(state.step if source is not None else -1)
    if source is not None:
        backend.load(source)
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
    ).run(stop)


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


def _resume_from(config: RunConfig, folder: RunFolder, checkpoints: Checkpoints) -> Path | None:
    """Return the checkpoint to go on from: the folder's own newest, else the one that run.resume names.

    Raises:
        UserError: If run.resume names another than the folder's own newest, or a run of another recipe.
    """
    own = checkpoints.newest()
    if config.run.resume in ("auto", "never"):
        return own
    named = checkpoint.find(Path(config.run.resume).expanduser()).resolve()
    if own is not None:
        if named.parent == folder.checkpoints.resolve() and named.name != own.name:
            raise UserError(
                f"run.resume={config.run.resume}: {folder.path} holds newer checkpoints, which going on from there would mix up; "
                "remove them, or choose another run.dir."
            )
        return own
    folder.check_same_recipe(named.parent.parent / "recipe.yaml", f"run.resume={config.run.resume}")
    return named


def _callback(spec: str) -> Callback:
    built = plugins.load(spec, "run.callbacks")
    try:
        callback = built()
    except Exception as error:
        raise UserError(f"run.callbacks: {spec} cannot be built ({error!r}).") from error
    if not isinstance(callback, Callback):
        raise UserError(f"run.callbacks: {spec} is no engine.types.Callback; derive it from that class.")
    return callback


def explain(error: Exception, config: RunConfig, run_dir: Path) -> RunError | None:
    """Return the sentence that ends a run for this error, or None where only a traceback helps."""
    if isinstance(error, RunError):
        return error
    if is_out_of_memory(error):
        return RunError(f"out of memory: {remedy(config)}.")
    if checkpoint.is_disk_full(error):
        where = getattr(error, "filename", None) or run_dir
        return RunError(f"{where}: the disk is full; free some space and repeat the command.")
    return None


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
    capacity = max_tokens_per_micro_batch(config.data)
    if packing.enabled and capacity > longest:
        return f"set data.packing.max_tokens={max(longest, capacity // 2)}"
    if not packing.enabled and config.train.micro_batch_size > 1:
        return f"set train.micro_batch_size={config.train.micro_batch_size // 2}"
    if config.model.recompute == "none":
        return "set model.recompute=full"
    return f"set data.max_length={longest // 2}, or train a smaller model"
