"""What can be known before anything heavy is imported: keys that contradict each other, files, folders, the model's own limits."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.config import layout, megatron, sources
from engine.config.model_folder import check_reference, not_a_model, read_config
from engine.config.names import PREFERENCE_LOSSES, stop
from engine.config.schema import (
    AlgorithmSection,
    BackendSection,
    CheckpointSection,
    ClusterSection,
    DataSection,
    LoggerSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    SchedulerSection,
    TrainSection,
)

BUILTIN = "builtin:"
DATA_FILES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz"}
MAX_LENGTH = 4096
DPO_KEYS = (
    "preference_loss",
    "reference_policy_kl_penalty",
    "preference_average_log_probs",
    "sft_average_log_probs",
    "preference_loss_weight",
    "sft_loss_weight",
    "label_smoothing",
    "preference_margin",
    "reference",
)
"""Keys of algorithm that have a value with dpo, and none otherwise."""
SLURM_KEYS = (
    "partition",
    "account",
    "qos",
    "constraint",
    "exclusive",
    "time_min",
    "setup",
    "sbatch",
    "prepare",
    "prepare_partition",
    "wait",
)
"""Keys of cluster that say something to Slurm alone."""
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def local_model_folder(path: str) -> Path | None:
    """Return the folder that ``model.path`` names, or None for a hub id."""
    if path.startswith(BUILTIN):
        return ASSETS / path.removeprefix(BUILTIN)
    return Path(path).expanduser() if looks_local(path) else None


def looks_local(path: str) -> bool:
    """Tell a path on this machine from a hub id (``owner/name``)."""
    if os.path.exists(os.path.expanduser(path)) or path.startswith(("/", ".", "~")):
        return True
    return path.count("/") != 1 or Path(path).suffix in DATA_FILES


def set_max_length(container: dict[str, Any]) -> None:
    """Fill in data.max_length where it is null: 4096, or what the model reads if that is known and less."""
    data, model = container.get("data"), container.get("model")
    if not isinstance(data, dict) or data.get("max_length") is not None:
        return
    longest = None
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        folder, overrides = local_model_folder(model["path"]), model.get("config_overrides")
        fields = read_config(folder) if folder is not None else None
        longest = {**(fields or {}), **(overrides if isinstance(overrides, dict) else {})}.get(
            "max_position_embeddings"
        )
    data["max_length"] = min(MAX_LENGTH, longest) if isinstance(longest, int) else MAX_LENGTH


def check(sections: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every problem that the recipe alone, and the files it names, can show.

    Args:
        sections: The recipe's sections by name; a check that needs one which is not there is left out.
    """
    problems: list[str] = []
    for function, needed in CHECKS.items():
        if all(name in sections for name in needed):
            problems += function(*(sections[name] for name in needed))
    return [stop(p) for p in problems]


def local_fields(model: ModelSection) -> dict[str, Any] | None:
    """Return the fields of a local model's config.json, ``model.config_overrides`` over them; None if there is none to be read."""
    folder = local_model_folder(model.path)
    fields = read_config(folder) if folder is not None else None
    return None if fields is None else {**fields, **model.config_overrides}


def _check_layout(
    cluster: ClusterSection, model: ModelSection, train: TrainSection, data: DataSection, backend: BackendSection
) -> list[str]:
    """Look at the layout where the recipe alone says how many ranks there will be."""
    ranks = layout.named_ranks(cluster)
    if ranks is None or (
        cluster.name == "local" and backend.name == "torch"
    ):  # which holds the model whole on its one rank
        return []
    return layout.problems(backend, local_fields(model), train, data, ranks, layout.named_ranks_per_node(cluster))


def _check_backend(backend: BackendSection, model: ModelSection) -> list[str]:
    problems = megatron.check_keys(backend)
    if backend.name != "megatron":
        return problems
    fields = local_fields(model)
    problems += megatron.check_model(model) + megatron.check_installed()
    return problems + (megatron.check_fields(model.path, fields) if fields is not None else [])


def _check_cluster(cluster: ClusterSection) -> list[str]:
    problems = []
    if cluster.name == "ray" and cluster.address is None:
        problems.append("cluster.address is not set: give the Ray cluster's HOST:PORT, or auto.")
    if cluster.name != "ray" and cluster.address is not None:
        problems.append(f"cluster.address={cluster.address} is for cluster=ray, not {cluster.name}: set it to null.")
    if cluster.num_workers is not None and cluster.gpus_per_node is not None:
        problems.append("cluster.num_workers (CPUs) and cluster.gpus_per_node are both set: set one of them to null.")
    if cluster.num_nodes > 1 and cluster.name not in ("ray", "slurm"):
        problems.append(
            f"cluster.num_nodes={cluster.num_nodes} is for cluster=ray and cluster=slurm, not {cluster.name}: set it to 1."
        )
    if cluster.name in ("local", "env"):
        for key in ("num_workers", "gpus_per_node"):
            if getattr(cluster, key) is not None:
                problems.append(
                    f"cluster.{key}={getattr(cluster, key)} is for Ray, and cluster={cluster.name} starts no ranks: set it to "
                    "null, or choose cluster=ray_local."
                )
    return problems + (_check_slurm(cluster) if cluster.name == "slurm" else _check_no_slurm(cluster))


def _check_no_slurm(cluster: ClusterSection) -> list[str]:
    return [
        f"cluster.{key}={getattr(cluster, key)} is for cluster=slurm, not {cluster.name}: take it out, or choose cluster=slurm."
        for key in SLURM_KEYS
        if getattr(cluster, key)
    ]


def _check_slurm(cluster: ClusterSection) -> list[str]:
    problems, nodes, workers = [], cluster.num_nodes, cluster.num_workers
    if cluster.gpus_per_node is None and workers is None:
        problems.append(
            "cluster.gpus_per_node is not set: say how many GPUs of a machine, choose a shape such as cluster=slurm_1x8, or set "
            "cluster.num_workers to train on CPUs."
        )
    if workers is not None and workers % nodes:
        problems.append(
            f"cluster.num_workers={workers} is no multiple of cluster.num_nodes={nodes}: set it to "
            f"{(workers // nodes + 1) * nodes}."
        )
    if cluster.prepare is None:
        problems.append("cluster.prepare is not set: set it to job, here or none.")
    for name, value in cluster.sbatch.items():
        if not isinstance(value, (str, int, float)) or value is False or "\n" in str(value):
            problems.append(
                f"cluster.sbatch.{name}={value!r}: must be one line of text, a number, or true for a flag; leave out what is not "
                "wanted."
            )
    return problems


def _check_sizes(algorithm: AlgorithmSection, train: TrainSection, data: DataSection) -> list[str]:
    problems, packing = [], data.packing
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
    if packing.enabled and packing.max_tokens is not None and packing.max_tokens < data.max_length:
        problems.append(
            f"data.packing.max_tokens={packing.max_tokens} is smaller than data.max_length={data.max_length}: "
            f"a sample of that length would fit no micro-batch; raise max_tokens or lower max_length."
        )
    if packing.enabled and max(train.micro_batch_size, algorithm.val_micro_batch_size or 1) > 1:
        problems.append(
            "train.micro_batch_size and algorithm.val_micro_batch_size are for padded micro-batches: size packed ones by "
            "data.packing.max_tokens, or set data.packing.enabled=false."
        )
    if not packing.enabled and packing.max_tokens is not None:
        problems.append(
            "data.packing.max_tokens is for packed micro-batches: set it to null, or data.packing.enabled=true."
        )
    if not has_validation(data) and (algorithm.val_period or algorithm.val_at_start):
        problems.append("algorithm.val_period and algorithm.val_at_start need validation data: set data.val_path.")
    return problems


def _check_schedule(scheduler: SchedulerSection, optimizer: OptimizerSection) -> list[str]:
    problems = []
    if scheduler.warmup_steps is not None and scheduler.warmup_ratio is not None:
        problems.append("scheduler.warmup_steps and scheduler.warmup_ratio are both set: set one of them to null.")
    if scheduler.decay_steps is not None and scheduler.name != "wsd":
        problems.append(
            f"scheduler.decay_steps is for scheduler=wsd: set it to null, or choose wsd instead of {scheduler.name}."
        )
    if scheduler.min_lr and scheduler.name == "constant":
        problems.append(
            "scheduler.min_lr does nothing with scheduler=constant: set it to 0, or choose another scheduler."
        )
    if scheduler.min_lr > optimizer.lr:
        problems.append(f"scheduler.min_lr={scheduler.min_lr} is above optimizer.lr={optimizer.lr}: lower it.")
    return problems


def _check_data(data: DataSection, checkpoint: CheckpointSection) -> list[str]:
    problems = []
    for key, path in _paths(data):
        if path.startswith(BUILTIN) or not looks_local(path):
            continue
        file = os.path.expanduser(path)
        if not os.path.exists(file):
            problems.append(f"{key}={path}: no such file or folder (the working folder is {Path.cwd()}).")
        elif not os.access(file, os.R_OK):
            problems.append(f"{key}={path}: not readable; change its permissions.")
        elif os.path.isfile(file) and os.path.getsize(file) == 0:
            problems.append(f"{key}={path}: the file is empty.")
    if checkpoint.keep_best and checkpoint.metric.startswith("validation/") and not has_validation(data):
        problems.append(
            f"checkpoint.keep_best needs {checkpoint.metric}, and data.val_path is null: set data.val_path or keep_best=0."
        )
    names = sources.validation_sets(data)
    parts = checkpoint.metric.split("/")
    if parts[0] == "validation" and len(parts) > 2 and parts[1] not in names:
        problems.append(
            f"checkpoint.metric={checkpoint.metric}: no validation set is named {parts[1]}; "
            + (f"there is {', '.join(names)}." if names else "with a single one it is validation/loss.")
        )
    return problems + sources.check(data)


def has_validation(data: DataSection) -> bool:
    """Tell whether a recipe has something to validate on."""
    return bool(sources.of(data, "validation") or data.val_fraction)


def _paths(data: DataSection) -> list[tuple[str, str]]:
    """Return key and path of every source."""
    found = []
    for split, (single, _) in sources.LISTS.items():
        listed = getattr(data, split)
        for i, source in enumerate(sources.of(data, split)):
            found.append((f"data.{split}[{i}].path" if listed else f"data.{single}", source.path))
    return found


def _check_run(run: RunSection) -> list[str]:
    problems = []
    folder = Path(run.dir).expanduser().absolute()
    nearest = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    if not os.path.isdir(nearest):
        problems.append(f"run.dir={run.dir}: {nearest} is a file; choose another folder.")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        problems.append(
            f"run.dir={run.dir}: {nearest} is not writable; choose another folder or change its permissions."
        )
    if run.resume not in ("auto", "never") and not os.path.isdir(os.path.expanduser(run.resume)):
        problems.append(f"run.resume={run.resume}: must be auto, never, or a run or checkpoint folder that exists.")
    for spec in run.callbacks:
        module, _, name = spec.partition(":")
        if not (module and name.isidentifier()):
            problems.append(f"run.callbacks: {spec!r} is not of the form module:Class.")
    if run.profile_steps is not None and run.profile_steps[0] > run.profile_steps[1]:
        first, last = run.profile_steps
        problems.append(f"run.profile_steps=[{first},{last}]: the first step comes after the last; swap them.")
    return problems


def _check_logger(logger: LoggerSection) -> list[str]:
    problems = []
    for name in dict.fromkeys(logger.backends):
        times = logger.backends.count(name)
        if times > 1:
            problems.append(f"logger.backends names {name} {times} times: name it once.")
        if name != "console" and not _installed(name):
            package = "wandb" if name == "wandb" else f"'anneal[{name}]'"
            problems.append(f"logger.backends: {name} is not installed; pip install {package}, or take it out.")
    return problems


def _installed(package: str) -> bool:
    """Tell an installed package from none, and from a folder of that name here (wandb/ is what its own runs leave)."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _check_model(model: ModelSection) -> list[str]:
    """Look into a local model folder."""
    path, folder = model.path, local_model_folder(model.path)
    problems: list[str] = []
    if model.tokenizer is not None:
        tokenizer = local_model_folder(model.tokenizer)
        if tokenizer is not None and not os.path.isfile(tokenizer / "tokenizer.json"):
            problems.append(f"model.tokenizer={model.tokenizer}: no tokenizer.json there.")
    if folder is None:
        return problems
    if model.revision is not None:
        problems.append(f"model.revision={model.revision}: {path} is a folder, which has no revisions; set it to null.")
    other = not_a_model(folder)
    if other is not None and (model.init == "pretrained" or not os.path.isfile(folder / "config.json")):
        return [f"model.path={path}: {other}."]
    if not os.path.isdir(folder):
        choices = ", ".join(f"{BUILTIN}{d.name}" for d in sorted(ASSETS.iterdir()) if d.is_dir())
        if path.startswith(BUILTIN):
            return [f"model.path={path}: no such built-in model; there is {choices}."]
        return [
            f"model.path={path}: no such folder (the working folder is {Path.cwd()}); a hub id has the form owner/name."
        ]
    if not os.path.isfile(folder / "config.json"):
        return [f"model.path={path}: no config.json there; a model folder is what save_pretrained writes."]
    fields = read_config(folder)
    if fields is None:
        return [f"model.path={path}: config.json is not readable as a JSON object."]
    if model.init == "pretrained" and not any(folder.glob("*.safetensors")):
        problems.append(
            f"model.path={path}: no *.safetensors weights there; add them, or train fresh ones with model.init=random."
        )
    if model.tokenizer is None and not os.path.isfile(folder / "tokenizer.json"):
        problems.append(
            f"model.path={path}: no tokenizer.json there; add it, or name one with model.tokenizer=FOLDER_OR_HUB_ID."
        )
    if isinstance(fields.get("text_config"), dict):
        problems.append(
            f"model.path={path}: a model of several modalities; give the folder of a text-only causal model."
        )
    return problems


def _check_lora(model: ModelSection) -> list[str]:
    lora, problems = model.lora, []
    if lora.target_modules is not None and not lora.target_modules:
        problems.append("model.lora.target_modules is empty: name some layers, or set it to null for all linear ones.")
    if lora.enabled and not lora.merge and model.init == "random":
        problems.append(
            "model.lora.merge=false leaves adapters alone, and model.init=random a base that no file holds: set one of them to the "
            "other value."
        )
    return problems


def _check_length(model: ModelSection, data: DataSection) -> list[str]:
    longest = (local_fields(model) or model.config_overrides).get("max_position_embeddings")
    if isinstance(longest, int) and data.max_length > longest:
        return [
            f"data.max_length={data.max_length}: the model in {model.path} reads at most {longest} tokens; set "
            f"data.max_length={longest} or lower."
        ]
    return []


def _check_horizon(algorithm: AlgorithmSection, data: DataSection) -> list[str]:
    if algorithm.max_num_steps == 0 and not has_validation(data):
        return [
            "algorithm.max_num_steps=0 only validates, and there is no validation data: set data.val_path, or do some steps."
        ]
    if algorithm.max_num_steps is None and algorithm.max_num_epochs is None:
        return ["algorithm.max_num_steps and algorithm.max_num_epochs are both null: set one of them."]
    return []


def _check_algorithm(algorithm: AlgorithmSection, data: DataSection) -> list[str]:
    if algorithm.name != "dpo":
        given = [key for key in DPO_KEYS if getattr(algorithm, key) is not None]
        return [f"algorithm.{key} is for algorithm=dpo: set it to null, or choose algorithm=dpo." for key in given]
    unset = [key for key in DPO_KEYS if getattr(algorithm, key) is None]
    if unset:
        return [f"algorithm.{key} is not set: algorithm=dpo needs it." for key in unset]
    problems, packing = _check_preference_loss(algorithm), data.packing
    if algorithm.preference_loss_weight == 0 and algorithm.sft_loss_weight == 0:
        problems.append(
            "algorithm.preference_loss_weight and algorithm.sft_loss_weight are both 0: nothing would be trained."
        )
    if (
        packing.enabled
        and packing.max_tokens is not None
        and data.max_length <= packing.max_tokens < 2 * data.max_length
    ):
        problems.append(
            f"data.packing.max_tokens={packing.max_tokens} is smaller than two samples of data.max_length={data.max_length}, and "
            f"a pair shares a micro-batch: set it to {2 * data.max_length} or more, or lower data.max_length."
        )
    return problems


def _check_preference_loss(algorithm: AlgorithmSection) -> list[str]:
    """Look at the loss and at the knobs that it does not have; of the user's own, any may be meant."""
    loss, problems = algorithm.preference_loss or "", list[str]()
    module, colon, function = loss.partition(":")
    if colon:
        if not (module and function.isidentifier()):
            return [f"algorithm.preference_loss={loss} is not of the form module:function."]
        return _check_reference(algorithm)
    if loss not in PREFERENCE_LOSSES:
        near = difflib.get_close_matches(loss, PREFERENCE_LOSSES, 1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PREFERENCE_LOSSES)}"
        return [f"algorithm.preference_loss={loss}: no such loss, and no module:function of your own; {remedy}"]
    if algorithm.label_smoothing and loss not in ("sigmoid", "robust"):
        problems.append(f"algorithm.label_smoothing is for the losses sigmoid and robust, not {loss}: set it to 0.")
    if algorithm.preference_margin and loss != "simpo":
        problems.append(f"algorithm.preference_margin is for the loss simpo, not {loss}: set it to 0.")
    if not PREFERENCE_LOSSES[loss]:
        return problems
    if algorithm.reference == "none":
        free = " or ".join(name for name, needed in PREFERENCE_LOSSES.items() if not needed)
        problems.append(
            f"algorithm.reference=none: the loss {loss} needs a reference; set algorithm.reference=initial, or choose "
            f"algorithm.preference_loss={free}."
        )
    return problems + _check_reference(algorithm)


def _check_reference(algorithm: AlgorithmSection) -> list[str]:
    """Look into the folder of a reference that has one."""
    path = algorithm.reference or ""
    folder = None if path in ("initial", "none") else local_model_folder(path)
    if folder is None:
        return []
    other = not_a_model(folder)
    if other is not None:
        return [f"algorithm.reference={path}: {other}."]
    if os.path.isfile(folder / "config.json"):
        if any(folder.glob("*.safetensors")):
            return []
        return [
            f"algorithm.reference={path}: no *.safetensors weights there; give the folder of a model that has some."
        ]
    near = difflib.get_close_matches(path, ("initial", "none"), 1)
    return [
        f"algorithm.reference={path}: must be initial, none, a model folder (no config.json there) or a hub id of the form "
        "owner/name" + (f"; did you mean {near[0]}?" if near else "")
    ]


def _check_reference_folder(algorithm: AlgorithmSection, model: ModelSection, data: DataSection) -> list[str]:
    """Hold the folder of a reference against the policy, as far as both are here."""
    path = algorithm.reference
    if algorithm.name != "dpo" or path in (None, "initial", "none"):
        return []
    if not PREFERENCE_LOSSES.get(algorithm.preference_loss or "", True):
        return []
    folder, policy = local_model_folder(path), local_model_folder(model.path)
    if folder is None or not os.path.isfile(folder / "config.json"):  # _check_reference says so
        return []
    fields = {**((read_config(policy) if policy is not None else None) or {}), **model.config_overrides}
    return check_reference(
        path,
        folder,
        max_length=data.max_length,
        vocab_size=fields.get("vocab_size"),
        tokenizer=policy if model.tokenizer is None else local_model_folder(model.tokenizer),
    )


CHECKS: dict[Callable[..., list[str]], tuple[str, ...]] = {
    _check_horizon: ("algorithm", "data"),
    _check_algorithm: ("algorithm", "data"),
    _check_reference_folder: ("algorithm", "model", "data"),
    _check_sizes: ("algorithm", "train", "data"),
    _check_schedule: ("scheduler", "optimizer"),
    _check_data: ("data", "checkpoint"),
    _check_run: ("run",),
    _check_logger: ("logger",),
    _check_cluster: ("cluster",),
    _check_layout: ("cluster", "model", "train", "data", "backend"),
    _check_backend: ("backend", "model"),
    _check_model: ("model",),
    _check_lora: ("model",),
    _check_length: ("model", "data"),
}
"""Each check and the sections it looks at."""
