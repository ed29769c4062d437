"""lock.json: what a run consumed, so that a later one can tell whether it is the same."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from typing import Any

from engine import fingerprint, hub
from engine.config.schema import RunConfig
from engine.data.assemble import Data
from engine.ranks import Ranks

PACKAGES = (
    "anneal",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "pyarrow",
    "safetensors",
    "hydra-core",
    "peft",
    "triton",
    "liger-kernel",
    "megatron-core",
)


def receipt(config: RunConfig, data: Data, ranks: Ranks, reference: RunConfig | None = None) -> dict[str, Any]:
    """Return the fingerprints of data, weights, code, versions and hardware.

    Args:
        config: The recipe.
        data: The tokenised data; a fingerprint covers tokens, and which of them are trained.
        ranks: Their number and kind of device.
        reference: Recipe of a reference of its own (``algorithm.reference`` is a folder or hub id); None: there is none.
    """
    return {
        "data": data.fingerprints,
        "weights": fingerprint.weights(config.model, config.run.seed),
        **({} if reference is None else {"reference": _reference(reference)}),
        "code": _code(),
        "versions": {"python": platform.python_version(), **fingerprint.versions(PACKAGES)},
        "hardware": {
            "machine": platform.machine(),
            "device": _device(ranks.device.type),
            "cores": os.cpu_count(),
            "ranks": ranks.size,
        },
        "samples": {name: {**vars(s.summary), "revision": s.revision} for name, s in data.sources.items()},
    }


def _reference(config: RunConfig) -> dict[str, str | None]:
    """Return the fingerprint of a reference's weights, and the commit that the hub has given."""
    model = config.model
    return {
        "weights": fingerprint.weights(config.model, config.run.seed),
        "revision": hub.commit(model.path, model.revision),
    }


def _device(name: str) -> str:
    if name == "cpu":
        return name
    import torch

    return torch.cuda.get_device_name()


def _code() -> dict[str, Any]:
    """Return the commit the code is at, and a hash of its files."""
    root, commit = fingerprint.ROOT, None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        with suppress(FileNotFoundError):  # a checkout without git: the hash of the files must do
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {"commit": commit, "sha256": fingerprint.code((root / "engine", root / "kernels"))}
