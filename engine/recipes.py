"""``python -m engine.recipes list|show|diff|check|freeze``: recipes found, resolved, compared, tried and handed on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine import receipt
from engine.config import compose, layout, places, repository
from engine.config.places import RECIPE_LOCK, Library
from engine.config.schema import RunConfig
from engine.errors import EXIT_DONE, EXIT_ERROR, EXIT_USER_ERROR, Parser, UserError, command, run_command

HELP = """\
Usage: python -m engine.recipes list                          recipes and shared groups, and where they come from
       python -m engine.recipes show RECIPE [key=value …]     what it resolves to, and where each value comes from
       python -m engine.recipes diff A B                      what differs: values, data, weights, code, versions
       python -m engine.recipes check [--locked] [RECIPE …]   whether it composes and has a layout, a line each; all of them
                                                              if none is named
       python -m engine.recipes freeze RECIPE --out FILE      one file for another team: every value, and the lock

A RECIPE is a name, a file, git+URL@REVISION#PATH or the folder of a run.
"""
HEAD = """\
# @package _global_
# Frozen: python -m engine recipe=THIS_FILE repeats it, and says what is no longer as it was.
"""
MARK_COLUMN = 64


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    values: dict[str, Any]
    """Of every key, dotted."""
    lock: dict[str, Any]
    """Of the run, or frozen with the recipe; empty if there is none."""


def show_all(options: argparse.Namespace) -> int:
    """Print every recipe, and every choice of a group that is not ours, by folder with the first sentence of its comment."""
    known = places.library()
    ours = places.resource("conf")
    found: dict[Path, list[tuple[str, Path]]] = {}
    for group, files in known.choices.items():
        for name, file in sorted(files.items()):
            shown = name if group == "recipe" else f"{group}={name}"
            if not file.is_relative_to(ours):
                folder = file.parent if group == "recipe" else file.parent.parent
                found.setdefault(folder, []).append((shown, file))
    for folder, entries in sorted(found.items(), key=lambda item: item[0] != places.resource("recipes")):
        width = max(len(name) for name, _ in entries)
        print(folder)
        for name, file in sorted(entries, key=lambda entry: "=" in entry[0]):
            print(f"  {name:<{width}}  {first_sentence(file)}".rstrip())
    return EXIT_DONE


def show(options: argparse.Namespace) -> int:
    """Print the resolved recipe; a value from elsewhere than the defaults has a comment that says where it comes from."""
    words = [_word(options.recipe), *options.overrides]
    values = yaml.safe_load(compose.compose(words).recipe)
    lock = values.pop(RECIPE_LOCK, {})
    print("\n".join(_annotated(values, _layers(words))))
    if "recipe" in lock:
        print(f"# from {lock['recipe']}")
    return EXIT_DONE


def diff(options: argparse.Namespace) -> int:
    """Print what differs between two recipes or runs."""
    one, other = (_side(name) for name in (options.a, options.b))
    keys = [key for key in {**one.values, **other.values} if one.values.get(key) != other.values.get(key)]
    for key in keys:
        print(f"{key}: {_value(one.values.get(key))} → {_value(other.values.get(key))}")
    found = receipt.differences(one.lock, other.lock)
    for what, before, after in found:
        print(f"{what}: {before} → {after}")
    bare = [name for name, side in ((options.a, one), (options.b, other)) if "code" not in side.lock]
    if bare:
        print(f"data, weights, code and versions are not compared: {' and '.join(bare)} came without a lock")
    elif not keys and not found:
        print("no difference in values, data, weights, code and versions")
    return EXIT_DONE


def check(options: argparse.Namespace) -> int:
    """Compose each recipe and look for its layout; with --locked, hold code and versions against its lock."""
    names = options.recipes or sorted(places.library().choices["recipe"])
    worst, now = EXIT_DONE, receipt.software()
    for name in names:
        try:
            said, lock = _checked(name)
        except UserError as error:
            worst = EXIT_USER_ERROR
            print("\n".join(f"no  {name}: {problem}" for problem in error.problems))
            continue
        stale = receipt.no_longer(lock, now) if receipt.differences(lock, now) else None
        print(f"{'no' if stale and options.locked else 'ok'}  {name}: {said}" + (f"; {stale}" if stale else ""))
        if options.locked and (stale or "code" not in lock):
            worst = worst or EXIT_ERROR
            if not stale:
                print(f"no  {name}: came without a lock; python -m engine.recipes freeze writes one.")
    return worst


def freeze(options: argparse.Namespace) -> int:
    """Write a recipe, resolved, and its lock to one file.

    The lock of a run has data, weights, code and versions; of a recipe that has not run, code and versions are known.
    """
    out = Path(options.out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it, or choose another file.")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: must end in .yaml, as recipe=FILE needs it.")
    run = _run(options.recipe)
    text = (run / "recipe.yaml").read_text() if run is not None else compose.compose([_word(options.recipe)]).recipe
    recipe = yaml.safe_load(text)
    origin = {key: value for key, value in recipe.pop(RECIPE_LOCK, {}).items() if key == "recipe"}
    lock = {**origin, **(receipt.software() if run is None else _lock_of(run))}
    _pin(recipe["data"], lock.pop("samples", {}))
    try:
        out.write_text(HEAD + yaml.safe_dump({**recipe, RECIPE_LOCK: lock}, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another file.") from error
    print(f"{out}: python -m engine recipe={out}")
    return EXIT_DONE


def first_sentence(file: Path) -> str:
    """Return the first sentence of the comment that a file begins with; empty if it has none."""
    lines = []
    for line in file.read_text(errors="replace").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.strip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".")


def _checked(name: str) -> tuple[str, dict[str, Any]]:
    """Return what to say of a recipe that is in order, and its lock.

    Raises:
        UserError: If it does not compose, if its ranks cannot be split so, or if it does not fit its devices.
    """
    composed = compose.compose([_word(name)])
    config = composed.config
    ranks = layout.named_ranks(config.cluster)
    if found := _problems(config):
        raise UserError(*found)
    said = "as many ranks as there are devices" if ranks is None else f"{ranks} rank{'s' * (ranks > 1)}"
    return f"{config.algorithm.name}, {config.model.path}, {said}", yaml.safe_load(composed.recipe).get(RECIPE_LOCK, {})


def _problems(config: RunConfig) -> list[str]:
    """Return why a recipe cannot run so, or would not fit the card."""
    from engine.plan import plan

    problem = plan(config).problem
    return [] if problem is None else [problem]


def _run(name: str) -> Path | None:
    """Return the folder of a run; None: it is a recipe.

    Raises:
        UserError: If it is a folder of anything else.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{name}: no recipe.yaml there, so not the folder of a run; give one, or a recipe's name or file."
        )
    return folder


def _word(name: str) -> str:
    """Return the override that chooses a recipe, or that of a run."""
    run = _run(name)
    quoted = str(name if run is None else run / "recipe.yaml").replace("\\", "\\\\").replace("'", "\\'")
    return f"recipe='{quoted}'"


def _lock_of(run: Path) -> dict[str, Any]:
    file = run / "lock.json"
    if not file.is_file():
        raise UserError(f"{run}: no lock.json there yet, which a run writes before its first step; start it first.")
    lock: dict[str, Any] = json.loads(file.read_text())
    return lock


def _side(name: str) -> Side:
    """Return a run as its folder has it, whether or not its recipe still composes, or a recipe as it composes now."""
    run = _run(name)
    recipe = yaml.safe_load(compose.compose([_word(name)]).recipe if run is None else (run / "recipe.yaml").read_text())
    frozen = recipe.pop(RECIPE_LOCK, {})
    return Side(dict(_flat(recipe)), frozen if run is None else _lock_of(run))


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return every key, dotted, and its value."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(value: Any) -> str:
    """Return a value as YAML in one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    )


def _pin(data: dict[str, Any], samples: dict[str, Any]) -> None:
    """Give the sources of a recipe the revisions that its run has read, where they have none of their own."""
    found = {name: source["revision"] for name, source in samples.items() if source.get("revision")}
    for source in [*data["train"], *data["validation"]]:
        source["revision"] = source.get("revision") or found.get(source["name"])
    single = {found[name] for name in ("train", "validation") if name in found}
    if not data["train"] and data["revision"] is None and len(single) == 1:
        data["revision"] = single.pop()


def _layers(words: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return what gives values to a recipe, the strongest first: the label, and the keys as nested mappings."""
    from omegaconf import OmegaConf

    parsed, known, chosen = compose.find(words)
    assert chosen is not None
    typed = {o.key_or_group: o.value() for o in parsed}
    groups = {g: str(choice) for g, choice in typed.items() if g in known.choices}
    values = OmegaConf.create({})
    for key in typed.keys() - groups.keys():
        OmegaConf.update(values, key, typed[key])
    own = places.chain(chosen.file, known.choices["recipe"])
    used: dict[str, str] = {}
    for file in reversed([*own, places.resource("conf") / "config.yaml"]):
        used |= places.overridden(places.read(file))
    del groups["recipe"]
    used.pop("recipe", None)
    used = {group: choice for group, choice in used.items() if group not in groups}
    algorithm = groups.get("algorithm") or used["algorithm"]
    plain: Any = OmegaConf.to_container(values)
    return [
        ("typed", plain),
        *_of_groups(groups, known, algorithm),
        *((_label(file), places.read(file)) for file in own),
        *_of_groups(used, known, algorithm),
        ("", places.read(places.resource("conf") / "config.yaml")),
    ]


def _of_groups(choices: dict[str, str], known: Library, algorithm: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the layers of some groups, the algorithm last, as any other is stronger."""
    found = []
    for group, choice in sorted(choices.items(), key=lambda item: item[0] == "algorithm"):
        file = known.choices.get(group, {}).get(choice.replace("${algorithm}", algorithm))
        for part in places.chain(file, known.choices[group]) if file is not None else ():
            node = places.read(part)
            found.append((_label(part), node if group == "algorithm" else {group: node}))
    return found


def _label(file: Path) -> str:
    """Return a file's path, short for one of ours or of a repository."""
    fetched = repository.cache_home() / "recipes"
    if file.is_relative_to(fetched):
        return "/".join(file.relative_to(fetched).parts[2:])
    for name in ("conf", "recipes"):
        if file.is_relative_to(places.resource(name)):
            return f"{name}/{file.relative_to(places.resource(name))}"
    return str(file)


def _annotated(
    values: dict[str, Any], layers: list[tuple[str, dict[str, Any]]], path: tuple[str, ...] = ()
) -> list[str]:
    """Return a recipe's lines, with the label of the layer that each value comes from."""
    lines = []
    for name, value in values.items():
        head = f"{'  ' * len(path)}{name}:"
        if isinstance(value, dict) and value:
            lines += [head, *_annotated(value, layers, (*path, name))]
            continue
        line, label = f"{head} {_value(value)}", _origin((*path, name), value, layers)
        lines.append(f"{line:<{MARK_COLUMN}}  # {label}" if label and value is not None else line)
    return lines


def _origin(path: tuple[str, ...], value: Any, layers: list[tuple[str, dict[str, Any]]]) -> str:
    """Return the label of the strongest layer that gives a key this value, or an interpolation."""
    for label, node in layers:
        found: Any = node
        for name in path:
            found = found.get(name, places) if isinstance(found, dict) else places
        if found is not places and (found == value or "${" in str(found)):
            return label
    return ""


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": show_all,
    "show": show,
    "diff": diff,
    "check": check,
    "freeze": freeze,
}


def _parser(name: str) -> Parser:
    parser = Parser(prog=f"python -m engine.recipes {name}", description=COMMANDS[name].__doc__, allow_abbrev=False)
    if name in ("show", "freeze"):
        parser.add_argument("recipe", metavar="RECIPE", help="name, file, git+URL@REVISION#PATH or folder of a run")
    if name == "show":
        parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for python -m engine")
    if name == "diff":
        for side in ("a", "b"):
            parser.add_argument(side, metavar=side.upper(), help="name, file, git+URL@REVISION#PATH or folder of a run")
    if name == "check":
        parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="all named ones if there is none")
        parser.add_argument(
            "--locked", action="store_true", help="code and versions must be those of the lock (else exit code 1)"
        )
    if name == "freeze":
        parser.add_argument("--out", required=True, metavar="FILE", help="file to write")
    return parser


@command
def main(words: list[str]) -> int:
    """Run the command line."""
    return run_command(words, HELP, COMMANDS, _parser)


if __name__ == "__main__":
    sys.exit(main())
