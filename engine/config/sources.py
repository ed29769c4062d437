"""The sources of a recipe: one, by data.train_path and data.val_path, or a list of them."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from engine.config.names import stop
from engine.config.schema import DataSection, SourceSection

LISTS = {"train": ("train_path", "train_split"), "validation": ("val_path", "val_split")}
"""Keys of data that are lists of sources, and those that give a single one instead."""
SHARED = {
    name
    for name in SourceSection.model_fields
    if name in DataSection.model_fields and name not in ("train", "validation")
}
"""Keys that a source has under the name they have in data."""


def of(data: DataSection, split: str) -> list[SourceSection]:
    """Return the sources of ``train`` or ``validation``; none where there is no validation data."""
    listed: list[SourceSection] = getattr(data, split)
    path, hub_split = (getattr(data, key) for key in LISTS[split])
    if listed or path is None:
        return listed
    own = {key: getattr(data, key) for key in SHARED}
    return [SourceSection(name=split, path=path, split=hub_split, **own)]


def expand(data: dict[str, Any], choices: dict[str, Path], typed: set[str]) -> list[str]:
    """Fill in what the sources of a composed recipe leave to the choice of the data group that they name, and their names.

    Args:
        data: The recipe's data, changed in place.
        choices: Files of the data group's choices, by name.
        typed: Keys and groups on the command line.

    Returns:
        A sentence for every problem.
    """
    problems = []
    single = [split for split, (path, _) in LISTS.items() if not data.get(split) and data.get(path) is not None]
    if any(data.get(split) for split in LISTS) and not single:
        problems += [
            f"data.{key} is for a single source: give it to each source of the list."
            for key in sorted(SHARED | {key for _, key in LISTS.values()})
            if f"data.{key}" in typed
        ]
    for split, (path_key, split_key) in LISTS.items():
        listed = data.get(split)
        if not isinstance(listed, list) or not listed:
            continue
        if f"data.{path_key}" in typed:
            problems.append(
                f"data.{path_key} and the list data.{split} are both given: set data.{split}=[], or leave it out."
            )
        if "data" in typed and f"data.{split}" not in typed:
            problems.append(
                f"data is chosen, and the list data.{split} is given: set data.{split}=[], or leave the choice out."
            )
        data[path_key] = None  # the data group's default
        for i, entry in enumerate(listed):
            if not isinstance(entry, dict):
                continue
            chosen = entry.get("source")
            if chosen is not None:
                defaults = _choice(str(chosen), choices)
                if isinstance(defaults, str):
                    problems.append(f"data.{split}[{i}].source={chosen}: {defaults}")
                    continue
                found = {"path": defaults.get(path_key), "split": defaults.get(split_key)}
                found |= {key: defaults[key] for key in SHARED & set(defaults)}
                listed[i] = entry = {**{k: v for k, v in found.items() if v is not None}, **entry}
            path = entry.get("path")
            if entry.get("name") is None and (chosen or isinstance(path, str)):
                entry["name"] = str(chosen or _stem(str(path)))
        names = [entry.get("name") for entry in listed if isinstance(entry, dict)]
        problems += [
            f"data.{split}: two sources are named {name}; give them names of their own."
            for name in dict.fromkeys(n for n in names if n is not None and names.count(n) > 1)
        ]
    return [stop(p) for p in problems]


def check(data: DataSection) -> list[str]:
    """Return a sentence for every problem between the sources of a recipe."""
    problems = []
    if not of(data, "train"):
        problems.append("data.train_path is not set: give the training data, such as data.train_path=FILE.jsonl.")
    weighted = [source.weight is not None for source in data.train]
    if any(weighted) and not all(weighted):
        first = data.train[weighted.index(False)].name
        problems.append(f"data.train: some sources have a weight and {first} has none; give all a weight, or none.")
    if any(source.weight is not None for source in data.validation):
        problems.append("data.validation: a weight means nothing there, as all of a source is seen; leave it out.")
    if data.val_fraction and of(data, "validation"):
        problems.append(
            f"data.val_fraction={data.val_fraction} and validation data are both given: set val_fraction to 0, or take the "
            "validation data out."
        )
    return problems


def template(data: DataSection) -> str | None:
    """Return the chat template that all sources to train on have in place of the model's; "model" where they have it or differ."""
    named = {source.chat_template for source in of(data, "train")}
    return named.pop() if len(named) == 1 else "model"


def validation_sets(data: DataSection) -> list[str]:
    """Return the names of the validation sets, where there are several."""
    names = [source.name for source in of(data, "train" if data.val_fraction else "validation")]
    return names if len(names) > 1 else []


def _choice(name: str, choices: dict[str, Path]) -> dict[str, Any] | str:
    """Return the keys of a choice of the data group, or what is wrong with it."""
    file = choices.get(name)
    if file is None:
        near = difflib.get_close_matches(name, choices, 1)
        return "no such choice of data; " + (f"did you mean {near[0]}?" if near else f"there is {', '.join(choices)}.")
    keys: dict[str, Any] = yaml.safe_load(file.read_text()) or {}
    own = keys.get("data", keys)
    return own if isinstance(own, dict) else keys


def _stem(path: str) -> str:
    """Return a name for a path."""
    name = path.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    name = re.sub(r"(\.(jsonl?|ndjson|csv|tsv|parquet|arrow|gz))+$", "", name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-") or "source"
