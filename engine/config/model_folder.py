"""What the files of a model folder say, before anything heavy is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the fields of a folder's config.json, or None if there is none that can be read."""
    return _read(folder / "config.json")


def not_a_model(folder: Path) -> str | None:
    """Return what a folder that a run has written is where a model's is wanted, and the remedy; None: no such folder."""
    if all(os.path.isfile(folder / name) for name in ("manifest.json", "state.json")):
        return f"a checkpoint, no model folder; python -m engine.export --checkpoint {folder} --out DIR makes one of it"
    if os.path.isfile(folder / "config.json"):
        return None
    if os.path.isfile(folder / "hf" / "config.json"):
        return f"a run folder; give that of its model, {folder / 'hf'}"
    beside = (folder, folder / "adapter", *((folder.parent / "adapter",) if folder.name == "hf" else ()))
    adapter = next((f for f in beside if os.path.isfile(f / "adapter_config.json")), None)
    if adapter is None:
        return None
    return (
        f"{adapter} holds LoRA adapters and no model; give the folder of the model with them merged, which "
        "model.lora.merge=true or python -m engine.export --checkpoint RUN_DIR --out DIR writes"
    )


def check_reference(
    path: str, folder: Path, *, max_length: int, vocab_size: int | None, tokenizer: Path | None
) -> list[str]:
    """Return a sentence for every reason why a model cannot be the reference of a policy.

    An id must mean the same to both. The reference's tokenizer tells; where it has none, the size of the vocabulary must do.

    Args:
        path: ``algorithm.reference``.
        folder: Where it is.
        max_length: ``data.max_length``.
        vocab_size: Of the policy; None: not known yet.
        tokenizer: Folder of the policy's tokenizer; None: not known yet.
    """
    where, fields = f"algorithm.reference={path}", read_config(folder)
    if fields is None:
        return [f"{where}: config.json is not readable as a JSON object."]
    problems = []
    longest = fields.get("max_position_embeddings")
    if isinstance(longest, int) and longest < max_length:
        problems.append(
            f"{where}: reads at most {longest} tokens, less than data.max_length={max_length}; set data.max_length={longest} or "
            "lower, or choose another reference."
        )
    ours, theirs = vocabulary(tokenizer), vocabulary(folder)
    size = fields.get("vocab_size")
    if ours is not None and theirs is not None:
        return problems + _compare(where, ours, theirs, size)
    if vocab_size is not None and isinstance(size, int) and size != vocab_size:
        problems.append(
            f"{where}: has a vocabulary of {size:,}, and the policy of {vocab_size:,}; choose one with the same tokenizer."
        )
    return problems


def vocabulary(folder: Path | None) -> dict[int, str] | None:
    """Return the tokens of a folder's tokenizer.json by their ids; None if there is none that can be read."""
    found = None if folder is None else _read(folder / "tokenizer.json")
    model = (found or {}).get("model")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    if found is None or not isinstance(tokens, (dict, list)):
        return None
    by_id = dict(enumerate(t[0] for t in tokens)) if isinstance(tokens, list) else {i: t for t, i in tokens.items()}
    return by_id | {added["id"]: added["content"] for added in found.get("added_tokens") or []}


def _compare(where: str, ours: dict[int, str], theirs: dict[int, str], size: Any) -> list[str]:
    """Look for ids of the policy's tokenizer that mean something else to the reference, or have no place in it."""
    odd = sorted(i for i, token in ours.items() if theirs.get(i) != token)
    if odd:
        i = odd[0]
        there = f"{theirs[i]!r} there" if i in theirs else "nothing there"
        return [
            f"{where}: has another tokenizer than the policy; {len(odd):,} of {len(ours):,} ids differ ({i} is {ours[i]!r}, and "
            f"{there}); choose a reference with the same tokenizer."
        ]
    if isinstance(size, int) and size <= max(ours, default=-1):
        return [
            f"{where}: has a vocabulary of {size:,}, and the tokenizer ids up to {max(ours):,}; choose another one."
        ]
    return []


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
