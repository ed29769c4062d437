"""Loading and writing transformers causal language models."""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine import hub
from engine.backends import hf_names
from engine.config import sources as data_sources
from engine.config.schema import ModelSection, RunConfig
from engine.data.template import template_text
from engine.errors import UserError
from kernels.output_layer import LogitOptions


def compute_dtype(model: ModelSection, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward passes."""
    name = model.dtype if model.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def skeleton(section: ModelSection, *, attention: str) -> Any:
    """Return the model without its weights: parameters on the meta device, buffers real.

    Args:
        section: The recipe's model.
        attention: Name in transformers' attention interface.

    Raises:
        UserError: For a configuration that cannot be read, or an unknown field in ``config_overrides``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of when it loads weights is refused
    try:
        config = AutoConfig.from_pretrained(_folder(section), trust_remote_code=section.trust_remote_code)
    except (ValueError, OSError) as error:
        raise UserError(f"model.path={section.path}: {_one_line(error)}.") from error
    for key, value in section.config_overrides.items():
        known = config.to_dict()
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(
                f"model.config_overrides.{key}: {type(config).__name__} has no such field"
                + (f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}.")
            )
        setattr(config, key, value)
    options = {"attn_implementation": attention, "trust_remote_code": section.trust_remote_code}
    try:
        with _parameters_on_meta():
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    except (ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise UserError(f"model.path={section.path}: the model cannot be built ({_one_line(error)}).") from error


def load(section: ModelSection, lm: Any) -> Any:
    """Return the model with the weights of its folder, float32, on the CPU.

    Args:
        section: The recipe's model.
        lm: Its skeleton.

    Raises:
        UserError: For weights that do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            _folder(section),
            config=lm.config,
            dtype=torch.float32,
            attn_implementation=lm.config._attn_implementation,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (ValueError, TypeError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={section.path}: the model cannot be loaded ({_one_line(error)}).") from error
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost:
        raise UserError(
            f"model.path={section.path}: {len(lost)} weights are missing or of another shape ({', '.join(lost[:3])}…), and would "
            "be random; complete the folder, correct model.config_overrides, or train fresh weights with model.init=random."
        )
    untied = {n for n, _ in loaded.named_parameters()} - {n for n, _ in lm.named_parameters()}
    if untied:
        raise UserError(
            f"model.path={section.path}: its configuration ties {', '.join(sorted(untied))} to other weights, and its files hold "
            "others for it; set tie_word_embeddings as its own config.json does."
        )
    return loaded


def sources(section: ModelSection, lm: Any) -> Iterator[tuple[str, Any]]:
    """Return for each parameter and saved buffer what is sliced to read rows of it, without reading the others.

    Experts that the files hold one by one are read so. A folder whose files name the weights otherwise than the model does in
    another way is loaded whole instead, as transformers converts it.

    Args:
        section: The recipe's model.
        lm: Its skeleton, sharded or not.

    Raises:
        UserError: For weights that do not fit the configuration.
    """
    shapes = {name: list(x.shape) for name, x in [*lm.named_parameters(), *saved_buffers(lm).items()]}
    files: dict[str, Any] = {}
    try:
        for file in sorted(_folder(section).glob("*.safetensors")):
            opened = safe_open(file, "pt")
            files |= {name: opened for name in opened.keys()}  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.path={section.path}: the model cannot be loaded ({_one_line(error)}).") from error
    tied = lm.state_dict().keys() - shapes.keys()  # a file that holds these too is for ``load`` to judge
    found = None if tied & files.keys() else _slices(lm, files, shapes)
    if found is None:
        found = load(section, lm).state_dict()
    yield from ((name, found[name]) for name in shapes)


def _slices(lm: Any, files: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any] | None:
    """Return what is sliced of opened files, by name; None if they do not have every weight in its shape."""
    found = {name: file.get_slice(name) for name, file in files.items()}
    if not shapes.keys() <= found.keys():
        found |= hf_names.fused(lm, found)
    fits = all(name in found and found[name].get_shape() == shape for name, shape in shapes.items())
    return found if fits else None


def saved_buffers(lm: Any) -> dict[str, Tensor]:
    """Return the buffers that belong to the weights, by name."""
    buffers = dict(lm.named_buffers())
    return {name: buffers[name] for name in lm.state_dict() if name in buffers}


def layers(lm: Any) -> list[nn.Module]:
    """Return the decoder layers.

    Raises:
        UserError: If the model has none in a list.
    """
    for module in lm.get_decoder().children():
        if isinstance(module, nn.ModuleList):
            return list(module)
    raise UserError(f"{type(lm).__name__} has no list of decoder layers, which sharding and model.compile need.")


def logit_options(lm: Any) -> LogitOptions:
    """Return what the model does to its logits, as its configuration says in one of the ways of transformers' models."""
    config = lm.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon H1
        value = getattr(config, name, None)
        scale *= value if isinstance(value, (int, float)) and value > 0 else 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return LogitOptions(softcap=softcap or None, temperature=divisor / scale)


def initialise(lm: Any, seed: int, into: Callable[[nn.Module, str, Tensor], None]) -> None:
    """Draw fresh weights, one module at a time, each from a random stream of its own.

    They are a function of the seed and the module's name alone, whatever the ranks and shards.

    Args:
        lm: A skeleton, sharded or not.
        seed: ``run.seed``.
        into: Takes (module, parameter's full name, its weights, float32 on the CPU).

    Raises:
        UserError: If the model leaves a parameter without an initial value.
    """
    seen: set[int] = set()
    for path, module in lm.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in seen}
        if not own:
            continue
        seen |= {id(p) for p in own.values()}
        fresh = {n: nn.Parameter(torch.full(p.shape, torch.nan)) for n, p in own.items()}
        before = dict(module._parameters)
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8], "little") >> 1)
        module._parameters.update(fresh)
        lm._init_weights(module)
        module._parameters.update(before)
        for name, p in fresh.items():
            full = f"{path}.{name}" if path else name
            if p.isnan().any():
                raise UserError(
                    f"model.init=random: {type(lm).__name__} does not say how {full} begins; use pretrained weights."
                )
            into(module, full, p.detach())


def into_module(module: nn.Module, name: str, weights: Tensor) -> None:
    """Make the weights a module's own."""
    leaf = name.rpartition(".")[2]
    module._parameters[leaf] = nn.Parameter(weights)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give every parameter that a module registers no storage; buffers keep theirs."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _folder(section: ModelSection) -> Path:
    return hub.folder(section.path, section.revision, weights=section.init == "pretrained")


def write(model: Any, weights: dict[str, Tensor], tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration, tokenizer and template as ``from_pretrained`` loads them.

    Args:
        model: The model.
        weights: What to write for its parameters, by name, tied ones once.
        tokenizer: With the template that was trained.
        folder: An empty folder.
        dtype: Of the written floating-point weights.
    """
    state = {
        name: w.detach().to("cpu", dtype if w.is_floating_point() else w.dtype)
        for name, w in {**saved_buffers(model), **weights}.items()
    }
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    write_description(model, tokenizer, folder, dtype)


def write_description(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json, naming ``dtype``, and the tokenizer."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trained_tokenizer(config: RunConfig) -> Any:
    """Return the tokenizer with the template that the recipe trains; with the model's where its sources have different ones."""
    tokenizer = hub.load_tokenizer(config.model)
    own = data_sources.template(config.data)
    text = template_text(config.model.model_copy(update={} if own == "model" else {"chat_template": own}))
    if text != "default":
        tokenizer.chat_template = text or "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def answer(lm: Any, tokenizer: Any, conversations: Sequence[list[dict[str, Any]]], *, max_new_tokens: int) -> list[str]:
    """Answer conversations by greedy decoding, together in one batch.

    Args:
        lm: A transformers causal language model; left as it was.
        tokenizer: Its tokenizer, with a chat template.
        conversations: Messages up to the assistant's turn.
        max_new_tokens: Longest answer in tokens.

    Returns:
        The text of each answer, without special tokens.
    """
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    texts = [tokenizer.apply_chat_template(list(c), tokenize=False, add_generation_prompt=True) for c in conversations]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(lm.device)
    was_training, attention = lm.training, lm.config._attn_implementation
    try:
        lm.eval()
        lm.set_attn_implementation("sdpa")
        with torch.no_grad():
            out = lm.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
    finally:
        lm.set_attn_implementation(attention)
        lm.train(was_training)
    answers: list[str] = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def end_tokens(lm: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer."""
    ends = lm.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return {ends} if isinstance(ends, int) else set(ends or ())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
