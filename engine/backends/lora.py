"""LoRA (Hu et al., 2021, arXiv:2106.09685): low-rank adapters on linear layers, trained while the weights beneath them rest.

The layers are peft's, put into the transformers model in place, so that it is called, asked and written as before. Where peft calls
a weight ``q_proj.base_layer.weight`` and an adapter ``q_proj.lora_A.default.weight``, names here are ``q_proj.weight``, as without
LoRA, and ``q_proj.lora_A.weight``, as in peft's own files.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.config.checks import BUILTIN, local_model_folder
from engine.config.schema import ModelSection
from engine.errors import UserError

ADAPTER = "default"
"""peft's name of the one adapter that there is."""
PEFT_PREFIX = "base_model.model."
"""Before every name in peft's files."""
DESCRIPTION = "lora.json"
"""In a checkpoint: the model's section and the seed, from which its base and its layers are made again."""


def plain(name: str) -> str:
    """Return the name of a parameter as it is without LoRA, or that of an adapter's as peft's files have it."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")


def targets(section: ModelSection, lm: Any) -> list[str]:
    """Return the full names of the layers that get an adapter.

    Args:
        section: The recipe's model.
        lm: The model, which has none yet.

    Raises:
        UserError: For each of ``model.lora.target_modules`` that is there under no name, or is no layer that can have one.
    """
    from transformers.pytorch_utils import Conv1D

    head, modules = lm.get_output_embeddings(), dict(lm.named_modules())
    linear = [name for name, m in modules.items() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    if section.lora.target_modules is None:
        return linear
    offered = sorted({name.rpartition(".")[2] for name in linear})
    chosen: list[str] = []
    problems: list[str] = []
    for wanted in section.lora.target_modules:
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        problem = _problem(wanted, [modules[name] for name in found], lm, offered)
        if problem is None:
            chosen += found
        else:
            problems.append(f"model.lora.target_modules: {problem}.")
    if problems:
        raise UserError(*problems)
    return list(dict.fromkeys(chosen))


def _problem(wanted: str, found: Sequence[nn.Module], lm: Any, offered: Sequence[str]) -> str | None:
    """Return why the modules of a name cannot have adapters."""
    from transformers.pytorch_utils import Conv1D

    if not found:
        near = difflib.get_close_matches(wanted, offered, 1)
        hint = f"did you mean {near[0]}? It" if near else "it"
        return f"{type(lm).__name__} has no module {wanted}; {hint} has {', '.join(offered)}"
    for module in found:
        if module is lm.get_output_embeddings():
            return f"{wanted} is the output layer, of which the fused loss reads the matrix alone; take it out"
        if module is lm.get_input_embeddings():
            return f"{wanted} is the embedding, which is no linear layer; take it out"
        if not isinstance(module, (nn.Linear, Conv1D)):
            return f"{wanted} is a {type(module).__name__}, no linear layer; choose of {', '.join(offered)}"
    return None


def inject(section: ModelSection, lm: Any, dtype: torch.dtype) -> None:
    """Freeze the model in the compute type, and give its layers adapters: float32, on the meta device, all that is trained.

    Args:
        section: The recipe's model.
        lm: The model, on any device; changed in place.
        dtype: Compute type, which frozen weights are kept in and nothing else.

    Raises:
        UserError: See ``targets``.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen, alpha = targets(section, lm), section.lora.alpha
    config = LoraConfig(
        r=section.lora.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=section.lora.dropout,
        target_modules=_short(chosen, lm),
        task_type="CAUSAL_LM",
        base_model_name_or_path=_anywhere(section).path,
        revision=section.revision,
    )
    for p in lm.parameters():
        p.data = p.data.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of it sets right, or is refused
        inject_adapter_in_model(config, lm, low_cpu_mem_usage=True)
    found = layers(lm).keys()
    if found != set(chosen):  # a name that experts once had, which are one tensor now
        others = sorted({name.rpartition(".")[2] for name in found & set(chosen)})
        raise UserError(
            f"model.lora.target_modules: peft takes {min(set(chosen) - found, default='them')} of {type(lm).__name__} for one of "
            f"its experts, which have no adapters here; set it to [{', '.join(others)}]."
        )


def _short(chosen: list[str], lm: Any) -> list[str]:
    """Return the last parts of full names, as adapters that are passed on have them, where these name the same layers."""
    leaves = {name.rpartition(".")[2] for name in chosen}
    covered = {name for name, _ in lm.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if covered == set(chosen) else chosen


def _anywhere(section: ModelSection) -> ModelSection:
    """Return the section with a path that does not depend on the working folder."""
    local = None if section.path.startswith(BUILTIN) else local_model_folder(section.path)
    return section if local is None else section.model_copy(update={"path": str(local.absolute())})


def layers(lm: Any) -> dict[str, Any]:
    """Return the layers that have adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in lm.named_modules() if isinstance(m, LoraLayer)}


def initialise(lm: Any, seed: int, into: Callable[[nn.Module, str, Tensor], None]) -> None:
    """Draw A as peft does, He's uniform distribution, from a random stream of each layer's own; B is zero.

    Args:
        lm: A model with adapters, sharded or not.
        seed: ``run.seed``.
        into: Takes (module, the parameter's plain name, its weights, float32 on the CPU).
    """
    for path, layer in layers(lm).items():
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        digest = hashlib.sha256(f"{seed}/{path}.lora_A".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = nn.init.kaiming_uniform_(torch.empty(a.weight.shape), a=math.sqrt(5), generator=stream)
        into(a, f"{path}.lora_A.weight", drawn)
        into(b, f"{path}.lora_B.weight", torch.zeros(b.weight.shape))


@contextmanager
def disabled(adapted: Sequence[Any]) -> Iterator[None]:
    """Scale the adapters of some layers to nothing for a while: the model is its base.

    peft's own way of disabling them changes what requires a gradient, which sharding takes note of.
    """
    for layer in adapted:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in adapted:
            layer.set_scale(ADAPTER, 1.0)


def merged(lm: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the model without LoRA: W + α/r · B A, added in float32, in W's type.

    Args:
        lm: The model with adapters; its own weights are not looked at.
        weights: Those of base and adapters by plain names, on the CPU.
    """
    found = dict(weights)
    for path, layer in layers(lm).items():
        a_RI, b_OR = found.pop(f"{path}.lora_A.weight").float(), found.pop(f"{path}.lora_B.weight").float()
        delta = layer.scaling[ADAPTER] * (b_OR @ a_RI)
        base = found[f"{path}.weight"]
        found[f"{path}.weight"] = (base.float() + (delta.t() if layer.fan_in_fan_out else delta)).to(base.dtype)
    return found


def write(lm: Any, weights: Mapping[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write adapters and tokenizer as ``PeftModel.from_pretrained`` loads them onto ``model.path``.

    Args:
        lm: The model with adapters.
        weights: The adapters' by plain names, float32 on the CPU; others are left out.
        tokenizer: With the template that was trained.
        folder: An empty folder.
    """
    config = copy.copy(lm.peft_config[ADAPTER])
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)
    config.save_pretrained(folder)
    names = [f"{path}.lora_{matrix}.weight" for path in layers(lm) for matrix in "AB"]
    save_file(
        {f"{PEFT_PREFIX}{name}": weights[name].contiguous() for name in names},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    tokenizer.save_pretrained(folder)


def describe(section: ModelSection, seed: int, folder: Path) -> None:
    """Write what a checkpoint's adapters belong to."""
    text = json.dumps({"model": _anywhere(section).model_dump(mode="json"), "seed": seed}, indent=2)
    (folder / DESCRIPTION).write_text(text + "\n")


def described(folder: Path) -> tuple[ModelSection, int]:
    """Read a checkpoint's description: the model's section and the seed."""
    found = json.loads((folder / DESCRIPTION).read_text())
    return ModelSection.model_validate(found["model"]), found["seed"]


def mismatch(saved: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> str | None:
    """Return how the adapters of a checkpoint are not those of the run; None if that is not what tells them apart.

    Args:
        saved: Shapes of the checkpoint's tensors by name.
        wanted: Those of the run's.
    """
    theirs, ours = ({n: s for n, s in shapes.items() if ".lora_A." in n} for shapes in (saved, wanted))
    if not theirs and ours:
        return "holds all weights of a model, and this run trains LoRA adapters; set model.lora.enabled=false to go on with it"
    if theirs and not ours:
        return "holds LoRA adapters, and this run trains all weights; set model.lora as in the run that wrote it"
    if theirs == ours:
        return None
    told = [f"rank {'/'.join(map(str, sorted({s[0] for s in x.values()})))} on {_leaves(x)}" for x in (theirs, ours)]
    return (
        f"holds other LoRA adapters ({told[0]}) than this run's ({told[1]}); set model.lora as in the run that wrote it"
    )


def _leaves(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the names of layers without where they are, and their number."""
    layers = {name.partition("/")[2].partition(".lora_A.")[0] for name in shapes if name.startswith("model/")}
    return f"{len(layers)} layers: {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}"
