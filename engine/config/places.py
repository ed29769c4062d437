"""Where recipes and the choices of groups come from: this project, folders that a team shares, files, git repositories."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from engine.config import repository
from engine.config.names import stop
from engine.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PATH = "ANNEAL_RECIPE_PATH"
RECIPE_LOCK = "lock"
"""Key of a recipe that is no part of the run: the commit it comes from, or the whole lock of the run that it was frozen from."""


def resource(name: str) -> Path:
    """Return the folder ``conf`` or ``recipes``: inside the package in a wheel, beside it in a checkout."""
    inside = ROOT / name
    return inside if inside.is_dir() else ROOT.parent / name


@dataclass(frozen=True)
class Library:
    """The recipes and choices that there are."""

    choices: dict[str, dict[str, Path]]
    """Their files, by group and name; recipes are the group ``recipe``."""
    folders: list[Path]
    """The shared folders among their places."""

    def names(self) -> dict[str, list[str]]:
        """Return the names of every group's choices."""
        return {group: sorted(files) for group, files in self.choices.items()}

    def beside(self, folder: Path) -> Library:
        """Return the library with the groups that lie beside a recipe of a file or repository; its own files are no clash."""
        choices = {group: dict(files) for group, files in self.choices.items()}
        _add(choices, folder, (group for group in choices if group != "recipe"))
        shared = folder.resolve()
        known = shared in self.folders or not any((shared / group).is_dir() for group in choices)
        return Library(choices, self.folders if known else [*self.folders, shared])


@dataclass(frozen=True)
class Chosen:
    """The recipe that ``recipe=`` names."""

    name: str
    """By which it goes in the group ``recipe``."""
    file: Path
    """Its file."""
    lock: dict[str, Any]
    """What it says of a run that it was frozen from, and ``recipe``: its place at a commit, where that is a repository."""
    library: Library
    """The library, with the recipes that it builds on and the groups beside it."""


def library(searched: Iterable[str] = ()) -> Library:
    """Return all recipes and choices: ours, then those in the folders of ``$ANNEAL_RECIPE_PATH``, then of ``hydra.searchpath``.

    Raises:
        UserError: If one of them is no folder, or if two places define a name.
    """
    conf = resource("conf")
    choices = {d.name: _files(d) for d in sorted(conf.iterdir()) if d.is_dir()}
    choices["recipe"] = _files(resource("recipes"))
    named = [(PATH, word) for word in os.environ.get(PATH, "").split(":") if word]
    folders: list[Path] = []
    for key, word in [*named, *(("hydra.searchpath", word) for word in searched)]:
        folder = _folder(word)
        if folder is None:
            raise UserError(f"{key}: {word} is not a folder; correct or unset it.")
        if folder not in (*folders, resource("recipes").resolve()):
            _add(choices, folder, list(choices))
            folders.append(folder)
    return Library(choices, folders)


def choose(recipe: str, known: Library) -> Chosen:
    """Find the recipe of a name, a file path or a git URL.

    Raises:
        UserError: If there is none, or if a name that it builds on is defined in two places.
    """
    files, origin, file = known.choices["recipe"], None, known.choices["recipe"].get(recipe)
    if file is not None:
        return Chosen(recipe, file, _lock(file), known)
    if recipe.startswith(repository.PREFIX):
        file, origin = repository.fetch(recipe)
    elif recipe.endswith((".yaml", ".yml")):
        file = Path(recipe).expanduser().absolute()
        if not file.is_file():
            raise UserError(f"recipe={recipe}: no such file.")
    else:
        raise UserError(stop(f"recipe={recipe}: no such recipe and no .yaml file; {near(recipe, files)}"))
    name, found = "chosen_by_path", known.beside(file.parent)
    found.choices["recipe"].update(_bases(file, found.choices["recipe"]))
    found.choices["recipe"][name] = file
    return Chosen(name, file, {**_lock(file), **({} if origin is None else {"recipe": origin})}, found)


def read(file: Path) -> dict[str, Any]:
    """Return what is in the file of a recipe or choice.

    Raises:
        UserError: If that is no mapping in YAML.
    """
    try:
        node = OmegaConf.load(file)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{file}: a recipe is a mapping of keys to values.")
    found = OmegaConf.to_container(node, resolve=False)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def chain(file: Path, files: dict[str, Path]) -> list[Path]:
    """Return the file of a recipe or choice, and those that it builds on, the nearest first.

    Args:
        file: Of the recipe or choice.
        files: Of its group, by name.
    """
    found, waiting = [file], [file]
    while waiting:
        named = [files[name] for name in _bases_of(read(waiting.pop(0))) if name in files]
        new = [base for base in reversed(named) if base not in found]
        found += new
        waiting += new
    return found


def overridden(node: dict[str, Any]) -> dict[str, str]:
    """Return the choice of each group that the defaults list of a recipe makes."""
    pairs = [pair for item in _defaults(node) if isinstance(item, dict) for pair in item.items()]
    return {str(key).removeprefix("override").strip().lstrip("/"): str(choice) for key, choice in pairs}


def _bases_of(node: dict[str, Any]) -> list[str]:
    """Return the names in the defaults list of a recipe or choice that are of its own group."""
    words = [word.removeprefix("/recipe/") for word in _defaults(node) if isinstance(word, str)]
    return [word for word in words if word != "_self_" and "/" not in word]


def _defaults(node: dict[str, Any]) -> list[Any]:
    listed = node.get("defaults")
    return listed if isinstance(listed, list) else []


def near(word: str, choices: Iterable[str]) -> str:
    """Return the end of a sentence about a name that is none: the one that was meant, or all there are."""
    names = list(choices)
    found = difflib.get_close_matches(word, names, 1)
    return f"did you mean {found[0]}?" if found else f"choose one of {', '.join(names)}"


def search_word(folders: Sequence[Path]) -> list[str]:
    """Return Hydra's own override for the shared folders; none where there are none."""
    quoted = [re.sub(r"(['\\])", r"\\\1", str(folder)) for folder in folders]
    return ["hydra.searchpath=[" + ",".join(f"'file://{folder}'" for folder in quoted) + "]"] if folders else []


def _files(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _folder(word: str) -> Path | None:
    """Return the folder of a word of a search path: a path, ``file://PATH`` or ``pkg://PACKAGE``."""
    folder = Path(word.removeprefix("file://")).expanduser()
    if word.startswith("pkg://"):
        package, _, rest = word.removeprefix("pkg://").replace("/", ".").partition(".")
        spec = importlib.util.find_spec(package) if package else None
        where = list(spec.submodule_search_locations or []) if spec is not None else []
        folder = Path(where[0], *rest.split(".")) if where else folder
    return folder.resolve() if folder.is_dir() else None


def _add(choices: dict[str, dict[str, Path]], folder: Path, groups: Iterable[str]) -> None:
    """Add the choices of a shared folder: recipes lie in it, the choices of a group in a folder of the group's name."""
    for group in groups:
        for name, file in _files(folder if group == "recipe" else folder / group).items():
            choices[group][name] = _only(group, name, file, choices[group].get(name))


def _only(group: str, name: str, file: Path, before: Path | None) -> Path:
    """Return the file of a name, unless another place defines it too."""
    if before is not None and before.resolve() != file.resolve():
        raise UserError(f"{group}={name} is defined in {before} and in {file}; rename one of them.")
    return file


def _bases(file: Path, files: dict[str, Path]) -> dict[str, Path]:
    """Return those of the recipes that a file builds on which lie beside it."""
    here = {name: other for name, other in _files(file.parent).items() if other != file}
    used = set(chain(file, {**files, **here})[1:])
    found = {name: other for name, other in here.items() if other in used and not _same(other, files.get(name))}
    return {name: _only("recipe", name, other, files.get(name)) for name, other in found.items()}


def _same(file: Path, other: Path | None) -> bool:
    """Tell whether two recipes say the same, as in a copy of this project."""
    return other is not None and file.read_bytes() == other.read_bytes()


def _lock(file: Path) -> dict[str, Any]:
    lock = read(file).get(RECIPE_LOCK) or {}
    if not isinstance(lock, dict):
        raise UserError(f"{file}: {RECIPE_LOCK} is what python -m engine.recipes freeze writes; take it out.")
    return lock
