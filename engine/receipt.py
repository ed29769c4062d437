"""lock.json: what a run consumed, so that a later one can tell whether it is the same."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from engine import fingerprint, hub
from engine.config.schema import RunConfig

if TYPE_CHECKING:
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
HASH = 12
"""Characters of a hash that are shown."""


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
        **software(),
        "hardware": {
            "machine": platform.machine(),
            "device": _device(ranks.device.type),
            "cores": os.cpu_count(),
            "ranks": ranks.size,
        },
        "samples": {name: {**vars(s.summary), "revision": s.revision} for name, s in data.sources.items()},
    }


def software() -> dict[str, Any]:
    """Return the part of a receipt that needs no run: code and versions."""
    return {"code": _code(), "versions": {"python": platform.python_version(), **fingerprint.versions(PACKAGES)}}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, before, after) for recipe (of a repository), data, weights, code and versions that differ.

    A part that one of them does not have at all is not compared; in one that both have, "none" is what one lacks.
    """
    found = []
    for part, what in (
        ("recipe", ""),
        ("data", "data "),
        ("weights", ""),
        ("reference", ""),
        ("code", ""),
        ("versions", ""),
    ):
        if part not in before or part not in after:
            continue
        old, new = (_entries(part, receipt[part]) for receipt in (before, after))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        found += [(what + name, _shown(part, before, old, name), _shown(part, after, new, name)) for name in names]
    return found


def no_longer(frozen: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return what to say of a frozen recipe's lock and a receipt of now; None: it is not frozen."""
    if "code" not in frozen:
        return None
    found = [f"{what} {old} → {new}" for what, old, new in differences(frozen, now)]
    parts = [part for part in ("data", "weights", "code", "versions") if part in frozen and part in now]
    if found:
        return f"no longer as the recipe was frozen: {'; '.join(found)}"
    return f"as the recipe was frozen: {', '.join(parts[:-1])} and {parts[-1]}"


def _entries(part: str, value: Any) -> dict[str, Any]:
    """Return what is compared of a part of a receipt, by name."""
    if part == "code":
        return {"code": value["sha256"]}
    return value if part in ("data", "versions") else {part: value}


def _shown(part: str, receipt: dict[str, Any], entries: dict[str, Any], name: str) -> str:
    """Return an entry of a receipt as a person reads it: versions whole, hashes cut, code by its commit too."""
    value = entries.get(name)
    if isinstance(value, dict):
        value = value.get("weights")
    if value is None or part in ("recipe", "versions"):
        return str(value or "none")
    commit = receipt["code"].get("commit") if part == "code" else None
    return f"{value[:HASH]} (commit {commit[:HASH]})" if commit else str(value)[:HASH]


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
