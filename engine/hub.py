"""Model and tokenizer folders: built-in, local, or a snapshot of a hub repository."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engine.config import sources
from engine.config.checks import local_fields, local_model_folder
from engine.config.model_folder import read_config
from engine.config.schema import ModelSection, RunConfig
from engine.errors import UserError

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
]
"""What a tokenizer may be read from; config.json, which names its class, apart."""
CONFIG_FILES = ["config.json", "generation_config.json", "*.py", *TOKENIZER_FILES]


def folder(path: str, revision: str | None, *, weights: bool) -> Path:
    """Return a local folder for a model path, downloading what is missing of a hub repository.

    Args:
        path: Folder, hub id or ``builtin:NAME``.
        revision: Branch, tag or commit of a hub id.
        weights: Whether ``*.safetensors`` are needed too.

    Raises:
        UserError: If the hub does not have it, or cannot be reached and has left nothing in the cache.
    """
    local = local_model_folder(path)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = CONFIG_FILES + (["*.safetensors", "*.safetensors.index.json"] if weights else [])
    try:
        found = snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"])
        return Path(found)
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision={revision}: {path} has no such revision.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{path}: no such repository on the hub, or it is gated; log in with `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise UserError(f"{path}: neither a folder here nor a hub id (owner/name).") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{path}: neither a folder here nor in the hub's cache, and the hub does not answer; check the name or the network."
        ) from error


def refusals(config: RunConfig) -> list[str]:
    """Return a sentence for everything that a run would take from the hub, that is not here, and that the hub will not give."""
    named = (config.model.path, config.model.tokenizer, config.algorithm.reference)
    taken = [(path, "model") for path in named if path not in (None, "initial", "none")]
    taken += [(source.path, "dataset") for split in sources.LISTS for source in sources.of(config.data, split)]
    return [sentence for path, kind in dict.fromkeys(taken) if (sentence := _refused(path, kind)) is not None]


def _refused(path: str, kind: str) -> str | None:
    """Return why the hub will not give a repository that is not on this machine yet; None: it is, or will be given.

    Args:
        path: Folder, file, hub id or ``builtin:NAME``.
        kind: model or dataset.
    """
    if local_model_folder(path) is not None:
        return None
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{path.replace('/', '--')}" / "snapshots"
    if cached.is_dir():
        return None
    try:
        HfApi().auth_check(path, repo_type=kind)
    except GatedRepoError:
        return f"{path}: gated, and this account may not read it; ask for access on its page, and log in with `hf auth login`."
    except RepositoryNotFoundError:
        return f"{path}: the hub has no such {kind}, or it is private; check the name, or log in with `hf auth login`."
    except (HTTPError, OSError):  # a name that is not found, say, is no error of the hub's own
        return (
            f"{path}: not in the hub's cache, and the hub does not answer; check the network, or where HF_HOME points."
        )
    return None


def commit(path: str, revision: str | None) -> str | None:
    """Return the commit of a hub repository that a path and revision stand for now; None for a folder."""
    if local_model_folder(path) is not None:
        return None
    return folder(path, revision, weights=False).name  # a snapshot's folder is named by it


def attention_length(section: ModelSection) -> float:
    """Return at how many tokens a document's attention costs as much as all the rest of the decoder layers.

    A layer has about 12 H² parameters, so 24 H² operations a token forward; causal attention takes 2 L H a token of a document
    of L tokens (two products over L/2 keys on average). They are equal at L = 12 H.
    """
    hidden = fields(section).get("hidden_size")
    return 12.0 * hidden if isinstance(hidden, int) else math.inf


def fields(section: ModelSection) -> dict[str, Any]:
    """Return the fields of the model's config.json, ``model.config_overrides`` over them; downloads what is missing."""
    file = folder(section.path, section.revision, weights=False) / "config.json"
    return {**json.loads(file.read_text()), **section.config_overrides}


def known_fields(section: ModelSection) -> dict[str, Any] | None:
    """Return the same as far as it is on this machine, in a folder or in the hub's cache; None if it is not."""
    if local_model_folder(section.path) is not None:
        return local_fields(section)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(section.path, "config.json", revision=section.revision)
    except HFValidationError:  # no hub id: ``folder`` says so
        return None
    found = read_config(Path(file).parent) if isinstance(file, str) else None
    return None if found is None else {**found, **section.config_overrides}


def known_tokenizer_folder(section: ModelSection) -> Path | None:
    """Return the folder of the recipe's tokenizer as far as it is on this machine; None if it is not."""
    path, revision = (section.path, section.revision) if section.tokenizer is None else (section.tokenizer, None)
    local = local_model_folder(path)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=CONFIG_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def tokenizer_folder(section: ModelSection) -> Path:
    """Return the folder of the recipe's tokenizer: its own, or the model's at the model's revision."""
    if section.tokenizer is not None:
        return folder(section.tokenizer, None, weights=False)
    return folder(section.path, section.revision, weights=False)


def load_tokenizer(section: ModelSection) -> Any:
    """Load the recipe's tokenizer.

    Raises:
        UserError: If there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    where = tokenizer_folder(section)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: the tokenizer cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
