"""One rank from recipe to exit code: data, backend, checkpoints, loop."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from engine import backends, checkpoint, hub, loggers, metrics, monitor, objectives, plugins
from engine.checkpoint import Checkpoints, TrainState
from engine.config import layout, megatron
from engine.config.layout import Layout
from engine.config.model_folder import check_reference, read_config
from engine.config.schema import RunConfig, max_tokens_per_micro_batch
from engine.data import report
from engine.data.assemble import Data, Made, assemble
from engine.data.cache import cache_root
from engine.data.loader import Loader, train_loader, val_loader
from engine.data.samples import DataSet
from engine.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, RunError, UserError
from engine.ranks import PeerFailed, Ranks, is_lost_peer
from engine.receipt import no_longer, receipt
from engine.reference.attach import attach
from engine.run_folder import RunFolder
from engine.schedule import total_steps
from engine.train import Stopped, StopRequest, Trainer
from engine.types import Callback, Objective, Sample, Scorer

PROBE_SAMPLES = 3
OLD_WORKER_S = 60.0
"""How long the first rank waits for one of the same run that is being ended."""


def main(
    config: RunConfig, recipe: str, ranks: Ranks, stop: StopRequest, console: metrics.Console | None = None
) -> int:
    """Run a recipe on this rank.

    Args:
        config: The recipe.
        recipe: Its re-runnable text.
        ranks: This rank among all.
        stop: Notes what asks to stop.
        console: Where another process holds the run folder and shows what happens; None: this one does.

    Returns:
        The run's exit code.

    Raises:
        RunError: For whatever ends a run with a sentence.
        PeerFailed: Where another rank says why.
    """
    folder: RunFolder | None = None
    closing: list[metrics.Logger | Callback | Checkpoints] = []
    with stop:
        try:
            folder = ranks.together(lambda: _folder(config, recipe, ranks, apart=console is not None))
            console = console or metrics.console(config.logger, folder.path, main=ranks.main)
            return _run(config, folder, console, closing, stop, ranks)
        except Stopped as stopped:
            if console is not None:
                console.say(str(stopped))
            return EXIT_STOPPED
        except Exception as error:
            ended = explain(error, config)
            if isinstance(ended, PeerFailed) or not ranks.blame():
                raise PeerFailed(getattr(ended, "exit_code", EXIT_ERROR)) from error
            if console is not None:
                console.note(f"error: {ended or repr(error)}")
            if ended is None or ended is error:
                raise
            raise ended from error
        finally:
            for part in [*closing, console]:
                if part is not None:
                    with suppress(OSError):  # a full disk has been reported
                        part.close()
            if folder is not None:
                folder.release()


def _folder(config: RunConfig, recipe: str, ranks: Ranks, *, apart: bool) -> RunFolder:
    """Return the run folder, locked by the first rank; with a lock of its own where another process has locked it."""
    if not ranks.main:
        return RunFolder(config, recipe, lock=None)
    return RunFolder(config, recipe, lock=".lock.worker", wait_s=OLD_WORKER_S) if apart else RunFolder(config, recipe)


def _run(
    config: RunConfig,
    folder: RunFolder,
    console: metrics.Console,
    closing: list[metrics.Logger | Callback | Checkpoints],
    stop: StopRequest,
    ranks: Ranks,
) -> int:
    """Put the rank together, piece by piece, and train."""
    console.say(f"run folder {folder.path}")
    callbacks = ranks.together(lambda: [*monitor.builtin(config), *map(_callback, config.run.callbacks)])
    closing += callbacks
    checkpoints = ranks.together(lambda: Checkpoints(folder.checkpoints, config.checkpoint, ranks))
    closing.append(checkpoints)
    source, state = ranks.first(lambda: folder.resume_from(config))
    objective = ranks.together(lambda: objectives.build(config.algorithm))
    ranks.first(lambda: _check_layout(config, ranks))
    ranks.together(lambda: backends.check(config))
    held = _own_reference(config, objective, folder, ranks)
    data = _data(config, folder, console, ranks)
    train, val = ranks.together(lambda: _loaders(config, data, ranks, together=max(1, objective.sequences_per_group)))
    lock = ranks.first(lambda: _receipt(config, data, folder, console, ranks, held))
    planned, state.total_steps = state.total_steps, ranks.together(lambda: total_steps(config.algorithm, train.plan))
    done = state.step >= state.total_steps or (state.finished and planned == state.total_steps)
    if source is not None and done and ranks.first(folder.is_finished):
        console.say(f"already finished: {state.step} steps; weights in {folder.final}")
        return EXIT_DONE
    ranks.first(lambda: folder.write_recipe(lock))
    ranks.first(lambda: report.write(folder.path, data, train))
    logging = ranks.together(lambda: _loggers(config, folder, console, state.step) if ranks.main else [])
    closing += logging
    ranks.together(
        lambda: hub.folder(config.model.path, config.model.revision, weights=config.model.init == "pretrained")
    )
    if source is not None:
        ranks.together(lambda: checkpoint.check_whole(source, ranks))
    _set_determinism(config)
    probed, timings = _probed(config, data.train), dict[str, float]()
    attached = functools.partial(_attach_reference, _seen(config, train, val, state), folder, console, ranks)
    if held is not None:  # gone before the policy comes
        ranks.together(lambda: hub.folder(held.model.path, held.model.revision, weights=True))
        with backends.scorer(held, ranks, probed) as scorer:
            timings = attached(held, lock["reference"]["weights"], scorer)
    backend = backends.build(config, ranks)
    if backend.kernels is not None:
        console.say(f"kernels: {backend.kernels}")
    if probed:
        backend.probe(probed)
    ranks.first(lambda: checkpoints.check_space(backend))
    if objective.needs_reference and held is None:  # the weights as they are now: those of a checkpoint come later
        timings = attached(config, lock["weights"], lambda: backend)
    if config.run.prepare_only:
        console.say(f"done: all that training waits for is in {cache_root(config.data.cache_dir)}")
        return EXIT_DONE
    ranks.first(lambda: folder.cut_metrics(state.step if source is not None else -1))
    if source is not None:
        ranks.together(lambda: backend.load(source))
        console.say(f"resuming after step {state.step} of {state.total_steps} from {source}")
    return Trainer(
        config=config,
        ranks=ranks,
        backend=backend,
        objective=objective,
        train=train,
        val=val,
        folder=folder,
        checkpoints=checkpoints,
        console=console,
        loggers=[*logging, console],
        callbacks=callbacks,
        state=state,
        timings=timings,
    ).run(stop)


def _check_layout(config: RunConfig, ranks: Ranks) -> None:
    """Hold the model against the backend and its layout: what a hub id stands for is known only now."""
    fields, model = hub.fields(config.model), config.model
    problems = layout.check_model(Layout.of(config.backend, ranks.size), fields)
    if config.backend.name == "megatron":
        problems += megatron.check_fields(model.path, fields)
    if problems:
        raise UserError(*problems)


def _loggers(config: RunConfig, folder: RunFolder, console: metrics.Console, step: int) -> list[metrics.Logger]:
    """Return where the figures go, the console excepted."""
    jsonl = metrics.JsonLines(folder.path / "metrics.jsonl")
    return [jsonl, *loggers.build(config, folder.recipe, folder.path, step, console.say)]


def _data(config: RunConfig, folder: RunFolder, console: metrics.Console, ranks: Ranks) -> Data:
    """Return the tokenised data: made by the first rank where the cache has none, then read by the others."""
    own: list[Data] = []

    def first() -> dict[str, Made]:
        own.append(assemble(config, folder.path, console.say, revisions=folder.revisions()))
        return own[0].made

    made = ranks.first(first)
    data = ranks.together(lambda: own[0] if own else assemble(config, folder.path, _say_nothing, made=made))
    prints = ranks.gather(data.fingerprints)
    odd = next((rank for rank, found in enumerate(prints) if found != prints[0]), None)
    if odd is not None:
        raise UserError(
            f"data: rank {odd} has other samples than the first one (its files differ, say); give all machines the same files, or "
            "a data.cache_dir that they share."
        )
    return data


def _say_nothing(text: str) -> None:
    """Leave it to the first rank."""


def _loaders(config: RunConfig, data: Data, ranks: Ranks, *, together: int) -> tuple[Loader, dict[str, Loader]]:
    """Return the loaders of this rank's training data and of each validation set."""
    algorithm, sizes = config.algorithm, config.train
    for name, samples in data.sources.items():
        if together > 1 and len(samples) != together * samples.num_conversations:
            raise UserError(
                f"algorithm={algorithm.name}: {name} has no pairs (format {samples.summary.format}); choose other data."
            )
    attention_length, split = hub.attention_length(config.model), Layout.of(config.backend, ranks.size)
    data_rank = split.data_rank(ranks.rank)
    train = train_loader(
        data.train,
        config.data,
        batch_size=sizes.global_batch_size,
        micro_batch_size=sizes.micro_batch_size,
        seed=config.run.seed,
        rank=data_rank,
        ranks=split.data,
        attention_length=attention_length,
        together=together,
    )
    val = {
        name: val_loader(
            held,
            config.data,
            batch_size=algorithm.val_global_batch_size or sizes.global_batch_size,
            micro_batch_size=algorithm.val_micro_batch_size or sizes.micro_batch_size,
            rank=data_rank,
            ranks=split.data,
            attention_length=attention_length,
            together=together,
        )
        for name, held in data.validation.items()
    }
    return train, val


def _receipt(
    config: RunConfig,
    data: Data,
    folder: RunFolder,
    console: metrics.Console,
    ranks: Ranks,
    held: RunConfig | None,
) -> dict[str, Any]:
    """Return what the run consumes, once it is known to be what it has consumed so far.

    What differs from the lock of a frozen recipe is said.
    """
    lock = receipt(config, data, ranks, held)
    folder.check_receipt(lock)
    said = no_longer(folder.frozen(), lock)
    if said is not None:
        console.say(said)
    return lock


def _set_determinism(config: RunConfig) -> None:
    import torch

    if config.run.deterministic:
        # torch asks for it, and cuBLAS reads it with the first product on CUDA
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.run.deterministic or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.run.deterministic)  # imports the compiler: not for nothing


def _probed(config: RunConfig, data: DataSet) -> list[Sample]:
    """Return the few samples on which models are to prove themselves; none with ``run.probe=false``."""
    return [data[i] for i in range(min(PROBE_SAMPLES, len(data)))] if config.run.probe else []


def _own_reference(config: RunConfig, objective: Objective, folder: RunFolder, ranks: Ranks) -> RunConfig | None:
    """Return the recipe of a reference with weights of its own, seen to fit the policy; None: there is none.

    It is what its folder says, so ``model.config_overrides`` are not for it; from the hub it is what the run has begun with.
    """
    path, model = config.algorithm.reference, config.model
    if not objective.needs_reference or path in (None, "initial"):
        return None

    def first() -> str | None:
        revision = folder.reference_revision() or hub.commit(path, None)
        fields = read_config(hub.folder(model.path, model.revision, weights=False)) or {}
        problems = check_reference(
            path,
            hub.folder(path, revision, weights=False),
            max_length=config.data.max_length,
            vocab_size={**fields, **model.config_overrides}.get("vocab_size"),
            tokenizer=hub.tokenizer_folder(model),
        )
        if problems:
            raise UserError(*problems)
        return revision

    whole = model.lora.model_copy(update={"enabled": False})
    own: dict[str, Any] = {"path": path, "revision": ranks.first(first), "init": "pretrained", "config_overrides": {}}
    own["lora"] = whole
    return config.model_copy(update={"model": model.model_copy(update=own)})


def _seen(
    config: RunConfig, train: Loader, val: dict[str, Loader], state: TrainState
) -> list[tuple[Loader, Iterable[int]]]:
    """Return each loader with the steps that the run is going to see."""
    most = config.algorithm.val_batches
    seen: list[tuple[Loader, Iterable[int]]] = [(train, range(state.step, state.total_steps))]
    for held in val.values():
        steps = held.plan.steps_per_epoch
        seen.append((held, range(min(most or steps, steps))))
    return seen


def _attach_reference(
    seen: Sequence[tuple[Loader, Iterable[int]]],
    folder: RunFolder,
    console: metrics.Console,
    ranks: Ranks,
    config: RunConfig,
    weights: str,
    scorer: Callable[[], Scorer],
) -> dict[str, float]:
    """Give the data the reference's log-probabilities of all that the run will see, and return the time it took."""
    started = time.perf_counter()
    attach(config, weights, scorer, seen, folder.path, ranks, console.say)
    return {"timing/reference_s": time.perf_counter() - started}


def _callback(spec: str) -> Callback:
    built = plugins.load(spec, "run.callbacks")
    try:
        callback = built()
    except Exception as error:
        raise UserError(f"run.callbacks: {spec} cannot be built ({error!r}).") from error
    if not isinstance(callback, Callback):
        raise UserError(f"run.callbacks: {spec} is no engine.types.Callback; derive it from that class.")
    return callback


def explain(error: Exception, config: RunConfig) -> RunError | None:
    """Return the sentence that ends a run for this error, or None where only a traceback helps."""
    if isinstance(error, RunError):
        return error
    if is_out_of_memory(error):
        return RunError(f"out of memory: {remedy(config)}.")
    if checkpoint.is_disk_full(error):
        where = getattr(error, "filename", None) or config.run.dir
        return RunError(f"{where}: the disk is full; free some space and repeat the command.")
    if is_lost_peer(error):
        return RunError(
            f"another rank was lost ({' '.join(str(error).split())[:120]}); look at its machine, and repeat the command, which "
            "goes on from the last checkpoint."
        )
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
    together = config.algorithm.together
    capacity, least = max_tokens_per_micro_batch(config.data, together), together * longest
    if packing.enabled and capacity > least:
        return f"set data.packing.max_tokens={max(least, capacity // 2)}"
    if not packing.enabled and config.train.micro_batch_size > 1:
        return f"set train.micro_batch_size={config.train.micro_batch_size // 2}"
    if config.model.recompute == "none":
        return "set model.recompute=full"
    if config.backend.name == "megatron":
        return "raise backend.tensor_parallel, or backend.pipeline_parallel where that fills a machine"
    fewer = (
        "train a smaller model"
        if config.model.lora.enabled
        else "set model.lora.enabled=true, or train a smaller model"
    )
    return f"set data.max_length={longest // 2}, or {fewer}"
