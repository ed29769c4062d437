"""What can be known before anything heavy is imported: keys that contradict each other, files, folders, the model's own limits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from engine.config.names import stop
from engine.config.schema import RunConfig

BUILTIN = "builtin:"
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def local_model_folder(path: str) -> Path | None:
    """Return the folder that ``model.path`` names, or None for a hub id."""
    if path.startswith(BUILTIN):
        return ASSETS / path.removeprefix(BUILTIN)
    return Path(path).expanduser() if looks_local(path) else None


def looks_local(path: str) -> bool:
    """Tell a path on this machine from a hub id (``owner/name``)."""
    if Path(path).expanduser().exists() or path.startswith(("/", ".", "~")):
        return True
    return path.count("/") != 1 or Path(path).suffix in {".json", ".jsonl", ".gz"}


def check(config: RunConfig) -> list[str]:
    """Return a sentence for every problem that the recipe alone, and the files it names, can show."""
    problems = [*_check_numbers(config), *_check_data(config), *_check_run(config)]
    found, model = _check_model(config)
    problems += found
    longest = model.get("max_position_embeddings")
    if isinstance(longest, int) and config.data.max_length > longest:
        problems.append(
            f"data.max_length={config.data.max_length}: the model in {config.model.path} reads at most {longest} tokens; "
            f"set data.max_length={longest} or lower."
        )
    return [stop(p) for p in problems]


def _check_numbers(config: RunConfig) -> list[str]:
    problems = []
    algorithm, train, scheduler, packing = config.algorithm, config.train, config.scheduler, config.data.packing
    if algorithm.max_num_steps is None and algorithm.max_num_epochs is None:
        problems.append("algorithm.max_num_steps and algorithm.max_num_epochs are both null: set one of them.")
    if not packing.enabled:
        sizes = [("train.", train.global_batch_size, train.micro_batch_size)]
        if algorithm.val_global_batch_size or algorithm.val_micro_batch_size:
            batch = algorithm.val_global_batch_size or train.global_batch_size
            sizes.append(("algorithm.val_", batch, algorithm.val_micro_batch_size or train.micro_batch_size))
        for key, batch, micro in sizes:
            if batch % micro:
                near = sorted({max(micro, batch - batch % micro), batch + micro - batch % micro})
                problems.append(
                    f"{key}global_batch_size={batch} is not divisible by {key}micro_batch_size={micro}: "
                    f"the nearest batch sizes are {' and '.join(map(str, near))}."
                )
    if packing.enabled and packing.max_tokens is not None and packing.max_tokens < config.data.max_length:
        problems.append(
            f"data.packing.max_tokens={packing.max_tokens} is smaller than data.max_length={config.data.max_length}: "
            f"a sample of that length would fit no micro-batch; raise max_tokens or lower max_length."
        )
    if scheduler.warmup_steps is not None and scheduler.warmup_ratio:
        problems.append(
            "scheduler.warmup_steps and scheduler.warmup_ratio are both set: set scheduler.warmup_ratio=null."
        )
    if scheduler.decay_steps is not None and scheduler.name != "wsd":
        problems.append(
            f"scheduler.decay_steps is for scheduler=wsd: set it to null, or choose wsd instead of {scheduler.name}."
        )
    if scheduler.min_lr > config.optimizer.lr:
        problems.append(f"scheduler.min_lr={scheduler.min_lr} is above optimizer.lr={config.optimizer.lr}: lower it.")
    return problems


def _check_data(config: RunConfig) -> list[str]:
    problems = []
    for key, path in (("data.train_path", config.data.train_path), ("data.val_path", config.data.val_path)):
        if path is None or path.startswith(BUILTIN) or not looks_local(path):
            continue
        file = Path(path).expanduser()
        if not file.exists():
            problems.append(f"{key}={path}: no such file or folder (the working folder is {Path.cwd()}).")
        elif not os.access(file, os.R_OK):
            problems.append(f"{key}={path}: not readable; change its permissions.")
        elif file.is_file() and file.stat().st_size == 0:
            problems.append(f"{key}={path}: the file is empty.")
    metric = config.checkpoint.metric
    if config.checkpoint.keep_best and metric.startswith("validation/") and config.data.val_path is None:
        problems.append(
            f"checkpoint.keep_best needs {metric}, and data.val_path is null: set data.val_path or keep_best=0."
        )
    return problems


def _check_run(config: RunConfig) -> list[str]:
    problems = []
    folder = Path(config.run.dir).expanduser().absolute()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir():
        problems.append(f"run.dir={config.run.dir}: {nearest} is a file; choose another folder.")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        problems.append(
            f"run.dir={config.run.dir}: {nearest} is not writable; choose another folder or change its permissions."
        )
    if config.run.resume not in ("auto", "never") and not Path(config.run.resume).expanduser().is_dir():
        problems.append(
            f"run.resume={config.run.resume}: must be auto, never, or a run or checkpoint folder that exists."
        )
    for spec in config.run.callbacks:
        module, _, name = spec.partition(":")
        if not (module and name.isidentifier()):
            problems.append(f"run.callbacks: {spec!r} is not of the form module:Class.")
    return problems


def _check_model(config: RunConfig) -> tuple[list[str], dict[str, Any]]:
    """Look into a local model folder; returns the problems and config.json's fields, overrides laid over them."""
    path, folder = config.model.path, local_model_folder(config.model.path)
    problems: list[str] = []
    if config.model.tokenizer is not None:
        tokenizer = local_model_folder(config.model.tokenizer)
        if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
            problems.append(f"model.tokenizer={config.model.tokenizer}: no tokenizer.json there.")
    if folder is None:
        return problems, {}
    if path.startswith(BUILTIN) and not folder.is_dir():
        choices = ", ".join(f"{BUILTIN}{d.name}" for d in sorted(ASSETS.iterdir()) if d.is_dir())
        return [f"model.path={path}: no such built-in model; there is {choices}."], {}
    if not folder.is_dir():
        return [
            f"model.path={path}: no such folder (the working folder is {Path.cwd()}); a hub id has the form owner/name."
        ], {}
    if not (folder / "config.json").is_file():
        return [f"model.path={path}: no config.json there; a model folder is what save_pretrained writes."], {}
    try:
        fields = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError) as error:
        return [f"model.path={path}: config.json is not readable as JSON ({error})."], {}
    if config.model.init == "pretrained" and not any(folder.glob("*.safetensors")):
        problems.append(
            f"model.path={path}: no *.safetensors weights there; add them, or train fresh ones with model.init=random."
        )
    if config.model.tokenizer is None and not (folder / "tokenizer.json").is_file():
        problems.append(
            f"model.path={path}: no tokenizer.json there; add it, or name one with model.tokenizer=FOLDER_OR_HUB_ID."
        )
    if isinstance(fields.get("text_config"), dict):
        problems.append(
            f"model.path={path}: a model of several modalities; give the folder of a text-only causal model."
        )
    return problems, {**fields, **config.model.config_overrides}
