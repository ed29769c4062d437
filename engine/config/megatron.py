"""What backend=megatron needs and does not have, as far as the recipe, the model's config.json and what is installed tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from engine.config.schema import BackendSection, ModelSection

KEYS = {
    "tensor_parallel": "tensor parallelism",
    "sequence_parallel": "sequence parallelism",
    "pipeline_parallel": "pipeline parallelism",
    "virtual_pipeline": "a virtual pipeline",
    "context_parallel": "context parallelism (Ulysses too)",
    "expert_parallel": "expert parallelism",
    "overlap": "this key",
    "transformer_config": "a TransformerConfig",
}
"""Keys of backend that have a value with megatron, and none otherwise → what they ask for."""
OPTIONAL = "virtual_pipeline"
"""The one that has none with megatron either, unless it is wanted."""
TORCH_DEFAULTS = {"shard_size": None, "reshard_after_forward": True, "cpu_offload": False}
"""What backend.torch says where nobody has said anything."""
ONLY_TORCH = {
    "lora.enabled": "set it to false",
    "liger": "set it to auto or false",
    "compile": "set it to false",
    "trust_remote_code": "set it to false",
}
"""Keys of model that are true with backend=torch alone → the remedy."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
"""``model_type`` of the models that it can build."""
VERSION = "0.16"
"""The megatron-core that it is written for, and tested with."""


def set_sequence_parallel(container: dict[str, Any]) -> None:
    """Fill in backend.sequence_parallel where it is null: true with tensor parallelism."""
    backend = container.get("backend")
    if isinstance(backend, dict) and backend.get("name") == "megatron" and backend.get("sequence_parallel") is None:
        tensor = backend.get("tensor_parallel")
        backend["sequence_parallel"] = isinstance(tensor, int) and tensor > 1


def check_keys(backend: BackendSection) -> list[str]:
    """Return a sentence for every key of one backend that has a value with the other."""
    given = {key: getattr(backend, key) for key in KEYS}
    if backend.name != "megatron":
        return [
            f"backend.{key}={json.dumps(value)}: {KEYS[key]} is for backend=megatron; set it to null, or choose backend=megatron."
            for key, value in given.items()
            if value is not None
        ]
    problems = [
        f"backend.torch.{key}={json.dumps(value)} is for backend=torch: set it to {json.dumps(TORCH_DEFAULTS[key])}, or choose "
        "backend=torch."
        for key, value in backend.torch
        if value != TORCH_DEFAULTS[key]
    ]
    unset = [f"backend.{key}" for key, value in given.items() if value is None and key != OPTIONAL]
    if unset:
        problems.append(f"{unset[0]} is not set: choose backend=megatron, which has a value for each of its keys.")
    return problems


def check_model(model: ModelSection) -> list[str]:
    """Return a sentence for every key of the model that Megatron has nothing for."""
    problems = []
    for key, remedy in ONLY_TORCH.items():
        value: Any = model
        for name in key.split("."):
            value = getattr(value, name)
        if value is True:
            problems.append(f"model.{key}=true is for backend=torch: {remedy}, or choose backend=torch.")
    return problems


def check_installed() -> list[str]:
    """Return a sentence if megatron-core is not installed as it is needed; imports nothing."""
    found = {name: _version(name) for name in ("megatron-core", "einops")}
    missing = [name for name, version in found.items() if version is None]
    remedy = "pip install 'anneal[megatron]'"
    if missing:
        return [f"backend=megatron: {missing[0]} is not installed; {remedy}."]
    core = found["megatron-core"] or ""
    if not core.startswith(f"{VERSION}."):
        return [f"backend=megatron: megatron-core {core} is installed, and the engine knows {VERSION} alone; {remedy}."]
    return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_fields(path: str, fields: Mapping[str, Any]) -> list[str]:
    """Return a sentence if Megatron cannot build the model.

    Args:
        path: ``model.path``.
        fields: Of its config.json, ``model.config_overrides`` over them.
    """
    family, act = fields.get("model_type"), fields.get("hidden_act", "silu")
    if family not in FAMILIES:
        return [
            f"model.path={path}: backend=megatron has no models of type {family}; choose one of {', '.join(FAMILIES)}, or "
            "backend=torch."
        ]
    if act != "silu":
        return [f"model.path={path}: hidden_act is {act}, and backend=megatron has silu alone; choose backend=torch."]
    return []
