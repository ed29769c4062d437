"""``python -m engine --help``: commands, groups, and every key with its type, default and meaning."""

from __future__ import annotations

import ast
import inspect
import json
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from engine.config import compose, places, schema

HEAD = """\
Usage: python -m engine [group=choice …] [key=value …]        run
       python -m engine -m key=value,value … [run.dir=DIR]    run every combination
       python -m engine.sweep DIR                             see where the runs of a sweep stand
       python -m engine --cfg …                               show the recipe that would run
       python -m engine.preview [--out FILE.html] …           see the first examples as the model will
       python -m engine.report DIR… [--out FILE.html]         compare runs, and the points of sweeps, on a page
       python -m engine.cache list|verify|prune|build …       look after the tokenised data
       python -m engine.recipes list|show|diff|check|freeze   look after recipes and hand them on
       python -m engine.export --checkpoint DIR --out DIR     make a Hugging Face folder
       python -m engine.generate --model DIR [--prompt TEXT]  talk to a model

With neither model, data nor recipe chosen, the quickstart runs: nothing to download, two minutes on two cores.

Groups (group=choice):
"""


def text() -> str:
    """Return the help page."""
    lines = [HEAD.rstrip("\n")]
    for group, choices in places.library().names().items():
        lines.append(f"  {group:<12} {', '.join(c for c in choices if not c.startswith('default'))}")
    defaults = _defaults()
    for name, field in schema.RunConfig.model_fields.items():
        section: Any = field.annotation
        lines += ["", f"{name}: {inspect.getdoc(section)}"]
        lines += _keys(section, name, defaults.get(name, {}))
    return "\n".join(lines)


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring under each field of a section."""
    body = ast.parse(inspect.getsource(model)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            found[before.target.id] = inspect.cleandoc(str(after.value.value))
    return found


def _keys(section: type[BaseModel], prefix: str, defaults: dict[str, Any]) -> list[str]:
    docs = docstrings(section)
    lines = []
    for name, field in section.model_fields.items():
        key = f"{prefix}.{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, schema.Section):
            lines += _keys(field.annotation, key, defaults.get(name, {}))
        else:
            default = defaults.get(name, "???")
            shown = "required" if default == "???" else default if isinstance(default, str) else json.dumps(default)
            lines.append(f"  {key} = {shown}  [{_type(field.annotation)}]\n      {docs.get(name, f'As data.{name}.')}")
            if name == "train":
                own = {n: f.default for n, f in schema.SourceSection.model_fields.items() if not f.is_required()}
                lines += _keys(schema.SourceSection, f"{key}[]", own)
    return lines


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(a if isinstance(a, str) else json.dumps(a) for a in get_args(annotation))
    if origin in (types.UnionType, Union):
        return " | ".join(_type(a) for a in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    if annotation is type(None):
        return "null"
    if origin in (list, tuple):
        return f"list of {_type(get_args(annotation)[0])}"
    return (
        "mapping"
        if origin is dict
        else str(getattr(annotation, "__name__", annotation)).removesuffix("Section").lower()
    )


def _defaults() -> dict[str, Any]:
    """Return the default of every key, interpolations unresolved."""
    from omegaconf import OmegaConf

    cfg = compose.compose_groups({})
    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}
