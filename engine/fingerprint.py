"""Fingerprints of what a figure may depend on beside the recipe: weights, code, versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from engine import hub
from engine.config.schema import ModelSection

ROOT = Path(__file__).resolve().parent.parent
"""Where the packages are."""
WHOLE = 64 << 20
"""Largest file that is read whole, in bytes."""
BLOCK, BLOCKS = 64 << 10, 64
"""What is read of a larger one, spread from its first byte to its last."""
MOST_HEADER = 100 << 20
"""The largest header that safetensors reads, in bytes."""


def weights(model: ModelSection, seed: int) -> str:
    """Return a cheap hash of the initial weights: config.json, small files, of larger ones size, header and sampled blocks.

    Times of files do not count. Fresh weights are a function of the configuration and of ``seed``, which is ``run.seed``.
    """
    folder = hub.folder(model.path, model.revision, weights=model.init == "pretrained")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if model.init == "random":
        digest.update(f"random {seed} {sorted(model.config_overrides.items())}".encode())
        return digest.hexdigest()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start, length in _blocks(stream, size):
                stream.seek(start)
                digest.update(stream.read(length))
    return digest.hexdigest()


def _blocks(stream: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Return (start, length) of what is read of a safetensors file."""
    if size <= WHOLE:
        return [(0, size)]
    header = min(int.from_bytes(stream.read(8), "little"), MOST_HEADER)
    return [(0, 8 + header), *(((size - BLOCK) * i // (BLOCKS - 1), BLOCK) for i in range(BLOCKS))]


def code(folders: Iterable[Path]) -> str:
    """Return a hash of the Python files in some folders of this code."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
