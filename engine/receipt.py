"""lock.json: what a run consumed, so that a later one can tell whether it is the same."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from engine import hub
from engine.config.schema import ModelSection, RunConfig
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
)
BLOCK = 1 << 20


def receipt(config: RunConfig, data: Data, ranks: Ranks) -> dict[str, Any]:
    """Return the fingerprints of data, weights, code, versions and hardware.

    Args:
        config: The recipe.
        data: The tokenised data; a fingerprint covers tokens, and which of them are trained.
        ranks: Their number and kind of device.
    """
    return {
        "data": data.fingerprints,
        "weights": weights_fingerprint(config),
        "code": _code(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {
            "machine": platform.machine(),
            "device": _device(ranks.device.type),
            "cores": os.cpu_count(),
            "ranks": ranks.size,
        },
        "samples": {name: {**vars(s.summary), "revision": s.revision} for name, s in data.sources.items()},
    }


def weights_fingerprint(config: RunConfig) -> str:
    """Return a cheap hash of the initial weights: config.json, and each file's size, header and sampled blocks.

    Fresh weights are a function of the configuration and ``run.seed``.
    """
    return model_fingerprint(config.model, config.run.seed)


def model_fingerprint(model: ModelSection, seed: int) -> str:
    """Return the hash of a model's section of a recipe, and its seed; see ``weights_fingerprint``."""
    folder = hub.folder(model.path, model.revision, weights=model.init == "pretrained")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if model.init == "random":
        digest.update(f"random {seed} {sorted(model.config_overrides.items())}".encode())
        return digest.hexdigest()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in sorted({0, *(size * i // 16 for i in range(16)), max(0, size - BLOCK)}):
                stream.seek(start)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def _device(name: str) -> str:
    if name == "cpu":
        return name
    import torch

    return torch.cuda.get_device_name()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _code() -> dict[str, Any]:
    """Return the commit the code is at, and a hash of its files."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for folder in (root, root.parent / "kernels"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(root.parent).as_posix().encode() + file.read_bytes())
    commit = None
    if (root.parent / ".git").exists():
        command = ["git", "-C", str(root.parent), "rev-parse", "HEAD"]
        with suppress(FileNotFoundError):  # a checkout without git: the hash of the files must do
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {"commit": commit, "sha256": digest.hexdigest()}
