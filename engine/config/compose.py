"""From the words on the command line to a checked recipe.

Hydra composes the YAML; the schema then looks at the whole and every problem is reported at once. Precedence, weakest first:
algorithm, other groups, recipe, groups chosen on the command line, keys set on the command line.
"""

from __future__ import annotations

import difflib
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from engine.config import checks, megatron, places, sources
from engine.config.names import stop, suggestion
from engine.config.places import RECIPE_LOCK, Chosen, Library, resource, search_word
from engine.config.schema import RunConfig, Section
from engine.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

QUICKSTART_DPO = "recipe=quickstart_dpo"
OWN_DATA = {"data.train_path", "data.train"}
"""Keys that name data of one's own: where no choice of data is made, nothing is then taken from the default one."""


@dataclass(frozen=True)
class Composed:
    """A checked recipe and its re-runnable text, in which ``${oc.env:…}`` is left unresolved."""

    config: RunConfig
    recipe: str


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema, groups included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        for item in get_args(field.annotation):
            if isinstance(item, type) and issubclass(item, Section):
                keys += known_keys(item, f"{prefix}{name}[].")
    return keys


def compose(overrides: list[str]) -> Composed:
    """Compose, validate and resolve one run.

    Args:
        overrides: Words of the command line: ``group=choice``, ``key=value``, ``recipe=NAME_OR_FILE_OR_URL``.

    Raises:
        UserError: With every problem that was found, a sentence each.
    """
    parsed, known, chosen = find(overrides)
    choices, values, problems = _split(parsed, known.names())
    misspelt = {p.split("=", 1)[0] for p in problems}
    own_data = bool(OWN_DATA & {o.key_or_group for o in values})
    cfg = compose_groups(
        {g: c for g, c in choices.items() if g not in misspelt}, own_data=own_data, known=known, chosen=chosen
    )
    for override in values:
        key = override.key_or_group
        try:
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)
        except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
            problems.append(f"{override.input_line}: cannot set {key} ({_first_line(error)}).")
    container, unresolved = _resolve(cfg)
    for reason in dict.fromkeys(unresolved.values()):  # what depends on a key fails for its reason
        problems.append(f"{', '.join(k for k, r in unresolved.items() if r == reason)}: cannot be resolved ({reason}).")
    checks.set_max_length(container)
    megatron.set_sequence_parallel(container)
    if isinstance(container.get("data"), dict):
        problems += sources.expand(
            container["data"], known.choices["data"], {o.key_or_group for o in values} | set(choices)
        )
    sections, found = _validate(container, choices, values)
    problems += [p for p in found if p.split(".", 1)[0] not in misspelt and p.split(" ", 1)[0] not in unresolved]
    problems += checks.check(sections)
    if problems:
        raise UserError(*problems)
    config = RunConfig(**sections)
    return Composed(config, _recipe_text(cfg, config, {} if chosen is None else chosen.lock))


def find(overrides: list[str]) -> tuple[list[Override], Library, Chosen | None]:
    """Parse the words of a command line and look where they say for recipes and groups.

    Returns:
        The words but for ``hydra.searchpath``, what there is to choose, and the recipe that is chosen.
    """
    parsed = parse(overrides)
    typed = {o.key_or_group: o.value() for o in parsed}
    searched = typed.get("hydra.searchpath", [])
    known = places.library(map(str, searched if isinstance(searched, list) else [searched]))
    recipe = typed.get("recipe")
    chosen = places.choose(recipe, known) if isinstance(recipe, str) else None
    rest = [o for o in parsed if o.key_or_group != "hydra.searchpath"]
    return rest, known if chosen is None else chosen.library, chosen


def parse(overrides: list[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar.

    Raises:
        UserError: If a word is no override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed, problems = [], []
    parser = OverridesParser.create()
    for word in overrides:
        try:
            parsed.append(parser.parse_override(_quoted(word)))
        except HydraException as error:
            hint = "write key=value" if "=" not in word else f"quote special characters: '{word.split('=')[0]}=\"…\"'"
            problems.append(f"{word}: not an override ({_first_line(error)}); {hint}.")
    if problems:
        raise UserError(*problems)
    return parsed


def _quoted(word: str) -> str:
    """Quote the addresses of recipes in git repositories, whose # Hydra's grammar does not have."""
    key, _, value = word.partition("=")
    if key != "recipe":
        return word
    return "recipe=" + ",".join(f"'{part}'" if part.startswith("git+") else part for part in value.split(","))


def quoted(value: str | Path) -> str:
    """Return a value as Hydra's grammar reads it, whatever is in it; plain paths stay as they are."""
    text = str(value)
    if re.fullmatch(r"/[A-Za-z0-9/_.-]*", text):
        return text
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + "\\'" * bool(found[2]), text) + "'"


def swept(overrides: list[str]) -> list[str]:
    """Return the overrides after what the recipe sweeps over, ``hydra.sweeper.params``, as far as they do not say it themselves."""
    parsed, known, chosen = find(overrides)
    typed = {o.key_or_group for o in parsed}
    params: dict[str, Any] = {}
    for file in () if chosen is None else places.chain(chosen.file, known.choices["recipe"]):
        node = OmegaConf.select(OmegaConf.create(places.read(file)), "hydra.sweeper.params")
        params = {**dict(node or {}), **params}
    return [*(f"{key}={value}" for key, value in params.items() if key not in typed), *overrides]


def with_quickstart(overrides: list[str]) -> list[str]:
    """Return the overrides with the quickstart recipe of the algorithm added where neither model, data nor recipe is chosen."""
    chosen = {o.split("=", 1)[0].lstrip("+") for o in overrides}
    named = {"model", "data", "recipe", "model.path", "data.train_path", "data.train"}
    if chosen & (named - {"recipe"}) or ("recipe" in chosen and QUICKSTART_DPO not in overrides):
        return overrides
    if not {"algorithm=dpo", QUICKSTART_DPO} & set(overrides):
        return [*overrides, "recipe=quickstart"]
    weights = quickstart_weights()
    start = [f"model.path={weights}", "model.init=pretrained"] if weights is not None else []
    # The recipe chooses the algorithm, and has values of its own.
    own = [word for word in overrides if word not in ("algorithm=dpo", QUICKSTART_DPO)]
    return [*own, QUICKSTART_DPO, *start]


def needs_quickstart(overrides: list[str]) -> bool:
    """Tell whether words that ``with_quickstart`` returned lack the weights that they are to start from."""
    return QUICKSTART_DPO in overrides and not any(word.split("=")[0] in ("model", "model.path") for word in overrides)


def quickstart_weights() -> Path | None:
    """Return the weights of the newest quickstart that has ended in the working folder."""
    found = [file.parent for file in Path("outputs").glob("quickstart-*/hf/config.json")]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def _split(parsed: list[Override], available: dict[str, list[str]]) -> tuple[dict[str, str], list[Override], list[str]]:
    """Separate group choices from values, given the names of every group's choices."""
    choices: dict[str, str] = {}
    values: list[Override] = []
    problems: list[str] = []
    for override in parsed:
        key = override.key_or_group
        if override.is_delete():
            problems.append(f"{override.input_line}: keys are not deleted; set {key}=null instead.")
        elif override.is_sweep_override():
            problems.append(
                f"{override.input_line}: several values need -m (python -m engine -m {override.input_line})."
            )
        elif key not in available:
            values.append(override)
        elif not isinstance(override.value(), str):
            problems.append(
                f"{override.input_line}: {key} is a group; {key}=NAME chooses one of {', '.join(available[key])}."
            )
        else:
            choice = str(override.value())
            if key != "recipe" and choice not in available[key]:
                problems.append(stop(f"{key}={choice}: no such choice; {places.near(choice, available[key])}"))
            choices[key] = choice
    return choices, values, problems


def compose_groups(
    choices: dict[str, str], *, own_data: bool = False, known: Library | None = None, chosen: Chosen | None = None
) -> DictConfig:
    """Compose the defaults list with the chosen groups; groups chosen by the user win over the recipe's own keys.

    Args:
        choices: Choice of each group.
        own_data: Whether the command line names data of its own.
        known: The recipes and choices that there are; None: those of ``places.library()``.
        chosen: The recipe that is chosen.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    OmegaConf.register_new_resolver("uid", lambda: uuid.uuid4().hex[:6], use_cache=True, replace=True)
    known, recipe = known or places.library(), choices.get("recipe")
    name = None if chosen is None else chosen.name
    store = ConfigStore.instance()
    for file in () if chosen is None else places.chain(chosen.file, known.choices["recipe"]):
        node = {key: value for key, value in places.read(file).items() if key != RECIPE_LOCK}
        stem = chosen.name if chosen is not None and file == chosen.file else file.stem
        store.store(group="recipe", name=stem, node=node, package="_global_")
    search = search_word(known.folders)
    words = search + [f"{g}={c}" for g, c in choices.items() if g != "recipe"] + ([f"recipe={name}"] if name else [])
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(resource("conf")), version_base="1.3", job_name="engine"):
            cfg = hydra_compose("config", overrides=words, return_hydra_config=True)
            if "data" not in choices and _leaves_default_data(cfg, own_data):
                cfg = hydra_compose("config", overrides=[*words, "~data"])
            OmegaConf.set_struct(cfg, False)
            cfg.pop("hydra", None)
        for group, choice in choices.items() if recipe is not None else ():
            if group != "recipe":
                _merge_group(cfg, group, known.choices[group][choice], search_word([resource("conf"), *known.folders]))
    except (HydraException, OmegaConfBaseException) as error:
        where = f"recipe={recipe}" if recipe else " ".join(words) or "conf"
        raise UserError(f"{where}: cannot be composed ({_first_line(error)}).") from error
    return cfg


def _leaves_default_data(cfg: DictConfig, own_data: bool) -> bool:
    """Tell whether a recipe, or the command line, has data of its own over the default choice of data."""
    from hydra import compose as hydra_compose

    choice = str(cfg.hydra.runtime.choices.data)
    if not choice.startswith("default_"):
        return False
    whole: tuple[Any, Any] = OmegaConf.to_container(cfg), OmegaConf.to_container(hydra_compose(f"data/{choice}"))
    here, default = (node["data"] for node in whole)
    if not isinstance(here, dict):  # it is refused later
        return False
    return own_data or bool(here.get("train")) or here.get("train_path") != default["train_path"]


def _merge_group(cfg: DictConfig, group: str, file: Path, search: list[str]) -> None:
    """Lay a group chosen on the command line over what the recipe set."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(file.parent.parent), version_base="1.3", job_name="engine"):
        own = hydra_compose(f"{group}/{file.stem}", overrides=search)
    OmegaConf.set_struct(cfg, False)
    if group == "cluster" and own.cluster.name != "slurm":  # what a recipe tells Slurm is not for another cluster
        defaults = OmegaConf.load(resource("conf") / "config.yaml").cluster
        OmegaConf.update(cfg, group, {key: defaults[key] for key in checks.SLURM_KEYS}, merge=True)
    OmegaConf.update(cfg, group, own[group], merge=True)


def _resolve(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Resolve every interpolation; returns the plain values, and the reason for each key that has none."""
    unresolved: dict[str, str] = {}

    def walk(node: Any, path: str) -> Any:
        if OmegaConf.is_dict(node):
            keys = list(node.keys())
        elif OmegaConf.is_list(node):
            keys = list(range(len(node)))
        else:
            return node
        out: dict[Any, Any] = {}
        for key in keys:
            dotted = f"{path}{key}"
            if OmegaConf.is_missing(node, key):
                continue
            try:
                out[key] = walk(node[key], f"{dotted}.")
            except OmegaConfBaseException as error:
                unresolved[dotted] = _first_line(error)
        return out if OmegaConf.is_dict(node) else list(out.values())

    return walk(cfg, ""), unresolved


def _validate(
    container: dict[str, Any], choices: dict[str, str], values: list[Override]
) -> tuple[dict[str, Any], list[str]]:
    """Hold the composed keys against the schema.

    Returns:
        The sections that are right, unknown keys left out, by name; and a sentence for every problem.
    """
    findings: list[tuple[list[str], Any]] = [
        ([name], {"type": "extra_forbidden", "input": None}) for name in container if name not in RunConfig.model_fields
    ]
    sections: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        schema: Any = field.annotation
        node = container.get(name, {})
        try:
            sections[name] = schema.model_validate(node)
        except ValidationError as error:
            found = error.errors(include_url=False)
            findings += [([name, *map(str, item["loc"])], item) for item in found]
            if all(item["type"] == "extra_forbidden" for item in found):
                for item in found:
                    _remove(node, item["loc"])
                sections[name] = schema.model_validate(node)
    typed = {o.key_or_group: o.input_line for o in values if o.input_line}
    return sections, list(dict.fromkeys(_problem(path, item, typed, choices.get("recipe")) for path, item in findings))


def _remove(node: Any, path: Sequence[str | int]) -> None:
    for part in path[:-1]:
        node = node[part]
    node.pop(path[-1])


def _problem(path: list[str], item: Any, typed: dict[str, str], recipe: str | None) -> str:
    """Return the sentence for one of pydantic's findings.

    Args:
        path: Of the key.
        item: The finding.
        typed: What the user typed, by key.
        recipe: The recipe that was chosen.
    """
    key = ".".join(path)
    if item["type"] == "missing":
        return _missing(key)
    said = next((w for k, w in typed.items() if key == k or key.startswith(k + ".") or k.startswith(key + ".")), None)
    where = said or (f"{key} (in recipe {recipe})" if recipe else key)
    if item["type"] == "extra_forbidden":
        unknown = next((k for k in typed if k.startswith(key + ".")), key)
        return stop(f"{where}: there is no key {unknown}; {suggestion(unknown, known_keys())}")
    value = f"={item['input']!r}" if said is None and not isinstance(item["input"], dict) else ""
    return stop(f"{where}{value}: {_sentence(item)}")


def _missing(key: str) -> str:
    remedies = {
        "model.path": "choose a model, such as model=tiny, model=llama3_8b or model.path=FOLDER_OR_HUB_ID",
        "data.train_path": "give the training data, such as data.train_path=FILE.jsonl",
    }
    return f"{key} is not set: {remedies.get(key, f'set {key}=…')}."


def _sentence(item: Any) -> str:
    """Turn one of pydantic's findings into the end of a sentence."""
    message: str = item["msg"]
    if item["type"] == "string_pattern_mismatch":
        return "must be letters, digits, dots, dashes and underscores"
    if item["type"] == "literal_error":
        expected: str = item["ctx"]["expected"]
        words = [w.strip("' ") for w in expected.replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(item["input"]), words, 1)
        return f"must be {expected}" + (f"; did you mean {near[0]}?" if near else "")
    if item["type"] == "model_type":
        return "is a group of keys, not a value"
    if message.startswith("Input should be "):
        message = "must be " + message.removeprefix("Input should be ")
    return message[0].lower() + message[1:]


def _recipe_text(cfg: DictConfig, config: RunConfig, lock: dict[str, Any]) -> str:
    """Return the resolved recipe as YAML, secrets unresolved, without what belongs to one folder alone, and its lock."""
    from yaml import safe_dump

    dumped = config.model_dump(mode="json")
    raw = OmegaConf.to_container(cfg, resolve=False)
    names = re.findall(r"oc\.env:\s*([^,}\s]+)", str(raw))
    secrets = [value for name in names if (value := os.environ.get(name))]

    def restore(node: Any, out: Any) -> None:
        """Put back each interpolation that is a secret or, through other keys, holds one."""
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, (dict, list)):
                restore(value, out[key])
            elif (
                isinstance(value, str)
                and "${" in value
                and ("oc.env" in value or any(s in str(out[key]) for s in secrets))
            ):
                out[key] = value

    restore(raw, dumped)
    for key in ("dir", "resume"):
        dumped["run"].pop(key)
    head = "# @package _global_\n# The resolved recipe of a run: python -m engine recipe=THIS_FILE repeats it.\n"
    if lock:
        dumped[RECIPE_LOCK] = lock
    return head + str(safe_dump(dumped, sort_keys=False, allow_unicode=True))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
