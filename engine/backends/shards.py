"""Sharded checkpoints: every rank writes its own rows as safetensors, any number of ranks reads them back.

torch.distributed.checkpoint does the planning, which writes a replicated tensor once; the place of each part stands in the
header of its file, so that nothing is pickled.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from engine.errors import RunError

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


def save(state: dict[str, Tensor], folder: Path, group: Any) -> list[Path]:
    """Write this rank's parts of a state, and return its files.

    Args:
        state: Tensors and DTensors by name; a plain tensor is taken to be the same on every rank that names it.
        folder: An existing folder, the same for all ranks.
        group: Process group for host tensors; None with one rank.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp_save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _cause(error) from error
    rank = 0 if group is None else dist.get_rank(group)
    return list(folder.glob(f"shard-{rank + 1:05d}-*"))


def load(state: dict[str, Tensor], folder: Path, group: Any) -> None:
    """Read this rank's parts into the tensors of a state.

    Raises:
        RunError: If a file is missing or not whole.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        dcp_load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    except (CheckpointException, OSError, SafetensorError, ValueError) as error:
        raise _unreadable(folder, _cause(error)) from error


def sizes(folder: Path) -> dict[str, torch.Size]:
    """Return the shape of every tensor in a checkpoint, by name.

    Raises:
        RunError: If a file is not whole.
    """
    return {name: entry.size for name, entry in _contents(folder).items()}


def read(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint whose names begin so, whole, without the prefix.

    Raises:
        RunError: If a file is missing or not whole.
    """
    found = {name: entry for name, entry in _contents(folder).items() if name.startswith(prefix)}
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    load(state, folder, None)
    return {name.removeprefix(prefix): x for name, x in state.items()}


def _contents(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def _cause(error: BaseException) -> BaseException:
    """Return the first failure of any rank."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _unreadable(folder: Path, error: BaseException) -> RunError:
    return RunError(
        f"{folder}: the checkpoint cannot be read ({' '.join(str(error).split())[:200]}); resume from another one."
    )
